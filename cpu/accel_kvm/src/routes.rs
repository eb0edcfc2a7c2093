//! Interrupts as messages: the routing table, and events that raise interrupts.
//!
//! KVM reports ends of level-triggered interrupts only for messages that stand in its routing table at the
//! places that are set aside for an I/O APIC's pins. Which messages the I/O APIC sends is seen when it sends
//! them: the first time a level-triggered one comes by, it gets a place. The table is longer than the I/O
//! APIC, and the place that was not used for longest is given away first.

use crate::error::host;
use crate::ioctl;
use accel::{AccelError, Irqfd, IrqfdRoute};
use irq::{MsiMessage, MsiTarget};
use kvm_bindings::{self as kb, KvmIrqRouting};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Places for what the I/O APIC sends: its pins, and as many again for what it sent before it was set up
/// anew.
pub(crate) const LEVEL_PLACES: u32 = 48;
/// Bit 15 of a message's data: level-triggered (Intel SDM volume 3, 11.11.2).
const LEVEL: u32 = 1 << 15;

#[derive(Default)]
struct Table {
    /// What each place sends.
    routes: BTreeMap<u32, MsiMessage>,
    /// When each of the I/O APIC's places was last used, in a count of uses.
    used: BTreeMap<u32, u64>,
    uses: u64,
}

impl Table {
    fn place_of_level(&self, message: MsiMessage) -> Option<u32> {
        self.routes.range(..LEVEL_PLACES).find(|(_, route)| **route == message).map(|(gsi, _)| *gsi)
    }

    /// The place to give to a new level-triggered message.
    fn level_place(&self) -> u32 {
        let free = (0..LEVEL_PLACES).find(|gsi| !self.routes.contains_key(gsi));
        let oldest = || self.used.iter().min_by_key(|(_, used)| **used).map_or(0, |(gsi, _)| *gsi);
        free.unwrap_or_else(oldest)
    }

    fn to_kernel(&self) -> Result<KvmIrqRouting, io::Error> {
        let mut table = KvmIrqRouting::new(self.routes.len()).map_err(|error| {
            io::Error::other(format!("{} interrupt routes: {error:?}", self.routes.len()))
        })?;
        for (entry, (gsi, message)) in table.as_mut_slice().iter_mut().zip(&self.routes) {
            *entry = kb::kvm_irq_routing_entry {
                gsi: *gsi,
                type_: kb::KVM_IRQ_ROUTING_MSI,
                ..kb::kvm_irq_routing_entry::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
        }
        Ok(table)
    }
}

/// A VM's interrupt routes.
pub(crate) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
    /// One past the last place.
    places: u32,
}

impl Routes {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        let places = vm.check_extension_int(kvm_ioctls::Cap::IrqRouting).max(0) as u32;
        Self { vm, table: Mutex::default(), places: places.max(LEVEL_PLACES) }
    }

    /// Changes the table, here and in the kernel.
    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> io::Result<R> {
        let mut table = self.table.lock();
        let result = change(&mut table);
        self.vm.set_gsi_routing(&table.to_kernel()?)?;
        Ok(result)
    }

    /// Has ends of the level-triggered interrupt `message` reported.
    pub(crate) fn watch(&self, message: MsiMessage) -> io::Result<()> {
        let known = {
            let mut table = self.table.lock();
            table.uses += 1;
            let uses = table.uses;
            let known = table.place_of_level(message);
            if let Some(gsi) = known {
                table.used.insert(gsi, uses);
            }
            known
        };
        if known.is_some() {
            return Ok(());
        }
        self.change(|table| {
            let gsi = table.level_place();
            table.routes.insert(gsi, message);
            let uses = table.uses;
            table.used.insert(gsi, uses);
        })
    }
}

impl MsiTarget for Routes {
    fn signal(&self, message: MsiMessage) {
        if message.data & LEVEL != 0
            && let Err(error) = self.watch(message)
        {
            tracing::error!("KVM takes no route for interrupt {message:x?}: {error}");
        }
        let msi = kb::kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..kb::kvm_msi::default()
        };
        // That nobody takes it (an APIC switched off) is the guest's affair.
        if let Err(error) = self.vm.signal_msi(msi) {
            tracing::debug!("interrupt {message:x?} was not taken: {error}");
        }
    }
}

