//! A single-threaded loop of tasks with io_uring, and the buffers that I/O goes to and comes from.
//!
//! Every thread that calls [`block_on`] has a loop of its own: tasks, timers, and operations on files and sockets.
//! Futures stay on their thread; wakers may be used from any. Operations own what the kernel reads and writes, so that
//! a future may be dropped at any time: the operation then ends without anyone looking.
//!
//! Where the kernel offers no io_uring (old ones, containers that forbid it), threads make the system calls and the
//! loop waits in poll(2): the same interface, slower.

#![allow(unsafe_code)] // memory and submission entries that the kernel reads and writes

mod at_once;
mod buffer;
mod completion;
mod delay;
mod file;
mod local_loop;
mod net;
mod pool;
mod ring;
mod timer;
mod unix;

pub use buffer::{BUFFER_ALIGNMENT, IoBuffer, IoVec, Segment};
pub use delay::{sleep, timeout};
pub use file::{Aio, IoFile};
pub use local_loop::{block_on, readable, spawn, yield_now};
pub use net::{Listener, Stream};
pub use pool::{blocking, cores, offload};

/// A task of this thread's loop: a future of its result. Dropping it ends the task; `detach` lets it run.
pub use async_task::Task;

#[cfg(test)]
mod tests;
