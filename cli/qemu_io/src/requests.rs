//! The commands that read and write.

use crate::format::{dump, report};
use crate::output::{line, text};
use crate::session::Session;
use crate::words::{Failed, MOST_BYTES, Words, lengths, number};
use block_graph::{Errno, Error, NodeRef, WriteFlags, ZeroFlags};
use io_loop::{IoBuffer, IoVec};
use std::fs::File;
use std::io::Read;
use std::time::Instant;

/// What a buffer contains before something is read into it.
const BEFORE_READ: u8 = 0xab;
/// What is written if nothing is said.
const WRITTEN: u8 = 0xcd;
/// How far buffers are moved from where they should be by `-m`.
const MISALIGNMENT: usize = 16;

/// Memory for a request.
pub(crate) struct Buffer {
    memory: IoBuffer,
    start: usize,
}

impl Buffer {
    pub(crate) fn new(session: &Session, len: u64, byte: u8) -> Self {
        let start = if session.misaligned { MISALIGNMENT } else { 0 };
        let mut memory = IoBuffer::zeroed(usize::try_from(len).unwrap_or(usize::MAX).saturating_add(start));
        memory.bytes_mut().fill(byte);
        Self { memory, start }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory.bytes()[self.start..]
    }

    fn io(&mut self) -> IoVec {
        let end = self.memory.len();
        self.memory.io_range(self.start..end)
    }

    /// Fills it with what is in a file, again and again.
    fn fill_from(&mut self, name: &str) -> Result<(), Failed> {
        let most = self.bytes().len();
        let mut pattern = Vec::new();
        let read = File::open(name).and_then(|file| file.take(most as u64).read_to_end(&mut pattern));
        if let Err(error) = read {
            crate::output::flush();
            eprintln!("{name}: {}", Error::from(error).errno());
            return Err(Failed);
        }
        if pattern.is_empty() {
            crate::output::flush();
            eprintln!("{name}: file is empty");
            return Err(Failed);
        }
        let start = self.start;
        for part in self.memory.bytes_mut()[start..].chunks_mut(pattern.len()) {
            part.copy_from_slice(&pattern[..part.len()]);
        }
        Ok(())
    }
}

/// What becomes of a request's result.
#[derive(Clone)]
struct Reporting {
    quiet: bool,
    for_programs: bool,
    dumps: bool,
    pattern: Option<u8>,
    /// Which part of what was read is compared.
    compared: (u64, u64),
}

impl Reporting {
    fn new(words: &Words, len: u64) -> Self {
        Self {
            quiet: words.has("q"),
            for_programs: words.has("C"),
            dumps: words.has("v"),
            pattern: None,
            compared: (0, len),
        }
    }

    /// Looks at what was read, and reports it.
    fn read(&self, bytes: &[u8], offset: u64, begin: Instant) -> Result<(), Failed> {
        let took = begin.elapsed();
        let mut result = Ok(());
        if let Some(pattern) = self.pattern {
            let (from, count) = self.compared;
            let start = usize::try_from(from).unwrap_or(usize::MAX);
            let end = usize::try_from(from + count).unwrap_or(usize::MAX);
            if bytes[start..end].iter().any(|byte| *byte != pattern) {
                let at = offset + from;
                line(format_args!("Pattern verification failed at offset {at}, {count} bytes"));
                result = Err(Failed);
            }
        }
        if !self.quiet {
            if self.dumps {
                text(&dump(bytes, offset));
            }
            let len = bytes.len() as u64;
            line(report("read", offset, len, len, took, self.for_programs));
        }
        result
    }

    fn wrote(&self, what: &str, offset: u64, len: u64, begin: Instant) {
        if !self.quiet {
            line(report(what, offset, len, len, begin.elapsed(), self.for_programs));
        }
    }
}

/// Refuses what is beyond what requests can have.
fn check(node: &NodeRef, offset: u64, len: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= node.len() || node.driver().grows() => Ok(()),
        _ => Err(Error::errno_only(Errno::IO)),
    }
}

fn aligned(offset: u64, count: u64) -> Result<(), Failed> {
    for (value, name) in [(offset, "offset"), (count, "count")] {
        if value % 512 != 0 {
            line(format_args!("{value} is not a sector-aligned value for '{name}'"));
            return Err(Failed);
        }
    }
    Ok(())
}

fn fail(what: &str, error: &Error) -> Failed {
    line(format_args!("{what} failed: {}", error.errno()));
    Failed
}

async fn read_node(node: &NodeRef, offset: u64, io: &IoVec) -> Result<(), Error> {
    check(node, offset, io.len() as u64)?;
    node.read(offset, io).await
}

