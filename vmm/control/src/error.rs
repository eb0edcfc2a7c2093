//! What a command answers if it fails.

use serde_json::{Value, json};

/// The classes of errors that clients tell apart (QMP specification, 2.4.2; QAPI's `QapiErrorClass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Anything that has no class of its own: what people are told stands in the description.
    Generic,
    /// There is no such command, or not now.
    CommandNotFound,
    /// A device is not in the state that the command wants.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// A command's error: its class, and a description for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{description}")]
pub struct QmpError {
    /// The class.
    pub class: ErrorClass,
    /// What went wrong.
    pub description: String,
}

/// The result of commands.
pub(crate) type Result<T> = std::result::Result<T, QmpError>;

impl QmpError {
    /// An error of the class `GenericError`.
    pub fn generic(description: impl Into<String>) -> Self {
        Self { class: ErrorClass::Generic, description: description.into() }
    }

    /// An error of another class.
    pub fn new(class: ErrorClass, description: impl Into<String>) -> Self {
        Self { class, description: description.into() }
    }

    /// The value of `error` in an answer.
    pub fn to_json(&self) -> Value {
        json!({ "class": self.class.name(), "desc": self.description })
    }
}

impl From<block_graph::Error> for QmpError {
    fn from(error: block_graph::Error) -> Self {
        Self::generic(error.to_string())
    }
}
