//! The ways in which instructions are translated.

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The same instruction with other registers and the memory operand's host address.
    Generic,
    /// The bytes as they are: no operands but registers that are where they are in the guest.
    Verbatim,
    /// Nothing at all.
    Nop,
    Lea,
    /// INC and DEC in the encoding that 64-bit mode lacks.
    IncDec,
    /// MOV of the accumulator and memory at a constant address.
    Moffs,
    Push,
    PushImm,
    Pop,
    Leave,
    Call,
    CallIndirect,
    Jmp,
    JmpIndirect,
    Jcc,
    Ret,
    Div,
    Idiv,
    Cld,
    Std,
    /// MOVS, repeated or not.
    Movs,
    /// STOS, repeated or not.
    Stos,
    Cli,
    Sti,
    Pushf,
    Popf,
    Iret,
    MovSeg,
    Swapgs,
    Stac,
    Clac,
    /// BT and its like of memory, with the number in a register.
    BitString,
    Fldcw,
    Fninit,
    Syscall,
    Sysret,
    /// RDTSC and RDTSCP.
    Rdtsc,
    /// LODS, not repeated.
    Lods,
    /// SCAS, not repeated.
    Scas,
    /// The interpreter executes it.
    Interpret,
}
