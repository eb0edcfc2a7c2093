//! Why KVM cannot be had, and what it says when it refuses.

use accel::AccelError;
use serde::Serialize;
use std::io;
use std::path::PathBuf;

/// The accelerator's name, on command lines and in its errors.
pub(crate) const NAME: &str = "kvm";

/// An error of `kvm-ioctls` as the kernel's.
pub(crate) fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// Makes an [`AccelError`] of an error of `kvm-ioctls`: `what` was wanted.
pub(crate) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> AccelError {
    move |error| AccelError::Host { what, source: errno(error) }
}

/// Makes an [`AccelError`] of the host's: `what` was wanted.
pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> AccelError {
    move |source| AccelError::Host { what, source }
}

/// Why KVM cannot be had on this host, or not for what is wanted of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KvmUnavailable {
    /// The device file does not exist.
    #[error(
        "there is no {path}: load the kernel module kvm_intel or kvm_amd; if that fails, switch \
         virtualization on in the firmware"
    )]
    NoDevice {
        /// The device file.
        path: PathBuf,
    },
    /// The device file cannot be opened by this user.
    #[error("no permission to open {path}: join its group (often `kvm`), or have the administrator allow it")]
    NoPermission {
        /// The device file.
        path: PathBuf,
    },
    /// The device file cannot be opened for another reason.
    #[error("{path} cannot be opened: {reason}")]
    Open {
        /// The device file.
        path: PathBuf,
        /// The host's reason.
        reason: String,
    },
    /// The file is not KVM's.
    #[error("{path} is not KVM's device")]
    NotKvm {
        /// The file.
        path: PathBuf,
    },
    /// An API other than the stable one.
    #[error("the host's KVM has API version {found}; {expected} is needed: the kernel is too old")]
    ApiVersion {
        /// The host's.
        found: i32,
        /// The stable one.
        expected: i32,
    },
    /// Something that is always needed is missing.
    #[error("the host's KVM lacks {name}: the kernel is too old or was built without it")]
    MissingCapability {
        /// The capability's name in the kernel's documentation, without `KVM_CAP_`.
        name: &'static str,
    },
    /// No virtualization extensions stand behind the device.
    #[error(
        "the processor has neither VT-x nor AMD-V, so that the host's KVM ({module}) emulates privileged code, \
         too slowly and incompletely for a stock kernel"
    )]
    Software {
        /// The kernel module that stands in, or what is known of it.
        module: String,
    },
}
