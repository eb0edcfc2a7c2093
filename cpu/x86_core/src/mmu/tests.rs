use super::*;
use crate::testing::{DATA, MMIO, Machine, PAGE_TABLES, RAM};
use crate::{Exception, Seg, cr0, page_fault, vector};
use guest_memory::CodeWriteHook;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

/// A part of the address space that the test's own tables map.
const VA: u64 = 0x80_0000_0000;
/// Those tables, one for each level, the level-3 table first.
const TABLES: u64 = 0x50_0000;

/// Maps the page at `VA` to `gpa` through tables whose entry of level `level` has `bits`, the others all
/// rights.
fn map(machine: &Machine, gpa: u64, level: u64, bits: u64) {
    let entry = |at: u64, to: u64| {
        let bits = if level == at { bits } else { 7 };
        to | bits
    };
    machine.poke(PAGE_TABLES + 8, entry(4, TABLES));
    machine.poke(TABLES, entry(3, TABLES + 0x1000));
    machine.poke(TABLES + 0x1000, entry(2, TABLES + 0x2000));
    machine.poke(TABLES + 0x2000, entry(1, gpa));
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Read,
    Write,
    Fetch,
}

fn perform(machine: &mut Machine, op: Op, va: u64) -> Result<(), Trap> {
    let mut core = machine.core();
    match op {
        Op::Read => core.read::<u32>(Seg::Ds, va).map(drop),
        Op::Write => core.write::<u32>(Seg::Ds, va, 1),
        Op::Fetch => {
            core.cpu.rip = va;
            core.fetch_physical().map(drop)
        }
    }
}

/// Access rights as the manual has them, case by case (Intel SDM volume 3, 4.6.1).
#[derive(Debug, Clone, Copy)]
struct Case {
    level: u64,
    user_page: bool,
    writable: bool,
    no_execute: bool,
    cpl: u8,
    op: Op,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

impl Case {
    fn allowed(self) -> bool {
        let user_access = self.cpl == 3;
        let data_ok = !self.smap || self.ac;
        match (user_access, self.user_page, self.op) {
            (true, false, _) => false,
            (true, true, Op::Read) | (false, false, Op::Read) => true,
            (true, true, Op::Write) => self.writable,
            (true, true, Op::Fetch) | (false, false, Op::Fetch) => !self.no_execute,
            (false, false, Op::Write) => self.writable || !self.wp,
            (false, true, Op::Read) => data_ok,
            (false, true, Op::Write) => data_ok && (self.writable || !self.wp),
            (false, true, Op::Fetch) => !self.smep && !self.no_execute,
        }
    }

