//! A recording that nobody vouches for: its parts are read in order and within bounds, and what was read is written and
//! read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use recording::{Event, MAX_INPUT, Reader, Stamp, Writer};

fn events(bytes: &[u8]) -> Option<(Vec<(String, String)>, Vec<(Stamp, Event)>, bool)> {
    let mut reader = Reader::new(bytes).ok()?;
    let mut events: Vec<(Stamp, Event)> = Vec::new();
    while let Ok(Some((stamp, event))) = reader.next_event() {
        if let Some((last, before)) = events.last() {
            assert!(stamp.count >= last.count && stamp.time >= last.time, "{stamp:?} after {last:?}");
            assert!(!matches!(before, Event::End(..)), "something comes after the end");
        }
        if let Event::Input { bytes, .. } = &event {
            assert!((1..=MAX_INPUT).contains(&bytes.len()));
        }
        events.push((stamp, event));
    }
    Some((reader.header().to_vec(), events, reader.has_ended()))
}

fuzz_target!(|data: &[u8]| {
    let Some((header, list, ended)) = events(data) else { return };
    let mut copy = Vec::new();
    let mut writer = Writer::new(&mut copy, &header).expect("memory takes it");
    for (stamp, event) in &list {
        writer.write(*stamp, event).expect("memory takes it");
    }
    // The header may be longer in the writer's words than the most that is read.
    if let Some(again) = events(&copy) {
        assert_eq!(again, (header, list, ended));
    }
});
