//! Errors that are injected on purpose, at points of an image format's work that have names.
//!
//! Rules belong to an event. `inject-error` has requests fail once its event has come; `set-state` goes to another
//! state, and a rule may belong to one state only. So "the second write of a refcount block after the first L2 update"
//! can be made to fail. They come from options and from a file (`[inject-error]`, then lines such as
//! `event = "l2_update"`). Breakpoints keep requests until they are resumed.

use crate::filter::{Filter, FilterDriver, open_below};
use block_graph::{
    BlockStatus, Driver, DriverKind, Edge, Errno, Error, Limits, NodeRef, OpenContext, OpenFlags, Options,
    Result, Role, WriteFlags, ZeroFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// The events that there are.
const EVENTS: &[&str] = &[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
];

/// The largest value of options that are sizes, in bytes.
const MOST_SIZE: u64 = i32::MAX as u64;
/// The longest configuration file that is read, in bytes.
const MOST_CONFIG: u64 = 1 << 20;

/// Kinds of requests, as bits.
const IO_TYPES: [(&str, u8); 6] = [
    ("read", READ),
    ("write", WRITE),
    ("write-zeroes", WRITE_ZEROES),
    ("discard", DISCARD),
    ("flush", FLUSH),
    ("block-status", BLOCK_STATUS),
];
const READ: u8 = 1;
const WRITE: u8 = 2;
const WRITE_ZEROES: u8 = 4;
const DISCARD: u8 = 8;
const FLUSH: u8 = 16;
const BLOCK_STATUS: u8 = 32;

#[derive(Debug, Clone)]
enum Action {
    Inject(Injection),
    SetState(u64),
    /// The breakpoint of this name.
    Suspend(String),
}

#[derive(Debug, Clone)]
struct Injection {
    errno: i32,
    once: bool,
    immediately: bool,
    delay: Duration,
    /// The request that has this byte, in bytes; any if there is none.
    offset: Option<u64>,
    io_types: u8,
}

#[derive(Debug, Clone)]
struct Rule {
    number: u64,
    event: &'static str,
    /// The state it belongs to; 0 for any.
    state: u64,
    action: Action,
}

/// A request that a breakpoint keeps.
#[derive(Debug)]
struct Suspended {
    number: u64,
    tag: String,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct State {
    state: u64,
    next: u64,
    /// The last rule first.
    rules: Vec<Rule>,
    /// Numbers of the rules whose errors are injected.
    active: Vec<u64>,
    /// Breakpoints that were reached: the next requests are kept.
    reached: Vec<String>,
    suspended: Vec<Suspended>,
}

/// The filter `blkdebug`.
#[derive(Debug)]
pub struct Blkdebug {
    image: Arc<Edge>,
    config: Option<String>,
    overrides: Limits,
    plain: bool,
    state: Mutex<State>,
}

fn known_event(name: &str) -> Option<&'static str> {
    EVENTS.iter().copied().find(|event| *event == name)
}

impl Rule {
    /// A rule of its group's options.
    fn parse(inject: bool, options: &mut Options) -> Result<Self> {
        let unknown = |value: &str| Error::invalid(format!("invalid parameter value: {value}"));
        let event =
            options.take_text("event").ok_or_else(|| Error::invalid("Missing event name for rule"))?;
        let event = known_event(&event).ok_or_else(|| unknown(&event))?;
        let state = options.take_number("state")?.unwrap_or(0);
        let action = if inject {
            let io_types = match options.take_text("iotype") {
                None => READ | WRITE | WRITE_ZEROES | DISCARD | FLUSH,
                Some(name) => {
                    let found = IO_TYPES.iter().find(|(known, _)| *known == name);
                    found.ok_or_else(|| unknown(&name))?.1
                }
            };
            let errno = options.take_number("errno")?.unwrap_or(5);
            // -1 is how people say that it is any.
            let any = options.get("sector").is_some_and(|sector| sector.to_string() == "-1");
            let sector =
                if any { options.take("sector").and(None) } else { options.take_number("sector")? };
            Action::Inject(Injection {
                errno: i32::try_from(errno)
                    .map_err(|_| Error::invalid(format!("there is no errno {errno}")))?,
                once: options.take_switch("once")?.unwrap_or(false),
                immediately: options.take_switch("immediately")?.unwrap_or(false),
                delay: Duration::from_nanos(options.take_number("delay-ns")?.unwrap_or(0)),
                offset: sector.map(|sector| sector.saturating_mul(512)),
                io_types,
            })
        } else {
            Action::SetState(options.take_number("new_state")?.unwrap_or(0))
        };
        if let Some(unknown) = options.first_name() {
            return Err(Error::invalid(format!("Invalid parameter '{unknown}'")));
        }
        Ok(Self { number: 0, event, state, action })
    }
}

/// The groups of a configuration file: name, options.
fn parse_config(name: &str, text: &str) -> Result<Vec<(bool, Options)>> {
    let mut groups: Vec<(bool, Options)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let wrong = |what: &str| Error::invalid(format!("{name}:{}: {what}", number + 1));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            match group.split_whitespace().next() {
                Some("inject-error") => groups.push((true, Options::new())),
                Some("set-state") => groups.push((false, Options::new())),
                _ => return Err(wrong(&format!("There is no option group '{group}'"))),
            }
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(|| wrong("parse error"))?;
        let value = value.trim().strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let value = value.ok_or_else(|| wrong("parse error"))?;
        let (_, options) = groups.last_mut().ok_or_else(|| wrong("no group defined"))?;
        options.set(key.trim(), value);
    }
    Ok(groups)
}

