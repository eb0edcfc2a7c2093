//! `bench`.

use crate::commands::flags;
use crate::shared_options::{SharedOptions, with_cache};
use crate::tool::{Failure, Outcome, Tool, number, number_in, one_file, parse};
use block_graph::{Error, NodeRef, OpenFlags, Value, WriteFlags};
use futures_util::stream::{FuturesUnordered, StreamExt};
use io_loop::{IoBuffer, IoVec};
use std::cell::Cell;
use std::process::ExitCode;
use std::time::Instant;

const MOST: u64 = i32::MAX as u64;

struct Work {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: Option<u64>,
    writes: bool,
    flush_interval: u64,
    drains: bool,
    pattern: u8,
}

/// Measures how fast requests are.
pub(crate) async fn run(tool: &Tool, words: Vec<String>) -> Outcome {
    let mut shared = SharedOptions::default();
    let mut work = Work {
        count: 75000,
        depth: 64,
        offset: 0,
        size: 4096,
        step: None,
        writes: false,
        flush_interval: 0,
        drains: true,
        pattern: 0,
    };
    let mut aio = None;
    let operands = parse(flags("bench"), words, |key, value| {
        let Some(value) = shared.take(key, value)? else { return Ok(()) };
        match key {
            "c" => work.count = number_in("request count", &value, 0..=MOST)?,
            "d" => work.depth = number_in("queue depth", &value, 0..=MOST)?,
            "flush-interval" => work.flush_interval = number_in("flush interval", &value, 0..=MOST)?,
            "pattern" => {
                work.pattern = u8::try_from(number_in("pattern byte", &value, 0..=255)?).unwrap_or_default()
            }
            "i" => {
                if !["threads", "native", "io_uring"].contains(&value.as_str()) {
                    return Err(Failure::new(format!("Invalid aio option: {value}")));
                }
                aio = Some(value);
            }
            "n" => aio = Some("native".to_owned()),
            "no-drain" => work.drains = false,
            "o" => work.offset = number("offset", &value)?,
            "s" => work.size = number_in("buffer size", &value, 0..=MOST)?,
            "S" => work.step = Some(number_in("step size", &value, 0..=MOST)?).filter(|step| *step > 0),
            _ => work.writes = true,
        }
        Ok(())
    })?;
    let filename = one_file(operands)?;
    if !work.writes && work.flush_interval > 0 {
        return Err(Failure::new("--flush-interval is only available in write tests"));
    }
    if work.flush_interval > 0 && work.flush_interval < work.depth {
        return Err(Failure::new("Flush interval can't be smaller than depth"));
    }
    let flags = if work.writes {
        OpenFlags { unmap: false, resize: false, ..OpenFlags::WRITE }
    } else {
        OpenFlags::READ
    };
    let flags = with_cache(flags, shared.cache.as_deref(), "")?;
    let context = shared.context();
    let mut named = shared.named(&filename);
    if let Some(aio) = aio.filter(|aio| aio != "threads") {
        named.options.set("file.aio", Value::Text(aio));
    }
    let node = named.open(tool, &context, flags).await?;
    let Work { count, depth, offset, size, .. } = work;
    let step = work.step.unwrap_or(size);
    println!(
        "Sending {count} {} requests, {size} bytes each, {depth} in parallel (starting at offset {offset}, step size \
         {step})",
        if work.writes { "write" } else { "read" },
    );
    if work.flush_interval > 0 {
        println!("Sending flush every {} requests", work.flush_interval);
    }
    let begin = Instant::now();
    let sent = send(&node, &work, step).await;
    let took = begin.elapsed();
    let closed = node.close().await;
    sent.map_err(|error| Failure::new(format!("Failed request: {}", error.errno())))?;
    println!("Run completed in {:.3} seconds.", took.as_secs_f64());
    closed?;
    Ok(ExitCode::SUCCESS)
}

/// Sends the requests, at most so many at once, and a flush now and then.
async fn send(node: &NodeRef, work: &Work, step: u64) -> Result<(), Error> {
    let size = usize::try_from(work.size).unwrap_or(usize::MAX);
    let depth = usize::try_from(work.depth.min(work.count)).unwrap_or(usize::MAX);
    let mut buffers: Vec<IoBuffer> = (0..depth).map(|_| IoBuffer::zeroed(size)).collect();
    let vectors: Vec<IoVec> = buffers
        .iter_mut()
        .map(|buffer| {
            let io = buffer.io();
            io.fill(0, size, work.pattern);
            io
        })
        .collect();
    let next = Cell::new(work.offset);
    let request = |slot: usize| {
        let offset = next.get();
        next.set(if node.is_empty() { 0 } else { (offset + step) % node.len() });
        let io = &vectors[slot];
        async move {
            let done = if work.writes {
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::FUA, node.flags().write_through);
                node.write(offset, io, flags).await
            } else {
                node.read(offset, io).await
            };
            done.map(|()| slot)
        }
    };
    let (mut sent, mut done) = (0, 0);
    let mut in_flight = FuturesUnordered::new();
    let mut free: Vec<usize> = (0..depth).collect();
    while done < work.count {
        // Where flushes wait for all requests, none is begun across the border.
        let border = match work.flush_interval {
            interval @ 1.. if work.drains => (done / interval + 1) * interval,
            _ => u64::MAX,
        };
        while sent < work.count.min(border)
            && let Some(slot) = free.pop()
        {
            in_flight.push(request(slot));
            sent += 1;
        }
        if let Some(slot) = in_flight.next().await {
            free.push(slot?);
            done += 1;
        }
        if work.flush_interval > 0 && done % work.flush_interval == 0 {
            node.flush().await?;
        }
    }
    Ok(())
}
