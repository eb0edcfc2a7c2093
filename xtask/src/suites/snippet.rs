//! A piece of user-mode code on a bare vCPU of ours: memory where it wants it, mapped one to one for user code,
//! and what it leaves in registers when it stops.

use accel::{Accelerator, CpuSpec, HaltReason, StopToken, Tier, VcpuBus, VmSpec, X86State};
use accel_dbt::DbtAccelerator;
use anyhow::{Context, Result, bail};
use clock::{TimerService, VmClock};
use guest_memory::GuestMemory;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use x86_cpuid::{CpuModel, feature};

/// Where descriptor tables, handlers, page tables and stacks are: far from what programs use.
const SYSTEM: u64 = 0x40_0000_0000;
const SYSTEM_LEN: u64 = 0x10_0000;
const GDT: u64 = SYSTEM;
const IDT: u64 = SYSTEM + 0x1000;
const TSS: u64 = SYSTEM + 0x2000;
const HANDLERS: u64 = SYSTEM + 0x3000;
const PML4: u64 = SYSTEM + 0x4000;
const PDPT: u64 = SYSTEM + 0x5000;
/// The top of the handlers' stack, which grows down.
const HANDLER_STACK: u64 = SYSTEM + 0x1_0000;
/// The top of the program's stack.
const USER_STACK: u64 = SYSTEM + SYSTEM_LEN - 0x1000;
/// Bytes of a handler.
const HANDLER_LEN: u64 = 16;
/// A handler writes to this port, which stops the vCPU.
const STOP_PORT: u16 = 0xf4;
/// The vector of the fault that HLT has in user code.
const GENERAL_PROTECTION: u64 = 13;
const HLT: u8 = 0xf4;
const LIMIT: Duration = Duration::from_secs(10);

/// A program and the memory that it needs.
pub(crate) struct Snippet<'a> {
    /// Its bytes.
    pub(crate) code: &'a [u8],
    /// Where they are and begin.
    pub(crate) address: u64,
    /// Memory, of which none of it need be in order or whole pages.
    pub(crate) memory: &'a [Range<u64>],
    /// What is in memory at the start.
    pub(crate) data: &'a [(u64, Vec<u8>)],
}

/// How a program ended.
pub(crate) enum Stopped {
    /// By HLT: with these registers.
    Halted(Box<X86State>),
    /// By an exception: its vector, and where.
    Exception(u64, u64),
    /// Not in time.
    Timeout,
}

/// The processor that programs run on.
pub(crate) fn model() -> Result<CpuModel> {
    CpuModel::by_name("max").context("our own model")
}

/// Runs `snippet` on `tier`.
pub(crate) fn run(snippet: &Snippet<'_>, tier: Tier, timers: &Arc<TimerService>) -> Result<Stopped> {
    let end = snippet.address + snippet.code.len() as u64;
    if let Some(range) = snippet.memory.iter().find(|range| range.start > range.end || range.end > SYSTEM) {
        bail!("memory at {range:x?} is not possible");
    }
    let wanted = snippet.memory.iter().cloned().chain([snippet.address..end, SYSTEM..SYSTEM + SYSTEM_LEN]);
    let memory = GuestMemory::new(&merged(wanted)).context("memory for a test")?;
    write_system(&memory)?;
    memory.write(snippet.address, snippet.code)?;
    for (address, bytes) in snippet.data {
        memory.write(*address, bytes)?;
    }
    let spec = VmSpec { vcpus: 1, tier, cpu: CpuSpec::default(), ..VmSpec::default() };
    let vm = DbtAccelerator.create_vm(&spec, &memory, timers)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut state = vcpu.save()?;
    enter(&mut state, snippet.address)?;
    vcpu.restore(&state)?;
    let stop = StopToken::new();
    let bus = StopBus(stop.clone());
    let reason = std::thread::scope(|scope| {
        let (ended, waits) = std::sync::mpsc::channel::<()>();
        let watch = stop.clone();
        scope.spawn(move || {
            if waits
                .recv_timeout(LIMIT)
                .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                watch.stop();
            }
        });
        let reason = vcpu.run(&bus, &stop);
        drop(ended);
        reason
    });
    match reason {
        HaltReason::Stopped => {}
        HaltReason::TripleFault => return Ok(Stopped::Exception(8, 0)),
        HaltReason::Debug(_) => bail!("nobody debugs it"),
        HaltReason::InternalError(error) => bail!("{error}"),
    }
    end_of(&memory, vcpu.save()?)
}

/// What the handler that stopped the vCPU was called for.
fn end_of(memory: &GuestMemory, mut state: X86State) -> Result<Stopped> {
    let handlers = HANDLERS..HANDLERS + 256 * HANDLER_LEN;
    if !handlers.contains(&state.rip) {
        return Ok(Stopped::Timeout);
    }
    let vector = (state.rip - HANDLERS) / HANDLER_LEN;
    let word = |at: u64| -> Result<u64> {
        let mut bytes = [0; 8];
        memory.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    };
    // The frame is SS, RSP, RFLAGS, CS and RIP, downwards.
    let [rsp, rip] = [word(HANDLER_STACK - 16)?, word(HANDLER_STACK - 40)?];
    let mut byte = [0];
    let halted = vector == GENERAL_PROTECTION && memory.read(rip, &mut byte).is_ok() && byte[0] == HLT;
    if !halted {
        return Ok(Stopped::Exception(vector, rip));
    }
    state.regs[X86State::RSP] = rsp;
    state.rip = rip;
    Ok(Stopped::Halted(Box::new(state)))
}

