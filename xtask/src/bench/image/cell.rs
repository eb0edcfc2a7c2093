//! What is measured, one by one.

use super::Options;
use super::stock::{SECRET, Stock};
use anyhow::Result;
use std::fs;

/// Who carries it out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Contestant {
    /// QEMU's tool with its default way of I/O, or with Linux AIO where it can have that.
    Qemu,
    /// QEMU's tool with io_uring.
    QemuUring,
    /// Ours.
    Vireo,
}

/// Something to measure.
pub(super) enum Cell {
    /// Copies an image: a name, the source, and the words for it.
    Convert(&'static str, &'static str, &'static [&'static str]),
    /// Checks the fragmented image.
    Check,
    /// Requests of 4 KiB.
    Requests { format: &'static str, state: &'static str, write: bool, depth: u32, cache: &'static str },
}

const CONVERSIONS: [Cell; 8] = [
    Cell::Convert("raw-to-qcow2", "random.raw", &["-f", "raw", "-O", "qcow2"]),
    Cell::Convert("qcow2-to-raw", "random.qcow2", &["-f", "qcow2", "-O", "raw"]),
    Cell::Convert("to-zlib", "mixed.raw", &["-f", "raw", "-O", "qcow2", "-c"]),
    Cell::Convert("to-zstd", "mixed.raw", &["-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]),
    Cell::Convert("from-zlib", "mixed-zlib.qcow2", &["-f", "qcow2", "-O", "raw"]),
    Cell::Convert("from-zstd", "mixed-zstd.qcow2", &["-f", "qcow2", "-O", "raw"]),
    Cell::Convert(
        "to-encrypted",
        "random.raw",
        &[
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        ],
    ),
    Cell::Convert("from-encrypted", "encrypted.qcow2", &["-O", "raw"]),
];

/// Where a copy goes.
const COPY: &str = "copy";
/// A golden section of the blocks, so that every block is far from those before it.
const GOLDEN: f64 = 0.618_033_988_749_895;
const BLOCK: u64 = 4096;

impl Cell {
    /// All there are.
    pub(super) fn all() -> Vec<Self> {
        let mut cells = Vec::from(CONVERSIONS);
        cells.push(Self::Check);
        for cache in ["none", "writeback"] {
            for (format, states) in [
                ("raw", &["full", "sparse", "encrypted"][..]),
                ("qcow2", &["full", "sparse", "backing", "encrypted"]),
            ] {
                for state in states {
                    for write in [false, true] {
                        for depth in [1, 32] {
                            cells.push(Self::Requests { format, state, write, depth, cache });
                        }
                    }
                }
            }
        }
        cells
    }

    /// Its name.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Convert(name, ..) => format!("convert {name}"),
            Self::Check => "check fragmented".to_owned(),
            Self::Requests { format, state, write, depth, cache } => {
                let verb = if *write { "write" } else { "read" };
                format!("4k {verb} {format} {state} depth={depth} {cache}")
            }
        }
    }

    /// Who measures it.
    pub(super) fn contestants(&self) -> &'static [Contestant] {
        match self {
            Self::Requests { .. } => &[Contestant::Qemu, Contestant::QemuUring, Contestant::Vireo],
            _ => &[Contestant::Qemu, Contestant::Vireo],
        }
    }

    /// Whether the program says itself how long it took.
    pub(super) fn says_time(&self) -> bool {
        matches!(self, Self::Requests { .. }) && !self.is_script()
    }

    /// The image that requests go to.
    fn image(&self) -> String {
        match self {
            Self::Convert(_, source, _) => (*source).to_owned(),
            Self::Check => "fragmented.qcow2".to_owned(),
            Self::Requests { format, state: "full", write: false, .. } => format!("random.{format}"),
            Self::Requests { format, state: "full", .. } => format!("written.{format}"),
            Self::Requests { format, state, .. } => format!("{state}.{format}"),
        }
    }

    /// Makes what the cell needs once.
    pub(super) fn stock_up(&self, stock: &mut Stock) -> Result<()> {
        match self {
            Self::Requests { format, state: "full", write: true, .. } => {
                let (from, to) = (format!("random.{format}"), stock.path(&self.image()));
                stock.need(&from)?;
                if !fs::exists(&to)? {
                    fs::copy(stock.path(&from), to)?;
                }
                Ok(())
            }
            Self::Requests { state: "backing", .. } => stock.need("random.qcow2"),
            _ => stock.need(&self.image()),
        }
    }

    /// Makes what every run needs anew.
    pub(super) fn prepare(&self, stock: &Stock) -> Result<()> {
        match self {
            Self::Convert(..) if fs::exists(stock.path(COPY))? => Ok(fs::remove_file(stock.path(COPY))?),
            Self::Requests { format, state: "sparse", .. } => stock.create(&self.image(), &["-f", format]),
            Self::Requests { state: "backing", .. } => {
                stock.create(&self.image(), &["-f", "qcow2", "-b", "random.qcow2", "-F", "qcow2"])
            }
            _ => Ok(()),
        }
    }

    /// Whether requests are sent by the tool that carries out commands: the other one takes no keys.
    pub(super) fn is_script(&self) -> bool {
        matches!(self, Self::Requests { state: "encrypted", .. })
    }

    fn count(&self, options: &Options) -> u64 {
        match self {
            Self::Requests { depth: 1, .. } => options.count / 3,
            _ => options.count,
        }
    }

    /// The commands for the tool that carries out commands: as many requests at a time as the depth says.
    pub(super) fn script(&self, stock: &Stock, options: &Options) -> String {
        let Self::Requests { write, depth, .. } = self else { return String::new() };
        let (verb, mut offset, mut script) = (if *write { "write" } else { "read" }, 0, String::new());
        for number in 1..=self.count(options) {
            if *depth == 1 {
                script += &format!("{verb} -q {offset} {BLOCK}\n");
            } else {
                script += &format!("aio_{verb} -q {offset} {BLOCK}\n");
                if number % u64::from(*depth) == 0 {
                    script += "aio_flush\n";
                }
            }
            offset = (offset + step(stock.size)) % stock.size;
        }
        script
    }

    /// The words of the command.
    pub(super) fn words(&self, who: Contestant, stock: &Stock, options: &Options) -> Vec<String> {
        let image = stock.path(&self.image());
        let mut words: Vec<String> = Vec::new();
        let mut add = |more: &[&str]| words.extend(more.iter().map(|word| (*word).to_owned()));
        match self {
            Self::Convert("from-encrypted", _, how) => {
                let name = format!("driver=qcow2,encrypt.key-secret=key,file.filename={image}");
                add(&["convert", "--object", SECRET, "--image-opts"]);
                add(how);
                add(&[&name, &stock.path(COPY)]);
            }
            Self::Convert(_, _, how) => {
                add(&["convert", "--object", SECRET]);
                add(how);
                add(&[&image, &stock.path(COPY)]);
            }
            Self::Check => add(&["check", "-f", "qcow2", &image]),
            Self::Requests { format, write, depth, cache, .. } => {
                let aio: &[&str] = match who {
                    Contestant::Qemu if *cache == "none" => &["-n"],
                    Contestant::QemuUring => &["-i", "io_uring"],
                    _ => &[],
                };
                if self.is_script() {
                    let driver = if *format == "raw" {
                        "driver=luks,key-secret"
                    } else {
                        "driver=qcow2,encrypt.key-secret"
                    };
                    add(&["--object", SECRET, "-t", cache]);
                    add(aio);
                    add(&["--image-opts", &format!("{driver}=key,file.filename={image}")]);
                    return words;
                }
                let (count, step) = (self.count(options).to_string(), step(stock.size).to_string());
                add(&["bench", "-c", &count, "-d", &depth.to_string(), "-S", &step]);
                add(&["-s", &BLOCK.to_string(), "-t", cache]);
                add(aio);
                if *write {
                    add(&["-w"]);
                }
                add(&["-f", format, &image]);
            }
        }
        words
    }
}

/// From one request to the next, in an image of `size` bytes.
fn step(size: u64) -> u64 {
    let blocks = size / BLOCK;
    // Odd, and so coprime to the number of blocks, a power of two; and what the tools accept.
    (((blocks as f64 * GOLDEN) as u64 | 1) * BLOCK).min(i32::MAX as u64 / BLOCK * BLOCK)
}
