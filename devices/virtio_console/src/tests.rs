use super::*;
use ::device::Device;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use virtio::status;
use virtio::test_driver::{BUFFERS, Driver, DriverQueue, MEMORY_SIZE, copy_memory};

struct Terminal {
    output: Mutex<Vec<u8>>,
    /// How much more output it takes.
    appetite: AtomicUsize,
    rooms: AtomicUsize,
    open: Mutex<Vec<bool>>,
}

impl Terminal {
    fn new(appetite: usize) -> Arc<Self> {
        Arc::new(Self {
            output: Mutex::default(),
            appetite: AtomicUsize::new(appetite),
            rooms: AtomicUsize::new(0),
            open: Mutex::default(),
        })
    }

    fn text(&self) -> String {
        String::from_utf8(self.output.lock().clone()).unwrap()
    }
}

impl ConsoleBackend for Terminal {
    fn write(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.appetite.load(Ordering::SeqCst)).min(1000);
        self.appetite.fetch_sub(taken, Ordering::SeqCst);
        self.output.lock().extend(&bytes[..taken]);
        taken
    }
    fn input_room(&self) {
        self.rooms.fetch_add(1, Ordering::SeqCst);
    }
    fn guest_opened(&self, open: bool) {
        self.open.lock().push(open);
    }
}

fn console(appetite: usize) -> (Arc<VirtioConsole>, Arc<Terminal>) {
    let terminal = Terminal::new(appetite);
    (Arc::new(VirtioConsole::new(vec![PortConfig::console(terminal.clone())]).unwrap()), terminal)
}

/// Makes `text` available to be written, at a place for text number `number`.
fn put(driver: &Driver, queue: &mut DriverQueue, number: u64, text: &[u8]) {
    let place = BUFFERS + 0x1_0000 * number;
    driver.memory.write(place, text).unwrap();
    let half = text.len() as u32 / 2;
    queue.add(&[(place, half, false), (place + u64::from(half), text.len() as u32 - half, false)]);
    driver.ring(queue.index);
}

/// Waits for the next input in the buffer at `place`.
fn get(driver: &Driver, queue: &mut DriverQueue, place: u64) -> Vec<u8> {
    let mut used = None;
    driver.wait_for("input", || {
        used = queue.take_used();
        used.is_some()
    });
    let mut data = vec![0; used.unwrap().1 as usize];
    driver.memory.read(place, &mut data).unwrap();
    data
}

#[test]
fn text_goes_both_ways() {
    let (device, terminal) = console(usize::MAX);
    let driver = Driver::new(device.clone());
    assert_eq!(driver.offered() & feature::MULTIPORT, 0);
    let mut queues = driver.set_up(feature::SIZE | virtio::feature::TRANSPORT, &[16, 16]);
    put(&driver, &mut queues[1], 0, &[b'x'; 9000]);
    put(&driver, &mut queues[1], 1, b"hello");
    driver.wait_for("output", || terminal.output.lock().len() == 9005);
    assert!(terminal.text().ends_with("xhello"));
    assert_eq!(device.receive(0, b"typed"), 5);
    queues[0].add(&[(BUFFERS, 3, true)]);
    queues[0].add(&[(BUFFERS + 0x100, 64, true)]);
    driver.ring(0);
    assert_eq!(get(&driver, &mut queues[0], BUFFERS), b"typ");
    assert_eq!(get(&driver, &mut queues[0], BUFFERS + 0x100), b"ed");
}

#[test]
fn a_full_terminal_holds_output_back_even_over_save_and_restore() {
    let (device, terminal) = console(1003);
    let driver = Driver::new(device.clone());
    let mut queues = driver.set_up(0, &[16, 16]);
    put(&driver, &mut queues[1], 0, &[b'a'; 2000]);
    put(&driver, &mut queues[1], 1, b"end");
    driver.wait_for("some output", || terminal.output.lock().len() == 1003);
    driver.device.stop();
    let state = driver.device.save();
    let (other, other_terminal) = console(900);
    let restored = Driver::with_memory(other.clone(), copy_memory(&driver.memory));
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    restored.device.start();
    restored.wait_for("more output", || other_terminal.output.lock().len() == 900);
    other_terminal.appetite.store(usize::MAX, Ordering::SeqCst);
    other.transmit_ready(0);
    restored.wait_for("all output", || other_terminal.text().ends_with("end"));
    assert_eq!(other_terminal.output.lock().len(), 1000);
    let mut queue = queues[1].over(&restored.memory);
    restored.wait_for("both buffers", || queue.take_used().is_some());
}

