//! All block drivers, how images are named and opened, and what is done with whole images.

pub mod chain;
pub mod compare;
pub mod convert;
pub mod create;
pub mod filename;
pub mod info;
pub mod list_options;
pub mod overlay;
mod registry;
pub mod secret;
pub mod status;
pub mod syntax;
pub mod zero_runs;

pub use registry::registry;

/// Says on standard error that a file which may be written was taken for a raw image for want of anything better: a
/// guest could make it look like another format.
pub fn warn_of_probed_raw(name: &str) {
    eprintln!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
         restricted.\n         Specify the 'raw' format explicitly to remove the restrictions."
    );
}
