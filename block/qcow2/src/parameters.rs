//! The options that an image is opened with.

use crate::format::Geometry;
use block_graph::{Error, OpenFlags, Options, Result, Secrets};
use zeroize::Zeroizing;

/// The most memory for L2 tables, unless options say otherwise, in bytes.
const L2_CACHE: u64 = 32 << 20;
/// The memory for refcount blocks, unless options say otherwise, in bytes.
const REFCOUNT_CACHE: u64 = 2 << 20;
/// The fewest clusters of either cache.
const FEWEST: u64 = 4;

/// A password, which no message shows.
#[derive(Clone, Default)]
pub(crate) struct Password(pub(crate) Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password")
    }
}

/// Which freed clusters are discarded in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiscardRules {
    /// Those that a guest discards (`pass-discard-request`).
    pub(crate) request: bool,
    /// Those that a deleted snapshot had (`pass-discard-snapshot`).
    pub(crate) snapshot: bool,
    /// All others (`pass-discard-other`).
    pub(crate) other: bool,
    /// Whether discarded clusters stay allocated, and only read as zeros (`discard-no-unref`).
    pub(crate) no_unref: bool,
}

/// The least memory of each cache where no option says how much, in bytes: it is taken as needed.
const LEAST_DEFAULT: u64 = 4 << 20;

/// How an image is opened.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    pub(crate) flags: OpenFlags,
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) discards: DiscardRules,
    pub(crate) encrypt_format: Option<String>,
    /// The password of an encrypted image.
    pub(crate) password: Option<Password>,
    /// Whether writes are checked against overlaps with metadata.
    pub(crate) overlap_check: bool,
    cache_size: Option<u64>,
    l2_cache_size: Option<u64>,
    refcount_cache_size: Option<u64>,
    l2_cache_entry_size: Option<u64>,
}

/// The memory of the caches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheSizes {
    pub(crate) l2: u64,
    pub(crate) refcounts: u64,
}

impl Parameters {
    /// Takes what the format knows out of `options`.
    pub(crate) fn take(options: &mut Options, flags: OpenFlags, secrets: &Secrets) -> Result<Self> {
        let password = match options.take_text("encrypt.key-secret") {
            Some(id) => Some(Password(Zeroizing::new(secrets.get(&id)?.to_vec()))),
            None => None,
        };
        let encrypt_format = options.take_text("encrypt.format");
        let discards = DiscardRules {
            request: options.take_switch("pass-discard-request")?.unwrap_or(flags.unmap),
            snapshot: options.take_switch("pass-discard-snapshot")?.unwrap_or(true),
            other: options.take_switch("pass-discard-other")?.unwrap_or(false),
            no_unref: options.take_switch("discard-no-unref")?.unwrap_or(false),
        };
        let lazy_refcounts = options.take_switch("lazy-refcounts")?;
        let overlap_check = take_overlap_check(options)?;
        // Slices that are not used go when others come; there is nothing to clean by time.
        options.take_number("cache-clean-interval")?;
        Ok(Self {
            flags,
            lazy_refcounts,
            discards,
            overlap_check,
            encrypt_format,
            password,
            cache_size: options.take_size("cache-size")?,
            l2_cache_size: options.take_size("l2-cache-size")?,
            refcount_cache_size: options.take_size("refcount-cache-size")?,
            l2_cache_entry_size: options.take_size("l2-cache-entry-size")?,
        })
    }

    /// The memory of the caches for a disk of `size` bytes.
    pub(crate) fn cache_sizes(&self, geometry: &Geometry, size: u64) -> Result<CacheSizes> {
        let cluster = geometry.cluster_size();
        if let Some(entry) = self.l2_cache_entry_size
            && (!entry.is_power_of_two() || entry < 512 || entry > cluster)
        {
            let message = format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            );
            return Err(Error::invalid(message));
        }
        // More than the tables of the whole disk is of no use.
        let useful = (geometry.l1_entries_for(size).max(1)).saturating_mul(cluster);
        let least = FEWEST * cluster.min(4096);
        let (l2, refcounts) = match (self.cache_size, self.l2_cache_size, self.refcount_cache_size) {
            (Some(_), Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
            (Some(all), Some(l2), None) if l2 > all => {
                return Err(Error::invalid("l2-cache-size may not exceed cache-size"));
            }
            (Some(all), None, Some(refcounts)) if refcounts > all => {
                return Err(Error::invalid("refcount-cache-size may not exceed cache-size"));
            }
            (Some(all), Some(l2), None) => (l2, all - l2),
            (Some(all), None, Some(refcounts)) => (all - refcounts, refcounts),
            (Some(all), None, None) => {
                let refcounts = (all / 4).min(REFCOUNT_CACHE);
                (all - refcounts, refcounts)
            }
            (None, l2, refcounts) => (l2.unwrap_or(L2_CACHE), refcounts.unwrap_or(REFCOUNT_CACHE)),
        };
        if l2 / cluster > i32::MAX as u64 {
            return Err(Error::invalid("L2 cache size too big"));
        }
        if refcounts / cluster > i32::MAX as u64 {
            return Err(Error::invalid("Refcount cache size too big"));
        }
        // What is useful for reading is little for a small disk. Half of the cache may be dirty before tables are
        // written, and every time costs a flush, so there is more where nobody asked for less.
        let nobody_asked = self.cache_size.is_none();
        let l2_least = if nobody_asked && self.l2_cache_size.is_none() { LEAST_DEFAULT } else { least };
        let blocks_least =
            if nobody_asked && self.refcount_cache_size.is_none() { LEAST_DEFAULT } else { least };
        Ok(CacheSizes { l2: l2.min(useful).max(l2_least), refcounts: refcounts.max(blocks_least) })
    }
}

fn take_overlap_check(options: &mut Options) -> Result<bool> {
    let template = options.take_text("overlap-check");
    let nested = options.take_text("overlap-check.template");
    if template.is_some() && nested.is_some() && template != nested {
        return Err(Error::invalid(
            "Conflicting values for qcow2 options 'overlap-check' and 'overlap-check.template'",
        ));
    }
    for part in [
        "main-header",
        "active-l1",
        "active-l2",
        "refcount-table",
        "refcount-block",
        "snapshot-table",
        "inactive-l1",
        "inactive-l2",
        "bitmap-directory",
    ] {
        options.take_switch(&format!("overlap-check.{part}"))?;
    }
    match template.or(nested).as_deref() {
        Some("none") => Ok(false),
        None | Some("constant" | "cached" | "all") => Ok(true),
        Some(other) => Err(Error::invalid(format!(
            "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, \
             constant, cached, all"
        ))),
    }
}
