//! What generated code and Rust code agree on: the vCPU's block that GS points to, where guest registers are,
//! why generated code is left, and what it calls with what.

pub(crate) mod calls;
pub(crate) mod counters;
pub(crate) mod layout;
pub(crate) mod stubs;
