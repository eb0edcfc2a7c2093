//! Fetches a Debian image into a store: `fetch_debian STORE [NAME [MIRROR]]`.

use std::cell::Cell;
use std::env;
use std::error::Error;
use std::time::Instant;

use image_store::{DebianImageName, KeyringVerifier, Progress, Store};

/// Prints each step with its time.
struct Lines(Cell<Instant>);

impl Progress for Lines {
    fn begin(&self, what: &str, total: Option<u64>) {
        self.0.set(Instant::now());
        let size = total.map_or(String::new(), |bytes| format!(" ({} KiB)", bytes >> 10));
        eprint!("{what}{size}…");
    }

    fn advance(&self, _bytes: u64) {}

    fn end(&self) {
        eprintln!(" {:.1} s", self.0.get().elapsed().as_secs_f32());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: fetch_debian STORE [NAME [MIRROR]]")?;
    let name: DebianImageName =
        arguments.get(1).map_or(Ok(DebianImageName::default()), |name| name.parse())?;
    let mirror = arguments.get(2).map(String::as_str);
    let progress = Lines(Cell::new(Instant::now()));
    let image = Store::open(path)?.fetch_debian(name, mirror, &KeyringVerifier::from_host(), &progress)?;
    println!("{image:#?}");
    Ok(())
}
