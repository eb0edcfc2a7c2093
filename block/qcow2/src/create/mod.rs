//! New images.

mod encryption;
mod layout;
mod options;

pub(crate) use options::AMEND_ENCRYPTION;
pub use options::{CREATE_OPTIONS, CreateSpec};

use crate::format::extensions::{Extent, encode_first_cluster};
use crate::format::feature_name::FeatureName;
use crate::format::header::{Autoclear, Compatible, Compression, CryptMethod, Incompatible};
use crate::format::{Extensions, Geometry, Header, refcount};
use crate::storage::NodeFile;
use crate::storage::{MAX_TRANSFER, Storage, write_all};
use block_graph::{Errno, Error, NodeRef, OpenContext, OpenFlags, Options, Preallocation, Result};
pub(crate) use encryption::EncryptionOptions;
use layout::Layout;

/// The smallest cluster size for which images name their features: in a smaller header there is no room.
const FEATURE_NAMES_FROM: u64 = 4096;

/// The encryption of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// The legacy one, with a password.
    Aes,
    /// With a LUKS header, of which these are the bytes, from its magic number to where the payload would start.
    Luks(Vec<u8>),
}

/// Options of the files that an image and its data are in, which are passed on.
const FILE_OPTIONS: [&str; 2] = ["nocow", "extent_size_hint"];

/// Makes an image of this name: its file, and the data file if there is to be one. Takes [`CREATE_OPTIONS`] out of
/// `options`, and what the files' protocol has.
///
/// # Errors
/// If the options make no sense, and the files' own. Files that were made are removed then.
pub async fn create_image(context: &OpenContext, filename: &str, options: &mut Options) -> Result<()> {
    let spec = CreateSpec::take(options)?;
    let encryption = EncryptionOptions::take(options)?;
    let mut file_options = Options::new();
    for name in FILE_OPTIONS {
        if let Some(value) = options.take(name) {
            file_options.set(name, value);
        }
    }
    let made = create_files(context, filename, &spec, encryption, &file_options).await;
    if made.is_err() {
        // What a file's protocol cannot remove stays.
        for name in spec.data_file.as_deref().into_iter().chain([filename]) {
            if let Ok(protocol) = context.registry.protocol_of(name) {
                let _ = protocol.delete(name).await;
            }
        }
    }
    made
}

async fn create_files(
    context: &OpenContext,
    filename: &str,
    spec: &CreateSpec,
    encryption: Option<EncryptionOptions>,
    file_options: &Options,
) -> Result<()> {
    let file = new_file(context, filename, file_options).await?;
    let data = match &spec.data_file {
        Some(name) => Some(new_file(context, name, file_options).await?),
        None => None,
    };
    let encryption = match encryption {
        Some(options) => Some(options.prepare(context).await?),
        None => None,
    };
    let data_file = data.clone().map(NodeFile);
    let data_file = data_file.as_ref().map(|file| file as &dyn Storage);
    let created = create(&NodeFile(file.clone()), data_file, spec, encryption.as_ref()).await;
    let mut closed = file.close().await;
    if let Some(data) = data {
        closed = closed.and(data.close().await);
    }
    created.and(closed)
}

/// Makes an empty file and opens it.
async fn new_file(context: &OpenContext, name: &str, options: &Options) -> Result<NodeRef> {
    let mut options = options.clone();
    options.set("size", 0i64);
    context.create_protocol(name, &mut options).await?;
    context.open_protocol(name, Options::new(), OpenFlags::WRITE).await
}

