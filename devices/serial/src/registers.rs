//! The 16550's registers and their bits (PC16550D data sheet, section 8).

/// Receiver buffer, transmitter holding register; divisor latch low with DLAB.
pub(crate) const DATA: u16 = 0;
/// Interrupt enable; divisor latch high with DLAB.
pub(crate) const IER: u16 = 1;
/// Interrupt identification (read), FIFO control (write).
pub(crate) const IIR_FCR: u16 = 2;
/// Line control.
pub(crate) const LCR: u16 = 3;
/// Modem control.
pub(crate) const MCR: u16 = 4;
/// Line status.
pub(crate) const LSR: u16 = 5;
/// Modem status.
pub(crate) const MSR: u16 = 6;
/// Scratch.
pub(crate) const SCR: u16 = 7;

pub(crate) const IER_RECEIVED: u8 = 0x01;
pub(crate) const IER_TRANSMITTER_EMPTY: u8 = 0x02;
pub(crate) const IER_LINE_STATUS: u8 = 0x04;
pub(crate) const IER_MODEM_STATUS: u8 = 0x08;
pub(crate) const IER_MASK: u8 = 0x0f;

pub(crate) const IIR_NONE: u8 = 0x01;
pub(crate) const IIR_MODEM_STATUS: u8 = 0x00;
pub(crate) const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
pub(crate) const IIR_RECEIVED: u8 = 0x04;
pub(crate) const IIR_LINE_STATUS: u8 = 0x06;
pub(crate) const IIR_TIMEOUT: u8 = 0x0c;
pub(crate) const IIR_FIFOS: u8 = 0xc0;

pub(crate) const FCR_ENABLE: u8 = 0x01;
pub(crate) const FCR_CLEAR_RECEIVER: u8 = 0x02;
pub(crate) const FCR_CLEAR_TRANSMITTER: u8 = 0x04;
/// The bits that stay: enable, DMA mode, trigger level.
pub(crate) const FCR_KEPT: u8 = 0xc9;

pub(crate) const LCR_BREAK: u8 = 0x40;
pub(crate) const LCR_DLAB: u8 = 0x80;

pub(crate) const MCR_DTR: u8 = 0x01;
pub(crate) const MCR_RTS: u8 = 0x02;
pub(crate) const MCR_OUT1: u8 = 0x04;
pub(crate) const MCR_OUT2: u8 = 0x08;
pub(crate) const MCR_LOOPBACK: u8 = 0x10;
pub(crate) const MCR_MASK: u8 = 0x1f;

pub(crate) const LSR_DATA_READY: u8 = 0x01;
pub(crate) const LSR_OVERRUN: u8 = 0x02;
pub(crate) const LSR_BREAK: u8 = 0x10;
pub(crate) const LSR_TRANSMITTER_EMPTY: u8 = 0x20;
pub(crate) const LSR_IDLE: u8 = 0x40;
pub(crate) const LSR_FIFO_ERROR: u8 = 0x80;

pub(crate) const MSR_DELTA_CTS: u8 = 0x01;
pub(crate) const MSR_DELTA_DSR: u8 = 0x02;
pub(crate) const MSR_TRAILING_RING: u8 = 0x04;
pub(crate) const MSR_DELTA_DCD: u8 = 0x08;
pub(crate) const MSR_DELTAS: u8 = 0x0f;
pub(crate) const MSR_CTS: u8 = 0x10;
pub(crate) const MSR_DSR: u8 = 0x20;
pub(crate) const MSR_RING: u8 = 0x40;
pub(crate) const MSR_DCD: u8 = 0x80;
