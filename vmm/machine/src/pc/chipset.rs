//! The chipset: interrupt controllers, timers, clocks, power management and debug ports.

use crate::assembly::Assembly;
use crate::layout::Layout;
use crate::requests::Requests;
use crate::{MachineError, MachineSpec};
use accel::AccelVm;
use acpi::AcpiConfig;
use chipset_x86::{
    A20Gate, Board, FastReset, Hpet, I8042, I8042Config, IoApic, Pic, Pit, Pm, PmConfig, PostCode,
    PowerEvents, Pvpanic, ResetControl, Rtc, RtcConfig, addresses,
};
use clock::TimerService;
use irq::{IrqLine, IrqSink};
use std::sync::Arc;
use std::time::SystemTime;

/// What the rest of the machine is wired to.
pub(super) struct Chipset {
    pub(super) board: Arc<Board>,
    pub(super) pic: Arc<Pic>,
    pub(super) reset_control: Arc<ResetControl>,
    pub(super) pm: Arc<Pm>,
}

/// The accelerator's INTR input.
struct ExtInt(Arc<dyn AccelVm>);

impl IrqSink for ExtInt {
    fn set_level(&self, _pin: u32, level: bool) {
        self.0.set_ext_int(level);
    }
}

/// Adds the whole chipset.
pub(super) fn add(
    assembly: &mut Assembly,
    acpi: &AcpiConfig,
    spec: &MachineSpec,
    layout: &Layout,
    accel: &Arc<dyn AccelVm>,
    timers: &Arc<TimerService>,
    requests: &Arc<Requests>,
) -> Result<Chipset, MachineError> {
    let events: Arc<dyn PowerEvents> = requests.clone();
    let (board, pic) = add_interrupt_controllers(assembly, acpi, accel)?;
    let rtc = add_timers(assembly, acpi, spec, layout, timers, &board)?;
    let (pm, reset_control) = add_power(assembly, timers, &board, &events)?;
    rtc.connect_alarm(pm.alarm_line());
    add_debug_ports(assembly, &events)?;
    Ok(Chipset { board, pic, reset_control, pm })
}

fn add_interrupt_controllers(
    assembly: &mut Assembly,
    acpi: &AcpiConfig,
    accel: &Arc<dyn AccelVm>,
) -> Result<(Arc<Board>, Arc<Pic>), MachineError> {
    let pic = Pic::new(IrqLine::new(Arc::new(ExtInt(accel.clone())), 0));
    assembly.add_at_ports(pic.clone(), pic.port_regions())?;
    let ioapic = IoApic::new(accel.msi_target());
    assembly.map_memory(acpi.io_apic.address.into(), addresses::IOAPIC_LEN, ioapic.clone())?;
    assembly.add(ioapic.clone());
    let listener = ioapic.clone();
    accel.set_eoi_listener(Arc::new(move |vector| listener.end_of_interrupt(vector)));
    Ok((Board::new(pic.clone(), ioapic), pic))
}

fn add_timers(
    assembly: &mut Assembly,
    acpi: &AcpiConfig,
    spec: &MachineSpec,
    layout: &Layout,
    timers: &Arc<TimerService>,
    board: &Arc<Board>,
) -> Result<Arc<Rtc>, MachineError> {
    let pit = Pit::new(timers, board.pit_line());
    assembly.add_at_ports(pit.clone(), pit.port_regions())?;
    let rtc = add_clock(assembly, spec, layout, timers, board)?;
    if let Some(address) = acpi.hpet {
        let hpet = Hpet::new(timers, board.hpet_wiring());
        assembly.map_memory(address.into(), addresses::HPET_LEN, hpet.clone())?;
        assembly.add(hpet);
    }
    Ok(rtc)
}

/// The CMOS clock.
pub(crate) fn add_clock(
    assembly: &mut Assembly,
    spec: &MachineSpec,
    layout: &Layout,
    timers: &Arc<TimerService>,
    board: &Arc<Board>,
) -> Result<Arc<Rtc>, MachineError> {
    let seconds = match &assembly.determinism {
        Some(determinism) => determinism.spec.epoch,
        None => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.map_or(0, |since| since.as_secs() as i64)
        }
    };
    let config = RtcConfig {
        seconds,
        memory_below_4g: layout.low(),
        memory_above_4g: layout.high(),
        vcpus: spec.vcpus as u8,
    };
    let rtc = Rtc::new(&config, timers, board.rtc_line());
    assembly.add_at_ports(rtc.clone(), rtc.port_regions())?;
    Ok(rtc)
}

/// Power management, the ways to reset, and the keyboard controller, which is one of them.
fn add_power(
    assembly: &mut Assembly,
    timers: &Arc<TimerService>,
    board: &Arc<Board>,
    events: &Arc<dyn PowerEvents>,
) -> Result<(Arc<Pm>, Arc<ResetControl>), MachineError> {
    let pm = Pm::new(PmConfig::default(), timers, board.gsi_line(addresses::SCI_GSI), events.clone());
    assembly.add_at_ports(pm.clone(), pm.port_regions())?;
    let gate = A20Gate::new();
    let fast_reset = FastReset::new(events.clone(), gate.clone());
    assembly.add_at_ports(fast_reset.clone(), fast_reset.port_regions())?;
    let lines = [1, 12].map(|irq| board.isa_line(irq));
    let [keyboard_line, mouse_line] = lines;
    let keyboard = I8042::new(I8042Config::default(), keyboard_line, mouse_line, events.clone(), gate);
    assembly.add_at_ports(keyboard.clone(), keyboard.port_regions())?;
    // Its port lies among those of PCI configuration access, which hands it on.
    let reset_control = ResetControl::new(events.clone());
    assembly.add(reset_control.clone());
    Ok((pm, reset_control))
}

fn add_debug_ports(assembly: &mut Assembly, events: &Arc<dyn PowerEvents>) -> Result<(), MachineError> {
    let post = PostCode::new();
    assembly.add_at_ports(post.clone(), post.port_regions())?;
    let pvpanic = Pvpanic::new(events.clone());
    assembly.add_at_ports(pvpanic.clone(), pvpanic.port_regions())?;
    Ok(())
}
