use super::registers::*;
use super::*;
use irq::IrqSink;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// A backend that takes everything, or nothing while `blocked`.
#[derive(Default)]
struct Recorder {
    blocked: AtomicBool,
    bytes: Mutex<Vec<u8>>,
    room_calls: AtomicUsize,
    outputs: Mutex<Vec<(bool, bool)>>,
    breaks: Mutex<Vec<bool>>,
}

impl SerialBackend for Recorder {
    fn write(&self, bytes: &[u8]) -> usize {
        if self.blocked.load(Ordering::SeqCst) {
            return 0;
        }
        self.bytes.lock().extend_from_slice(bytes);
        bytes.len()
    }
    fn input_room(&self) {
        self.room_calls.fetch_add(1, Ordering::SeqCst);
    }
    fn modem_outputs(&self, data_terminal_ready: bool, request_to_send: bool) {
        self.outputs.lock().push((data_terminal_ready, request_to_send));
    }
    fn send_break(&self, on: bool) {
        self.breaks.lock().push(on);
    }
}

struct Port {
    serial: Arc<Serial>,
    backend: Arc<Recorder>,
    line: IrqLine,
}

impl Port {
    fn new() -> Self {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_level(&self, _pin: u32, _level: bool) {}
        }
        let backend = Arc::new(Recorder::default());
        let line = IrqLine::new(Arc::new(Nowhere), 4);
        Self { serial: Serial::new(line.clone(), backend.clone()), backend, line }
    }

    fn read(&self, register: u16) -> u8 {
        let mut data = [0];
        self.serial.pio_read(register, &mut data);
        data[0]
    }

    fn write(&self, register: u16, value: u8) {
        self.serial.pio_write(register, &[value]);
    }

    fn interrupts(&self) -> bool {
        self.line.level()
    }
}

#[test]
fn a_driver_recognises_a_16550a() {
    let port = Port::new();
    port.write(IER, 0);
    assert_eq!(port.read(IER), 0);
    port.write(IER, 0xff);
    assert_eq!(port.read(IER), 0x0f);
    port.write(IER, 0);
    port.write(SCR, 0xa5);
    assert_eq!(port.read(SCR), 0xa5);
    port.write(MCR, MCR_LOOPBACK | MCR_OUT2 | MCR_RTS);
    assert_eq!(port.read(MSR) & 0xf0, MSR_DCD | MSR_CTS);
    port.write(MCR, 0);
    assert_eq!(port.read(IIR_FCR), IIR_NONE);
    port.write(IIR_FCR, FCR_ENABLE);
    assert_eq!(port.read(IIR_FCR), IIR_NONE | IIR_FIFOS);
    port.write(LCR, LCR_DLAB);
    port.write(DATA, 0x34);
    port.write(IER, 0x12);
    assert_eq!((port.read(DATA), port.read(IER)), (0x34, 0x12));
    assert_eq!(port.read(LSR), LSR_TRANSMITTER_EMPTY | LSR_IDLE);
}

#[test]
fn an_empty_transmitter_interrupts_when_enabled_and_after_each_character() {
    let port = Port::new();
    port.write(MCR, MCR_OUT2);
    for _ in 0..2 {
        port.write(IER, IER_TRANSMITTER_EMPTY);
        assert!(port.interrupts());
        assert_eq!(port.read(IIR_FCR), IIR_TRANSMITTER_EMPTY);
        assert!(!port.interrupts());
        port.write(IER, 0);
    }
    port.write(IER, IER_TRANSMITTER_EMPTY);
    port.read(IIR_FCR);
    port.write(DATA, b'x');
    assert!(port.interrupts());
    port.write(MCR, 0);
    assert!(!port.interrupts(), "OUT2 gates the interrupt");
    assert_eq!(*port.backend.bytes.lock(), b"x");
}

#[test]
fn a_backend_that_refuses_makes_the_transmitter_busy_and_loses_nothing() {
    let port = Port::new();
    port.write(IIR_FCR, FCR_ENABLE);
    port.write(MCR, MCR_OUT2);
    port.write(IER, IER_TRANSMITTER_EMPTY);
    port.read(IIR_FCR);
    port.backend.blocked.store(true, Ordering::SeqCst);
    for byte in 0..20 {
        port.write(DATA, byte);
    }
    assert_eq!(port.read(LSR) & (LSR_TRANSMITTER_EMPTY | LSR_IDLE), 0);
    assert!(!port.interrupts());
    port.backend.blocked.store(false, Ordering::SeqCst);
    port.serial.transmit_ready();
    assert!(port.interrupts());
    assert_eq!(*port.backend.bytes.lock(), (0..16).collect::<Vec<_>>());
}

