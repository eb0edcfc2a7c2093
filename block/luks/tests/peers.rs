//! Volumes that qemu-img and cryptsetup wrote are opened here, and the other way round.

use luks::{
    Amendment, CipherAlgorithm, CipherMode, CipherSpec, HEADER_BYTES, HashAlgorithm, IvAlgorithm, KEY_SLOTS,
    KeyMaterials, MasterKey, NewVolume, Volume,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Whether a program is there; says so if it is not.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("SKIPPED: {program} is not installed, so this was not compared with it");
    }
    found
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn materials(file: &File, volume: &Volume) -> KeyMaterials {
    let mut materials = KeyMaterials::default();
    for slot in volume.active_slots() {
        let (offset, length) = volume.key_material(slot);
        let mut material = vec![0; length];
        file.read_exact_at(&mut material, offset).unwrap();
        materials[slot] = Some(material);
    }
    materials
}

fn open(path: &Path, password: &[u8]) -> (Volume, usize, MasterKey) {
    let file = File::open(path).unwrap();
    let mut head = [0; HEADER_BYTES];
    file.read_exact_at(&mut head, 0).unwrap();
    let volume = Volume::open(&head, false).unwrap();
    let (slot, key) = volume.unlock(password, &materials(&file, &volume)).unwrap();
    (volume, slot, key)
}

/// The plain text of a volume's first bytes.
fn read_plain(path: &Path, password: &[u8], length: usize) -> Vec<u8> {
    let (volume, _, key) = open(path, password);
    let mut data = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut data, volume.payload_offset()).unwrap();
    volume.sector_cipher(&key).unwrap().decrypt(0, &mut data);
    data
}

/// Makes a volume of 1 MiB with a pattern in it.
fn write_volume(path: &Path, new: &NewVolume, password: &[u8], plain: &[u8]) {
    let (volume, key, writes) = new.create(password).unwrap();
    let file = File::create(path).unwrap();
    for write in &writes {
        file.write_all_at(&write.bytes().unwrap(), write.offset).unwrap();
    }
    let mut data = plain.to_vec();
    volume.sector_cipher(&key).unwrap().encrypt(0, &mut data);
    file.write_all_at(&data, volume.payload_offset()).unwrap();
    file.set_len(volume.payload_offset() + (1 << 20)).unwrap();
}

fn specs() -> Vec<CipherSpec> {
    let spec = CipherSpec::default();
    let mut specs = vec![
        spec,
        CipherSpec { iv: IvAlgorithm::Plain, hash: HashAlgorithm::Sha1, ..spec },
        CipherSpec { mode: CipherMode::Ctr, hash: HashAlgorithm::Sha512, ..spec },
        CipherSpec {
            algorithm: CipherAlgorithm::Aes128,
            mode: CipherMode::Cbc,
            iv: IvAlgorithm::Essiv,
            iv_hash: Some(HashAlgorithm::Sha256),
            hash: HashAlgorithm::Ripemd160,
        },
        CipherSpec { mode: CipherMode::Ecb, hash: HashAlgorithm::Sha384, ..spec },
        CipherSpec { algorithm: CipherAlgorithm::Cast5, mode: CipherMode::Cbc, ..spec },
        CipherSpec { algorithm: CipherAlgorithm::Cast5, mode: CipherMode::Ctr, ..spec },
    ];
    for algorithm in [
        CipherAlgorithm::Aes192,
        CipherAlgorithm::Serpent128,
        CipherAlgorithm::Serpent192,
        CipherAlgorithm::Serpent256,
        CipherAlgorithm::Twofish128,
        CipherAlgorithm::Twofish192,
        CipherAlgorithm::Twofish256,
    ] {
        specs.push(CipherSpec { algorithm, ..spec });
    }
    specs
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index / 512 * 31 + index % 509) as u8).collect()
}

