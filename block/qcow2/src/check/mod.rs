//! Check and repair: what the metadata references, against what the refcounts say.
//!
//! A check reads nothing of the driver's state: it works on the file alone, so the driver writes its caches back before
//! and drops them after. Each table of level 2 is read once, however many snapshots share it, in large reads of which
//! several are under way; each cluster of the file takes a byte of memory, and none where nothing is referenced.
//!
//! The texts are those of `qemu-img check`.

mod bitmaps;
mod compare;
mod copied;
mod rebuild;
mod references;
mod scan;
mod snapshots;

use crate::format::header::Incompatible;
use crate::format::{Extensions, Geometry, Header, Qcow2Error};
use crate::storage::Storage;
use references::References;
use rustix::io::Errno;
use std::fmt::Display;
use std::io;

/// Where the header has the refcount table's offset, and the number of its clusters behind it.
const REFCOUNT_TABLE_AT: u64 = 48;
/// Where the header has the number of snapshots, and the snapshot table's offset behind it.
const SNAPSHOTS_AT: u64 = 60;
/// Where the header has the incompatible features.
const INCOMPATIBLE_AT: u64 = 72;

/// How often refcount structures are built anew in one repair: each time makes the file longer, and what was beyond its
/// end counts then.
const MOST_REBUILDS: u32 = 4;

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fix {
    /// Clusters with too high a refcount.
    pub leaks: bool,
    /// Everything else.
    pub errors: bool,
}

impl Fix {
    /// Nothing: only look.
    pub const NONE: Self = Self { leaks: false, errors: false };
    /// `-r leaks`.
    pub const LEAKS: Self = Self { leaks: true, errors: false };
    /// `-r all`.
    pub const ALL: Self = Self { leaks: true, errors: true };

    fn any(self) -> bool {
        self.leaks || self.errors
    }
}

/// What a check found: the fields of `qemu-img check --output=json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Errors that kept the check from looking at something.
    pub check_errors: u64,
    /// Inconsistencies that endanger data.
    pub corruptions: u64,
    /// Clusters whose refcount is too high: lost space.
    pub leaks: u64,
    /// Inconsistencies that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a place in a file.
    pub allocated_clusters: u64,
    /// Clusters that do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
}

/// A check that could not go on, and what it had found by then.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// Why.
    #[source]
    pub error: io::Error,
    /// What was found.
    pub report: Report,
}

/// Checks the image in `file`, and repairs what `fix` says. Each line of the log, without its end, goes to `say`.
///
/// Nothing else may write to the file meanwhile; after a repair, whoever has read anything from it must read it anew.
/// What guest data is in does not matter, only whether it is in another file, as the header says.
///
/// # Errors
/// If the image cannot be read or written, or is too damaged to be looked at.
pub async fn check(file: &dyn Storage, fix: Fix, say: &mut dyn FnMut(&str)) -> Result<Report, Box<Failed>> {
    let checker = Checker::open(file, fix, say).await;
    let unopened = Report { check_errors: 1, ..Report::default() };
    let mut checker = checker.map_err(|error| Box::new(Failed { error, report: unopened }))?;
    match checker.run().await {
        Ok(()) => Ok(checker.report),
        Err(error) => Err(Box::new(Failed { error, report: checker.report })),
    }
}

/// One check.
struct Checker<'a> {
    file: &'a dyn Storage,
    /// The file's length in bytes, which changes by repairs only.
    length: u64,
    fix: Fix,
    say: &'a mut dyn FnMut(&str),
    report: Report,
    header: Header,
    extensions: Extensions,
    geometry: Geometry,
    /// The refcount table's entries.
    refcount_table: Vec<u64>,
    references: References,
    /// Level-2 tables that were found.
    tables: scan::Tables,
    /// Entries of level-2 tables to be made zero: offset of the table, and of the entry in it.
    misaligned: Vec<(u64, usize)>,
    /// The refcount structures cannot be repaired where they are.
    rebuild: bool,
    /// Some entry's flag COPIED may be wrong.
    copied_suspect: bool,
    /// Lines are not passed on: what is done was told of before.
    quiet: bool,
    /// One refcount block's misplacement was told of.
    told_of_misplaced_block: bool,
}

impl<'a> Checker<'a> {
    async fn open(file: &'a dyn Storage, fix: Fix, say: &'a mut dyn FnMut(&str)) -> io::Result<Self> {
        let (header, extensions) = read_header(file).await?;
        let geometry = header.geometry();
        let clusters = geometry.clusters(file.len());
        if clusters > i32::MAX as u64 {
            return Err(Errno::FBIG.into());
        }
        let mut checker = Self {
            file,
            length: file.len(),
            fix,
            say,
            report: Report { total_clusters: geometry.clusters(header.size), ..Report::default() },
            header,
            extensions,
            geometry,
            refcount_table: Vec::new(),
            references: References::default(),
            tables: scan::Tables::default(),
            misaligned: Vec::new(),
            rebuild: false,
            copied_suspect: false,
            quiet: false,
            told_of_misplaced_block: false,
        };
        checker.read_refcount_table().await?;
        Ok(checker)
    }

