//! Changes of a volume's passwords, as `qemu-img amend` has them.

use crate::header::KEY_SLOTS;
use crate::volume::{HeaderWrite, KeyMaterials, Volume};
use crate::{Error, Result};
use std::time::Duration;

/// A change of a volume's passwords. The words are those of the amend options.
#[derive(Debug, Clone, Default)]
pub struct Amendment<'a> {
    /// Whether a key is to be added ("state=active") or keys are to be erased ("state=inactive").
    pub active: bool,
    /// The password of the key to be added.
    pub new_secret: Option<&'a [u8]>,
    /// Erase: only slots that open with this password.
    pub old_secret: Option<&'a [u8]>,
    /// The slot to fill or erase; by itself the first free one, or all that open with `old_secret`.
    pub keyslot: Option<i64>,
    /// How much processor time unlocking with the new password is to take; two seconds where it is not said.
    pub iter_time: Option<Duration>,
    /// Add: a password that opens the volume, if not that by which it was opened.
    pub secret: Option<&'a [u8]>,
    /// The password by which the volume was opened.
    pub opened_with: &'a [u8],
    /// Whether to do it although keys are overwritten or the last key is lost.
    pub force: bool,
}

impl Amendment<'_> {
    /// The volume after the change, and the writes that make it so. Takes processor time.
    ///
    /// # Errors
    /// The options do not go together, no key would be left, or the passwords do not fit.
    pub fn plan(&self, volume: &Volume, materials: &KeyMaterials) -> Result<(Volume, Vec<HeaderWrite>)> {
        let mut changed = volume.clone();
        let writes = if self.active {
            self.add(&mut changed, materials)?
        } else {
            self.erase(&mut changed, materials)?
        };
        Ok((changed, writes))
    }

    fn slot(&self) -> Result<Option<usize>> {
        let Some(given) = self.keyslot else { return Ok(None) };
        let slot = usize::try_from(given).ok().filter(|&slot| slot < KEY_SLOTS);
        slot.map(Some).ok_or(Error::NoSuchSlot(given))
    }

    fn add(&self, volume: &mut Volume, materials: &KeyMaterials) -> Result<Vec<HeaderWrite>> {
        let new_secret = self.new_secret.ok_or(Error::NewSecretRequired)?;
        if self.old_secret.is_some() {
            return Err(Error::NotWhenActivating("old-secret"));
        }
        let is_active = |slot: usize| volume.header().slots[slot].is_active();
        let slot = match self.slot()? {
            Some(slot) => slot,
            None => (0..KEY_SLOTS).find(|&slot| !is_active(slot)).ok_or(Error::NoFreeSlot)?,
        };
        if !self.force && is_active(slot) {
            return Err(Error::SlotInUse(slot));
        }
        let (_, key) = volume.unlock(self.secret.unwrap_or(self.opened_with), materials)?;
        volume.add_key(slot, &key, new_secret, self.iter_time.unwrap_or(Duration::from_secs(2)))
    }

    fn erase(&self, volume: &mut Volume, materials: &KeyMaterials) -> Result<Vec<HeaderWrite>> {
        let given = [
            ("new-secret", self.new_secret.is_some()),
            ("iter-time", self.iter_time.is_some()),
            ("secret", self.secret.is_some()),
        ];
        if let Some((name, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(Error::NotWhenErasing(name));
        }
        let opens = |volume: &Volume, slot: usize, password: &[u8]| match &materials[slot] {
            Some(material) => Ok(volume.unlock_slot(slot, password, material.clone())?.is_some()),
            None => Ok(false),
        };
        let active = volume.active_slots().count();
        let slots = match (self.slot()?, self.old_secret) {
            (Some(slot), old_secret) => {
                if let Some(password) = old_secret
                    && !opens(volume, slot, password)?
                {
                    return Err(Error::SlotHasOtherPassword(slot));
                }
                if !self.force && !volume.header().slots[slot].is_active() {
                    return Err(Error::SlotInactive(slot));
                }
                if !self.force && active == 1 {
                    return Err(Error::LastSlot(slot));
                }
                vec![slot]
            }
            (None, Some(password)) => {
                let mut slots = Vec::new();
                for slot in volume.active_slots() {
                    if opens(volume, slot, password)? {
                        slots.push(slot);
                    }
                }
                if slots.is_empty() {
                    return Err(Error::NoSlotMatches);
                }
                if !self.force && slots.len() == active {
                    return Err(Error::AllSlotsMatch);
                }
                slots
            }
            (None, None) => return Err(Error::NothingToErase),
        };
        Ok(slots.into_iter().flat_map(|slot| volume.erase_slot(slot)).collect())
    }
}
