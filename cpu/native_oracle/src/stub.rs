//! The stub around the tested instruction, and the signal handler that catches its faults.

use crate::{CODE, End, LOADABLE_FLAGS, Mode, NativeState, Outcome, SCRATCH, SCRATCH_LEN};
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::sync::{LazyLock, Mutex, Once};

/// Everything lies at fixed addresses below 2 GiB, so that the stub needs no register to address it, and so
/// that 32-bit code reaches it; and far apart, so that bit strings (which reach 256 MiB both ways) do not get
/// from the scratch memory to the other two. Nothing else is mapped in between.
const CODE_PAGE: usize = CODE as usize & !0xfff;
const CONTEXT: usize = 0x6000_0000;
/// Reserved on both sides of the scratch memory.
const GUARD: usize = 64 << 10;
/// Where 32-bit code returns to: 64-bit code that jumps to the stub.
const RETURN_PAD: usize = CODE_PAGE + 0xf00;
const MAX_CODE: usize = 256;

const USER32_CS: u16 = 0x23;
const USER64_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
/// Entries 0 and 1 of the LDT, at privilege level 3.
const CODE16: u16 = 0x07;
const DATA16: u16 = 0x0f;

/// Bytes of the XSAVE area; components that are not used may lie beyond.
const XSAVE_BYTES: usize = 3072;
/// Components of the XSAVE area: upper halves of YMM, and what AVX-512 has.
const AVX: u64 = 1 << 2;
pub(crate) const AVX512: u64 = 7 << 5;

#[repr(C, align(64))]
struct Context {
    /// Standard-form XSAVE area.
    xsave: [u8; XSAVE_BYTES],
    regs: [u64; 16],
    rflags: u64,
    host_rsp: u64,
    xsave_mask: u64,
    default_mxcsr: u32,
    far_offset: u32,
    far_selector: u16,
    /// 1 in 64-bit mode.
    long: u16,
    /// For DS and ES, and for SS; not loaded in 64-bit mode.
    data: u32,
    stack: u32,
    signal: i32,
    vector: u64,
    error: u64,
    address: u64,
    rip: u64,
    /// Set while tested code runs.
    active: u64,
}

const _: () = assert!(size_of::<Context>() <= 4096 && offset_of!(Context, xsave) == 0);

