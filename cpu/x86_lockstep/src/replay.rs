//! What the outside said to T1, said again to T0.

use crate::memory::{DeviceWrites, Memories};
use guest_memory::GuestMemory;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use x86_core::Platform;

/// Up to 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data {
    len: u8,
    bytes: [u8; 8],
}

impl Data {
    fn new(data: &[u8]) -> Self {
        let len = data.len().min(8);
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&data[..len]);
        Self { len: len as u8, bytes }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} ({} bytes)", u64::from_le_bytes(self.bytes), self.len)
    }
}

/// One exchange with the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exchange {
    MmioRead(u64, Data),
    MmioWrite(u64, Data),
    PioRead(u16, Data),
    PioWrite(u16, Data),
    Tsc(u64),
    Cr8(u8),
    SetCr8(u8),
    ApicMsr(u32, Option<u64>),
    SetApicMsr(u32, u64, Option<()>),
    Random(Option<u64>),
    /// A device wrote memory before it answered the exchange before this.
    DeviceWrite(u64, Vec<u8>),
}

const APIC_BASE: u32 = 0x1b;

impl Exchange {
    /// Whether it may be that only one processor asks, and asking changes nothing: what CPUID says depends on
    /// the APIC's base, which the translator looks at when it translates, the interpreter when it executes.
    fn is_optional(&self) -> bool {
        matches!(self, Self::ApicMsr(APIC_BASE, _))
    }
}

/// What was exchanged in a round and T0 has not asked for yet, and which page table entries were marked.
#[derive(Debug, Default)]
pub(crate) struct Log {
    exchanges: RefCell<VecDeque<Exchange>>,
    /// Entries that T1's walks marked, and T0's: address and length.
    pub(crate) marks: RefCell<Vec<(u64, u64)>>,
    /// What T0 did other than T1.
    divergence: RefCell<Option<String>>,
}

impl Log {
    /// Begins a round.
    pub(crate) fn clear(&mut self) {
        self.exchanges.get_mut().clear();
        self.marks.get_mut().clear();
        *self.divergence.get_mut() = None;
    }

    /// Whether T0 has asked for all that T1 has.
    pub(crate) fn is_used_up(&mut self) -> bool {
        self.exchanges.get_mut().iter().all(Exchange::is_optional)
    }

    /// What T0 asked for that T1 did not.
    pub(crate) fn divergence(&mut self) -> Option<String> {
        self.divergence.get_mut().take()
    }

    /// What T1 asked for and T0 did not.
    pub(crate) fn left(&mut self) -> Vec<String> {
        self.exchanges.get_mut().iter().map(|exchange| format!("only T1: {exchange:x?}")).collect()
    }

    fn push(&self, exchange: Exchange) {
        self.exchanges.borrow_mut().push_back(exchange);
    }
}

/// T1's surroundings: the real ones, written down.
pub(crate) struct Recorder<'a> {
    pub(crate) inner: &'a dyn Platform,
    pub(crate) log: &'a Log,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) device_writes: &'a DeviceWrites,
}

impl Recorder<'_> {
    fn note(&self, exchange: Exchange) {
        self.log.push(exchange);
        for (gpa, len) in self.device_writes.take() {
            let mut data = vec![0; len as usize];
            if self.memory.read(gpa, &mut data).is_ok() {
                self.log.push(Exchange::DeviceWrite(gpa, data));
            }
        }
    }
}

impl Platform for Recorder<'_> {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.inner.mmio_read(gpa, data);
        self.note(Exchange::MmioRead(gpa, Data::new(data)));
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.inner.mmio_write(gpa, data);
        self.note(Exchange::MmioWrite(gpa, Data::new(data)));
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.inner.pio_read(port, data);
        self.note(Exchange::PioRead(port, Data::new(data)));
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.inner.pio_write(port, data);
        self.note(Exchange::PioWrite(port, Data::new(data)));
    }

    fn tsc(&self) -> u64 {
        let tsc = self.inner.tsc();
        self.log.push(Exchange::Tsc(tsc));
        tsc
    }

    fn tsc_hertz(&self) -> u64 {
        self.inner.tsc_hertz()
    }

    fn cr8(&self) -> u8 {
        let priority = self.inner.cr8();
        self.log.push(Exchange::Cr8(priority));
        priority
    }

    fn set_cr8(&self, priority: u8) {
        self.inner.set_cr8(priority);
        self.note(Exchange::SetCr8(priority));
    }

    fn apic_msr(&self, msr: u32) -> Option<u64> {
        let value = self.inner.apic_msr(msr);
        self.log.push(Exchange::ApicMsr(msr, value));
        value
    }

    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()> {
        let done = self.inner.set_apic_msr(msr, value);
        self.note(Exchange::SetApicMsr(msr, value, done));
        done
    }

    fn random(&self) -> Option<u64> {
        let value = self.inner.random();
        self.log.push(Exchange::Random(value));
        value
    }

    fn entry_marked(&self, gpa: u64, len: u64) {
        self.log.marks.borrow_mut().push((gpa, len));
    }
}