/// Events that raise interrupts.
pub(crate) struct KvmIrqfd(pub(crate) Arc<Routes>);

impl Irqfd for KvmIrqfd {
    fn route(&self, event: BorrowedFd<'_>) -> Result<Box<dyn IrqfdRoute>, AccelError> {
        let event = event.try_clone_to_owned().map_err(host("an event for an interrupt"))?;
        let gsi = {
            let mut table = self.0.table.lock();
            let free = (LEVEL_PLACES..self.0.places).find(|gsi| !table.routes.contains_key(gsi));
            let gsi = free.ok_or_else(|| {
                host("a route for an interrupt")(io::Error::other(format!(
                    "all {} are in use",
                    self.0.places
                )))
            })?;
            // Taken, and sends nothing: an address that no local APIC has.
            table.routes.insert(gsi, MsiMessage::default());
            gsi
        };
        Ok(Box::new(KvmRoute { routes: self.0.clone(), event, gsi, bound: Mutex::new(false) }))
    }
}

struct KvmRoute {
    routes: Arc<Routes>,
    event: OwnedFd,
    gsi: u32,
    /// Whether the kernel reads the event.
    bound: Mutex<bool>,
}

impl KvmRoute {
    fn bind(&self, bound: &mut bool, bind: bool) -> io::Result<()> {
        if *bound != bind {
            ioctl::irqfd(&*self.routes.vm, self.event.as_fd(), self.gsi, bind)?;
            *bound = bind;
        }
        Ok(())
    }
}

impl IrqfdRoute for KvmRoute {
    fn set(&self, message: Option<MsiMessage>) -> Result<(), AccelError> {
        let mut bound = self.bound.lock();
        if let Some(message) = message {
            let known = self.routes.table.lock().routes.get(&self.gsi) == Some(&message);
            if !known {
                let change = |table: &mut Table| table.routes.insert(self.gsi, message);
                self.routes.change(change).map_err(host("a route for an interrupt"))?;
            }
        }
        self.bind(&mut bound, message.is_some()).map_err(host("an event bound to an interrupt"))
    }
}

impl Drop for KvmRoute {
    fn drop(&mut self) {
        let result = self.bind(&mut self.bound.lock(), false);
        let result = result.and_then(|()| self.routes.change(|table| table.routes.remove(&self.gsi)));
        if let Err(error) = result {
            tracing::error!("KVM does not let go of interrupt route {}: {error}", self.gsi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(vector: u32) -> MsiMessage {
        MsiMessage { address: 0xfee0_0000, data: LEVEL | vector }
    }

    #[test]
    fn the_place_that_was_not_used_for_longest_is_given_away() {
        let mut table = Table::default();
        for number in 0..LEVEL_PLACES {
            assert_eq!(table.level_place(), number);
            table.routes.insert(number, message(number));
            table.used.insert(number, number.into());
        }
        assert_eq!(table.level_place(), 0);
        table.used.insert(0, 100);
        assert_eq!(table.level_place(), 1);
        assert_eq!((table.place_of_level(message(7)), table.place_of_level(message(200))), (Some(7), None));
    }

    #[test]
    fn the_kernel_s_table_has_every_route() {
        let mut table = Table::default();
        table.routes.insert(3, message(0x51));
        table.routes.insert(60, MsiMessage { address: 0x12_fee0_1000, data: 0x41 });
        let kernel = table.to_kernel().unwrap();
        let entries = kernel.as_slice();
        assert_eq!((entries[0].gsi, entries[1].gsi), (3, 60));
        // SAFETY: these are message routes.
        let second = unsafe { entries[1].u.msi };
        assert_eq!((second.address_lo, second.address_hi, second.data), (0xfee0_1000, 0x12, 0x41));
    }
}
