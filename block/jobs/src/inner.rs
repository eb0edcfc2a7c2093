//! The nodes, users and jobs of a VM as the jobs' thread has them.

use crate::blockers::{self, Blocker, Op};
use crate::event::{Event, JobType, Verb};
use crate::job::{Job, Work};
use crate::parameters::JobOptions;
use block_graph::{Backend, Edge, Errno, Error, NodeRef, OpenContext, Result, Role, is_node_name};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// What is on the jobs' thread.
pub(crate) struct Inner {
    pub(crate) context: OpenContext,
    pub(crate) listener: Arc<dyn Fn(Event) + Send + Sync>,
    pub(crate) backends: Arc<Mutex<Vec<Arc<Backend>>>>,
    pub(crate) jobs: RefCell<Vec<Rc<Job>>>,
    /// Nodes that were added by name, which keeps them open.
    pub(crate) named: RefCell<BTreeMap<String, Arc<Edge>>>,
    pub(crate) blockers: RefCell<Vec<Blocker>>,
    /// Bitmaps that jobs use: node and bitmap.
    pub(crate) busy_bitmaps: RefCell<Vec<(String, String)>>,
}

/// The node that a device stands on, or of this name.
///
/// # Errors
/// There is neither.
pub(crate) fn find(
    backends: &Mutex<Vec<Arc<Backend>>>,
    context: &OpenContext,
    name: &str,
) -> Result<NodeRef> {
    let device = backends.lock().iter().find(|backend| backend.name() == name).map(|backend| backend.node());
    let missing =
        || Error::new(Errno::NOT_FOUND, format!("Cannot find device='{name}' nor node-name='{name}'"));
    device.or_else(|| context.node(name)).ok_or_else(missing)
}

impl Inner {
    /// Whether that may be done with a node.
    ///
    /// # Errors
    /// A job is in the way.
    pub(crate) fn check_op(&self, node: &NodeRef, op: Op) -> Result<()> {
        blockers::check(&self.blockers.borrow(), node, op)
    }

    /// The node that a device stands on, or of this name.
    pub(crate) fn find(&self, name: &str) -> Result<NodeRef> {
        find(&self.backends, &self.context, name)
    }

    /// The node of this name.
    pub(crate) fn find_node(&self, name: &str) -> Result<NodeRef> {
        let missing =
            || Error::new(Errno::NOT_FOUND, format!("Cannot find device='' nor node-name='{name}'"));
        self.context.node(name).ok_or_else(missing)
    }

    /// The users that stand on `node`.
    pub(crate) fn backends_on(&self, node: &NodeRef) -> Vec<Arc<Backend>> {
        let backends = self.backends.lock();
        backends.iter().filter(|backend| Arc::ptr_eq(&backend.node(), node)).cloned().collect()
    }

    pub(crate) fn is_device(&self, name: &str) -> bool {
        self.backends.lock().iter().any(|backend| backend.name() == name)
    }

    pub(crate) fn job(&self, id: &str) -> Result<Rc<Job>> {
        let found = self.jobs.borrow().iter().find(|job| job.id == id).cloned();
        found.ok_or_else(|| Error::new(Errno::NOT_FOUND, format!("Block job '{id}' not found")))
    }

    /// Makes a job, which is not started yet. Until it has ended, `nodes` are kept open, and only what stands with them
    /// may be done with them.
    pub(crate) fn new_job(
        &self,
        kind: JobType,
        options: &JobOptions,
        device: &str,
        nodes: &[(NodeRef, &'static [Op])],
        work: Box<dyn Work>,
    ) -> Result<Rc<Job>> {
        let id = match &options.job_id {
            Some(id) => id.clone(),
            None if self.is_device(device) => device.to_owned(),
            None => return Err(Error::invalid("An explicit job ID is required")),
        };
        let mut letters = id.bytes();
        if !letters.next().is_some_and(|first| first.is_ascii_alphabetic())
            || !letters.all(|letter| letter.is_ascii_alphanumeric() || b"-._".contains(&letter))
        {
            return Err(Error::invalid(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.borrow().iter().any(|job| job.id == id) {
            return Err(Error::invalid(format!("Job ID '{id}' already in use")));
        }
        if let Some(name) = &options.filter_node_name {
            if !is_node_name(name) {
                return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
            }
            if self.context.node(name).is_some() || self.is_device(name) {
                return Err(Error::invalid(format!("Duplicate nodes with node-name='{name}'")));
            }
        }
        for (node, allowed) in nodes {
            let hold = Edge::new(Role::Hold, node.clone());
            self.blockers.borrow_mut().push(Blocker { job: id.clone(), kind, allowed, hold });
        }
        Ok(Job::new(id, kind, options, work, self.listener.clone()))
    }

    /// Undoes [`Inner::new_job`] for a job that is not going to be started.
    pub(crate) async fn drop_job(&self, job: &Rc<Job>) {
        job.become_(crate::event::JobStatus::Null);
        job.work.clean().await;
        self.unblock(&job.id).await;
    }

    /// A job lets go of its nodes.
    pub(crate) async fn unblock(&self, job: &str) {
        let mut nodes = Vec::new();
        self.blockers.borrow_mut().retain(|blocker| {
            if blocker.job == job {
                nodes.push(blocker.hold.node());
            }
            blocker.job != job
        });
        self.release(&nodes).await;
    }

    /// Closes those of `nodes` that nobody uses any more.
    pub(crate) async fn release(&self, nodes: &[NodeRef]) {
        for node in nodes {
            if node.is_closed() || self.context.is_used(node) {
                continue;
            }
            let below: Vec<NodeRef> = node.driver().edges().iter().map(|edge| edge.node()).collect();
            if let Err(error) = node.close().await {
                tracing::error!("cannot close node '{}': {error}", node.name());
            }
            Box::pin(self.release(&below)).await;
        }
    }

    pub(crate) async fn cancel_all(&self) {
        loop {
            let jobs = self.jobs.borrow().clone();
            let Some(job) = jobs.iter().find(|job| job.check(Verb::Dismiss).is_err()) else { return };
            for job in &jobs {
                if job.check(Verb::Cancel).is_ok() && !job.is_cancelled() {
                    job.cancel(true);
                    if job.result.borrow().is_some()
                        && let Some(group) = job.group.borrow().clone()
                    {
                        group.abort();
                    }
                }
            }
            job.changed().await;
        }
    }
}
