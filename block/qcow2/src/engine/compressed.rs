//! Compressed clusters.

use super::cache::Slice;
use super::copy::NewEntries;
use super::frees::Why;
use super::parts::Parts;
use super::requests::Claim;
use super::state::Qcow2;
use crate::format::entry::{CompressedExtent, L2Entry};
use crate::format::header::Compression;
use block_graph::{Errno, Error, Result, WriteFlags};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use futures_util::stream::{self, StreamExt};
use io_loop::{IoBuffer, IoVec};
use std::sync::Arc;

/// Base-2 logarithm of the window of deflated clusters.
const WINDOW_BITS: u8 = 12;
/// Clusters up to this size are decompressed on the thread of the request.
const INLINE: u64 = 16 << 10;

/// Compresses a cluster; `None` if it does not become smaller.
pub(crate) fn compress(compression: Compression, data: &[u8]) -> Option<Vec<u8>> {
    match compression {
        Compression::Zlib => {
            let mut out = Vec::with_capacity(data.len());
            let mut deflate =
                Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let status = deflate.compress_vec(data, &mut out, FlushCompress::Finish).ok()?;
            (status == Status::StreamEnd && out.len() < data.len()).then_some(out)
        }
        Compression::Zstd => {
            let out = zstd::bulk::compress(data, 0).ok()?;
            (out.len() < data.len()).then_some(out)
        }
    }
}

/// Decompresses a cluster of `size` bytes from the beginning of `data`, which may go on with anything.
pub(crate) fn decompress(compression: Compression, data: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    match compression {
        Compression::Zlib => {
            let mut inflate = Decompress::new_with_window_bits(false, WINDOW_BITS);
            inflate.decompress(data, &mut out, FlushDecompress::Finish).ok();
            (inflate.total_out() == size as u64).then_some(out)
        }
        Compression::Zstd => {
            use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
            let mut decoder = Decoder::new().ok()?;
            let mut input = InBuffer::around(data);
            let mut output = OutBuffer::around(&mut out[..]);
            while output.pos() < size {
                let before = (input.pos(), output.pos());
                decoder.run(&mut input, &mut output).ok()?;
                if before == (input.pos(), output.pos()) {
                    return None;
                }
            }
            Some(out)
        }
    }
}

impl Qcow2 {
    /// How this image's compressed clusters are compressed.
    pub(crate) fn compression(&self) -> Compression {
        self.first_cluster.lock().header.compression
    }

    /// Reads from a compressed cluster.
    pub(crate) async fn read_compressed(&self, entry: L2Entry, guest: u64, into: &IoVec) -> Result<()> {
        let cluster = self.decompressed_cluster(entry).await?;
        let at = self.geometry.in_cluster(guest) as usize;
        into.copy_from(0, &cluster[at..at + into.len()]);
        Ok(())
    }

    async fn decompressed_cluster(&self, entry: L2Entry) -> Result<Arc<Vec<u8>>> {
        if let Some(data) = self.decompressed.get(entry.descriptor) {
            return Ok(data);
        }
        let extent = entry.compressed_extent(&self.geometry);
        let mut buffer = IoBuffer::zeroed(extent.length as usize);
        self.event("read_compressed");
        // The last sector may be beyond the file's end, which reads as zeros.
        self.file.node().read(extent.offset, &buffer.io()).await?;
        let size = self.geometry.cluster_size();
        let compression = self.compression();
        let data = if size <= INLINE {
            decompress(compression, buffer.bytes(), size as usize)
        } else {
            io_loop::offload(move || decompress(compression, buffer.bytes(), size as usize)).await
        };
        let data = data.ok_or_else(|| Error::new(Errno::IO, "Input/output error"))?;
        let data = Arc::new(data);
        self.decompressed.keep(entry.descriptor, data.clone());
        Ok(data)
    }

