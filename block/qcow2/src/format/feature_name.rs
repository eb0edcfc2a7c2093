//! The feature name table's entries (section "Feature name table").

/// Bytes of an entry.
pub(crate) const FEATURE_ENTRY: usize = 48;

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0: incompatible, 1: compatible, 2: autoclear.
    pub kind: u8,
    /// The feature's bit.
    pub bit: u8,
    /// Its name, padded with zeros.
    pub name: [u8; FEATURE_ENTRY - 2],
}

impl FeatureName {
    /// An entry; of `name`, the first 46 bytes are taken.
    pub fn new(kind: u8, bit: u8, name: &str) -> Self {
        let mut padded = [0; FEATURE_ENTRY - 2];
        let length = name.len().min(padded.len());
        padded[..length].copy_from_slice(&name.as_bytes()[..length]);
        Self { kind, bit, name: padded }
    }

    /// The name as text.
    pub fn text(&self) -> String {
        let length = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..length]).into_owned()
    }

    /// The names of all features that this implementation knows: what it writes into images of version 3.
    pub fn known() -> Vec<Self> {
        [
            (0, 0, "dirty bit"),
            (0, 1, "corrupt bit"),
            (0, 2, "external data file"),
            (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"),
            (2, 1, "raw external data"),
        ]
        .into_iter()
        .map(|(kind, bit, name)| Self::new(kind, bit, name))
        .collect()
    }
}
