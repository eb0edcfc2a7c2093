//! Reading an image's tables when it is opened.

use super::allocator::Allocator;
use super::cache::SliceCache;
use super::crypt::Crypt;
use super::metadata_map::{Metadata, MetadataMap};
use super::state::{Backing, FirstCluster, L1Table, Qcow2};
use crate::format::entry::{L1Entry, RefcountTableEntry};
use crate::format::header::{Autoclear, Compatible, CryptMethod, Incompatible};
use crate::format::snapshot::{Snapshot, TableReader};
use crate::format::{Extensions, Header, Qcow2Error};
use crate::parameters::{Parameters, Password};
use block_graph::{Edge, Error, Node, NodeRef, Result};
use io_loop::IoBuffer;
use luks::{HeaderPlace, SectorCipher};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Bytes of the file that a header is looked for in.
const HEADER_READ: u64 = 512;

async fn read_bytes(file: &Node, offset: u64, length: usize) -> Result<IoBuffer> {
    let mut buffer = IoBuffer::zeroed(length);
    file.read(offset, &buffer.io()).await?;
    Ok(buffer)
}

/// Reads and checks the first cluster of an image.
pub(crate) async fn read_first_cluster(file: &NodeRef, parameters: &Parameters) -> Result<FirstCluster> {
    let unreadable = |error: Error| error.context("Could not read qcow2 header");
    let start = read_bytes(file, 0, HEADER_READ as usize).await.map_err(unreadable)?;
    let cluster_bits = match Header::parse(start.bytes()) {
        Ok(header) => header.cluster_bits,
        // Only the rest of the cluster can tell.
        Err(Qcow2Error::HeaderCut) => {
            u32::from_be_bytes(start.bytes()[20..24].try_into().expect("four bytes"))
        }
        Err(error) => return Err(error.into()),
    };
    let length = (1u64 << cluster_bits).min(file.len()).max(HEADER_READ);
    let cluster = read_bytes(file, 0, length as usize).await.map_err(unreadable)?;
    let header = Header::parse(cluster.bytes())?;
    header.check_features(&Extensions::feature_names_of(&header, cluster.bytes()))?;
    let flags = &parameters.flags;
    if header.incompatible.contains(Incompatible::CORRUPT) && flags.writable && !flags.check {
        return Err(Qcow2Error::Corrupt.into());
    }
    header.check_tables(flags.check)?;
    let extensions = Extensions::parse(&header, cluster.bytes())?;
    if extensions.stale_bitmaps {
        warn_of_stale_bitmaps(header.version);
    }
    if header.autoclear.contains(Autoclear::DATA_FILE_RAW)
        && !header.incompatible.contains(Incompatible::DATA_FILE)
    {
        return Err(Error::invalid("data-file-raw requires a data file"));
    }
    let backing_name = header.backing_name(cluster.bytes())?.map(<[u8]>::to_vec);
    Ok(FirstCluster { header, extensions, backing_name })
}

fn warn_of_stale_bitmaps(version: u32) {
    let why = if version < 3 {
        "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent bitmap \
         support; so now they must all be considered inconsistent"
    } else {
        "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
    };
    tracing::warn!("{why}. Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.");
}

/// Reads an image's tables. What is wrong with the snapshot table does not matter for a check.
pub(crate) async fn load(
    file: Arc<Edge>,
    data_file: Option<Arc<Edge>>,
    backing: Arc<Backing>,
    parameters: &Parameters,
    first: FirstCluster,
) -> Result<Qcow2> {
    let crypt = open_crypt(&file.node(), parameters, &first).await?;
    let geometry = first.header.geometry();
    let flags = &parameters.flags;
    let node = file.node();
    let lazy =
        parameters.lazy_refcounts.unwrap_or(first.header.compatible.contains(Compatible::LAZY_REFCOUNTS));
    if lazy && first.header.version < 3 && parameters.lazy_refcounts == Some(true) {
        let message = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
        return Err(Error::invalid(message));
    }
    let sizes = parameters.cache_sizes(&geometry, first.header.size)?;
    let l1 = read_table(&node, first.header.l1_offset, first.header.l1_entries.into())
        .await
        .map_err(|error| error.context("Could not read L1 table"))?;
    let mut allocator = Allocator::default();
    let mut metadata = MetadataMap::new(geometry.cluster_bits);
    let snapshots = if flags.check { Vec::new() } else { read_snapshots(&node, &first).await? };
    if flags.writable {
        let entries = u64::from(first.header.refcount_table_clusters) << (geometry.cluster_bits - 3);
        allocator.table = read_table(&node, first.header.refcount_table_offset, entries)
            .await
            .map_err(|error| error.context("Could not initialize refcount handling"))?;
        allocator.table_offset = first.header.refcount_table_offset;
        let end = node.len().checked_next_multiple_of(geometry.cluster_size());
        allocator.fresh = end.unwrap_or(u64::MAX);
        map_metadata(&mut metadata, &first, &l1, &allocator, &snapshots, &geometry);
    }
    Ok(Qcow2 {
        geometry,
        crypt_method: first.header.crypt_method,
        fresh_is_zero: node.driver().grows() && crypt.is_none(),
        crypt,
        writable: flags.writable,
        is_version_2: AtomicBool::new(first.header.version < 3),
        size: AtomicU64::new(first.header.size & !511),
        l1: RwLock::new(L1Table { offset: first.header.l1_offset, entries: l1, ..L1Table::default() }),
        l2: SliceCache::new(geometry.cluster_size(), sizes.l2, "l2_load"),
        blocks: SliceCache::new(geometry.cluster_size(), sizes.refcounts, "refblock_load"),
        allocator: futures_util::lock::Mutex::new(allocator),
        frees: Mutex::default(),
        writing: futures_util::lock::Mutex::default(),
        requests: Default::default(),
        claims: Default::default(),
        metadata: RwLock::new(metadata),
        snapshots: Mutex::new(snapshots),
        decompressed: Default::default(),
        corruption: Default::default(),
        discards: parameters.discards,
        overlap_check: parameters.overlap_check,
        preallocated: Default::default(),
        lazy_refcounts: AtomicBool::new(lazy),
        first_cluster: Mutex::new(first),
        header_writing: futures_util::lock::Mutex::default(),
        file,
        data_file,
        backing,
    })
}

