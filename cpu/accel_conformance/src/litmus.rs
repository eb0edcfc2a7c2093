//! The order in which processors see each other's loads and stores, by the litmus tests of x86-TSO (Sewell, Sarkar,
//! Owens, Zappa Nardelli, Myreen, "x86-TSO: a rigorous and usable programmer's model", 2010; Intel SDM volume 3, 9.2;
//! AMD APM volume 2, 7.2).
//!
//! How often each is run is said by the environment variable [`ITERATIONS`]: two thousand times by default.

use crate::guest::{Asm, CODE, DATA, assemble, exit, long_mode, write_tables};
use crate::rig::{Rig, Target};
use iced_x86::code_asm::*;
use std::collections::BTreeMap;

/// Names the variable that says how often each test is run.
const ITERATIONS: &str = "VIREO_LITMUS_ITERATIONS";
const DEFAULT_ITERATIONS: u32 = 2_000;
/// By how much less often they are run where threads have to share processors.
const CROWDED: u32 = 50;
/// The most rounds between two starts of the guest: they take less time than a case may.
const MOST_AT_ONCE: u32 = 50_000;

/// The variables: each in a cache line of its own, and all of them in one page.
const VARIABLE_LEN: i32 = 0x100;
/// How many processors have come to the next round, and to the end of the last one.
const BEGUN: i32 = 0x800;
const ENDED: i32 = 0x900;
/// Where thread n notes, a quadword for each round, what it saw.
const RESULTS: u64 = 0x80_0000;
const RESULTS_LEN: u64 = 0x8_0000;
const RAM: u64 = RESULTS + 5 * RESULTS_LEN;

const X: usize = 0;
const Y: usize = 1;

/// What a thread does.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Stores 1 or 2.
    Store(usize, u32),
    /// Stores 1 or 2 by XCHG.
    Exchange(usize, u32),
    /// Loads: the thread's next result.
    Load(usize),
    /// MFENCE.
    Fence,
    /// A locked instruction on a place of the thread's own.
    Locked,
}

use Step::{Exchange, Fence, Load, Locked, Store};

/// What came of a round: the results of all threads in turn, then the variables' last values if they are looked at.
/// Each is 0 (what was there before the round), 1 or 2.
type Outcome = Vec<u8>;

/// A litmus test.
struct Litmus {
    name: &'static str,
    threads: &'static [&'static [Step]],
    /// The variables whose last values are looked at.
    last: &'static [usize],
    /// What no processor may do.
    forbidden: fn(&[u8]) -> bool,
    /// What the model allows, and only processors with store buffers do.
    relaxed: Option<fn(&[u8]) -> bool>,
}

const fn forbids(
    name: &'static str,
    threads: &'static [&'static [Step]],
    last: &'static [usize],
    forbidden: fn(&[u8]) -> bool,
) -> Litmus {
    Litmus { name, threads, last, forbidden, relaxed: None }
}

const fn allows(
    name: &'static str,
    threads: &'static [&'static [Step]],
    last: &'static [usize],
    relaxed: fn(&[u8]) -> bool,
) -> Litmus {
    Litmus { name, threads, last, forbidden: |_| false, relaxed: Some(relaxed) }
}

const TWO: &[Litmus] = &[
    forbids("MP", &[&[Store(X, 1), Store(Y, 1)], &[Load(Y), Load(X)]], &[], |seen| seen == [1, 0]),
    forbids("LB", &[&[Load(X), Store(Y, 1)], &[Load(Y), Store(X, 1)]], &[], |seen| seen == [1, 1]),
    allows("SB", &[&[Store(X, 1), Load(Y)], &[Store(Y, 1), Load(X)]], &[], |seen| seen == [0, 0]),
    forbids("SB+mfences", &[&[Store(X, 1), Fence, Load(Y)], &[Store(Y, 1), Fence, Load(X)]], &[], |seen| {
        seen == [0, 0]
    }),
    allows("SB+mfence+po", &[&[Store(X, 1), Fence, Load(Y)], &[Store(Y, 1), Load(X)]], &[], |seen| {
        seen == [0, 0]
    }),
    forbids("SB+lockeds", &[&[Store(X, 1), Locked, Load(Y)], &[Store(Y, 1), Locked, Load(X)]], &[], |seen| {
        seen == [0, 0]
    }),
    forbids("SB+xchgs", &[&[Exchange(X, 1), Load(Y)], &[Exchange(Y, 1), Load(X)]], &[], |seen| {
        seen == [0, 0]
    }),
    allows("R", &[&[Store(X, 1), Store(Y, 1)], &[Store(Y, 2), Load(X)]], &[Y], |seen| seen == [0, 2]),
    forbids("R+po+mfence", &[&[Store(X, 1), Store(Y, 1)], &[Store(Y, 2), Fence, Load(X)]], &[Y], |seen| {
        seen == [0, 2]
    }),
    forbids("S", &[&[Store(X, 2), Store(Y, 1)], &[Load(Y), Store(X, 1)]], &[X], |seen| seen == [1, 2]),
    forbids("2+2W", &[&[Store(X, 1), Store(Y, 2)], &[Store(Y, 1), Store(X, 2)]], &[X, Y], |seen| {
        seen == [1, 1]
    }),
    forbids("CoRR", &[&[Store(X, 1), Store(X, 2)], &[Load(X), Load(X)]], &[], |seen| seen[0] > seen[1]),
    forbids("CoWR", &[&[Store(X, 1), Load(X)], &[Store(X, 2)]], &[X], |seen| seen[0] == 0 || seen == [2, 1]),
    forbids("n4b", &[&[Load(X), Store(X, 1)], &[Load(X), Store(X, 2)]], &[], |seen| seen == [2, 1]),
    forbids("n5", &[&[Store(X, 1), Load(X)], &[Store(X, 2), Load(X)]], &[], |seen| seen == [2, 1]),
    allows("n6", &[&[Store(X, 1), Load(X), Load(Y)], &[Store(Y, 2), Store(X, 2)]], &[X], |seen| {
        seen == [1, 0, 1]
    }),
    // A processor sees its own stores first, and always.
    Litmus {
        name: "SB+rfi-pos",
        threads: &[&[Store(X, 1), Load(X), Load(Y)], &[Store(Y, 1), Load(Y), Load(X)]],
        last: &[],
        forbidden: |seen| seen[0] == 0 || seen[2] == 0,
        relaxed: Some(|seen| seen == [1, 0, 1, 0]),
    },
];

