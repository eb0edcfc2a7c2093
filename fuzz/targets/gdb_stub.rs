//! What a client of the gdb stub sends, against two processors that stand still: packets with a right checksum, one a
//! line, and raw bytes.
#![no_main]

use accel::{Accelerator, DebugStop, Tier, VmSpec, WatchKind, Watchpoint};
use accel_dbt::DbtAccelerator;
use clock::{TimerService, VmClock};
use gdb::fuzzing::Processors;
use gdb::{Architecture, Session};
use guest_memory::GuestMemory;
use libfuzzer_sys::fuzz_target;

/// Guest memory, from address 0.
const RAM: u64 = 1 << 20;
/// What the stub says to one byte of a client's, at most on average: memory is the longest answer.
const MOST_PER_BYTE: usize = 4 << 10;

/// What a client sends: each line of the input is a packet, unless it begins with a raw byte's mark.
fn stream(data: &[u8]) -> Vec<u8> {
    const RAW: u8 = 0xff;
    let mut stream = Vec::new();
    for line in data.split(|byte| *byte == b'\n') {
        if let Some(raw) = line.strip_prefix(&[RAW]) {
            stream.extend(raw);
            continue;
        }
        let sum = line.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        stream.push(b'$');
        stream.extend(line);
        stream.extend(format!("#{sum:02x}+").bytes());
    }
    stream
}

fuzz_target!(|data: &[u8]| {
    let Some((mode, data)) = data.split_first() else { return };
    let memory = GuestMemory::new(std::slice::from_ref(&(0..RAM))).expect("the host has some memory");
    let timers = TimerService::without_thread(VmClock::new());
    let architecture = if mode & 1 == 0 { Architecture::X86_64 } else { Architecture::I386 };
    let tier = if mode & 2 != 0 { Tier::Translator } else { Tier::Interpreter };
    let spec = VmSpec { vcpus: 2, tier, ..VmSpec::default() };
    let vm = DbtAccelerator.create_vm(&spec, &memory, &timers).expect("a VM");
    let vcpus = (0..2).map(|id| vm.create_vcpu(id).expect("a vCPU")).collect();
    let mut session = Session::new(Processors { memory, vcpus }, architecture);
    let mut stops = data.iter().rev().copied();
    let bytes = stream(data);
    let said = gdb::fuzzing::converse(&mut session, &bytes, |_| {
        let stop = stops.next()?;
        let address = u64::from(stop) << 4;
        let vcpu = u32::from(stop & 1);
        Some(match stop % 5 {
            0 => (vcpu, DebugStop::Step),
            1 => (vcpu, DebugStop::Breakpoint { address }),
            2 => (vcpu, DebugStop::Watchpoint(Watchpoint { address, len: 4, kind: WatchKind::Write })),
            3 => (vcpu, DebugStop::Watchpoint(Watchpoint { address, len: 1, kind: WatchKind::Access })),
            _ => return None,
        })
    });
    assert!(said <= MOST_PER_BYTE * (bytes.len() + 1), "{said} bytes said to {}", bytes.len());
});
