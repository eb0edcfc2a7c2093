//! What all jobs have in common: a state, progress, speed, and what people ask of them.

use crate::event::{ErrorAction, Event, IoStatus, JobProgress, JobStatus, JobType, Verb};
use crate::parameters::{JobOptions, OnError};
use block_graph::{Errno, Error, Result, async_trait};
use futures_util::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// How long a job waits before it tries again what failed and is to be ignored.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a job does, in the order in which it is called.
#[async_trait(?Send)]
pub(crate) trait Work {
    /// Does the work.
    async fn run(&self, job: &Job) -> Result<()>;

    /// All of the group have done their work: what changes the graph and may fail.
    async fn prepare(&self, _job: &Job) -> Result<()> {
        Ok(())
    }

    /// All of the group are prepared.
    async fn commit(&self) {}

    /// It failed, or was cancelled, or another of the group did.
    async fn abort(&self) {}

    /// After either of these.
    async fn clean(&self) {}

    /// Whether a cancellation that is not forced only ends a job that is ready, as its own way to complete.
    fn ends_when_cancelled(&self) -> bool {
        false
    }

    /// Whether all that is written reaches the copy before the write ends; `None` for jobs that do not follow writes.
    fn actively_synced(&self) -> Option<bool> {
        None
    }

    /// Has every write reach the copy before it ends.
    fn write_blocking(&self) -> Result<()> {
        Err(Error::unsupported("Job type does not support change"))
    }
}

/// What a job is, as `query-jobs` and `query-block-jobs` show it.
#[derive(Debug, Clone)]
pub struct JobInfo {
    /// What it does.
    pub kind: JobType,
    /// Its id.
    pub id: String,
    /// Its state.
    pub status: JobStatus,
    /// What is done, in bytes.
    pub offset: u64,
    /// What is to be done, in bytes.
    pub len: u64,
    /// The most bytes a second; 0 if there is no limit.
    pub speed: u64,
    /// It works at the moment.
    pub busy: bool,
    /// It was asked to pause.
    pub paused: bool,
    /// It may be completed.
    pub ready: bool,
    /// What its last errors mean.
    pub io_status: IoStatus,
    /// It is finalized without being asked.
    pub auto_finalize: bool,
    /// It goes when it has ended.
    pub auto_dismiss: bool,
    /// For mirrors, whether writes reach the copy before they end.
    pub actively_synced: Option<bool>,
    /// Why it failed.
    pub error: Option<Error>,
}

/// A job.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) kind: JobType,
    auto_finalize: bool,
    auto_dismiss: bool,
    status: Cell<JobStatus>,
    paused: Cell<bool>,
    cancelled: Cell<bool>,
    forced: Cell<bool>,
    completing: Cell<bool>,
    finalizing: Cell<bool>,
    io_status: Cell<IoStatus>,
    done: Cell<u64>,
    total: Cell<u64>,
    speed: Cell<u64>,
    pace: Cell<Instant>,
    /// What its work came to.
    pub(crate) result: RefCell<Option<Result<()>>>,
    pub(crate) group: RefCell<Option<Rc<Group>>>,
    pub(crate) work: Box<dyn Work>,
    generation: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
    listener: Arc<dyn Fn(Event) + Send + Sync>,
}

impl Job {
    pub(crate) fn new(
        id: String,
        kind: JobType,
        options: &JobOptions,
        work: Box<dyn Work>,
        listener: Arc<dyn Fn(Event) + Send + Sync>,
    ) -> Rc<Self> {
        let job = Rc::new(Self {
            id,
            kind,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            status: Cell::new(JobStatus::Created),
            paused: Cell::new(false),
            cancelled: Cell::new(false),
            forced: Cell::new(false),
            completing: Cell::new(false),
            finalizing: Cell::new(false),
            io_status: Cell::default(),
            done: Cell::new(0),
            total: Cell::new(0),
            speed: Cell::new(options.speed),
            pace: Cell::new(Instant::now()),
            result: RefCell::new(None),
            group: RefCell::new(None),
            work,
            generation: Cell::new(0),
            waiting: RefCell::default(),
            listener,
        });
        job.tell(Event::StatusChange { id: job.id.clone(), status: JobStatus::Created });
        job
    }

    pub(crate) fn tell(&self, event: Event) {
        (self.listener)(event);
    }

    pub(crate) fn status(&self) -> JobStatus {
        self.status.get()
    }

