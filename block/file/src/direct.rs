//! Direct I/O of requests that are not aligned as it needs them.
//!
//! Such a request goes by way of an aligned buffer; a write first reads the blocks that it changes only in part. What
//! another write changes in those blocks meanwhile would be lost, so with direct I/O every write holds its blocks.

use crate::host_file::HostFile;
use crate::open::Opened;
use block_graph::{Errno, Error, Result};
use io_loop::{IoBuffer, IoVec};

/// The longest buffer, in bytes.
const MOST_BUFFER: u64 = 1 << 20;

/// A request's range in whole blocks.
fn blocks(offset: u64, len: u64, alignment: u64) -> Result<(u64, u64)> {
    let end = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(alignment));
    let end = end.filter(|end| *end <= i64::MAX as u64).ok_or_else(|| Error::errno_only(Errno::TOO_LARGE))?;
    Ok((offset - offset % alignment, end))
}

/// Whether a request can be made as it is.
fn fits(file: &Opened, offset: u64, memory: &IoVec) -> bool {
    let alignment = u64::from(file.alignment);
    alignment == 1
        || (offset.is_multiple_of(alignment)
            && (memory.len() as u64).is_multiple_of(alignment)
            && memory.is_aligned(file.alignment as usize))
}

/// Fills `into` from the file, and with zeroes where it ends.
pub(crate) async fn read(file: &Opened, offset: u64, into: &IoVec) -> Result<()> {
    if fits(file, offset, into) {
        let done = file.io.read_at(offset, into).await?;
        into.zero(done, into.len() - done);
        return Ok(());
    }
    let len = into.len() as u64;
    let (start, end) = blocks(offset, len, u64::from(file.alignment))?;
    let mut buffer = IoBuffer::scratch((end - start).min(MOST_BUFFER) as usize);
    let mut at = start;
    while at < end {
        let part = (end - at).min(MOST_BUFFER);
        let memory = buffer.io_range(0..part as usize);
        let done = file.io.read_at(at, &memory).await?;
        memory.zero(done, part as usize - done);
        let (from, to) = (at.max(offset), (at + part).min(offset + len));
        into.copy_from_vec((from - offset) as usize, &memory.slice((from - at) as usize..(to - at) as usize));
        at += part;
    }
    Ok(())
}

/// Writes `from` to the file.
pub(crate) async fn write(
    driver: &HostFile,
    file: &Opened,
    offset: u64,
    from: &IoVec,
    through: bool,
) -> Result<()> {
    if file.alignment == 1 {
        return Ok(file.io.write_at(offset, from, through).await?);
    }
    let len = from.len() as u64;
    let alignment = u64::from(file.alignment);
    let (start, end) = blocks(offset, len, alignment)?;
    let mut held = driver.writes.lock(start..end).await;
    if fits(file, offset, from) {
        return Ok(file.io.write_at(offset, from, through).await?);
    }
    // The last block would make the file longer than was asked for, and nobody may write there until it is cut off.
    let longer = end > driver.known_len().max(offset + len);
    if longer {
        drop(held);
        held = driver.writes.lock(start..u64::MAX).await;
    }
    // What was written last may be in the file before it is known here.
    let there = rustix::fs::fstat(&**file.io.descriptor()).map_err(std::io::Error::from)?.st_size;
    let wanted = there.unsigned_abs().max(offset + len);
    write_blocks(file, (start, end), (offset, from), through).await?;
    if end > wanted && !file.device {
        file.io.call(move |fd| Ok(rustix::fs::ftruncate(fd, wanted)?)).await?;
    }
    drop(held);
    Ok(())
}

async fn write_blocks(
    file: &Opened,
    (start, end): (u64, u64),
    (offset, from): (u64, &IoVec),
    through: bool,
) -> Result<()> {
    let alignment = u64::from(file.alignment);
    let stop = offset + from.len() as u64;
    let mut buffer = IoBuffer::scratch((end - start).min(MOST_BUFFER) as usize);
    let mut at = start;
    while at < end {
        let part = (end - at).min(MOST_BUFFER);
        let memory = buffer.io_range(0..part as usize);
        // The first and last block, where they are not written as a whole.
        let first = (at < offset).then_some(0);
        let last = (at + part > stop).then_some(part - alignment);
        let last = last.filter(|last| first != Some(*last));
        for block in first.into_iter().chain(last) {
            let place = memory.slice(block as usize..(block + alignment) as usize);
            let done = file.io.read_at(at + block, &place).await?;
            place.zero(done, place.len() - done);
        }
        let (from_at, to) = (at.max(offset), (at + part).min(stop));
        let piece = from.slice((from_at - offset) as usize..(to - offset) as usize);
        memory.copy_from_vec((from_at - at) as usize, &piece);
        file.io.write_at(at, &memory, through).await?;
        at += part;
    }
    Ok(())
}
