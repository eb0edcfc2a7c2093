//! Where the zeroes are in what was read.

/// Zeroes are looked for in sectors of so many bytes.
pub const SECTOR: usize = 512;

/// A run of bytes that are to be stored, or that are all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The bytes of the run.
    pub len: usize,
    /// Whether they are to be stored.
    pub data: bool,
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole blocks first: the compiler makes vector instructions of this.
    let mut blocks = bytes.chunks_exact(64);
    blocks.by_ref().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// The first run of `bytes`, which stand at `offset` of an image. Zeroes are a run of their own only if there are at
/// least `least` of them, and only up to multiples of `alignment` where data follow or precede: those parts would have
/// to be read and written again.
///
/// `least` is a positive multiple of [`SECTOR`], and `alignment` is such a power of two.
pub fn first_run(bytes: &[u8], offset: u64, least: usize, alignment: usize) -> Run {
    let least = least.min(bytes.len());
    let mut used = match aligned_run(bytes, offset, alignment) {
        run @ Run { data: false, .. } => return run,
        run => run.len,
    };
    let mut looked_at = used;
    while looked_at < bytes.len() {
        let run = aligned_run(&bytes[looked_at..], offset + looked_at as u64, alignment);
        looked_at += run.len;
        if run.data {
            used = looked_at;
        } else if run.len >= least {
            break;
        }
    }
    Run { len: used, data: true }
}

/// The first sectors that are all zero or all not, with their end moved to a multiple of `alignment`.
fn aligned_run(bytes: &[u8], offset: u64, alignment: usize) -> Run {
    let mut sectors = bytes.chunks(SECTOR);
    let zero = sectors.next().is_none_or(is_zero);
    let like = 1 + sectors.take_while(|sector| is_zero(sector) == zero).count();
    let mut len = (like * SECTOR).min(bytes.len());
    let mut data = !zero;
    if len == bytes.len() {
        return Run { len, data };
    }
    let over = ((offset + len as u64) % alignment as u64) as usize;
    if over > 0 {
        // Data follow in the same unit: it is written as a whole anyway.
        data |= len <= over;
        if data {
            len = (len + alignment - over).min(bytes.len());
        } else {
            len -= over;
        }
    }
    Run { len, data }
}

#[cfg(test)]
mod tests {
    use super::{Run, SECTOR, first_run, is_zero};
    use proptest::prelude::*;

    fn image(sectors: &str) -> Vec<u8> {
        sectors.bytes().flat_map(|kind| [u8::from(kind == b'd'); SECTOR]).collect()
    }

    fn runs(sectors: &str, least: usize, alignment: usize) -> Vec<(bool, usize)> {
        let bytes = image(sectors);
        let mut at = 0;
        let mut runs = Vec::new();
        while at < bytes.len() {
            let run = first_run(&bytes[at..], at as u64, least * SECTOR, alignment * SECTOR);
            runs.push((run.data, run.len / SECTOR));
            at += run.len;
        }
        runs
    }

    #[test]
    fn short_zeroes_are_data() {
        assert_eq!(runs("d.......d", 8, 1), [(true, 9)]);
        assert_eq!(runs("d........d", 8, 1), [(true, 1), (false, 8), (true, 1)]);
        assert_eq!(runs("........", 8, 1), [(false, 8)]);
        assert_eq!(runs("..d", 8, 1), [(false, 2), (true, 1)]);
    }

    #[test]
    fn runs_end_at_units() {
        assert_eq!(runs("..d.....", 4, 4), [(true, 4), (false, 4)]);
        assert_eq!(runs("d.......d.......", 4, 4), [(true, 4), (false, 4), (true, 4), (false, 4)]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(sectors in "[d.]{1,64}", least in 1_usize..16, alignment in 0_u32..4) {
            let bytes = image(&sectors);
            let mut at = 0;
            while at < bytes.len() {
                let run @ Run { len, data } =
                    first_run(&bytes[at..], at as u64, least * SECTOR, SECTOR << alignment);
                prop_assert!(len > 0, "{run:?}");
                prop_assert!(data || is_zero(&bytes[at..at + len]));
                at += len;
            }
            prop_assert_eq!(at, bytes.len());
        }
    }
}