    /// Takes another state.
    pub(crate) fn become_(&self, status: JobStatus) {
        let old = self.status.replace(status);
        debug_assert!(old.leads_to(status), "job {}: {old:?} to {status:?}", self.id);
        self.tell(Event::StatusChange { id: self.id.clone(), status });
        self.notify();
    }

    pub(crate) fn auto_finalize(&self) -> bool {
        self.auto_finalize
    }

    pub(crate) fn auto_dismiss(&self) -> bool {
        self.auto_dismiss
    }

    pub(crate) fn progress(&self) -> JobProgress {
        JobProgress {
            kind: self.kind,
            id: self.id.clone(),
            len: self.total.get(),
            offset: self.done.get(),
            speed: self.speed.get(),
        }
    }

    pub(crate) fn info(&self) -> JobInfo {
        let status = self.status.get();
        JobInfo {
            kind: self.kind,
            id: self.id.clone(),
            status,
            offset: self.done.get(),
            len: self.total.get(),
            speed: self.speed.get(),
            busy: matches!(status, JobStatus::Running | JobStatus::Ready),
            paused: self.paused.get(),
            ready: matches!(status, JobStatus::Ready | JobStatus::Standby),
            io_status: self.io_status.get(),
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            actively_synced: self.work.actively_synced(),
            error: self.result.borrow().as_ref().and_then(|result| result.as_ref().err().cloned()),
        }
    }

    /// Whether it can be asked for that now.
    ///
    /// # Errors
    /// That it cannot.
    pub(crate) fn check(&self, verb: Verb) -> Result<()> {
        let status = self.status.get();
        if verb.fits(status) {
            return Ok(());
        }
        Err(Error::new(
            Errno::NOT_PERMITTED,
            format!(
                "Job '{}' in state '{}' cannot accept command verb '{}'",
                self.id,
                status.name(),
                verb.name()
            ),
        ))
    }

    // What people ask.

    pub(crate) fn pause(&self) -> Result<()> {
        self.check(Verb::Pause)?;
        if self.paused.replace(true) {
            return Err(Error::invalid("Job is already paused"));
        }
        self.notify();
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<()> {
        if !self.paused.get() {
            return Err(Error::invalid("Can't resume a job that was not paused"));
        }
        self.check(Verb::Resume)?;
        self.go_on();
        Ok(())
    }

    fn go_on(&self) {
        self.io_status.set(IoStatus::Ok);
        self.paused.set(false);
        self.notify();
    }

    pub(crate) fn set_speed(&self, speed: u64) -> Result<()> {
        self.check(Verb::SetSpeed)?;
        self.speed.set(speed);
        self.pace.set(Instant::now());
        self.notify();
        Ok(())
    }

    /// Has it end without its purpose; one that is ready and not forced ends as its kind does then.
    pub(crate) fn cancel(&self, force: bool) {
        let ready = matches!(self.status.get(), JobStatus::Ready | JobStatus::Standby);
        self.go_on();
        self.cancelled.set(true);
        if force || !(ready && self.work.ends_when_cancelled()) {
            self.forced.set(true);
        }
        self.notify();
    }

    pub(crate) fn complete(&self) -> Result<()> {
        self.check(Verb::Complete)?;
        if self.cancelled.get() {
            return Err(Error::invalid(format!("The active block job '{}' cannot be completed", self.id)));
        }
        self.completing.set(true);
        self.notify();
        Ok(())
    }

    pub(crate) fn finalize(&self) -> Result<()> {
        self.check(Verb::Finalize)?;
        self.finalizing.set(true);
        self.notify();
        Ok(())
    }

    pub(crate) fn is_finalizing(&self) -> bool {
        self.finalizing.get()
    }

    /// It has ended, and is no longer of its group: they would hold each other for ever.
    pub(crate) fn leave(self: &Rc<Self>) {
        if let Some(group) = self.group.borrow_mut().take() {
            group.jobs.borrow_mut().retain(|other| !Rc::ptr_eq(other, self));
        }
    }

    // What the work asks.

    /// Whether it is to end at once.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.forced.get()
    }

    /// Whether it is to end as it is, being ready.
    pub(crate) fn is_ended(&self) -> bool {
        self.cancelled.get()
    }

    pub(crate) fn is_completing(&self) -> bool {
        self.completing.get()
    }

    /// Whether it should come to a [`Job::pause_point`] with nothing under way.
    pub(crate) fn wants_pause(&self) -> bool {
        self.paused.get() && !self.forced.get()
    }

