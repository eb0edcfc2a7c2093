//! What an interpreted instruction costs.

use rustix::time::{ClockId, clock_gettime};
use x86_core::testing::{DATA, Machine};

/// Processor time of this thread, which others on the machine disturb less than wall time.
fn seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Runs `code` (a loop that counts RCX down) and prints the time per instruction.
fn measure(name: &str, code: &[u8], per_iteration: u64) {
    const ITERATIONS: u64 = 2_000_000;
    let mut machine = Machine::long();
    machine.load(code);
    let end = machine.cpu.rip + code.len() as u64;
    machine.cpu.regs[1] = ITERATIONS;
    machine.cpu.regs[6] = DATA;
    machine.cpu.regs[7] = DATA + 0x1000;
    let mut core = machine.core();
    let start = seconds();
    while core.cpu.rip != end {
        if let Err(trap) = x86_interp::step(&mut core) {
            panic!("{name}: {trap:?} at {:#x}", core.cpu.rip);
        }
    }
    let each = (seconds() - start) * 1e9 / (ITERATIONS * per_iteration) as f64;
    println!("{name}: {each:.1} ns per instruction");
}

fn main() {
    // add rax, rbx; xor rdx, rax; lea rbx, [rax+rdx]; dec rcx; jnz
    measure("registers", b"\x48\x01\xd8\x48\x31\xc2\x48\x8d\x1c\x10\x48\xff\xc9\x75\xf1", 5);
    // mov rax, [rsi]; add rax, [rsi+8]; mov [rdi], rax; add [rdi+8], rax; dec rcx; jnz
    measure("memory", b"\x48\x8b\x06\x48\x03\x46\x08\x48\x89\x07\x48\x01\x47\x08\x48\xff\xc9\x75\xed", 6);
    // call +5; dec rcx; jnz -10; jmp +1; ret
    measure("calls", b"\xe8\x07\x00\x00\x00\x48\xff\xc9\x75\xf6\xeb\x01\xc3", 4);
    // push rax; pop rbx; movzx eax, cl; shl rax, 3; cmp eax, 7; setb dl; dec rcx; jnz
    measure("mixed", b"\x50\x5b\x0f\xb6\xc1\x48\xc1\xe0\x03\x83\xf8\x07\x0f\x92\xc2\x48\xff\xc9\x75\xec", 8);
}