/// T0's surroundings: what T1's said.
pub(crate) struct Replayer<'a> {
    /// For what is constant.
    pub(crate) inner: &'a dyn Platform,
    pub(crate) log: &'a Log,
    pub(crate) memory: &'a Memories,
}

impl Replayer<'_> {
    /// The next exchange if `matches` gives something for it, and then what that is.
    fn next<T>(&self, asked: &dyn fmt::Debug, matches: impl Fn(&Exchange) -> Option<T>) -> Option<T> {
        let mut exchanges = self.log.exchanges.borrow_mut();
        let mut answer = exchanges.front().and_then(&matches);
        while answer.is_none() && exchanges.front().is_some_and(Exchange::is_optional) {
            exchanges.pop_front();
            answer = exchanges.front().and_then(&matches);
        }
        if answer.is_none() {
            let told = exchanges.front().map_or("nothing".into(), |exchange| format!("{exchange:x?}"));
            self.log.divergence.borrow_mut().get_or_insert(format!("T0 asked for {asked:x?}, T1 for {told}"));
            return None;
        }
        exchanges.pop_front();
        while let Some(Exchange::DeviceWrite(gpa, data)) = exchanges.front() {
            self.memory.mirror(*gpa, data);
            exchanges.pop_front();
        }
        answer
    }

    fn read(&self, asked: Exchange, data: &mut [u8], matches: impl Fn(&Exchange) -> Option<Data>) {
        let len = data.len();
        match self
            .next(&asked, |exchange| matches(exchange).filter(|data| usize::from(data.len) == len.min(8)))
        {
            Some(answer) => {
                data[..usize::from(answer.len)].copy_from_slice(&answer.bytes[..usize::from(answer.len)])
            }
            None => data.fill(0xff),
        }
    }

    fn write(&self, asked: &Exchange) {
        self.next(asked, |exchange| (exchange == asked).then_some(()));
    }
}

impl Platform for Replayer<'_> {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.read(Exchange::MmioRead(gpa, Data::new(data)), data, |exchange| match exchange {
            Exchange::MmioRead(at, data) if *at == gpa => Some(*data),
            _ => None,
        });
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.write(&Exchange::MmioWrite(gpa, Data::new(data)));
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.read(Exchange::PioRead(port, Data::new(data)), data, |exchange| match exchange {
            Exchange::PioRead(at, data) if *at == port => Some(*data),
            _ => None,
        });
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.write(&Exchange::PioWrite(port, Data::new(data)));
    }

    fn tsc(&self) -> u64 {
        let answer = self.next(&"the TSC", |exchange| match exchange {
            Exchange::Tsc(value) => Some(*value),
            _ => None,
        });
        answer.unwrap_or(0)
    }

    fn tsc_hertz(&self) -> u64 {
        self.inner.tsc_hertz()
    }

    fn cr8(&self) -> u8 {
        let answer = self.next(&"CR8", |exchange| match exchange {
            Exchange::Cr8(value) => Some(*value),
            _ => None,
        });
        answer.unwrap_or(0)
    }

    fn set_cr8(&self, priority: u8) {
        self.write(&Exchange::SetCr8(priority));
    }

    fn apic_msr(&self, msr: u32) -> Option<u64> {
        let told = self.log.exchanges.borrow().front().is_some_and(Exchange::is_optional);
        if msr == APIC_BASE && !told {
            return self.inner.apic_msr(msr);
        }
        let answer = self.next(&Exchange::ApicMsr(msr, None), |exchange| match exchange {
            Exchange::ApicMsr(number, value) if *number == msr => Some(*value),
            _ => None,
        });
        answer.flatten()
    }

    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()> {
        let answer = self.next(&Exchange::SetApicMsr(msr, value, None), |exchange| match exchange {
            Exchange::SetApicMsr(number, written, done) if (*number, *written) == (msr, value) => Some(*done),
            _ => None,
        });
        answer.flatten()
    }

    fn random(&self) -> Option<u64> {
        let answer = self.next(&"a random number", |exchange| match exchange {
            Exchange::Random(value) => Some(*value),
            _ => None,
        });
        answer.flatten()
    }

    fn entry_marked(&self, gpa: u64, len: u64) {
        self.log.marks.borrow_mut().push((gpa, len));
    }
}
