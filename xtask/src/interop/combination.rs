//! The combinations of the format's parameters.

use std::fmt;

/// Where an image's clusters of data are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// In the image.
    Inside,
    /// In a file of their own.
    File,
    /// In one that is a raw image too.
    RawFile,
}

/// What lies beneath an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    None,
    Raw,
    Qcow2,
}

/// The parameters of an image.
#[derive(Debug, Clone)]
pub(crate) struct Combination {
    pub(crate) version: u32,
    pub(crate) cluster: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) compression: &'static str,
    pub(crate) extended: bool,
    pub(crate) encrypted: bool,
    pub(crate) data: Data,
    pub(crate) backing: Backing,
}

const CLUSTERS: [u32; 7] = [512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20];
const REFCOUNT_BITS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// All that the format allows, in a fixed order.
pub(crate) fn all() -> impl Iterator<Item = Combination> {
    let shapes = [2, 3].into_iter().flat_map(|version| {
        CLUSTERS.into_iter().flat_map(move |cluster| {
            REFCOUNT_BITS.into_iter().map(move |refcount_bits| (version, cluster, refcount_bits))
        })
    });
    let features = || {
        ["zlib", "zstd"].into_iter().flat_map(|compression| {
            [false, true].into_iter().flat_map(move |extended| {
                [false, true].into_iter().map(move |encrypted| (compression, extended, encrypted))
            })
        })
    };
    let files = || {
        [Data::Inside, Data::File, Data::RawFile].into_iter().flat_map(|data| {
            [Backing::None, Backing::Raw, Backing::Qcow2].into_iter().map(move |backing| (data, backing))
        })
    };
    shapes
        .flat_map(move |shape| features().map(move |features| (shape, features)))
        .flat_map(move |(shape, features)| files().map(move |files| (shape, features, files)))
        .map(|(shape, features, (data, backing))| {
            let (version, cluster, refcount_bits) = shape;
            let (compression, extended, encrypted) = features;
            Combination { version, cluster, refcount_bits, compression, extended, encrypted, data, backing }
        })
        .filter(Combination::is_possible)
}

impl Combination {
    fn is_possible(&self) -> bool {
        let old = self.version == 2;
        !(old && (self.refcount_bits != 16 || self.compression != "zlib" || self.data != Data::Inside)
            || self.extended && (old || self.cluster < 16 << 10)
            // Sectors that were never written are zeros in the file, and no zeros when decrypted.
            || self.data == Data::RawFile && (self.backing != Backing::None || self.encrypted))
    }

    /// How many clusters may be compressed: none of other files, and no encrypted ones; and as they share clusters of
    /// the file, no more than these can be counted while a snapshot is taken back.
    pub(crate) fn compressed_clusters(&self) -> usize {
        if self.data != Data::Inside || self.encrypted {
            return 0;
        }
        match self.refcount_bits {
            1 | 2 => 1,
            4 => 4,
            _ => 20,
        }
    }

    /// Whether there may be snapshots: clusters of other files are not shared, and one bit does not count to two.
    pub(crate) fn has_snapshots(&self) -> bool {
        self.data == Data::Inside && self.refcount_bits > 1
    }

    /// The options of `create`, but for names of files and secrets.
    pub(crate) fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut text = format!("compat={compat},cluster_size={}", self.cluster);
        if self.version > 2 {
            let extended = if self.extended { "on" } else { "off" };
            let (bits, compression) = (self.refcount_bits, self.compression);
            text.push_str(&format!(
                ",refcount_bits={bits},compression_type={compression},extended_l2={extended}"
            ));
        }
        text
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.options())?;
        if self.encrypted {
            f.write_str(",luks")?;
        }
        match self.data {
            Data::Inside => {}
            Data::File => f.write_str(",data-file")?,
            Data::RawFile => f.write_str(",raw-data-file")?,
        }
        match self.backing {
            Backing::None => Ok(()),
            Backing::Raw => f.write_str(",raw-backing"),
            Backing::Qcow2 => f.write_str(",qcow2-backing"),
        }
    }
}
