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
pub(super) const SYSTEM: u64 = 0x40_0000_0000;
const SYSTEM_LEN: u64 = 0x10_0000;
pub(super) const GDT: u64 = SYSTEM;
pub(super) const IDT: u64 = SYSTEM + 0x1000;
pub(super) const TSS: u64 = SYSTEM + 0x2000;
pub(super) const HANDLERS: u64 = SYSTEM + 0x3000;
pub(super) const PML4: u64 = SYSTEM + 0x4000;
const PDPT: u64 = SYSTEM + 0x5000;
pub(super) const LDT: u64 = SYSTEM + 0x6000;
const LDT_LIMIT: u32 = 31;
/// Bytes of the GDT and of the IDT less one.
pub(super) const GDT_LIMIT: u16 = 95;
pub(super) const IDT_LIMIT: u16 = 0xfff;
/// Bytes of tables, page tables included.
const TABLES_LEN: usize = 0x7000;
/// The top of the handlers' stack, which grows down.
pub(super) const HANDLER_STACK: u64 = SYSTEM + 0x1_0000;
/// The top of a 64-bit program's stack, and of a 32-bit program's.
pub(super) const USER_STACK: u64 = SYSTEM + SYSTEM_LEN - 0x1000;
pub(super) const USER_STACK_32: u64 = 0xc001_0000;
const USER_STACK_32_LEN: u64 = 0x1_0000;
/// Selectors, which are those of Linux: some programs know them. Of 32-bit code there is also a segment in the LDT,
/// as programs make it that start in 64-bit mode.
const KERNEL_CODE: u64 = 0x10;
pub(super) const USER_DATA: u16 = 0x2b;
pub(super) const USER_CODE: u16 = 0x33;
pub(super) const TSS_SELECTOR: u16 = 0x40;
pub(super) const LDT_SELECTOR: u16 = 0x50;
pub(super) const USER_CODE_32: u16 = 0x0f;
/// Bytes of a handler.
pub(super) const HANDLER_LEN: u64 = 16;
/// A handler writes to this port, which stops the vCPU.
pub(super) const STOP_PORT: u16 = 0xf4;
/// The vector of the fault that HLT has in user code.
const GENERAL_PROTECTION: u64 = 13;
/// That of SYSCALL while it is not enabled.
const INVALID_OPCODE: u64 = 6;
/// Where 32-bit code of Linux calls the system.
const LINUX_CALL: u64 = 0x80;
/// PAE, OSFXSR and OSXMMEXCPT.
pub(super) const CR4: u64 = 0x620;
const HLT: u8 = 0xf4;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// What code a program is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Width {
    /// 32-bit code in compatibility mode, with flat segments.
    Bits32,
    /// 64-bit code.
    #[default]
    Bits64,
}

/// A program and the memory that it needs.
pub(crate) struct Snippet<'a> {
    /// Its kind.
    pub(crate) width: Width,
    /// Its bytes.
    pub(crate) code: &'a [u8],
    /// Where they are and begin.
    pub(crate) address: u64,
    /// Memory, of which none of it need be in order or whole pages.
    pub(crate) memory: &'a [Range<u64>],
    /// What is in memory at the start.
    pub(crate) data: &'a [(u64, Vec<u8>)],
}

/// What a program leaves in registers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registers {
    /// The general ones, in encoding order.
    pub(crate) general: [u64; 16],
    /// RIP.
    pub(crate) rip: u64,
    /// The base of FS.
    pub(crate) fs_base: u64,
    /// The base of GS.
    pub(crate) gs_base: u64,
    /// x87 and vector registers.
    pub(crate) fpu: accel::FpuState,
}

/// How a program ended.
pub(crate) enum Stopped {
    /// By HLT: with these registers.
    Halted(Box<Registers>),
    /// By an exception: its vector, and where.
    Exception(u64, u64),
    /// By a system call, which is for Linux.
    SystemCall,
    /// Not in time.
    Timeout,
}

/// The processor that programs run on.
pub(crate) fn model() -> Result<CpuModel> {
    CpuModel::by_name("max").context("our own model")
}

