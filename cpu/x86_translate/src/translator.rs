//! All translated blocks of a VM: finding them, linking them, and dropping them when their bytes change.

use crate::abi::layout::{IBTC_ENTRIES, JitVcpu};
use crate::abi::stubs::Stubs;
use crate::block::decode::MAX_INSTRUCTIONS;
use crate::block::translate::Output;
use crate::context::input::Settings;
use crate::emit::shared::shared_code;
use crate::guest::mode::Mode;
use crate::runtime;
use dbt_code::{CacheError, CodeCache, Emitter};
use guest_memory::{CodeWriteHook, GuestMemory, PAGE_SIZE};
use iced_x86::Instruction;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Stores to a page with code that hit no code, after which its code is dropped all the same: the page holds
/// data that is in use.
const DATA_WRITES: u32 = 64;
const SHARDS: usize = 16;

/// How a VM's code is translated.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of generated code at most.
    pub cache_bytes: usize,
    /// Keep all arithmetic flags exact, also those that are never read: what faulting instructions save is then
    /// exact too.
    pub strict: bool,
    /// Whether locked instructions must be atomic for other processors: false only with one vCPU.
    pub lock_needed: bool,
    /// Instructions in a block at most; 1 to compare with the interpreter step by step.
    pub max_instructions: usize,
    /// Conditional jumps in a block that are passed when not taken.
    pub side_exits: usize,
    /// Whether vCPUs count instructions and stop at exact numbers of them: [`TranslatorVcpu::count_up_to`]. Flags are
    /// exact then, as with `strict`.
    ///
    /// [`TranslatorVcpu::count_up_to`]: crate::TranslatorVcpu::count_up_to
    pub counting: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            strict: false,
            lock_needed: true,
            max_instructions: 64,
            side_exits: 4,
            counting: false,
        }
    }
}

/// A hash for keys that are addresses.
#[derive(Default, Clone, Copy)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// What names a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Of the first byte.
    pub(crate) gpa: u64,
    /// The virtual address of the page less the base of CS, or 0 if the code is independent of it.
    pub(crate) page_va: u64,
    /// The base of CS if [`Mode::BASED`].
    pub(crate) base: u32,
    pub(crate) mode: Mode,
}

impl Key {
    /// The key of the block at the guest physical address `gpa`, which is at `rip` in a code segment with that
    /// base.
    pub(crate) fn new(gpa: u64, rip: u64, base: u64, mode: Mode) -> Self {
        let page_va = rip.wrapping_sub(gpa & 0xfff) & mode.ip_mask();
        Self {
            gpa,
            page_va: if mode.is_relative() { 0 } else { page_va },
            base: if mode.has(Mode::BASED) { base as u32 } else { 0 },
            mode,
        }
    }
}

/// What the map of blocks says of one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Found {
    pub(crate) entry_mem: u64,
    pub(crate) id: u32,
}

struct Block {
    key: Key,
    entry_mem: u64,
    entry_hot: u64,
    depends: Vec<(u16, u16)>,
    /// The next page and how many bytes of it.
    next: Option<(u64, u16)>,
    links: Vec<u32>,
    /// Links that lead here.
    incoming: Vec<u32>,
}

/// A direct jump.
struct Link {
    field: u64,
    stub: u64,
    target: i64,
    memory: bool,
    check: Option<u64>,
    slot: Option<u16>,
    /// Where it led when it was first linked: it is linked to nothing else, as other processors may have
    /// verified that.
    gpa: Option<u64>,
    /// The guest physical page that the jump is in.
    page: u64,
    page_va: u64,
    mode: Mode,
    ungrouped: bool,
    to: Option<u32>,
    /// The number that the check was given.
    number: u32,
    /// The block is gone.
    dead: bool,
}

/// Where a link leads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinkTarget {
    pub(crate) target: i64,
    /// The page of the jump, or 0 if the code is independent of it.
    pub(crate) page_va: u64,
    pub(crate) mode: Mode,
    /// Whether the accesses there share no checks.
    pub(crate) ungrouped: bool,
}