/// Regions of whole pages that do not overlap.
fn merged(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> =
        ranges.map(|range| range.start & !0xfff..range.end.next_multiple_of(0x1000)).collect();
    sorted.sort_by_key(|range| range.start);
    let mut regions: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match regions.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => regions.push(range),
        }
    }
    regions
}

fn write_system(memory: &GuestMemory) -> Result<()> {
    // Null, kernel code and data, user data and code; then the TSS's descriptor, which has two places.
    let tss = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        tss,
        TSS >> 32,
    ];
    for (index, entry) in gdt.iter().enumerate() {
        memory.write(GDT + 8 * index as u64, &u64::to_le_bytes(*entry))?;
    }
    for vector in 0..256 {
        let handler = HANDLERS + vector * HANDLER_LEN;
        let low = handler & 0xffff | 0x08 << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
        memory.write(IDT + 16 * vector, &low.to_le_bytes())?;
        memory.write(IDT + 16 * vector + 8, &(handler >> 32).to_le_bytes())?;
        // out STOP_PORT, al; jmp to itself
        memory.write(handler, &[0xe6, STOP_PORT as u8, 0xeb, 0xfe])?;
    }
    memory.write(TSS + 4, &HANDLER_STACK.to_le_bytes())?;
    memory.write(PML4, &(PDPT | 7).to_le_bytes())?;
    for gigabyte in 0..512u64 {
        memory.write(PDPT + 8 * gigabyte, &(gigabyte << 30 | 0xe7).to_le_bytes())?;
    }
    Ok(())
}

/// User code in 64-bit mode, with every unit on that the model has.
fn enter(state: &mut X86State, rip: u64) -> Result<()> {
    let model = model()?;
    let segment =
        |selector, rights| accel::Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false };
    state.regs = [0; 16];
    state.regs[X86State::RSP] = USER_STACK;
    state.rip = rip;
    state.rflags = 0x202;
    state.segments = [segment(0x1b, 0xc0f3); 6];
    state.segments[X86State::CS] = segment(0x23, 0xa0fb);
    state.tr = accel::Segment { selector: 0x30, base: TSS, limit: 0x67, rights: 0x8b, unusable: false };
    state.gdtr = accel::TableRegister { base: GDT, limit: 63 };
    state.idtr = accel::TableRegister { base: IDT, limit: 0xfff };
    state.cr0 = 0x8001_0033;
    state.cr3 = PML4;
    // PAE, OSFXSR and OSXMMEXCPT, and what the model has of FSGSBASE and OSXSAVE.
    let optional = [(feature::FSGSBASE, 16), (feature::XSAVE, 18)];
    let present = optional.iter().filter(|(feature, _)| model.has(*feature));
    state.cr4 = present.fold(0x620, |cr4, (_, bit)| cr4 | 1 << bit);
    state.xcr0 = if model.has(feature::XSAVE) { model.xcr0_mask() } else { 1 };
    state.efer = 0xd01;
    // As after FNINIT.
    state.fpu.control = 0x37f;
    state.fpu.status = 0;
    state.fpu.tag = 0;
    Ok(())
}

/// A bus on which there is nothing but the port that stops the vCPU.
struct StopBus(StopToken);

impl VcpuBus for StopBus {
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}

    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, _data: &[u8]) {
        if port == STOP_PORT {
            self.0.stop();
        }
    }

    fn acknowledge_ext_int(&self) -> u8 {
        0xff
    }
}

/// What times the vCPUs' timers: a clock that runs.
pub(crate) fn timers() -> Result<Arc<TimerService>> {
    let clock = VmClock::new();
    clock.start();
    TimerService::new(clock).context("starting a thread")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_code(code: &[u8], tier: Tier) -> Stopped {
        let snippet = Snippet { code, address: 0x1_0000, memory: &[], data: &[] };
        run(&snippet, tier, &timers().unwrap()).unwrap()
    }

    #[test]
    fn code_leaves_its_registers_or_an_exception() {
        for tier in [Tier::Interpreter, Tier::Translator] {
            // mov eax, 5; push rax; pop rbx; hlt
            let stopped = run_code(&[0xb8, 5, 0, 0, 0, 0x50, 0x5b, 0xf4], tier);
            let Stopped::Halted(state) = stopped else { panic!("it did not halt") };
            assert_eq!((state.regs[0], state.regs[X86State::RBX]), (5, 5));
            assert_eq!(state.regs[X86State::RSP], USER_STACK);
            assert!(matches!(run_code(&[0x90, 0x0f, 0x0b], tier), Stopped::Exception(6, 0x1_0001)));
        }
    }

    #[test]
    fn regions_are_whole_pages_and_do_not_overlap() {
        let ranges = [0x2fff..0x3001, 0x1000..0x1001, 0x9000..0x9001, 0x3000..0x5000];
        assert_eq!(merged(ranges.into_iter()), [0x1000..0x5000, 0x9000..0xa000]);
    }
}
