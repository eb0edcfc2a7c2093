//! Check and repair against qemu-img's, on images that qemu-img wrote and that were damaged at random.

use crate::oracle::{HostFile, Oracle};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use qcow2::check::{Fix, Report, check};
use qcow2::storage::at_once;
use std::path::Path;

fn ours(path: &Path, fix: Fix) -> (Result<Report, Report>, Vec<String>) {
    let mut lines = Vec::new();
    let result = at_once(check(&HostFile::open(path), fix, &mut |line| lines.push(line.to_owned())));
    (result.map_err(|failed| failed.report), lines)
}

#[test]
fn sound_images_are_found_sound() {
    let Some(oracle) = Oracle::find("sound_images_are_found_sound") else { return };
    for (name, options) in crate::oracle::SHAPES {
        let image = oracle.image(name, options);
        let (report, lines) = ours(&image, Fix::NONE);
        assert_eq!(lines, Vec::<String>::new(), "{name}");
        let theirs = oracle.check(&image, None);
        assert_eq!(report.unwrap(), theirs.report, "{name}");
    }
}

fn damage(rng: &mut TestRng, path: &Path) -> String {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let clusters = file.metadata().unwrap().len() >> 16;
    let mut log = String::new();
    for _ in 0..1 + rng.next_u32() % 3 {
        // The refcount table and a block, the active tables; and whatever else there is.
        let last = if rng.next_u32().is_multiple_of(4) { clusters - 1 } else { 4 };
        let cluster = 1 + u64::from(rng.next_u32()) % last;
        let at = (cluster << 16) + u64::from(rng.next_u32() % 40) * 8;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at).unwrap();
        let old = u64::from_be_bytes(word);
        let new = match rng.next_u32() % 8 {
            0 => 0,
            1 => old ^ 1 << 63,
            2 => old ^ 1 << (rng.next_u32() % 64),
            3 => u64::from(rng.next_u32() % 40) << 16 | 1 << 63,
            4 => old.wrapping_add(1 << 16),
            5 => old.wrapping_add(1 << 9),
            6 => old ^ 1 << (rng.next_u32() % 4 * 16),
            _ => u64::from(rng.next_u32()) << 32 | u64::from(rng.next_u32()),
        };
        file.write_all_at(&new.to_be_bytes(), at).unwrap();
        log += &format!("{at:#x}: {old:#x} -> {new:#x}\n");
    }
    log
}

#[test]
fn damage_is_found_as_qemu_img_finds_it_and_repaired() {
    let Some(oracle) = Oracle::find("damage_is_found_as_qemu_img_finds_it_and_repaired") else { return };
    let rounds = std::env::var("CHECK_ROUNDS").map_or(60, |rounds| rounds.parse().unwrap());
    let image = oracle.image("damage", "");
    oracle.populate(&image);
    let copy = oracle.path("damaged.qcow2");
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let (mut same, mut repaired) = (0, 0);
    for round in 0..rounds {
        std::fs::copy(&image, &copy).unwrap();
        let log = damage(&mut rng, &copy);
        let (report, mut lines) = ours(&copy, Fix::NONE);
        let mut theirs = oracle.check(&copy, None);
        theirs.lines.retain(|line| !line.starts_with("qemu-img: Check failed"));
        let show =
            || format!("round {round}\n{log}ours: {report:?}\n{}\ntheirs: {theirs:?}", lines.join("\n"));
        match report {
            // It gives up where a table is past 2^63.
            Ok(report) if theirs.failed => assert!(report.corruptions > 0, "{}", show()),
            Ok(report) => {
                assert_eq!(report.corruptions, theirs.report.corruptions, "{}", show());
                assert_eq!(report, theirs.report, "{}", show());
                lines.sort();
                theirs.lines.sort();
                assert_eq!(lines, theirs.lines, "round {round}\n{log}");
                same += 1;
            }
            Err(_) => assert!(theirs.failed, "{}", show()),
        }
        let leaky = ours(&copy, Fix::LEAKS).0;
        let before = oracle.check(&copy, None);
        if let (Ok(_), false) = (leaky, before.failed) {
            assert_eq!(before.report.leaks, 0, "round {round}\n{log}");
        }
        let (fixed, lines) = ours(&copy, Fix::ALL);
        let after = oracle.check(&copy, None);
        if fixed.is_ok_and(|report| report.corruptions == 0) {
            assert!(
                !after.failed && after.report.corruptions == 0 && after.report.leaks == 0,
                "round {round}\n{log}{}\n{after:?}",
                lines.join("\n")
            );
            repaired += 1;
        }
    }
    eprintln!("{rounds} damaged images: {same} found alike, {repaired} repaired");
    assert!(same > rounds / 2 && repaired > rounds / 4);
}
