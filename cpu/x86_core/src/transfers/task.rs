//! Hardware task switches (Intel SDM volume 3, chapter 8). IA-32e mode has none.

use crate::segments::{Descriptor, is_null, kind, rpl, selector_fault};
use crate::{Core, Seg, Segment, Trap, cr0, flags, vector};

/// What switches tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TaskSwitch {
    Jump,
    Call,
    /// IRET with NT set.
    Return,
    /// A task gate in the IDT. The error code is pushed on the new task's stack.
    Interrupt {
        error: Option<u32>,
    },
}

/// What a task switch loads, out of either kind of TSS.
struct Task {
    cr3: u32,
    rip: u32,
    rflags: u32,
    regs: [u32; 8],
    /// In encoding order.
    selectors: [u16; 6],
    ldt: u16,
    debug_trap: bool,
}

/// Lengths of the parts that a switch reads and writes.
const TSS32: usize = 0x68;
const TSS16: usize = 0x2c;

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Task {
    fn from_tss32(tss: &[u8; TSS32]) -> Self {
        Self {
            cr3: dword(tss, 0x1c),
            rip: dword(tss, 0x20),
            rflags: dword(tss, 0x24),
            regs: std::array::from_fn(|index| dword(tss, 0x28 + 4 * index)),
            selectors: std::array::from_fn(|index| word(tss, 0x48 + 4 * index)),
            ldt: word(tss, 0x60),
            debug_trap: tss[0x64] & 1 != 0,
        }
    }

    /// The 16-bit TSS has no CR3, FS and GS.
    fn from_tss16(tss: &[u8; TSS32], cr3: u64) -> Self {
        Self {
            cr3: cr3 as u32,
            rip: u32::from(word(tss, 0x0e)),
            rflags: u32::from(word(tss, 0x10)),
            regs: std::array::from_fn(|index| 0xffff_0000 | u32::from(word(tss, 0x12 + 2 * index))),
            selectors: std::array::from_fn(|index| if index < 4 { word(tss, 0x22 + 2 * index) } else { 0 }),
            ldt: word(tss, 0x2a),
            debug_trap: false,
        }
    }
}

