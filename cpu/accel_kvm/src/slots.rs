//! Memory slots: which guest physical addresses are which memory of this process.

use crate::dirty_ring::{self, DirtyRing};
use crate::error::{NAME, errno, host, refused};
use accel::AccelError;
use guest_memory::{GuestMemory, PAGE_SIZE};
use kvm_bindings as kb;
use kvm_ioctls::{VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    gpa: u64,
    len: u64,
    host: u64,
    read_only: bool,
}

/// How the kernel tells of written pages.
pub(crate) enum DirtyLog {
    /// By a bitmap for each slot.
    Bitmaps,
    /// By a ring for each vCPU, of this many bytes. Such a VM has no bitmaps.
    Rings { bytes: u64, rings: Vec<DirtyRing> },
}

/// A VM's memory slots.
pub(crate) struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    most: u32,
    slots: BTreeMap<u32, Slot>,
    dirty_log: DirtyLog,
    logging: bool,
}

impl Slots {
    /// No slots yet; there can be `most`.
    pub(crate) fn new(vm: Arc<VmFd>, memory: GuestMemory, most: u32, dirty_log: DirtyLog) -> Self {
        Self { vm, memory, most, slots: BTreeMap::new(), dirty_log, logging: false }
    }

    /// Takes notice of a new vCPU.
    pub(crate) fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<(), AccelError> {
        if let DirtyLog::Rings { bytes, rings } = &mut self.dirty_log {
            rings.push(DirtyRing::map(vcpu, *bytes).map_err(host("a vCPU's ring of written pages"))?);
        }
        Ok(())
    }

    /// Whether there are pages that the kernel tells of only after their writer has left the guest.
    pub(crate) fn hears_late(&self) -> bool {
        self.logging && matches!(self.dirty_log, DirtyLog::Rings { .. })
    }

    /// Has the guest see the memory as it is now: slots of regions that are gone go first, so that others
    /// can take their addresses.
    pub(crate) fn update(&mut self) -> Result<(), AccelError> {
        let mut wanted: Vec<Slot> = Vec::new();
        for region in self.memory.regions() {
            let host = self.memory.host_page(region.gpa).map_or(0, |page| page.ptr as u64);
            wanted.push(Slot { gpa: region.gpa, len: region.len, host, read_only: region.is_read_only() });
        }
        if wanted.len() > self.most as usize {
            return Err(AccelError::MemoryRegions {
                accelerator: NAME,
                regions: wanted.len(),
                most: self.most,
            });
        }
        let gone = self.slots.iter().filter(|(_, slot)| !wanted.contains(slot));
        let gone: Vec<(u32, Slot)> = gone.map(|(number, slot)| (*number, *slot)).collect();
        for (number, slot) in gone {
            self.set(number, None)?;
            if self.logging {
                // What the kernel knew of its pages is gone with it.
                self.memory.written(slot.gpa, slot.len);
            }
        }
        wanted.retain(|slot| !self.slots.values().any(|present| present == slot));
        for slot in wanted {
            let number = (0..self.most).find(|number| !self.slots.contains_key(number)).unwrap_or(0);
            self.set(number, Some(slot))?;
        }
        Ok(())
    }

    fn set(&mut self, number: u32, slot: Option<Slot>) -> Result<(), AccelError> {
        let log = if self.logging { kb::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let flags = |slot: Slot| log | if slot.read_only { kb::KVM_MEM_READONLY } else { 0 };
        let place = slot.or_else(|| self.slots.get(&number).copied());
        let Some(place) = place else { return Ok(()) };
        let region = kb::kvm_userspace_memory_region {
            slot: number,
            flags: slot.map_or(0, flags),
            guest_phys_addr: place.gpa,
            memory_size: slot.map_or(0, |slot| slot.len),
            userspace_addr: place.host,
        };
        // SAFETY: the memory is guest memory, of which this VM holds a share for as long as it lives, and
        // which nobody makes Rust references to.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|error| AccelError::MemoryRegion {
            accelerator: NAME,
            range: place.gpa..place.gpa.saturating_add(place.len),
            source: errno(error),
        })?;
        match slot {
            Some(slot) => self.slots.insert(number, slot),
            None => self.slots.remove(&number),
        };
        Ok(())
    }

    /// Begins or ends the kernel's logs of written pages.
    pub(crate) fn set_dirty_log(&mut self, on: bool) -> Result<(), AccelError> {
        self.logging = on;
        for (number, slot) in self.slots.clone() {
            self.set(number, Some(slot))?;
        }
        // What is left in rings would be told when the next log begins.
        if on { Ok(()) } else { self.empty_rings() }
    }

    /// Takes the kernel's logs over into the memory's.
    pub(crate) fn collect_dirty(&mut self) -> Result<(), AccelError> {
        match &self.dirty_log {
            DirtyLog::Bitmaps if self.logging => self.read_bitmaps(),
            DirtyLog::Bitmaps => Ok(()),
            DirtyLog::Rings { .. } => self.empty_rings(),
        }
    }

    fn read_bitmaps(&self) -> Result<(), AccelError> {
        for (number, slot) in &self.slots {
            let words = self
                .vm
                .get_dirty_log(*number, slot.len as usize)
                .map_err(refused("KVM's log of written pages"))?;
            for (index, word) in words.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    let page = index as u64 * 64 + u64::from(left.trailing_zeros());
                    left &= left - 1;
                    self.memory.written(slot.gpa + page * PAGE_SIZE, PAGE_SIZE);
                }
            }
        }
        Ok(())
    }

    fn empty_rings(&mut self) -> Result<(), AccelError> {
        let DirtyLog::Rings { rings, .. } = &mut self.dirty_log else { return Ok(()) };
        let mut any = false;
        for ring in rings {
            any |= ring.take(|slot, page| {
                let slot = self.slots.get(&slot).filter(|slot| page < slot.len / PAGE_SIZE);
                // (The slot of an entry may have gone: its pages are all noted then.)
                if let Some(slot) = slot {
                    self.memory.written(slot.gpa + page * PAGE_SIZE, PAGE_SIZE);
                }
            });
        }
        if any {
            dirty_ring::give_back(&self.vm).map_err(host("KVM's rings of written pages"))?;
        }
        Ok(())
    }
}
