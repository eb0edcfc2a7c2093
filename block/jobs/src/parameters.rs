//! What jobs and other operations are told. Fields are named as in QAPI, with `_` for `-`; what is `None` is what QEMU
//! takes where a field is missing.

use block_graph::Options;

/// What becomes of errors. The names are those of QAPI's `BlockdevOnError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// It goes on: by trying again, or leaving it out.
    Ignore,
    /// It is paused.
    Stop,
    /// It is paused for want of space, and fails otherwise.
    Enospc,
}

impl OnError {
    /// The one of this name; `auto` is [`OnError::Report`] for jobs.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "report" | "auto" => Self::Report,
            "ignore" => Self::Ignore,
            "stop" => Self::Stop,
            "enospc" => Self::Enospc,
            _ => return None,
        })
    }
}

/// What every job is told.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Its id; else that of the device.
    pub job_id: Option<String>,
    /// The most bytes a second; 0 for no limit.
    pub speed: u64,
    /// It changes the graph without being asked again.
    pub auto_finalize: bool,
    /// It goes when it has ended.
    pub auto_dismiss: bool,
    /// The name of the node that QEMU would put above the disk. No node is needed here; the name must be free.
    pub filter_node_name: Option<String>,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self { job_id: None, speed: 0, auto_finalize: true, auto_dismiss: true, filter_node_name: None }
    }
}

/// `block-commit`.
#[derive(Debug, Clone, Default)]
pub struct BlockCommit {
    /// What every job is told.
    pub job: JobOptions,
    /// The device or node whose chain it is.
    pub device: String,
    /// The node that data go to; else the lowest.
    pub base_node: Option<String>,
    /// The same, by file name.
    pub base: Option<String>,
    /// The uppermost node that data come from; else that of the device.
    pub top_node: Option<String>,
    /// The same, by file name.
    pub top: Option<String>,
    /// What is recorded as backing file in the image above the top.
    pub backing_file: Option<String>,
    /// What becomes of errors.
    pub on_error: OnError,
}

/// `block-stream`.
#[derive(Debug, Clone, Default)]
pub struct BlockStream {
    /// What every job is told.
    pub job: JobOptions,
    /// The device or node that data go to.
    pub device: String,
    /// The node of its chain whose data stay there; else data of all come.
    pub base_node: Option<String>,
    /// The same, by file name.
    pub base: Option<String>,
    /// The last node whose data come.
    pub bottom: Option<String>,
    /// What is recorded as backing file.
    pub backing_file: Option<String>,
    /// What becomes of errors.
    pub on_error: OnError,
}

/// What is copied at first. The names are those of QAPI's `MirrorSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    /// What the uppermost image has.
    Top,
    /// All.
    #[default]
    Full,
    /// Nothing.
    None,
    /// What is dirty in a bitmap, which is clean afterwards.
    Incremental,
    /// What is dirty in a bitmap.
    Bitmap,
}

impl SyncMode {
    /// The one of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "top" => Self::Top,
            "full" => Self::Full,
            "none" => Self::None,
            "incremental" => Self::Incremental,
            "bitmap" => Self::Bitmap,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Top => "top",
            Self::Full => "full",
            Self::None => "none",
            Self::Incremental => "incremental",
            Self::Bitmap => "bitmap",
        }
    }
}

/// When what is written reaches the copy. The names are those of QAPI's `MirrorCopyMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// Some time later.
    #[default]
    Background,
    /// Before the write ends.
    WriteBlocking,
}

/// Whether an image is made. The names are those of QAPI's `NewImageMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made, and names its backing file by an absolute path.
    #[default]
    AbsolutePaths,
}

/// What `blockdev-mirror` and `drive-mirror` have in common.
#[derive(Debug, Clone, Default)]
pub struct Mirror {
    /// What every job is told.
    pub job: JobOptions,
    /// The device or node that is copied.
    pub device: String,
    /// The node that the copy takes the place of, if it is not that of the device.
    pub replaces: Option<String>,
    /// What is copied at first.
    pub sync: SyncMode,
    /// For [`SyncMode::Incremental`] and [`SyncMode::Bitmap`]: the bitmap. (QEMU has no such mirrors.)
    pub bitmap: Option<String>,
    /// Bytes of which one that is written has all copied again.
    pub granularity: Option<u32>,
    /// The most bytes in memory.
    pub buf_size: Option<u64>,
    /// What becomes of errors when reading.
    pub on_source_error: OnError,
    /// What becomes of errors when writing.
    pub on_target_error: OnError,
    /// When what is written reaches the copy.
    pub copy_mode: CopyMode,
    /// The target reads as zeroes.
    pub target_is_zero: bool,
}

/// `blockdev-mirror`.
#[derive(Debug, Clone, Default)]
pub struct BlockdevMirror {
    /// What is copied, and how.
    pub mirror: Mirror,
    /// The node that data go to.
    pub target: String,
}

/// An image for `drive-mirror` and `drive-backup`.
#[derive(Debug, Clone, Default)]
pub struct NewTarget {
    /// Its file name.
    pub target: String,
    /// Its format; else that of the source, or for those that exist what its first bytes say.
    pub format: Option<String>,
    /// The name of its node.
    pub node_name: Option<String>,
    /// Whether it is made.
    pub mode: NewImageMode,
}

/// `drive-mirror`.
#[derive(Debug, Clone, Default)]
pub struct DriveMirror {
    /// What is copied, and how.
    pub mirror: Mirror,
    /// The image that data go to.
    pub target: NewTarget,
}

/// What becomes of a bitmap that a backup went by. The names are those of QAPI's `BitmapSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// If the backup succeeds, only what was written since its start is dirty.
    OnSuccess,
    /// It stays as it is.
    Never,
    /// What was copied is clean, whether the backup succeeds or not.
    Always,
}

