//! One vCPU: the run loop around generated code.

use crate::abi::counters::Counters;
use crate::abi::layout::{
    ExitReason, FrameSwitch, HOST_CONTROL, IBTC_ENTRIES, IbtcEntry, JitVcpu, PAGE_CHECKS, TABLES,
};
use crate::block::translate::translate;
use crate::context::input::Input;
use crate::guest::mode::Mode;
use crate::translator::{BreakOffsets, Found, Key, LinkTarget, Source, Translator, Verified};
use dbt_code::Emitter;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use x86_core::{Core, Cpu, Flow, Generation, Platform, Seg, Trap, WORLDS, flags, width};

/// The longest instruction there is.
const LONGEST: usize = 15;
/// Bytes of the cache that a vCPU takes at a time.
const CHUNK: usize = 256 << 10;
/// What the largest block may take.
const RESERVE: usize = 64 << 10;

/// Why [`TranslatorVcpu::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// [`Cpu::exit_request`] is set. Whoever runs the vCPU clears it.
    Requested,
    /// The processor waits in HLT.
    Halt,
    /// Interrupts can be taken now, which was asked for by [`TranslatorVcpu::set_interrupt_window`].
    InterruptWindow,
    /// The next instruction is at one of the breakpoints of [`TranslatorVcpu::set_breakpoints`].
    Breakpoint,
    /// The last instruction met what a debugger watches: [`Cpu::take_watch_met`].
    Watchpoint,
    /// The count is what [`TranslatorVcpu::count_up_to`] was told.
    Counted,
}

/// A processor that runs translated code.
pub struct TranslatorVcpu {
    jit: Box<JitVcpu>,
    translator: Arc<Translator>,
    hot: Option<Emitter>,
    cold: Option<Emitter>,
    epoch: u64,
    /// What the tables were filled for, of each world.
    worlds: [World; WORLDS],
    /// Blocks by physical address.
    recent: Box<[Recent]>,
    /// A copy of the page that is translated from, and 15 bytes of the next.
    page: Box<[u8; 4096 + LONGEST]>,
    /// Blocks are not linked, and not found through the tables.
    apart: bool,
    /// Linear addresses of a debugger's breakpoints, ascending.
    breakpoints: Vec<u64>,
    /// What those of all vCPUs mean for translations.
    stops: BreakOffsets,
}

/// Entries into generated code between two looks whether ZMM registers are in use still.
const WIDTH_PERIOD: u64 = 64;

/// What the tables of a world were filled for.
#[derive(Debug, Clone, Copy, Default)]
struct World {
    generation: Generation,
    /// Whether the tables of supervisor code, or the numbers of pages, hold addresses whose mappings are not global,
    /// or in the lower half.
    tainted: bool,
}

/// Entries in the table of recent blocks.
const RECENT: usize = 4096;

/// A block that was found before.
#[derive(Clone, Copy, Default)]
struct Recent {
    key: Option<Key>,
    invalidations: u64,
    found: Found,
}

/// What a look for the block at RIP gives.
enum Lookup {
    Block(Found),
    /// The entry was in the table.
    Entry(u64),
    /// It cannot be translated.
    Step,
    /// There is no room for more code.
    Full,
}

