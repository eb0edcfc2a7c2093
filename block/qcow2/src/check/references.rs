//! How often each cluster of the file is referenced, as counted from the metadata.

use std::collections::HashMap;
use std::ops::Range;

/// Clusters of one piece of the table: pieces that nothing references take no memory.
const PIECE: usize = 4096;
/// The bits of a cluster's byte that count.
const COUNT: u8 = 0x3f;
/// The count that stands for "look in the map".
const MANY: u8 = COUNT;

/// What a reference says of its cluster's refcount, by the flag COPIED (see section "L2 table entry").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nothing: references that have no such flag.
    Nothing,
    /// It is exactly 1.
    One,
    /// It is not 1.
    NotOne,
}

/// A table of reference counts, one byte for most clusters.
#[derive(Debug, Default)]
pub(super) struct References {
    pieces: Vec<Option<Box<[u8; PIECE]>>>,
    /// Counts of clusters that are referenced more than 62 times.
    many: HashMap<u64, u64>,
    clusters: u64,
}

impl References {
    /// Counts of zero for `clusters` clusters.
    pub(super) fn new(clusters: u64) -> Self {
        let mut references = Self::default();
        references.grow(clusters);
        references
    }

    /// How many clusters there are.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Makes the table at least `clusters` long.
    pub(super) fn grow(&mut self, clusters: u64) {
        self.clusters = self.clusters.max(clusters);
        let pieces = self.clusters.div_ceil(PIECE as u64) as usize;
        if pieces > self.pieces.len() {
            self.pieces.resize_with(pieces, || None);
        }
    }

    /// Adds `times` references to `cluster`, up to a count of `max`; returns how many did not fit.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, times: u64, claim: Claim, max: u64) -> u64 {
        if cluster >= self.clusters {
            self.grow(cluster + 1);
        }
        let index = cluster as usize;
        let piece = self.pieces[index / PIECE].get_or_insert_with(|| Box::new([0; PIECE]));
        let byte = &mut piece[index % PIECE];
        *byte |= match claim {
            Claim::Nothing => 0,
            Claim::One => 0x40,
            Claim::NotOne => 0x80,
        };
        let count = *byte & COUNT;
        let room = max - u64::from(count);
        if count < MANY && times < u64::from(MANY - count) && times <= room {
            *byte += times as u8;
            return 0;
        }
        self.add_many(cluster, times, max)
    }

    #[cold]
    fn add_many(&mut self, cluster: u64, times: u64, max: u64) -> u64 {
        let before = self.get(cluster);
        let after = before.saturating_add(times).min(max);
        self.set(cluster, after);
        times - (after - before)
    }

    fn byte(&self, cluster: u64) -> u8 {
        let piece = self.pieces.get((cluster / PIECE as u64) as usize).and_then(Option::as_ref);
        piece.map_or(0, |piece| piece[cluster as usize % PIECE])
    }

    /// How often `cluster` is referenced.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        match self.byte(cluster) & COUNT {
            MANY => self.many.get(&cluster).copied().unwrap_or(0),
            count => count.into(),
        }
    }

    /// Whether a refcount of `refcount` on disk belies what a reference to `cluster` claims.
    #[inline]
    pub(super) fn belies(&self, cluster: u64, refcount: u64) -> bool {
        self.byte(cluster) & if refcount == 1 { 0x80 } else { 0x40 } != 0
    }

    /// Sets the count of `cluster`.
    pub(super) fn set(&mut self, cluster: u64, count: u64) {
        self.grow(cluster + 1);
        let index = cluster as usize;
        let piece = self.pieces[index / PIECE].get_or_insert_with(|| Box::new([0; PIECE]));
        let byte = &mut piece[index % PIECE];
        let was_many = *byte & COUNT == MANY;
        *byte &= !COUNT;
        if count < MANY.into() {
            *byte |= count as u8;
            if was_many {
                self.many.remove(&cluster);
            }
        } else {
            *byte |= MANY;
            self.many.insert(cluster, count);
        }
    }

    /// Whether nothing in `range` is referenced, and nothing ever was: known without looking at each cluster.
    pub(super) fn is_untouched(&self, range: &Range<u64>) -> bool {
        let pieces = (range.start / PIECE as u64) as usize..(range.end.div_ceil(PIECE as u64)) as usize;
        pieces.into_iter().all(|piece| self.pieces.get(piece).is_none_or(Option::is_none))
    }

    /// The first of `count` clusters in a row, at or after `from`, that nothing references; the table may have to grow
    /// for them.
    pub(super) fn find_free(&self, from: u64, count: u64) -> u64 {
        let mut start = from;
        let mut cluster = from;
        while cluster < self.clusters && cluster - start < count {
            if self.get(cluster) != 0 {
                start = cluster + 1;
            }
            cluster += 1;
        }
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_are_those_of_a_map(
            steps in proptest::collection::vec((0u64..9000, 1u64..100, any::<bool>()), 1..300),
            max in prop_oneof![Just(1u64), Just(3), Just(255), Just(u64::MAX)],
        ) {
            let mut references = References::new(10);
            let mut model: HashMap<u64, u64> = HashMap::new();
            for (cluster, times, set) in steps {
                let count = model.entry(cluster / 37).or_default();
                if set {
                    *count = times.min(max);
                    references.set(cluster / 37, *count);
                } else {
                    let lost = times.saturating_sub(max - *count);
                    *count += times - lost;
                    prop_assert_eq!(references.add(cluster / 37, times, Claim::Nothing, max), lost);
                }
            }
            for cluster in 0..300 {
                prop_assert_eq!(references.get(cluster), model.get(&cluster).copied().unwrap_or(0));
            }
            let free = references.find_free(3, 4);
            prop_assert!((free..free + 4).all(|cluster| references.get(cluster) == 0));
        }
    }

    #[test]
    fn claims_are_remembered_beside_the_count() {
        let mut references = References::new(3);
        references.add(1, 1, Claim::One, u64::MAX);
        references.add(2, 1, Claim::NotOne, u64::MAX);
        assert!(!references.belies(0, 0) && !references.belies(0, 1));
        assert!(references.belies(1, 2) && references.belies(1, 0) && !references.belies(1, 1));
        assert!(references.belies(2, 1) && !references.belies(2, 2));
        references.set(1, 500);
        assert!(references.belies(1, 2) && references.get(1) == 500);
    }
}