impl BitmapMode {
    /// The one of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "on-success" => Self::OnSuccess,
            "never" => Self::Never,
            "always" => Self::Always,
            _ => return None,
        })
    }
}

/// What becomes of a guest's write if what it overwrites cannot be saved. The names are those of QAPI's
/// `OnCbwError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCbwError {
    /// It fails.
    #[default]
    BreakGuestWrite,
    /// It succeeds, and the backup fails.
    BreakSnapshot,
}

/// What `blockdev-backup` and `drive-backup` have in common.
#[derive(Debug, Clone, Default)]
pub struct Backup {
    /// What every job is told.
    pub job: JobOptions,
    /// The device or node that is copied.
    pub device: String,
    /// What is copied.
    pub sync: SyncMode,
    /// The bitmap that says it.
    pub bitmap: Option<String>,
    /// What becomes of that.
    pub bitmap_mode: Option<BitmapMode>,
    /// What is copied is stored compressed.
    pub compress: bool,
    /// What becomes of errors when reading.
    pub on_source_error: OnError,
    /// What becomes of errors when writing.
    pub on_target_error: OnError,
    /// What becomes of a guest's write if what it overwrites cannot be saved.
    pub on_cbw_error: OnCbwError,
    /// The most requests at once (`x-perf`); 0 for the default.
    pub max_workers: u32,
    /// The most bytes of one copy (`x-perf`); 0 for the default.
    pub max_chunk: u64,
}

/// `blockdev-backup`.
#[derive(Debug, Clone, Default)]
pub struct BlockdevBackup {
    /// What is copied, and how.
    pub backup: Backup,
    /// The node that data go to.
    pub target: String,
}

/// `drive-backup`.
#[derive(Debug, Clone, Default)]
pub struct DriveBackup {
    /// What is copied, and how.
    pub backup: Backup,
    /// The image that data go to.
    pub target: NewTarget,
}

/// `blockdev-snapshot-sync`.
#[derive(Debug, Clone, Default)]
pub struct SnapshotSync {
    /// The device or node.
    pub device: String,
    /// The file of the image that is written to from now on.
    pub snapshot_file: String,
    /// The name of its node.
    pub snapshot_node_name: Option<String>,
    /// Its format; else qcow2.
    pub format: Option<String>,
    /// Whether it is made.
    pub mode: NewImageMode,
}

/// `blockdev-snapshot`.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The node that is not written to any more.
    pub node: String,
    /// The one that stands above it instead; it has no backing file yet.
    pub overlay: String,
}

/// `blockdev-snapshot-internal-sync`.
#[derive(Debug, Clone, Default)]
pub struct SnapshotInternal {
    /// The device or node.
    pub device: String,
    /// The snapshot's name.
    pub name: String,
}

/// `block-dirty-bitmap-add`.
#[derive(Debug, Clone, Default)]
pub struct BitmapAdd {
    /// The device or node.
    pub node: String,
    /// The bitmap's name.
    pub name: String,
    /// Bytes of each bit.
    pub granularity: Option<u32>,
    /// It is stored in the image.
    pub persistent: bool,
    /// It records nothing at first.
    pub disabled: bool,
}

/// A bitmap of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitmapName {
    /// The device or node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// `block-dirty-bitmap-merge`.
#[derive(Debug, Clone, Default)]
pub struct BitmapMerge {
    /// The device or node.
    pub node: String,
    /// The bitmap that becomes dirty.
    pub target: String,
    /// Those whose dirty parts it takes.
    pub bitmaps: Vec<BitmapName>,
}

/// An action of a transaction. The names are those of QAPI's `TransactionActionKind`.
#[derive(Debug, Clone)]
pub enum Action {
    /// Nothing, but that it fails if the transaction is carried out (`abort`).
    Abort,
    /// `block-dirty-bitmap-add`.
    BitmapAdd(BitmapAdd),
    /// `block-dirty-bitmap-remove`.
    BitmapRemove(BitmapName),
    /// `block-dirty-bitmap-clear`.
    BitmapClear(BitmapName),
    /// `block-dirty-bitmap-enable`.
    BitmapEnable(BitmapName),
    /// `block-dirty-bitmap-disable`.
    BitmapDisable(BitmapName),
    /// `block-dirty-bitmap-merge`.
    BitmapMerge(BitmapMerge),
    /// `blockdev-backup`.
    BlockdevBackup(BlockdevBackup),
    /// `drive-backup`.
    DriveBackup(DriveBackup),
    /// `blockdev-snapshot`.
    Snapshot(Snapshot),
    /// `blockdev-snapshot-sync`.
    SnapshotSync(SnapshotSync),
    /// `blockdev-snapshot-internal-sync`.
    SnapshotInternal(SnapshotInternal),
}

/// How the jobs of a transaction end. The names are those of QAPI's `ActionCompletionMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompletionMode {
    /// Each for itself.
    #[default]
    Individual,
    /// All or none.
    Grouped,
}

/// `change-backing-file`.
#[derive(Debug, Clone, Default)]
pub struct ChangeBackingFile {
    /// The device or node whose chain it is.
    pub device: String,
    /// The node whose image is changed.
    pub image_node_name: String,
    /// What is recorded.
    pub backing_file: String,
}

/// `blockdev-create`: the options of a driver's creation, as text.
#[derive(Debug, Clone, Default)]
pub struct BlockdevCreate {
    /// The job's id.
    pub job_id: String,
    /// The driver.
    pub driver: String,
    /// The image's file name.
    pub filename: String,
    /// What its driver is told.
    pub options: Options,
}