impl TranslatorVcpu {
    /// A vCPU in the state `cpu`.
    pub fn new(translator: &Arc<Translator>, cpu: Box<Cpu>) -> Self {
        let mut jit = Box::<JitVcpu>::new_zeroed();
        let at = jit.as_mut_ptr();
        // SAFETY: all fields are valid with all bits zero (`None` for the options) but those written here,
        // without dropping what was there.
        let mut jit = unsafe {
            (&raw mut (*at).cpu).write(*cpu);
            (&raw mut (*at).this).write(at);
            (&raw mut (*at).trap).write(None);
            (&raw mut (*at).memory).write(&raw const translator.memory);
            (&raw mut (*at).platform).write(None);
            (&raw mut (*at).invalidations).write(translator.invalidations.clone());
            (&raw mut (*at).counters).write(Counters::default());
            (&raw mut (*at).filled).write([const { Vec::new() }; TABLES]);
            (&raw mut (*at).filled_slots).write([const { Vec::new() }; WORLDS]);
            jit.assume_init()
        };
        jit.cpu.lock_needed = translator.settings.lock_needed;
        jit.counting = translator.settings.counting;
        jit.verified.fill(1);
        jit.host_control = HOST_CONTROL;
        for table in &jit.ibtc {
            table[0].clear(0);
        }
        translator.register(&raw const *jit);
        let mut vcpu = Self {
            jit,
            translator: translator.clone(),
            hot: None,
            cold: None,
            epoch: translator.epoch.load(Ordering::Acquire),
            worlds: [World::default(); WORLDS],
            recent: vec![Recent::default(); RECENT].into(),
            page: Box::new([0; 4096 + LONGEST]),
            apart: false,
            breakpoints: vec![],
            stops: BreakOffsets::default(),
        };
        // Pointers into the processor pointed into the box that it came in.
        vcpu.core(&Nowhere).mode_changed();
        vcpu
    }

    /// The processor.
    pub fn cpu(&self) -> &Cpu {
        &self.jit.cpu
    }

