//! Sets of interrupt vectors: IRR, ISR and TMR.

/// A set of the 256 vectors, laid out as the registers are: vector n at bit n % 32 of word n / 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Vectors(pub(crate) [u32; 8]);

impl Vectors {
    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
    }

    pub(crate) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    pub(crate) fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    pub(crate) fn set(&mut self, vector: u8, to: bool) {
        if to { self.insert(vector) } else { self.remove(vector) }
    }

    /// The highest vector, which is the one of highest priority.
    pub(crate) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word as u8) << 5 | (31 - self.0[word].leading_zeros()) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found() {
        let mut set = Vectors::default();
        assert_eq!(set.highest(), None);
        for vector in [0, 31, 32, 200, 255] {
            set.insert(vector);
            assert!(set.contains(vector));
            assert_eq!(set.highest(), Some(vector));
        }
        for expected in [255, 200, 32, 31, 0] {
            assert_eq!(set.highest(), Some(expected));
            set.set(expected, false);
        }
        assert_eq!(set, Vectors::default());
    }
}
