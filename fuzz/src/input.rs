//! Reading numbers and bytes from the fuzzer's input.

/// The fuzzer's bytes, taken from the front. When they have run out, everything reads as zero.
#[derive(Debug)]
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// Reads from `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    /// Whether all of it was read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `len` bytes, or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.bytes(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// A 16-bit number.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A 64-bit number.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A bit.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Whether one of `count` cases is to happen.
    pub fn one_in(&mut self, count: u8) -> bool {
        self.u8().is_multiple_of(count)
    }

    /// A number below `end`, or 0 if there is none.
    pub fn below(&mut self, end: u64) -> u64 {
        let number = match end {
            0..=0x100 => self.u8().into(),
            0x101..=0x1_0000 => self.u16().into(),
            _ => self.u64(),
        };
        number.checked_rem(end).unwrap_or(0)
    }

    /// One of `items`, of which there must be some.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// A number of any size, mostly small or at an edge.
    pub fn number(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => self.u64(),
            1 => self.u32().into(),
            2 | 3 => self.u16().into(),
            4 => 1u64.checked_shl(self.u8().into()).unwrap_or(0),
            5 => u64::MAX - u64::from(self.u8()),
            _ => self.u8().into(),
        }
    }

    /// Text: what of the next `len` bytes is UTF-8.
    pub fn text(&mut self, len: usize) -> String {
        String::from_utf8_lossy(self.bytes(len)).into_owned()
    }
}