    fn expected(self, va: u64) -> Result<(), Trap> {
        if self.allowed() {
            return Ok(());
        }
        let mut error = 1;
        if self.op == Op::Write {
            error |= 2;
        }
        if self.cpl == 3 {
            error |= 4;
        }
        if self.op == Op::Fetch {
            error |= 0x10;
        }
        Err(Trap::pf(va, error))
    }
}

#[test]
fn permission_matrix() {
    let mut kernel = Machine::long();
    let mut user = Machine::user();
    for number in 0..4 * 3 * 512u32 {
        let bit = |index: u32| number >> index & 1 != 0;
        let case = Case {
            level: u64::from(number / 512 % 4) + 1,
            user_page: bit(0),
            writable: bit(1),
            no_execute: bit(2),
            cpl: if bit(3) { 3 } else { 0 },
            op: [Op::Read, Op::Write, Op::Fetch][number as usize / 2048],
            wp: bit(4),
            smep: bit(5),
            smap: bit(6),
            ac: bit(7),
        };
        let machine = if case.cpl == 3 { &mut user } else { &mut kernel };
        let bits = 1
            | if case.writable { 2 } else { 0 }
            | if case.user_page { 4 } else { 0 }
            | if case.no_execute { 1 << 63 } else { 0 };
        map(machine, DATA, case.level, bits);
        let cpu = &mut machine.cpu;
        cpu.cr0 = cpu.cr0 & !cr0::WP | if case.wp { cr0::WP } else { 0 };
        cpu.cr4 = cpu.cr4 & !(cr4::SMEP | cr4::SMAP)
            | if case.smep { cr4::SMEP } else { 0 }
            | if case.smap { cr4::SMAP } else { 0 };
        cpu.rflags = 2 | if case.ac { flags::AC } else { 0 };
        let mut core = machine.core();
        core.flush_tlb(false);
        core.mode_changed();
        for _ in 0..2 {
            assert_eq!(perform(machine, case.op, VA), case.expected(VA), "{case:?}");
        }
    }
}

#[test]
fn faults_for_what_is_not_there_and_what_is_reserved() {
    let mut machine = Machine::long();
    for level in 1..=4 {
        map(&machine, DATA, level, 6);
        assert_eq!(perform(&mut machine, Op::Write, VA), Err(Trap::pf(VA, 2)), "level {level}");
        map(&machine, DATA, level, 1 << 50 | 7);
        assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)), "level {level}");
    }
    map(&machine, DATA, 4, 0x87);
    assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)), "no large pages at level 4");
    map(&machine, DATA, 3, 0x87);
    assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)), "unaligned 1 GiB page");
    map(&machine, DATA, 2, 0x87);
    assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)), "unaligned 2 MiB page");
    map(&machine, DATA, 1, 1 << 63 | 7);
    machine.cpu.msrs.efer &= !efer::NXE;
    assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)), "NX without EFER.NXE");
    // The fetch bit of the error code exists only with NXE or SMEP.
    map(&machine, DATA, 1, 0);
    assert_eq!(perform(&mut machine, Op::Fetch, VA), Err(Trap::pf(VA, 0)));
    machine.cpu.cr4 |= cr4::SMEP;
    assert_eq!(perform(&mut machine, Op::Fetch, VA), Err(Trap::pf(VA, 16)));
    // Page tables where there is no RAM float.
    map(&machine, DATA, 1, 7);
    machine.poke(PAGE_TABLES + 8, MMIO | 7);
    assert_eq!(perform(&mut machine, Op::Read, VA), Err(Trap::pf(VA, 9)));
}

#[test]
fn accessed_and_dirty_bits() {
    let mut machine = Machine::long();
    map(&machine, DATA, 1, 7);
    let bits = |machine: &Machine| {
        let at = [PAGE_TABLES + 8, TABLES, TABLES + 0x1000, TABLES + 0x2000];
        at.map(|gpa| machine.peek(gpa) & 0x60)
    };
    perform(&mut machine, Op::Read, VA).unwrap();
    assert_eq!(bits(&machine), [0x20; 4]);
    assert_eq!(machine.core().fill(VA, false), Ok(Fill::Direct));
    // The entry that the load made must not let the store by.
    perform(&mut machine, Op::Write, VA).unwrap();
    assert_eq!(bits(&machine), [0x20, 0x20, 0x20, 0x60]);
    // A fault sets nothing.
    map(&machine, DATA, 1, 5);
    machine.core().flush_tlb(false);
    perform(&mut machine, Op::Write, VA).unwrap_err();
    assert_eq!(bits(&machine), [0; 4]);
}