    /// Waits as long as it is paused.
    ///
    /// # Errors
    /// It is cancelled.
    pub(crate) async fn pause_point(&self) -> Result<()> {
        if self.wants_pause() {
            let before = self.status.get();
            let ready = before == JobStatus::Ready;
            self.become_(if ready { JobStatus::Standby } else { JobStatus::Paused });
            while self.wants_pause() {
                self.changed().await;
            }
            self.become_(before);
        }
        if self.forced.get() { Err(Self::cancelled_error()) } else { Ok(()) }
    }

    pub(crate) fn cancelled_error() -> Error {
        Error::errno_only(Errno::new(ECANCELED))
    }

    /// Waits until somebody asks something, or the state changes.
    pub(crate) async fn changed(&self) {
        let seen = self.generation.get();
        poll_fn(|context| {
            if self.generation.get() != seen {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    pub(crate) fn notify(&self) {
        self.generation.set(self.generation.get() + 1);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits, or until somebody asks something.
    pub(crate) async fn sleep(&self, time: Duration) {
        match select(pin!(io_loop::sleep(time)), pin!(self.changed())).await {
            Either::Left(_) | Either::Right(_) => {}
        }
    }

    /// Waits until so many bytes may be copied. The first go at once.
    pub(crate) async fn keep_pace(&self, bytes: u64) {
        while !self.forced.get() && !self.paused.get() {
            let speed = self.speed.get();
            let now = Instant::now();
            let begin = self.pace.get();
            if speed == 0 || begin <= now {
                if speed > 0 {
                    let time = Duration::try_from_secs_f64(bytes as f64 / speed as f64);
                    self.pace.set(begin.max(now) + time.unwrap_or(Duration::from_secs(3600)));
                }
                return;
            }
            self.sleep(begin - now).await;
        }
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
    }

    /// Says how much there is still to be done.
    pub(crate) fn set_remaining(&self, bytes: u64) {
        self.total.set(self.done.get() + bytes);
    }

    /// It may be completed from now on.
    pub(crate) fn ready(&self) {
        if self.status.get() == JobStatus::Running {
            self.become_(JobStatus::Ready);
            self.tell(Event::Ready(self.progress()));
        }
    }

    /// Says what is to be done about an error, and does it: for [`ErrorAction::Ignore`] some time has passed, and for
    /// [`ErrorAction::Stop`] the next pause point waits.
    pub(crate) async fn failed(&self, policy: OnError, write: bool, error: &Error) -> ErrorAction {
        let space = error.errno() == Errno::NO_SPACE;
        let action = match policy {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if space => ErrorAction::Stop,
            OnError::Enospc => ErrorAction::Report,
        };
        self.tell(Event::Error { id: self.id.clone(), write, action });
        match action {
            ErrorAction::Stop => {
                // What comes of the same moment counts once.
                if self.io_status.get() == IoStatus::Ok {
                    self.io_status.set(if space { IoStatus::NoSpace } else { IoStatus::Failed });
                }
                self.paused.set(true);
                self.notify();
            }
            ErrorAction::Ignore => self.sleep(PATIENCE).await,
            ErrorAction::Report => {}
        }
        action
    }
}

/// Jobs of which either all reach their end or none does; most have no company.
#[derive(Default)]
pub(crate) struct Group {
    jobs: RefCell<Vec<Rc<Job>>>,
    aborting: Cell<bool>,
    ending: Cell<bool>,
}

impl Group {
    pub(crate) fn add(self: &Rc<Self>, job: &Rc<Job>) {
        *job.group.borrow_mut() = Some(self.clone());
        self.jobs.borrow_mut().push(job.clone());
    }

    pub(crate) fn jobs(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().clone()
    }

    /// One has failed or was cancelled: so do the others.
    pub(crate) fn abort(&self) {
        if self.aborting.replace(true) {
            return;
        }
        for job in self.jobs() {
            let has_failed = matches!(&*job.result.borrow(), Some(Err(_)));
            if !has_failed {
                job.cancel(true);
            }
        }
    }

    /// Whether one has been cancelled by force.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.aborting.get() || self.jobs().iter().any(|job| job.is_cancelled())
    }

    pub(crate) fn have_all_run(&self) -> bool {
        self.jobs().iter().all(|job| job.result.borrow().is_some())
    }

    /// Whether this is the first to ask, who then ends all.
    pub(crate) fn ends_now(&self) -> bool {
        !self.ending.replace(true)
    }

    /// The group cannot reach its end any more.
    pub(crate) fn fail(&self) {
        self.aborting.set(true);
    }
}

/// The error number of what was cancelled.
const ECANCELED: i32 = 125;
