//! How large an image would be.

use crate::create::{CreateSpec, EncryptionOptions};
use crate::format::bitmap::BitmapEntry;
use crate::format::{Geometry, MAX_L1_BYTES};
use block_graph::{Errno, Error, MeasureReport, NodeRef, Options, Preallocation, Result};

/// Bytes of a refcount table and blocks for `clusters` clusters, which count themselves, too.
fn refcount_bytes(geometry: &Geometry, clusters: u64) -> u64 {
    let per_block = geometry.refcount_block_entries();
    let per_table_cluster = geometry.cluster_size() / 8;
    let (mut table, mut blocks) = (0, 0);
    loop {
        let new_blocks = (clusters + table + blocks).div_ceil(per_block);
        let new_table = new_blocks.div_ceil(per_table_cluster);
        if (new_blocks, new_table) == (blocks, table) {
            return (blocks + table) << geometry.cluster_bits;
        }
        (blocks, table) = (new_blocks, new_table);
    }
}

/// Bytes of an image of a disk of `size` bytes with all clusters allocated.
fn fully_allocated(geometry: &Geometry, size: u64) -> u64 {
    let cluster = geometry.cluster_size();
    let data = size.next_multiple_of(cluster);
    let l2_tables = (data / cluster).div_ceil(geometry.l2_entries());
    let l1_clusters = geometry.clusters(l2_tables * 8);
    let metadata = cluster + (l2_tables + l1_clusters) * cluster;
    data + metadata + refcount_bytes(geometry, (metadata + data) / cluster)
}

/// The bytes of `source` that an image with clusters of `cluster` bytes must hold.
async fn data_bytes(source: &NodeRef, cluster: u64) -> Result<u64> {
    let len = source.len();
    let (mut offset, mut required) = (0, 0);
    while offset < len {
        let status = block_graph::status_above(source, None, offset, len - offset, true).await;
        let (status, _) = status.map_err(|error| error.context("Unable to get block status"))?;
        let mut step = status.len.max(1);
        if !status.zero && status.data && status.allocated {
            // To the end of its last cluster, and from the beginning of its first one.
            step = (offset + step).next_multiple_of(cluster) - offset;
            required += offset % cluster + step;
        }
        offset += step;
    }
    Ok(required)
}

/// Bytes for bitmaps, given by granularity and length of name, over a disk of `size` bytes.
fn bitmap_bytes(cluster: u64, size: u64, bitmaps: impl IntoIterator<Item = (u64, usize)>) -> u64 {
    let (mut bytes, mut directory) = (0, 0);
    for (granularity, name) in bitmaps {
        let bits = granularity.trailing_zeros() as u8;
        let clusters = BitmapEntry::data_bytes(bits, size).div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + name as u64).next_multiple_of(8);
    }
    bytes + directory.next_multiple_of(cluster)
}

/// How large an image with these options would be: what [`crate::create::CREATE_OPTIONS`] has is taken out of `options`.
///
/// # Errors
/// If the options make no sense, and those of [`measure`].
pub async fn measure_options(options: &mut Options, source: Option<&NodeRef>) -> Result<MeasureReport> {
    // Nothing is made, so what a new image needs beside need not be there.
    options.take("backing_fmt");
    let spec = CreateSpec::take(options)?;
    let encryption = EncryptionOptions::take(options)?;
    let crypto_bytes = encryption.map_or(Ok(0), |encryption| encryption.header_bytes())?;
    measure(&spec, crypto_bytes, source).await
}

/// How large an image as `spec` says would be, with the data of `source` if there is one. `crypto_bytes` is the length
/// of the encryption header. `size` in `spec` is not looked at if there is a source.
///
/// # Errors
/// If the disk is larger than its tables can be, or the source's status cannot be had.
pub async fn measure(
    spec: &CreateSpec,
    crypto_bytes: u64,
    source: Option<&NodeRef>,
) -> Result<MeasureReport> {
    let geometry = Geometry { data_file: false, ..spec.geometry() };
    let cluster = geometry.cluster_size();
    let too_large =
        || Error::new(Errno::INVALID, "The image size is too large (try using a larger cluster size)");
    let rounded = |size: u64| size.checked_next_multiple_of(cluster).ok_or_else(too_large);
    let mut size = rounded(spec.size)?;
    if let Some(source) = source {
        size = rounded(source.len())?;
    }
    if (size / cluster).div_ceil(geometry.l2_entries()) > MAX_L1_BYTES / 8 {
        return Err(too_large());
    }
    let mut required = match source {
        // Nothing is known of what a backing file shares with the source.
        Some(_) if spec.backing_file.is_some() => size,
        Some(source) => data_bytes(source, cluster).await?,
        None => 0,
    };
    if matches!(spec.preallocation, Preallocation::Full | Preallocation::Falloc) {
        required = size;
    }
    let fully_allocated = crypto_bytes.next_multiple_of(cluster) + fully_allocated(&geometry, size);
    let image = source.filter(|source| spec.version >= 3 && source.driver().format_name() == "qcow2");
    let bitmaps = image.and_then(|source| source.driver().image()).filter(|image| has_version_3(*image));
    let bitmaps = bitmaps.map(|image| {
        let all = image.bitmaps();
        let source_len = source.map_or(0, |source| source.len());
        bitmap_bytes(cluster, source_len, all.iter().map(|bitmap| (bitmap.granularity, bitmap.name.len())))
    });
    Ok(MeasureReport { required: fully_allocated - size + required, fully_allocated, bitmaps })
}

/// Whether an image can have persistent bitmaps.
fn has_version_3(image: &dyn block_graph::Image) -> bool {
    image
        .info()
        .specific
        .is_some_and(|(_, fields)| fields.get("compat").is_some_and(|compat| compat == "1.1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_qemu_img_measures() {
        // `qemu-img measure -O qcow2 --size SIZE -o cluster_size=...,refcount_bits=...`.
        let cases = [
            (1 << 30, 16, 4, 1_074_135_040),
            (1 << 30, 9, 4, 1_095_127_040),
            (1 << 40, 16, 6, 1_099_780_325_376),
            (3 << 30, 12, 0, 3_227_639_808),
            (7 << 40, 21, 4, 7_696_625_434_624),
            (1024, 16, 4, 393_216),
            (0, 16, 4, 196_608),
        ];
        for (size, cluster_bits, refcount_order, expected) in cases {
            let geometry = Geometry { cluster_bits, refcount_order, extended_l2: false, data_file: false };
            assert_eq!(fully_allocated(&geometry, size), expected, "{size} {cluster_bits} {refcount_order}");
        }
        let extended = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true, data_file: false };
        assert_eq!(fully_allocated(&extended, 5 << 30), 5_370_413_056);
    }

    #[test]
    fn bitmaps_take_data_table_and_directory() {
        assert_eq!(bitmap_bytes(65536, 1 << 30, []), 0);
        assert_eq!(bitmap_bytes(65536, 1 << 30, [(65536, 2)]), 3 * 65536);
        assert_eq!(bitmap_bytes(65536, 1 << 40, [(512, 2), (65536, 40)]), 65536 * (4096 + 1 + 32 + 1 + 1));
    }
}
