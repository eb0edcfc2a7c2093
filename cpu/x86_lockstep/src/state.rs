//! Comparing processors, and making one as the other.

use x86_core::Cpu;

/// Compares fields that can be copied: equality of all, a list of those that differ, and taking over.
macro_rules! fields {
    ($($field:ident),* $(,)?) => {
        fn plain_equal(a: &Cpu, b: &Cpu) -> bool {
            true $(&& a.$field == b.$field)*
        }

        fn plain_differences(a: &Cpu, b: &Cpu, list: &mut Vec<String>) {
            $(if a.$field != b.$field {
                list.push(format!("{}: T1 {:x?}, T0 {:x?}", stringify!($field), a.$field, b.$field));
            })*
        }

        fn plain_copy(from: &Cpu, to: &mut Cpu) {
            $(to.$field = from.$field;)*
        }
    };
}

fields!(
    mxcsr,
    cpl,
    interrupt_shadow,
    halted,
    segments,
    ldtr,
    tr,
    gdtr,
    idtr,
    cr0,
    cr2,
    cr3,
    cr4,
    xcr0,
    pkru,
    opmask,
    dr,
    pdpte,
    msrs,
    svm,
);

/// Whether the architectural state is the same.
pub(crate) fn equal(a: &Cpu, b: &Cpu) -> bool {
    a.rip == b.rip
        && a.regs == b.regs
        && a.rflags == b.rflags
        && plain_equal(a, b)
        && a.vectors == b.vectors
        && a.x87 == b.x87
}

/// What differs in the architectural state of two processors, in words; nothing if they are equal.
pub fn differences(t1: &Cpu, t0: &Cpu) -> Vec<String> {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut list = Vec::new();
    let mut number = |name: &str, a: u64, b: u64| {
        if a != b {
            list.push(format!("{name}: T1 {a:#x}, T0 {b:#x}"));
        }
    };
    number("rip", t1.rip, t0.rip);
    for (name, (a, b)) in NAMES.iter().zip(t1.regs.iter().zip(&t0.regs)) {
        number(name, *a, *b);
    }
    number("rflags", t1.rflags, t0.rflags);
    plain_differences(t1, t0, &mut list);
    for (index, (a, b)) in t1.vectors.iter().zip(&t0.vectors).enumerate() {
        if a != b {
            list.push(format!("vector {index}: T1 {}, T0 {}", hex(&a.0), hex(&b.0)));
        }
    }
    for (at, (a, b)) in t1.x87.0.chunks(16).zip(t0.x87.0.chunks(16)).enumerate() {
        if a != b {
            list.push(format!("x87 image at {:#x}: T1 {}, T0 {}", at * 16, hex(a), hex(b)));
        }
    }
    list
}

/// Bytes as hexadecimal digits, the last first, without leading zeros beyond 16 bytes.
fn hex(bytes: &[u8]) -> String {
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1).max(bytes.len().min(16));
    bytes[..used].iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the architectural state of `to` that of `from`. What hangs on it is the caller's to bring up to date.
pub(crate) fn copy(from: &Cpu, to: &mut Cpu) {
    to.regs = from.regs;
    to.rip = from.rip;
    to.rflags = from.rflags;
    plain_copy(from, to);
    to.vectors = from.vectors;
    to.vector_width = from.vector_width;
    to.x87 = from.x87;
}