#[test]
fn input_is_bounded_and_its_sender_hears_of_room() {
    let (device, terminal) = console(0);
    assert_eq!(device.receive(0, b"early"), 0);
    assert_eq!(device.receive(1, b"b"), 0);
    let driver = Driver::new(device.clone());
    let mut queues = driver.set_up(0, &[16, 16]);
    assert_eq!(terminal.rooms.load(Ordering::SeqCst), 1);
    assert_eq!(device.receive(0, &[b'i'; INPUT_CAPACITY - 1]), INPUT_CAPACITY - 1);
    assert_eq!(device.receive(0, b"ab"), 1);
    assert_eq!(device.receive(0, b"b"), 0);
    queues[0].add(&[(BUFFERS, 100, true)]);
    driver.ring(0);
    assert_eq!(get(&driver, &mut queues[0], BUFFERS), [b'i'; 100]);
    driver.wait_for("word of room", || terminal.rooms.load(Ordering::SeqCst) == 2);
    assert_eq!(device.receive(0, &[0; 200]), 100);
}

#[test]
fn the_size_is_in_the_configuration_and_changes_interrupt() {
    let (device, terminal) = console(usize::MAX);
    let driver = Driver::new(device.clone());
    device.resize(100, 40);
    driver.set_up(feature::SIZE, &[16, 16]);
    assert_eq!((driver.config_int(0, 2), driver.config_int(2, 2), driver.config_int(4, 4)), (100, 40, 1));
    device.resize(132, 50);
    assert_eq!(driver.config_int(0, 4), 50 << 16 | 132);
    assert_eq!(driver.recorder.messages.lock().last().unwrap().data, 0x40);
    driver.set_config(8, &[b'!', 0, 0, 0]);
    assert_eq!(terminal.text(), "!");
}

/// Makes buffers for control messages available, and collects messages as port, event, value, extra.
struct ControlBuffers {
    queue: DriverQueue,
    read: u64,
}

type Message = (u32, u16, u16, Vec<u8>);

impl ControlBuffers {
    const PLACE: u64 = BUFFERS + 0x20_0000;

    fn new(mut queue: DriverQueue) -> Self {
        for index in 0..64 {
            queue.add(&[(Self::PLACE + 256 * index, 256, true)]);
        }
        Self { queue, read: 0 }
    }

    fn next(&mut self, driver: &Driver) -> Message {
        let data = get(driver, &mut self.queue, Self::PLACE + 256 * self.read);
        self.read += 1;
        let word = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
        (word(0).into(), word(4), word(6), data[8..].to_vec())
    }
}

fn control(driver: &Driver, queue: &mut DriverQueue, id: u32, event: u16, value: u16) {
    let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
    driver.memory.write(BUFFERS + 0x10_0000, &message).unwrap();
    driver.transact(queue, &[(BUFFERS + 0x10_0000, 8, false)]);
}

