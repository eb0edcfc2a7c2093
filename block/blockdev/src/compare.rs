//! Comparing what images contain.

use crate::status;
use crate::zero_runs::{SECTOR, is_zero};
use block_graph::{Error, NodeRef};
use futures_util::stream::{self, StreamExt};
use io_loop::IoBuffer;

/// The most bytes that are read at once.
const CHUNK: u64 = 2 << 20;
/// How many chunks are under way at once.
const REQUESTS: usize = 8;

/// Where two images differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// In what they contain, in the sector at this offset.
    Content(u64),
    /// In what is allocated, at this offset; only looked at by strict comparisons.
    Status(u64),
}

/// Why images were not compared. The number says which image it is.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CompareError {
    /// What a part of it is cannot be known.
    #[error("block status of image {0}: {1}")]
    Status(usize, Error),
    /// It cannot be read at this offset.
    #[error("reading image {0} at {1}: {2}")]
    Read(usize, u64, Error),
}

/// What is to be done to compare a range.
#[derive(Debug, Clone, Copy)]
enum Task {
    Nothing,
    Differs,
    /// Both have it.
    Both,
    /// The other one has zeroes there.
    Zero(usize),
}

/// Finds the first difference of two images up to `end`, which neither is shorter than. `progress` is told how far it
/// is.
///
/// # Errors
///
/// The images cannot be read.
pub async fn compare(
    images: [&NodeRef; 2],
    strict: bool,
    end: u64,
    mut progress: impl FnMut(u64),
) -> Result<Option<Difference>, CompareError> {
    let tasks = stream::unfold(Some(0), |at| async move {
        let at = at.filter(|at| *at < end)?;
        Some(match task(images, strict, at, end).await {
            Ok((len, task)) => (Ok((at, len, task)), Some(at + len)),
            Err(error) => (Err(error), None),
        })
    });
    let results = tasks.map(|task| async move {
        let (at, len, task) = task?;
        Ok((at + len, run(images, at, len, task).await?))
    });
    let mut results = std::pin::pin!(results.buffered(REQUESTS));
    while let Some(result) = results.next().await {
        match result? {
            (_, Some(difference)) => return Ok(Some(difference)),
            (done, None) => progress(done),
        }
    }
    Ok(None)
}

/// Finds the first sector of `image`, whose number is `number`, from `start` to `end` that is not zero.
///
/// # Errors
///
/// The image cannot be read.
pub async fn find_data(
    image: &NodeRef,
    number: usize,
    start: u64,
    end: u64,
    mut progress: impl FnMut(u64),
) -> Result<Option<u64>, CompareError> {
    let mut at = start;
    while at < end {
        let found = status::above(image, None, at, end - at).await;
        let (found, _) = found.map_err(|error| CompareError::Status(number, error))?;
        let mut len = found.len.clamp(1, end - at);
        if found.allocated && !found.zero {
            len = len.min(CHUNK);
            let mut buffer = IoBuffer::zeroed(usize::try_from(len).unwrap_or(usize::MAX));
            read(image, number, at, &mut buffer).await?;
            if let Some(sector) = buffer.bytes().chunks(SECTOR).position(|sector| !is_zero(sector)) {
                return Ok(Some(at + (sector * SECTOR) as u64));
            }
        }
        at += len;
        progress(at);
    }
    Ok(None)
}

async fn task(images: [&NodeRef; 2], strict: bool, at: u64, end: u64) -> Result<(u64, Task), CompareError> {
    let mut found = Vec::with_capacity(2);
    for (number, image) in images.into_iter().enumerate() {
        let status = status::above(image, None, at, image.len() - at).await;
        found.push(status.map_err(|error| CompareError::Status(number, error))?.0);
    }
    let (first, second) = (&found[0], &found[1]);
    let len = first.len.min(second.len).clamp(1, end - at);
    let kind = |status: &block_graph::BlockStatus| (status.data, status.zero, status.allocated);
    let task = match (first.allocated, second.allocated) {
        _ if strict && kind(first) != kind(second) => Task::Differs,
        _ if first.zero && second.zero => Task::Nothing,
        (false, false) => Task::Nothing,
        (true, true) => Task::Both,
        (true, false) => Task::Zero(0),
        (false, true) => Task::Zero(1),
    };
    let reads = matches!(task, Task::Both | Task::Zero(_));
    Ok((if reads { len.min(CHUNK) } else { len }, task))
}

async fn run(
    images: [&NodeRef; 2],
    at: u64,
    len: u64,
    task: Task,
) -> Result<Option<Difference>, CompareError> {
    let buffer = || IoBuffer::zeroed(usize::try_from(len).unwrap_or(usize::MAX));
    let sector = match task {
        Task::Nothing => None,
        Task::Differs => return Ok(Some(Difference::Status(at))),
        Task::Zero(number) => {
            let mut buffer = buffer();
            read(images[number], number, at, &mut buffer).await?;
            buffer.bytes().chunks(SECTOR).position(|sector| !is_zero(sector))
        }
        Task::Both => {
            let (mut first, mut second) = (buffer(), buffer());
            let second_read = read(images[1], 1, at, &mut second);
            futures_util::future::try_join(read(images[0], 0, at, &mut first), second_read).await?;
            let (first, second) = (first.bytes(), second.bytes());
            let differs = || first.chunks(SECTOR).zip(second.chunks(SECTOR)).position(|(a, b)| a != b);
            if first == second { None } else { differs() }
        }
    };
    Ok(sector.map(|sector| Difference::Content(at + (sector * SECTOR) as u64)))
}

async fn read(image: &NodeRef, number: usize, at: u64, buffer: &mut IoBuffer) -> Result<(), CompareError> {
    let io = buffer.io();
    image.read(at, &io).await.map_err(|error| CompareError::Read(number, at, error))
}