/// The rules that options have as `name.0.event`, `name.1.event`, or, if there is one only, `name.event`.
fn take_groups(options: &mut Options, name: &str) -> Vec<Options> {
    let all = options.take_child(name);
    let mut groups: BTreeMap<u64, Options> = BTreeMap::new();
    for (key, value) in all.iter() {
        let numbered = key.split_once('.').and_then(|(number, rest)| Some((number.parse().ok()?, rest)));
        let (number, key) = numbered.unwrap_or((0, key));
        groups.entry(number).or_default().set(key, value.clone());
    }
    groups.into_values().collect()
}

impl Blkdebug {
    /// The filter that a node is, if it is one.
    #[must_use]
    pub fn of(node: &NodeRef) -> Option<&Self> {
        node.driver().as_any().downcast_ref()
    }

    fn add_rule(&self, rule: Rule) {
        let mut state = self.state.lock();
        state.next += 1;
        let number = state.next;
        state.rules.insert(0, Rule { number, ..rule });
    }

    fn event(&self, event: &'static str) {
        let mut state = self.state.lock();
        let current = state.state;
        let rules = state.rules.iter().filter(|rule| rule.event == event);
        let rules: Vec<Rule> =
            rules.filter(|rule| rule.state == 0 || rule.state == current).cloned().collect();
        let mut first = true;
        for rule in rules {
            match rule.action {
                Action::Inject(_) => {
                    if std::mem::take(&mut first) {
                        state.active.clear();
                    }
                    state.active.insert(0, rule.number);
                }
                Action::SetState(new) => state.state = new,
                Action::Suspend(tag) => {
                    state.rules.retain(|other| other.number != rule.number);
                    state.reached.push(tag);
                }
            }
        }
    }

    /// Has the next request that comes after an event wait, under a name. `false` if there is no such event.
    pub fn set_breakpoint(&self, event: &str, tag: &str) -> bool {
        let Some(event) = known_event(event) else { return false };
        self.add_rule(Rule { number: 0, event, state: 0, action: Action::Suspend(tag.to_owned()) });
        true
    }

    /// Takes the breakpoints of a name away, and lets the requests go that they keep. `false` if there are none.
    pub fn remove_breakpoint(&self, tag: &str) -> bool {
        let removed = {
            let mut state = self.state.lock();
            let before = state.rules.len() + state.reached.len();
            state.rules.retain(|rule| !matches!(&rule.action, Action::Suspend(other) if other == tag));
            state.reached.retain(|other| other != tag);
            before != state.rules.len() + state.reached.len()
        };
        let mut resumed = false;
        while self.resume(tag) {
            resumed = true;
        }
        removed || resumed
    }

    /// Lets one request go that a breakpoint of this name keeps. `false` if there is none.
    pub fn resume(&self, tag: &str) -> bool {
        let mut state = self.state.lock();
        let Some(at) = state.suspended.iter().rposition(|request| request.tag == tag) else { return false };
        let request = state.suspended.remove(at);
        drop(state);
        // People who debug look for this line.
        println!("blkdebug: Resuming request '{tag}'");
        if let Some(waker) = request.waker {
            waker.wake();
        }
        true
    }

    /// Whether a breakpoint of this name keeps a request.
    pub fn is_suspended(&self, tag: &str) -> bool {
        self.state.lock().suspended.iter().any(|request| request.tag == tag)
    }

