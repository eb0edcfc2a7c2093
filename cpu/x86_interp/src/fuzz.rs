//! What fuzzers feed: any bytes as code, in any mode, with any registers.

use crate::step;
use x86_core::testing::{DATA, Machine};
use x86_core::{Core, Flow, Trap, flags, vector};

/// Instructions after which a run ends.
const STEPS: usize = 64;

/// Runs `data` as a guest: a byte that chooses the mode, 8 bytes of flags, 16 times 8 bytes of registers, the
/// rest code. Shorter data counts as followed by zeroes.
///
/// # Panics
/// If an instruction breaks the rules: one that faults changed registers, or flags are impossible.
pub fn fuzz_bytes(data: &[u8]) {
    let byte = |index: usize| data.get(index).copied().unwrap_or(0);
    let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|n| byte(index + n)));
    let mut machine = match byte(0) % 5 {
        0 => Machine::real(),
        1 => Machine::protected(),
        2 => Machine::long(),
        3 => Machine::user(),
        _ => {
            let mut machine = Machine::user();
            machine.cpu.segments[1].attributes = 0x0c0fb; // compatibility mode
            machine
        }
    };
    let mut core = machine.core();
    core.set_rflags(word(1) & !flags::VM);
    core.mode_changed();
    for register in 0..16 {
        let value = word(9 + register * 8);
        // Half of the values point to data.
        core.cpu.regs[register] = if value & 1 == 0 { DATA + (value >> 1 & 0xfff) } else { value };
    }
    machine.load(data.get(137..).unwrap_or(&[]));
    let mut core = machine.core();
    for _ in 0..STEPS {
        if !checked_step(&mut core) {
            break;
        }
    }
}

/// One instruction and, if it faults, the delivery of the exception. False if the processor stops.
fn checked_step(core: &mut Core<'_>) -> bool {
    let (regs, rip, rflags) = (core.cpu.regs, core.cpu.rip, core.cpu.rflags);
    let result = step(core);
    assert!(core.cpu.rflags & flags::FIXED != 0, "RFLAGS {:#x}", core.cpu.rflags);
    assert!(core.cpu.cpl <= 3, "CPL {}", core.cpu.cpl);
    match result {
        Ok(Flow::Halt) => false,
        Ok(_) => true,
        Err(Trap::TripleFault) => false,
        Err(trap @ Trap::Intercepted) => core.deliver_trap(trap).is_ok(),
        Err(Trap::Exception(exception)) => {
            if exception.vector != vector::DB {
                assert_eq!(core.cpu.rip, rip, "a fault moved RIP");
                let strings = [0, 1, 6, 7]; // repeated string instructions keep their progress
                for (index, (old, new)) in regs.iter().zip(&core.cpu.regs).enumerate() {
                    assert!(
                        old == new || strings.contains(&index),
                        "{exception:x?} at {rip:#x} changed register {index} from {old:#x} to {new:#x}"
                    );
                }
                assert_eq!(rflags & !flags::ARITHMETIC, core.cpu.rflags & !flags::ARITHMETIC);
            }
            core.deliver(exception).is_ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn any_code_in_any_mode_keeps_the_rules(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz_bytes(&data);
        }

        #[test]
        fn any_instruction_in_any_mode_keeps_the_rules(
            mode in 0..5u8,
            prefix in prop::sample::select(vec![0x90u8, 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x48, 0x64, 0x2e]),
            escape in any::<bool>(),
            code in prop::array::uniform13(any::<u8>()),
            registers in prop::collection::vec(any::<u8>(), 136),
        ) {
            let mut data = vec![mode];
            data.extend(registers);
            data.push(prefix);
            if escape {
                data.push(0x0f);
            }
            data.extend(code);
            fuzz_bytes(&data);
        }
    }
}
