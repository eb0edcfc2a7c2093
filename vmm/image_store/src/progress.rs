//! How a caller follows what takes long.

/// Told of each step. Nothing here draws anything.
pub trait Progress {
    /// A step begins, such as "Fetching linux-image-…"; `total` is its length in bytes where it's known.
    fn begin(&self, what: &str, total: Option<u64>);
    /// `bytes` more of the step are done.
    fn advance(&self, bytes: u64);
    /// The step is done.
    fn end(&self);
}

/// Tells no one.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn begin(&self, _what: &str, _total: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn end(&self) {}
}