#[test]
fn large_pages_in_each_format() {
    let mut machine = Machine::long();
    // 1 GiB at VA, from physical 0.
    machine.poke(PAGE_TABLES + 8, TABLES | 7);
    machine.poke(TABLES, 0x87);
    machine.poke(DATA + 0x1238, 0x5555);
    assert_eq!(machine.core().read::<u64>(Seg::Ds, VA + DATA + 0x1238), Ok(0x5555));
    // An INVLPG anywhere in it drops all of it.
    machine.poke(TABLES, 0);
    machine.core().invlpg(VA + 0x3000_0000);
    machine.core().read::<u64>(Seg::Ds, VA + DATA + 0x1238).unwrap_err();

    // 32-bit paging: a 4 MiB page and a 4 KiB page.
    let mut machine = Machine::protected();
    machine.memory.write(0x40_0000, &(0x0040_0087u64 | 0x50_1007 << 32).to_le_bytes()).unwrap();
    machine.poke(0x50_1000, 0x60_0007);
    machine.poke(0x40_2000, 11);
    machine.poke(0x60_0010, 12);
    machine.cpu.cr3 = 0x40_0000;
    machine.cpu.cr4 = cr4::PSE;
    machine.core().set_cr0(cr0::PE | cr0::PG | cr0::WP).unwrap();
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 0x2000), Ok(11));
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 0x40_0010), Ok(12));
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 0x40_1010), Err(Trap::pf(0x40_1010, 0)));
    assert_eq!(machine.peek(0x50_1000), 0x60_0027);

    // PAE: the directory pointers are those of the time of the MOV to CR3.
    let mut machine = Machine::protected();
    machine.poke(0x40_0000, 0x40_1001);
    machine.poke(0x40_1000, 0x40_2007);
    machine.poke(0x40_1008, 0x60_0087);
    machine.poke(0x40_2008, 0x50_0007);
    machine.poke(0x50_0008, 21);
    machine.poke(0x60_3000, 22);
    machine.core().set_cr4(cr4::PAE).unwrap();
    machine.core().set_cr3(0x40_0000).unwrap();
    machine.core().set_cr0(cr0::PE | cr0::PG).unwrap();
    machine.poke(0x40_0000, 0);
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 0x1008), Ok(21));
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 0x20_3000), Ok(22));
    assert_eq!(machine.core().set_cr3(0x40_0000), Ok(()));
    machine.core().read::<u64>(Seg::Ds, 0x1008).unwrap_err();
    machine.poke(0x40_0000, 0x40_1003);
    assert_eq!(machine.core().set_cr3(0x40_0000), Err(Trap::gp(0)), "reserved bits");
}

#[test]
fn canonical_addresses() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    let bad = 0x8000_0000_0000;
    assert_eq!(core.read::<u8>(Seg::Ds, bad), Err(Trap::gp(0)));
    assert_eq!(core.write::<u8>(Seg::Ss, bad, 0), Err(Trap::with_error(vector::SS, 0)));
    assert_eq!(core.read::<u32>(Seg::Ds, bad - 2), Err(Trap::gp(0)), "its end is not canonical");
    core.cpu.segments[Seg::Fs as usize].base = bad - 8;
    assert_eq!(core.read::<u64>(Seg::Fs, 8), Err(Trap::gp(0)));
    core.cpu.rip = bad;
    assert_eq!(core.fetch_physical().map(|_| ()), Err(Trap::gp(0)));
}

#[test]
fn accesses_across_pages_are_all_or_nothing() {
    let mut machine = Machine::long();
    map(&machine, DATA, 1, 7);
    machine.poke(TABLES + 0x2008, (DATA + 0x5000) | 7);
    let end = VA + 0xffd;
    let mut core = machine.core();
    core.write::<u64>(Seg::Ds, end, 0x8877_6655_4433_2211).unwrap();
    assert_eq!(core.read::<u64>(Seg::Ds, end), Ok(0x8877_6655_4433_2211));
    assert_eq!(core.update::<u32>(Seg::Ds, end, true, |old| Some(old + 1)), Ok(0x4433_2211));
    assert_eq!(machine.peek(DATA + 0xff8) >> 40, 0x33_2212);
    assert_eq!(machine.peek(DATA + 0x5000) & 0xff_ffff_ffff, 0x88_7766_5544);

    machine.poke(TABLES + 0x2008, (DATA + 0x5000) | 5);
    machine.core().flush_tlb(false);
    let mut core = machine.core();
    let fault = Err(Trap::pf(VA + 0x1000, page_fault::PRESENT | page_fault::WRITE));
    assert_eq!(core.write::<u64>(Seg::Ds, end, 0), fault);
    assert_eq!(core.write_bytes(Seg::Ds, end, &[0; 300]), fault);
    assert_eq!(core.check_write(Seg::Ds, end, 4), fault);
    assert_eq!(core.update::<u64>(Seg::Ds, end, false, |_| None).map(drop), fault);
    assert_eq!(core.read::<u64>(Seg::Ds, end), Ok(0x8877_6655_4433_2212));
    let mut bytes = [0; 5];
    core.read_bytes(Seg::Ds, end, &mut bytes).unwrap();
    assert_eq!(bytes, [0x12, 0x22, 0x33, 0x44, 0x55]);
}

