//! Writing bytes of code.

/// Writes machine code at its final place.
///
/// When the space ends nothing more is written and [`Emitter::overflowed`] says so; the caller then throws
/// the code away.
#[derive(Debug)]
pub struct Emitter {
    rw: *mut u8,
    rx: u64,
    len: usize,
    pos: usize,
    overflow: bool,
}

// SAFETY: the emitter is the only owner of its piece of the cache.
unsafe impl Send for Emitter {}

impl Emitter {
    /// An emitter over `len` bytes that are written at `rw` and executed at `rx`.
    ///
    /// # Safety
    /// The bytes at `rw` must be writable as long as the emitter is used, and nobody else's.
    pub(crate) unsafe fn new(rw: *mut u8, rx: u64, len: usize) -> Self {
        Self { rw, rx, len, pos: 0, overflow: false }
    }

    /// Where the next byte will execute.
    pub fn address(&self) -> u64 {
        self.rx + self.pos as u64
    }

    /// Whether what is at `address` was written by this emitter.
    pub fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.rx) < self.pos as u64
    }

    /// Bytes left.
    pub fn left(&self) -> usize {
        self.len - self.pos
    }

    /// Whether something did not fit.
    pub fn overflowed(&self) -> bool {
        self.overflow
    }

    /// Goes back to `address`, forgetting what was written from there on.
    pub fn rewind(&mut self, address: u64) {
        let pos = (address.wrapping_sub(self.rx)) as usize;
        assert!(pos <= self.pos, "rewinding forwards");
        self.pos = pos;
        self.overflow = false;
    }

    /// Writes one byte.
    #[inline]
    pub fn byte(&mut self, value: u8) {
        if self.pos < self.len {
            // SAFETY: `pos` is inside the piece.
            unsafe { self.rw.add(self.pos).write(value) };
            self.pos += 1;
        } else {
            self.overflow = true;
        }
    }

    /// Writes bytes.
    #[inline]
    pub fn bytes(&mut self, value: &[u8]) {
        if value.len() <= self.left() {
            // SAFETY: the bytes fit in the piece, which overlaps no Rust object.
            unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), self.rw.add(self.pos), value.len()) };
            self.pos += value.len();
        } else {
            self.overflow = true;
        }
    }

    /// Writes four bytes, little-endian.
    #[inline]
    pub fn dword(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Writes eight bytes, little-endian.
    #[inline]
    pub fn qword(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Fills the four-byte displacement at `field` (an address of this piece) so that it leads to `target`.
    pub fn link(&mut self, field: u64, target: u64) {
        let value = target.wrapping_sub(field + 4) as u32;
        self.set_dword(field, value);
    }

    /// Overwrites four bytes that were written before, at `field`.
    pub fn set_dword(&mut self, field: u64, value: u32) {
        let pos = field.wrapping_sub(self.rx) as usize;
        if pos.checked_add(4).is_some_and(|end| end <= self.pos) {
            // SAFETY: the field is inside the part that was written.
            unsafe { self.rw.add(pos).cast::<u32>().write_unaligned(value) };
        } else {
            // What did not fit has no fields.
            self.overflow = true;
        }
    }

    /// Pads with NOPs so that four bytes that begin `ahead` bytes from here do not cross an 8-byte boundary.
    pub fn align_patch(&mut self, ahead: usize) {
        let at = (self.address() as usize + ahead) & 7;
        if at > 4 {
            self.nop(8 - at);
        }
    }

    /// Pads with NOPs to a multiple of `to`, a power of two up to 16.
    pub fn align(&mut self, to: usize) {
        let over = self.address() as usize & (to - 1);
        if over != 0 {
            let mut left = to - over;
            while left > 0 {
                let step = left.min(8);
                self.nop(step);
                left -= step;
            }
        }
    }

    /// One NOP of `len` bytes, 0 to 8 (Intel SDM volume 2, NOP, recommended multi-byte sequences).
    pub fn nop(&mut self, len: usize) {
        const NOPS: [&[u8]; 9] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
            &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
        ];
        self.bytes(NOPS[len]);
    }
}
