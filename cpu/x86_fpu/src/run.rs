//! Running stubs.

use crate::stub::{Class, Context, Stub};
use crate::{engine, operand, simd_exception, x87};
use iced_x86::Instruction;
use std::mem::MaybeUninit;
use x86_core::{Core, Cpu, Seg, Trap, VecReg, X87Area, flags, reg};

/// Executes an instruction through its stub.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    let stub = engine::stub(core, insn)?;
    operand::check_available(core, stub.class)?;
    if stub.mmx || stub.class == Class::X87 {
        operand::check_pending(core)?;
    }
    let address = match stub.memory {
        Some(memory) => {
            let address = x86_core::effective_address(core.cpu, insn, u32::from(memory.operand));
            if memory.align > 1 {
                operand::check_alignment(core, address, u64::from(memory.align))?;
            }
            Some(address)
        }
        None => None,
    };
    if stub.class == Class::X87 {
        return x87::run(core, insn, &stub, address);
    }
    run(core, &stub, address)
}

/// A context of which only those parts that the stub uses will be set.
pub(crate) struct Frame(MaybeUninit<Context>);

impl Frame {
    pub(crate) fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// The context. Of its fields those may be read that were written before, here or by a stub.
    fn at(&mut self) -> *mut Context {
        self.0.as_mut_ptr()
    }

    /// Sets the memory operand's bytes.
    pub(crate) fn set_memory(&mut self, data: &[u8]) {
        let context = self.at();
        // SAFETY: in the context's own allocation; the slice is checked to be no longer than the field.
        unsafe {
            let memory = (&raw mut (*context).memory).cast::<u8>();
            std::ptr::copy_nonoverlapping(data.as_ptr(), memory, data.len().min(64));
        }
    }

    /// Reads the memory operand, of `size` (up to 64) bytes.
    pub(crate) fn read_memory(
        &mut self,
        core: &mut Core,
        (seg, offset): (Seg, u64),
        size: usize,
    ) -> Result<(), Trap> {
        match size {
            4 => self.set_memory(&core.read::<u32>(seg, offset)?.to_le_bytes()),
            8 => self.set_memory(&core.read::<u64>(seg, offset)?.to_le_bytes()),
            16 => {
                let value = core.read::<u128>(seg, offset)?;
                let context = self.at();
                // SAFETY: inside the context's own allocation; bytes need no alignment.
                let place = unsafe { &mut *(&raw mut (*context).memory).cast::<[u8; 16]>() };
                operand::set_wide(place, value);
            }
            _ => {
                let mut data = [0; 64];
                let data = &mut data[..size.min(64)];
                operand::read(core, (seg, offset), data)?;
                self.set_memory(data);
            }
        }
        Ok(())
    }

    /// The memory operand's bytes, after a stub wrote them.
    ///
    /// # Safety
    /// The first `len` (up to 64) bytes must have been written by a stub or [`Frame::set_memory`].
    pub(crate) unsafe fn memory(&self, len: usize) -> &[u8] {
        // SAFETY: in the context's own allocation; initialized as the caller says.
        unsafe {
            std::slice::from_raw_parts((&raw const (*self.0.as_ptr()).memory).cast::<u8>(), len.min(64))
        }
    }

    /// The state that an x87 stub loads; its MXCSR is set to Rust's own, as the stub loads that, too.
    pub(crate) fn set_x87(&mut self, area: &mut X87Area) {
        area.0[24..32].copy_from_slice(&u64::from(simd_exception::DEFAULT).to_le_bytes());
        let context = self.at();
        // SAFETY: writes inside the context's own allocation.
        unsafe {
            (*context).x87 = area;
            (*context).host_control = x87::INIT_CONTROL;
        }
    }

    /// Sets the MMX registers.
    pub(crate) fn set_mmx(&mut self, area: &X87Area) {
        let context = self.at();
        let top = 16 * x87::top(area);
        // SAFETY: inside the context's own allocation: 128 bytes, in two parts, from place 32. The first
        // register is physical register 0: rotated right by `top`.
        unsafe {
            let place = (&raw mut (*context).fx).cast::<u8>().add(32);
            let registers = area.0[32..160].as_ptr();
            std::ptr::copy_nonoverlapping(registers, place.add(top), 128 - top);
            std::ptr::copy_nonoverlapping(registers.add(128 - top), place, top);
        }
    }

    /// Bytes 0..160 of the x87 image.
    ///
    /// # Safety
    /// An x87 stub must have run.
    pub(crate) unsafe fn x87(&self) -> &[u8; 160] {
        // SAFETY: initialized as the caller says.
        unsafe { &*(&raw const (*self.0.as_ptr()).fx).cast() }
    }

    /// The MMX registers, one in each 16 bytes.
    ///
    /// # Safety
    /// They must have been set with [`Frame::set_mmx`].
    pub(crate) unsafe fn mmx(&self) -> &[u8; 128] {
        // SAFETY: initialized as the caller says; inside the context's own allocation.
        unsafe { &*(&raw const (*self.0.as_ptr()).fx).cast::<u8>().add(32).cast() }
    }

    /// Sets the flags that the stub starts with.
    pub(crate) fn set_flags(&mut self, value: u64) {
        // SAFETY: a write inside the context's own allocation.
        unsafe { (*self.at()).flags = value & flags::ARITHMETIC | flags::FIXED };
    }

    /// The flags that a stub left.
    ///
    /// # Safety
    /// They must have been set with [`Frame::set_flags`].
    pub(crate) unsafe fn flags(&self) -> u64 {
        // SAFETY: initialized as the caller says.
        unsafe { (*self.0.as_ptr()).flags }
    }

