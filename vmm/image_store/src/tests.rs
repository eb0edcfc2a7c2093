use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::cpio::tests::entries;
use crate::deb::tests::package;
use crate::fetch::sha256;
use crate::initramfs::tests::busybox;
use crate::kernel_modules::tests::object;

/// A web server on the loopback interface.
struct Server {
    url: String,
    files: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    requests: Arc<AtomicUsize>,
    /// While more than zero, answers are cut off in the middle, and each counts one.
    cuts: Arc<AtomicUsize>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/debian", listener.local_addr().unwrap());
        let files: Arc<Mutex<HashMap<String, Vec<u8>>>> = Arc::default();
        let (requests, cuts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let server = Self { url, files: files.clone(), requests: requests.clone(), cuts: cuts.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                requests.fetch_add(1, Ordering::SeqCst);
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { continue };
                let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let path = first.split(' ').nth(1).unwrap().trim_start_matches("/debian/").to_owned();
                let from: usize = headers
                    .iter()
                    .find_map(|line| {
                        line.to_ascii_lowercase()
                            .strip_prefix("range: bytes=")?
                            .strip_suffix('-')?
                            .parse()
                            .ok()
                    })
                    .unwrap_or(0);
                let files = files.lock().unwrap();
                let answer = match files.get(&path) {
                    None => {
                        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
                    }
                    Some(file) => {
                        let (status, rest) = if from == 0 {
                            ("200 OK", &file[..])
                        } else {
                            ("206 Partial Content", &file[from..])
                        };
                        let mut answer = format!(
                            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nConnection: close\r\n\r\n",
                            rest.len(), file.len() - 1, file.len()
                        )
                        .into_bytes();
                        let cut = cuts
                            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                            .is_ok();
                        answer.extend_from_slice(if cut { &rest[..rest.len() / 2] } else { rest });
                        answer
                    }
                };
                let _ = stream.write_all(&answer);
            }
        });
        server
    }

    fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.files.lock().unwrap().insert(path.to_owned(), bytes.into());
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(self.files.lock().unwrap().get_mut(path).unwrap());
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Accepts what was "signed" with its word.
struct Password;
impl SignatureVerifier for Password {
    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        let expected = format!("seal:{}", sha256(data));
        if String::from_utf8_lossy(signature).contains(&expected) {
            Ok(())
        } else {
            Err(SignatureError::Bad("wrong seal".to_owned()))
        }
    }
}

fn seal(text: &str) -> String {
    format!(
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{text}\n-----BEGIN PGP SIGNATURE-----\n\nseal:{}\n-----END PGP SIGNATURE-----\n",
        sha256(text.as_bytes())
    )
}

const KERNEL_DEB: &str = "pool/main/l/kernel.deb";
const BUSYBOX_DEB: &str = "pool/main/b/busybox.deb";
const CLOUD_12: DebianImageName = DebianImageName { release: Release::Bookworm, flavour: Flavour::Cloud };

/// A mirror with a bookworm whose packages are small. Returns the index before it's signed.
fn mirror() -> (Server, String) {
    let server = Server::start();
    let modules = "lib/modules/6.1.0-50-cloud-amd64/kernel/drivers";
    let kernel = package(&[
        ("boot/vmlinuz-6.1.0-50-cloud-amd64", b"the kernel"),
        (&format!("{modules}/block/virtio_blk.ko"), &object("depends=virtio\nalias=virtio:d2v*\n")),
        (&format!("{modules}/virtio/virtio.ko"), &object("depends=\n")),
        (&format!("{modules}/gpu/drm/huge.ko"), &object("depends=\n")),
        (&format!("{modules}/net/tun.ko"), &object("depends=\n")),
    ]);
    let busybox = package(&[("bin/busybox", &busybox())]);
    let stanza = |name: &str, depends: &str, path: &str, bytes: &[u8]| {
        format!(
            "Package: {name}\nVersion: 6.1.176-1\nDepends: {depends}\nFilename: {path}\nSize: {}\nSHA256: {}\n\n",
            bytes.len(),
            sha256(bytes)
        )
    };
    let list = [
        stanza("unrelated", "", "pool/x", b""),
        stanza("linux-image-cloud-amd64", "linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)", "pool/meta", b""),
        stanza("linux-image-6.1.0-50-cloud-amd64", "kmod", KERNEL_DEB, &kernel),
        stanza("busybox-static", "", BUSYBOX_DEB, &busybox),
    ]
    .concat();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(list.as_bytes()).unwrap();
    let list = gzip.finish().unwrap();
    let release = format!(
        "Origin: Debian\nCodename: bookworm\nSHA256:\n {} {} main/binary-amd64/Packages.gz\n",
        sha256(&list),
        list.len()
    );
    server.put("dists/bookworm/main/binary-amd64/Packages.gz", list);
    server.put(KERNEL_DEB, kernel);
    server.put(BUSYBOX_DEB, busybox);
    server.put("dists/bookworm/InRelease", seal(&release));
    (server, release)
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a/b")).unwrap();
    (folder, store)
}

