//! One function: configuration space, BARs and interrupts together.

use crate::bar::BarId;
use crate::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, MSIX_ENTRY_SIZE};
use crate::{
    Allocator, BarHandler, BarKind, BarMapper, ConfigSpace, Identity, Intx, Msix, MsixState, PciError,
    capability, command, register,
};
use device::StateError;
use irq::{IrqLine, MsiTarget};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// BAR registers in a type 0 header.
const BARS: usize = 6;
/// The status bit that shows the INTx pin (7.5.1.1.4).
const STATUS_INTERRUPT: u8 = 1 << 3;
/// What of the command register can be set: I/O, memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;

#[derive(Debug, Clone)]
struct Bar {
    index: usize,
    kind: BarKind,
    size: u64,
    handler: BarHandler,
}

/// Makes a [`PciFunction`].
#[derive(Debug)]
pub struct FunctionBuilder {
    space: ConfigSpace,
    bars: Vec<Bar>,
    msix: Option<(Arc<Msix>, u16)>,
    intx: Arc<Intx>,
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConfigSpace({:08x})", self.read_u32(0))
    }
}

impl FunctionBuilder {
    /// Begins a function that is `identity`, with neither BARs nor interrupts.
    pub fn new(identity: &Identity) -> Self {
        let mut space = ConfigSpace::new(identity);
        space.allow(register::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        Self { space, bars: Vec::new(), msix: None, intx: Arc::new(Intx::new(IrqLine::unconnected())) }
    }

    /// Configuration space, to set or allow registers of the device's own.
    pub fn space(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    /// Gives the function an INTx pin, 1 for INTA#, that drives `line`, which system software is told is
    /// input `input` of the interrupt controller.
    #[must_use]
    pub fn intx(mut self, line: IrqLine, pin: u8, input: u8) -> Self {
        self.intx = Arc::new(Intx::new(line));
        self.space.set(register::INTERRUPT_LINE, &[input, pin]);
        self
    }

    /// Adds BAR `index` (and, for a 64-bit one, the next register too) of `size` bytes, a power of two,
    /// behind which is `handler`.
    ///
    /// # Errors
    /// [`PciError::BadBar`] if that is impossible.
    pub fn bar(
        mut self,
        index: usize,
        kind: BarKind,
        size: u64,
        handler: BarHandler,
    ) -> Result<Self, PciError> {
        let bad = |reason| PciError::BadBar { index, reason };
        let width = if matches!(kind, BarKind::Memory64 { .. }) { 2 } else { 1 };
        let used = |bar: &Bar| {
            bar.index == index
                || (bar.index + 1 == index && matches!(bar.kind, BarKind::Memory64 { .. }))
                || (bar.index == index + 1 && width == 2)
        };
        let sizes: Range<u64> = match kind {
            BarKind::Io => 4..257,
            BarKind::Memory32 { .. } => 16..(1 << 31) + 1,
            BarKind::Memory64 { .. } => 16..(1 << 62) + 1,
        };
        if index + width > BARS {
            return Err(bad("there are registers for BARs 0 to 5 only"));
        } else if self.bars.iter().any(used) {
            return Err(bad("its register is taken"));
        } else if !size.is_power_of_two() || !sizes.contains(&size) {
            return Err(bad("its size is no power of two or out of range"));
        } else if matches!(kind, BarKind::Io) != matches!(handler, BarHandler::Io(_)) {
            return Err(bad("its handler is of the other kind"));
        }
        let offset = register::BAR0 + 4 * index as u16;
        let mask = !(size - 1);
        self.space.set(offset, &kind.type_bits().to_le_bytes());
        self.space.allow(offset, &mask.to_le_bytes()[..4 * width]);
        self.bars.push(Bar { index, kind, size, handler });
        Ok(self)
    }

    /// Adds MSI-X with `vectors` vectors: the table is at offset `table` of BAR `bar`, the pending bits at
    /// `pba` of the same one. The BAR's handler forwards accesses there to the [`Msix`] returned.
    ///
    /// # Errors
    /// [`PciError`] if the count is out of range, the places overlap or are unaligned, or there is no room.
    pub fn msix(
        &mut self,
        vectors: u16,
        bar: u8,
        table: u32,
        pba: u32,
        target: Arc<dyn MsiTarget>,
    ) -> Result<Arc<Msix>, PciError> {
        let msix = Arc::new(Msix::new(vectors, target)?);
        let table_end = u64::from(table) + u64::from(vectors) * MSIX_ENTRY_SIZE;
        let pba_end = u64::from(pba) + u64::from(vectors.div_ceil(64)) * 8;
        let overlap = u64::from(table) < pba_end && u64::from(pba) < table_end;
        if !table.is_multiple_of(8) || !pba.is_multiple_of(8) || usize::from(bar) >= BARS || overlap {
            return Err(PciError::BadBar {
                index: bar.into(),
                reason: "MSI-X's places in it are impossible",
            });
        }
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba | u32::from(bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes();
        let offset = self.space.add_capability(capability::MSIX, &body, &writable)?;
        self.msix = Some((msix.clone(), offset + 2));
        Ok(msix)
    }

    /// Adds a capability as [`ConfigSpace::add_capability`] does.
    ///
    /// # Errors
    /// [`PciError::NoRoom`].
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, PciError> {
        self.space.add_capability(id, body, writable)
    }

    /// The pin, for the device to assert.
    pub fn intx_pin(&self) -> Arc<Intx> {
        self.intx.clone()
    }

    /// The function as described.
    pub fn build(self) -> PciFunction {
        let Self { space, bars, msix, intx } = self;
        PciFunction {
            bars,
            msix,
            intx,
            attached: OnceLock::new(),
            initial: Mutex::new(space.clone()),
            space: Mutex::new(space),
        }
    }
}

#[derive(Debug)]
struct Attachment {
    mapper: Arc<BarMapper>,
    /// One for each of the function's BARs.
    ids: Vec<BarId>,
}

/// A function's guest-visible state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    config: Vec<u8>,
    msix: Option<MsixState>,
    intx: bool,
}

/// A function of a PCI device: configuration space, BARs, MSI-X and INTx.
#[derive(Debug)]
pub struct PciFunction {
    bars: Vec<Bar>,
    /// The vectors, and the offset of the capability's message control register.
    msix: Option<(Arc<Msix>, u16)>,
    intx: Arc<Intx>,
    attached: OnceLock<Attachment>,
    /// What `space` becomes on reset: with the BARs where the machine's builder put them.
    initial: Mutex<ConfigSpace>,
    space: Mutex<ConfigSpace>,
}

impl PciFunction {
    /// Begins a function; see [`FunctionBuilder::new`].
    pub fn builder(identity: &Identity) -> FunctionBuilder {
        FunctionBuilder::new(identity)
    }

    /// A configuration read.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space.lock().read(offset, data);
        let status = usize::from(register::STATUS);
        if let Some(index) = status.checked_sub(offset.into())
            && index < data.len()
            && self.intx.asserted()
        {
            data[index] |= STATUS_INTERRUPT;
        }
    }

    /// A configuration write, with all that follows from it.
    pub fn config_write(&self, offset: u16, data: &[u8]) {
        let mut space = self.space.lock();
        space.write(offset, data);
        let touches = |start: u16, len: u16| {
            offset < start + len && usize::from(start) < usize::from(offset) + data.len()
        };
        let command = touches(register::COMMAND, 2);
        if command || touches(register::BAR0, 4 * BARS as u16) {
            self.place_bars(&space);
        }
        let control = self.msix.as_ref().filter(|(_, at)| touches(*at, 2)).map(|(_, at)| space.read_u16(*at));
        if command || control.is_some() {
            self.update_interrupts(&space);
        }
        drop(space);
        if let (Some((msix, _)), Some(control)) = (&self.msix, control) {
            msix.set_control(control);
        }
    }

    /// Sets bytes of configuration space from the device's side.
    pub fn set(&self, offset: u16, data: &[u8]) {
        self.space.lock().set(offset, data);
    }

    /// The function's MSI-X vectors, if it has any.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(msix, _)| msix)
    }