#[test]
fn input_is_flow_controlled_and_interrupts_by_level_and_timeout() {
    let port = Port::new();
    port.write(MCR, MCR_OUT2);
    port.write(IER, IER_RECEIVED);
    assert_eq!(port.serial.receive(b"ab"), 1);
    assert_eq!(port.read(IIR_FCR), IIR_RECEIVED);
    assert_eq!(port.read(DATA), b'a');
    assert_eq!(port.backend.room_calls.load(Ordering::SeqCst), 1);
    port.write(IIR_FCR, FCR_ENABLE | 0x40); // four characters
    assert_eq!(port.serial.receive(b"cde"), 3);
    assert_eq!(port.read(IIR_FCR), IIR_TIMEOUT | IIR_FIFOS);
    assert_eq!(port.serial.receive(&[b'f'; 20]), 13);
    assert_eq!(port.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS);
    assert!(port.interrupts());
    for _ in 0..16 {
        assert_eq!(port.read(LSR) & LSR_DATA_READY, LSR_DATA_READY);
        port.read(DATA);
    }
    assert!(!port.interrupts());
    assert_eq!(port.backend.room_calls.load(Ordering::SeqCst), 2);
    assert_eq!(port.read(LSR), LSR_TRANSMITTER_EMPTY | LSR_IDLE);
}

#[test]
fn breaks_go_both_ways() {
    let port = Port::new();
    port.write(IIR_FCR, FCR_ENABLE);
    port.write(MCR, MCR_OUT2);
    port.write(IER, IER_LINE_STATUS);
    assert!(port.serial.receive_break());
    assert_eq!(port.read(IIR_FCR), IIR_LINE_STATUS | IIR_FIFOS);
    assert_eq!(port.read(LSR) & (LSR_BREAK | LSR_FIFO_ERROR | LSR_DATA_READY), 0x91);
    assert!(!port.interrupts());
    assert_eq!(port.read(DATA), 0);
    assert_eq!(port.read(LSR) & 0x9f, 0);
    port.write(LCR, LCR_BREAK);
    port.write(LCR, 0);
    assert_eq!(*port.backend.breaks.lock(), [true, false]);
}

#[test]
fn loopback_returns_what_is_sent_and_keeps_the_outside_out() {
    let port = Port::new();
    port.write(MCR, MCR_LOOPBACK);
    port.write(DATA, 0x5a);
    assert_eq!(port.serial.receive(b"x"), 0);
    assert_eq!(port.read(DATA), 0x5a);
    port.write(DATA, 1);
    port.write(DATA, 2);
    assert_eq!(port.read(LSR) & LSR_OVERRUN, LSR_OVERRUN);
    assert_eq!(port.read(DATA), 2);
    assert!(port.backend.bytes.lock().is_empty());
    port.write(MCR, MCR_DTR | MCR_RTS);
    assert_eq!(*port.backend.outputs.lock(), [(true, true)]);
    assert_eq!(port.backend.room_calls.load(Ordering::SeqCst), 1);
}