    /// The processor, to change its state between runs.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.jit.cpu
    }

    /// The processor with its surroundings.
    pub fn core<'a>(&'a mut self, platform: &'a dyn Platform) -> Core<'a> {
        // SAFETY: the translator, and so the memory, lives as long as the vCPU.
        let memory = unsafe { &*self.jit.memory };
        Core { cpu: &mut self.jit.cpu, memory, platform }
    }

    /// Does something between instructions that may store to memory: delivers an event, executes one
    /// instruction.
    pub fn act<R>(&mut self, platform: &dyn Platform, act: impl FnOnce(&mut Core<'_>) -> R) -> R {
        Translator::spell_begins(&self.jit);
        let result = act(&mut self.core(platform));
        self.translator.spell_ends(&self.jit);
        result
    }

    /// Whether to return as soon as interrupts can be taken.
    pub fn set_interrupt_window(&mut self, wanted: bool) {
        self.jit.interrupt_window = wanted;
    }

    /// Has runs return before instructions at these linear addresses. They must be among those that the translator was
    /// told of ([`Translator::set_breakpoints`]).
    pub fn set_breakpoints(&mut self, mut addresses: Vec<u64>) {
        addresses.sort_unstable();
        self.breakpoints = addresses;
    }

    /// With [`Options::counting`]: the count of instructions is `count` now, and runs end when it is `end`. Each
    /// instruction counts once, when it is done, however often a repeated one pauses; so does each exception that is
    /// delivered. [`Platform::at_instruction`] is told of the count before anything looks outside.
    ///
    /// [`Options::counting`]: crate::Options::counting
    pub fn count_up_to(&mut self, count: u64, end: u64) {
        // No run is as long.
        self.jit.budget = i64::try_from(end.saturating_sub(count)).unwrap_or(i64::MAX).min(1 << 62);
        self.jit.count_end = count.wrapping_add(self.jit.budget as u64);
    }

    /// The count of instructions.
    pub fn count(&self) -> u64 {
        self.jit.count_end.wrapping_sub(self.jit.budget as u64)
    }

    /// What was done so far.
    pub fn counters(&self) -> &Counters {
        &self.jit.counters
    }

    /// Runs the processor until there is something for others to do. Exceptions are delivered inside.
    ///
    /// # Errors
    /// [`Trap::TripleFault`].
    pub fn run(&mut self, platform: &dyn Platform) -> Result<Exit, Trap> {
        loop {
            if let Some(exit) = self.turns(platform)? {
                return Ok(exit);
            }
        }
    }

    /// Runs one block, or what the interpreter does in place of one, without linking blocks to each other: for
    /// comparisons with the interpreter. Exceptions are delivered inside. A vCPU that began to run in this way
    /// must be run in no other.
    ///
    /// # Errors
    /// [`Trap::TripleFault`].
    pub fn run_block(&mut self, platform: &dyn Platform) -> Result<Option<Exit>, Trap> {
        self.apart = true;
        self.jit.paused = false;
        self.turns(platform)
    }

    /// Whether the last run ended within a repeated string instruction, which paused.
    pub fn paused(&self) -> bool {
        self.jit.paused
    }

    /// Turns of the loop until there is something for others to do, or only one.
    fn turns(&mut self, platform: &dyn Platform) -> Result<Option<Exit>, Trap> {
        let translator = self.translator.clone();
        // SAFETY: only the lifetime changes; the pointer is taken back before `platform` ends.
        let pointer: NonNull<dyn Platform> = unsafe {
            std::mem::transmute::<NonNull<dyn Platform + '_>, NonNull<dyn Platform>>(NonNull::from(platform))
        };
        self.jit.platform = Some(pointer);
        let tsc_base = platform.host_tsc_offset();
        self.jit.tsc_direct = tsc_base.is_some();
        self.jit.tsc_base = tsc_base.unwrap_or(0);
        set_gs_base(&raw const *self.jit as u64);
        self.core(platform).mode_changed();
        Translator::spell_begins(&self.jit);
        let mut running = translator.running.read();
        self.stops = running.clone();
        let result = loop {
            if self.epoch != translator.epoch.load(Ordering::Acquire) {
                self.epoch = translator.epoch.load(Ordering::Acquire);
                (self.hot, self.cold) = (None, None);
                self.recent.fill(Recent::default());
                for world in 0..WORLDS {
                    self.forget(world, true);
                }
            }
            match self.turn(platform) {
                Ok(exit) if exit.is_some() || self.apart => break Ok(exit),
                Ok(_) => {}
                Err(Turn::Trap(trap)) => break Err(trap),
                Err(Turn::Full) => {
                    drop(running);
                    self.make_room(&translator);
                    running = translator.running.read();
                    self.stops = running.clone();
                }
            }
        };
        drop(running);
        translator.spell_ends(&self.jit);
        self.jit.platform = None;
        result
    }

    /// Drops all code of the VM, unless another vCPU just did.
    fn make_room(&mut self, translator: &Translator) {
        translator.interrupt_all();
        let guard = translator.running.write();
        if self.epoch == translator.epoch.load(Ordering::Acquire) {
            translator.flush();
        }
        drop(guard);
    }

    /// One round of the loop.
    fn turn(&mut self, platform: &dyn Platform) -> Result<Option<Exit>, Turn> {
        let cpu = &mut self.jit.cpu;
        if cpu.exit_request.load(Ordering::Acquire) != 0 {
            return Ok(Some(Exit::Requested));
        }
        if self.jit.counting && self.jit.budget <= 0 {
            return Ok(Some(Exit::Counted));
        }
        if cpu.is_watch_met() {
            return Ok(Some(Exit::Watchpoint));
        }
        if cpu.halted {
            return Ok(Some(Exit::Halt));
        }
        if !self.breakpoints.is_empty() && self.breakpoints.binary_search(&cpu.code_address()).is_ok() {
            return Ok(Some(Exit::Breakpoint));
        }
        let shadow = cpu.interrupt_shadow & !x86_core::shadow::NMI;
        if self.jit.interrupt_window && shadow == 0 && cpu.rflags & flags::IF != 0 {
            return Ok(Some(Exit::InterruptWindow));
        }
        self.jit.paused = false;
        let breakpoints = cpu.dr[7] & 0xff != 0;
        if !breakpoints {
            cpu.rflags &= !flags::RF;
        }
        let mode = Mode::of(cpu);
        // The last instructions of a budget, which a block may have more than, are not worth a block of their own.
        let last = self.jit.counting && self.jit.budget < self.translator.settings.max_instructions as i64;
        if mode.has(Mode::INTERPRETED) || shadow != 0 || breakpoints || last || cpu.rflags & flags::TF != 0 {
            return self.step(platform);
        }
        let (world, generation) = (&mut self.worlds[mode.world()], cpu.generation());
        if world.generation.all != generation.all {
            let all = world.tainted || world.generation.global != generation.global;
            world.generation = generation;
            self.forget(mode.world(), all);
        }
        if self.jit.table_modes[mode.table()] != mode.0 {
            self.forget_targets(mode.table());
            self.jit.table_modes[mode.table()] = mode.0;
        }
        let entry = match self.lookup(platform, mode) {
            Ok(Lookup::Entry(entry)) => entry,
            Ok(Lookup::Block(found)) => found.entry_mem,
            Ok(Lookup::Step) => return self.step(platform),
            Ok(Lookup::Full) => return Err(Turn::Full),
            Err(trap) => return self.deliver(platform, trap),
        };
        let reason = self.enter(entry);
        self.after(platform, reason)
    }

    /// Deals with an exit from generated code.
    fn after(&mut self, platform: &dyn Platform, mut reason: u32) -> Result<Option<Exit>, Turn> {
        const DISPATCH: u32 = ExitReason::Dispatch as u32;
        const INDIRECT: u32 = ExitReason::Indirect as u32;
        const LINK: u32 = ExitReason::Link as u32;
        const POLL: u32 = ExitReason::Poll as u32;
        const TRAP: u32 = ExitReason::Trap as u32;
        const HALT: u32 = ExitReason::Halt as u32;
        const STEP: u32 = ExitReason::Step as u32;
        const UNGROUPED: u32 = ExitReason::Ungrouped as u32;
        // A program may leave any number of ungrouped blocks for the next: a loop, no recursion.
        loop {
            match reason {
                UNGROUPED => {
                    let mode = Mode(Mode::of(&self.jit.cpu).0 | Mode::UNGROUPED);
                    match self.lookup(platform, mode) {
                        Ok(Lookup::Block(found)) => reason = self.enter(found.entry_mem),
                        Ok(Lookup::Entry(_) | Lookup::Step) => return self.step(platform),
                        Ok(Lookup::Full) => return Err(Turn::Full),
                        Err(trap) => return self.deliver(platform, trap),
                    }
                    continue;
                }
                LINK => {
                    self.jit.counters.exits_link += 1;
                    if let Some(next) = self.follow_link(platform) {
                        reason = next;
                        continue;
                    }
                }
                DISPATCH => self.jit.counters.exits_other += 1,
                INDIRECT => self.jit.counters.exits_indirect += 1,
                POLL => {
                    let target = self.translator.link_target(self.jit.exit_argument as u32);
                    self.set_rip_to(&target);
                }
                TRAP => {
                    if let Some(trap) = self.jit.trap.take() {
                        return self.deliver(platform, trap);
                    }
                }
                HALT => return Ok(Some(Exit::Halt)),
                STEP => return self.step(platform),
                _ => unreachable!("an exit for no known reason"),
            }
            return Ok(None);
        }
    }

    fn set_rip_to(&mut self, link: &LinkTarget) {
        let page = if link.mode.is_relative() { self.jit.page_va } else { link.page_va };
        self.jit.cpu.rip = page.wrapping_add(link.target as u64) & link.mode.ip_mask();
    }

    /// A direct jump that is not linked was taken: finds its target and links it. If that is an ungrouped block it
    /// is run, and the reason why it was left returned.
    fn follow_link(&mut self, platform: &dyn Platform) -> Option<u32> {
        let number = self.jit.exit_argument as u32;
        let translator = self.translator.clone();
        let target = translator.link_target(number);
        self.set_rip_to(&target);
        if self.apart && !target.ungrouped {
            return None;
        }
        // What the processor was when generated code was entered does not count: that may have changed.
        let mode = Mode(Mode::of(&self.jit.cpu).0 | if target.ungrouped { Mode::UNGROUPED } else { 0 });
        let found = match self.lookup_block(platform, mode) {
            Ok(Lookup::Block(found)) => found,
            // The next round finds out.
            _ => return None,
        };
        let va = linear_rip(&self.jit.cpu, mode);
        let verified = if self.apart { None } else { translator.link(number, found.id, va) };
        match verified {
            Some(Verified::Page(number)) => {
                self.jit.page_checks[mode.world()][(va >> 12) as usize & (PAGE_CHECKS - 1)] = number;
            }
            Some(Verified::Slot(slot)) => {
                let from = self.jit.page_va;
                if std::mem::replace(&mut self.jit.verified[usize::from(slot)], from) == 1 {
                    self.jit.filled_slots[mode.world()].push(slot);
                }
            }
            None => {}
        }
        target.ungrouped.then(|| self.enter(found.entry_mem))
    }

    /// Has the interpreter execute one instruction.
    fn step(&mut self, platform: &dyn Platform) -> Result<Option<Exit>, Turn> {
        if self.jit.counting && self.jit.budget <= 0 {
            return Ok(None);
        }
        self.jit.counters.steps += 1;
        self.jit.at_instruction(0);
        match x86_interp::step(&mut self.core(platform)) {
            Ok(Flow::Again) => {
                self.jit.paused = true;
                Ok(None)
            }
            Ok(flow) => {
                self.jit.budget -= 1;
                Ok((flow == Flow::Halt).then_some(Exit::Halt))
            }
            Err(trap) => self.deliver(platform, trap),
        }
    }

    fn deliver(&mut self, platform: &dyn Platform, trap: Trap) -> Result<Option<Exit>, Turn> {
        self.core(platform).deliver_trap(trap).map_err(Turn::Trap)?;
        self.jit.budget -= 1;
        Ok(None)
    }

    /// Runs generated code from `entry` on; gives the reason why it was left.
    fn enter(&mut self, entry: u64) -> u32 {
        let jit = &mut *self.jit;
        jit.counters.entries += 1;
        if jit.cpu.vector_width == width::ZMM && jit.counters.entries.is_multiple_of(WIDTH_PERIOD) {
            // Programs that use them seldom do so all the time.
            jit.cpu.find_vector_width();
        }
        jit.flags_from_rflags();
        jit.segments_changed();
        jit.page_va = jit.cpu.rip & !0xfff;
        jit.fpu_resume = false;
        jit.frames_switch = FrameSwitch::Stay as u8;
        // SAFETY: the stub follows the C calling convention. It changes this vCPU through GS, which nothing
        // refers to meanwhile, and guest memory.
        unsafe {
            let enter: extern "C" fn(u64) = std::mem::transmute(self.translator.stubs.enter);
            enter(entry);
        }
        // What generated code wrote is read through a pointer that the compiler cannot see through.
        let jit = std::hint::black_box(&mut *self.jit);
        jit.flags_to_rflags();
        if !jit.cpu.long64 {
            // Beside it there may be the base of CS.
            jit.cpu.rip &= 0xffff_ffff;
        }
        jit.exit_reason
    }

    /// Empties a world's tables that are keyed by virtual address; those of supervisor code only if `all`.
    fn forget(&mut self, world: usize, all: bool) {
        self.forget_targets(2 * world + 1);
        if all {
            self.forget_targets(2 * world);
        }
        for slot in self.jit.filled_slots[world].drain(..) {
            self.jit.verified[usize::from(slot)] = 1;
        }
        if all {
            self.jit.page_checks[world].fill(0);
            self.worlds[world].tainted = false;
        }
    }

    /// Empties a table of jump targets.
    fn forget_targets(&mut self, table: usize) {
        let JitVcpu { ibtc, filled, .. } = &mut *self.jit;
        for index in filled[table].drain(..) {
            ibtc[table][usize::from(index)].clear(usize::from(index));
        }
    }

    /// The code for RIP.
    fn lookup(&mut self, platform: &dyn Platform, mode: Mode) -> Result<Lookup, Trap> {
        if !mode.has(Mode::UNGROUPED) {
            let rip = self.jit.cpu.rip;
            let entry = &self.jit.ibtc[mode.table()][rip as usize & (IBTC_ENTRIES - 1)];
            if entry.va.load(Ordering::Relaxed) == self.jit.tag(mode) {
                return Ok(Lookup::Entry(entry.host.load(Ordering::Relaxed)));
            }
        }
        self.lookup_block(platform, mode)
    }

    /// The block for RIP, translated if it is not there yet.
    fn lookup_block(&mut self, platform: &dyn Platform, mode: Mode) -> Result<Lookup, Trap> {
        let fetch = self.core(platform).fetch_physical()?;
        let rip = self.jit.cpu.rip;
        // A restored state may have any RIP; the interpreter cuts it.
        if fetch.host.is_null() || rip > mode.last_ip() {
            return Ok(Lookup::Step);
        }
        let va = linear_rip(&self.jit.cpu, mode);
        let gpa = fetch.physical & !0xfff | va & 0xfff;
        if self.stops.binary_search(&((gpa & 0xfff) as u16)).is_ok() {
            return Ok(Lookup::Step);
        }
        let key = Key::new(gpa, rip, self.jit.cpu.segments[Seg::Cs as usize].base, mode);
        let tag = self.jit.tag(mode);
        let translator = self.translator.clone();
        let apart = self.apart;
        let fill = |jit: &mut JitVcpu, found: &Found| {
            if apart || mode.has(Mode::UNGROUPED) {
                return;
            }
            let table = mode.table();
            let index = rip as usize & (IBTC_ENTRIES - 1);
            let entry = &jit.ibtc[table][index];
            let first = entry.va.load(Ordering::Relaxed) == IbtcEntry::empty(index);
            entry.clear(index);
            entry.host.store(found.entry_mem, Ordering::Relaxed);
            entry.va.store(tag, Ordering::Release);
            if first {
                jit.filled[table].push(index as u16);
            }
        };
        // Global mappings of the upper half outlive loads of CR3.
        self.worlds[mode.world()].tainted |=
            !mode.is_relative() && (fetch.physical & 1 == 0 || rip >> 63 == 0);
        let jit = &mut *self.jit;
        let recent = &mut self.recent[(gpa ^ gpa >> 12) as usize & (RECENT - 1)];
        let invalidations = translator.invalidations.load(Ordering::SeqCst);
        if recent.key == Some(key) && recent.invalidations == invalidations {
            let found = recent.found;
            fill(jit, &found);
            // Whoever drops the block says so first, and then looks into the tables.
            std::sync::atomic::fence(Ordering::SeqCst);
            if translator.invalidations.load(Ordering::SeqCst) == invalidations {
                return Ok(Lookup::Block(found));
            }
            let index = rip as usize & (IBTC_ENTRIES - 1);
            jit.ibtc[mode.table()][index].clear(index);
        }
        if let Some(found) = translator.find(&key, |found| fill(jit, found)) {
            *recent = Recent { key: Some(key), invalidations, found };
            return Ok(Lookup::Block(found));
        }
        self.translate(platform, &translator, key, fetch.host, fill)
    }

    fn translate(
        &mut self,
        platform: &dyn Platform,
        translator: &Translator,
        key: Key,
        host: *const u8,
        fill: impl FnOnce(&mut JitVcpu, &Found),
    ) -> Result<Lookup, Trap> {
        for chunk in [&mut self.hot, &mut self.cold] {
            if chunk.as_ref().is_none_or(|emitter| emitter.left() < RESERVE) {
                *chunk = translator.cache.allocate(CHUNK);
            }
        }
        let (Some(hot), Some(cold)) = (&mut self.hot, &mut self.cold) else { return Ok(Lookup::Full) };
        let (hot_start, cold_start) = (hot.address(), cold.address());
        let this = self.jit.this.cast_const();
        let sequence = translator.begin(key.gpa, this);
        // SAFETY: the page is guest memory, which other threads may write at any time; a torn copy is found
        // out when the block is installed, as every write to the page from `begin` on is noticed.
        unsafe { std::ptr::copy_nonoverlapping(host, self.page.as_mut_ptr(), 4096) };
        let offset = (key.gpa & 0xfff) as u16;
        // SAFETY: the translator, and so the memory, lives as long as the vCPU.
        let memory = unsafe { &*self.jit.memory };
        let mut core = Core { cpu: &mut self.jit.cpu, memory, platform };
        let mut source = Source { sequence, next: None };
        let (settings, stubs) = (&translator.settings, &translator.stubs);
        let Key { page_va, base, mode, .. } = key;
        // No instruction goes on beyond the highest offset, which with a base may be in the middle of a page.
        let room = mode.last_ip() - core.cpu.rip;
        let end = room.saturating_add(u64::from(offset) + 1).min(4096) as u16;
        let mut output = {
            let has = |insn: &iced_x86::Instruction| has(&core, insn);
            let page = &self.page[..4096];
            translate(
                &Input {
                    page,
                    next_page: None,
                    page_va,
                    base,
                    end,
                    offset,
                    mode,
                    slots: &translator.slots,
                    stops: &self.stops,
                    has: &has,
                },
                hot,
                cold,
                settings,
                stubs,
            )
        };
        if output.is_none() {
            // The instruction goes on in the next page, unless the segment ends before.
            let ahead = 4096 - u64::from(offset);
            if room < ahead + LONGEST as u64 {
                return Ok(Lookup::Step);
            }
            let Ok(next) = core.fetch_physical_ahead(ahead) else {
                return Ok(Lookup::Step);
            };
            if next.host.is_null() {
                return Ok(Lookup::Step);
            }
            let gpa = next.physical & !0xfff;
            source.next = Some((gpa, translator.begin(gpa, this), LONGEST as u16));
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(next.host, self.page[4096..].as_mut_ptr(), LONGEST) };
            let has = |insn: &iced_x86::Instruction| has(&core, insn);
            let input = Input {
                page: &self.page[..],
                next_page: Some(gpa),
                page_va,
                base,
                end,
                offset,
                mode,
                slots: &translator.slots,
                stops: &self.stops,
                has: &has,
            };
            output = translate(&input, hot, cold, settings, stubs);
        }
        let Some(output) = output else { return Ok(Lookup::Step) };
        assert!(!hot.overflowed() && !cold.overflowed(), "a block outgrew the space reserved for it");
        let counters = &mut self.jit.counters;
        counters.blocks += 1;
        counters.instructions += output.instructions as u64;
        counters.code_bytes += hot.address() - hot_start + cold.address() - cold_start;
        let jit = &mut *self.jit;
        if let Some(found) = translator.install(key, source, output, cold, |found| fill(jit, found)) {
            return Ok(Lookup::Block(found));
        }
        hot.rewind(hot_start);
        cold.rewind(cold_start);
        // Somebody wrote the page, or translated the same block: the interpreter makes progress either way.
        Ok(Lookup::Step)
    }
}