    /// The function's INTx pin.
    pub fn intx(&self) -> &Arc<Intx> {
        &self.intx
    }

    /// Whether the guest allows the function to access memory by itself.
    pub fn bus_master(&self) -> bool {
        self.space.lock().read_u16(register::COMMAND) & command::BUS_MASTER != 0
    }

    /// Where BAR `index` answers now: a guest physical address or a port.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let attachment = self.attached.get()?;
        let position = self.bars.iter().position(|bar| bar.index == index)?;
        attachment.mapper.mapped(attachment.ids[position])
    }

    /// Connects the BARs to the buses and gives them addresses from `allocator`, which they return to on
    /// every reset, as if firmware had set them.
    pub(crate) fn attach(
        &self,
        mapper: &Arc<BarMapper>,
        allocator: &mut Allocator,
    ) -> Result<bool, PciError> {
        if self.attached.get().is_some() {
            return Ok(false);
        }
        let mut addresses = Vec::with_capacity(self.bars.len());
        for bar in &self.bars {
            match allocator.allocate(bar.kind, bar.size) {
                Ok(address) => addresses.push(address),
                Err(error) => {
                    for (bar, address) in self.bars.iter().zip(addresses) {
                        allocator.free(bar.kind, address);
                    }
                    return Err(error);
                }
            }
        }
        let ids =
            self.bars.iter().map(|bar| mapper.register(bar.kind, bar.size, bar.handler.clone())).collect();
        if self.attached.set(Attachment { mapper: mapper.clone(), ids }).is_err() {
            return Ok(false);
        }
        let mut initial = self.initial.lock();
        let mut command = initial.read_u16(register::COMMAND);
        for (bar, address) in self.bars.iter().zip(addresses) {
            let wide = matches!(bar.kind, BarKind::Memory64 { .. });
            initial.write(bar_offset(bar), &address.to_le_bytes()[..if wide { 8 } else { 4 }]);
            command |= if bar.kind == BarKind::Io { command::IO } else { command::MEMORY };
        }
        initial.set(register::COMMAND, &command.to_le_bytes());
        drop(initial);
        self.reset();
        Ok(true)
    }

    /// Configuration space, MSI-X and the pin as after power-on and firmware.
    pub fn reset(&self) {
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
        self.intx.set(false);
        let mut space = self.space.lock();
        *space = self.initial.lock().clone();
        self.place_bars(&space);
        self.update_interrupts(&space);
    }

    /// The guest-visible state.
    pub fn save(&self) -> FunctionState {
        FunctionState {
            config: self.space.lock().bytes().to_vec(),
            msix: self.msix.as_ref().map(|(msix, _)| msix.save()),
            intx: self.intx.asserted(),
        }
    }

    /// Takes over a saved state of the same function, for the device of `kind`.
    ///
    /// # Errors
    /// [`StateError`] if it is of another function; this one is then as after reset.
    pub fn restore(&self, kind: &'static str, state: &FunctionState) -> Result<(), StateError> {
        self.reset();
        let FunctionState { config, msix, intx } = state;
        let mut space = self.space.lock();
        if !space.restore(config) {
            return Err(StateError::malformed(kind, "configuration space is not 4096 bytes"));
        }
        let fits = match (&self.msix, msix) {
            (Some((vectors, at)), Some(saved)) => vectors.restore(saved, space.read_u16(*at)),
            (None, None) => true,
            _ => false,
        };
        if !fits {
            drop(space);
            self.reset();
            return Err(StateError::malformed(kind, "another number of MSI-X vectors"));
        }
        self.place_bars(&space);
        self.update_interrupts(&space);
        drop(space);
        self.intx.set(*intx);
        Ok(())
    }

    fn place_bars(&self, space: &ConfigSpace) {
        let Some(attachment) = self.attached.get() else { return };
        let command = space.read_u16(register::COMMAND);
        for (bar, id) in self.bars.iter().zip(&attachment.ids) {
            let low = space.read_u32(bar_offset(bar));
            let (enabled, address) = match bar.kind {
                BarKind::Io => (command & command::IO, u64::from(low & !0x3)),
                BarKind::Memory32 { .. } => (command & command::MEMORY, u64::from(low & !0xf)),
                BarKind::Memory64 { .. } => {
                    let high = space.read_u32(bar_offset(bar) + 4);
                    (command & command::MEMORY, u64::from(low & !0xf) | u64::from(high) << 32)
                }
            };
            attachment.mapper.place(*id, (enabled != 0).then_some(address));
        }
    }

    fn update_interrupts(&self, space: &ConfigSpace) {
        let disabled = space.read_u16(register::COMMAND) & command::INTX_DISABLE != 0;
        let enabled = |(_, at): &(Arc<Msix>, u16)| space.read_u16(*at) & CONTROL_ENABLE != 0;
        self.intx.set_gates(disabled, self.msix.as_ref().is_some_and(enabled));
    }
}

fn bar_offset(bar: &Bar) -> u16 {
    register::BAR0 + 4 * bar.index as u16
}
