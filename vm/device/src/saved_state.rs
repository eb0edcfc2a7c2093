//! The saved state of one device: a kind, a version and bytes.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The most bytes that one device's saved state may have, 64 MiB: a stream that claims more is refused.
pub const MAX_STATE_LEN: usize = 64 << 20;

/// One device's guest-visible state, as it stands in a migration stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The device's [`kind`](crate::Device::kind).
    pub kind: String,
    /// The version of the format of `bytes`.
    pub version: u32,
    /// The state itself, in the format that `kind` and `version` name.
    pub bytes: Vec<u8>,
}

/// Why a saved state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The state is another device's.
    #[error("saved state is of kind {found:?}, and this device is a {expected:?}")]
    WrongKind {
        /// The device's own kind.
        expected: &'static str,
        /// The kind in the state.
        found: String,
    },
    /// The state was written by a newer program.
    #[error("saved state of {kind} has version {found}, and this program reads versions up to {newest}")]
    UnknownVersion {
        /// The device's kind.
        kind: &'static str,
        /// The version in the state.
        found: u32,
        /// The newest version that is understood.
        newest: u32,
    },
    /// The bytes are no state of this device.
    #[error("saved state of {kind} is damaged: {reason}")]
    Malformed {
        /// The device's kind.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl StateError {
    /// A [`StateError::Malformed`].
    pub fn malformed(kind: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { kind, reason: reason.into() }
    }
}

/// The saved state of `kind` that holds `value`.
pub fn encode<T: Serialize>(kind: &'static str, version: u32, value: &T) -> SavedState {
    let bytes = postcard::to_allocvec(value).expect("plain data always encodes");
    SavedState { kind: kind.to_owned(), version, bytes }
}

/// What [`encode`] put into `state`, if it is of this `kind` and `version`.
///
/// # Errors
/// [`StateError`] if kind or version differ or the bytes are not a `T` and nothing else.
pub fn decode<T: DeserializeOwned>(
    kind: &'static str,
    version: u32,
    state: &SavedState,
) -> Result<T, StateError> {
    if state.kind != kind {
        return Err(StateError::WrongKind { expected: kind, found: state.kind.clone() });
    }
    if state.version != version {
        return Err(StateError::UnknownVersion { kind, found: state.version, newest: version });
    }
    if state.bytes.len() > MAX_STATE_LEN {
        return Err(StateError::malformed(kind, format!("{} bytes are too many", state.bytes.len())));
    }
    match postcard::take_from_bytes(&state.bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(StateError::malformed(kind, format!("{} bytes too many", rest.len()))),
        Err(error) => Err(StateError::malformed(kind, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_and_nothing_else_does() {
        let state = encode("thing", 2, &(7u32, vec![1u8, 2]));
        assert_eq!(decode::<(u32, Vec<u8>)>("thing", 2, &state), Ok((7, vec![1, 2])));
        assert!(matches!(decode::<(u32, Vec<u8>)>("other", 2, &state), Err(StateError::WrongKind { .. })));
        assert!(matches!(
            decode::<(u32, Vec<u8>)>("thing", 1, &state),
            Err(StateError::UnknownVersion { .. })
        ));
        let mut longer = state.clone();
        longer.bytes.push(0);
        assert!(decode::<(u32, Vec<u8>)>("thing", 2, &longer).is_err());
        let mut shorter = state;
        shorter.bytes.pop();
        assert!(decode::<(u32, Vec<u8>)>("thing", 2, &shorter).is_err());
    }
}