    /// Waits as long as a breakpoint that was reached says.
    async fn wait_if_suspended(&self) {
        let number = {
            let mut state = self.state.lock();
            if state.reached.is_empty() {
                return;
            }
            let tag = state.reached.remove(0);
            state.next += 1;
            let number = state.next;
            println!("blkdebug: Suspended request '{tag}'");
            state.suspended.push(Suspended { number, tag, waker: None });
            number
        };
        poll_fn(|context| {
            let mut state = self.state.lock();
            match state.suspended.iter_mut().find(|request| request.number == number) {
                Some(request) => {
                    request.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            }
        })
        .await;
    }

    /// Fails if a rule says so.
    async fn check(&self, offset: u64, len: u64, io_type: u8) -> Result<()> {
        self.wait_if_suspended().await;
        let injection = {
            let mut state = self.state.lock();
            let hit = |injection: &Injection| {
                injection.io_types & io_type != 0
                    && injection
                        .offset
                        .is_none_or(|at| len > 0 && at >= offset && at < offset.saturating_add(len))
            };
            let found = state.active.iter().find_map(|number| {
                let rule = state.rules.iter().find(|rule| rule.number == *number)?;
                match &rule.action {
                    Action::Inject(injection) if hit(injection) => Some((*number, injection.clone())),
                    _ => None,
                }
            });
            let Some((number, injection)) = found else { return Ok(()) };
            if injection.once {
                state.active.retain(|active| *active != number);
                state.rules.retain(|rule| rule.number != number);
            }
            injection
        };
        if !injection.delay.is_zero() {
            io_loop::sleep(injection.delay).await;
        }
        if !injection.immediately {
            io_loop::yield_now().await;
        }
        if injection.errno == 0 { Ok(()) } else { Err(Error::errno_only(Errno::new(injection.errno))) }
    }
}

/// The part of a range that is aligned, if there is one.
fn aligned_part(offset: u64, len: u64, alignment: u64) -> Option<(u64, u64)> {
    let start = offset.checked_next_multiple_of(alignment)?;
    let end = offset.checked_add(len)? / alignment * alignment;
    (start < end).then_some((start, end))
}

#[async_trait(?Send)]
impl Filter for Blkdebug {
    const NAME: &'static str = "blkdebug";

    fn below(&self) -> &Arc<Edge> {
        &self.image
    }

    fn limits(&self) -> Limits {
        let (below, own) = (self.image.node().driver().limits(), self.overrides);
        let or = |own: u64, below: u64| if own == 0 { below } else { own };
        Limits {
            request_alignment: below.request_alignment.max(own.request_alignment),
            max_transfer: or(own.max_transfer, below.max_transfer),
            write_zeroes_alignment: or(own.write_zeroes_alignment, below.write_zeroes_alignment),
            max_write_zeroes: or(own.max_write_zeroes, below.max_write_zeroes),
            discard_alignment: or(own.discard_alignment, below.discard_alignment),
            max_discard: or(own.max_discard, below.max_discard),
            ..below
        }
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.check(offset, into.len() as u64, READ).await?;
        self.image.node().read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.event("pwritev");
        self.check(offset, from.len() as u64, WRITE).await?;
        let written = self.image.node().write(offset, from, flags).await;
        self.event("pwritev_done");
        written
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.event("pwritev_zero");
        let limits = Filter::limits(self);
        let alignment = u64::from(limits.request_alignment).max(limits.write_zeroes_alignment);
        let Some((start, end)) = aligned_part(offset, len, alignment) else {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        };
        if flags.contains(ZeroFlags::NO_FALLBACK) && (start, end) != (offset, offset + len) {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let write_flags = if flags.contains(ZeroFlags::FUA) { WriteFlags::FUA } else { WriteFlags::empty() };
        for (from, to) in [(offset, start), (end, offset + len)] {
            if from < to {
                let zeroes = IoBuffer::zeroed((to - from) as usize).into_io();
                Filter::write(self, from, &zeroes, write_flags).await?;
            }
        }
        self.check(start, end - start, WRITE_ZEROES).await?;
        let zeroed = self.image.node().write_zeroes(start, end - start, flags).await;
        self.event("pwritev_done");
        zeroed
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let alignment = u64::from(Filter::limits(self).request_alignment);
        let Some((start, end)) = aligned_part(offset, len, alignment) else { return Ok(()) };
        self.check(start, end - start, DISCARD).await?;
        self.image.node().discard(start, end - start).await
    }

    async fn flush(&self) -> Result<()> {
        self.check(0, 0, FLUSH).await?;
        self.image.node().flush().await
    }

    async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        self.check(offset, len, BLOCK_STATUS).await?;
        self.image.node().block_status(offset, len, precise).await
    }