#[test]
fn fetches_stop_where_the_next_page_is_missing() {
    let mut machine = Machine::long();
    map(&machine, DATA, 1, 7);
    machine.memory.write(DATA + 0xff0, &[0x90; 16]).unwrap();
    let mut buffer = [0; 15];
    let mut core = machine.core();
    core.cpu.rip = VA + 0xffa;
    assert_eq!(core.fetch(&mut buffer), Ok(6));
    assert_eq!(core.fetch_fault(6), Some(Trap::pf(VA + 0x1000, page_fault::FETCH)));
    machine.poke(TABLES + 0x2008, DATA | 7);
    let mut core = machine.core();
    assert_eq!(core.fetch_fault(6), None);
    assert_eq!(core.fetch(&mut buffer), Ok(15));
    assert_eq!(core.fetch_fault(15), Some(Trap::gp(0)));
    core.cpu.rip = VA + 0x20;
    assert_eq!(core.fetch(&mut buffer), Ok(15));
    // A code segment's limit ends fetches too.
    let mut machine = Machine::protected();
    machine.cpu.segments[1].limit = machine.cpu.rip as u32 + 2;
    assert_eq!(machine.core().fetch(&mut buffer), Ok(3));
    machine.cpu.rip += 3;
    assert_eq!(machine.core().fetch(&mut buffer), Err(Trap::gp(0)));
}

#[test]
fn mmio_is_never_cached() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    core.write::<u32>(Seg::Ds, MMIO + 0x10, 0x1234_5678).unwrap();
    assert_eq!(core.read::<u16>(Seg::Ds, MMIO + 0x11), Ok(0x3456));
    assert_eq!(core.fill(MMIO, false), Ok(Fill::Interpret));
    assert_eq!(core.host_span(Seg::Ds, MMIO, 64, false), Ok(None));
    assert_eq!(core.update::<u8>(Seg::Ds, MMIO + 0x10, true, |old| Some(old + 1)), Ok(0x78));
    core.write::<u128>(Seg::Ds, MMIO + 0x20, 7 << 64 | 9).unwrap();
    let log = machine.platform.log.borrow();
    let sizes: Vec<_> = log.iter().map(|(write, at, data)| (*write, at - MMIO, data.len())).collect();
    assert_eq!(
        sizes,
        [
            (true, 0x10, 4),
            (false, 0x11, 2),
            (false, 0x10, 1),
            (true, 0x10, 1),
            (true, 0x20, 8),
            (true, 0x28, 8)
        ]
    );
}

#[derive(Default)]
struct Writes(Mutex<Vec<(u64, u64)>>);

impl CodeWriteHook for Writes {
    fn code_written(&self, gpa: u64, len: u64) {
        self.0.lock().unwrap().push((gpa, len));
    }
}

#[test]
fn writes_to_code_and_logged_pages_are_told() {
    let mut machine = Machine::long();
    let hook = Arc::new(Writes::default());
    machine.memory.set_code_hook(hook.clone());
    machine.core().write::<u32>(Seg::Ds, DATA, 1).unwrap();
    assert_eq!(machine.core().fill(DATA, true), Ok(Fill::Direct));

    machine.memory.mark_code(DATA);
    let host = machine.memory.host_page(DATA).unwrap().ptr as u64;
    machine.cpu.tlb.invalidate_writes(host);
    let mut core = machine.core();
    core.write::<u32>(Seg::Ds, DATA + 8, 2).unwrap();
    core.update::<u16>(Seg::Ds, DATA + 16, true, |_| Some(3)).unwrap();
    core.update::<u16>(Seg::Ds, DATA + 16, true, |_| None).unwrap();
    core.write_bytes(Seg::Ds, DATA + 0xfff, &[1, 2]).unwrap();
    assert_eq!(core.fill(DATA, true), Ok(Fill::Interpret));
    assert_eq!(core.fill(DATA, false), Ok(Fill::Direct));
    assert_eq!(core.host_span(Seg::Ds, DATA, 8, true), Ok(None));
    assert_eq!(*hook.0.lock().unwrap(), [(DATA + 8, 4), (DATA + 16, 2), (DATA + 0xfff, 1)]);

    machine.memory.unmark_code(DATA);
    machine.memory.set_dirty_log(true);
    machine.cpu.tlb.invalidate_all_writes();
    machine.core().write::<u32>(Seg::Ds, DATA, 4).unwrap();
    assert!(machine.memory.is_dirty(DATA));
    assert_eq!(machine.core().fill(DATA, true), Ok(Fill::Direct), "dirty already");
}