    /// Writes whole clusters compressed, in parallel; only the disk's last may be less than a cluster.
    pub(crate) async fn write_compressed(&self, offset: u64, from: &IoVec) -> Result<()> {
        let geometry = &self.geometry;
        if self.crypt.is_some() {
            return Err(Error::unsupported("Compression and encryption not supported at the same time"));
        }
        if geometry.data_file {
            return Err(Error::unsupported("Compression is not supported with an external data file"));
        }
        let end = offset + from.len() as u64;
        if geometry.in_cluster(offset) != 0 || geometry.in_cluster(end) != 0 && end != self.disk_size() {
            return Err(Error::errno_only(Errno::INVALID));
        }
        let compression = self.compression();
        let size = geometry.cluster_size();
        let clusters = (offset..end).step_by(size as usize).map(|guest| {
            let part = from.slice((guest - offset) as usize..((guest + size).min(end) - offset) as usize);
            let plain = part.clone();
            async move {
                let packed = io_loop::offload(move || {
                    let mut cluster = vec![0; size as usize];
                    plain.copy_to(0, &mut cluster[..plain.len()]);
                    compress(compression, &cluster)
                })
                .await;
                (guest, part, packed)
            }
        });
        let mut compressing = stream::iter(clusters).buffered(io_loop::cores() * 2);
        let mut writing = Parts::new();
        let mut result = Ok(());
        while let Some((guest, part, packed)) = compressing.next().await {
            result = match packed {
                // It did not become smaller.
                None => writing.beside(self.write_guest(guest, &part)).await,
                Some(packed) => {
                    match writing.beside(self.place_compressed(guest, packed.len() as u64)).await {
                        Ok(place) => {
                            writing.begin(self.write_packed(place, guest, packed)).await;
                            Ok(())
                        }
                        Err(error) => Err(error),
                    }
                }
            };
            if result.is_err() {
                break;
            }
        }
        writing.end(result).await
    }

    /// Takes room for a guest cluster's compressed data.
    async fn place_compressed(&self, guest: u64, length: u64) -> Result<Place<'_>> {
        let claim = self.claims.claim(guest..guest + self.geometry.cluster_size()).await;
        let slice = self.own_l2_slice(guest).await?;
        if self.entry_in(&slice, guest).copied() {
            // Compressed data cannot go where data are already.
            return Err(Error::errno_only(Errno::IO));
        }
        let mut allocator = self.allocator.lock().await;
        let offset = self.take_bytes(&mut allocator, length).await?;
        Ok(Place { _claim: claim, slice, offset })
    }

    async fn write_packed(&self, place: Place<'_>, guest: u64, packed: Vec<u8>) -> Result<()> {
        let length = packed.len() as u64;
        let extent = CompressedExtent { offset: place.offset, length };
        let (first, clusters) = extent.clusters(&self.geometry);
        let result = match L2Entry::compressed(place.offset, length, &self.geometry) {
            None => Err(Error::errno_only(Errno::TOO_LARGE)),
            Some(entry) => {
                let data = IoBuffer::from(&packed[..]).into_io();
                self.event("write_compressed");
                self.file.node().write(place.offset, &data, WriteFlags::empty()).await.map(|()| entry)
            }
        };
        match result {
            Err(error) => {
                self.give_back(first, clusters).await;
                Err(error)
            }
            Ok(entry) => {
                self.decompressed.forget();
                let entries =
                    NewEntries { first: self.index_in_slice(guest), entries: vec![entry], replace: true };
                for old in self.link(&place.slice, &entries) {
                    self.free_entry(old, Why::Other);
                }
                Ok(())
            }
        }
    }
}

/// Room for a guest cluster's compressed data.
struct Place<'a> {
    _claim: Claim<'a>,
    slice: Arc<Slice>,
    offset: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clusters_survive_both_compressions(seed in proptest::collection::vec(any::<u8>(), 1..300), zstd: bool) {
            let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
            let data: Vec<u8> = seed.iter().cycle().copied().take(65536).collect();
            let mut packed = compress(compression, &data).unwrap();
            packed.extend([0xff; 300]);
            prop_assert_eq!(decompress(compression, &packed, 65536).unwrap(), data);
            prop_assert!(decompress(compression, &packed[..packed.len() - 310], 65536).is_none());
        }

        #[test]
        fn any_bytes_decompress_or_are_refused(data in proptest::collection::vec(any::<u8>(), 0..2000), zstd: bool) {
            let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
            if let Some(out) = decompress(compression, &data, 4096) {
                prop_assert_eq!(out.len(), 4096);
            }
        }
    }
}
