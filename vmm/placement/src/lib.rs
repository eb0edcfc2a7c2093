//! Where a VM's threads run on the host: on which processors, under which scheduling policy, and how much
//! processor time they take.
//!
//! A [`PlacementSpec`] is plain data; [`Placement::new`] checks it against the guest and the host. Each
//! thread then places itself: vCPU threads with [`Placement::place_vcpu`], all others with
//! [`Placement::place_io`]. A [`CpuMeter`] tells what they took.

mod cpu_list;
mod cpu_meter;
mod error;
mod host;
mod placement;
mod spec;
mod thread;

pub use cpu_list::{CpuList, CpuListError, MAX_CPU};
pub use cpu_meter::{CpuMeter, CpuTime, Measuring};
pub use error::PlacementError;
pub use placement::Placement;
pub use spec::{Pin, PlacementSpec, Schedule, SchedulingPolicy, SpecError, Target};
