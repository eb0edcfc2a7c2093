//! Direct jumps of a block, which can be linked to other blocks.

/// A direct jump that was written.
#[derive(Debug, Clone)]
pub(crate) struct NewLink {
    /// The displacement that is patched.
    pub(crate) field: u64,
    /// Where it leads while it is not linked.
    pub(crate) stub: u64,
    /// Target, from the beginning of the page.
    pub(crate) target: i64,
    /// Whether the flags are in memory when it is taken.
    pub(crate) memory: bool,
    /// The number to compare with before a jump to another page.
    pub(crate) check: Option<u64>,
    /// The slot that says whether a jump between pages of user code is verified.
    pub(crate) slot: Option<u16>,
    /// Leads to a block whose accesses share no checks.
    pub(crate) ungrouped: bool,
    /// Where the link's number is loaded.
    pub(crate) numbers: Vec<u64>,
}
