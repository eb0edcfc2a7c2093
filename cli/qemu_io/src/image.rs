//! The commands about the image as a whole.

use crate::format::amount;
use crate::output::line;
use crate::session::Session;
use crate::words::{Failed, Words, number};
use block_graph::{CacheMode, Error, NodeRef, OpenFlags, Preallocation, Role, Truncate};
use blockdev::syntax::json::outline;

/// `alloc`.
pub(crate) async fn alloc(node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let [offset, count @ ..] = words.rest() else { return Err(words.usage()) };
    let start = number(offset)?;
    let mut count = count.first().map_or(Ok(512), |count| number(count))?;
    let (mut done, mut allocated) = (0, 0);
    while done < count {
        let found = node.block_status(start + done, count - done, true).await;
        let found = found.map_err(|error| {
            line(format_args!("is_allocated failed: {}", error.errno()));
            Failed
        })?;
        if found.len == 0 {
            count = done;
        }
        done += found.len;
        if found.allocated {
            allocated += found.len;
        }
    }
    line(format_args!("{allocated}/{count} bytes allocated at offset {}", amount(start as f64)));
    Ok(())
}

/// `map`.
pub(crate) async fn map(session: &Session, node: &NodeRef) -> Result<(), Failed> {
    let end = node.len();
    let mut at = 0;
    while at < end {
        let mut len = 0;
        let mut allocated = None;
        while at + len < end {
            let found = node.block_status(at + len, end - at - len, true).await.map_err(|error| {
                session.error(format_args!("Failed to get allocation status: {}", error.errno()));
                Failed
            })?;
            if found.len == 0 || *allocated.get_or_insert(found.allocated) != found.allocated {
                break;
            }
            len += found.len;
        }
        if len == 0 {
            session.error("Unexpected end of image");
            return Err(Failed);
        }
        let what = if allocated == Some(true) { "    allocated" } else { "not allocated" };
        let (size, offset) = (amount(len as f64), amount(at as f64));
        line(format_args!("{size} ({len:#x}) bytes {what} at offset {offset} ({at:#x})"));
        at += len;
    }
    Ok(())
}

/// `length`.
pub(crate) fn length(node: &NodeRef) {
    line(amount(node.len() as f64));
}

/// `truncate`.
pub(crate) async fn truncate(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let mode = words.value("m").unwrap_or("off");
    let Some(preallocation) = Preallocation::from_name(mode) else {
        session.error(format_args!("Invalid preallocation mode '{mode}'"));
        return Err(Failed);
    };
    let [len] = words.exactly()?;
    let how = Truncate { exact: false, preallocation, zero: false };
    node.truncate(number(len)?, how).await.map_err(|error| say(session, &error))
}

fn say(session: &Session, error: &Error) -> Failed {
    session.error(error);
    error.hints().iter().for_each(|hint| eprintln!("{hint}"));
    Failed
}

/// `info`.
pub(crate) fn info(node: &NodeRef) -> Result<(), Failed> {
    let driver = node.driver();
    line(format_args!("format name: {}", driver.format_name()));
    if driver.edges().is_empty() {
        // A protocol is a format too.
        line(format_args!("format name: {}", driver.format_name()));
    }
    if driver.format_name().starts_with("null-") {
        return Err(Failed);
    }
    let info = driver.image().map(|image| image.info()).unwrap_or_default();
    let cluster = info.cluster_size.unwrap_or_default();
    let is_extended = info
        .specific
        .as_ref()
        .is_some_and(|(_, data)| data.get("extended-l2") == Some(&serde_json::Value::Bool(true)));
    // VM state begins with the first table that no byte of the disk needs.
    let vm_state = match driver.format_name() {
        "qcow2" => {
            let entry = if is_extended { 16 } else { 8 };
            node.len().next_multiple_of((cluster * (cluster / entry)).max(1))
        }
        _ => 0,
    };
    line(format_args!("cluster size: {}", amount(cluster as f64)));
    line(format_args!("vm state offset: {}", amount(vm_state as f64)));
    if let Some((_, data)) = info.specific.filter(|(_, data)| !data.is_empty()) {
        line("Format specific information:");
        outline(&data, 1).iter().for_each(line);
    }
    Ok(())
}

/// Whether an option of a node, or of one below it ("file.driver"), is what it is to be.
fn is_so(node: &NodeRef, option: &str, value: &str) -> bool {
    match option.split_once('.') {
        Some((child, option)) => {
            let role = match child {
                "file" => Role::File,
                "backing" => Role::Backing,
                "data-file" => Role::Data,
                _ => return false,
            };
            node.child(role).is_some_and(|child| is_so(&child, option, value))
        }
        None => match option {
            "driver" => node.driver().format_name() == value,
            "node-name" => node.name() == value,
            _ => false,
        },
    }
}

/// `reopen`.
pub(crate) async fn reopen(session: &Session, node: &NodeRef, words: &Words) -> Result<(), Failed> {
    let fail = |message: &str| {
        session.error(message);
        Failed
    };
    if !words.rest().is_empty() {
        return Err(words.usage());
    }
    if words.has("r") && words.has("w") {
        return Err(fail("Only one -r/-w option may be given"));
    }
    let mut flags: OpenFlags = node.flags();
    if let Some(mode) = words.value("c") {
        let mode =
            CacheMode::from_name(mode).ok_or_else(|| fail(&format!("Invalid cache option: {mode}")))?;
        flags = flags.with_cache(mode);
    }
    if words.has("r") {
        flags = OpenFlags { writable: false, resize: false, ..flags };
    }
    if words.has("w") {
        flags = OpenFlags { writable: true, resize: true, ..flags };
    }
    let mut options = words.value("o").map(|list| session.listed(list)).unwrap_or_default();
    if options.has("read-only") && (words.has("r") || words.has("w")) {
        return Err(fail("Cannot set both -r/-w and 'read-only'"));
    }
    if (options.has("cache.direct") || options.has("cache.no-flush")) && words.has("c") {
        return Err(fail("Cannot set both -c and the cache options"));
    }
    let taken = async {
        if let Some(read_only) = options.take_switch("read-only")? {
            flags.writable = !read_only;
        }
        // It stays what it was: a switch all the same.
        options.take_switch("auto-read-only")?;
        if let Some(direct) = options.take_switch("cache.direct")? {
            flags.direct = direct;
        }
        if let Some(no_flush) = options.take_switch("cache.no-flush")? {
            flags.no_flush = no_flush;
        }
        let drained = node.drain().await;
        if flags.writable == node.read_only() {
            blockdev::chain::set_writable(node, flags.writable).await?;
        }
        node.driver().reopen(&mut options, flags).await?;
        drop(drained);
        if let Some((name, _)) = options.iter().find(|(name, value)| !is_so(node, name, &value.to_string())) {
            let name = name.rsplit('.').next().unwrap_or(name);
            return Err(Error::invalid(format!("Cannot change the option '{name}'")));
        }
        node.set_flags(flags);
        Ok(())
    };
    taken.await.map_err(|error: Error| say(session, &error))
}