#[test]
fn volumes_of_qemu_img_open_here() {
    if !have("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (raw, image) = (folder.path().join("plain.raw"), folder.path().join("volume.luks"));
    let plain = pattern(1 << 20);
    fs::write(&raw, &plain).unwrap();
    // Every third: qemu-img measures for seconds how fast it is, and the other direction has them all.
    for spec in specs().into_iter().step_by(3) {
        let mut options = format!(
            "key-secret=s,iter-time=10,cipher-alg={},cipher-mode={},ivgen-alg={},hash-alg={}",
            spec.algorithm, spec.mode, spec.iv, spec.hash
        );
        if let Some(hash) = spec.iv_hash {
            options += &format!(",ivgen-hash-alg={hash}");
        }
        let paths = (raw.to_str().unwrap(), image.to_str().unwrap());
        let secret = "secret,id=s,data=a secret";
        run(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "luks", "--object", secret, "-o", &options, paths.0, paths.1],
        );
        assert_eq!(open(&image, b"a secret").0.spec(), &spec);
        assert!(read_plain(&image, b"a secret", plain.len()) == plain, "{spec:?}");
    }
}

#[test]
fn volumes_made_here_open_in_qemu_img() {
    if !have("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (raw, image) = (folder.path().join("plain.raw"), folder.path().join("volume.luks"));
    let plain = pattern(1 << 20);
    for spec in specs() {
        let new = NewVolume { spec, iter_time: Duration::from_millis(10), detached: false };
        write_volume(&image, &new, b"a secret", &plain);
        let source = format!("driver=luks,key-secret=s,file.filename={}", image.display());
        let secret = "secret,id=s,data=a secret";
        let to = raw.to_str().unwrap();
        run("qemu-img", &["convert", "--object", secret, "--image-opts", &source, "-O", "raw", to]);
        assert!(fs::read(&raw).unwrap() == plain, "{spec:?}");
    }
}

/// Runs cryptsetup on a volume with a password on its standard input; whether it succeeded.
fn cryptsetup(arguments: &[&str], password: &str) -> bool {
    use std::io::Write;
    let mut child = Command::new("cryptsetup")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    child.wait().unwrap().success()
}

#[test]
fn volumes_made_here_open_in_cryptsetup() {
    if !have("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("volume.luks");
    let path = image.to_str().unwrap();
    let default = CipherSpec::default();
    // The second is one whose key material is no whole number of sectors.
    for spec in [
        default,
        CipherSpec { algorithm: CipherAlgorithm::Aes192, mode: CipherMode::Cbc, ..default },
        CipherSpec { iv: IvAlgorithm::Plain, hash: HashAlgorithm::Sha512, ..default },
    ] {
        let new = NewVolume { spec, iter_time: Duration::from_millis(10), detached: false };
        write_volume(&image, &new, b"a secret", &pattern(512));
        assert!(cryptsetup(&["open", "--test-passphrase", "--key-file", "-", path], "a secret"), "{spec:?}");
        assert!(!cryptsetup(&["open", "--test-passphrase", "--key-file", "-", path], "another"), "{spec:?}");
    }
}

#[test]
fn volumes_of_cryptsetup_open_here() {
    if !have("cryptsetup") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("volume.luks");
    let path = image.to_str().unwrap();
    for (cipher, bits, hash) in
        [("aes-xts-plain64", "512", "sha256"), ("aes-cbc-essiv:sha256", "192", "sha1")]
    {
        fs::write(&image, []).unwrap();
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        let format = ["luksFormat", "--type", "luks1", "-q", "--iter-time", "10", "--key-file", "-"];
        let arguments = [&format[..], &["-c", cipher, "-s", bits, "-h", hash, path]].concat();
        assert!(cryptsetup(&arguments, "a secret"), "{cipher}");
        assert_eq!(open(&image, b"a secret").1, 0);
    }
}

#[test]
fn keys_are_added_and_erased() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("volume.luks");
    let quick = Duration::from_millis(1);
    let new = NewVolume { iter_time: quick, ..NewVolume::default() };
    let plain = pattern(4096);
    write_volume(&image, &new, b"first", &plain);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let amend = |amendment: Amendment| -> Result<(), String> {
        let mut head = [0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0).unwrap();
        let volume = Volume::open(&head, false).unwrap();
        let planned = amendment.plan(&volume, &materials(&file, &volume));
        let (changed, writes) = planned.map_err(|error| error.to_string())?;
        for write in &writes {
            file.write_all_at(&write.bytes().unwrap(), write.offset).unwrap();
        }
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(Volume::open(&head, false).unwrap().header(), changed.header());
        Ok(())
    };
    let add = Amendment {
        active: true,
        new_secret: Some(b"second"),
        opened_with: b"first",
        iter_time: Some(quick),
        ..Amendment::default()
    };
    amend(add.clone()).unwrap();
    assert_eq!(open(&image, b"second").1, 1);
    amend(Amendment { keyslot: Some(7), new_secret: Some(b"third"), ..add.clone() }).unwrap();
    assert_eq!(open(&image, b"third").1, 7);
    assert!(read_plain(&image, b"third", plain.len()) == plain);
    let refused = |amendment| amend(amendment).unwrap_err();
    assert_eq!(
        refused(Amendment { keyslot: Some(7), ..add.clone() }),
        "Refusing to overwrite active keyslot 7 - please erase it first"
    );
    assert_eq!(
        refused(Amendment { keyslot: Some(8), ..add.clone() }),
        "Invalid keyslot 8 specified, must be between 0 and 7"
    );
    assert_eq!(
        refused(Amendment { secret: Some(b"unknown"), ..add.clone() }),
        "Invalid password, cannot unlock any keyslot"
    );
    assert_eq!(
        refused(Amendment { new_secret: None, ..add.clone() }),
        "'new-secret' is required to activate a keyslot"
    );
    let erase = Amendment { opened_with: b"first", ..Amendment::default() };
    assert_eq!(
        refused(Amendment { iter_time: Some(quick), ..erase.clone() }),
        "'iter-time' must not be given when erasing keyslots"
    );
    assert_eq!(
        refused(Amendment { keyslot: Some(3), ..erase.clone() }),
        "Given keyslot 3 is already erased (inactive) "
    );
    assert_eq!(
        refused(Amendment { keyslot: Some(1), old_secret: Some(b"first"), ..erase.clone() }),
        "Given keyslot 1 doesn't contain the given old password for erase operation"
    );
    let (volume, _, _) = open(&image, b"second");
    let (offset, length) = volume.key_material(1);
    let mut before = vec![0; length];
    file.read_exact_at(&mut before, offset).unwrap();
    amend(Amendment { old_secret: Some(b"second"), ..erase.clone() }).unwrap();
    let mut after = vec![0; length];
    file.read_exact_at(&mut after, offset).unwrap();
    let same = before.iter().zip(&after).filter(|(before, after)| before == after).count();
    assert!(same < length / 64, "{same} of {length} bytes of the erased key are there still");
    amend(Amendment { keyslot: Some(0), ..erase.clone() }).unwrap();
    assert!(
        refused(Amendment { keyslot: Some(7), ..erase.clone() }).starts_with("Attempt to erase the only")
    );
    assert!(
        refused(Amendment { old_secret: Some(b"third"), ..erase.clone() })
            .starts_with("All the active keyslots match")
    );
    assert_eq!(
        refused(Amendment { old_secret: Some(b"second"), ..erase }),
        "No keyslots match given (old) password for erase operation"
    );
    assert!(read_plain(&image, b"third", plain.len()) == plain);
    for index in 0..KEY_SLOTS - 1 {
        let password = [b'0' + index as u8];
        let more = Amendment { new_secret: Some(&password), opened_with: b"third", ..add.clone() };
        amend(more).unwrap();
    }
    assert_eq!(
        refused(Amendment { opened_with: b"third", ..add }),
        "Can't add a keyslot - all keyslots are in use"
    );
    if have("qemu-img") {
        let info = run("qemu-img", &["info", "-f", "luks", image.to_str().unwrap()]);
        let info = String::from_utf8(info.stdout).unwrap();
        assert_eq!(info.matches("active: true").count(), KEY_SLOTS, "{info}");
    }
}