std::arch::global_asm!(
    ".globl native_oracle_enter",
    "native_oracle_enter:",
    "push rbp; push rbx; push r12; push r13; push r14; push r15",
    "mov [{rsp}], rsp",
    "mov eax, dword ptr [{mask}]; xor edx, edx",
    "xrstor64 [{xsave}]",
    "mov rcx, [{regs} + 8]; mov rdx, [{regs} + 16]; mov rbx, [{regs} + 24]",
    "mov rbp, [{regs} + 40]; mov rsi, [{regs} + 48]; mov rdi, [{regs} + 56]",
    "mov r8, [{regs} + 64]; mov r9, [{regs} + 72]; mov r10, [{regs} + 80]; mov r11, [{regs} + 88]",
    "mov r12, [{regs} + 96]; mov r13, [{regs} + 104]; mov r14, [{regs} + 112]; mov r15, [{regs} + 120]",
    "mov qword ptr [{active}], 1",
    "cmp word ptr [{long}], 0",
    "je 3f",
    "push qword ptr [{flags}]; popfq",
    "mov rax, [{regs} + 0]; mov rsp, [{regs} + 32]",
    "jmp qword ptr [{far_target}]",
    "3:",
    "mov eax, dword ptr [{data}]; mov ds, eax; mov es, eax",
    "push qword ptr [{flags}]; popfq",
    "mov eax, dword ptr [{stack}]; mov ss, eax",
    "mov rax, [{regs} + 0]; mov rsp, [{regs} + 32]",
    "jmp fword ptr [{far}]",
    ".globl native_oracle_exit",
    "native_oracle_exit:",
    "mov qword ptr [{regs} + 0], rax; mov [{regs} + 8], rcx; mov [{regs} + 16], rdx; mov [{regs} + 24], rbx",
    "mov [{regs} + 32], rsp; mov [{regs} + 40], rbp; mov [{regs} + 48], rsi; mov [{regs} + 56], rdi",
    "mov [{regs} + 64], r8; mov [{regs} + 72], r9; mov [{regs} + 80], r10; mov [{regs} + 88], r11",
    "mov [{regs} + 96], r12; mov [{regs} + 104], r13; mov [{regs} + 112], r14; mov [{regs} + 120], r15",
    "mov rsp, [{rsp}]",
    "pushfq; pop qword ptr [{flags}]",
    "push 2; popfq",
    "mov qword ptr [{active}], 0",
    "mov eax, dword ptr [{mask}]; xor edx, edx",
    "xsave64 [{xsave}]",
    "fninit; ldmxcsr dword ptr [{mxcsr}]",
    "cmp word ptr [{long}], 0",
    "jne 4f",
    "xor eax, eax; mov ds, eax; mov es, eax",
    "mov eax, {user_ss}; mov ss, eax",
    "4:",
    "pop r15; pop r14; pop r13; pop r12; pop rbx; pop rbp",
    "ret",
    rsp = const CONTEXT + offset_of!(Context, host_rsp),
    mask = const CONTEXT + offset_of!(Context, xsave_mask),
    xsave = const CONTEXT + offset_of!(Context, xsave),
    regs = const CONTEXT + offset_of!(Context, regs),
    flags = const CONTEXT + offset_of!(Context, rflags),
    far = const CONTEXT + offset_of!(Context, far_offset),
    far_target = const CONTEXT + offset_of!(Context, rip),
    long = const CONTEXT + offset_of!(Context, long),
    data = const CONTEXT + offset_of!(Context, data),
    stack = const CONTEXT + offset_of!(Context, stack),
    user_ss = const USER_SS,
    mxcsr = const CONTEXT + offset_of!(Context, default_mxcsr),
    active = const CONTEXT + offset_of!(Context, active),
);

unsafe extern "C" {
    fn native_oracle_enter();
    fn native_oracle_exit();
}

/// What lies in the code page now, so that equal code is not written again.
struct Loaded {
    bytes: Vec<u8>,
    mode: Option<Mode>,
}

static LOADED: Mutex<Loaded> = Mutex::new(Loaded { bytes: Vec::new(), mode: None });

pub(crate) fn run(bytes: &[u8], state: &NativeState, mode: Mode) -> Outcome {
    assert!(bytes.len() <= MAX_CODE, "code of {} bytes", bytes.len());
    static MAP: Once = Once::new();
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    MAP.call_once(map_arena);
    assert!(mode != Mode::Bits16 || has_16_bit(), "the kernel makes no 16-bit segments");
    ensure_signal_stack();
    if loaded.mode != Some(mode) || loaded.bytes != bytes {
        write_code(loaded.bytes.len(), bytes, mode);
        loaded.bytes = bytes.to_vec();
        loaded.mode = Some(mode);
    }
    // SAFETY: map_arena mapped the context page; the lock that is held makes this the only user, and the
    // stub accesses it only during the call below, through the same pointer's provenance (exposed address).
    let context = unsafe { &mut *(CONTEXT as *mut Context) };
    load(context, state, mode);
    // SAFETY: the scratch page is mapped, and nobody else uses it while the lock is held.
    unsafe { std::ptr::copy_nonoverlapping(state.scratch.as_ptr(), SCRATCH as *mut u8, SCRATCH_LEN) };
    // SAFETY: the stub keeps the C ABI: it saves and restores what the callee must keep, and the caller
    // vouches for what the tested code accesses (crate documentation).
    unsafe { native_oracle_enter() };
    // SAFETY: as above.
    let context = unsafe { &*(CONTEXT as *const Context) };
    let mut outcome = store(context, state, mode.start() + 1..=mode.start() + bytes.len() as u64);
    // SAFETY: as above.
    unsafe {
        std::ptr::copy_nonoverlapping(SCRATCH as *const u8, outcome.state.scratch.as_mut_ptr(), SCRATCH_LEN);
    }
    outcome
}