const THREE: &[Litmus] = &[
    forbids("WRC", &[&[Store(X, 1)], &[Load(X), Store(Y, 1)], &[Load(Y), Load(X)]], &[], |seen| {
        seen == [1, 1, 0]
    }),
    forbids(
        "RWC+mfence",
        &[&[Store(X, 1)], &[Load(X), Load(Y)], &[Store(Y, 1), Fence, Load(X)]],
        &[],
        |seen| seen == [1, 0, 0],
    ),
];

const FOUR: &[Litmus] = &[
    forbids(
        "IRIW",
        &[&[Store(X, 1)], &[Store(Y, 1)], &[Load(X), Load(Y)], &[Load(Y), Load(X)]],
        &[],
        |seen| seen == [1, 0, 1, 0],
    ),
    forbids(
        "IRIW+xchgs",
        &[&[Exchange(X, 1)], &[Exchange(Y, 1)], &[Load(X), Load(Y)], &[Load(Y), Load(X)]],
        &[],
        |seen| seen == [1, 0, 1, 0],
    ),
];

/// Where the code of thread `id` is.
fn code_of(id: usize) -> u64 {
    CODE + 0x1_0000 * id as u64
}

/// The registers that loads go to.
const LOADED: [AsmRegister64; 3] = [r8, r9, r10];

/// Counts itself at `place`, and waits until `goal`, which is one more for each thread, has been counted: without PAUSE,
/// which may give the host's processor away, if there is one for each thread.
fn meet(a: &mut CodeAssembler, place: i32, goal: AsmRegister64, crowded: bool) -> Asm {
    let (mut again, mut together) = (a.create_label(), a.create_label());
    a.lock().inc(qword_ptr(rsi + place))?;
    a.set_label(&mut again)?;
    a.cmp(qword_ptr(rsi + place), goal)?;
    a.jae(together)?;
    if crowded {
        a.pause()?;
    }
    a.jmp(again)?;
    a.set_label(&mut together)
}

/// Puts `value` in place of a load's: what it is more than before the round.
fn settle(a: &mut CodeAssembler, value: AsmRegister64) -> Asm {
    a.xor(eax, eax)?;
    a.sub(value, rbp)?;
    a.cmovb(value, rax)
}

