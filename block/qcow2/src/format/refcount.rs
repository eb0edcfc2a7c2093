//! Refcounts in a refcount block: 1 to 64 bits each (section "Host cluster management").

use super::Qcow2Error;

/// The refcount number `index` of a block; `order` is the base-2 logarithm of a refcount's bits, 0 to 6.
///
/// # Errors
/// [`Qcow2Error::RefcountBlockCut`] if the block ends before it.
#[inline]
pub fn get(block: &[u8], order: u32, index: u64) -> Result<u64, Qcow2Error> {
    let index = usize::try_from(index).map_err(|_| Qcow2Error::RefcountBlockCut)?;
    if order < 3 {
        let (byte, shift, mask) = place(order, index);
        let byte = block.get(byte).ok_or(Qcow2Error::RefcountBlockCut)?;
        return Ok(u64::from(byte >> shift & mask));
    }
    let width = 1usize << (order - 3);
    let start = index.checked_mul(width).ok_or(Qcow2Error::RefcountBlockCut)?;
    let bytes = block.get(start..).and_then(|rest| rest.get(..width)).ok_or(Qcow2Error::RefcountBlockCut)?;
    let mut wide = [0; 8];
    wide[8 - width..].copy_from_slice(bytes);
    Ok(u64::from_be_bytes(wide))
}

/// Sets the refcount number `index` of a block.
///
/// # Errors
/// [`Qcow2Error::RefcountBlockCut`]; [`Qcow2Error::RefcountOverflow`] if the value has too many bits.
#[inline]
pub fn set(block: &mut [u8], order: u32, index: u64, value: u64) -> Result<(), Qcow2Error> {
    let bits = 1u32 << order;
    if bits < 64 && value >> bits != 0 {
        return Err(Qcow2Error::RefcountOverflow { value, bits });
    }
    let index = usize::try_from(index).map_err(|_| Qcow2Error::RefcountBlockCut)?;
    if order < 3 {
        let (byte, shift, mask) = place(order, index);
        let byte = block.get_mut(byte).ok_or(Qcow2Error::RefcountBlockCut)?;
        *byte = *byte & !(mask << shift) | (value as u8) << shift;
        return Ok(());
    }
    let width = 1usize << (order - 3);
    let start = index.checked_mul(width).ok_or(Qcow2Error::RefcountBlockCut)?;
    let bytes =
        block.get_mut(start..).and_then(|rest| rest.get_mut(..width)).ok_or(Qcow2Error::RefcountBlockCut)?;
    bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    Ok(())
}

/// The byte, shift within it and mask of a refcount of less than 8 bits: the first one has the least significant bits.
fn place(order: u32, index: usize) -> (usize, u32, u8) {
    let per_byte = 8 >> order;
    let shift = (index % per_byte) as u32 * (1 << order);
    (index / per_byte, shift, u8::MAX >> (8 - (1 << order)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_block_keeps_what_was_set(order in 0u32..=6, sets in proptest::collection::vec((0u64..64, any::<u64>()), 0..50)) {
            let mut block = vec![0; 64 * 8];
            let mut model = [0; 64];
            for (index, value) in sets {
                let value = value & (u64::MAX >> (64 - (1 << order)));
                set(&mut block, order, index, value).unwrap();
                model[index as usize] = value;
            }
            for (index, value) in model.iter().enumerate() {
                prop_assert_eq!(get(&block, order, index as u64).unwrap(), *value);
            }
        }
    }

    #[test]
    fn sub_byte_counts_start_at_the_least_significant_bits() {
        let mut block = [0; 2];
        set(&mut block, 1, 1, 3).unwrap();
        assert_eq!(block, [0b1100, 0]);
        set(&mut block, 0, 8, 1).unwrap();
        assert_eq!(block, [0b1100, 1]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut block = [0; 2];
        assert_eq!(set(&mut block, 2, 0, 16), Err(Qcow2Error::RefcountOverflow { value: 16, bits: 4 }));
        assert_eq!(set(&mut block, 4, 1, 0), Err(Qcow2Error::RefcountBlockCut));
        assert_eq!(get(&block, 6, 0), Err(Qcow2Error::RefcountBlockCut));
        assert_eq!(get(&block, 0, 16), Err(Qcow2Error::RefcountBlockCut));
        assert_eq!(get(&block, 6, u64::MAX), Err(Qcow2Error::RefcountBlockCut));
    }
}
