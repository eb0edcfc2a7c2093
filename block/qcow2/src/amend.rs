//! Changing an image's options.

use crate::driver::Qcow2Driver;
use crate::engine::state::{FirstCluster, Qcow2};
use crate::format::header::{Autoclear, Compatible, CryptMethod, Incompatible};
use block_graph::{Error, Options, Result, Truncate};
use luks::HeaderPlace;
use std::sync::atomic::Ordering;

/// What options ask to be changed.
struct Wanted {
    version: Option<u32>,
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
}

impl Wanted {
    fn take(options: &mut Options) -> Result<Self> {
        let version = match options.take_text("compat").as_deref() {
            None => None,
            Some("0.10" | "v2") => Some(2),
            Some("1.1" | "v3") => Some(3),
            Some(other) => return Err(Error::invalid(format!("Unknown compatibility level {other}"))),
        };
        Ok(Self {
            version,
            size: options.take_size("size")?,
            backing: options.take_text("backing_file"),
            backing_format: options.take_text("backing_fmt"),
            data_file: options.take_text("data_file"),
            data_file_raw: options.take_switch("data_file_raw")?,
            lazy_refcounts: options.take_switch("lazy_refcounts")?,
            refcount_bits: options.take_number("refcount_bits")?,
        })
    }
}

impl Qcow2Driver {
    /// Changes what `options` say, and takes it out of them.
    pub(crate) async fn amend_options(
        &self,
        options: &mut Options,
        progress: &dyn Fn(u64, u64),
        force: bool,
    ) -> Result<()> {
        let engine = self.engine();
        engine.check_writable()?;
        let wanted = Wanted::take(options)?;
        let mut encrypt = options.take_child("encrypt");
        check(&engine, &wanted)?;
        let old = if engine.version_2() { 2 } else { 3 };
        let version = wanted.version.unwrap_or(old);
        if version > old {
            engine.set_version(3).await?;
        }
        if !encrypt.is_empty() {
            amend_encryption(&engine, &mut encrypt, self.secrets(), force).await?;
            options.set_child("encrypt", encrypt);
        }
        if wanted.data_file.is_some() || wanted.data_file_raw.is_some() {
            let change = |first: &mut FirstCluster| {
                if let Some(name) = &wanted.data_file {
                    first.extensions.data_file =
                        Some(name.as_bytes().to_vec()).filter(|name| !name.is_empty());
                }
                if let Some(raw) = wanted.data_file_raw {
                    first.header.autoclear.set(Autoclear::DATA_FILE_RAW, raw);
                }
            };
            engine.change_first_cluster(change).await?;
        }
        if let Some(lazy) = wanted.lazy_refcounts {
            engine.set_lazy_refcounts(lazy).await?;
        }
        if let Some(size) = wanted.size {
            engine.truncate(size, Truncate { exact: false, ..Truncate::default() }).await?;
        }
        if version < old {
            engine.downgrade(progress).await?;
        }
        progress(1, 1);
        Ok(())
    }
}

/// Refuses what makes no sense, before anything is changed.
fn check(engine: &Qcow2, wanted: &Wanted) -> Result<()> {
    let first = engine.first_cluster.lock().clone();
    let version = wanted.version.unwrap_or(first.header.version);
    if wanted.data_file.is_some() && !engine.geometry.data_file {
        let message = "data-file can only be set for images that use an external data file";
        return Err(Error::invalid(message));
    }
    if wanted.data_file_raw == Some(true) && !engine.data_file_raw() {
        return Err(Error::invalid("data-file-raw cannot be set on existing images"));
    }
    if let Some(bits) = wanted.refcount_bits {
        if bits == 0 || bits > 64 || !bits.is_power_of_two() {
            return Err(Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        if version < 3 && bits != 16 {
            return Err(Error::invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or \
                 greater)",
            ));
        }
        if bits != u64::from(engine.geometry.refcount_bits()) {
            return Err(Error::unsupported("Changing the refcount width is not supported"));
        }
    }
    if wanted.lazy_refcounts == Some(true) && version < 3 {
        return Err(Error::invalid(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ));
    }
    // Another backing file would need the data that it has not.
    let differs = |wanted: &Option<String>, now: &Option<Vec<u8>>| {
        wanted.as_ref().is_some_and(|wanted| wanted.as_bytes() != now.as_deref().unwrap_or_default())
    };
    if differs(&wanted.backing, &first.backing_name)
        || differs(&wanted.backing_format, &first.extensions.backing_format)
    {
        let error = Error::invalid("Cannot amend the backing file");
        return Err(error.hint("You can use 'qemu-img rebase' instead."));
    }
    Ok(())
}

