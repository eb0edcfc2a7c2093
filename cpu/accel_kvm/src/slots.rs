//! Memory slots: which guest physical addresses are which memory of this process.

use crate::error::{NAME, errno, refused};
use accel::AccelError;
use guest_memory::GuestMemory;
use kvm_bindings as kb;
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::sync::Arc;

/// One piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    gpa: u64,
    len: u64,
    host: u64,
}

/// A VM's memory slots.
pub(crate) struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    most: u32,
    slots: BTreeMap<u32, Slot>,
    dirty_log: bool,
}

impl Slots {
    /// No slots yet; there can be `most`.
    pub(crate) fn new(vm: Arc<VmFd>, memory: GuestMemory, most: u32) -> Self {
        Self { vm, memory, most, slots: BTreeMap::new(), dirty_log: false }
    }

    /// Has the guest see the memory as it is now: slots of regions that are gone go first, so that others
    /// can take their addresses.
    pub(crate) fn update(&mut self) -> Result<(), AccelError> {
        let mut wanted: Vec<Slot> = Vec::new();
        for region in self.memory.regions() {
            let host = self.memory.host_page(region.gpa).map_or(0, |page| page.ptr as u64);
            wanted.push(Slot { gpa: region.gpa, len: region.len, host });
        }
        if wanted.len() > self.most as usize {
            return Err(AccelError::MemoryRegions {
                accelerator: NAME,
                regions: wanted.len(),
                most: self.most,
            });
        }
        let gone = self.slots.iter().filter(|(_, slot)| !wanted.contains(slot));
        let gone: Vec<u32> = gone.map(|(number, _)| *number).collect();
        for number in gone {
            self.set(number, None)?;
        }
        wanted.retain(|slot| !self.slots.values().any(|present| present == slot));
        for slot in wanted {
            let number = (0..self.most).find(|number| !self.slots.contains_key(number)).unwrap_or(0);
            self.set(number, Some(slot))?;
        }
        Ok(())
    }

    fn set(&mut self, number: u32, slot: Option<Slot>) -> Result<(), AccelError> {
        let flags = if self.dirty_log { kb::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let place = slot.or_else(|| self.slots.get(&number).copied());
        let Some(place) = place else { return Ok(()) };
        let region = kb::kvm_userspace_memory_region {
            slot: number,
            flags: if slot.is_some() { flags } else { 0 },
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
        self.dirty_log = on;
        for (number, slot) in self.slots.clone() {
            self.set(number, Some(slot))?;
        }
        Ok(())
    }

    /// Takes the kernel's logs over into the memory's.
    pub(crate) fn collect_dirty(&self) -> Result<(), AccelError> {
        if !self.dirty_log {
            return Ok(());
        }
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
                    self.memory.written(slot.gpa + page * guest_memory::PAGE_SIZE, guest_memory::PAGE_SIZE);
                }
            }
        }
        Ok(())
    }
}