/// Writes a new, empty image to `file`, which is empty, and prepares `data_file` if there is one.
///
/// The header is written last, so that nothing takes an image that was not finished for one.
///
/// # Errors
/// `EFBIG` if the disk is larger than its tables can be, and the files' own.
pub async fn create(
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    spec: &CreateSpec,
    encryption: Option<&Encryption>,
) -> Result<()> {
    let geometry = spec.geometry();
    let crypto_bytes = match encryption {
        Some(Encryption::Luks(header)) => header.len() as u64,
        _ => 0,
    };
    let preallocation = spec.effective_preallocation();
    let layout = Layout::new(geometry, spec.size, crypto_bytes, preallocation != Preallocation::Off);
    let layout = layout.ok_or_else(|| {
        Error::new(
            Errno::TOO_LARGE,
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        )
    })?;
    let first_cluster = first_cluster(spec, &layout, encryption)?;
    let new = NewImage { file, geometry, layout };
    let failed = |what: &'static str| move |error: std::io::Error| Error::from(error).context(what);
    new.reserve(preallocation).await.map_err(failed("Could not resize image"))?;
    new.write_refcounts().await.map_err(failed("Could not write refcount table"))?;
    new.write_tables().await.map_err(failed("Could not resize image"))?;
    if let Some(Encryption::Luks(header)) = encryption {
        let padded = header.len().next_multiple_of(geometry.cluster_size() as usize);
        let mut bytes = header.clone();
        bytes.resize(padded, 0);
        let at = layout.crypto_at() << geometry.cluster_bits;
        write_all(file, at, &bytes).await.map_err(failed("Could not write encryption header"))?;
    }
    if let Some(data_file) = data_file {
        prepare_data(data_file, spec.size, preallocation).await.map_err(failed("Could not resize image"))?;
    }
    file.flush().await.map_err(failed("Could not write qcow2 header"))?;
    write_all(file, 0, &first_cluster).await.map_err(failed("Could not write qcow2 header"))?;
    file.flush().await.map_err(failed("Could not write qcow2 header"))
}

/// An image that is being written.
struct NewImage<'a> {
    file: &'a dyn Storage,
    geometry: Geometry,
    layout: Layout,
}

impl NewImage<'_> {
    /// Takes the space that preallocation wants, and makes the file as long as it will be.
    async fn reserve(&self, preallocation: Preallocation) -> std::io::Result<()> {
        let end = self.layout.end() << self.geometry.cluster_bits;
        if self.layout.mapped == 0 || !self.layout.holds_data {
            return Ok(());
        }
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => self.file.set_len(end).await,
            Preallocation::Falloc => self.file.reserve(0, end).await,
            Preallocation::Full => {
                let start = self.layout.l2_at(0) << self.geometry.cluster_bits;
                self.file.write_zeroes(start, end - start, true).await
            }
        }
    }

    /// Writes the refcount table and blocks: 1 for every cluster up to the end.
    async fn write_refcounts(&self) -> std::io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut table = vec![0; (self.layout.table_clusters << bits) as usize];
        for (index, entry) in table.as_chunks_mut().0.iter_mut().take(self.layout.blocks as usize).enumerate()
        {
            *entry = ((self.layout.blocks_at() + index as u64) << bits).to_be_bytes();
        }
        write_all(self.file, 1 << bits, &table).await?;
        let per_block = self.geometry.refcount_block_entries();
        let full = self.block(per_block);
        for index in 0..self.layout.blocks {
            let counted = (self.layout.end() - index * per_block).min(per_block);
            let at = (self.layout.blocks_at() + index) << bits;
            if counted == per_block {
                write_all(self.file, at, &full).await?;
            } else {
                write_all(self.file, at, &self.block(counted)).await?;
            }
        }
        Ok(())
    }

    /// A refcount block whose first refcounts are 1.
    fn block(&self, ones: u64) -> Vec<u8> {
        let mut block = vec![0; self.geometry.cluster_size() as usize];
        for index in 0..ones {
            let fits = refcount::set(&mut block, self.geometry.refcount_order, index, 1);
            fits.expect("a block holds what it is as long as, and a refcount holds 1");
        }
        block
    }

    /// Writes the L1 table, and L2 tables where clusters are preallocated.
    async fn write_tables(&self) -> std::io::Result<()> {
        use crate::format::entry::COPIED;
        let bits = self.geometry.cluster_bits;
        let (l2_entries, entry_size) = (self.geometry.l2_entries(), self.geometry.l2_entry_size());
        let mut l1 = vec![0; self.layout.l1_entries as usize * 8];
        for index in 0..self.layout.l2_tables() {
            let at = self.layout.l2_at(index) << bits;
            l1[index as usize * 8..][..8].copy_from_slice(&(at | COPIED).to_be_bytes());
            let mut table = vec![0; self.geometry.cluster_size() as usize];
            let first = index * l2_entries;
            let mapped = (self.layout.mapped - first).min(l2_entries);
            for (number, entry) in (0..mapped).zip(table.chunks_exact_mut(entry_size)) {
                // In a data file, clusters are where the guest sees them.
                let host = if self.layout.holds_data {
                    at + ((1 + number) << bits)
                } else {
                    (first + number) << bits
                };
                // With extended entries no subcluster is allocated, so that a backing file is seen.
                entry[..8].copy_from_slice(&(host | COPIED).to_be_bytes());
            }
            write_all(self.file, at, &table).await?;
        }
        write_all(self.file, self.layout.l1_at() << bits, &l1).await
    }
}