#[test]
fn memory_that_is_only_read_sends_stores_to_the_bus() {
    let mut machine = Machine::long();
    let start = machine.memory.regions()[0].gpa;
    machine.poke(DATA, 0x1122_3344);
    machine.core().read::<u32>(Seg::Ds, DATA).unwrap();
    machine.memory.set_read_only(start, true).unwrap();
    let mut core = machine.core();
    core.flush_tlb(false);
    assert_eq!(core.read::<u32>(Seg::Ds, DATA), Ok(0x1122_3344));
    core.write::<u32>(Seg::Ds, DATA, 1).unwrap();
    core.write_bytes(Seg::Ds, DATA + 1, &[1, 2, 3]).unwrap();
    assert_eq!(core.update::<u32>(Seg::Ds, DATA, true, |old| Some(old + 1)), Ok(0x1122_3344));
    assert_eq!(core.read::<u32>(Seg::Ds, DATA), Ok(0x1122_3344));
    assert_eq!((core.fill(DATA, false), core.fill(DATA, true)), (Ok(Fill::Direct), Ok(Fill::Interpret)));
    assert_eq!(core.host_span(Seg::Ds, DATA, 8, true), Ok(None));
    assert!(core.host_span(Seg::Ds, DATA, 8, false).unwrap().is_some());
    machine.memory.set_read_only(start, false).unwrap();
    let mut core = machine.core();
    core.write::<u32>(Seg::Ds, DATA, 1).unwrap();
    assert_eq!(core.read::<u32>(Seg::Ds, DATA), Ok(1));
}

#[test]
fn generations_of_code_mappings() {
    let mut machine = Machine::long();
    map(&machine, DATA, 1, 7);
    machine.poke(TABLES + 0x2008, DATA | 7);
    let mut core = machine.core();
    let start = core.cpu.generation().all;
    core.read::<u8>(Seg::Ds, VA + 0x1000).unwrap();
    core.invlpg(VA + 0x1000);
    assert_eq!(core.cpu.generation().all, start, "no code came from there");
    core.cpu.rip = VA;
    core.fetch_physical().unwrap();
    core.invlpg(VA);
    assert_eq!(core.cpu.generation().all, start + 1);
    core.set_cr3(core.cpu.cr3).unwrap();
    assert_eq!(core.cpu.generation().all, start + 2);
}

#[test]
fn alignment_checks() {
    let mut machine = Machine::user();
    machine.cpu.cr0 |= cr0::AM;
    let mut core = machine.core();
    core.read::<u32>(Seg::Ds, DATA + 1).unwrap();
    core.set_rflags(flags::AC);
    let fault = Trap::with_error(vector::AC, 0);
    assert_eq!(core.read::<u32>(Seg::Ds, DATA + 1), Err(fault));
    assert_eq!(core.write::<u16>(Seg::Ds, DATA + 1, 0), Err(fault));
    assert_eq!(core.read::<u32>(Seg::Ds, DATA + 4).map(drop), Ok(()));
    assert_eq!(core.fill(DATA, false), Ok(Fill::Interpret));
    core.set_rflags(0);
    assert_eq!(core.fill(DATA, false), Ok(Fill::Direct));
    core.read::<u32>(Seg::Ds, DATA + 1).unwrap();
}

