//! What can be wrong with a peer's bytes.

use thiserror::Error;

/// A peer broke the protocol. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// Not the number that a message begins with.
    #[error("bad magic {found:#x} in {message}")]
    Magic {
        /// The message.
        message: &'static str,
        /// What stood there.
        found: u64,
    },
    /// A message ended before its fields did.
    #[error("{message} is too short")]
    Short {
        /// The message.
        message: &'static str,
    },
    /// A message has more bytes than its fields.
    #[error("{message} has {extra} bytes too many")]
    Extra {
        /// The message.
        message: &'static str,
        /// How many bytes.
        extra: usize,
    },
    /// A length is above its bound.
    #[error("{field} of {found} exceeds {limit}")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// A string is not UTF-8, or has a NUL.
    #[error("{field} is not a valid string")]
    Text {
        /// The field.
        field: &'static str,
    },
    /// A field has a value that it must not have.
    #[error("{field} must not be {found:#x}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// A message that does not belong where it came.
    #[error("unexpected {message}")]
    Unexpected {
        /// The message.
        message: String,
    },
    /// Chunks of a read lie outside of it, or over each other, or do not fill it.
    #[error("chunks of a read {what}")]
    Coverage {
        /// What they do.
        what: &'static str,
    },
}
