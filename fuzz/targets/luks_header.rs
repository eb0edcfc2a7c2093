//! A LUKS header that nobody vouches for: it is refused, or every range it names is within its payload's offset, its
//! slots are tried, and it comes out of a change of keys as a header that holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use luks::{Amendment, HEADER_BYTES, KEY_SLOTS, KeyMaterials, Volume};
use std::time::Duration;

/// The most iterations that are worth their time here.
const MOST_ITERATIONS: u32 = 16;

fuzz_target!(|data: &[u8]| {
    let _ = Volume::open(data, true);
    let Ok(volume) = Volume::open(data, false) else { return };
    assert_eq!(volume.header().encode()[..], data[..HEADER_BYTES]);
    let mut materials = KeyMaterials::default();
    for slot in 0..KEY_SLOTS {
        let (offset, length) = volume.key_material(slot);
        assert!(offset >= 4096 && offset + length as u64 <= volume.payload_offset());
        assert!(length <= 64 * 4000 + 512, "{length} bytes of key material");
        materials[slot] = Some(data.iter().copied().cycle().take(length).collect());
    }
    let slots = &volume.header().slots;
    let slow = volume.active_slots().any(|slot| slots[slot].iterations > MOST_ITERATIONS);
    if slow || volume.header().master_key_iterations > MOST_ITERATIONS {
        return;
    }
    let _ = volume.unlock(b"password", &materials);
    let erase = Amendment {
        keyslot: volume.active_slots().next().map(|slot| slot as i64),
        iter_time: None::<Duration>,
        force: true,
        ..Amendment::default()
    };
    if let Ok((changed, writes)) = erase.plan(&volume, &materials) {
        assert!(Volume::open(&changed.header().encode(), false).is_ok());
        assert!(writes.iter().all(|write| write.offset < changed.payload_offset()));
    }
});