/// The linear address of the instruction at RIP.
fn linear_rip(cpu: &Cpu, mode: Mode) -> u64 {
    let base = if mode.has(Mode::BASED) { cpu.segments[Seg::Cs as usize].base } else { 0 };
    cpu.rip.wrapping_add(base) & mode.ip_mask()
}

/// Whether the guest's processor has the instruction.
fn has(core: &Core<'_>, insn: &iced_x86::Instruction) -> bool {
    let model = &core.cpu.model;
    x86_interp::has(core, insn)
        && (!x86_fpu::handles(insn.code()) || x86_fpu::has(core, insn.code()))
        && (insn.code() != iced_x86::Code::Rdtscp || model.has(x86_core::cpuid::feature::RDTSCP))
}

impl Drop for TranslatorVcpu {
    fn drop(&mut self) {
        self.translator.unregister(&raw const *self.jit);
    }
}

/// What ends a round of the loop that did not go on as usual.
enum Turn {
    Trap(Trap),
    Full,
}

/// Points GS at a vCPU's block.
fn set_gs_base(address: u64) {
    // SAFETY: nothing else in the process uses GS. FSGSBASE is there if the kernel says so.
    unsafe {
        const HWCAP2_FSGSBASE: u64 = 2;
        if libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 {
            std::arch::asm!("wrgsbase {}", in(reg) address, options(nostack, preserves_flags));
        } else {
            const ARCH_SET_GS: libc::c_int = 0x1001;
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, address);
        }
    }
}

/// Surroundings for what has none to do with them.
struct Nowhere;

impl Platform for Nowhere {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn tsc(&self) -> u64 {
        0
    }
    fn tsc_hertz(&self) -> u64 {
        1
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn apic_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn set_apic_msr(&self, _: u32, _: u64) -> Option<()> {
        None
    }
}
