//! Types that commands about disks share, with QAPI's names.

use crate::error::{QmpError, Result};
use block_graph::Options;
use jobs::parameters as p;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Names of variants of `$ours`, which are those of `$theirs`.
macro_rules! words {
    ($(#[$doc:meta])* $ours:ident => $theirs:path { $($variant:ident => $target:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
        #[serde(rename_all = "kebab-case")]
        pub(super) enum $ours {
            $($variant),*
        }

        impl From<$ours> for $theirs {
            fn from(word: $ours) -> Self {
                match word {
                    $($ours::$variant => Self::$target),*
                }
            }
        }
    };
}

words! {
    /// What becomes of a job's errors.
    BlockdevOnError => p::OnError {
        Report => Report, Ignore => Ignore, Enospc => Enospc, Stop => Stop, Auto => Report,
    }
}

words! {
    /// What is copied at first.
    MirrorSyncMode => p::SyncMode {
        Top => Top, Full => Full, None => None, Incremental => Incremental, Bitmap => Bitmap,
    }
}

words! {
    /// When what is written reaches a copy.
    MirrorCopyMode => p::CopyMode { Background => Background, WriteBlocking => WriteBlocking }
}

words! {
    /// Whether an image is made.
    NewImageMode => p::NewImageMode { Existing => Existing, AbsolutePaths => AbsolutePaths }
}

words! {
    /// What becomes of a bitmap that a backup went by.
    BitmapSyncMode => p::BitmapMode { OnSuccess => OnSuccess, Never => Never, Always => Always }
}

words! {
    /// What becomes of a guest's write if what it overwrites cannot be saved.
    OnCbwError => p::OnCbwError { BreakGuestWrite => BreakGuestWrite, BreakSnapshot => BreakSnapshot }
}

/// Options of a node as the block layer takes them.
pub(super) fn options(members: Map<String, Value>) -> Result<Options> {
    Ok(Options::from_json(&Value::Object(members).to_string())?)
}

/// A device's or node's name, of two members of which one is to be given.
pub(super) fn device_or_node(device: Option<String>, node_name: Option<String>) -> Result<String> {
    match (device, node_name) {
        (Some(name), None) | (None, Some(name)) => Ok(name),
        (device, node_name) => Err(QmpError::generic(format!(
            "Cannot find device='{}' nor node-name='{}'",
            device.unwrap_or_default(),
            node_name.unwrap_or_default()
        ))),
    }
}