async fn write_node(node: &NodeRef, offset: u64, io: &IoVec, flags: WriteFlags) -> Result<(), Error> {
    check(node, offset, io.len() as u64)?;
    node.write(offset, io, with_write_through(node, flags)).await
}

async fn zero_node(node: &NodeRef, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Error> {
    check(node, offset, len)?;
    let mut flags = flags;
    if node.flags().write_through {
        flags |= ZeroFlags::FUA;
    }
    node.write_zeroes(offset, len, flags).await
}

fn with_write_through(node: &NodeRef, flags: WriteFlags) -> WriteFlags {
    if node.flags().write_through { flags | WriteFlags::FUA } else { flags }
}

/// `read`.
pub(crate) async fn read(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?;
    let (from, most) = (words.number("s")?, words.number("l")?);
    let [offset, count] = words.exactly()?;
    let offset = number(offset)?;
    let len = number(count)?;
    if len > MOST_BYTES {
        line(format_args!("length cannot exceed {MOST_BYTES}, given {count}"));
        return Err(Failed);
    }
    if pattern.is_none() && (from.is_some() || most.is_some()) {
        return Err(words.usage());
    }
    let from = from.unwrap_or_default();
    let compared = most.or_else(|| len.checked_sub(from));
    let Some(compared) = compared.filter(|compared| compared.checked_add(from).is_some_and(|end| end <= len))
    else {
        line("pattern verification range exceeds end of read data");
        return Err(Failed);
    };
    let vm_state = words.has("b");
    if vm_state {
        aligned(offset, len)?;
        if words.has("r") {
            line("I/O buffer registration is not supported when reading from vmstate");
            return Err(Failed);
        }
    }
    let mut buffer = Buffer::new(session, len, BEFORE_READ);
    let io = buffer.io();
    let begin = Instant::now();
    let done = match (vm_state, node.driver().image()) {
        (false, _) => read_node(node, offset, &io).await,
        (true, Some(image)) => image.read_vm_state(offset, &io).await,
        (true, None) => Err(Error::errno_only(Errno::NOT_SUPPORTED)),
    };
    drop(io);
    done.map_err(|error| fail("read", &error))?;
    let reporting = Reporting { pattern, compared: (from, compared), ..Reporting::new(words, len) };
    reporting.read(buffer.bytes(), offset, begin)
}

/// Where a vectored request is, and how long.
fn vectored(words: &Words) -> Result<(u64, u64), Failed> {
    let [offset, lens @ ..] = words.rest() else { return Err(words.usage()) };
    if lens.is_empty() {
        return Err(words.usage());
    }
    Ok((number(offset)?, lengths(lens)?))
}

/// `readv`.
pub(crate) async fn readv(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?;
    let (offset, len) = vectored(words)?;
    let mut buffer = Buffer::new(session, len, BEFORE_READ);
    let io = buffer.io();
    let begin = Instant::now();
    let done = read_node(node, offset, &io).await;
    drop(io);
    done.map_err(|error| fail("readv", &error))?;
    Reporting { pattern, ..Reporting::new(words, len) }.read(buffer.bytes(), offset, begin)
}

/// `write`.
pub(crate) async fn write(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?;
    let has = |key| words.has(key);
    let (vm_state, zeroes, compressed) = (has("b"), has("z"), has("c"));
    if words.rest().len() != 2 {
        return Err(words.usage());
    }
    let contradictions = [
        (vm_state && zeroes, "-b and -z cannot be specified at the same time"),
        (has("f") && (vm_state || compressed), "-f and -b or -c cannot be specified at the same time"),
        (has("n") && !zeroes, "-n requires -z to be specified"),
        (has("u") && !zeroes, "-u requires -z to be specified"),
        (
            u8::from(zeroes) + u8::from(has("P")) + u8::from(has("s")) > 1,
            "Only one of -z, -P, and -s can be specified at the same time",
        ),
    ];
    if let Some((_, message)) = contradictions.into_iter().find(|(is_so, _)| *is_so) {
        line(message);
        return Err(Failed);
    }
    let [offset, count] = words.exactly()?;
    let offset = number(offset)?;
    let len = number(count)?;
    if len > MOST_BYTES && !has("n") {
        line(format_args!("length cannot exceed {MOST_BYTES} without -n, given {count}"));
        return Err(Failed);
    }
    if vm_state || compressed {
        aligned(offset, len)?;
    }
    let reporting = Reporting::new(words, len);
    if zeroes {
        if has("r") {
            line("cannot combine zero write with registered I/O buffer");
            return Err(Failed);
        }
        let begin = Instant::now();
        let done = zero_node(node, offset, len, zero_flags(words)).await;
        done.map_err(|error| fail("write", &error))?;
        reporting.wrote("wrote", offset, len, begin);
        return Ok(());
    }
    let mut buffer = Buffer::new(session, len, pattern.unwrap_or(WRITTEN));
    if let Some(file) = words.value("s") {
        buffer.fill_from(file)?;
    }
    let io = buffer.io();
    let begin = Instant::now();
    let mut flags = write_flags(words);
    flags.set(WriteFlags::COMPRESSED, compressed);
    let done = match (vm_state, node.driver().image()) {
        (false, _) => write_node(node, offset, &io, flags).await,
        (true, Some(image)) => image.write_vm_state(offset, &io).await,
        (true, None) => Err(Error::errno_only(Errno::NOT_SUPPORTED)),
    };
    done.map_err(|error| fail("write", &error))?;
    reporting.wrote("wrote", offset, len, begin);
    Ok(())
}

fn write_flags(words: &Words) -> WriteFlags {
    if words.has("f") { WriteFlags::FUA } else { WriteFlags::empty() }
}

fn zero_flags(words: &Words) -> ZeroFlags {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::FUA, words.has("f"));
    flags.set(ZeroFlags::MAY_UNMAP, words.has("u"));
    flags.set(ZeroFlags::NO_FALLBACK, words.has("n"));
    flags
}