/// The components of the XSAVE area that are loaded and stored, and where the host has them.
pub(crate) struct Components {
    pub(crate) mask: u64,
    avx: usize,
    masks: usize,
    zmm_high: usize,
    high_zmm: usize,
}

/// Those of this host.
pub(crate) fn components() -> &'static Components {
    static COMPONENTS: LazyLock<Components> = LazyLock::new(|| {
        let place = |component, len| {
            let at = std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
            (at >= 576 && at + len <= XSAVE_BYTES).then_some(at)
        };
        let avx = std::arch::is_x86_feature_detected!("avx").then(|| place(2, 256)).flatten();
        let bw = std::arch::is_x86_feature_detected!("avx512bw");
        let wide = || Some((place(5, 64)?, place(6, 512)?, place(7, 1024)?));
        let wide = bw.then(wide).flatten();
        let (masks, zmm_high, high_zmm) = wide.unwrap_or_default();
        let mask = 3 | if avx.is_some() { AVX } else { 0 } | if wide.is_some() { AVX512 } else { 0 };
        Components { mask, avx: avx.unwrap_or_default(), masks, zmm_high, high_zmm }
    });
    &COMPONENTS
}

impl Components {
    /// Calls `each` with a place in the area, and the number and the bytes of the vector register that it is of.
    fn for_each_vector(&self, mut each: impl FnMut(usize, usize, std::ops::Range<usize>)) {
        for register in 0..16 {
            each(160 + 16 * register, register, 0..16);
            if self.mask & AVX != 0 {
                each(self.avx + 16 * register, register, 16..32);
            }
            if self.mask & AVX512 != 0 {
                each(self.zmm_high + 32 * register, register, 32..64);
                each(self.high_zmm + 64 * register, 16 + register, 0..64);
            }
        }
    }
}

fn load(context: &mut Context, state: &NativeState, mode: Mode) {
    let components = components();
    context.xsave_mask = components.mask;
    context.default_mxcsr = 0x1f80;
    context.xsave[..160].copy_from_slice(&state.x87[..160]);
    context.xsave[24..28].copy_from_slice(&(state.mxcsr & 0xffff).to_le_bytes());
    context.xsave[28..32].fill(0);
    components.for_each_vector(|at, register, bytes| {
        context.xsave[at..at + bytes.len()].copy_from_slice(&state.vectors[register][bytes]);
    });
    if components.mask & AVX512 != 0 {
        for (n, mask) in state.opmask.iter().enumerate() {
            context.xsave[components.masks + 8 * n..][..8].copy_from_slice(&mask.to_le_bytes());
        }
    }
    context.xsave[512..576].fill(0);
    context.xsave[512..520].copy_from_slice(&context.xsave_mask.to_le_bytes());
    context.regs = state.regs;
    context.rflags = state.rflags & LOADABLE_FLAGS | 2;
    context.long = u16::from(mode == Mode::Bits64);
    context.far_offset = mode.start() as u32;
    let (code, data) = if mode == Mode::Bits16 { (CODE16, DATA16) } else { (USER32_CS, USER_SS as u16) };
    context.far_selector = code;
    (context.data, context.stack) = (data.into(), data.into());
    context.rip = CODE;
    context.signal = 0;
}

