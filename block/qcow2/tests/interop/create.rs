//! New images, looked at and used by qemu-img and qemu-io.

use crate::oracle::{HostFile, Oracle, run};
use block_graph::Options;
use qcow2::create::{CreateSpec, Encryption, create};
use qcow2::storage::at_once;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn spec(options: &str, size: &str) -> CreateSpec {
    let mut taken = Options::new();
    for (name, value) in options.split(',').filter_map(|pair| pair.split_once('=')) {
        taken.set(name, value);
    }
    taken.set("size", size);
    CreateSpec::take(&mut taken).unwrap()
}

/// What qemu-img says of an image, without what differs from file to file.
fn info(path: &Path) -> Value {
    let mut command = Command::new("qemu-img");
    let output = run(command.args(["info", "-f", "qcow2", "--output=json"]).arg(path));
    let mut info: Value = serde_json::from_slice(&output.stdout).unwrap();
    for field in ["filename", "actual-size", "children"] {
        info.as_object_mut().unwrap().remove(field);
    }
    if let Some(data) = info.pointer_mut("/format-specific/data") {
        data.as_object_mut().unwrap().remove("data-file");
    }
    info
}

#[test]
fn new_images_are_what_qemu_img_makes() {
    let Some(oracle) = Oracle::find("new_images_are_what_qemu_img_makes") else { return };
    let shapes = [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "compression_type=zstd",
        "extended_l2=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "extended_l2=on,preallocation=metadata",
        "cluster_size=512,preallocation=metadata",
        "cluster_size=2M,preallocation=falloc",
        "",
    ];
    let widths = [1, 2, 4, 8, 16, 32, 64];
    let clusters = ["512", "4k", "64k", "2M"];
    let sizes = ["0", "3M", "70000k"];
    let mut all: Vec<(String, &str)> =
        shapes.iter().flat_map(|shape| sizes.map(|size| (shape.to_string(), size))).collect();
    for (index, width) in widths.into_iter().enumerate() {
        // Each width with two cluster sizes.
        for cluster in [clusters[index % 4], clusters[(index + 1) % 4]] {
            all.push((format!("cluster_size={cluster},refcount_bits={width}"), "70000k"));
        }
    }
    for (index, (options, size)) in all.iter().enumerate() {
        let (ours, theirs) = (oracle.path(&format!("ours{index}")), oracle.path(&format!("theirs{index}")));
        at_once(create(&HostFile::open(&ours), None, &spec(options, size), None)).unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        run(command.arg(&theirs).arg(size));
        assert_eq!(info(&ours), info(&theirs), "{options} {size}");
        let (checked, expected) = (oracle.check(&ours, None), oracle.check(&theirs, None));
        assert_eq!(checked.lines, Vec::<String>::new(), "{options} {size}");
        assert_eq!(checked.report.corruptions + checked.report.leaks, 0, "{options} {size}");
        assert_eq!(checked.report.allocated_clusters, expected.report.allocated_clusters, "{options} {size}");
        if !options.contains("preallocation") {
            let length = |path: &Path| std::fs::metadata(path).unwrap().len();
            assert_eq!(checked.report.image_end_offset, expected.report.image_end_offset, "{options} {size}");
            if !options.contains("cluster_size=512") {
                assert_eq!(length(&ours), length(&theirs), "{options} {size}");
            }
        }
        if *size == "70000k" {
            let io = [
                "write -P 7 1M 300k",
                "read -P 7 1M 300k",
                "read -P 0 2M 30M",
                "read -P 0 0 1M",
                "write -z 60M 1M",
            ];
            let mut command = Command::new("qemu-io");
            io.iter().for_each(|one| {
                command.args(["-c", one]);
            });
            let output = run(command.args(["-f", "qcow2"]).arg(&ours));
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(!text.contains("verification failed"), "{options}: {text}");
            let after = oracle.check(&ours, None);
            assert_eq!(after.report.corruptions + after.report.leaks, 0, "{options}: {after:?}");
        }
    }
}

#[test]
fn files_beside_are_named() {
    let Some(oracle) = Oracle::find("files_beside_are_named") else { return };
    let backing = oracle.path("backing");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "raw"]).arg(&backing).arg("3M"));
    let ours = oracle.path("over");
    let options = format!("backing_file={},backing_fmt=raw", backing.display());
    at_once(create(&HostFile::open(&ours), None, &spec(&options, "3M"), None)).unwrap();
    let found = info(&ours);
    assert_eq!(found["backing-filename"], backing.to_str().unwrap());
    assert_eq!(found["backing-filename-format"], "raw");
    for raw in ["off", "on"] {
        let (ours, data) = (oracle.path(&format!("data-{raw}")), oracle.path(&format!("data-{raw}.raw")));
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        let made = at_once(create(
            &HostFile::open(&ours),
            Some(&HostFile::open(&data)),
            &spec(&options, "3M"),
            None,
        ));
        made.unwrap();
        let mut command = Command::new("qemu-io");
        command.args(["-c", "write -P 9 1M 64k", "-c", "read -P 0 2M 64k", "-f", "qcow2"]);
        run(command.arg(&ours));
        let checked = oracle.check(&ours, None);
        assert_eq!((checked.report.corruptions, checked.lines), (0, Vec::new()));
        let bytes = std::fs::read(&data).unwrap();
        assert_eq!(bytes[1 << 20..][..65536], [9; 65536]);
        assert_eq!(bytes.len(), 3 << 20, "a data file is as long as the disk");
    }
}

#[test]
fn a_name_that_does_not_fit_is_an_error_and_no_image() {
    let spec = spec(&format!("cluster_size=512,backing_file={}", "b".repeat(600)), "1M");
    let file = qcow2::storage::MemoryFile::default();
    let error = at_once(create(&file, None, &spec, None)).unwrap_err();
    assert!(error.to_string().starts_with("Could not assign backing file"), "{error}");
    assert!(file.into_bytes().iter().all(|byte| *byte == 0));
    let spec = CreateSpec { size: 1 << 50, cluster_bits: 9, ..CreateSpec::default() };
    let error = at_once(create(&qcow2::storage::MemoryFile::default(), None, &spec, None)).unwrap_err();
    assert_eq!(error.errno(), block_graph::Errno::TOO_LARGE);
}

#[test]
fn an_encryption_header_is_counted() {
    let Some(oracle) = Oracle::find("an_encryption_header_is_counted") else { return };
    let path = oracle.path("luks");
    let header = Encryption::Luks(vec![0x55; 2_068_480]);
    at_once(create(&HostFile::open(&path), None, &spec("", "3M"), Some(&header))).unwrap();
    let theirs = oracle.check(&path, None);
    assert_eq!((theirs.report.corruptions, theirs.report.leaks), (0, 0), "{theirs:?}");
}