#[test]
fn several_ports_are_announced_named_opened_and_used() {
    let (terminal, agent) = (Terminal::new(usize::MAX), Terminal::new(usize::MAX));
    let ports = vec![PortConfig::console(terminal.clone()), PortConfig::channel("agent", agent.clone())];
    let device = Arc::new(VirtioConsole::new(ports).unwrap());
    let driver = Driver::new(device.clone());
    let mut queues = driver.set_up(feature::MULTIPORT | feature::SIZE, &[16, 16, 64, 16, 16, 16]);
    let mut messages = ControlBuffers::new(queues[2].clone());
    control(&driver, &mut queues[3], 0, 0, 1);
    assert_eq!(messages.next(&driver), (0, 1, 0, vec![]));
    assert_eq!(messages.next(&driver), (1, 1, 0, vec![]));
    control(&driver, &mut queues[3], 0, 3, 1);
    assert_eq!(messages.next(&driver), (0, 4, 1, vec![]));
    assert_eq!(messages.next(&driver), (0, 5, 0, vec![80, 0, 25, 0]));
    assert_eq!(messages.next(&driver), (0, 6, 1, vec![]));
    control(&driver, &mut queues[3], 1, 3, 1);
    assert_eq!(messages.next(&driver), (1, 7, 1, b"agent".to_vec()));
    assert_eq!(messages.next(&driver), (1, 6, 1, vec![]));
    // Input only once the guest opened the port.
    assert_eq!(device.receive(1, b"x"), 0);
    control(&driver, &mut queues[3], 1, 6, 1);
    assert_eq!((agent.open.lock().clone(), agent.rooms.load(Ordering::SeqCst)), (vec![true], 1));
    assert_eq!(device.receive(1, b"ping"), 4);
    queues[4].add(&[(BUFFERS, 64, true)]);
    driver.ring(4);
    assert_eq!(get(&driver, &mut queues[4], BUFFERS), b"ping");
    put(&driver, &mut queues[5], 3, b"pong");
    driver.wait_for("the answer", || agent.text() == "pong");
    device.resize(90, 30);
    assert_eq!(messages.next(&driver), (0, 5, 0, vec![90, 0, 30, 0]));
    device.set_connected(1, false);
    assert_eq!(messages.next(&driver), (1, 6, 0, vec![]));
    // Nonsense is ignored, too short a message is not.
    control(&driver, &mut queues[3], 9, 3, 1);
    control(&driver, &mut queues[3], 1, 77, 1);
    queues[3].add(&[(BUFFERS, 7, false)]);
    driver.ring(3);
    driver.wait_needs_reset();
    driver.set_status(0);
    assert_eq!(agent.open.lock().clone(), [true, false]);
}

#[test]
fn impossible_consoles_are_refused() {
    let port = || PortConfig::console(Terminal::new(0));
    assert!(matches!(VirtioConsole::new(vec![]), Err(ConsoleError::Ports(0))));
    assert!(matches!(VirtioConsole::new(vec![port(); 32]), Err(ConsoleError::Ports(32))));
    let long = PortConfig::channel("n".repeat(129), Terminal::new(0));
    assert!(matches!(VirtioConsole::new(vec![long]), Err(ConsoleError::Name(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the driver puts into whichever queue, the device neither dies nor hangs, and a restored one
    /// has the same state.
    #[test]
    fn random_buffers_are_harmless(
        actions in prop::collection::vec(
            (0usize..6, prop_oneof![Just(BUFFERS), BUFFERS..MEMORY_SIZE], 0u32..300, any::<bool>()), 0..40),
        content in prop::collection::vec(0u8..8, 64),
    ) {
        let ports = || vec![
            PortConfig::console(Terminal::new(500)),
            PortConfig::channel("agent", Terminal::new(0)),
        ];
        let device = Arc::new(VirtioConsole::new(ports()).unwrap());
        let driver = Driver::new(device.clone());
        let mut queues = driver.set_up(feature::MULTIPORT, &[64; 6]);
        driver.memory.write(BUFFERS, &content).unwrap();
        for (queue, address, len, write) in actions {
            queues[queue].add(&[(address, len, write)]);
            driver.ring(queue as u16);
            device.receive(queue % 2, &content);
        }
        driver.device.stop();
        let state = driver.device.save();
        let restored = Driver::with_memory(
            Arc::new(VirtioConsole::new(ports()).unwrap()), copy_memory(&driver.memory));
        restored.device.restore(&state).unwrap();
        prop_assert_eq!(restored.device.save(), state);
        let failed = driver.status() & status::NEEDS_RESET;
        prop_assert_eq!(restored.status() & status::NEEDS_RESET, failed);
        restored.device.start();
        restored.device.stop();
        prop_assert!(restored.negotiate(0));
    }
}