/// Makes a data file as long as the disk, and takes space for it.
async fn prepare_data(file: &dyn Storage, size: u64, preallocation: Preallocation) -> std::io::Result<()> {
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => file.set_len(size).await,
        Preallocation::Falloc => file.reserve(0, size).await,
        Preallocation::Full => {
            for start in (0..size).step_by(MAX_TRANSFER * 64) {
                file.write_zeroes(start, (size - start).min(MAX_TRANSFER as u64 * 64), true).await?;
            }
            Ok(())
        }
    }?;
    file.flush().await
}

/// The bytes of the header, its extensions and the backing file's name.
fn first_cluster(spec: &CreateSpec, layout: &Layout, encryption: Option<&Encryption>) -> Result<Vec<u8>> {
    let bits = spec.cluster_bits;
    let mut incompatible = Incompatible::empty();
    incompatible.set(Incompatible::DATA_FILE, spec.data_file.is_some());
    incompatible.set(Incompatible::COMPRESSION, spec.compression != Compression::Zlib);
    incompatible.set(Incompatible::EXTENDED_L2, spec.extended_l2);
    let mut compatible = Compatible::empty();
    compatible.set(Compatible::LAZY_REFCOUNTS, spec.lazy_refcounts);
    let mut autoclear = Autoclear::empty();
    autoclear.set(Autoclear::DATA_FILE_RAW, spec.data_file_raw);
    let mut header = Header {
        version: spec.version,
        backing_name_offset: 0,
        backing_name_length: 0,
        cluster_bits: bits,
        size: spec.size,
        crypt_method: match encryption {
            None => CryptMethod::None,
            Some(Encryption::Aes) => CryptMethod::Aes,
            Some(Encryption::Luks(_)) => CryptMethod::Luks,
        },
        l1_entries: layout.l1_entries as u32,
        l1_offset: if layout.l1_entries == 0 { 0 } else { layout.l1_at() << bits },
        refcount_table_offset: 1 << bits,
        refcount_table_clusters: layout.table_clusters as u32,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear,
        refcount_order: spec.refcount_order,
        header_length: 0,
        compression: spec.compression,
        unknown_fields: Vec::new(),
    };
    header.header_length = header.encoded_length() as u32;
    let names = spec.version >= 3 && 1 << bits >= FEATURE_NAMES_FROM;
    let crypto = match encryption {
        Some(Encryption::Luks(bytes)) => {
            Some(Extent { offset: layout.crypto_at() << bits, length: bytes.len() as u64 })
        }
        _ => None,
    };
    let extensions = Extensions {
        backing_format: spec.backing_format.clone().map(String::into_bytes),
        data_file: spec.data_file.clone().map(String::into_bytes),
        crypto,
        feature_names: if names { FeatureName::known() } else { Vec::new() },
        ..Extensions::default()
    };
    let backing = spec.backing_file.as_deref().map(str::as_bytes);
    encode_first_cluster(&mut header, &extensions, backing).map_err(|error| {
        let format = spec.backing_format.as_deref().unwrap_or("(null)");
        let error = Error::of(Errno::INVALID, error);
        match &spec.backing_file {
            Some(name) => {
                error.context(format_args!("Could not assign backing file '{name}' with format '{format}'"))
            }
            None => error.context("Could not update qcow2 header"),
        }
    })
}