async fn amend_encryption(
    engine: &Qcow2,
    options: &mut Options,
    secrets: &block_graph::Secrets,
    force: bool,
) -> Result<()> {
    let Some(crypt) = &engine.crypt else {
        return Err(Error::invalid("Can't amend encryption options - encryption not present"));
    };
    options.take("format");
    let volume = crypt.volume.read().clone();
    let extent = engine.first_cluster.lock().extensions.crypto;
    let (Some(volume), Some(extent), CryptMethod::Luks) = (volume, extent, engine.crypt_method) else {
        return Err(Error::unsupported("Only LUKS encryption options can be amended for qcow2 with amend"));
    };
    let place = HeaderPlace { node: engine.file.node(), offset: extent.offset };
    let changed = place.amend(&volume, options, secrets, &crypt.password.0, force).await?;
    *crypt.volume.write() = Some(changed);
    Ok(())
}

impl Qcow2 {
    async fn set_version(&self, version: u32) -> Result<()> {
        self.change_header(|header| header.version = version).await?;
        self.is_version_2.store(version < 3, Ordering::Relaxed);
        self.file.node().flush().await
    }

    async fn set_lazy_refcounts(&self, lazy: bool) -> Result<()> {
        let _alone = self.requests.exclusive().await;
        // What is behind comes first: afterwards nobody would mend it.
        self.write_everything().await?;
        self.change_header(|header| {
            header.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
            header.incompatible.remove(Incompatible::DIRTY);
        })
        .await?;
        self.lazy_refcounts.store(lazy, Ordering::Relaxed);
        self.file.node().flush().await
    }

    /// Makes the image one of version 2.
    async fn downgrade(&self, progress: &dyn Fn(u64, u64)) -> Result<()> {
        let header = self.first_cluster.lock().header.clone();
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            return Err(Error::unsupported("Cannot downgrade an image with a data file"));
        }
        if !header.incompatible.difference(Incompatible::DIRTY).is_empty() {
            return Err(Error::unsupported("Cannot downgrade an image with incompatible features set"));
        }
        if header.refcount_order != 4 {
            return Err(Error::unsupported("compat=0.10 requires refcount_bits=16"));
        }
        let size = self.disk_size();
        let plain = |snapshot: &crate::format::snapshot::Snapshot| {
            snapshot.vm_state_size <= u64::from(u32::MAX)
                && snapshot.disk_size.is_none_or(|other| other == size)
        };
        if !self.snapshots.lock().iter().all(plain) {
            return Err(Error::unsupported("Internal snapshots prevent downgrade of image"));
        }
        if self.snapshots_say_zero().await? {
            return Err(Error::unsupported(
                "Internal snapshots with zero clusters prevent downgrade of image",
            ));
        }
        self.set_lazy_refcounts(false).await?;
        let _alone = self.requests.exclusive().await;
        self.spell_out_zeros(progress).await?;
        self.write_everything().await?;
        self.change_first_cluster(|first| {
            first.header.version = 2;
            first.header.incompatible = Incompatible::empty();
            first.header.compatible = Compatible::empty();
            first.header.autoclear = Autoclear::empty();
            first.header.unknown_fields.clear();
            first.extensions.feature_names.clear();
            first.extensions.bitmaps = None;
        })
        .await?;
        self.is_version_2.store(true, Ordering::Relaxed);
        self.file.node().flush().await
    }
}