/// What a vCPU notes as verified when a direct jump to another page is linked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verified {
    /// The number of a virtual page with a guest physical page.
    Page(u32),
    /// That the slot's jump may be taken from the page that runs.
    Slot(u16),
}

/// What a translation was made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    /// What [`Translator::begin`] gave.
    pub(crate) sequence: u64,
    /// The same of the next page, with its address and the number of bytes there.
    pub(crate) next: Option<(u64, u64, u16)>,
}

/// The offsets in pages of debuggers' breakpoints, ascending.
pub(crate) type BreakOffsets = Arc<[u16]>;

#[derive(Default)]
struct Page {
    blocks: Vec<u32>,
    /// Differs whenever the page may have been written since.
    sequence: u64,
    data_writes: u32,
}

/// A page from which code was translated while other vCPUs may have been in the middle of a store to it, which
/// nobody would notice.
struct Unsettled {
    gpa: u64,
    /// What the page held before the first translation.
    content: Box<[u8; PAGE_SIZE as usize]>,
    /// The vCPUs with their [`JitVcpu::spells`] then.
    busy: Vec<(*const JitVcpu, u64)>,
}

// SAFETY: the pointers are compared, and followed only while the vCPU is registered.
unsafe impl Send for Unsettled {}

#[derive(Default)]
struct State {
    unsettled: Vec<Unsettled>,
    blocks: Vec<Option<Block>>,
    links: Vec<Link>,
    pages: Map<u64, Page>,
    sequence: u64,
    /// Numbers of (virtual page, guest physical page) pairs.
    numbers: Map<(u64, u64), u32>,
    kept: Vec<Box<Instruction>>,
}

/// A vCPU that other threads reach.
struct Registered(*const JitVcpu);

// SAFETY: only the TLB's tags and the tables' entries are reached through it, which are atomics, and only
// while the vCPU is registered.
unsafe impl Send for Registered {}

/// The translator of a VM: what its vCPUs share.
pub struct Translator {
    pub(crate) memory: GuestMemory,
    pub(crate) settings: Settings,
    pub(crate) cache: CodeCache,
    pub(crate) stubs: Stubs,
    stub_bytes: usize,
    map: [RwLock<Map<Key, Found>>; SHARDS],
    state: Mutex<State>,
    vcpus: Mutex<Vec<Registered>>,
    /// Slots of direct jumps between pages given out.
    pub(crate) slots: AtomicU32,
    /// How many pages are unsettled.
    unsettled: AtomicUsize,
    /// Incremented when blocks are dropped.
    pub(crate) invalidations: Arc<AtomicU64>,
    /// Incremented when all code goes.
    pub(crate) epoch: AtomicU64,
    /// Held for reading while generated code runs, for writing while all of it goes. Holds what debuggers' breakpoints
    /// mean for translations.
    pub(crate) running: RwLock<BreakOffsets>,
}

impl Translator {
    /// A translator of code in `memory`. It is to be made the memory's code hook
    /// ([`GuestMemory::set_code_hook`]).
    ///
    /// # Errors
    /// [`CacheError`] if the host has no memory for code.
    pub fn new(memory: GuestMemory, options: &Options) -> Result<Arc<Self>, CacheError> {
        let cache = CodeCache::new(options.cache_bytes.max(4 << 20))?;
        let stub_bytes = 16384;
        let Some(mut emitter) = cache.allocate(stub_bytes) else {
            let source = std::io::ErrorKind::OutOfMemory.into();
            return Err(CacheError { bytes: options.cache_bytes, source });
        };
        let avx = is_x86_feature_detected!("avx");
        let stubs = shared_code(&mut emitter, &runtime::entries(), avx);
        assert!(!emitter.overflowed(), "the shared code fits its space");
        let settings = Settings {
            strict: options.strict || options.counting,
            bmi2: is_x86_feature_detected!("bmi2"),
            lock_needed: options.lock_needed,
            max_instructions: options.max_instructions.clamp(1, MAX_INSTRUCTIONS),
            side_exits: options.side_exits,
            counting: options.counting,
        };
        Ok(Arc::new(Self {
            memory,
            settings,
            cache,
            stubs,
            stub_bytes,
            map: Default::default(),
            state: Mutex::default(),
            vcpus: Mutex::default(),
            slots: AtomicU32::new(0),
            unsettled: AtomicUsize::new(0),
            invalidations: Arc::default(),
            epoch: AtomicU64::new(0),
            running: RwLock::default(),
        }))
    }

