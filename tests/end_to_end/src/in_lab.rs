//! Tests whose body runs in the KVM lab: the test's own program is copied there and runs that one test again.

use crate::program;
use image_store::{DebianImageName, Flavour, Release};
use kvm_lab::{Lab, Outer};
use std::path::PathBuf;

/// Where the lab has the program of the tests.
const TESTS: &str = "/lab/tests";

/// Runs `body` in a lab that `prepare` has completed: `name` is the calling test's path. Fails if the body
/// does.
///
/// # Panics
/// If the lab cannot run, or the test failed in it.
pub fn in_lab(name: &str, prepare: impl FnOnce(Lab) -> Lab, body: impl FnOnce()) {
    if kvm_lab::is_inside() {
        body();
        return;
    }
    let (status, text) =
        prepare(lab_of_tests(&["--nocapture", "--exact", name])).output().expect("the lab runs");
    // Shown by the test's runner if it was asked to, or if the test fails.
    println!("{text}");
    assert!(text.contains("1 passed"), "{name} did not run in the lab");
    assert_eq!(status, 0, "{name} failed in the lab");
}

/// A lab that runs the calling test's program with `arguments`, with our program at hand.
///
/// # Panics
/// If the test's own program cannot be found.
pub fn lab_of_tests(arguments: &[&str]) -> Lab {
    let own = std::env::current_exe().expect("the test's own program has a path");
    let words = [TESTS, "--test-threads", "1"].iter().chain(arguments).copied();
    Lab::new(words).memory(2048).file(own, TESTS).file(program(), "/bin/vireo").env("VIREO", "/bin/vireo")
}

/// Gives a lab `cpus` processors, and has our own translator emulate them: with several, QEMU's emulation of SVM
/// loses its guests' guests, or the lab itself, to triple faults in every second run on a busy machine. Labs of one
/// processor stay with QEMU, so that our KVM code is not only tried on our own SVM.
pub fn with_cpus(lab: Lab, cpus: u32) -> Lab {
    lab.cpus(cpus).outer(Outer::Vireo(program()))
}

/// Adds Debian's cloud images to a lab.
pub fn with_images(lab: Lab, releases: &[Release]) -> Lab {
    let name = |release: &Release| DebianImageName { release: *release, flavour: Flavour::Cloud };
    releases.iter().map(name).fold(lab, Lab::image)
}

/// Adds programs of the host, found as its shell finds them.
///
/// # Panics
/// If one is not installed.
pub fn with_programs(lab: Lab, programs: &[&str]) -> Lab {
    programs.iter().fold(lab, |lab, name| {
        let path = kvm_lab::find_program(name).unwrap_or_else(|| panic!("{name} is not installed"));
        lab.file(path, PathBuf::from("/usr/local/bin").join(name))
    })
}