/// The code of thread `id` for `rounds` rounds. Round n stores 2n + 1 where the test says 1, and 2n + 2 where it says
/// 2, so that nothing need be cleared between rounds. RBP is 2n, R14 what [`meet`] waits for.
fn thread(a: &mut CodeAssembler, test: &Litmus, id: usize, rounds: u32, crowded: bool) -> Asm {
    let variable = |index: usize| index as i32 * VARIABLE_LEN;
    let (mut again, mut wait) = (a.create_label(), a.create_label());
    a.mov(rsi, DATA)?;
    a.mov(rdi, RESULTS + RESULTS_LEN * id as u64)?;
    a.mov(r15, RESULTS + RESULTS_LEN * 4)?;
    a.xor(ebp, ebp)?;
    a.xor(r14d, r14d)?;
    a.set_label(&mut again)?;
    a.add(r14, test.threads.len() as i32)?;
    a.lea(r12, ptr(rbp + 1))?;
    a.lea(r13, ptr(rbp + 2))?;
    meet(a, BEGUN, r14, crowded)?;
    // The threads are ahead of each other by a little, now one and now the other.
    a.imul_3(ecx, ebp, 37 + 14 * id as i32)?;
    a.shr(ecx, 3)?;
    a.and(ecx, 15)?;
    a.inc(ecx)?;
    a.set_label(&mut wait)?;
    a.dec(ecx)?;
    a.jne(wait)?;
    let mut loaded = LOADED.into_iter();
    for step in test.threads[id] {
        let value = |stored: u32| if stored == 1 { r12 } else { r13 };
        match *step {
            Store(at, stored) => a.mov(qword_ptr(rsi + variable(at)), value(stored))?,
            Exchange(at, stored) => {
                a.mov(rax, value(stored))?;
                a.xchg(qword_ptr(rsi + variable(at)), rax)?;
            }
            Load(at) => {
                let register = loaded.next().expect("no thread loads more often");
                a.mov(register, qword_ptr(rsi + variable(at)))?;
            }
            Fence => a.mfence()?,
            Locked => a.lock().add(qword_ptr(rsp - 64), 0)?,
        }
    }
    // Eight bits for each.
    a.xor(edx, edx)?;
    for register in LOADED.into_iter().take(loads(test.threads[id])).rev() {
        settle(a, register)?;
        a.shl(rdx, 8)?;
        a.or(rdx, register)?;
    }
    a.mov(word_ptr(rdi), dx)?;
    a.shr(rdx, 16)?;
    a.mov(byte_ptr(rdi + 2), dl)?;
    a.add(rdi, 4)?;
    if !test.last.is_empty() {
        meet(a, ENDED, r14, crowded)?;
        if id == 0 {
            for (index, last) in test.last.iter().enumerate() {
                a.mov(r8, qword_ptr(rsi + variable(*last)))?;
                settle(a, r8)?;
                a.mov(byte_ptr(r15 + index as i32), r8b)?;
            }
            a.add(r15, 4)?;
        }
    }
    a.add(rbp, 2)?;
    a.cmp(rbp, 2 * rounds as i32)?;
    a.jb(again)?;
    a.add(r14, test.threads.len() as i32)?;
    meet(a, BEGUN, r14, crowded)?;
    if id == 0 {
        a.mov(eax, 1)?;
        return exit(a);
    }
    a.cli()?;
    a.hlt()
}

/// Whether threads have to share the host's processors.
fn is_crowded(test: &Litmus) -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) < test.threads.len()
}

/// How many results a thread has.
fn loads(steps: &[Step]) -> usize {
    steps.iter().filter(|step| matches!(step, Load(_))).count()
}

/// Runs `rounds` rounds, and counts in `seen` what came of them.
fn run(target: &Target<'_>, test: &Litmus, rounds: u32, seen: &mut BTreeMap<Outcome, u64>) {
    let mut rig = Rig::with_ram(target, test.threads.len() as u32, RAM);
    write_tables(&rig);
    for id in 0..test.threads.len() {
        let at = code_of(id);
        rig.write(at, &assemble(64, at, |a| thread(a, test, id, rounds, is_crowded(test))));
        rig.edit(id, |state| {
            long_mode(state, id as u64, at);
            state.events.mp_state = accel::MpState::Runnable;
        });
    }
    assert_eq!(rig.run(), 1, "{}", test.name);
    let mut lists = vec![vec![0u8; rounds as usize * 4]; 5];
    for (place, list) in (0..).zip(&mut lists) {
        rig.memory.read(RESULTS + RESULTS_LEN * place, list).expect("the test reads RAM");
    }
    let counts = test.threads.iter().map(|steps| loads(steps)).chain(std::iter::repeat(0)).take(4);
    let counts: Vec<usize> = counts.chain([test.last.len()]).collect();
    for round in 0..rounds as usize {
        let part = |(list, count): (&Vec<u8>, &usize)| list[round * 4..][..*count].to_vec();
        let outcome: Outcome = lists.iter().zip(&counts).flat_map(part).collect();
        *seen.entry(outcome).or_default() += 1;
    }
}

/// Runs tests as often as is wanted: less often on hosts with fewer processors than a test has threads, which wait for
/// each other there by the host's time slices.
fn run_all(target: &Target<'_>, tests: &[Litmus]) {
    let wanted = std::env::var(ITERATIONS).ok().map(|text| text.parse().expect("a number of iterations"));
    for test in tests {
        let share = if is_crowded(test) { CROWDED } else { 1 };
        let iterations = wanted.unwrap_or(DEFAULT_ITERATIONS) / share;
        let mut seen = BTreeMap::new();
        let mut left = iterations;
        while left > 0 {
            let rounds = left.min(MOST_AT_ONCE / share);
            run(target, test, rounds, &mut seen);
            left -= rounds;
        }
        let count = |meant: fn(&[u8]) -> bool| -> u64 {
            seen.iter().filter(|(outcome, _)| meant(outcome)).map(|(_, count)| count).sum()
        };
        let relaxed = test.relaxed.map(|relaxed| format!(", {} relaxed", count(relaxed))).unwrap_or_default();
        println!("{}: {iterations} rounds{relaxed}: {seen:?}", test.name);
        assert_eq!(count(test.forbidden), 0, "{}: {seen:?}", test.name);
        assert!(seen.keys().flatten().all(|value| *value <= 2), "{}: {seen:?}", test.name);
    }
}

pub(crate) fn two_processors_see_stores_in_order(target: &Target<'_>) {
    run_all(target, TWO);
}

pub(crate) fn more_processors_see_stores_in_order(target: &Target<'_>) {
    run_all(target, THREE);
    run_all(target, FOUR);
}
