//! A header that is in a node: reading it, opening it with a password, changing it.

use crate::amend::Amendment;
use crate::header::HEADER_BYTES;
use crate::volume::{HeaderWrite, KeyMaterials, MasterKey, Volume};
use block_graph::{Errno, Error, NodeRef, Options, Result, Secrets, WriteFlags};
use io_loop::{IoBuffer, offload};
use serde_json::{Map, Value, json};
use std::time::Duration;
use zeroize::Zeroizing;

/// Where a header is: a node, and a place in it.
#[derive(Debug, Clone)]
pub struct HeaderPlace {
    /// The node.
    pub node: NodeRef,
    /// Where in it the header begins, in bytes.
    pub offset: u64,
}

/// A format's error as one of the block layer.
pub(crate) fn failed(error: crate::Error) -> Error {
    let errno = match error {
        crate::Error::InvalidPassword => Errno::NOT_PERMITTED,
        _ => Errno::INVALID,
    };
    Error::of(errno, error)
}

impl HeaderPlace {
    async fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let offset = self.offset.checked_add(at).ok_or_else(|| Error::errno_only(Errno::INVALID))?;
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.node.len()) {
            let message = format!("Could not read encryption header: it ends at byte {}", self.node.len());
            return Err(Error::new(Errno::INVALID, message));
        }
        let mut buffer = IoBuffer::scratch(len);
        let memory = buffer.io();
        let read = self.node.read(offset, &memory).await;
        read.map_err(|error| error.context("Could not read encryption header"))?;
        drop(memory);
        Ok(buffer.bytes().to_vec())
    }

    /// Reads the header and checks it. `detached`: its payload is elsewhere.
    ///
    /// # Errors
    /// The node's, or what is wrong with the header: a [`crate::Error`].
    pub async fn open(&self, detached: bool) -> Result<Volume> {
        let head = self.read(0, HEADER_BYTES).await?;
        Volume::open(&head, detached).map_err(failed)
    }

    /// The master key, by the first slot that opens with the password. Other tasks go on meanwhile.
    ///
    /// # Errors
    /// No slot opens with it, the node's, or what is wrong with the header: a [`crate::Error`].
    pub async fn unlock(&self, volume: &Volume, password: &[u8]) -> Result<MasterKey> {
        for slot in volume.active_slots() {
            let (at, len) = volume.key_material(slot);
            let material = self.read(at, len).await?;
            let (volume, password) = (volume.clone(), Zeroizing::new(password.to_vec()));
            let key = offload(move || volume.unlock_slot(slot, &password, material)).await;
            if let Some(key) = key.map_err(failed)? {
                return Ok(key);
            }
        }
        Err(failed(crate::Error::InvalidPassword))
    }

    /// Does the writes, in their order, and sees to it that they are on stable storage.
    ///
    /// # Errors
    /// The node's; any of the writes may have been done.
    pub async fn write(&self, writes: &[HeaderWrite]) -> Result<()> {
        for write in writes {
            let bytes = write.bytes().map_err(failed)?;
            let at =
                self.offset.checked_add(write.offset).ok_or_else(|| Error::errno_only(Errno::INVALID))?;
            let memory = IoBuffer::from(&bytes[..]).into_io();
            let written = self.node.write(at, &memory, WriteFlags::FUA).await;
            written.map_err(|error| error.context("Could not write encryption header"))?;
        }
        self.node.flush().await
    }

    /// Changes the passwords as `options` say, with the names of `qemu-img amend`, which are taken out of them:
    /// `state`, `keyslot`, `old-secret`, `new-secret`, `iter-time`, `secret`. Returns the changed volume.
    ///
    /// # Errors
    /// The options do not go together, no key would be left, the passwords do not fit, or the node's.
    pub async fn amend(
        &self,
        volume: &Volume,
        options: &mut Options,
        secrets: &Secrets,
        opened_with: &[u8],
        force: bool,
    ) -> Result<Volume> {
        let active = match options.take_text("state").as_deref() {
            Some("active") => true,
            Some("inactive") => false,
            Some(other) => return Err(not_accepted("state", other)),
            None => return Err(Error::invalid("Parameter 'state' is missing")),
        };
        let mut secret = |name: &str| -> Result<Option<Zeroizing<Vec<u8>>>> {
            let id = options.take_text(name);
            id.map(|id| Ok(Zeroizing::new(secrets.get(&id)?.to_vec()))).transpose()
        };
        let (new, old, other) = (secret("new-secret")?, secret("old-secret")?, secret("secret")?);
        let slot = options.take_number("keyslot")?;
        let iter_time = options.take_number("iter-time")?.map(Duration::from_millis);
        let mut materials = KeyMaterials::default();
        for slot in volume.active_slots() {
            let (at, len) = volume.key_material(slot);
            materials[slot] = Some(self.read(at, len).await?);
        }
        let (before, opened_with) = (volume.clone(), Zeroizing::new(opened_with.to_vec()));
        let planned = offload(move || {
            let amendment = Amendment {
                active,
                new_secret: new.as_ref().map(|secret| &secret[..]),
                old_secret: old.as_ref().map(|secret| &secret[..]),
                keyslot: slot.map(|slot| i64::try_from(slot).unwrap_or(i64::MAX)),
                iter_time,
                secret: other.as_ref().map(|secret| &secret[..]),
                opened_with: &opened_with,
                force,
            };
            amendment.plan(&before, &materials)
        });
        let (changed, writes) = planned.await.map_err(|error| match error {
            crate::Error::InvalidPassword if active => {
                failed(error).hint("Failed to retrieve the master key")
            }
            _ => failed(error),
        })?;
        self.write(&writes).await?;
        Ok(changed)
    }
}

/// The message for an option that has no such value.
pub(crate) fn not_accepted(name: &str, value: &str) -> Error {
    Error::invalid(format!("Parameter '{name}' does not accept value '{value}'"))
}

impl Volume {
    /// What is to be known of the volume, with the names that the image tools have.
    #[must_use]
    pub fn info(&self) -> Map<String, Value> {
        let (spec, header) = (self.spec(), self.header());
        let mut info = Map::new();
        info.insert("ivgen-alg".into(), spec.iv.name().into());
        info.insert("detached-header".into(), (self.payload_offset() == 0).into());
        if let Some(hash) = spec.iv_hash
            && spec.iv == crate::IvAlgorithm::Essiv
        {
            info.insert("ivgen-hash-alg".into(), hash.name().into());
        }
        info.insert("hash-alg".into(), spec.hash.name().into());
        info.insert("cipher-alg".into(), spec.algorithm.name().into());
        info.insert("uuid".into(), header.uuid().into());
        info.insert("cipher-mode".into(), spec.mode.name().into());
        let slots = header.slots.iter().enumerate().map(|(index, slot)| {
            let (offset, _) = self.key_material(index);
            if slot.is_active() {
                json!({ "active": true, "iters": slot.iterations, "key-offset": offset, "stripes": slot.stripes })
            } else {
                json!({ "active": false, "key-offset": offset })
            }
        });
        info.insert("slots".into(), slots.collect());
        info.insert("payload-offset".into(), self.payload_offset().into());
        info.insert("master-key-iters".into(), header.master_key_iterations.into());
        info
    }
}
