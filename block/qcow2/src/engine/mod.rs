//! The engine: an open image's state, and every operation on it.
//!
//! # The order of writes
//! Tables are changed in memory and written by [`writeback`], always in this order, with a flush of the file between
//! each two steps that have something to do:
//! 1. guest data (written by the requests themselves, before they name it in an L2 table in memory), and refcount
//!    blocks, in which so far refcounts have only grown;
//! 2. entries of the refcount table that name new blocks;
//! 3. L2 tables;
//! 4. entries of the L1 table that name new L2 tables;
//! 5. and now that nothing in the file names them any more, refcounts of freed clusters shrink in memory.
//!
//! A crash at any point thus leaves clusters that are counted and not used, and never the other way round. With lazy
//! refcounts, the dirty bit says that refcounts are behind, and the first two steps wait until the image is closed.
//!
//! # Locks
//! Requests on allocated clusters take locks only for moments, never across I/O. Allocation goes through one
//! asynchronous lock ([`allocator::Allocator`]); two requests that allocate the same guest cluster wait for each other
//! ([`requests::Claims`]); operations that change everything (snapshots, shrinking) are alone
//! ([`requests::Requests::exclusive`]).

mod allocate;
pub(crate) mod allocator;
pub(crate) mod cache;
pub(crate) mod clusters;
pub(crate) mod compressed;
pub(crate) mod copy;
pub(crate) mod corruption;
pub(crate) mod crypt;
pub(crate) mod decompressed;
pub(crate) mod discard;
pub(crate) mod empty;
pub(crate) mod finish;
mod free;
pub(crate) mod frees;
mod host_data;
pub(crate) mod load;
mod mark_corrupt;
pub(crate) mod metadata_map;
mod parts;
pub(crate) mod read;
pub(crate) mod refcounts;
pub(crate) mod requests;
pub(crate) mod resize;
pub(crate) mod snapshots;
pub(crate) mod state;
pub(crate) mod status;
pub(crate) mod update_header;
mod wakers;
pub(crate) mod write;
pub(crate) mod writeback;
