//! Running stubs.

use crate::frame::{Frame, commit_flags};
use crate::stub::{Class, Stub};
use crate::{engine, operand, simd_exception, x87, x87_run};
use iced_x86::Instruction;
use x86_core::{Core, Cpu, Seg, Trap, VecReg, reg, width};

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
            if memory.align > 1 && memory.masking.is_none_or(|masking| masking.accesses(core)) {
                operand::check_alignment(core, address, u64::from(memory.align))?;
            }
            Some(address)
        }
        None => None,
    };
    if stub.class == Class::X87 {
        return x87_run::run(core, insn, &stub, address);
    }
    run(core, &stub, address)
}

/// Executes an MMX, SSE, AVX or AVX-512 instruction. (A fault of a store comes before any register is written: none
/// does both.)
fn run(core: &mut Core, stub: &Stub, address: Option<(Seg, u64)>) -> Result<(), Trap> {
    let mut frame = Frame::new();
    if let (Some(memory), Some(address)) = (stub.memory, address)
        && !memory.write
    {
        match memory.masking {
            Some(masking) => masking.read(core, address, &mut frame)?,
            None => frame.read_memory(core, address, usize::from(memory.size))?,
        }
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
            match memory.masking {
                Some(masking) => masking.check_write(core, (seg, offset))?,
                None => core.check_write(seg, offset, u64::from(memory.size))?,
            }
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
        match memory.masking {
            Some(masking) => masking.write(core, address, &frame)?,
            // SAFETY: the instruction stores that many bytes.
            None => operand::write(core, address, unsafe { frame.memory(usize::from(memory.size)) })?,
        }
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
        (*context).masks = cpu.opmask.as_mut_ptr();
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
    if stub.quiet {
        enter(core.cpu, stub, frame, simd_exception::to_run_quietly(guest));
        return Ok(());
    }
    let mut saved = ([None; 2], core.cpu.opmask);
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
    if stub.class == Class::Avx512 {
        cpu.vector_width = width::ZMM;
    }
    if stub.class == Class::Avx {
        cpu.vector_width = cpu.vector_width.max(width::YMM);
        for register in 0..16 {
            if stub.vectors_written >> register & 1 != 0 {
                cpu.vectors[register].0[32..].fill(0);
            }
        }
    }
}

/// Up to two vector registers: no instruction that can raise exceptions writes more. And all mask registers.
type Saved = ([Option<(usize, VecReg)>; 2], [u64; 8]);

fn save_vectors(cpu: &Cpu, written: u32) -> Saved {
    let mut numbers = (0..32).filter(|register| written >> register & 1 != 0);
    ([(); 2].map(|()| numbers.next().map(|register| (register, cpu.vectors[register]))), cpu.opmask)
}

fn restore_vectors(cpu: &mut Cpu, saved: &Saved) {
    for (register, value) in saved.0.iter().flatten() {
        cpu.vectors[*register] = *value;
    }
    cpu.opmask = saved.1;
}