    pub(crate) fn register(&self, vcpu: *const JitVcpu) {
        self.vcpus.lock().push(Registered(vcpu));
    }

    pub(crate) fn unregister(&self, vcpu: *const JitVcpu) {
        self.vcpus.lock().retain(|registered| registered.0 != vcpu);
    }

    fn shard(&self, key: &Key) -> &RwLock<Map<Key, Found>> {
        &self.map[(key.gpa >> 4 ^ key.gpa >> 12) as usize % SHARDS]
    }

    /// The block of that key; `with` runs while it cannot be dropped.
    pub(crate) fn find(&self, key: &Key, with: impl FnOnce(&Found)) -> Option<Found> {
        let shard = self.shard(key).read();
        let found = shard.get(key)?;
        with(found);
        Some(*found)
    }

    /// Begins a translation by the vCPU `by` from the page at `gpa`: stores to it are noticed from now on.
    /// Gives what [`Translator::install`] wants.
    pub(crate) fn begin(&self, gpa: u64, by: *const JitVcpu) -> u64 {
        let gpa = gpa & !(PAGE_SIZE - 1);
        let mut state = self.state.lock();
        if let Some(page) = state.pages.get(&gpa) {
            return page.sequence;
        }
        state.sequence += 1;
        let sequence = state.sequence;
        state.pages.insert(gpa, Page { sequence, ..Page::default() });
        self.memory.mark_code(gpa);
        if let Some(host) = self.memory.host_page(gpa) {
            for vcpu in self.vcpus.lock().iter() {
                // SAFETY: registered vCPUs are alive; the TLB's tags are atomics.
                let tlb = unsafe { &(*vcpu.0).cpu.tlb };
                tlb.invalidate_writes(host.ptr as u64);
            }
            self.unsettle(&mut state, gpa, by);
        }
        sequence
    }

    /// Notes which other vCPUs may have looked up their right to store to the page at `gpa` before it was
    /// taken from them, and not stored yet. When all of them have been between two instructions,
    /// [`Translator::settle`] looks at the page once more.
    fn unsettle(&self, state: &mut State, gpa: u64, by: *const JitVcpu) {
        let vcpus = self.vcpus.lock();
        if vcpus.len() < 2 {
            return;
        }
        // Before the look at the others: who ends a spell after it sees this, and calls `settle`.
        self.unsettled.fetch_add(1, Ordering::SeqCst);
        let mut busy = Vec::new();
        for vcpu in vcpus.iter().filter(|vcpu| vcpu.0 != by) {
            // SAFETY: registered vCPUs are alive; these fields are atomics.
            let (spells, exit_request) = unsafe { (&(*vcpu.0).spells, &(*vcpu.0).cpu.exit_request) };
            let spell = spells.load(Ordering::SeqCst);
            if spell & 1 != 0 {
                busy.push((vcpu.0, spell));
                exit_request.fetch_or(1, Ordering::SeqCst);
            }
        }
        let mut content = Box::new([0; PAGE_SIZE as usize]);
        if busy.is_empty() || self.memory.read(gpa, &mut content[..]).is_err() {
            self.unsettled.fetch_sub(1, Ordering::SeqCst);
        } else {
            state.unsettled.push(Unsettled { gpa, content, busy });
        }
    }