impl Core<'_> {
    /// Switches to the task whose TSS is `selector`; the old one is to go on at `return_rip`. Faults before the switch leave the state as it was;
    /// those of loading the new task's segments are the new task's.
    pub(crate) fn task_switch(
        &mut self,
        selector: u16,
        source: TaskSwitch,
        return_rip: u64,
    ) -> Result<(), Trap> {
        let fault = if source == TaskSwitch::Return { vector::TS } else { vector::GP };
        if is_null(selector) || selector & 4 != 0 {
            return Err(selector_fault(fault, selector));
        }
        let descriptor = self.descriptor(selector, fault)?;
        let busy = descriptor.kind() & kind::BUSY != 0;
        let known =
            !descriptor.is_segment() && matches!(descriptor.kind() & !kind::BUSY, kind::TSS16 | kind::TSS);
        if !known || busy != (source == TaskSwitch::Return) {
            return Err(selector_fault(fault, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        let wide = descriptor.kind() & 8 != 0;
        let len = if wide { TSS32 } else { TSS16 };
        if (descriptor.limit() as usize) < len - 1 {
            return Err(selector_fault(vector::TS, selector));
        }
        self.check_task_switch_intercept(selector, source)?;
        let base = descriptor.base();
        let mut tss = [0; TSS32];
        self.read_linear_bytes(base, &mut tss[..len], self.system_bank())?;
        self.check_linear_write(base, len as u64, self.system_bank())?;

        self.save_task(source, return_rip)?;
        let nested = matches!(source, TaskSwitch::Call | TaskSwitch::Interrupt { .. });
        if nested {
            self.write_linear(base, self.cpu.tr.selector, self.system_bank())?;
        }
        if source != TaskSwitch::Return {
            self.or_attributes(descriptor, kind::BUSY as u8)?;
        }
        let task = if wide { Task::from_tss32(&tss) } else { Task::from_tss16(&tss, self.cpu.cr3) };
        self.load_task(&task, nested, wide, selector, descriptor)?;

        if let TaskSwitch::Interrupt { error: Some(error) } = source {
            self.push(if wide { 4 } else { 2 }, u64::from(error))?;
        }
        if self.cpu.rip > u64::from(self.cpu.segments[Seg::Cs as usize].limit) {
            return Err(Trap::gp(0));
        }
        if task.debug_trap {
            self.cpu.dr[6] |= 1 << 15;
            return Err(Trap::plain(vector::DB));
        }
        Ok(())
    }

    /// Stores the state of the old task in its TSS.
    fn save_task(&mut self, source: TaskSwitch, return_rip: u64) -> Result<(), Trap> {
        let tr = self.cpu.tr;
        let wide = tr.attributes & 8 != 0;
        let mut rflags = self.cpu.rflags as u32;
        if source == TaskSwitch::Return {
            rflags &= !(flags::NT as u32);
        }
        let regs = std::array::from_fn::<u32, 8, _>(|index| self.cpu.regs[index] as u32);
        let selectors = self.cpu.segments.map(|segment| segment.selector);
        let (at, bytes) = if wide {
            let mut bytes = Vec::with_capacity(0x40);
            for value in [return_rip as u32, rflags].into_iter().chain(regs) {
                bytes.extend(value.to_le_bytes());
            }
            for selector in selectors {
                bytes.extend(u32::from(selector).to_le_bytes());
            }
            (0x20, bytes)
        } else {
            let mut bytes = Vec::with_capacity(0x1c);
            for value in [return_rip as u32, rflags].into_iter().chain(regs) {
                bytes.extend((value as u16).to_le_bytes());
            }
            for selector in &selectors[..4] {
                bytes.extend(selector.to_le_bytes());
            }
            (0x0e, bytes)
        };
        if !tr.is_usable() || at + bytes.len() as u64 - 1 > u64::from(tr.limit) {
            return Err(selector_fault(vector::TS, tr.selector));
        }
        let address = self.system_address(tr.base.wrapping_add(at));
        self.write_linear_bytes(address, &bytes, self.system_bank())?;
        if matches!(source, TaskSwitch::Jump | TaskSwitch::Return) {
            let old = self.descriptor(tr.selector, vector::TS)?;
            let byte = self.system_address(old.address.wrapping_add(5));
            self.update_linear::<u8>(byte, self.system_bank(), true, |old| Some(old & !(kind::BUSY as u8)))?;
        }
        Ok(())
    }

    /// Loads the state of the new task. From here on faults are its own.
    fn load_task(
        &mut self,
        task: &Task,
        nested: bool,
        wide: bool,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<(), Trap> {
        self.cpu.tr = descriptor.segment(selector);
        self.cpu.tr.attributes |= kind::BUSY;
        self.cpu.cr0 |= cr0::TS;
        if wide && self.cpu.cr0 & cr0::PG != 0 {
            self.set_cr3(u64::from(task.cr3))?;
        }
        for (slot, value) in self.cpu.regs.iter_mut().zip(task.regs) {
            *slot = u64::from(value);
        }
        self.cpu.rip = u64::from(task.rip);
        let nt = if nested { flags::NT } else { 0 };
        self.cpu.dr[7] &= !0x155;
        self.set_rflags(u64::from(task.rflags) | nt);
        for (segment, selector) in self.cpu.segments.iter_mut().zip(task.selectors) {
            *segment = Segment::null(selector);
        }
        self.cpu.ldtr = Segment::null(task.ldt);
        if self.vm86() {
            self.cpu.segments = task.selectors.map(Segment::vm86);
            self.cpu.cpl = 3;
            self.mode_changed();
            return self.load_task_ldt(task.ldt);
        }
        self.cpu.cpl = rpl(task.selectors[Seg::Cs as usize]);
        self.mode_changed();
        self.load_task_ldt(task.ldt)?;
        self.load_task_segments(task)
    }

    fn load_task_ldt(&mut self, selector: u16) -> Result<(), Trap> {
        if is_null(selector) {
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(selector_fault(vector::TS, selector));
        }
        let descriptor = self.descriptor(selector, vector::TS)?;
        if descriptor.is_segment() || descriptor.kind() != kind::LDT || !descriptor.is_present() {
            return Err(selector_fault(vector::TS, selector));
        }
        self.cpu.ldtr = descriptor.segment(selector);
        Ok(())
    }

    fn load_task_segments(&mut self, task: &Task) -> Result<(), Trap> {
        let selector = task.selectors[Seg::Cs as usize];
        let code = self.descriptor(selector, vector::TS)?;
        let cpl = rpl(selector);
        let level = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        if is_null(selector) || !code.is_code() || !level {
            return Err(selector_fault(vector::TS, selector));
        }
        if !code.is_present() {
            return Err(selector_fault(vector::NP, selector));
        }
        self.mark_accessed(code)?;
        self.cpu.segments[Seg::Cs as usize] = code.segment(selector);
        self.mode_changed();
        let selector = task.selectors[Seg::Ss as usize];
        self.cpu.segments[Seg::Ss as usize] = self.stack_segment(selector, cpl, vector::TS)?;
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let loaded = self.data_segment(task.selectors[seg as usize]).map_err(|trap| match trap {
                Trap::Exception(mut exception) if exception.vector == vector::GP => {
                    exception.vector = vector::TS;
                    Trap::Exception(exception)
                }
                other => other,
            })?;
            self.cpu.segments[seg as usize] = loaded;
        }
        Ok(())
    }
}
