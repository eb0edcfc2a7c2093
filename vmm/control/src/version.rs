//! The version, as clients are told it.

use schemars::JsonSchema;
use serde::Serialize;

/// A version in three numbers.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub(crate) struct VersionTriple {
    /// Changes with what is not compatible.
    major: u32,
    /// Changes with what is new.
    minor: u32,
    /// Changes with what is mended.
    micro: u32,
}

/// What `query-version` and the greeting say.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub(crate) struct VersionInfo {
    /// The version of the emulator, under the member's name that clients know.
    qemu: VersionTriple,
    /// The program.
    package: &'static str,
}

/// The version that clients are told. The numbers are those of the QEMU release whose commands the ones here are shaped
/// after, since that is what clients decide by; `package` says what answers.
pub(crate) fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 0 },
        package: concat!("vireo ", env!("CARGO_PKG_VERSION")),
    }
}
