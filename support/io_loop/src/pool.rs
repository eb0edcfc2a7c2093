//! Threads for what must not hold up a loop: computation, and system calls that wait.

use async_task::Runnable;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);
/// The most threads that wait in system calls.
const MOST_BLOCKED: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

pub(crate) struct Pool {
    name: &'static str,
    most: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static COMPUTE: LazyLock<Pool> = LazyLock::new(|| Pool::new("compute", cores()));
pub(crate) static BLOCKING: LazyLock<Pool> = LazyLock::new(|| Pool::new("blocking", MOST_BLOCKED));

/// How many processors this process may use.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

impl Pool {
    fn new(name: &'static str, most: usize) -> Self {
        Self { name, most, state: Mutex::default(), work: Condvar::new() }
    }

    /// Has a thread do `job`.
    pub(crate) fn run(&'static self, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            self.work.notify_one();
            return;
        }
        if state.threads < self.most {
            state.threads += 1;
            drop(state);
            let started = thread::Builder::new().name(self.name.into()).spawn(|| self.serve());
            if started.is_err() {
                // Without a thread the work is done here, late rather than never.
                self.state.lock().threads -= 1;
                let job = self.state.lock().jobs.pop_front();
                if let Some(job) = job {
                    job();
                }
            }
        }
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if timed_out && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    async fn call<R: Send + 'static>(&'static self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let (runnable, task) = async_task::Builder::new().propagate_panic(true).spawn(
            move |()| async move { work() },
            move |runnable: Runnable| {
                self.run(Box::new(move || {
                    runnable.run();
                }));
            },
        );
        runnable.schedule();
        task.await
    }
}

/// Does `work`, a computation, on one of as many threads as there are processors. Dropped before it began, it never
/// begins. A panic in it is passed on.
pub async fn offload<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    COMPUTE.call(work).await
}

/// Does `work`, a system call that may wait, on a thread of its own. A panic in it is passed on.
pub async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    BLOCKING.call(work).await
}