#[test]
fn data_breakpoints() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    core.read::<u64>(Seg::Ds, DATA).unwrap();
    core.cpu.dr[1] = DATA + 8;
    core.cpu.dr[3] = DATA + 0x102;
    // Four bytes of stores by breakpoint 1, two bytes of any access by breakpoint 3.
    core.cpu.dr[7] = 1 << 2 | 2 << 6 | 0xd << 20 | 0x7 << 28;
    core.mode_changed();
    assert!(core.cpu.watched);
    assert_eq!(core.fill(DATA, false), Ok(Fill::Interpret));
    assert_eq!(core.host_span(Seg::Ds, DATA, 8, false), Ok(None));
    core.read::<u64>(Seg::Ds, DATA + 8).unwrap();
    core.write::<u64>(Seg::Ds, DATA, 1).unwrap();
    core.write::<u8>(Seg::Ds, DATA + 12, 1).unwrap();
    assert_eq!(core.take_data_breakpoints(), 0);
    core.write::<u8>(Seg::Ds, DATA + 11, 1).unwrap();
    assert_eq!(core.take_data_breakpoints(), 2);
    core.update::<u32>(Seg::Ds, DATA + 5, false, |_| Some(1)).unwrap();
    assert_eq!(core.take_data_breakpoints(), 2);
    core.read_bytes(Seg::Ds, DATA, &mut [0; 0x103]).unwrap();
    assert_eq!(core.take_data_breakpoints(), 8);
    assert_eq!(core.take_data_breakpoints(), 0);
    core.cpu.dr[7] = 0x400;
    core.mode_changed();
    assert_eq!(core.fill(DATA, false), Ok(Fill::Direct));
}

#[test]
fn locked_updates_of_two_processors_add_up() {
    let machine = Machine::long();
    let memory = &machine.memory;
    let model = machine.cpu.model.clone();
    let cr3 = machine.cpu.cr3;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let model = model.clone();
            scope.spawn(move || {
                let platform = crate::testing::FlatPlatform::default();
                let mut other = Machine::long();
                other.cpu.model = model;
                other.cpu.cr3 = cr3;
                let mut core = Core { cpu: &mut other.cpu, memory, platform: &platform };
                for _ in 0..20_000 {
                    core.update::<u64>(Seg::Ds, DATA, true, |old| Some(old + 1)).unwrap();
                    core.update::<u128>(Seg::Ds, DATA + 16, true, |old| Some(old + (1 << 64))).unwrap();
                    // Across a cache line.
                    core.update::<u32>(Seg::Ds, DATA + 62, true, |old| Some(old + 1)).unwrap();
                }
            });
        }
    });
    assert_eq!(machine.peek(DATA), 40_000);
    assert_eq!(machine.peek(DATA + 24), 40_000);
    assert_eq!(machine.peek(DATA + 62) & 0xffff_ffff, 40_000);
}

#[test]
fn segments_of_protected_mode() {
    let mut machine = Machine::protected();
    let data = Seg::Ds as usize;
    machine.cpu.segments[data].base = 0x1000;
    machine.cpu.segments[data].limit = 0xfff;
    machine.poke(0x1ffc, 5);
    let mut core = machine.core();
    let gp = Trap::gp(0);
    assert_eq!(core.read::<u32>(Seg::Ds, 0xffc), Ok(5));
    assert_eq!(core.read::<u32>(Seg::Ds, 0xffd), Err(gp));
    // Expand-down: what is above the limit is valid.
    core.cpu.segments[data].attributes = 0xc097;
    assert_eq!(core.read::<u32>(Seg::Ds, 0xffd), Err(gp));
    core.read::<u32>(Seg::Ds, 0x1000).unwrap();
    assert_eq!(core.read::<u32>(Seg::Ds, 0xffff_fffe), Err(gp));
    // Read-only data, and code.
    core.cpu.segments[data].attributes = 0xc091;
    core.cpu.segments[data].limit = u32::MAX;
    core.read::<u32>(Seg::Ds, 0).unwrap();
    assert_eq!(core.write::<u32>(Seg::Ds, 0, 0), Err(gp));
    assert_eq!(core.write::<u32>(Seg::Cs, 0, 0), Err(gp));
    core.cpu.segments[Seg::Cs as usize].attributes = 0xc099;
    assert_eq!(core.read::<u32>(Seg::Cs, 0), Err(gp));
    core.cpu.segments[Seg::Ss as usize].limit = 7;
    assert_eq!(core.read::<u32>(Seg::Ss, 5), Err(Trap::with_error(vector::SS, 0)));
    // Addresses wrap at 4 GiB.
    core.cpu.segments[Seg::Es as usize].base = 0xffff_f000;
    core.memory.write(0x2000, &[7]).unwrap();
    assert_eq!(core.read::<u8>(Seg::Es, 0x3000), Ok(7));
}

