//! `blockdev-create`: making an image, as a job.

use crate::event::JobType;
use crate::inner::Inner;
use crate::job::{Job, Work};
use crate::parameters::{BlockdevCreate, JobOptions};
use crate::storage::Storage;
use block_graph::{OpenContext, Result, async_trait};
use std::rc::Rc;

struct CreateWork {
    context: OpenContext,
    given: BlockdevCreate,
}

#[async_trait(?Send)]
impl Work for CreateWork {
    async fn run(&self, job: &Job) -> Result<()> {
        job.set_remaining(1);
        let BlockdevCreate { driver, filename, options, .. } = &self.given;
        let mut options = options.clone();
        let kind = self.context.registry.get(driver)?;
        kind.create(&self.context, filename, &mut options).await?;
        job.add_done(1);
        Ok(())
    }
}

impl Inner {
    fn blockdev_create(self: &Rc<Self>, given: BlockdevCreate) -> Result<()> {
        self.context.registry.get(&given.driver)?;
        // Whoever makes an image wants to know how it went.
        let options =
            JobOptions { job_id: Some(given.job_id.clone()), auto_dismiss: false, ..JobOptions::default() };
        let work = CreateWork { context: self.context.clone(), given };
        let job = self.new_job(JobType::Create, &options, "", &[], Box::new(work))?;
        crate::lifecycle::start(self, &[job], false);
        Ok(())
    }
}

impl Storage {
    /// `blockdev-create`: makes an image; the job has to be dismissed.
    ///
    /// # Errors
    /// There is no such driver, or the id is none; the job has not begun.
    pub fn blockdev_create(&self, create: BlockdevCreate) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.blockdev_create(create) }))
    }
}
