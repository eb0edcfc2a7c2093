//! How jobs start and end, those of a group together.

use crate::event::{Event, JobStatus};
use crate::inner::Inner;
use crate::job::{Group, Job};
use std::rc::Rc;

/// Starts jobs, which are a group together, or each one alone.
pub(crate) fn start(inner: &Rc<Inner>, jobs: &[Rc<Job>], together: bool) {
    let group = Rc::new(Group::default());
    for job in jobs {
        let group = if together { group.clone() } else { Rc::default() };
        group.add(job);
        inner.jobs.borrow_mut().push(job.clone());
    }
    for job in jobs {
        job.become_(JobStatus::Running);
        io_loop::spawn(run(inner.clone(), job.clone())).detach();
    }
}

/// A job from its start until it is gone, or has to be dismissed.
async fn run(inner: Rc<Inner>, job: Rc<Job>) {
    let mut result = match job.pause_point().await {
        Ok(()) => job.work.run(&job).await,
        Err(error) => Err(error),
    };
    if job.is_cancelled() {
        result = Err(Job::cancelled_error());
    }
    let Some(group) = job.group.borrow().clone() else { return };
    let failed = result.is_err();
    *job.result.borrow_mut() = Some(result);
    if failed {
        group.abort();
    } else if !group.is_cancelled() {
        job.become_(JobStatus::Waiting);
    }
    // The last to come ends all.
    if group.have_all_run() && group.ends_now() {
        end(&inner, &group).await;
    }
}

async fn end(inner: &Rc<Inner>, group: &Rc<Group>) {
    let jobs = group.jobs();
    if !group.is_cancelled() {
        for job in &jobs {
            job.become_(JobStatus::Pending);
            if !job.auto_finalize() {
                job.tell(Event::Pending { kind: job.kind, id: job.id.clone() });
            }
        }
        wait_to_be_finalized(group, &jobs).await;
    }
    let mut failed = group.is_cancelled();
    for job in &jobs {
        if !failed && let Err(error) = job.work.prepare(job).await {
            *job.result.borrow_mut() = Some(Err(error));
            group.fail();
            failed = true;
        }
    }
    for job in &jobs {
        conclude(inner, job, failed).await;
    }
}

/// Waits until people have finalized a group that does not do so by itself, or cancelled it.
async fn wait_to_be_finalized(group: &Group, jobs: &[Rc<Job>]) {
    let by_itself = jobs.iter().all(|job| job.auto_finalize());
    while !by_itself && !jobs.iter().any(|job| job.is_finalizing()) && !group.is_cancelled() {
        futures_util::future::select_all(jobs.iter().map(|job| Box::pin(job.changed()))).await;
    }
}

async fn conclude(inner: &Rc<Inner>, job: &Rc<Job>, failed: bool) {
    if failed {
        let has_failed = matches!(&*job.result.borrow(), Some(Err(_)));
        if !has_failed {
            *job.result.borrow_mut() = Some(Err(Job::cancelled_error()));
        }
        job.become_(JobStatus::Aborting);
        job.work.abort().await;
    } else {
        job.work.commit().await;
    }
    job.work.clean().await;
    inner.unblock(&job.id).await;
    let error = job.result.borrow().as_ref().and_then(|result| result.as_ref().err().cloned());
    if job.is_cancelled() {
        job.tell(Event::Cancelled(job.progress()));
    } else {
        job.tell(Event::Completed { progress: job.progress(), error });
    }
    job.become_(JobStatus::Concluded);
    if job.auto_dismiss() {
        dismiss(inner, job);
    }
}

/// Forgets a job that has ended.
pub(crate) fn dismiss(inner: &Inner, job: &Rc<Job>) {
    job.become_(JobStatus::Null);
    inner.jobs.borrow_mut().retain(|other| !Rc::ptr_eq(other, job));
    // Those that waited for it look again.
    job.leave();
}