/// `writev`.
pub(crate) async fn writev(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?.unwrap_or(WRITTEN);
    let (offset, len) = vectored(words)?;
    let mut buffer = Buffer::new(session, len, pattern);
    let io = buffer.io();
    let begin = Instant::now();
    let done = write_node(node, offset, &io, write_flags(words)).await;
    done.map_err(|error| fail("writev", &error))?;
    Reporting::new(words, len).wrote("wrote", offset, len, begin);
    Ok(())
}

/// `aio_read`.
pub(crate) fn aio_read(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?;
    if words.has("i") {
        line("injecting invalid read request");
        return Ok(());
    }
    let (offset, len) = vectored(words)?;
    let mut buffer = Buffer::new(session, len, BEFORE_READ);
    let reporting = Reporting { pattern, ..Reporting::new(words, len) };
    let node = node.clone();
    let begin = Instant::now();
    session.begin(async move {
        let io = buffer.io();
        let done = read_node(&node, offset, &io).await;
        drop(io);
        match done {
            // The command itself has long succeeded.
            Ok(()) => drop(reporting.read(buffer.bytes(), offset, begin)),
            Err(error) => line(format_args!("readv failed: {}", error.errno())),
        }
    });
    Ok(())
}

/// `aio_write`.
pub(crate) fn aio_write(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let pattern = words.pattern()?;
    if words.has("i") {
        line("injecting invalid write request");
        return Ok(());
    }
    let zeroes = words.has("z");
    if words.rest().len() < 2 {
        return Err(words.usage());
    }
    let contradictions = [
        (zeroes && words.rest().len() != 2, "-z supports only a single length parameter"),
        (words.has("u") && !zeroes, "-u requires -z to be specified"),
        (zeroes && words.has("P"), "-z and -P cannot be specified at the same time"),
        (zeroes && words.has("r"), "cannot combine zero write with registered I/O buffer"),
    ];
    if let Some((_, message)) = contradictions.into_iter().find(|(is_so, _)| *is_so) {
        line(message);
        return Err(Failed);
    }
    let offset = number(&words.rest()[0])?;
    let len = if zeroes { number(&words.rest()[1])? } else { lengths(&words.rest()[1..])? };
    let buffer = (!zeroes).then(|| Buffer::new(session, len, pattern.unwrap_or(WRITTEN)));
    let reporting = Reporting::new(words, len);
    let (write_flags, zero_flags) = (write_flags(words), zero_flags(words));
    let node = node.clone();
    let begin = Instant::now();
    session.begin(async move {
        let done = match buffer {
            Some(mut buffer) => {
                let io = buffer.io();
                write_node(&node, offset, &io, write_flags).await
            }
            None => zero_node(&node, offset, len, zero_flags).await,
        };
        match done {
            Ok(()) => reporting.wrote("wrote", offset, len, begin),
            Err(error) => line(format_args!("aio_write failed: {}", error.errno())),
        }
    });
    Ok(())
}

/// `discard`.
pub(crate) async fn discard(node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let [offset, count] = words.exactly()?;
    let offset = number(offset)?;
    let len = number(count)?;
    if len > MOST_BYTES {
        line(format_args!("length cannot exceed {MOST_BYTES}, given {count}"));
        return Err(Failed);
    }
    let begin = Instant::now();
    let done = match check(node, offset, len) {
        Ok(()) => node.discard(offset, len).await,
        error => error,
    };
    done.map_err(|error| fail("discard", &error))?;
    Reporting::new(words, len).wrote("discard", offset, len, begin);
    Ok(())
}
