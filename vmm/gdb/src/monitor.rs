//! The commands of gdb's `monitor`.

use crate::registers::{Architecture, is_long};
use crate::session::{Debuggee, Session};
use accel::{MpState, X86State};
use std::fmt::Write;

/// Elements that are shown of memory at once, at most.
const MOST_ELEMENTS: usize = 1024;

const HELP: &str = "\
help                     these lines
info cpus                the vCPUs and what they do
info registers [VCPU]    the registers of a vCPU, segments' hidden parts included
xp [/COUNT[b|h|w|g]] GPA guest memory at a physical address
gva2gpa ADDRESS [VCPU]   the physical address that a virtual one is mapped to
stepirq [on|off]         whether single steps take interrupts
arch [x86-64|i386|i8086] what gdb takes the processors for, from its next connection on
reset                    resets the machine; it stays stopped
";

/// Carries out a command; gives what is to be printed.
pub(crate) fn execute<D: Debuggee>(session: &mut Session<D>, command: &str) -> String {
    let words: Vec<_> = command.split_ascii_whitespace().collect();
    let result = match words[..] {
        [] | ["help" | "?"] => Ok(HELP.into()),
        ["info", "cpus"] => cpus(session),
        ["info", "registers"] => registers(session, "0"),
        ["info", "registers", vcpu] => registers(session, vcpu),
        ["xp", address] => physical(session, "/1w", address),
        ["xp", format, address] => physical(session, format, address),
        ["gva2gpa", address] => translation(session, address, "0"),
        ["gva2gpa", address, vcpu] => translation(session, address, vcpu),
        ["stepirq", ref rest @ ..] => step_interrupts(session, rest),
        ["arch", ref rest @ ..] => architecture(session, rest),
        ["reset" | "system_reset"] => {
            session.forget();
            session
                .debuggee
                .reset()
                .map(|()| "The machine was reset; `maintenance flush register-cache` has gdb look.\n".into())
        }
        _ => Err(format!("{command:?} is no command; `monitor help` lists them")),
    };
    result.unwrap_or_else(|error| error + "\n")
}

/// Reads a number as C writes it.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed
        .map_err(|_| format!("{text:?} is no number; accepted are decimal ones and 0x with hexadecimal ones"))
}

fn vcpu<D: Debuggee>(session: &Session<D>, text: &str) -> Result<usize, String> {
    let count = session.debuggee.vcpus().len();
    let id = number(text)?;
    usize::try_from(id)
        .ok()
        .filter(|id| *id < count)
        .ok_or_else(|| format!("there is no vCPU {id}; there are {count}"))
}

/// What a processor does, in a few words.
pub(crate) fn activity(state: &X86State) -> String {
    let mode = match (state.cr0 & 1, state.rflags >> 17 & 1, is_long(state)) {
        (0, ..) => "real mode",
        (_, 1, _) => "VM86 mode",
        (_, _, true) => "64-bit mode",
        _ => "protected mode",
    };
    match state.events.mp_state {
        MpState::WaitForSipi => "waits to be started".into(),
        MpState::Halted => format!("halted, {mode}"),
        MpState::Runnable => format!("{mode}, CPL {}", state.segments[X86State::SS].rights >> 5 & 3),
    }
}

fn cpus<D: Debuggee>(session: &mut Session<D>) -> Result<String, String> {
    let mut text = String::new();
    for id in 0..session.debuggee.vcpus().len() {
        let address = session.code_address(id).map_err(|error| error.to_string())?;
        let state = session.state(id).map_err(|error| error.to_string())?;
        let _ = writeln!(text, "vCPU {id}: {address:#x}, {}", activity(state)); // into a string
    }
    Ok(text)
}

