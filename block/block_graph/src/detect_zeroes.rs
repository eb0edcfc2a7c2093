//! Writes of zeroes that become requests for zeroes.

/// What a write becomes whose bytes are all zero (`detect-zeroes`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// A write like any other; nothing is looked at.
    #[default]
    Off,
    /// A request for zeroes that keep their space.
    On,
    /// A request for zeroes that may give up their space. It goes with discards that are passed on only.
    Unmap,
}

impl DetectZeroes {
    /// The mode of that name: `off`, `on` or `unmap`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "on" => Some(Self::On),
            "unmap" => Some(Self::Unmap),
            _ => None,
        }
    }
}
