//! Cache modes by name.

/// How the host's cache is used for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the page cache; flushes count.
    None,
    /// Past the page cache, and every write is on stable storage when it ends.
    DirectSync,
    /// Through the page cache; flushes count.
    WriteBack,
    /// Through the page cache, and every write is on stable storage when it ends.
    WriteThrough,
    /// Through the page cache; flushes do nothing.
    Unsafe,
}

impl CacheMode {
    /// All of them with their names. `off` is an old one of `none`.
    pub const NAMES: [(&'static str, Self); 6] = [
        ("none", Self::None),
        ("off", Self::None),
        ("directsync", Self::DirectSync),
        ("writeback", Self::WriteBack),
        ("writethrough", Self::WriteThrough),
        ("unsafe", Self::Unsafe),
    ];

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }
}

#[cfg(test)]
mod tests {
    use super::CacheMode;

    #[test]
    fn modes_have_names() {
        assert_eq!(CacheMode::from_name("off"), Some(CacheMode::None));
        assert_eq!(CacheMode::from_name("unsafe"), Some(CacheMode::Unsafe));
        assert_eq!(CacheMode::from_name("Unsafe"), None);
    }
}
