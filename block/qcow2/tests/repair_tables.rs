//! Repairs of images with damaged refcount tables.

use block_graph::Preallocation;
use qcow2::check::{Fix, check};
use qcow2::create::{CreateSpec, create};
use qcow2::storage::{MemoryFile, at_once};

fn image(cluster_bits: u32) -> Vec<u8> {
    let spec = CreateSpec {
        size: 192 << 10,
        version: 2,
        cluster_bits,
        refcount_order: 4,
        preallocation: Preallocation::Off,
        ..CreateSpec::default()
    };
    let file = MemoryFile::default();
    at_once(create(&file, None, &spec, None)).unwrap();
    file.into_bytes()
}

/// Checks that a repair which says that nothing is left has left nothing.
fn repair(damaged: Vec<u8>, what: &str) {
    let file = MemoryFile::new(damaged);
    let Ok(fixed) = at_once(check(&file, Fix::ALL, &mut |_| ())) else { return };
    if fixed.corruptions > 0 || fixed.check_errors > 0 {
        return;
    }
    let mut lines = Vec::new();
    let again = at_once(check(&file, Fix::NONE, &mut |line| lines.push(line.to_owned()))).unwrap();
    assert_eq!((again.corruptions, again.leaks, again.check_errors), (0, 0, 0), "{what}: {lines:?}");
}

fn flip(image: &mut [u8], word: usize, bit: usize) {
    image[word * 8 + 7 - bit / 8] ^= 1 << (bit % 8);
}

#[test]
fn a_repair_leaves_nothing_whichever_bit_is_damaged() {
    for cluster_bits in [9, 10] {
        let image = image(cluster_bits);
        for word in 0..image.len() / 8 {
            for bit in 0..64 {
                let mut damaged = image.clone();
                flip(&mut damaged, word, bit);
                repair(damaged, &format!("word {word} bit {bit}"));
            }
        }
    }
}

#[test]
fn nor_if_two_words_of_the_tables_are() {
    let image = image(9);
    let used: Vec<usize> =
        (0..image.len() / 8).filter(|word| image[word * 8..][..8] != [0; 8] || word % 64 < 4).collect();
    for &first in &used {
        for &second in &used {
            for bit in [9, 12, 16, 63] {
                let mut damaged = image.clone();
                flip(&mut damaged, first, bit);
                damaged[second * 8..][..8].fill(0);
                repair(damaged, &format!("word {first} bit {bit}, word {second} zero"));
                let mut damaged = image.clone();
                flip(&mut damaged, first, bit);
                flip(&mut damaged, second, 9);
                repair(damaged, &format!("word {first} bit {bit}, word {second} bit 9"));
            }
        }
    }
}
