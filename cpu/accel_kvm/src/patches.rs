//! INT3 in the guest's code, for debuggers' breakpoints.
//!
//! It stands there only while vCPUs run that want it: nobody who looks at the memory of a VM that does not run sees
//! any. The guest's own stores win: a byte that is no INT3 any more is left as it is.

use guest_memory::GuestMemory;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};

const INT3: u8 = 0xcc;

#[derive(Default)]
struct Patch {
    /// Runs of vCPUs that want it.
    wanted: u32,
    /// vCPUs that are passing over it.
    passing: u32,
    /// What stands there without it, while it is there.
    original: Option<u8>,
}

/// The places of a VM's memory where INT3 stands, by guest physical address.
pub(crate) struct Patches {
    memory: GuestMemory,
    places: Mutex<BTreeMap<u64, Patch>>,
    /// vCPUs' breakpoints that are INT3: by vCPU and linear address, the guest physical address.
    planned: Mutex<BTreeMap<(u32, u64), u64>>,
}

impl Patches {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), places: Mutex::default(), planned: Mutex::default() }
    }

    /// Whether there could be one.
    fn is_possible(&self, gpa: u64) -> bool {
        self.memory.host_page(gpa).is_some() && !self.memory.is_read_only(gpa)
    }

    /// Plans one for the breakpoint at the linear address `address` of vCPU `id`, which maps it to `gpa`; if it maps it to
    /// nothing yet, as one that waits to be started, where another vCPU has the same breakpoint. Gives the place, if
    /// there can be one.
    pub(crate) fn plan(&self, id: u32, address: u64, gpa: Option<u64>) -> Option<u64> {
        let mut planned = self.planned.lock();
        let elsewhere = || planned.iter().find(|((_, other), _)| *other == address).map(|(_, gpa)| *gpa);
        let gpa = gpa.or_else(elsewhere).filter(|gpa| self.is_possible(*gpa))?;
        planned.insert((id, address), gpa);
        Some(gpa)
    }

    /// Forgets what was planned for vCPU `id`.
    pub(crate) fn forget(&self, id: u32) {
        self.planned.lock().retain(|(planner, _), _| *planner != id);
    }

    /// Whether some are planned.
    pub(crate) fn are_planned(&self) -> bool {
        !self.planned.lock().is_empty()
    }

    /// Whether some vCPU wants one there.
    pub(crate) fn contains(&self, gpa: u64) -> bool {
        self.places.lock().contains_key(&gpa)
    }

    /// Whether INT3 stands there, whoever's.
    pub(crate) fn is_int3(&self, gpa: u64) -> bool {
        let _places = self.places.lock();
        self.byte(gpa, |byte| byte.load(Ordering::SeqCst)) == Some(INT3)
    }

    /// A run of a vCPU begins that wants one there.
    pub(crate) fn insert(&self, gpa: u64) {
        self.change(gpa, |patch| patch.wanted += 1);
    }

    /// That run ends.
    pub(crate) fn remove(&self, gpa: u64) {
        self.change(gpa, |patch| patch.wanted = patch.wanted.saturating_sub(1));
    }

    /// A vCPU begins to execute what stands there without it.
    pub(crate) fn pass(&self, gpa: u64) {
        self.change(gpa, |patch| patch.passing += 1);
    }

    /// The vCPU has done so.
    pub(crate) fn passed(&self, gpa: u64) {
        self.change(gpa, |patch| patch.passing = patch.passing.saturating_sub(1));
    }

    fn change(&self, gpa: u64, change: impl FnOnce(&mut Patch)) {
        let mut places = self.places.lock();
        let patch = places.entry(gpa).or_default();
        change(patch);
        let wanted = patch.wanted > 0 && patch.passing == 0;
        match patch.original {
            None if wanted => patch.original = self.byte(gpa, |byte| byte.swap(INT3, Ordering::SeqCst)),
            Some(original) if !wanted => {
                patch.original = None;
                self.byte(gpa, |byte| {
                    let _ = byte.compare_exchange(INT3, original, Ordering::SeqCst, Ordering::SeqCst);
                });
                // Whoever copied the page meanwhile has INT3.
                self.memory.written(gpa, 1);
            }
            _ => {}
        }
        if patch.wanted == 0 && patch.passing == 0 {
            places.remove(&gpa);
        }
    }

    fn byte<R>(&self, gpa: u64, act: impl FnOnce(&AtomicU8) -> R) -> Option<R> {
        let page = self.memory.host_page(gpa)?;
        let at = page.ptr.wrapping_add((gpa & 0xfff) as usize);
        // SAFETY: inside a page of guest memory, which is there as long as `self.memory`; it is only ever accessed in
        // ways that allow for others' accesses at the same time.
        Some(act(unsafe { AtomicU8::from_ptr(at) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int3_is_there_as_long_as_somebody_wants_it() {
        let memory = GuestMemory::new(std::slice::from_ref(&(0..0x1000))).unwrap();
        memory.write(5, &[7]).unwrap();
        let patches = Patches::new(&memory);
        let byte = || {
            let mut byte = [0];
            memory.read(5, &mut byte).unwrap();
            byte[0]
        };
        patches.insert(5);
        patches.insert(5);
        assert_eq!(byte(), INT3);
        assert!(patches.is_int3(5) && !patches.is_int3(6));
        patches.pass(5);
        assert_eq!(byte(), 7);
        patches.passed(5);
        patches.remove(5);
        assert_eq!(byte(), INT3);
        assert!(patches.contains(5));
        patches.remove(5);
        assert_eq!(byte(), 7);
        assert!(!patches.contains(5));
    }

    #[test]
    fn what_the_guest_stores_stays() {
        let memory = GuestMemory::new(std::slice::from_ref(&(0..0x1000))).unwrap();
        let patches = Patches::new(&memory);
        patches.insert(9);
        memory.write(9, &[1]).unwrap();
        patches.remove(9);
        let mut byte = [0];
        memory.read(9, &mut byte).unwrap();
        assert_eq!(byte, [1]);
        assert!(!patches.is_possible(0x1000));
        patches.insert(0x1000); // no memory: nothing happens
        assert!(!patches.is_int3(0x1000));
        patches.remove(0x1000);
    }
}