fn registers<D: Debuggee>(session: &mut Session<D>, id: &str) -> Result<String, String> {
    const NAMES: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    let id = vcpu(session, id)?;
    let state = session.state(id).map_err(|error| error.to_string())?;
    let mut text = String::new();
    for (index, (name, value)) in NAMES.into_iter().zip(state.regs).enumerate() {
        let end = if index % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(text, "{name:3}={value:016x}{end}"); // into a string, here and below
    }
    let _ = writeln!(text, "RIP={:016x} RFLAGS={:08x} ({})", state.rip, state.rflags, activity(state));
    let segments = ["ES", "CS", "SS", "DS", "FS", "GS"].into_iter().zip(&state.segments);
    for (name, segment) in segments.chain([("LDT", &state.ldtr), ("TR", &state.tr)]) {
        let unusable = if segment.unusable { " unusable" } else { "" };
        let _ = writeln!(
            text,
            "{name:3}={:04x} base={:016x} limit={:08x} rights={:04x}{unusable}",
            segment.selector, segment.base, segment.limit, segment.rights
        );
    }
    let tables = [("GDT", state.gdtr), ("IDT", state.idtr)];
    for (name, table) in tables {
        let _ = writeln!(text, "{name}      base={:016x} limit={:04x}", table.base, table.limit);
    }
    let _ = writeln!(
        text,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} CR8={:x}",
        state.cr0,
        state.cr2,
        state.cr3,
        state.cr4,
        state.lapic.tpr >> 4
    );
    let [dr0, dr1, dr2, dr3] = state.debug_addresses;
    let _ = writeln!(
        text,
        "DR0={dr0:016x} DR1={dr1:016x} DR2={dr2:016x} DR3={dr3:016x} DR6={:08x} DR7={:08x}",
        state.dr6, state.dr7
    );
    let _ = writeln!(text, "EFER={:x} XCR0={:x} MXCSR={:08x}", state.efer, state.xcr0, state.fpu.mxcsr);
    Ok(text)
}

fn physical<D: Debuggee>(session: &mut Session<D>, format: &str, address: &str) -> Result<String, String> {
    let wrong = || format!("{format:?} is no format; accepted is /COUNT and one of b, h, w and g");
    let format_text = format.strip_prefix('/').ok_or_else(wrong)?;
    let digits = format_text.find(|c: char| !c.is_ascii_digit()).unwrap_or(format_text.len());
    let (count, unit) = format_text.split_at(digits);
    let count: usize = if count.is_empty() { 1 } else { count.parse().map_err(|_| wrong())? };
    let size = match unit.trim_matches('x') {
        "b" => 1,
        "h" => 2,
        "w" | "" => 4,
        "g" => 8,
        _ => return Err(wrong()),
    };
    let address = number(address)?;
    let mut data = vec![0; count.min(MOST_ELEMENTS) * size];
    let memory = session.debuggee.memory();
    memory
        .read(address, &mut data)
        .map_err(|_| format!("there is no memory at {address:#x}, or less than {} bytes", data.len()))?;
    let mut text = String::new();
    for (line, bytes) in data.chunks(16).enumerate() {
        let _ = write!(text, "{:016x}:", address.wrapping_add(16 * line as u64)); // into a string, here and below
        for element in bytes.chunks(size) {
            let value = element.iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
            let _ = write!(text, " 0x{value:0width$x}", width = 2 * size);
        }
        text.push('\n');
    }
    Ok(text)
}

fn translation<D: Debuggee>(session: &mut Session<D>, address: &str, id: &str) -> Result<String, String> {
    let (address, id) = (number(address)?, vcpu(session, id)?);
    match session.debuggee.vcpus()[id].translate(address).map_err(|error| error.to_string())? {
        Some(gpa) => Ok(format!("gpa: {gpa:#x}\n")),
        None => Err(format!("{address:#x} is not mapped")),
    }
}

fn step_interrupts<D: Debuggee>(session: &mut Session<D>, words: &[&str]) -> Result<String, String> {
    session.step_interrupts = match words {
        [] => session.step_interrupts,
        ["on"] => true,
        ["off"] => false,
        _ => return Err("accepted are on and off".into()),
    };
    Ok(format!("Single steps take interrupts: {}.\n", if session.step_interrupts { "on" } else { "off" }))
}

fn architecture<D: Debuggee>(session: &mut Session<D>, words: &[&str]) -> Result<String, String> {
    let named = |name: &str| Architecture::NAMES.iter().find(|(known, _)| *known == name);
    session.architecture = match words {
        [] => session.architecture,
        [name] if let Some((_, architecture)) = named(name) => *architecture,
        _ => return Err("accepted are x86-64, i386 and i8086".into()),
    };
    let name = Architecture::NAMES.iter().find(|(_, architecture)| *architecture == session.architecture);
    Ok(format!("From the next connection on: {}.\n", name.map_or("", |(name, _)| name)))
}
