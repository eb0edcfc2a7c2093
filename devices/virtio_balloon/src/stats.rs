//! The statistics queue (5.5.6.3): the driver fills a buffer, and fills it anew each time that the device
//! gives it back.

use parking_lot::Mutex;
use virtio::{Chain, QueueError, QueueHandle, StopToken};

/// Bytes in a statistic: tag and value.
const STAT_LEN: usize = 10;
/// The most statistics that are looked at in one buffer.
const MAX_STATS: usize = 64;

/// How a guest's memory fares, by its own word. What a driver does not know it leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonStats {
    /// How often the driver has sent statistics since it was started.
    pub updates: u64,
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything.
    pub free_memory: Option<u64>,
    /// Bytes in all.
    pub total_memory: Option<u64>,
    /// Bytes that could be given up without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of file contents that could be given up at once.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated.
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub huge_page_failures: Option<u64>,
}

impl BalloonStats {
    fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.huge_page_allocations,
            9 => &mut self.huge_page_failures,
            _ => return,
        };
        *field = Some(value);
    }
}

#[derive(Debug, Default)]
struct Inner {
    queue: Option<QueueHandle>,
    /// The driver's buffer, until it is asked for more.
    held: Option<Chain>,
    requested: bool,
    newest: Option<BalloonStats>,
}

#[derive(Debug, Default)]
pub(crate) struct StatsQueue {
    inner: Mutex<Inner>,
}

impl StatsQueue {
    pub(crate) fn attach(&self, queue: QueueHandle) {
        self.inner.lock().queue = Some(queue);
    }

    pub(crate) fn reset(&self) {
        *self.inner.lock() = Inner::default();
    }

    pub(crate) fn request(&self) {
        self.inner.lock().requested = true;
    }

    pub(crate) fn newest(&self) -> Option<BalloonStats> {
        self.inner.lock().newest
    }

    /// Puts the buffer held back among the available ones, where a restored device finds it.
    pub(crate) fn stop(&self) {
        let mut inner = self.inner.lock();
        if let (Some(_), Some(queue)) = (inner.held.take(), &inner.queue) {
            queue.put_back();
        }
    }

    /// Takes the driver's buffers, and gives one back if statistics are asked for.
    pub(crate) fn serve(&self, queue: &QueueHandle, stop: &StopToken<'_>) -> Result<(), QueueError> {
        while !stop.stopping() {
            let (held, requested) = {
                let inner = self.inner.lock();
                (inner.held.clone(), inner.requested)
            };
            match held {
                Some(chain) if requested => {
                    {
                        let mut inner = self.inner.lock();
                        inner.held = None;
                        inner.requested = false;
                    }
                    queue.complete(&chain, 0)?;
                }
                Some(_) => {
                    // A driver has one buffer; of a second nothing is known but that it is one too many.
                    return if queue.pop()?.is_none() { Ok(()) } else { Err(TWO_BUFFERS) };
                }
                None => {
                    let Some(chain) = queue.pop()? else {
                        if queue.enable_doorbell()? {
                            continue;
                        }
                        return Ok(());
                    };
                    let stats = parse(queue, &chain)?;
                    let mut inner = self.inner.lock();
                    let updates = inner.newest.map_or(0, |newest| newest.updates) + 1;
                    inner.newest = Some(BalloonStats { updates, ..stats });
                    inner.held = Some(chain);
                }
            }
        }
        Ok(())
    }
}

const TWO_BUFFERS: QueueError = QueueError::BadRequest("a second buffer for statistics");

fn parse(queue: &QueueHandle, chain: &Chain) -> Result<BalloonStats, QueueError> {
    let count = (chain.readable_len() as usize / STAT_LEN).min(MAX_STATS);
    let mut data = [0; STAT_LEN * MAX_STATS];
    let data = &mut data[..STAT_LEN * count];
    chain.read(&queue.memory, 0, data)?;
    let mut stats = BalloonStats::default();
    for [a, b, c, d, e, f, g, h, i, j] in data.as_chunks::<STAT_LEN>().0 {
        stats.set(u16::from_le_bytes([*a, *b]), u64::from_le_bytes([*c, *d, *e, *f, *g, *h, *i, *j]));
    }
    Ok(stats)
}