/// 4-level paging once more, by recursion over the levels and without any cache: where `va` is, or the page
/// fault's error code. (NXE, WP and SMAP are on, 46 bits of physical address.)
fn oracle(machine: &Machine, va: u64, write: bool) -> Result<u64, u32> {
    fn walk(machine: &Machine, table: u64, level: u32, va: u64, rights: u64) -> Result<(u64, u64), bool> {
        let shift = 3 + 9 * level;
        let at = table + (va >> shift & 511) * 8;
        let entry = if at < RAM { machine.peek(at) } else { u64::MAX };
        let large = entry & 0x80 != 0;
        if entry & 1 == 0 {
            return Err(false);
        }
        let address_bits = (entry >> 12 & 0xff_ffff_ffff) << 12;
        let misaligned =
            (2..=3).contains(&level) && large && address_bits & ((1 << shift) - 1) & !0x1000 != 0;
        if address_bits >> 46 != 0 || misaligned || (level == 4 && large) {
            return Err(true);
        }
        let rights = rights & entry & 6;
        if level == 1 || large {
            let size = 1 << shift;
            return Ok((address_bits / size * size + va % size, rights));
        }
        walk(machine, address_bits, level - 1, va, rights)
    }
    let user = machine.cpu.cpl == 3;
    let code = if write { 2 } else { 0 } | if user { 4 } else { 0 };
    match walk(machine, PAGE_TABLES, 4, va, 6) {
        Err(reserved) => Err(code | if reserved { 9 } else { 0 }),
        Ok((gpa, rights)) => {
            let user_page = rights & 4 != 0;
            let smap = !user && user_page && machine.cpu.rflags & flags::AC == 0;
            let denied = smap || (user && !user_page) || (write && rights & 2 == 0);
            if denied { Err(code | 1) } else { Ok(gpa) }
        }
    }
}