    fn filename(&self) -> Option<String> {
        let image = self.image.node().filename().filter(|_| self.plain)?;
        Some(format!("blkdebug:{}:{image}", self.config.as_deref().unwrap_or_default()))
    }

    fn open_options(&self) -> Options {
        self.config.iter().map(|config| ("config", config.as_str())).collect()
    }

    fn debug_event(&self, event: &'static str) {
        self.event(event);
    }
}

/// The driver `blkdebug`.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlkdebugKind;

/// Takes the limits that are to be shown instead of the image's.
fn take_overrides(options: &mut Options, below: u64) -> Result<Limits> {
    let mut size = |name: &str, multiple: u64| {
        let value = options.take_size(name)?.unwrap_or(0);
        if value >= MOST_SIZE || !value.is_multiple_of(multiple) {
            return Err(Error::invalid(format!("Cannot meet constraints with {name} {value}")));
        }
        Ok(value)
    };
    let align = size("align", 1)?;
    if align > 0 && !align.is_power_of_two() {
        return Err(Error::invalid(format!("Cannot meet constraints with align {align}")));
    }
    let alignment = align.max(below);
    let max_transfer = size("max-transfer", alignment)?;
    let write_zeroes_alignment = size("opt-write-zero", alignment)?;
    let max_write_zeroes = size("max-write-zero", alignment.max(write_zeroes_alignment))?;
    let discard_alignment = size("opt-discard", alignment)?;
    let max_discard = size("max-discard", alignment.max(discard_alignment))?;
    Ok(Limits {
        request_alignment: align.max(1) as u32,
        max_transfer,
        write_zeroes_alignment,
        max_write_zeroes,
        discard_alignment,
        max_discard,
        ..Limits::default()
    })
}

fn read_config(name: &str) -> Result<String> {
    let failed = |error: std::io::Error| Error::from(error).context("Could not read blkdebug config file");
    if fs::metadata(name).map_err(failed)?.len() > MOST_CONFIG {
        return Err(Error::invalid(format!(
            "blkdebug config file '{name}' is longer than {MOST_CONFIG} bytes"
        )));
    }
    fs::read_to_string(name).map_err(failed)
}

#[async_trait(?Send)]
impl DriverKind for BlkdebugKind {
    fn name(&self) -> &'static str {
        Blkdebug::NAME
    }

    fn protocol_prefixes(&self) -> &'static [&'static str] {
        &["blkdebug"]
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let Some(rest) = filename.strip_prefix("blkdebug:") else {
            return Ok(Options::with("image.filename", filename));
        };
        let (config, image) = rest
            .split_once(':')
            .ok_or_else(|| Error::invalid("blkdebug requires both config file and image path"))?;
        let mut options = Options::with("image.filename", image);
        if !config.is_empty() {
            options.set("config", config);
        }
        Ok(options)
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        if let Some(filename) = options.take_text("filename") {
            options.merge_defaults(self.parse_filename(&filename)?);
        }
        let config = options.take_text("config");
        let mut groups = match &config {
            Some(name) => parse_config(name, &read_config(name)?)?,
            None => Vec::new(),
        };
        let from_file = groups.len();
        groups.extend(take_groups(options, "inject-error").into_iter().map(|group| (true, group)));
        groups.extend(take_groups(options, "set-state").into_iter().map(|group| (false, group)));
        let mut plain = groups.len() == from_file;
        // Errors first, as it matters which rule comes first.
        groups.sort_by_key(|(inject, _)| !inject);
        let rules = groups.into_iter().map(|(inject, mut group)| Rule::parse(inject, &mut group));
        let rules = rules.collect::<Result<Vec<Rule>>>()?;
        // Which permissions are taken on the image is for tests of QEMU's own permission system.
        options.take_child("take-child-perms");
        options.take_child("unshare-child-perms");
        let image = open_below(context, options, "image", flags).await?;
        let below = image.driver().limits().request_alignment;
        let overrides = take_overrides(options, u64::from(below))?;
        plain = plain && overrides == Limits { request_alignment: 1, ..Limits::default() };
        let filter = Blkdebug {
            image: Edge::new(Role::Filtered, image),
            config,
            overrides,
            plain,
            state: Mutex::new(State { state: 1, ..State::default() }),
        };
        rules.into_iter().for_each(|rule| filter.add_rule(rule));
        filter.event("none");
        Ok(Box::new(FilterDriver(filter)))
    }
}