/// `breakpoints`: where RIP is after an INT3 of the tested bytes themselves.
fn store(context: &Context, before: &NativeState, breakpoints: RangeInclusive<u64>) -> Outcome {
    let mut state = before.clone();
    state.regs = context.regs;
    state.rflags = context.rflags;
    state.mxcsr = u32::from_le_bytes(context.xsave[24..28].try_into().expect("4 bytes"));
    state.x87[..24].copy_from_slice(&context.xsave[..24]);
    state.x87[32..160].copy_from_slice(&context.xsave[32..160]);
    let components = components();
    components.for_each_vector(|at, register, bytes| {
        let len = bytes.len();
        state.vectors[register][bytes].copy_from_slice(&context.xsave[at..at + len]);
    });
    if components.mask & AVX512 != 0 {
        for (n, mask) in state.opmask.iter_mut().enumerate() {
            let at = components.masks + 8 * n;
            *mask = u64::from_le_bytes(std::array::from_fn(|byte| context.xsave[at + byte]));
        }
    }
    let end = match context.signal {
        0 => End::Next,
        // The page is filled with INT3: one that is not in the tested bytes was jumped to.
        libc::SIGTRAP if context.vector == 3 && !breakpoints.contains(&context.rip) => {
            End::Jumped(context.rip - 1)
        }
        signal => End::Fault {
            signal,
            vector: context.vector as u8,
            error: context.error,
            address: context.address,
            rip: context.rip,
        },
    };
    Outcome { state, end }
}

/// Writes the tested code followed by the way back, over `previous` bytes of the code before.
fn write_code(previous: usize, bytes: &[u8], mode: Mode) {
    let mut code = bytes.to_vec();
    match mode {
        Mode::Bits64 => {
            code.extend([0xff, 0x25, 0, 0, 0, 0]); // jmp [rip]
            code.extend((native_oracle_exit as *const () as u64).to_le_bytes());
        }
        Mode::Bits32 | Mode::Bits16 => {
            if mode == Mode::Bits16 {
                code.push(0x66);
            }
            code.push(0xea); // jmp 0x33:RETURN_PAD
            code.extend((RETURN_PAD as u32).to_le_bytes());
            code.extend((USER64_CS as u16).to_le_bytes());
        }
    }
    let wipe = (previous + 16).max(code.len());
    code.resize(wipe, 0xcc);
    // SAFETY: the page is mapped writable, `wipe` stays below RETURN_PAD (MAX_CODE), and the caller holds the
    // lock. x86 executes freshly written code after a jump.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), CODE as *mut u8, wipe) };
}

fn map_arena() {
    let map = |address: usize, len: usize, protection, flags| {
        // SAFETY: mapping anonymous memory at addresses that are this crate's (NOREPLACE the first time).
        let got = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                len,
                protection,
                flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_eq!(got as usize, address, "mapping: {}", std::io::Error::last_os_error());
    };
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let scratch = SCRATCH as usize;
    map(scratch - GUARD, 2 * GUARD + SCRATCH_LEN, libc::PROT_NONE, libc::MAP_FIXED_NOREPLACE);
    map(scratch, SCRATCH_LEN, rw, libc::MAP_FIXED);
    map(CODE_PAGE, 4096, rw | libc::PROT_EXEC, libc::MAP_FIXED_NOREPLACE);
    map(CONTEXT, 4096, rw, libc::MAP_FIXED_NOREPLACE);
    let mut page = vec![0xccu8; 4096];
    let pad = RETURN_PAD - CODE_PAGE;
    page[pad..pad + 6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
    page[pad + 6..pad + 14].copy_from_slice(&(native_oracle_exit as *const () as u64).to_le_bytes());
    // SAFETY: just mapped.
    unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), CODE_PAGE as *mut u8, 4096) };
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
        // SAFETY: the handler only touches its arguments and the context page.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
        }
    }
}

/// Makes the 16-bit segments in the LDT the first time; whether they are there.
pub(crate) fn has_16_bit() -> bool {
    static MADE: LazyLock<bool> = LazyLock::new(|| {
        // modify_ldt(2): entry, base, limit, flags (bits 1..=2: 0 is data, 2 is code).
        let code = [0u32, CODE_PAGE as u32, 0xffff, 2 << 1];
        let data = [1u32, SCRATCH as u32, SCRATCH_LEN as u32 - 1, 0];
        [code, data].iter().all(|entry| {
            // SAFETY: the kernel reads 16 bytes; entries of the LDT that nobody else uses change.
            unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, entry.as_ptr(), size_of_val(entry)) == 0 }
        })
    });
    *MADE
}