/// What a random program of the MMU does.
#[derive(Debug, Clone)]
enum Step {
    /// Writes an entry of a table: table, index, target, bits.
    Map(u64, u64, u64, u64),
    Invlpg(u64),
    Cr3,
    Access(u64, u8, bool),
    Privilege(bool, bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    // Few addresses, so that they collide: 3 top-level slots, 3 slots each below.
    let address = || {
        (0u64..3, 0u64..2, 0u64..3, 0u64..4, 0u64..0x1000u64)
            .prop_map(|(a, b, c, d, e)| (a << 39 | b << 30 | c << 21 | d << 12 | e) + VA)
    };
    let bits = prop_oneof![
        4 => Just(7u64),
        1 => any::<u64>().prop_map(|bits| bits & 0x80f0_0000_0000_0fff | 1),
        1 => Just(0x87u64),
        1 => Just(0x107u64),
        1 => any::<u64>(),
    ];
    prop_oneof![
        4 => (0u64..6, 0u64..4, 0u64..8, bits).prop_map(|(table, index, to, bits)| Step::Map(table, index, to, bits)),
        2 => address().prop_map(Step::Invlpg),
        1 => Just(Step::Cr3),
        8 => (address(), 0u8..4, any::<bool>()).prop_map(|(va, size, write)| Step::Access(va, size, write)),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(user, ac)| Step::Privilege(user, ac)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the page tables hold: no panic, and the TLB says what a walk says.
    #[test]
    fn the_tlb_agrees_with_the_page_tables(steps in proptest::collection::vec(any_step(), 1..120)) {
        let mut machine = Machine::long();
        machine.cpu.cr4 |= cr4::SMAP;
        // Tables that refer to each other; the last two targets are plain pages.
        for slot in 1..4 {
            machine.poke(PAGE_TABLES + 8 * slot, TABLES | 7);
        }
        for step in steps {
            match step {
                Step::Map(table, index, to, bits) => {
                    let entry = TABLES + table * 0x1000 + index * 8;
                    machine.poke(entry, (TABLES + to * 0x1000) | bits);
                    // Structures changed: the guest flushes, as it must.
                    machine.core().flush_tlb(false);
                }
                Step::Invlpg(va) => machine.core().invlpg(va),
                Step::Cr3 => machine.core().set_cr3(PAGE_TABLES).unwrap(),
                Step::Privilege(user, ac) => {
                    machine.cpu.cpl = if user { 3 } else { 0 };
                    machine.cpu.rflags = if ac { flags::AC | 2 } else { 2 };
                    machine.core().mode_changed();
                }
                Step::Access(va, size, write) => {
                    let expected = oracle(&machine, va, write);
                    let mut core = machine.core();
                    match (core.host_span(Seg::Ds, va, 1, write), expected) {
                        (Ok(Some((host, _))), Ok(gpa)) => {
                            prop_assert_eq!(core.memory.gpa_of(host), Some(gpa));
                        }
                        (Ok(None), Ok(gpa)) => prop_assert!(gpa >= RAM),
                        (Err(trap), Err(error)) => prop_assert_eq!(trap, Trap::pf(va, error)),
                        (span, expected) => prop_assert!(false, "{:?}, not {:?}", span, expected),
                    }
                    // Larger ones, over page ends, must only not panic; they may change the tables.
                    let before = core.cpu.generation().all;
                    let result = match (size, write) {
                        (0, false) => core.read::<u16>(Seg::Ds, va).map(drop),
                        (1, false) => core.read::<u64>(Seg::Ds, va).map(drop),
                        (_, false) => core.read::<u128>(Seg::Ds, va).map(drop),
                        (size, true) => core.check_write(Seg::Ds, va, u64::from(size) * 8),
                    };
                    if let Err(Trap::Exception(Exception { vector, .. })) = result {
                        prop_assert!(vector == vector::PF || vector == vector::GP);
                    }
                    core.cpu.rip = va;
                    let _ = core.fetch(&mut [0; 15]);
                    prop_assert_eq!(core.cpu.generation().all, before);
                }
            }
        }
    }

    /// Whatever processor state and memory hold: accesses and deliveries end in a result.
    #[test]
    fn no_state_makes_it_panic(
        (cr0_bits, cr4_bits, efer_bits) in any::<(u64, u64, u64)>(),
        segment in any::<(u64, u32, u32, u16)>(),
        (rsp, rip, cr3, rflags) in any::<(u64, u64, u64, u64)>(),
        table in any::<(u64, u16)>(),
        fill in proptest::collection::vec(any::<u64>(), 64),
        number in any::<u8>(),
    ) {
        let mut machine = Machine::long();
        for (index, word) in fill.iter().enumerate() {
            machine.poke(0x1000 + 8 * index as u64, *word);
        }
        let cpu = &mut *machine.cpu;
        cpu.cr0 = cr0_bits;
        cpu.cr4 = cr4_bits;
        cpu.msrs.efer = efer_bits;
        cpu.cr3 = cr3 & 0x7ff_f000;
        cpu.pdpte = [cr3 & 0xff_f001; 4];
        cpu.cpl = (segment.3 & 3) as u8;
        let (base, limit, attributes, selector) = segment;
        cpu.segments = [crate::Segment { base, limit, attributes, selector }; 6];
        cpu.tr = cpu.segments[0];
        cpu.ldtr = cpu.segments[0];
        cpu.idtr = crate::TableRegister { base: table.0, limit: table.1 };
        cpu.gdtr = cpu.idtr;
        cpu.regs[4] = rsp;
        cpu.rip = rip;
        let mut core = machine.core();
        core.set_rflags(rflags);
        core.mode_changed();
        core.flush_tlb(false);
        let _ = core.read::<u64>(Seg::Gs, rip);
        let _ = core.fetch(&mut [0; 15]);
        let _ = core.push(8, 1);
        let _ = core.load_segment(Seg::Ds, number.into());
        let _ = core.far_call(u16::from(number) * 8, rip, 4, rip);
        let _ = core.far_return(4, 16);
        let _ = core.iret(4, 0);
        let _ = core.software_interrupt(number, rip);
        let exception = Exception { vector: number & 31, error: Some(0), address: 0 };
        let _ = core.deliver(exception);
        let _ = core.interrupt(number);
    }
}