    async fn run(&mut self) -> io::Result<()> {
        let mut snapshots = self.read_snapshots().await?;
        let outcome = self.check_refcounts(&snapshots).await;
        self.report.corruptions += snapshots.corruptions;
        outcome?;
        self.repair_snapshots(&mut snapshots).await?;
        if self.fix.any() && self.report.check_errors == 0 && self.report.corruptions == 0 {
            self.mark_consistent().await?;
        }
        Ok(())
    }

    /// Counts references, compares, and repairs.
    async fn check_refcounts(&mut self, snapshots: &snapshots::Snapshots) -> io::Result<()> {
        self.calculate(snapshots, self.fix).await?;
        let before = self.report;
        let mut highest = self.compare(Fix::NONE).await?;
        if self.rebuild && self.fix.errors {
            highest = self.rebuild_and_compare(snapshots, highest).await?;
        } else if self.fix.any() {
            if self.rebuild {
                self.say("ERROR need to rebuild refcount structures");
                self.report.check_errors += 1;
                return Err(Errno::IO.into());
            }
            if self.report.leaks > 0 || self.report.corruptions > 0 {
                self.report = before;
                highest = self.compare(self.fix).await?;
            }
        }
        if self.copied_suspect {
            self.check_copied().await?;
        }
        self.report.image_end_offset = (highest + 1) << self.geometry.cluster_bits;
        Ok(())
    }

    /// Builds new refcount structures from the references that were counted, and then counts and compares anew.
    async fn rebuild_and_compare(
        &mut self,
        snapshots: &snapshots::Snapshots,
        highest: u64,
    ) -> io::Result<u64> {
        let before = self.report;
        self.say("Rebuilding refcount structure");
        let (mut fresh, mut highest) = (Report::default(), highest);
        let was_quiet = self.quiet;
        for round in 1.. {
            self.rebuild_refcounts().await?;
            self.rebuild = false;
            let kept = Report { corruptions: 0, leaks: 0, ..self.report };
            self.report =
                Report { allocated_clusters: 0, fragmented_clusters: 0, compressed_clusters: 0, ..kept };
            self.calculate(snapshots, Fix::NONE).await?;
            if !self.fix.leaks {
                break;
            }
            // The old structures are leaked now.
            let saved = std::mem::take(&mut self.report);
            self.copied_suspect = false;
            highest = self.compare(Fix::LEAKS).await?;
            fresh = std::mem::replace(&mut self.report, saved);
            if !self.rebuild {
                break;
            }
            if round == MOST_REBUILDS {
                self.quiet = was_quiet;
                self.say("ERROR rebuilt refcount structure is still broken");
                break;
            }
            // The file has become longer, and what was named beyond its end is in it: once more, with that counted.
            self.quiet = true;
        }
        self.quiet = was_quiet;
        self.report.corruptions += fresh.corruptions;
        self.report.check_errors += fresh.check_errors;
        self.report.corruptions_fixed += before.corruptions.saturating_sub(self.report.corruptions);
        self.report.leaks_fixed += before.leaks.saturating_sub(self.report.leaks);
        self.report.leaks += fresh.leaks;
        Ok(highest)
    }

    /// Clears the bits that say that the image may be inconsistent.
    async fn mark_consistent(&mut self) -> io::Result<()> {
        let doubt = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.header.version < 3 || !self.header.incompatible.intersects(doubt) {
            return Ok(());
        }
        self.file.flush().await?;
        self.header.incompatible.remove(doubt);
        let bits = self.header.incompatible.bits();
        self.file.write(INCOMPATIBLE_AT, &bits.to_be_bytes()).await?;
        self.file.flush().await
    }

    /// Reads the refcount table, as far as the file goes.
    async fn read_refcount_table(&mut self) -> io::Result<()> {
        let entries = u64::from(self.header.refcount_table_clusters) << (self.geometry.cluster_bits - 3);
        let offset = self.header.refcount_table_offset;
        let within = self.file.len().saturating_sub(offset).div_ceil(8).min(entries);
        let bytes = crate::storage::read_vec(self.file, offset, within as usize * 8).await?;
        self.refcount_table = bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        Ok(())
    }

    fn say(&mut self, line: impl Display) {
        if !self.quiet {
            (self.say)(&line.to_string());
        }
    }
}

/// Reads and checks the header and its extensions, as leniently as a repair needs.
async fn read_header(file: &dyn Storage) -> io::Result<(Header, Extensions)> {
    let invalid = |error: Qcow2Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut bytes = vec![0; 1024];
    file.read(0, &mut bytes).await?;
    bytes.truncate(usize::try_from(file.len()).unwrap_or(usize::MAX).min(1024));
    let mut header = Header::parse(&bytes).map_err(invalid)?;
    if bytes.len() < 1 << header.cluster_bits {
        bytes = vec![0; 1 << header.cluster_bits];
        crate::storage::read_vec(file, 0, bytes.len()).await?.clone_into(&mut bytes);
        header = Header::parse(&bytes).map_err(invalid)?;
    }
    let extensions = Extensions::parse(&header, &bytes).map_err(invalid)?;
    header.check_features(&extensions.feature_names).map_err(invalid)?;
    header.check_tables(true).map_err(invalid)?;
    Ok((header, extensions))
}

/// The text of an error's number, as the C library has it.
fn strerror(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.clone(), |(reason, _)| reason.to_owned())
}
