//! What comes to a VM from outside, where everything happens at exact counts of instructions.

use clock::Nanos;

/// A moment of a VM whose clock counts instructions ([`clock::VmClock::counted`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment {
    /// How many instructions were executed. An interrupt or exception that is delivered counts as one; a repeated
    /// string instruction counts once, when it is done.
    pub count: u64,
    /// The VM's time.
    pub time: Nanos,
}

/// How a halted vCPU gets to its next timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// The time until then is passed over.
    Skip(Nanos),
    /// It waits as long as it takes on the host, or until something comes from outside, to which the time goes on.
    Sleep,
    /// Time stands still until something comes from outside.
    Stand,
}

/// What comes to a VM from outside, for an accelerator that counts instructions. Called on the vCPU's thread, between
/// two instructions.
pub trait External: Send + Sync {
    /// Lets in what is to come in now: for the guest it comes at this moment, before the next instruction. `digest`
    /// makes a number of the processor's registers. Between two calls with the same moment no instruction was executed
    /// and nothing was delivered.
    fn at_boundary(&self, now: Moment, digest: &dyn Fn() -> u64);

    /// The count at which [`External::at_boundary`] is to be called at the latest.
    fn next_count(&self) -> u64;

    /// What a halted vCPU does until its first timer, if there is one, is due at `deadline`.
    fn idle(&self, now: Moment, deadline: Option<Nanos>) -> Idle;

    /// Whether something waits to come in.
    fn is_waiting(&self) -> bool;

    /// [`Idle::Sleep`] ended before the deadline, as something waits to come in. `now` is the time that it ended at.
    fn woke(&self, now: Moment, digest: &dyn Fn() -> u64);

    /// The vCPU's run ends.
    fn stopped(&self, now: Moment, digest: &dyn Fn() -> u64);

    /// 64 random bits.
    fn random(&self) -> u64;
}
