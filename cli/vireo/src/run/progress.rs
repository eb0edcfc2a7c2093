//! Getting an image, with a progress bar.

use anyhow::Result;
use image_store::{DebianImage, DebianImageName, Progress, Store};
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::RefCell;
use std::io::IsTerminal;

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

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
