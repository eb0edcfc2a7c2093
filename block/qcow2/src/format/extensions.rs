//! Header extensions: between the header and the backing file's name (section "Header extensions").

use super::bytes::{u32_at, u64_at};
use super::feature_name::{FEATURE_ENTRY, FeatureName};
use super::header::{Autoclear, CryptMethod};
use super::{Header, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, Qcow2Error};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// A backing format's name is shorter than this.
const BACKING_FORMAT_LIMIT: u32 = 16;

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Where the persistent bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsPointer {
    /// How many there are: at least one.
    pub count: u32,
    /// The bitmap directory.
    pub directory: Extent,
}

/// The header extensions of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// The external data file's name.
    pub data_file: Option<Vec<u8>>,
    /// The encryption header.
    pub crypto: Option<Extent>,
    /// Names of features.
    pub feature_names: Vec<FeatureName>,
    /// Where bitmaps are, if the autoclear bit says that this is consistent.
    pub bitmaps: Option<BitmapsPointer>,
    /// Whether there was a bitmaps extension that is not consistent: it goes with the next update of the header, and a
    /// warning is due.
    pub stale_bitmaps: bool,
    /// Extensions that are unknown, with their type: preserved.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

impl Extensions {
    /// Reads the extensions from the first cluster's bytes (or the file's, if it is shorter).
    ///
    /// # Errors
    /// The first extension that is invalid or ends past the backing name or the cluster.
    pub fn parse(header: &Header, cluster: &[u8]) -> Result<Self, Qcow2Error> {
        let mut extensions = Self::default();
        // A file may end within its first cluster; what is past its end reads as zero, and zero is the end.
        let end = usize::try_from(header.extensions_end()).unwrap_or(usize::MAX);
        let mut at = header.header_length as usize;
        while at < end && at + 8 <= cluster.len() {
            let (kind, length) = (u32_at(cluster, at), u32_at(cluster, at + 4));
            at += 8;
            if at > end || length as usize > end - at || length as usize > cluster.len() - at {
                return Err(Qcow2Error::ExtensionTooLarge);
            }
            if kind == END {
                break;
            }
            extensions.add(header, kind, &cluster[at..at + length as usize])?;
            at += (length as usize).next_multiple_of(8);
        }
        Ok(extensions)
    }

    /// Only the feature names, ignoring whatever else is wrong with the extensions: for the message about features
    /// that are unknown.
    pub fn feature_names_of(header: &Header, cluster: &[u8]) -> Vec<FeatureName> {
        let end = usize::try_from(header.extensions_end()).unwrap_or(usize::MAX).min(cluster.len());
        let mut at = header.header_length as usize;
        while at + 8 <= end {
            let (kind, length) = (u32_at(cluster, at), u32_at(cluster, at + 4) as usize);
            at += 8;
            if kind == END || length > end - at {
                break;
            }
            if kind == FEATURE_NAMES {
                return feature_names(&cluster[at..at + length]);
            }
            at += length.next_multiple_of(8);
        }
        Vec::new()
    }

    fn add(&mut self, header: &Header, kind: u32, data: &[u8]) -> Result<(), Qcow2Error> {
        let length = data.len() as u32;
        match kind {
            BACKING_FORMAT if length >= BACKING_FORMAT_LIMIT => {
                return Err(Qcow2Error::BackingFormatTooLong(length));
            }
            BACKING_FORMAT => self.backing_format = Some(data.to_vec()),
            FEATURE_NAMES => self.feature_names = feature_names(data),
            DATA_FILE => self.data_file = Some(data.to_vec()),
            CRYPTO => self.crypto = Some(crypto(header, data)?),
            BITMAPS => {
                if length != 24 {
                    return Err(Qcow2Error::BitmapsLength);
                }
                if header.autoclear.contains(Autoclear::BITMAPS) {
                    self.bitmaps = Some(bitmaps(header, data)?);
                } else {
                    self.stale_bitmaps = true;
                }
            }
            other => self.unknown.push((other, data.to_vec())),
        }
        Ok(())
    }

