//! The lab as such: KVM is there, what a command prints and its status come out, and what goes wrong is told.

use kvm_lab::{Lab, LabError};
use std::time::Duration;

#[test]
fn a_command_runs_where_kvm_is_real() {
    let script = "test -c /dev/kvm && test -c /dev/vhost-net && grep -qw svm /proc/cpuinfo || exit 1
        cat /lab/given; echo \"it's $WORD in $PWD\"; exit 7";
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("given");
    std::fs::write(&given, "a file\n").unwrap();
    let lab = Lab::new(["sh", "-c", script]).memory(512).env("WORD", "a 'word'").file(&given, "/lab/given");
    let (status, text) = lab.output().unwrap();
    assert_eq!(status, 7, "{text}");
    assert!(text.contains("a file\nit's a 'word' in /tmp\n"), "{text}");
}

#[test]
fn a_lab_that_does_not_end_is_ended() {
    let lab = Lab::new(["sleep", "1000"]).memory(512).limit(Duration::from_secs(1));
    let error = lab.output().unwrap_err();
    assert!(matches!(error, LabError::TimeLimit { seconds: 1, .. }), "{error}");
}

#[test]
fn what_is_not_there_is_named() {
    assert!(matches!(Lab::new([""; 0]).output(), Err(LabError::NoCommand)));
    let error = Lab::new(["true"]).file("/nonexistent/program", "/program").output().unwrap_err();
    assert!(error.to_string().contains("/nonexistent/program"), "{error}");
    let error = Lab::new(["true"]).file("/bin/true", "program").output().unwrap_err();
    assert!(error.to_string().contains("absolute"), "{error}");
}