/// Runs `snippet` on `tier`.
pub(crate) fn run(snippet: &Snippet<'_>, tier: Tier, timers: &Arc<TimerService>) -> Result<Stopped> {
    let regions = regions(snippet)?;
    let memory = GuestMemory::new(&regions).context("memory for a test")?;
    write_system(&memory)?;
    memory.write(snippet.address, snippet.code)?;
    for (address, bytes) in snippet.data {
        memory.write(*address, bytes)?;
    }
    let spec = VmSpec { vcpus: 1, tier, cpu: CpuSpec::default(), ..VmSpec::default() };
    let vm = DbtAccelerator.create_vm(&spec, &memory, timers)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut state = vcpu.save()?;
    enter(&mut state, snippet)?;
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
fn end_of(memory: &GuestMemory, state: X86State) -> Result<Stopped> {
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
    let mut bytes = [0; 2];
    if memory.read(rip, &mut bytes).is_err() {
        let _ = memory.read(rip, &mut bytes[..1]);
    }
    let mut general = state.regs;
    general[X86State::RSP] = rsp;
    let base = |segment: usize| state.segments[segment].base;
    let (fs_base, gs_base) = (base(X86State::FS), base(X86State::GS));
    Ok(stopped(vector, bytes, Registers { general, rip, fs_base, gs_base, fpu: state.fpu }))
}

/// What an exception of the instruction that begins with `bytes` means.
pub(super) fn stopped(vector: u64, bytes: [u8; 2], registers: Registers) -> Stopped {
    match vector {
        GENERAL_PROTECTION if bytes[0] == HLT => Stopped::Halted(Box::new(registers)),
        INVALID_OPCODE if bytes == SYSCALL => Stopped::SystemCall,
        LINUX_CALL => Stopped::SystemCall,
        _ => Stopped::Exception(vector, registers.rip),
    }
}

/// The memory that `snippet` and what is around it need, in whole pages.
pub(super) fn regions(snippet: &Snippet<'_>) -> Result<Vec<Range<u64>>> {
    let end = snippet.address + snippet.code.len() as u64;
    if let Some(range) = snippet.memory.iter().find(|range| range.start > range.end || range.end > SYSTEM) {
        bail!("memory at {range:x?} is not possible");
    }
    let own =
        [snippet.address..end, SYSTEM..SYSTEM + SYSTEM_LEN, USER_STACK_32 - USER_STACK_32_LEN..USER_STACK_32];
    Ok(merged(snippet.memory.iter().cloned().chain(own)))
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
    // out STOP_PORT, al; jmp to itself
    memory.write(SYSTEM, &tables(|_, _| vec![0xe6, STOP_PORT as u8, 0xeb, 0xfe]))?;
    memory.write(PML4, &(PDPT | 7).to_le_bytes())?;
    for gigabyte in 0..512u64 {
        memory.write(PDPT + 8 * gigabyte, &(gigabyte << 30 | 0xe7).to_le_bytes())?;
    }
    Ok(())
}

/// What is at [`SYSTEM`]: descriptor tables, a TSS and the handlers, which `handler` makes for vectors and addresses.
pub(super) fn tables(handler: impl Fn(u64, u64) -> Vec<u8>) -> Vec<u8> {
    let mut image = vec![0; TABLES_LEN];
    let mut put = |address: u64, bytes: &[u8]| {
        image[(address - SYSTEM) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    // Descriptors of a TSS and of the LDT have two places.
    let system = |base: u64, limit: u64, kind: u64| {
        limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56
    };
    const CODE_32: u64 = 0x00cf_fb00_0000_ffff;
    const DATA: u64 = 0x00cf_f300_0000_ffff;
    let gdt = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        CODE_32,
        DATA,
        0x00af_fb00_0000_ffff,
        0,
        system(TSS, 0x67, 0x89),
        TSS >> 32,
        system(LDT, LDT_LIMIT.into(), 0x82),
        LDT >> 32,
    ];
    for (index, entry) in gdt.iter().enumerate() {
        put(GDT + 8 * index as u64, &u64::to_le_bytes(*entry));
    }
    for (index, entry) in [0, CODE_32, DATA, DATA].iter().enumerate() {
        put(LDT + 8 * index as u64, &u64::to_le_bytes(*entry));
    }
    for vector in 0..256 {
        let address = HANDLERS + vector * HANDLER_LEN;
        let low = address & 0xffff | KERNEL_CODE << 16 | 0xee << 40 | (address >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, &low.to_le_bytes());
        put(IDT + 16 * vector + 8, &(address >> 32).to_le_bytes());
        put(address, &handler(vector, address));
    }
    put(TSS + 4, &HANDLER_STACK.to_le_bytes());
    image
}

/// User code, with every unit on that the model has.
fn enter(state: &mut X86State, snippet: &Snippet<'_>) -> Result<()> {
    let model = model()?;
    let segment =
        |selector, rights| accel::Segment { selector, base: 0, limit: u32::MAX, rights, unusable: false };
    let (stack, code) = match snippet.width {
        Width::Bits64 => (USER_STACK, segment(USER_CODE, 0xa0fb)),
        Width::Bits32 => (USER_STACK_32, segment(USER_CODE_32, 0xc0fb)),
    };
    state.regs = [0; 16];
    state.regs[X86State::RSP] = stack;
    state.rip = snippet.address;
    state.rflags = 0x202;
    state.segments = [segment(USER_DATA, 0xc0f3); 6];
    state.segments[X86State::CS] = code;
    let system =
        |selector, base, limit, rights| accel::Segment { selector, base, limit, rights, unusable: false };
    state.tr = system(TSS_SELECTOR, TSS, 0x67, 0x8b);
    state.ldtr = system(LDT_SELECTOR, LDT, LDT_LIMIT, 0x82);
    state.gdtr = accel::TableRegister { base: GDT, limit: GDT_LIMIT };
    state.idtr = accel::TableRegister { base: IDT, limit: IDT_LIMIT };
    // As under Linux.
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    // What the model has of FSGSBASE and OSXSAVE.
    let optional = [(feature::FSGSBASE, 16), (feature::XSAVE, 18)];
    let present = optional.iter().filter(|(feature, _)| model.has(*feature));
    state.cr4 = present.fold(CR4, |cr4, (_, bit)| cr4 | 1 << bit);
    state.xcr0 = if model.has(feature::XSAVE) { model.xcr0_mask() } else { 1 };
    state.efer = 0xd00;
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
        run_width(code, Width::Bits64, tier)
    }

    fn run_width(code: &[u8], width: Width, tier: Tier) -> Stopped {
        let snippet = Snippet { width, code, address: 0x1_0000, memory: &[], data: &[] };
        run(&snippet, tier, &timers().unwrap()).unwrap()
    }

    #[test]
    fn code_leaves_its_registers_or_an_exception() {
        for tier in [Tier::Interpreter, Tier::Translator] {
            // mov eax, 5; push rax; pop rbx; hlt
            let stopped = run_code(&[0xb8, 5, 0, 0, 0, 0x50, 0x5b, 0xf4], tier);
            let Stopped::Halted(left) = stopped else { panic!("it did not halt") };
            assert_eq!((left.general[0], left.general[X86State::RBX]), (5, 5));
            assert_eq!(left.general[X86State::RSP], USER_STACK);
            assert!(matches!(run_code(&[0x90, 0x0f, 0x0b], tier), Stopped::Exception(6, 0x1_0001)));
            assert!(matches!(run_code(&[0x90, 0x0f, 0x05], tier), Stopped::SystemCall));
        }
    }

    #[test]
    fn code_of_32_bits() {
        for tier in [Tier::Interpreter, Tier::Translator] {
            // mov eax, 0x17; mov ds, eax; inc eax; push eax; pop ebx; hlt
            let code = [0xb8, 0x17, 0, 0, 0, 0x8e, 0xd8, 0x40, 0x50, 0x5b, 0xf4];
            let Stopped::Halted(left) = run_width(&code, Width::Bits32, tier) else {
                panic!("it did not halt")
            };
            assert_eq!((left.general[X86State::RBX], left.general[X86State::RSP]), (0x18, USER_STACK_32));
            // int 0x80
            assert!(matches!(run_width(&[0xcd, 0x80], Width::Bits32, tier), Stopped::SystemCall));
        }
    }

    #[test]
    fn regions_are_whole_pages_and_do_not_overlap() {
        let ranges = [0x2fff..0x3001, 0x1000..0x1001, 0x9000..0x9001, 0x3000..0x5000];
        assert_eq!(merged(ranges.into_iter()), [0x1000..0x5000, 0x9000..0xa000]);
    }
}