    /// Runs the stub.
    ///
    /// # Safety
    /// All that it loads must have been set.
    pub(crate) unsafe fn run(&mut self, stub: &Stub) {
        // SAFETY: as the caller says; the stub's code lives until this thread's engine is asked for another.
        unsafe { (stub.entry)(self.at()) };
    }
}

/// Writes back arithmetic flags.
pub(crate) fn commit_flags(cpu: &mut Cpu, value: u64) {
    cpu.rflags = cpu.rflags & !flags::ARITHMETIC | value & flags::ARITHMETIC;
}

/// Executes an MMX, SSE or AVX instruction.
fn run(core: &mut Core, stub: &Stub, address: Option<(Seg, u64)>) -> Result<(), Trap> {
    let mut frame = Frame::new();
    if let (Some(memory), Some(address)) = (stub.memory, address)
        && !memory.write
    {
        frame.read_memory(core, address, usize::from(memory.size))?;
    }
    if stub.mmx {
        frame.set_mmx(&core.cpu.x87);
    }
    if stub.flags {
        frame.set_flags(core.cpu.rflags);
    }
    if stub.mxcsr {
        if let (Some(memory), Some((seg, offset))) = (stub.memory, address)
            && memory.write
        {
            core.check_write(seg, offset, u64::from(memory.size))?;
        }
        if let Err(trap) = run_masked(core, stub, &mut frame) {
            if stub.mmx {
                // The x87 unit is in MMX mode even so.
                x87::switch_to_mmx(&mut core.cpu.x87);
            }
            return Err(trap);
        }
    } else {
        enter(core.cpu, stub, &mut frame, 0);
    }
    if let (Some(memory), Some(address)) = (stub.memory, address)
        && memory.write
    {
        // SAFETY: the instruction stores that many bytes.
        operand::write(core, address, unsafe { frame.memory(usize::from(memory.size)) })?;
    }
    commit(core.cpu, stub, &mut frame);
    Ok(())
}

/// Sets the registers and MXCSR, and runs the stub. The frame has memory, x87 image and flags.
fn enter(cpu: &mut Cpu, stub: &Stub, frame: &mut Frame, mxcsr: u32) {
    let context = frame.at();
    // SAFETY: `context` is the frame's allocation. All fields that the stub loads are set. The vector
    // registers are borrowed mutably through `cpu`, and the pointer to them is used by the stub alone.
    unsafe {
        (*context).vectors = cpu.vectors.as_mut_ptr();
        if let Some(register) = stub.operand {
            (*context).operand = cpu.regs[usize::from(register)];
        }
        if stub.implicit != 0 {
            (*context).rax = cpu.regs[reg::RAX];
            (*context).rcx = cpu.regs[reg::RCX];
            (*context).rdx = cpu.regs[reg::RDX];
        }
        (*context).mxcsr = mxcsr;
        (*context).host_mxcsr = simd_exception::DEFAULT;
        frame.run(stub);
    }
}

/// Runs a stub with all exceptions masked, and records in the guest's MXCSR what was raised. If an exception
/// is to be delivered, the vector registers, which the stub writes in place, are put back.
fn run_masked(core: &mut Core, stub: &Stub, frame: &mut Frame) -> Result<(), Trap> {
    let guest = core.cpu.mxcsr;
    let mut saved = [None; 2];
    let mut hidden = 0;
    if simd_exception::any_unmasked(guest) {
        saved = save_vectors(core.cpu, stub.vectors_written);
        if let Some(probe) = simd_exception::to_probe_underflow(guest) {
            enter(core.cpu, stub, frame, probe);
            // SAFETY: set by `enter`, and stored again by the stub.
            hidden = unsafe { (*frame.at()).mxcsr } & simd_exception::UNDERFLOW;
            restore_vectors(core.cpu, &saved);
        }
    }
    enter(core.cpu, stub, frame, simd_exception::to_run(guest));
    // SAFETY: as above.
    let raised = unsafe { (*frame.at()).mxcsr };
    simd_exception::raise(core, raised | hidden).inspect_err(|_| restore_vectors(core.cpu, &saved))
}

/// Stores the results other than memory and vector registers.
fn commit(cpu: &mut Cpu, stub: &Stub, frame: &mut Frame) {
    let context = frame.at();
    // SAFETY: each field was set before the stub ran if the stub says it uses it.
    unsafe {
        if let Some(register) = stub.operand {
            cpu.regs[usize::from(register)] = (*context).operand;
        }
        if stub.implicit != 0 {
            cpu.regs[reg::RAX] = (*context).rax;
            cpu.regs[reg::RCX] = (*context).rcx;
            cpu.regs[reg::RDX] = (*context).rdx;
        }
        if stub.flags {
            commit_flags(cpu, frame.flags());
        }
        if stub.mmx {
            x87::commit_mmx(&mut cpu.x87, frame.mmx(), stub.mmx_written);
        }
    }
    if stub.class == Class::Avx {
        for register in 0..16 {
            if stub.vectors_written >> register & 1 != 0 {
                cpu.vectors[register].0[32..].fill(0);
            }
        }
    }
}

/// Up to two vector registers: no instruction that can raise exceptions writes more.
type Saved = [Option<(usize, VecReg)>; 2];

fn save_vectors(cpu: &Cpu, written: u32) -> Saved {
    let mut numbers = (0..16).filter(|register| written >> register & 1 != 0);
    [(); 2].map(|()| numbers.next().map(|register| (register, cpu.vectors[register])))
}

fn restore_vectors(cpu: &mut Cpu, saved: &Saved) {
    for (register, value) in saved.iter().flatten() {
        cpu.vectors[*register] = *value;
    }
}
