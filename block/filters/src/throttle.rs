//! Limits of speed: requests and bytes a second, of reads, of writes, and of both, with bursts.
//!
//! Each limit is a bucket that requests fill and time empties at the limit's rate. Requests wait while a bucket is
//! fuller than what a burst may bring into it: a tenth of a second's worth without a burst, else the burst's rate for
//! as long as it may last; a second, smaller bucket then keeps the burst's own rate. Nodes of one group share buckets.

use crate::filter::{Filter, FilterDriver, open_below};
pub use block_graph::Direction;
use block_graph::{
    Admission, Driver, DriverKind, Edge, Error, OpenContext, OpenFlags, Options, Result, Role, WriteFlags,
    ZeroFlags, async_trait,
};
use futures_util::lock::Mutex as Turn;
use io_loop::IoVec;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The largest rate, per second.
const MOST_RATE: u64 = 1_000_000_000_000_000;

/// The limits in the order of [`ThrottleLimits::limits`], by their names in options.
const NAMES: [&str; 6] = ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];

/// The limits that count a request's bytes, and those that count it. Zeroing and discarding are writing.
fn counted_by(direction: Direction) -> ([usize; 2], [usize; 2]) {
    match direction {
        Direction::Read => ([0, 1], [3, 4]),
        Direction::Write => ([0, 2], [3, 5]),
    }
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Bytes or requests a second in the long run; 0 for no limit.
    pub rate: u64,
    /// Bytes or requests a second in bursts; 0 for none.
    pub burst: u64,
    /// Seconds that a burst may last.
    pub burst_seconds: u64,
}

impl Default for Limit {
    fn default() -> Self {
        Self { rate: 0, burst: 0, burst_seconds: 1 }
    }
}

/// The limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    /// Bytes: total, read, write; requests: total, read, write.
    pub limits: [Limit; 6],
    /// Requests longer than this count as several, by their length; 0 for no such thing. In bytes.
    pub request_bytes: u64,
}

impl ThrottleLimits {
    /// Takes limits out of options: `bps-total`, `bps-total-max`, `bps-total-max-length`, …, `iops-size`, each with
    /// `prefix` before it ("throttling." or "").
    ///
    /// # Errors
    /// They contradict each other, or are none.
    pub fn take(options: &mut Options, prefix: &str) -> Result<Self> {
        let mut limits = Self::default();
        let mut number = |name: String| options.take_number(&format!("{prefix}{name}"));
        for (limit, name) in limits.limits.iter_mut().zip(NAMES) {
            limit.rate = number(name.to_owned())?.unwrap_or(0);
            limit.burst = number(format!("{name}-max"))?.unwrap_or(0);
            limit.burst_seconds = number(format!("{name}-max-length"))?.unwrap_or(1);
        }
        limits.request_bytes = number("iops-size".to_owned())?.unwrap_or(0);
        limits.check()?;
        Ok(limits)
    }