    /// A vCPU begins to execute instructions.
    pub(crate) fn spell_begins(vcpu: &JitVcpu) {
        vcpu.spells.fetch_add(1, Ordering::SeqCst);
    }

    /// A vCPU is between two instructions, and about to do something else.
    pub(crate) fn spell_ends(&self, vcpu: &JitVcpu) {
        vcpu.spells.fetch_add(1, Ordering::SeqCst);
        if self.unsettled.load(Ordering::SeqCst) != 0 {
            self.settle();
        }
    }

    /// Drops what was translated from bytes that a store unnoticed changed, of the pages where that cannot
    /// happen any more.
    fn settle(&self) {
        let mut settled = Vec::new();
        {
            let mut state = self.state.lock();
            let vcpus = self.vcpus.lock();
            let under_way = |(vcpu, spell): &(*const JitVcpu, u64)| {
                let registered = vcpus.iter().find(|registered| registered.0 == *vcpu);
                // SAFETY: registered vCPUs are alive; the field is an atomic.
                registered.is_some_and(|vcpu| unsafe { &(*vcpu.0).spells }.load(Ordering::SeqCst) == *spell)
            };
            let mut index = 0;
            while let Some(page) = state.unsettled.get_mut(index) {
                page.busy.retain(under_way);
                if page.busy.is_empty() {
                    settled.push(state.unsettled.swap_remove(index));
                } else {
                    index += 1;
                }
            }
            self.unsettled.fetch_sub(settled.len(), Ordering::SeqCst);
        }
        let mut now = [0; PAGE_SIZE as usize];
        for Unsettled { gpa, content, .. } in settled {
            if self.memory.read(gpa, &mut now).is_err() {
                continue;
            }
            let changed = |pair: (&u8, &u8)| pair.0 != pair.1;
            let first = content.iter().zip(&now).position(changed);
            let last = content.iter().zip(&now).rposition(changed);
            if let (Some(first), Some(last)) = (first, last) {
                self.invalidate(gpa, first as u16, last as u16 + 1);
            }
        }
    }

    /// Makes a translated block known. `None` if the page was written meanwhile, or another processor was
    /// faster with the same block: the code is then of no use.
    pub(crate) fn install(
        &self,
        key: Key,
        source: Source,
        output: Output,
        cold: &mut Emitter,
        with: impl FnOnce(&Found),
    ) -> Option<Found> {
        let page_gpa = key.gpa & !(PAGE_SIZE - 1);
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if state.pages.get(&page_gpa).is_none_or(|page| page.sequence != source.sequence) {
            return None;
        }
        if let Some((gpa, sequence, _)) = source.next
            && state.pages.get(&gpa).is_none_or(|page| page.sequence != sequence)
        {
            return None;
        }
        let id = state.blocks.len() as u32;
        let mut links = Vec::with_capacity(output.links.len());
        for link in output.links {
            let number = state.links.len() as u32;
            for field in link.numbers {
                cold.set_dword(field, number);
            }
            links.push(number);
            state.links.push(Link {
                field: link.field,
                stub: link.stub,
                target: link.target,
                memory: link.memory,
                check: link.check,
                slot: link.slot,
                gpa: None,
                page: page_gpa,
                page_va: key.page_va,
                mode: key.mode,
                ungrouped: link.ungrouped,
                to: None,
                number: 0,
                dead: false,
            });
        }
        let mut shard = self.shard(&key).write();
        if shard.contains_key(&key) {
            return None;
        }
        for gpa in [Some(page_gpa), source.next.map(|next| next.0)].into_iter().flatten() {
            if let Some(page) = state.pages.get_mut(&gpa) {
                page.blocks.push(id);
            }
        }
        state.kept.extend(output.kept);
        state.blocks.push(Some(Block {
            key,
            entry_mem: output.entry_mem,
            entry_hot: output.entry_hot,
            depends: output.depends,
            next: source.next.map(|(gpa, _, len)| (gpa, len)),
            links,
            incoming: vec![],
        }));
        let found = Found { entry_mem: output.entry_mem, id };
        with(&found);
        shard.insert(key, found);
        Some(found)
    }