/// Reads a table of 64-bit entries, whose length has been checked; what is behind the file's end is zero.
async fn read_table(file: &NodeRef, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let mut table = vec![0; entries as usize];
    let there = file.len().saturating_sub(offset).min(entries * 8).next_multiple_of(8);
    let mut at = 0;
    while at < there {
        let length = (there - at).min(1 << 20);
        let buffer = read_bytes(file, offset + at, length as usize).await?;
        for (index, entry) in buffer.bytes().chunks_exact(8).enumerate() {
            table[(at / 8) as usize + index] = u64::from_be_bytes(entry.try_into().expect("eight bytes"));
        }
        at += length;
    }
    Ok(table)
}

async fn read_snapshots(file: &NodeRef, first: &FirstCluster) -> Result<Vec<Snapshot>> {
    let mut reader = TableReader::new(first.header.snapshots);
    let mut bytes: Vec<u8> = Vec::new();
    let offset = first.header.snapshots_offset;
    let failed = |error: Error| error.context("Failed to read snapshot table");
    while let Some(needed) = reader.read(&bytes)? {
        let length = needed.max(bytes.len() + 4096) - bytes.len();
        let end = offset + bytes.len() as u64;
        if end >= file.len() {
            return Err(failed(Qcow2Error::SnapshotTableCut(reader.snapshots.len() as u32).into()));
        }
        bytes.extend(read_bytes(file, end, length).await.map_err(failed)?.bytes());
    }
    Ok(reader.snapshots)
}

/// Opens the encryption that the header speaks of.
async fn open_crypt(file: &NodeRef, parameters: &Parameters, first: &FirstCluster) -> Result<Option<Crypt>> {
    let method = first.header.crypt_method;
    let format = match method {
        CryptMethod::None => {
            if let Some(format) = &parameters.encrypt_format {
                let message =
                    format!("No encryption in image header, but options specified format '{format}'");
                return Err(Error::invalid(message));
            }
            return Ok(None);
        }
        CryptMethod::Aes => "aes",
        CryptMethod::Luks => "luks",
    };
    if let Some(other) = parameters.encrypt_format.as_deref().filter(|other| *other != format) {
        let message = format!("Header reported '{format}' encryption format but options specify '{other}'");
        return Err(Error::invalid(message));
    }
    let password = match (&parameters.password, parameters.flags.no_io) {
        (Some(password), _) => password.clone(),
        (None, true) => Password::default(),
        (None, false) => return Err(Error::invalid("Parameter 'encrypt.key-secret' is required for cipher")),
    };
    if method == CryptMethod::Aes {
        let cipher = (!parameters.flags.no_io).then(|| SectorCipher::legacy_qcow(&password.0));
        return Ok(Some(Crypt::new(method, cipher, None, password)));
    }
    let Some(extent) = first.extensions.crypto else {
        return Err(Error::invalid("Missing CRYPTO header for crypt method 2"));
    };
    let place = HeaderPlace { node: file.clone(), offset: extent.offset };
    let volume = place.open(false).await?;
    let mut cipher = None;
    if !parameters.flags.no_io {
        let key = place.unlock(&volume, &password.0).await?;
        cipher =
            Some(volume.sector_cipher(&key).map_err(|error| Error::of(block_graph::Errno::INVALID, error))?);
    }
    Ok(Some(Crypt::new(method, cipher, Some(volume), password)))
}

/// Notes where metadata are.
fn map_metadata(
    map: &mut MetadataMap,
    first: &FirstCluster,
    l1: &[u64],
    allocator: &Allocator,
    snapshots: &[Snapshot],
    geometry: &crate::format::Geometry,
) {
    let cluster = geometry.cluster_size();
    map.add(0, cluster, Metadata::Header);
    map.add(first.header.l1_offset, l1.len() as u64 * 8, Metadata::ActiveL1);
    for entry in l1.iter().map(|entry| L1Entry(*entry)).filter(|entry| entry.offset() != 0) {
        map.add(entry.offset(), cluster, Metadata::ActiveL2);
    }
    map.add(allocator.table_offset, allocator.table.len() as u64 * 8, Metadata::RefcountTable);
    for entry in
        allocator.table.iter().map(|entry| RefcountTableEntry(*entry).offset()).filter(|offset| *offset != 0)
    {
        map.add(entry, cluster, Metadata::RefcountBlock);
    }
    let table: u64 = snapshots.iter().map(super::snapshots::old_length).sum();
    map.add(first.header.snapshots_offset, table, Metadata::SnapshotTable);
    for snapshot in snapshots {
        map.add(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8, Metadata::InactiveL1);
    }
    if let Some(bitmaps) = &first.extensions.bitmaps {
        map.add(bitmaps.directory.offset, bitmaps.directory.length, Metadata::BitmapDirectory);
    }
}
