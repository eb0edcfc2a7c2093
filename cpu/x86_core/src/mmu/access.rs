//! Accesses to `segment:offset`: the segment's checks, then the linear address.

use super::Target;
use super::tlb::PAGE_MASK;
use crate::{Core, Scalar, Seg, Segment, Trap, reg, vector};

/// The exception of a reference that the segment does not allow.
fn segment_fault(seg: Seg) -> Trap {
    Trap::with_error(if seg == Seg::Ss { vector::SS } else { vector::GP }, 0)
}

impl Core<'_> {
    /// The linear address of `seg:offset`, checked for an access of `len` bytes (Intel SDM volume 3, 5.3 and
    /// 5.5).
    ///
    /// # Errors
    /// #GP or #SS.
    #[inline]
    pub fn linear(&self, seg: Seg, offset: u64, len: u64, write: bool) -> Result<u64, Trap> {
        let segment = &self.cpu.segments[seg as usize];
        if self.cpu.long64 {
            let va =
                if matches!(seg, Seg::Fs | Seg::Gs) { offset.wrapping_add(segment.base) } else { offset };
            let last = va.wrapping_add(len.saturating_sub(1));
            return if self.cpu.is_canonical(va) && self.cpu.is_canonical(last) {
                Ok(va)
            } else {
                Err(segment_fault(seg))
            };
        }
        let offset = offset & 0xffff_ffff;
        if self.segment_allows(segment, offset, len, write) {
            Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(segment_fault(seg))
        }
    }

    /// Whether type and limit of `segment` allow the access, outside 64-bit mode.
    pub(crate) fn segment_allows(&self, segment: &Segment, offset: u64, len: u64, write: bool) -> bool {
        let limit = u64::from(segment.limit);
        let last = offset + len.saturating_sub(1);
        if !self.protected() {
            return last <= limit;
        }
        let kind = segment.attributes;
        if kind & Segment::UNUSABLE != 0 {
            return false;
        }
        let code = kind & 8 != 0;
        // The bit says "writable" of data and "readable" of code.
        let granted = kind & 2 != 0;
        let allowed = if code { !write && granted } else { !write || granted };
        if !allowed {
            return false;
        }
        if !code && kind & 4 != 0 {
            let top = if kind & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        }
    }

    fn check_alignment(&self, va: u64, bytes: usize) -> Result<(), Trap> {
        // 16-byte operands have rules of their own, which their instructions check.
        let natural = bytes.min(8) as u64;
        if self.cpu.align_check && va & (natural - 1) != 0 {
            return Err(Trap::with_error(vector::AC, 0));
        }
        Ok(())
    }

    /// Reads an operand.
    ///
    /// # Errors
    /// The fault that the access has.
    #[inline(always)]
    pub fn read<T: Scalar>(&mut self, seg: Seg, offset: u64) -> Result<T, Trap> {
        let va = self.flat(seg, offset);
        if let Some(host) = self.cpu.read_hit(self.cpu.fast_bank, va, T::BYTES) {
            // SAFETY: the TLB says that this is guest memory.
            return Ok(unsafe { T::load(host) });
        }
        self.read_slow(seg, offset)
    }

    /// Writes an operand.
    ///
    /// # Errors
    /// The fault that the access has.
    #[inline(always)]
    pub fn write<T: Scalar>(&mut self, seg: Seg, offset: u64, value: T) -> Result<(), Trap> {
        let va = self.flat(seg, offset);
        if let Some(host) = self.cpu.write_hit(self.cpu.fast_bank, va, T::BYTES) {
            // SAFETY: the TLB says that this is guest memory, and may be written directly.
            unsafe { T::store(host, value) };
            return Ok(());
        }
        self.write_slow(seg, offset, value)
    }

    /// The linear address if this is 64-bit mode; the fast bank is unusable if not.
    #[inline(always)]
    fn flat(&self, seg: Seg, offset: u64) -> u64 {
        if matches!(seg, Seg::Fs | Seg::Gs) {
            offset.wrapping_add(self.cpu.segments[seg as usize].base)
        } else {
            offset
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Scalar>(&mut self, seg: Seg, offset: u64) -> Result<T, Trap> {
        let va = self.linear(seg, offset, T::BYTES as u64, false)?;
        self.check_alignment(va, T::BYTES)?;
        let value = self.read_linear(va, usize::from(self.cpu.data_bank))?;
        self.watch(va, T::BYTES, false);
        Ok(value)
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Scalar>(&mut self, seg: Seg, offset: u64, value: T) -> Result<(), Trap> {
        let va = self.linear(seg, offset, T::BYTES as u64, true)?;
        self.check_alignment(va, T::BYTES)?;
        self.write_linear(va, value, usize::from(self.cpu.data_bank))?;
        self.watch(va, T::BYTES, true);
        Ok(())
    }

    /// Reads up to 4096 bytes.
    ///
    /// # Errors
    /// The fault that the access has; `data` is then as before.
    pub fn read_bytes(&mut self, seg: Seg, offset: u64, data: &mut [u8]) -> Result<(), Trap> {
        let va = self.linear(seg, offset, data.len() as u64, false)?;
        self.read_linear_bytes(va, data, usize::from(self.cpu.data_bank))?;
        self.watch(va, data.len(), false);
        Ok(())
    }

    /// Writes up to 4096 bytes.
    ///
    /// # Errors
    /// The fault that the access has; nothing was written then.
    pub fn write_bytes(&mut self, seg: Seg, offset: u64, data: &[u8]) -> Result<(), Trap> {
        let va = self.linear(seg, offset, data.len() as u64, true)?;
        self.write_linear_bytes(va, data, usize::from(self.cpu.data_bank))?;
        self.watch(va, data.len(), true);
        Ok(())
    }

    /// Checks what a store of `len` bytes would need, without storing.
    ///
    /// # Errors
    /// The fault that the store would have.
    pub fn check_write(&mut self, seg: Seg, offset: u64, len: u64) -> Result<(), Trap> {
        let va = self.linear(seg, offset, len, true)?;
        self.check_linear_write(va, len, usize::from(self.cpu.data_bank))
    }

    /// Reads an operand, and replaces it by what `f` makes of it, or leaves it as it is if that is `None`
    /// (rights to write are needed all the same). Returns the old value. With `locked`, atomic for other
    /// processors as far as [`Cpu::lock_needed`](crate::Cpu::lock_needed) says so; `f` may be called several
    /// times. Accesses that the host cannot lock are atomic against each other only.
    ///
    /// # Errors
    /// The fault that the access has.
    #[inline]
    pub fn update<T: Scalar>(
        &mut self,
        seg: Seg,
        offset: u64,
        locked: bool,
        mut f: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Trap> {
        if !(locked && self.cpu.lock_needed) {
            let va = self.flat(seg, offset);
            if let Some(host) = self.cpu.write_hit(self.cpu.fast_bank, va, T::BYTES) {
                // SAFETY: the TLB says that this is guest memory, and may be written directly.
                let old = unsafe { T::load(host) };
                if let Some(new) = f(old) {
                    // SAFETY: as above.
                    unsafe { T::store(host, new) };
                }
                return Ok(old);
            }
        }
        let va = self.linear(seg, offset, T::BYTES as u64, true)?;
        self.check_alignment(va, T::BYTES)?;
        let old = self.update_linear(va, usize::from(self.cpu.data_bank), locked, f)?;
        self.watch(va, T::BYTES, true);
        Ok(old)
    }

    /// Where `seg:offset` is in this process, and how many of the `len` bytes from there are in the same
    /// page. `None` if they must be accessed one by one: MMIO, stores that must be tracked, a segment limit
    /// or a data breakpoint in the way.
    ///
    /// # Errors
    /// The fault that an access to the first byte has.
    pub fn host_span(
        &mut self,
        seg: Seg,
        offset: u64,
        len: u64,
        write: bool,
    ) -> Result<Option<(*mut u8, usize)>, Trap> {
        let va = self.linear(seg, offset, 1, write)?;
        let span = len.min(0x1000 - (va & !PAGE_MASK));
        let checked = self.cpu.align_check || self.cpu.watched || self.cpu.is_page_watched(va);
        if checked || self.linear(seg, offset, span, write).is_err() {
            return Ok(None);
        }
        Ok(match self.translate(va, write, usize::from(self.cpu.data_bank))? {
            Target::Ram { host, tracked, .. } if !(write && tracked) => Some((host, span as usize)),
            _ => None,
        })
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    ///
    /// # Errors
    /// The fault that the store has; RSP is then as before.
    #[inline]
    pub fn push(&mut self, size: u8, value: u64) -> Result<(), Trap> {
        let mask = self.stack_mask();
        let old = self.cpu.regs[reg::RSP];
        let offset = old.wrapping_sub(u64::from(size)) & mask;
        match size {
            8 => self.write(Seg::Ss, offset, value)?,
            4 => self.write(Seg::Ss, offset, value as u32)?,
            _ => self.write(Seg::Ss, offset, value as u16)?,
        }
        self.set_stack_pointer(offset, mask);
        Ok(())
    }

    /// Pops `size` bytes (2, 4 or 8).
    ///
    /// # Errors
    /// The fault that the load has; RSP is then as before.
    #[inline]
    pub fn pop(&mut self, size: u8) -> Result<u64, Trap> {
        let mask = self.stack_mask();
        let offset = self.cpu.regs[reg::RSP] & mask;
        let value = match size {
            8 => self.read::<u64>(Seg::Ss, offset)?,
            4 => u64::from(self.read::<u32>(Seg::Ss, offset)?),
            _ => u64::from(self.read::<u16>(Seg::Ss, offset)?),
        };
        self.set_stack_pointer(offset.wrapping_add(u64::from(size)), mask);
        Ok(value)
    }

    /// The bits of RSP that address the stack now.
    #[inline(always)]
    pub fn stack_mask(&self) -> u64 {
        if self.cpu.long64 {
            u64::MAX
        } else if self.cpu.segments[Seg::Ss as usize].attributes & Segment::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the bits of RSP that `mask` says; 32-bit values are zero-extended.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, value: u64, mask: u64) {
        let keep = if mask == 0xffff { !mask } else { 0 };
        self.cpu.regs[reg::RSP] = self.cpu.regs[reg::RSP] & keep | value & mask;
    }
}