    /// The extensions' bytes, the end marker included.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut add = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            add(BACKING_FORMAT, format);
        }
        if let Some(name) = &self.data_file {
            add(DATA_FILE, name);
        }
        if let Some(crypto) = &self.crypto {
            add(CRYPTO, &[crypto.offset.to_be_bytes(), crypto.length.to_be_bytes()].concat());
        }
        if !self.feature_names.is_empty() {
            let mut table = Vec::new();
            for feature in &self.feature_names {
                table.extend([feature.kind, feature.bit]);
                table.extend(feature.name);
            }
            add(FEATURE_NAMES, &table);
        }
        if let Some(bitmaps) = &self.bitmaps {
            let mut data = Vec::new();
            data.extend(bitmaps.count.to_be_bytes());
            data.extend([0; 4]);
            data.extend(bitmaps.directory.length.to_be_bytes());
            data.extend(bitmaps.directory.offset.to_be_bytes());
            add(BITMAPS, &data);
        }
        for (kind, data) in &self.unknown {
            add(*kind, data);
        }
        add(END, &[]);
        bytes
    }
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    // The last entry may be without the zeros that pad it.
    let entries = data.chunks(FEATURE_ENTRY).filter(|entry| entry.len() > 2);
    entries
        .map(|entry| {
            let mut name = [0; FEATURE_ENTRY - 2];
            name[..entry.len() - 2].copy_from_slice(&entry[2..]);
            FeatureName { kind: entry[0], bit: entry[1], name }
        })
        .collect()
}

fn crypto(header: &Header, data: &[u8]) -> Result<Extent, Qcow2Error> {
    if header.crypt_method != CryptMethod::Luks {
        return Err(Qcow2Error::UnexpectedCryptoHeader);
    }
    if data.len() != 16 {
        return Err(Qcow2Error::CryptoHeaderLength(data.len() as u32));
    }
    let extent = Extent { offset: u64_at(data, 0), length: u64_at(data, 8) };
    let cluster_size = 1 << header.cluster_bits;
    if !extent.offset.is_multiple_of(cluster_size) || extent.offset.checked_add(extent.length).is_none() {
        return Err(Qcow2Error::CryptoHeaderOffset { offset: extent.offset, cluster_size });
    }
    Ok(extent)
}

fn bitmaps(header: &Header, data: &[u8]) -> Result<BitmapsPointer, Qcow2Error> {
    if u32_at(data, 4) != 0 {
        return Err(Qcow2Error::BitmapsReserved);
    }
    let pointer = BitmapsPointer {
        count: u32_at(data, 0),
        directory: Extent { length: u64_at(data, 8), offset: u64_at(data, 16) },
    };
    if pointer.count > MAX_BITMAPS {
        return Err(Qcow2Error::TooManyBitmaps(pointer.count));
    }
    if pointer.count == 0 {
        return Err(Qcow2Error::NoBitmaps);
    }
    if !pointer.directory.offset.is_multiple_of(1 << header.cluster_bits)
        || pointer.directory.offset > i64::MAX as u64 / 2
    {
        return Err(Qcow2Error::BitmapDirectoryOffset);
    }
    if pointer.directory.length > MAX_BITMAP_DIRECTORY_BYTES {
        return Err(Qcow2Error::BitmapDirectorySize(pointer.directory.length));
    }
    Ok(pointer)
}