fn fetch(store: &Store, server: &Server) -> Result<DebianImage, StoreError> {
    store.fetch_debian(CLOUD_12, Some(&server.url), &Password, &NoProgress)
}

#[test]
fn an_image_is_made_and_used_again_offline() {
    let (server, _) = mirror();
    let (_folder, store) = store();
    let image = fetch(&store, &server).unwrap();
    assert_eq!(fs::read(&image.kernel).unwrap(), b"the kernel");
    assert_eq!(image.kernel_release, "6.1.0-50-cloud-amd64");
    assert_eq!(
        (image.version.as_str(), image.cmdline.as_str()),
        ("6.1.176-1", "console=ttyS0 no_timer_check")
    );
    let entries = entries(&fs::read(&image.initrd).unwrap());
    let root = "lib/modules/6.1.0-50-cloud-amd64";
    let dep = entries.iter().find(|entry| entry.0 == format!("{root}/modules.dep")).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&dep.2),
        "kernel/drivers/virtio/virtio.ko:\nkernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko\n"
    );
    assert!(!entries.iter().any(|entry| entry.0.contains("huge") || entry.0.contains("tun.ko")));
    // The modules of a host for VMs are apart, with the index files of all.
    let more = store.hypervisor_modules(CLOUD_12, Some("http://127.0.0.1:1/nothing"), &NoProgress).unwrap();
    let more = cpio::tests::entries(&fs::read(more).unwrap());
    let names: Vec<_> = more.iter().filter(|entry| entry.0.ends_with(".ko")).map(|entry| &entry.0).collect();
    assert_eq!(names, [&format!("{root}/kernel/drivers/net/tun.ko")]);
    let dep = more.iter().find(|entry| entry.0 == format!("{root}/modules.dep")).unwrap();
    assert!(String::from_utf8_lossy(&dep.2).contains("kernel/drivers/block/virtio_blk.ko"));

    let before = server.requests();
    let again = store.debian(CLOUD_12, Some("http://127.0.0.1:1/nothing"), &NoProgress).unwrap();
    assert_eq!((again, server.requests()), (image.clone(), before));
    // Fetching anew replaces it, and nothing unfinished stays.
    fs::write(&image.kernel, b"old").unwrap();
    assert_eq!(fs::read(fetch(&store, &server).unwrap().kernel).unwrap(), b"the kernel");
    let names: Vec<_> = fs::read_dir(store.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn an_image_of_another_recipe_or_a_damaged_one_is_made_anew() {
    let (server, _) = mirror();
    let (_folder, store) = store();
    let image = fetch(&store, &server).unwrap();
    let description = image.kernel.with_file_name(DESCRIPTION_FILE);
    let text = fs::read_to_string(&description).unwrap();
    fs::write(&description, text.replace("\"recipe\": 2", "\"recipe\": 0")).unwrap();
    assert_eq!(store.cached(CLOUD_12), None);
    fs::write(&description, &text).unwrap();
    assert!(store.cached(CLOUD_12).is_some());
    fs::remove_file(&image.initrd).unwrap();
    assert_eq!(store.cached(CLOUD_12), None);
}

#[test]
fn a_broken_transfer_is_taken_up_again() {
    let (server, _) = mirror();
    let (_folder, store) = store();
    server.cuts.store(3, Ordering::SeqCst);
    assert_eq!(fs::read(fetch(&store, &server).unwrap().kernel).unwrap(), b"the kernel");
    assert_eq!(server.cuts.load(Ordering::SeqCst), 0);
}

/// The error of a fetch from a changed mirror; the store must be as before.
fn error_after(change: impl FnOnce(&Server, &str)) -> StoreError {
    let (server, release) = mirror();
    let (_folder, store) = store();
    change(&server, &release);
    let error = fetch(&store, &server).unwrap_err();
    let left: Vec<_> = fs::read_dir(store.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != ".lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    error
}

#[test]
fn nothing_unverified_is_used() {
    let flipped = |path: &'static str| {
        error_after(|server, _| server.change(path, |bytes| *bytes.last_mut().unwrap() ^= 1))
    };
    for path in [KERNEL_DEB, BUSYBOX_DEB, "dists/bookworm/main/binary-amd64/Packages.gz"] {
        let error = flipped(path);
        assert!(matches!(&error, StoreError::Damaged { url, .. } if url.ends_with(path)), "{error}");
    }
    let cut = error_after(|server, _| server.change(KERNEL_DEB, |bytes| bytes.truncate(100)));
    assert!(matches!(cut, StoreError::Damaged { what: "its length", .. }), "{cut}");
    let longer = error_after(|server, _| server.change(KERNEL_DEB, |bytes| bytes.push(0)));
    assert!(matches!(longer, StoreError::TooLarge { .. }), "{longer}");
    let forged = error_after(|server, release| {
        server.put("dists/bookworm/InRelease", seal(release).replace("Origin: Debian", "Origin: debian"));
    });
    assert!(matches!(forged, StoreError::Signature { source: SignatureError::Bad(_), .. }), "{forged}");
    let unsigned = error_after(|server, release| server.put("dists/bookworm/InRelease", release));
    assert!(matches!(unsigned, StoreError::Signature { source: SignatureError::Malformed(_), .. }));
    let other = error_after(|server, release| {
        server.put("dists/bookworm/InRelease", seal(&release.replace("bookworm", "trixie")));
    });
    assert!(matches!(other, StoreError::Release { .. }), "{other}");
    let absent = error_after(|server, _| {
        server.files.lock().unwrap().remove(KERNEL_DEB);
    });
    assert!(matches!(absent, StoreError::NotThere { status: 404, .. }), "{absent}");
}

#[test]
fn a_mirror_that_cannot_be_reached_or_isnt_one_is_said() {
    let (_folder, store) = store();
    for url in ["ftp://x/debian", "/srv/debian", "http://", ""] {
        let error = store.fetch_debian(CLOUD_12, Some(url), &Password, &NoProgress).unwrap_err();
        assert!(matches!(error, StoreError::BadMirror { .. }), "{error}");
    }
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{closed}/debian");
    let error = store.fetch_debian(CLOUD_12, Some(&url), &Password, &NoProgress).unwrap_err();
    assert!(matches!(error, StoreError::Fetch { .. }), "{error}");
}

/// Runs gpg in a folder of its own.
fn gpg(home: &Path, arguments: &[&str]) -> bool {
    let mut command = Command::new("gpg");
    command.args(["--batch", "--quiet", "--homedir"]).arg(home).args(arguments).stdin(Stdio::null());
    command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn signatures_are_checked_with_a_keyring() {
    if Command::new("gpg").arg("--version").output().is_err()
        || Command::new("gpgv").arg("--version").output().is_err()
    {
        println!("gpg or gpgv isn't installed: only the error for a missing keyring is checked");
        let error = KeyringVerifier::new("/nonexistent").verify(b"", b"").unwrap_err();
        assert!(matches!(error, SignatureError::NoKeyring { .. }));
        return;
    }
    let home = tempfile::Builder::new().prefix("gpg").tempdir_in("/tmp").unwrap();
    fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let path = |name: &str| home.path().join(name);
    for user in ["archive@example.invalid", "stranger@example.invalid"] {
        assert!(gpg(
            home.path(),
            &["--passphrase", "", "--quick-generate-key", user, "rsa2048", "sign", "never"]
        ));
    }
    let export = |user: &str, file: &Path| {
        assert!(gpg(home.path(), &["--output", file.to_str().unwrap(), "--export", user]));
    };
    export("archive@", &path("keys"));
    let (server, release) = mirror();
    fs::write(path("Release"), &release).unwrap();
    let sign = |users: &[&str], output: &Path| {
        let mut arguments: Vec<&str> = users.iter().flat_map(|user| ["--local-user", user]).collect();
        let (output, release) = (output.to_owned(), path("Release"));
        arguments.extend(["--output", output.to_str().unwrap(), "--clearsign", release.to_str().unwrap()]);
        assert!(gpg(home.path(), &arguments));
        fs::read(&output).unwrap()
    };
    let verifier = KeyringVerifier::new(path("keys"));
    let (_folder, store) = store();
    let attempt = |signed: Vec<u8>| {
        server.put("dists/bookworm/InRelease", signed);
        store.fetch_debian(CLOUD_12, Some(&server.url), &verifier, &NoProgress)
    };

    let good = sign(&["archive@"], &path("good"));
    assert!(attempt(good.clone()).is_ok());
    // One known key among several is enough.
    assert!(attempt(sign(&["stranger@", "archive@"], &path("both"))).is_ok());
    let refused = |signed| match attempt(signed).unwrap_err() {
        StoreError::Signature { source: SignatureError::Bad(reason), .. } => reason,
        other => panic!("{other}"),
    };
    assert!(refused(sign(&["stranger@"], &path("strange"))).contains("none of the keys"));
    let changed = String::from_utf8(good).unwrap().replace("Origin: Debian", "Origin: Nebian");
    assert!(refused(changed.into_bytes()).contains("changed"));
    let _ = Command::new("gpgconf").arg("--homedir").arg(home.path()).args(["--kill", "all"]).status();
}