/// Gives the calling thread a signal stack that is large enough for any XSAVE frame: the tested code's RSP
/// may be anything.
fn ensure_signal_stack() {
    const LEN: usize = 64 << 10;
    thread_local! {
        static STACK: std::cell::OnceCell<Vec<u8>> = const { std::cell::OnceCell::new() };
    }
    STACK.with(|stack| {
        stack.get_or_init(|| {
            // Lives as long as the thread needs it: never freed, as the thread may still take a signal while
            // its locals are dropped.
            let memory = Box::leak(vec![0u8; LEN].into_boxed_slice());
            let new = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: LEN };
            // SAFETY: `new` describes memory that is never freed.
            assert_eq!(unsafe { libc::sigaltstack(&new, std::ptr::null_mut()) }, 0);
            Vec::new()
        });
    });
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, ucontext: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; the context page is mapped before the handler is installed.
    unsafe {
        let context = &mut *(CONTEXT as *mut Context);
        let gregs = &mut (*ucontext.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if context.active == 0 {
            // Not the tested code's: let it kill the process as it would have.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        context.active = 0;
        context.signal = signal;
        context.vector = gregs[libc::REG_TRAPNO as usize] as u64;
        context.error = gregs[libc::REG_ERR as usize] as u64;
        context.address = (*info).si_addr() as u64;
        context.rip = gregs[libc::REG_RIP as usize] as u64;
        gregs[libc::REG_RIP as usize] = native_oracle_exit as *const () as i64;
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & 0x0000_ffff_ffff_0000 | (USER_SS << 48 | USER64_CS) as i64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{run, run16, run32};

    fn state() -> NativeState {
        let mut regs = std::array::from_fn(|i| 0x1111_2222_3333_0000 + i as u64);
        regs[4] = SCRATCH + 2048;
        let wide = if crate::has_avx512() { 64 } else { 32 };
        let vectors = std::array::from_fn(|i| {
            std::array::from_fn(|j| if j < wide && (wide == 64 || i < 16) { (i * 37 + j) as u8 } else { 0 })
        });
        let opmask =
            if wide == 64 { std::array::from_fn(|i| 0x0102_0304_0506_0700 + i as u64) } else { [0; 8] };
        NativeState { regs, vectors, opmask, ..NativeState::default() }
    }

    #[test]
    fn state_goes_in_and_out() {
        let mut before = state();
        before.rflags = 0x8d5;
        before.scratch = std::array::from_fn(|i| i as u8);
        let outcome = run(&[0x90], &before);
        assert_eq!(outcome.end, End::Next);
        assert_eq!(outcome.state.rflags & LOADABLE_FLAGS, 0x8d5);
        assert_eq!(outcome.state, NativeState { rflags: outcome.state.rflags, ..before });
    }

    #[test]
    fn instructions_work() {
        let outcome = run(&[0x48, 0x01, 0xc8], &state()); // add rax, rcx
        assert_eq!(outcome.state.regs[0], 0x2222_4444_6666_0001);
        let outcome = run(&[0x50], &state()); // push rax
        assert_eq!(outcome.state.regs[4], SCRATCH + 2040);
        assert_eq!(outcome.state.scratch[2040..2048], 0x1111_2222_3333_0000u64.to_le_bytes());
        let mut x87 = state();
        x87.x87[..2].copy_from_slice(&0x27fu16.to_le_bytes());
        let outcome = run(&[0xd9, 0xe8], &x87); // fld1
        assert_eq!(outcome.state.x87[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(outcome.state.x87[..2], 0x27fu16.to_le_bytes());
        let outcome = run(&[0xc5, 0xfc, 0x28, 0xca], &state()); // vmovaps ymm1, ymm2
        assert_eq!(outcome.state.vectors[1][..32], state().vectors[2][..32]);
        assert_eq!(outcome.state.vectors[1][32..], [0; 32]);
        if crate::has_avx512() {
            let outcome = run(&[0x62, 0xa1, 0x7c, 0x48, 0x28, 0xca], &state()); // vmovaps zmm17, zmm18
            assert_eq!(outcome.state.vectors[17], state().vectors[18]);
            let outcome = run(&[0xc4, 0xe1, 0xf4, 0x41, 0xd3], &state()); // kandq k2, k1, k3
            assert_eq!(outcome.state.opmask[2], 0x0102_0304_0506_0701);
        }
    }

    #[test]
    fn ends_are_told_apart() {
        let mut before = state();
        assert_eq!(run(&[0xeb, 0x10], &before).end, End::Jumped(CODE + 0x12));
        before.regs[1] = 0;
        before.regs[2] = 0;
        let fault = |end| match end {
            End::Fault { signal, vector, address, rip, .. } => (signal, vector, address, rip),
            other => panic!("{other:?}"),
        };
        let outcome = run(&[0x48, 0xf7, 0xf1], &before); // div rcx
        assert_eq!(fault(outcome.end), (libc::SIGFPE, 0, CODE, CODE));
        assert_eq!(outcome.state.regs, before.regs);
        before.regs[4] = 0x10; // an RSP that no signal frame could be on
        before.regs[0] = SCRATCH + 4096;
        assert_eq!(fault(run(&[0x8a, 0x00], &before).end), (libc::SIGSEGV, 14, SCRATCH + 4096, CODE));
        assert_eq!(fault(run(&[0x0f, 0x0b], &before).end), (libc::SIGILL, 6, CODE, CODE));
        assert_eq!(fault(run(&[0xcc], &before).end), (libc::SIGTRAP, 3, 0, CODE + 1));
        assert_eq!(run(&[0x90], &before).end, End::Next);
    }

    #[test]
    fn compatibility_mode() {
        let mut before = state();
        before.regs[0] = 0x39;
        before.rflags = 0x12; // AF
        let outcome = run32(&[0x27], &before); // daa
        assert_eq!(outcome.end, End::Next);
        assert_eq!(outcome.state.regs[0] & 0xff, 0x3f);
        before.regs[3] = SCRATCH + 8;
        let outcome = run32(&[0x89, 0x23], &before); // mov [ebx], esp
        assert_eq!(outcome.state.scratch[8..12], (SCRATCH as u32 + 2048).to_le_bytes());
        let outcome = run32(&[0xd4, 0x00], &before); // aam 0
        assert!(matches!(outcome.end, End::Fault { signal: libc::SIGFPE, vector: 0, rip: CODE, .. }));
        assert_eq!(run(&[0x90], &before).end, End::Next);
    }

    #[test]
    fn segments_of_16_bits() {
        assert!(has_16_bit(), "the kernel makes no 16-bit segments");
        let mut before = state();
        before.regs[3] = 0x1111_0010;
        before.regs[6] = 0x2222_fff8;
        before.regs[4] = 0x3333_0800;
        let outcome = run16(&[0x89, 0x40, 4], &before); // mov [bx+si+4], ax
        assert_eq!(outcome.end, End::Next);
        assert_eq!(outcome.state.scratch[12..16], [0x00, 0x00, 0, 0]);
        let outcome = run16(&[0x54], &before); // push sp
        assert_eq!(outcome.state.scratch[0x7fe..0x800], [0x00, 0x08]);
        assert_eq!(outcome.state.regs[4] as u32, 0x3333_07fe);
        assert_eq!(run16(&[0xeb, 0x10], &before).end, End::Jumped(0x812));
        before.regs[3] = 0x1008;
        let outcome = run16(&[0x8a, 0x00], &before); // mov al, [bx+si]: offset 0x1000, past the limit
        assert!(matches!(outcome.end, End::Fault { vector: 13, rip: 0x800, .. }), "{:?}", outcome.end);
        before.regs[4] = 1;
        let outcome = run16(&[0x50], &before); // push ax
        assert!(matches!(outcome.end, End::Fault { vector: 12, rip: 0x800, .. }), "{:?}", outcome.end);
        assert_eq!(run(&[0x90], &before).end, End::Next);
    }
}
