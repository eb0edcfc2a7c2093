//! The nodes, users and jobs of a VM.

use crate::event::{Event, Verb};
use crate::inner::{Inner, find};
use crate::job::{Job, JobInfo};
use crate::lifecycle;
use crate::worker::Worker;
use block_filters::ThrottleGroup;
use block_graph::{Backend, Errno, Error, NodeRef, OpenContext, Result};
use futures_util::future::LocalBoxFuture;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

/// The disks of a VM: the nodes by name, the users that stand on them, and the jobs that work on them. It may be used
/// from every thread but the listener's calls; its methods return when what they do is done, and jobs go on by
/// themselves.
pub struct Storage {
    pub(crate) worker: Worker<Inner>,
    context: OpenContext,
    backends: Arc<Mutex<Vec<Arc<Backend>>>>,
    /// By device: the group's name, and the group.
    pub(crate) throttled: Mutex<HashMap<String, (String, Arc<ThrottleGroup>)>>,
}

impl Storage {
    /// The disks that are opened in `context`. `listener` is told what happens, on the jobs' thread: it must not wait,
    /// nor call back.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn new(context: OpenContext, listener: Arc<dyn Fn(Event) + Send + Sync>) -> Result<Self> {
        let backends: Arc<Mutex<Vec<Arc<Backend>>>> = Arc::default();
        let (inner_context, inner_backends) = (context.clone(), backends.clone());
        let worker = Worker::start("block jobs", move || Inner {
            context: inner_context,
            listener,
            backends: inner_backends,
            jobs: RefCell::default(),
            named: RefCell::default(),
            blockers: RefCell::default(),
            busy_bitmaps: RefCell::default(),
        })?;
        Ok(Self { worker, context, backends, throttled: Mutex::default() })
    }

    /// What the nodes are opened in.
    pub fn context(&self) -> &OpenContext {
        &self.context
    }

    pub(crate) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<Inner>) -> LocalBoxFuture<'static, Result<R>> + Send + 'static,
    ) -> Result<R> {
        self.worker.call(work)
    }

    /// Makes a user known by his name, which is a device's (a drive's) id.
    ///
    /// # Errors
    /// The name is somebody's.
    pub fn attach(&self, backend: Arc<Backend>) -> Result<()> {
        let mut backends = self.backends.lock();
        let name = backend.name();
        if backends.iter().any(|other| other.name() == name) {
            return Err(Error::invalid(format!("Device with id '{name}' already exists")));
        }
        if self.context.node(name).is_some() {
            return Err(Error::invalid(format!("Device name '{name}' conflicts with an existing node name")));
        }
        backends.push(backend);
        Ok(())
    }

    /// Forgets a user. A node that nobody else stands on is closed when the last hold of `backend` is gone and
    /// something is done with the nodes again, or all are closed.
    pub fn detach(&self, name: &str) -> Option<Arc<Backend>> {
        let mut backends = self.backends.lock();
        let at = backends.iter().position(|backend| backend.name() == name)?;
        Some(backends.remove(at))
    }

    /// All users, in the order in which they were attached.
    pub fn backends(&self) -> Vec<Arc<Backend>> {
        self.backends.lock().clone()
    }

    /// The user of this name.
    pub fn backend(&self, name: &str) -> Option<Arc<Backend>> {
        self.backends.lock().iter().find(|backend| backend.name() == name).cloned()
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<NodeRef> {
        self.context.nodes()
    }

    /// The node that a device stands on, or of this name.
    ///
    /// # Errors
    /// There is neither.
    pub fn find(&self, name: &str) -> Result<NodeRef> {
        find(&self.backends, &self.context, name)
    }

    /// The names of the nodes that were added by name, in order.
    ///
    /// # Errors
    /// The disks have been closed.
    pub fn added_nodes(&self) -> Result<Vec<String>> {
        self.call(|inner| Box::pin(async move { Ok(inner.named.borrow().keys().cloned().collect()) }))
    }

    /// All jobs, those that began first first.
    ///
    /// # Errors
    /// The disks have been closed.
    pub fn query_jobs(&self) -> Result<Vec<JobInfo>> {
        self.call(|inner| {
            Box::pin(async move { Ok(inner.jobs.borrow().iter().map(|job| job.info()).collect()) })
        })
    }

    fn with_job(
        &self,
        id: &str,
        ask: impl FnOnce(&Inner, &Rc<Job>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let id = id.to_owned();
        self.call(move |inner| {
            Box::pin(async move {
                let job = inner.job(&id)?;
                ask(&inner, &job)
            })
        })
    }

    /// `job-pause`, `block-job-pause`.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_pause(&self, id: &str) -> Result<()> {
        self.with_job(id, |_, job| job.pause())
    }

    /// `job-resume`, `block-job-resume`.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_resume(&self, id: &str) -> Result<()> {
        self.with_job(id, |_, job| job.resume())
    }

    /// `job-cancel` (with `force`), `block-job-cancel`: without, a mirror that is ready ends as the copy that it is.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_cancel(&self, id: &str, force: bool) -> Result<()> {
        self.with_job(id, move |_, job| {
            job.check(Verb::Cancel)?;
            if !force && job.info().paused {
                let id = &job.id;
                return Err(Error::new(
                    Errno::BUSY,
                    format!("The block job for device '{id}' is currently paused"),
                ));
            }
            job.cancel(force);
            if job.is_cancelled()
                && job.result.borrow().is_some()
                && let Some(group) = job.group.borrow().clone()
            {
                group.abort();
            }
            Ok(())
        })
    }

    /// `job-complete`, `block-job-complete`.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_complete(&self, id: &str) -> Result<()> {
        self.with_job(id, |_, job| job.complete())
    }

    /// `job-finalize`, `block-job-finalize`.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_finalize(&self, id: &str) -> Result<()> {
        self.with_job(id, |_, job| job.finalize())
    }

    /// `job-dismiss`, `block-job-dismiss`.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_dismiss(&self, id: &str) -> Result<()> {
        self.with_job(id, |inner, job| {
            job.check(Verb::Dismiss)?;
            lifecycle::dismiss(inner, job);
            Ok(())
        })
    }

    /// `block-job-set-speed`, in bytes a second; 0 for no limit.
    ///
    /// # Errors
    /// There is no such job, or it is in no state for it.
    pub fn job_set_speed(&self, id: &str, speed: u64) -> Result<()> {
        self.with_job(id, move |_, job| job.set_speed(speed))
    }

    /// `block-job-change`: has a mirror be write-blocking from now on.
    ///
    /// # Errors
    /// There is no such job, it is in no state for it, or no mirror.
    pub fn job_write_blocking(&self, id: &str) -> Result<()> {
        self.with_job(id, move |_, job| {
            job.check(Verb::Change)?;
            job.work.write_blocking()
        })
    }

    /// Cancels all jobs, waits for them, and closes all nodes. Nothing can be done afterwards.
    ///
    /// # Errors
    /// The first that was met when closing; the rest is done all the same.
    pub fn close(&self) -> Result<()> {
        let result = self.call(|inner| {
            Box::pin(async move {
                inner.cancel_all().await;
                inner.named.borrow_mut().clear();
                inner.context.close_all().await
            })
        });
        self.worker.stop();
        self.backends.lock().clear();
        result
    }
}