#[test]
fn modem_changes_are_reported_once() {
    let port = Port::new();
    port.write(MCR, MCR_OUT2);
    port.write(IER, IER_MODEM_STATUS);
    assert!(!port.interrupts());
    port.serial.set_modem_inputs(ModemInputs { clear_to_send: false, ring: true, ..Default::default() });
    assert!(port.interrupts());
    assert_eq!(port.read(IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(port.read(MSR), MSR_DSR | MSR_RING | MSR_DCD | MSR_DELTA_CTS);
    assert!(!port.interrupts());
    port.serial.set_modem_inputs(ModemInputs { clear_to_send: false, ..Default::default() });
    assert_eq!(port.read(MSR), MSR_DSR | MSR_DCD | MSR_TRAILING_RING);
}

#[test]
fn damaged_states_are_refused() {
    let port = Port::new();
    port.write(SCR, 7);
    let mut state = port.serial.save();
    *state.bytes.last_mut().unwrap() = 0xff; // the transmitter's length
    assert!(port.serial.restore(&state).is_err());
    assert_eq!(port.read(SCR), 0);
    let mut saved = UartState::new();
    for _ in 0..17 {
        saved.receive(b"x"); // one fits without FIFOs
    }
    let good = encode(Serial::KIND, 1, &saved.to_saved());
    assert!(port.serial.restore(&good).is_ok());
    assert_eq!(port.read(DATA), b'x');
}

#[test]
fn buffered_output_writes_everything_in_order() {
    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let count = bytes.len().min(3);
            self.0.lock().extend_from_slice(&bytes[..count]);
            Ok(count)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Slow::default();
    let output = BufferedOutput::new(Box::new(sink.clone()), 5).unwrap();
    let serial = Serial::new(IrqLine::unconnected(), output.clone());
    output.connect(&serial);
    for byte in 0..200u8 {
        loop {
            let mut status = [0];
            serial.pio_read(LSR, &mut status);
            if status[0] & LSR_TRANSMITTER_EMPTY != 0 {
                break;
            }
            std::thread::yield_now();
        }
        serial.pio_write(DATA, &[byte]);
    }
    assert!(output.drain(Duration::from_secs(20)));
    serial.transmit_ready();
    assert!(output.drain(Duration::from_secs(20)));
    assert_eq!(*sink.0.lock(), (0..200).collect::<Vec<_>>());
}

#[test]
fn a_closed_terminal_does_not_stop_the_guest() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _bytes: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let output = BufferedOutput::new(Box::new(Closed), 1).unwrap();
    let serial = Serial::new(IrqLine::unconnected(), output.clone());
    output.connect(&serial);
    for byte in 0..100 {
        let begin = std::time::Instant::now();
        loop {
            let mut status = [0];
            serial.pio_read(LSR, &mut status);
            if status[0] & LSR_TRANSMITTER_EMPTY != 0 {
                break;
            }
            assert!(begin.elapsed().as_secs() < 20, "the transmitter stays busy");
            std::thread::yield_now();
        }
        serial.pio_write(DATA, &[byte]);
    }
    assert!(output.drain(Duration::from_secs(20)));
    assert_eq!(output.failure(), Some(std::io::ErrorKind::BrokenPipe));
}

#[derive(Debug, Clone)]
enum Step {
    Read(u16, usize),
    Write(u16, Vec<u8>),
    Receive(Vec<u8>),
    Break,
    Modem(bool, bool),
    Block(bool),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let width = prop_oneof![8 => Just(1usize), 1 => Just(2), 1 => Just(4)];
    let step = prop_oneof![
        6 => (0u16..8, width.clone()).prop_map(|(register, len)| Step::Read(register, len)),
        8 => (0u16..8, width, any::<u32>())
            .prop_map(|(register, len, value)| Step::Write(register, value.to_le_bytes()[..len].to_vec())),
        3 => proptest::collection::vec(any::<u8>(), 0..20).prop_map(Step::Receive),
        1 => Just(Step::Break),
        1 => any::<(bool, bool)>().prop_map(|(ring, carrier)| Step::Modem(ring, carrier)),
        1 => any::<bool>().prop_map(Step::Block),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 0..60)
}

/// Does `step` and returns all that can be seen of it.
fn observe(port: &Port, step: &Step) -> (Vec<u8>, usize, bool, Vec<u8>) {
    let mut data = Vec::new();
    let mut count = 0;
    match step {
        Step::Read(register, len) => {
            data.resize(*len, 0);
            port.serial.pio_read(*register, &mut data);
        }
        Step::Write(register, value) => port.serial.pio_write(*register, value),
        Step::Receive(bytes) => count = port.serial.receive(bytes),
        Step::Break => count = port.serial.receive_break().into(),
        Step::Modem(ring, carrier_detect) => port.serial.set_modem_inputs(ModemInputs {
            ring: *ring,
            carrier_detect: *carrier_detect,
            ..Default::default()
        }),
        Step::Block(blocked) => {
            port.backend.blocked.store(*blocked, Ordering::SeqCst);
            port.serial.transmit_ready();
        }
        Step::Reset => port.serial.reset(),
    }
    (data, count, port.interrupts(), std::mem::take(&mut *port.backend.bytes.lock()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_restored_port_goes_on_like_the_saved_one(before in steps(), after in steps()) {
        let first = Port::new();
        for step in &before {
            observe(&first, step);
        }
        let second = Port::new();
        second.backend.blocked.store(first.backend.blocked.load(Ordering::SeqCst), Ordering::SeqCst);
        second.serial.restore(&first.serial.save()).unwrap();
        prop_assert_eq!(first.interrupts(), second.interrupts());
        prop_assert_eq!(first.serial.save(), second.serial.save());
        for step in &after {
            prop_assert_eq!(observe(&first, step), observe(&second, step));
        }
    }

    #[test]
    fn any_bytes_as_state_are_refused_or_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..40), steps in steps()) {
        let port = Port::new();
        let _ = port.serial.restore(&SavedState { kind: Serial::KIND.into(), version: 1, bytes });
        for step in &steps {
            observe(&port, step);
        }
    }
}
