//! Each thread's stubs.

use crate::features::Features;
use crate::stub::{self, Entry, Stub};
use dbt_code::{CacheError, CodeCache, Emitter};
use iced_x86::{Code, Instruction};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use x86_core::cpuid::CpuModel;
use x86_core::{Core, Trap};

/// Code memory of a thread; pages that were never used take no memory.
const CODE_BYTES: usize = 8 << 20;
/// Bytes that a stub takes at most.
const MOST_CODE: usize = 4096;
/// Stubs of a thread, at most.
const MAX_STUBS: usize = 1 << 16;
/// Entries of the table in front of the map.
const FRONT: usize = 1024;

/// A thread's stubs. There is no sharing, so there are no locks, and when the memory is full everything can
/// be thrown away at once.
struct Engine {
    code: Emitter,
    /// Where the code begins.
    start: u64,
    /// What the emitter writes to.
    _cache: CodeCache,
    /// Direct-mapped: the stubs used last.
    front: Box<[Option<(u128, Stub)>]>,
    stubs: HashMap<u128, Stub>,
    /// The CPU model asked last, and what of it the host has.
    model: Option<(Arc<CpuModel>, Features)>,
}

thread_local! {
    static ENGINE: RefCell<Option<Engine>> = const { RefCell::new(None) };
}

impl Engine {
    fn new() -> Result<Self, CacheError> {
        let cache = CodeCache::new(CODE_BYTES)?;
        let source = io::ErrorKind::OutOfMemory;
        let code =
            cache.allocate(CODE_BYTES).ok_or(CacheError { bytes: CODE_BYTES, source: source.into() })?;
        Ok(Self {
            start: code.address(),
            code,
            _cache: cache,
            front: vec![None; FRONT].into_boxed_slice(),
            stubs: HashMap::new(),
            model: None,
        })
    }

    fn stub(&mut self, insn: &Instruction) -> Option<Stub> {
        let key = stub::key(insn);
        let folded = key as u64 ^ (key >> 64) as u64;
        let place = (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize % FRONT;
        if let Some((held, stub)) = self.front[place]
            && held == key
        {
            return Some(stub);
        }
        let stub = match self.stubs.get(&key) {
            Some(stub) => *stub,
            None => self.build(key, insn)?,
        };
        self.front[place] = Some((key, stub));
        Some(stub)
    }

    #[cold]
    fn build(&mut self, key: u128, insn: &Instruction) -> Option<Stub> {
        if self.stubs.len() >= MAX_STUBS || self.code.left() < MOST_CODE {
            self.flush();
        }
        self.code.align(16);
        let address = self.code.address();
        let mut stub = stub::write(&mut self.code, insn)?;
        assert!(!self.code.overflowed(), "a stub outgrew the space reserved for it");
        serialize();
        // SAFETY: the memory holds code that follows the calling convention of `Entry`. It stays until the
        // engine is flushed or dropped; stubs are handed out for one instruction of this same thread only.
        stub.entry = unsafe { std::mem::transmute::<u64, Entry>(address) };
        self.stubs.insert(key, stub);
        Some(stub)
    }

    fn flush(&mut self) {
        self.code.rewind(self.start);
        self.stubs.clear();
        self.front.fill(None);
    }

    fn features(&mut self, core: &Core) -> Features {
        #[cfg(test)]
        if tests::announces_all() {
            return Features::host();
        }
        if let Some((model, features)) = &self.model
            && Arc::ptr_eq(model, &core.cpu.model)
        {
            return *features;
        }
        let announced = Features::from_cpuid(|leaf, subleaf| core.cpuid(leaf, subleaf));
        let features = announced.and(Features::host());
        self.model = Some((core.cpu.model.clone(), features));
        features
    }
}

/// Has the processor forget instructions that it fetched ahead: code that was written through another
/// address needs it (Intel SDM volume 3, 9.1.3).
fn serialize() {
    #[cfg(target_arch = "x86_64")]
    let _ = std::arch::x86_64::__cpuid(0);
}

fn with_engine<R>(f: impl FnOnce(&mut Engine) -> Option<R>) -> Option<R> {
    ENGINE.with_borrow_mut(|engine| match engine {
        Some(engine) => f(engine),
        None => f(engine.insert(Engine::new().ok()?)),
    })
}

/// Maps this thread's code memory, if that is not done.
pub(crate) fn prepare() -> io::Result<()> {
    ENGINE.with_borrow_mut(|engine| {
        if engine.is_none() {
            *engine = Some(Engine::new().map_err(|error| error.source)?);
        }
        Ok(())
    })
}

/// The stub for `insn`, or #UD if there is none, or the processor is not to have the instruction.
///
/// It must run before this thread asks for another.
pub(crate) fn stub(core: &Core, insn: &Instruction) -> Result<Stub, Trap> {
    with_engine(|engine| {
        let stub = engine.stub(insn)?;
        engine.features(core).contains(stub.needs).then_some(stub)
    })
    .ok_or(Trap::UD)
}

/// #UD unless the processor has what `insn`, which is not done by a stub, needs.
pub(crate) fn require(core: &Core, insn: &Instruction) -> Result<(), Trap> {
    if has(core, insn.code()) { Ok(()) } else { Err(Trap::UD) }
}

/// Whether the processor has what instructions of `code` need.
pub(crate) fn has(core: &Core, code: Code) -> bool {
    let Some(needs) = Features::needed_by(code) else { return false };
    with_engine(|engine| Some(engine.features(core))).is_some_and(|features| features.contains(needs))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    thread_local! {
        static ANNOUNCE_ALL: Cell<bool> = const { Cell::new(false) };
    }

    /// Lets this thread's processors execute all that the host can, whatever their model.
    pub(crate) fn announce_all() {
        ANNOUNCE_ALL.set(true);
    }

    pub(super) fn announces_all() -> bool {
        ANNOUNCE_ALL.get()
    }
}
