//! What a stub is called with, and finds its results in.

use crate::context::Context;
use crate::stub::Stub;
use crate::{operand, simd_exception, x87};
use std::mem::MaybeUninit;
use x86_core::{Core, Cpu, Seg, Trap, X87Area, flags};

/// A context of which only those parts that the stub uses will be set.
pub(crate) struct Frame(MaybeUninit<Context>);

impl Frame {
    pub(crate) fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// The context. Of its fields those may be read that were written before, here or by a stub.
    pub(crate) fn at(&mut self) -> *mut Context {
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

    /// A part of the memory operand, after a stub wrote it.
    ///
    /// # Safety
    /// These bytes, among the first 64, must have been written by a stub or [`Frame::set_memory`].
    pub(crate) unsafe fn memory_part(&self, at: usize, len: usize) -> &[u8] {
        let at = at.min(64);
        // SAFETY: in the context's own allocation; initialized as the caller says.
        unsafe {
            let memory = (&raw const (*self.0.as_ptr()).memory).cast::<u8>();
            std::slice::from_raw_parts(memory.add(at), len.min(64 - at))
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
