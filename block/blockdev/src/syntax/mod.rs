//! How options of block devices are written: `key=value,key=value`, sizes, and JSON.

pub mod json;
pub mod list;
pub mod size;