    /// Whether the limits make sense together.
    ///
    /// # Errors
    /// That they do not.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: &str| Err(Error::invalid(message));
        let both = |of: fn(&Limit) -> u64| {
            [0, 3].into_iter().any(|total| {
                let part = |at: usize| of(&self.limits[at]) > 0;
                part(total) && (part(total + 1) || part(total + 2))
            })
        };
        if both(|limit| limit.rate) || both(|limit| limit.burst) {
            return wrong("bps/iops/max total values and read/write values cannot be used at the same time");
        }
        if self.request_bytes > 0 && self.limits[3..].iter().all(|limit| limit.rate == 0) {
            return wrong("iops size requires an iops value to be set");
        }
        for limit in &self.limits {
            if limit.rate > MOST_RATE || limit.burst > MOST_RATE {
                let message = format!("bps/iops/max values must be within [0, {MOST_RATE}]");
                return Err(Error::invalid(message));
            }
            if limit.burst_seconds == 0 {
                return wrong("the burst length cannot be 0");
            }
            if limit.burst_seconds > 1 && limit.burst == 0 {
                return wrong("burst length set without burst rate");
            }
            if limit.burst > 0 && limit.burst_seconds > MOST_RATE / limit.burst {
                return wrong("burst length too high for this burst rate");
            }
            if limit.burst > 0 && limit.rate == 0 {
                return wrong("bps_max/iops_max require corresponding bps/iops values");
            }
            if limit.burst > 0 && limit.burst < limit.rate {
                return wrong("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

/// How full a limit's two buckets are, in its unit.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    level: f64,
    burst_level: f64,
}

impl Bucket {
    fn leak(&mut self, limit: &Limit, seconds: f64) {
        self.level = (self.level - limit.rate as f64 * seconds).max(0.0);
        self.burst_level = (self.burst_level - limit.burst as f64 * seconds).max(0.0);
    }

    fn fill(&mut self, limit: &Limit, units: f64) {
        self.level += units;
        if limit.burst_seconds > 1 {
            self.burst_level += units;
        }
    }

    /// The seconds until a request may go; 0 if it may now.
    fn wait(&self, limit: &Limit) -> f64 {
        if limit.rate == 0 {
            return 0.0;
        }
        let size = if limit.burst == 0 {
            limit.rate as f64 / 10.0
        } else {
            limit.burst as f64 * limit.burst_seconds as f64
        };
        if self.level > size {
            return (self.level - size) / limit.rate as f64;
        }
        let burst_size = limit.burst as f64 / 10.0;
        if limit.burst_seconds > 1 && self.burst_level > burst_size {
            return (self.burst_level - burst_size) / limit.burst as f64;
        }
        0.0
    }
}

#[derive(Debug)]
struct State {
    limits: ThrottleLimits,
    buckets: [Bucket; 6],
    leaked: Instant,
}

impl State {
    fn leak(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.leaked).as_secs_f64();
        self.leaked = now;
        for (bucket, limit) in self.buckets.iter_mut().zip(&self.limits.limits) {
            bucket.leak(limit, seconds);
        }
    }

    /// Lets a request go, which fills the buckets, or says how long it is to wait.
    fn admit(&mut self, bytes: u64, direction: Direction) -> Option<Duration> {
        let (of_bytes, of_requests) = counted_by(direction);
        let all = of_bytes.into_iter().chain(of_requests);
        let wait = all.map(|at| self.buckets[at].wait(&self.limits.limits[at])).fold(0.0, f64::max);
        if wait > 0.0 {
            // A wait that is rounded to nothing would be none.
            return Some(Duration::from_secs_f64(wait).max(Duration::from_micros(1)));
        }
        let size = self.limits.request_bytes;
        let requests = if size > 0 && bytes > size { bytes as f64 / size as f64 } else { 1.0 };
        for at in of_bytes {
            self.buckets[at].fill(&self.limits.limits[at], bytes as f64);
        }
        for at in of_requests {
            self.buckets[at].fill(&self.limits.limits[at], requests);
        }
        None
    }
}

/// Limits that several nodes share.
#[derive(Debug)]
pub struct ThrottleGroup {
    state: Mutex<State>,
    /// Who is the next to go: requests of one direction keep their order.
    turns: [Turn<()>; 2],
}

impl ThrottleGroup {
    /// A group with these limits.
    #[must_use]
    pub fn new(limits: ThrottleLimits) -> Arc<Self> {
        let state = State { limits, buckets: Default::default(), leaked: Instant::now() };
        Arc::new(Self { state: Mutex::new(state), turns: [Turn::new(()), Turn::new(())] })
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> ThrottleLimits {
        self.state.lock().limits
    }

    /// Sets other limits, from now on.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut state = self.state.lock();
        state.limits = limits;
        state.buckets = Default::default();
        state.leaked = Instant::now();
    }

    /// Waits until a request of so many bytes may go.
    pub async fn admit(&self, bytes: u64, direction: Direction) {
        let _turn = self.turns[usize::from(direction == Direction::Write)].lock().await;
        loop {
            let wait = {
                let mut state = self.state.lock();
                state.leak(Instant::now());
                state.admit(bytes, direction)
            };
            let Some(wait) = wait else { return };
            io_loop::sleep(wait).await;
        }
    }
}

#[async_trait(?Send)]
impl Admission for ThrottleGroup {
    async fn admit(&self, bytes: u64, direction: Direction) {
        Self::admit(self, bytes, direction).await;
    }
}

/// The filter `throttle`.
#[derive(Debug)]
struct Throttle {
    file: Arc<Edge>,
    name: String,
    group: Arc<ThrottleGroup>,
}

#[async_trait(?Send)]
impl Filter for Throttle {
    const NAME: &'static str = "throttle";

    fn below(&self) -> &Arc<Edge> {
        &self.file
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.group.admit(into.len() as u64, Direction::Read).await;
        self.file.node().read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.group.admit(from.len() as u64, Direction::Write).await;
        self.file.node().write(offset, from, flags).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.group.admit(len, Direction::Write).await;
        self.file.node().write_zeroes(offset, len, flags).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.group.admit(len, Direction::Write).await;
        self.file.node().discard(offset, len).await
    }

    fn open_options(&self) -> Options {
        Options::with("throttle-group", self.name.as_str())
    }
}

/// Groups by name.
#[derive(Debug, Default)]
pub struct ThrottleGroups {
    named: Mutex<HashMap<String, Arc<ThrottleGroup>>>,
}

impl ThrottleGroups {
    /// Adds a group, in place of one that had its name.
    pub fn add(&self, name: impl Into<String>, group: Arc<ThrottleGroup>) {
        self.named.lock().insert(name.into(), group);
    }

    /// The group of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        self.named.lock().get(name).cloned()
    }
}

/// The driver `throttle`, with the groups that its nodes may name.
#[derive(Debug, Clone, Default)]
pub struct ThrottleKind {
    /// The groups.
    pub groups: Arc<ThrottleGroups>,
}

#[async_trait(?Send)]
impl DriverKind for ThrottleKind {
    fn name(&self) -> &'static str {
        Throttle::NAME
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let name = options.take_text("throttle-group");
        let name = name.ok_or_else(|| Error::invalid("Please specify a throttle group"))?;
        let missing = || Error::invalid(format!("Throttle group '{name}' does not exist"));
        let group = self.groups.get(&name).ok_or_else(missing)?;
        let file = open_below(context, options, "file", flags).await?;
        Ok(Box::new(FilterDriver(Throttle { file: Edge::new(Role::Filtered, file), name, group })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(pairs: &[(&str, &str)]) -> Result<ThrottleLimits> {
        let mut options: Options = pairs.iter().map(|(name, value)| (*name, *value)).collect();
        ThrottleLimits::take(&mut options, "")
    }

    /// How many requests of so many bytes go in so many seconds of a clock that is moved by hand.
    fn requests_in(limits: ThrottleLimits, seconds: f64, bytes: u64, direction: Direction) -> u64 {
        let start = Instant::now();
        let mut state = State { limits, buckets: Default::default(), leaked: start };
        let (mut now, mut count) = (0.0, 0);
        loop {
            state.leak(start + Duration::from_secs_f64(now));
            match state.admit(bytes, direction) {
                Some(wait) => now += wait.as_secs_f64(),
                None => count += 1,
            }
            if now >= seconds {
                return count;
            }
        }
    }

    fn near(count: u64, expected: u64) {
        assert!(count.abs_diff(expected) <= expected / 20 + 2, "{count} is not about {expected}");
    }

    #[test]
    fn rates_are_kept_in_the_long_run() {
        let iops = limits(&[("iops-total", "100")]).unwrap();
        near(requests_in(iops, 100.0, 4096, Direction::Read), 10_000);
        let bps = limits(&[("bps-write", "1000000")]).unwrap();
        near(requests_in(bps, 10.0, 10_000, Direction::Write), 1010);
        assert_eq!(bps.limits[2].rate, 1_000_000);
        let sized = limits(&[("iops-read", "100"), ("iops-size", "4096")]).unwrap();
        near(requests_in(sized, 100.0, 16_384, Direction::Read), 2500);
    }

    #[test]
    fn bursts_last_as_long_as_they_may() {
        let pairs = [("iops-total", "100"), ("iops-total-max", "1000"), ("iops-total-max-length", "10")];
        let burst = limits(&pairs).unwrap();
        // At 1000 a second until the bucket of 10000 is full, which leaks at 100 a second: about 11 seconds.
        near(requests_in(burst, 5.0, 512, Direction::Write), 5100);
        near(requests_in(burst, 111.0, 512, Direction::Write), 11_111 + 10_000);
    }

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let refused = |pairs: &[(&str, &str)]| limits(pairs).unwrap_err().to_string();
        assert!(
            refused(&[("bps-total", "1"), ("bps-read", "1")]).contains("cannot be used at the same time")
        );
        assert_eq!(refused(&[("iops-size", "1")]), "iops size requires an iops value to be set");
        assert_eq!(refused(&[("iops-read-max-length", "0")]), "the burst length cannot be 0");
        assert_eq!(
            refused(&[("iops-read", "10"), ("iops-read-max-length", "2")]),
            "burst length set without burst rate"
        );
        assert_eq!(
            refused(&[("bps-read-max", "5")]),
            "bps_max/iops_max require corresponding bps/iops values"
        );
        assert_eq!(
            refused(&[("bps-read", "10"), ("bps-read-max", "5")]),
            "bps_max/iops_max cannot be lower than bps/iops"
        );
        assert!(refused(&[("bps-read", "1000000000000001")]).contains("must be within"));
    }
}
