//! Images that go between this crate and the installed qemu-img and qemu-io. Where these are absent, each test says
//! that it is skipped.

mod bitmaps;
mod check;
mod create;
mod matrix;
mod oracle;