/// The whole first cluster's used part: header, extensions and backing name, as they are written. Sets the header's
/// fields that say where the backing name is.
///
/// The feature names are left out where they would not leave room for the rest, and in clusters of 512 bytes, which
/// they would fill.
///
/// # Errors
/// [`Qcow2Error::HeaderFull`] if it is longer than a cluster, [`Qcow2Error::BackingNameTooLong`].
pub fn encode_first_cluster(
    header: &mut Header,
    extensions: &Extensions,
    backing_name: Option<&[u8]>,
) -> Result<Vec<u8>, Qcow2Error> {
    let cluster_size = 1usize << header.cluster_bits;
    let name = backing_name.unwrap_or_default();
    if name.len() > super::MAX_BACKING_NAME {
        return Err(Qcow2Error::BackingNameTooLong);
    }
    let length = header.encoded_length();
    let mut encoded = extensions.encode();
    if cluster_size == 512 || length + encoded.len() + name.len() > cluster_size {
        let without = Extensions { feature_names: Vec::new(), ..extensions.clone() };
        encoded = without.encode();
    }
    if length + encoded.len() + name.len() > cluster_size {
        return Err(Qcow2Error::HeaderFull);
    }
    header.header_length = length as u32;
    (header.backing_name_offset, header.backing_name_length) = match backing_name {
        Some(name) => ((length + encoded.len()) as u64, name.len() as u32),
        None => (0, 0),
    };
    let mut bytes = header.encode();
    bytes.extend(encoded);
    bytes.extend(name);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::header;
    use super::*;
    use proptest::prelude::*;

    fn extensions() -> impl Strategy<Value = Extensions> {
        let name = || proptest::option::of(proptest::collection::vec(any::<u8>(), 0..15));
        let unknown =
            proptest::collection::vec((1u32..1000, proptest::collection::vec(any::<u8>(), 0..20)), 0..3);
        (
            name(),
            name(),
            any::<bool>(),
            proptest::option::of((1u32..=65535, 0u64..1 << 20, 0u64..1 << 40)),
            unknown,
        )
            .prop_map(|(backing_format, data_file, names, bitmaps, unknown)| Extensions {
                backing_format,
                data_file,
                crypto: None,
                feature_names: if names { FeatureName::known() } else { Vec::new() },
                bitmaps: bitmaps.map(|(count, length, offset)| BitmapsPointer {
                    count,
                    directory: Extent { offset: offset << 21, length },
                }),
                stale_bitmaps: false,
                unknown,
            })
    }

    proptest! {
        #[test]
        fn the_first_cluster_survives_a_round_trip(
            header in header(), mut extensions in extensions(), name in proptest::option::of("[a-z/.]{1,60}"),
        ) {
            let mut header = Header { crypt_method: CryptMethod::None, ..header };
            if header.version == 2 {
                extensions.bitmaps = None;
            }
            header.autoclear.set(Autoclear::BITMAPS, extensions.bitmaps.is_some());
            let name = name.as_ref().map(|name| name.as_bytes());
            match encode_first_cluster(&mut header, &extensions, name) {
                Ok(mut bytes) => {
                    bytes.resize(1 << header.cluster_bits, 0);
                    let parsed = Header::parse(&bytes).unwrap();
                    prop_assert_eq!(&parsed, &header);
                    prop_assert_eq!(parsed.backing_name(&bytes).unwrap(), name);
                    let mut again = Extensions::parse(&parsed, &bytes).unwrap();
                    if again.feature_names.is_empty() {
                        again.feature_names = extensions.feature_names.clone();
                    }
                    prop_assert_eq!(again, extensions);
                }
                Err(error) => {
                    prop_assert_eq!(error, Qcow2Error::HeaderFull);
                    prop_assert_eq!(header.cluster_bits, 9);
                }
            }
        }

        #[test]
        fn any_extension_bytes_parse_or_are_refused(header in header(), bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut cluster = header.encode();
            cluster.extend(bytes);
            let _ = Extensions::parse(&header, &cluster);
            let _ = Extensions::feature_names_of(&header, &cluster);
        }
    }

    #[test]
    fn each_bound_has_its_error() {
        let mut header = Header::parse(&{
            let mut bytes = vec![0; 512];
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            (bytes[23], bytes[103], bytes[35], bytes[95]) = (16, 104, 2, 1);
            bytes
        })
        .unwrap();
        let parse = |header: &Header, kind: u32, length: u32, data: &[u8]| {
            let cluster =
                [&[0; 104][..], &kind.to_be_bytes()[..], &length.to_be_bytes(), data, &[0; 32]].concat();
            Extensions::parse(header, &cluster).unwrap_err()
        };
        let numbers = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>();
        assert_eq!(parse(&header, 1, 65536, &[]), Qcow2Error::ExtensionTooLarge);
        assert_eq!(parse(&header, BACKING_FORMAT, 16, &[0; 16]), Qcow2Error::BackingFormatTooLong(16));
        assert_eq!(parse(&header, BITMAPS, 16, &[0; 16]), Qcow2Error::BitmapsLength);
        assert_eq!(parse(&header, BITMAPS, 24, &[0; 24]), Qcow2Error::NoBitmaps);
        assert_eq!(parse(&header, BITMAPS, 24, &numbers(&[1, 0, 0])), Qcow2Error::BitmapsReserved);
        assert_eq!(
            parse(&header, BITMAPS, 24, &numbers(&[1 << 48, 0, 0])),
            Qcow2Error::TooManyBitmaps(65536)
        );
        assert_eq!(
            parse(&header, BITMAPS, 24, &numbers(&[1 << 32, 0, 512])),
            Qcow2Error::BitmapDirectoryOffset
        );
        let long = numbers(&[1 << 32, 1 << 30, 65536]);
        assert_eq!(parse(&header, BITMAPS, 24, &long), Qcow2Error::BitmapDirectorySize(1 << 30));
        assert_eq!(parse(&header, CRYPTO, 8, &[0; 8]), Qcow2Error::CryptoHeaderLength(8));
        let misplaced = Qcow2Error::CryptoHeaderOffset { offset: 512, cluster_size: 65536 };
        assert_eq!(parse(&header, CRYPTO, 16, &numbers(&[512, 0])), misplaced);
        header.crypt_method = CryptMethod::Aes;
        assert_eq!(parse(&header, CRYPTO, 16, &[0; 16]), Qcow2Error::UnexpectedCryptoHeader);
    }
}
