//! Progress bars: of getting an image, and of allocating memory.

use anyhow::Result;
use image_store::{DebianImage, DebianImageName, Progress, Store};
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::RefCell;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What takes less time than this gets no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// The image named `name`, fetched if it is not in the store.
pub(super) fn fetch(name: &str, mirror: Option<&str>) -> Result<DebianImage> {
    let name: DebianImageName = name.parse()?;
    let store = Store::open(Store::default_path()?)?;
    Ok(store.debian(name, mirror, &Bar::default())?)
}

/// A bar on a terminal; elsewhere a line for each step.
#[derive(Default)]
struct Bar {
    bar: RefCell<Option<ProgressBar>>,
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: Option<u64>) {
        if !std::io::stderr().is_terminal() {
            eprintln!("vireo: {what}");
            return;
        }
        let bar = match total {
            Some(total) => {
                ProgressBar::new(total).with_style(style("{msg} [{bar:30}] {bytes}/{total_bytes} {eta}"))
            }
            None => ProgressBar::new_spinner().with_style(style("{msg} {spinner} {bytes}")),
        };
        bar.set_message(what.to_owned());
        *self.bar.borrow_mut() = Some(bar);
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar.borrow() {
            bar.inc(bytes);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The progress of an allocation of memory: a bar on a terminal, elsewhere a line, once it takes long.
pub(super) struct Allocation {
    begin: Instant,
    bar: OnceLock<ProgressBar>,
}

impl Default for Allocation {
    fn default() -> Self {
        Self { begin: Instant::now(), bar: OnceLock::new() }
    }
}

impl Allocation {
    /// `done` of `all` bytes are allocated.
    pub(super) fn advance(&self, done: u64, all: u64) {
        if self.begin.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_init(|| {
            if !std::io::stderr().is_terminal() {
                eprintln!("vireo: allocating guest memory: {} of {} MiB done", done >> 20, all >> 20);
                return ProgressBar::hidden();
            }
            let style = style("allocating guest memory [{bar:30}] {bytes}/{total_bytes} {eta}");
            ProgressBar::new(all).with_style(style)
        });
        // Other threads' news may be older than what the bar shows.
        bar.set_position(bar.position().max(done));
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