    /// Where a link leads.
    pub(crate) fn link_target(&self, link: u32) -> LinkTarget {
        let state = self.state.lock();
        let link = &state.links[link as usize];
        LinkTarget { target: link.target, page_va: link.page_va, mode: link.mode, ungrouped: link.ungrouped }
    }

    /// Links a direct jump to the block at the linear address `va`, so that it is taken without leaving generated
    /// code. Gives what the vCPU notes as verified if the jump is to another page.
    pub(crate) fn link(&self, number: u32, to: u32, va: u64) -> Option<Verified> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let target = state.blocks.get_mut(to as usize)?.as_mut()?;
        let link = state.links.get_mut(number as usize)?;
        if link.dead || (link.mode.0 ^ target.key.mode.0) & !Mode::UNGROUPED != 0 {
            return None;
        }
        if link.check.is_none() && link.slot.is_none() && target.key.gpa & !(PAGE_SIZE - 1) != link.page {
            // The page was mapped anew since the jump's block began. Nothing looks at that where it jumps.
            return None;
        }
        if link.to.is_some_and(|linked| linked != to) || link.gpa.is_some_and(|gpa| gpa != target.key.gpa) {
            return None;
        }
        if link.to.is_none() {
            link.to = Some(to);
            link.gpa = Some(target.key.gpa);
            target.incoming.push(number);
            let entry = if link.memory { target.entry_mem } else { target.entry_hot };
            self.cache.patch(link.field, entry.wrapping_sub(link.field + 4) as u32);
            if let Some(check) = link.check {
                let pair = (va & !0xfff, target.key.gpa & !0xfff);
                let next = state.numbers.len() as u32 + 1;
                link.number = *state.numbers.entry(pair).or_insert(next);
                self.cache.patch(check, link.number);
            }
        }
        match (link.slot, link.number) {
            (Some(slot), _) => Some(Verified::Slot(slot)),
            (None, 0) => None,
            (None, number) => Some(Verified::Page(number)),
        }
    }

    /// Drops a block. The caller holds the state.
    fn kill(&self, state: &mut State, id: u32) {
        let Some(block) = state.blocks[id as usize].take() else { return };
        // Before anything that is looked at without a lock.
        self.invalidations.fetch_add(1, Ordering::SeqCst);
        self.shard(&block.key).write().remove(&block.key);
        for number in block.incoming {
            let link = &mut state.links[number as usize];
            if let Some(check) = link.check {
                self.cache.patch(check, 0);
            }
            self.cache.patch(link.field, link.stub.wrapping_sub(link.field + 4) as u32);
            link.to = None;
            link.number = 0;
        }
        for number in block.links {
            let link = &mut state.links[number as usize];
            link.dead = true;
            let Some(target) = link.to.take() else { continue };
            // Processors may yet return into this block, and nothing will say when the target goes.
            self.cache.patch(link.field, link.stub.wrapping_sub(link.field + 4) as u32);
            if let Some(Some(target)) = state.blocks.get_mut(target as usize) {
                target.incoming.retain(|incoming| *incoming != number);
            }
        }
        let table = block.key.mode.table();
        for vcpu in self.vcpus.lock().iter() {
            // SAFETY: registered vCPUs are alive; the entries are atomics.
            let table = unsafe { &(*vcpu.0).ibtc[table] };
            let offset = block.key.page_va.wrapping_add(block.key.gpa & 0xfff) as usize & 0xfff;
            for high in 0..IBTC_ENTRIES >> 12 {
                let index = high << 12 | offset;
                if table[index].host.load(Ordering::Relaxed) == block.entry_mem {
                    table[index].clear(index);
                }
            }
        }
        for gpa in [Some(block.key.gpa & !0xfff), block.next.map(|next| next.0)].into_iter().flatten() {
            if let Some(page) = state.pages.get_mut(&gpa) {
                page.blocks.retain(|other| *other != id);
                if page.blocks.is_empty() {
                    state.pages.remove(&gpa);
                    self.memory.unmark_code(gpa);
                }
            }
        }
    }

    /// Drops the blocks of a page that depend on bytes `from..to` of it; all of them if the page seems to hold
    /// data.
    fn invalidate(&self, gpa: u64, from: u16, to: u16) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.sequence += 1;
        let sequence = state.sequence;
        let Some(page) = state.pages.get_mut(&gpa) else { return };
        page.sequence = sequence;
        page.data_writes += 1;
        let all = page.data_writes > DATA_WRITES;
        let blocks = page.blocks.clone();
        for id in blocks {
            let Some(Some(block)) = state.blocks.get(id as usize) else { continue };
            let overlaps = match block.next {
                Some((next, len)) if next == gpa => from < len,
                _ => block.depends.iter().any(|(start, end)| *start < to && from < *end),
            };
            if all || overlaps {
                self.kill(state, id);
            }
        }
        if state.pages.get(&gpa).is_some_and(|page| page.blocks.is_empty()) {
            state.pages.remove(&gpa);
            self.memory.unmark_code(gpa);
        }
    }

    /// Drops all code. The caller holds `running` for writing.
    pub(crate) fn flush(&self) {
        let mut state = self.state.lock();
        for shard in &self.map {
            shard.write().clear();
        }
        for gpa in state.pages.keys() {
            self.memory.unmark_code(*gpa);
        }
        self.unsettled.fetch_sub(state.unsettled.len(), Ordering::SeqCst);
        *state = State { sequence: state.sequence + 1, ..State::default() };
        self.slots.store(0, Ordering::Relaxed);
        self.cache.reset(self.stub_bytes);
        self.epoch.fetch_add(1, Ordering::Release);
        self.invalidations.fetch_add(1, Ordering::Release);
    }

    /// Says where debuggers have breakpoints, of all vCPUs: at these linear addresses no block goes on and none begins,
    /// so that the run loop sees them. (An offset in any page counts, as blocks are found by physical address, and
    /// some are independent of their virtual one: a few instructions elsewhere are interpreted.) Not to be called while
    /// a vCPU of this thread runs.
    pub fn set_breakpoints(&self, addresses: impl IntoIterator<Item = u64>) {
        let mut offsets: Vec<u16> = addresses.into_iter().map(|address| (address & 0xfff) as u16).collect();
        offsets.sort_unstable();
        offsets.dedup();
        let offsets: BreakOffsets = offsets.into();
        if *self.running.read() == offsets {
            return;
        }
        let mut running = loop {
            self.interrupt_all();
            if let Some(guard) = self.running.try_write_for(Duration::from_millis(1)) {
                break guard;
            }
        };
        let new: Vec<u16> =
            offsets.iter().copied().filter(|offset| running.binary_search(offset).is_err()).collect();
        *running = offsets;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        for id in 0..state.blocks.len() as u32 {
            let Some(Some(block)) = state.blocks.get(id as usize) else { continue };
            if block.depends.iter().any(|(start, end)| new.iter().any(|at| start <= at && at < end)) {
                self.kill(state, id);
            }
        }
    }

    /// Asks all vCPUs to leave generated code.
    pub(crate) fn interrupt_all(&self) {
        for vcpu in self.vcpus.lock().iter() {
            // SAFETY: registered vCPUs are alive; the request is an atomic.
            unsafe { &(*vcpu.0).cpu.exit_request }.fetch_or(1, Ordering::Release);
        }
    }
}

impl CodeWriteHook for Translator {
    fn code_written(&self, gpa: u64, len: u64) {
        let from = (gpa & 0xfff) as u16;
        let to = (u64::from(from) + len).min(PAGE_SIZE) as u16;
        self.invalidate(gpa & !(PAGE_SIZE - 1), from, to);
    }
}
