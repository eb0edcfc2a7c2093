//! Debian packages: an ar archive with a compressed tar archive in it (deb(5)).

use std::io::{self, Read};

use flate2::read::GzDecoder;
use lzma_rust2::XzReader;

/// The most that all of a package's files may have unpacked.
const UNPACKED_LIMIT: u64 = 4 << 30;
/// The most that the decompressor may use, in KiB; Debian's packages need 64 MiB.
const XZ_MEMORY_KIB: u32 = 192 << 10;
const AR_MAGIC: &[u8] = b"!<arch>\n";
const AR_HEADER: usize = 60;

/// Decompresses by the ending of the file's name.
pub(crate) fn decompressor<'a>(ending: &str, data: &'a [u8]) -> io::Result<Box<dyn Read + 'a>> {
    match ending {
        ".xz" => Ok(Box::new(XzReader::new_mem_limit(data, true, XZ_MEMORY_KIB))),
        ".gz" => Ok(Box::new(GzDecoder::new(data))),
        "" => Ok(Box::new(data)),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, format!("compressed as {ending}, not xz or gz"))),
    }
}

/// Decompresses all of `data`, which must give `limit` bytes at most.
pub(crate) fn decompress(ending: &str, data: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    decompressor(ending, data)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

fn too_large(limit: u64) -> io::Error {
    io::Error::other(format!("unpacked it has more than {limit} bytes"))
}

/// The member of an ar archive whose name starts with `prefix`, and the rest of its name.
fn member<'a>(archive: &'a [u8], prefix: &str) -> io::Result<(String, &'a [u8])> {
    let damaged = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut rest = archive.strip_prefix(AR_MAGIC).ok_or(damaged("it isn't an ar archive"))?;
    while !rest.is_empty() {
        let header = rest.get(..AR_HEADER).ok_or(damaged("it ends within an ar header"))?;
        if &header[58..] != b"`\n" {
            return Err(damaged("an ar header is damaged"));
        }
        let text =
            |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim_end().to_owned();
        let size: usize = text(48..58).parse().map_err(|_| damaged("an ar header has no size"))?;
        let data = rest[AR_HEADER..].get(..size).ok_or(damaged("it ends within an ar member"))?;
        let name = text(0..16);
        if let Some(ending) = name.trim_end_matches('/').strip_prefix(prefix) {
            return Ok((ending.to_owned(), data));
        }
        // Members start at even offsets.
        rest = rest.get(AR_HEADER + size + size % 2..).unwrap_or_default();
    }
    Err(damaged("it has no data archive"))
}

/// Goes through a package's files. `wanted` gets each regular file's path, without the leading `./`, and
/// says how many bytes it may have, or `None` to skip it; `found` gets path and contents of those wanted.
pub(crate) fn unpack(
    package: &[u8],
    wanted: impl Fn(&str) -> Option<u64>,
    mut found: impl FnMut(String, Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let (ending, data) = member(package, "data.tar")?;
    let mut archive = tar::Archive::new(decompressor(&ending, data)?.take(UNPACKED_LIMIT));
    for entry in archive.entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./").to_owned();
        let Some(limit) = wanted(&path) else { continue };
        let size = entry.size();
        if size > limit {
            return Err(io::Error::other(format!("{path} has {size} bytes, more than {limit}")));
        }
        let mut bytes = Vec::new();
        entry.take(limit).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ends within {path}")));
        }
        found(path, bytes)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// A package with these files.
    pub(crate) fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("./{path}"), *bytes).unwrap();
        }
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar.into_inner().unwrap()).unwrap();
        let data = gzip.finish().unwrap();
        let mut deb = AR_MAGIC.to_vec();
        for (name, bytes) in [("debian-binary", b"2.0\n".as_slice()), ("x", b"odd"), ("data.tar.gz", &data)] {
            deb.extend(
                format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, bytes.len()).bytes(),
            );
            deb.extend_from_slice(bytes);
            if bytes.len() % 2 == 1 {
                deb.push(b'\n');
            }
        }
        deb
    }

    fn files(deb: &[u8], limit: u64) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut all = Vec::new();
        unpack(
            deb,
            |path| path.starts_with("a/").then_some(limit),
            |path, bytes| {
                all.push((path, bytes));
                Ok(())
            },
        )?;
        Ok(all)
    }

    #[test]
    fn wanted_files_are_found() {
        let deb = package(&[("a/x", b"one"), ("b/y", b"two"), ("a/z", b"")]);
        assert_eq!(files(&deb, 3).unwrap(), [("a/x".into(), b"one".to_vec()), ("a/z".into(), vec![])]);
        assert!(files(&deb, 2).unwrap_err().to_string().contains("a/x has 3 bytes"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let deb = package(&[("a/x", &[7; 3000]), ("a/y", &[8; 3000])]);
        // The padding at the end of a compressed archive may be missing, its files may not.
        for length in 0..deb.len() - 40 {
            assert!(files(&deb[..length], 5000).is_err(), "{length} of {}", deb.len());
        }
    }

    #[test]
    fn a_bomb_is_stopped() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(&vec![0; 1 << 20]).unwrap();
        let bomb = gzip.finish().unwrap();
        assert!(decompress(".gz", &bomb, 1000).is_err());
        assert_eq!(decompress(".gz", &bomb, 1 << 20).unwrap().len(), 1 << 20);
        assert_eq!(decompress(".zst", &bomb, 5).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damage_never_panics(changes in proptest::collection::vec((0usize..400, any::<u8>()), 1..6)) {
            let mut deb = package(&[("a/x", b"some bytes"), ("a/y", b"more")]);
            for (at, byte) in changes {
                let at = at % deb.len();
                deb[at] = byte;
            }
            if let Ok(found) = files(&deb, 100) {
                prop_assert!(found.len() <= 2);
            }
        }
    }
}
