//! What newer processors add to paging: process-context identifiers, protection keys, five levels.

use crate::feature::{Feature, has};
use crate::guest::{
    Asm, CODE, DATA, PAGE_TABLES, assemble, boot64, exit, interrupt_handler, progress, write_tables,
};
use crate::rig::{Rig, Target};
use crate::snapshot::copied;
use accel::HaltReason;
use iced_x86::code_asm::*;

const CR4_OSXSAVE: i32 = 1 << 18;
const CR4_PCIDE: i32 = 1 << 17;
const CR4_PKE: i32 = 1 << 22;
const CR4_PKS: i32 = 1 << 24;
const CR4_LA57: u64 = 1 << 12;

/// IA32_PKRS.
const PKRS: u32 = 0x6e1;
/// Where exceptions' handlers leave the error code, and the flag that there was one.
const FAULT: i32 = 0x800;
const CAUGHT: i32 = 1 << 16;
/// The first page after the 2 MiB that `DATA` begins.
const WINDOW: u64 = DATA + 0x20_0000;
/// The table that maps the 2 MiB from [`WINDOW`] on, and others' places.
const TABLE: u64 = 0x1_0000;
const OTHER: u64 = 0x2_0000;

fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Handles #GP and #PF: the error code goes to `DATA` plus [`FAULT`], and the guest goes on where RBX says.
fn catch(rig: &Rig) {
    for vector in [13, 14] {
        interrupt_handler(rig, vector, |a| {
            a.pop(rax)?;
            a.or(eax, CAUGHT)?;
            a.push(rcx)?;
            a.mov(rcx, DATA)?;
            a.mov(dword_ptr(rcx + FAULT), eax)?;
            a.pop(rcx)?;
            a.mov(qword_ptr(rsp), rbx)?;
            a.iretq()
        });
    }
}

/// Does `step`, and reports the error code of its fault with [`CAUGHT`], or zero if there is none. RAX and RBX are lost.
fn attempt(a: &mut CodeAssembler, step: impl FnOnce(&mut CodeAssembler) -> Asm) -> Asm {
    let mut after = a.create_label();
    a.mov(rax, DATA)?;
    a.mov(dword_ptr(rax + FAULT), 0)?;
    a.lea(rbx, ptr(after))?;
    step(a)?;
    a.set_label(&mut after)?;
    a.mov(rax, DATA)?;
    a.mov(eax, dword_ptr(rax + FAULT))?;
    a.push(rdx)?;
    progress(a)?;
    a.pop(rdx)
}

/// Sets bits of CR4.
fn set_cr4(a: &mut CodeAssembler, bits: i32) -> Asm {
    a.mov(rax, cr4)?;
    a.or(eax, bits)?;
    a.mov(cr4, rax)
}

/// Writes the tables, and has `table` map the 2 MiB from [`WINDOW`] on.
fn map_window(rig: &Rig, table: &[u64]) {
    let mut entries = vec![0u64; 512];
    entries[..table.len()].copy_from_slice(table);
    rig.write(TABLE, &u64s(&entries));
    rig.write(PAGE_TABLES + 0x2000 + (WINDOW >> 21) * 8, &u64s(&[TABLE | 7]));
    // The way to it is open to user code as well: the last entry decides.
    rig.write(PAGE_TABLES, &u64s(&[(PAGE_TABLES + 0x1000) | 7]));
    rig.write(PAGE_TABLES + 0x1000, &u64s(&[(PAGE_TABLES + 0x2000) | 7]));
}

const GP: u64 = CAUGHT as u64;

pub(crate) fn process_contexts_keep_apart(target: &Target<'_>) {
    if !has(target, &[Feature::PCID, Feature::INVPCID]) {
        return;
    }
    let second = 0x4_0000;
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        // The sum of what is read tells which page each read saw.
        let read = |a: &mut CodeAssembler| {
            a.mov(rax, WINDOW)?;
            a.mov(eax, dword_ptr(rax))?;
            a.push(rdx)?;
            progress(a)?;
            a.pop(rdx)
        };
        let switch = |a: &mut CodeAssembler, cr3_value: u64| {
            a.mov(rax, cr3_value)?;
            a.mov(cr3, rax)
        };
        let invpcid = |a: &mut CodeAssembler, kind: i32, context: u64, address: u64| {
            a.mov(rsi, DATA)?;
            a.mov(rax, context)?;
            a.mov(qword_ptr(rsi + 0x100), rax)?;
            a.mov(rax, address)?;
            a.mov(qword_ptr(rsi + 0x108), rax)?;
            a.mov(eax, kind)?;
            a.invpcid(rax, xmmword_ptr(rsi + 0x100))
        };
        const KEEP: u64 = 1 << 63;
        // Without PCIDE bit 63 is reserved.
        attempt(a, |a| {
            a.mov(rax, KEEP | PAGE_TABLES)?;
            a.mov(cr3, rax)
        })?;
        // PCIDE is set only while the identifier is zero.
        switch(a, PAGE_TABLES | 8)?;
        attempt(a, |a| set_cr4(a, CR4_PCIDE))?;
        switch(a, PAGE_TABLES)?;
        attempt(a, |a| set_cr4(a, CR4_PCIDE))?;
        switch(a, PAGE_TABLES | 1)?;
        read(a)?;
        switch(a, second | 2)?;
        read(a)?;
        // Back and forth, translations kept.
        switch(a, KEEP | PAGE_TABLES | 1)?;
        read(a)?;
        switch(a, KEEP | second | 2)?;
        read(a)?;
        // The first's page is another now; its translation is invalidated from the second: by address, by context,
        // by all.
        for (kind, context, address) in [(0, 1, WINDOW), (1, 1, 0), (2, 0, 0), (3, 0, 0)] {
            a.mov(rax, TABLE)?;
            a.add(qword_ptr(rax), 0x1000)?;
            invpcid(a, kind, context, address)?;
            switch(a, KEEP | PAGE_TABLES | 1)?;
            read(a)?;
            switch(a, KEEP | second | 2)?;
            read(a)?;
        }
        // And by loading CR3 without the bit.
        a.mov(rax, TABLE)?;
        a.add(qword_ptr(rax), 0x1000)?;
        switch(a, PAGE_TABLES | 1)?;
        read(a)?;
        // What INVPCID refuses: a type, reserved bits, an address that is none.
        attempt(a, |a| invpcid(a, 4, 0, 0))?;
        attempt(a, |a| invpcid(a, 0, 0x1000, WINDOW))?;
        attempt(a, |a| invpcid(a, 0, 1, 1 << 62))?;
        // Paging cannot go while there are identifiers.
        attempt(a, |a| {
            a.mov(rax, cr0)?;
            a.and(eax, 0x7fff_ffff)?;
            a.mov(cr0, rax)
        })?;
        a.mov(eax, 1)?;
        exit(a)
    });
    catch(&rig);
    map_window(&rig, &[DATA + 0x10_0000 + 3]);
    // The second space is the same but for the window.
    let mut tables = vec![0u8; 0x6000];
    rig.memory.read(PAGE_TABLES, &mut tables).expect("the test reads RAM");
    rig.write(second, &tables);
    rig.write(second, &u64s(&[(second + 0x1000) | 7]));
    rig.write(second + 0x1000, &u64s(&[(second + 0x2000) | 7]));
    rig.write(second + 0x2000 + (WINDOW >> 21) * 8, &u64s(&[OTHER | 7]));
    rig.write(OTHER, &u64s(&[(DATA + 0x18_0000) | 3]));
    for page in 0..8 {
        rig.write(DATA + 0x10_0000 + page * 0x1000, &u64s(&[0x10 + page]));
    }
    rig.write(DATA + 0x18_0000, &u64s(&[0x99]));
    assert_eq!(rig.run(), 1);
    assert_eq!(
        rig.bus.progress(),
        [
            [GP, GP, 0].as_slice(),
            &[0x10, 0x99, 0x10, 0x99],
            &[0x11, 0x99, 0x12, 0x99, 0x13, 0x99, 0x14, 0x99],
            &[0x15],
            &[GP, GP, GP, GP],
        ]
        .concat()
    );
}

/// Loads EAX into PKRU.
fn wrpkru(a: &mut CodeAssembler, value: u32) -> Asm {
    a.mov(eax, value)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.wrpkru()
}

/// Reports PKRU.
fn report_pkru(a: &mut CodeAssembler) -> Asm {
    a.xor(ecx, ecx)?;
    a.rdpkru()?;
    progress(a)
}

pub(crate) fn protection_keys_guard_user_pages(target: &Target<'_>) {
    if !has(target, &[Feature::PKU, Feature::XSAVE]) {
        return;
    }
    const AREA: i32 = 0x1000;
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let xsave_all = |a: &mut CodeAssembler, restore: bool| {
            a.mov(rsi, DATA)?;
            a.mov(eax, 0x200)?;
            a.xor(edx, edx)?;
            let area = xmmword_ptr(rsi + AREA);
            if restore { a.xrstor(area) } else { a.xsave(area) }
        };
        a.mov(rax, cr0)?;
        a.or(eax, 1 << 16)?; // WP
        a.mov(cr0, rax)?;
        set_cr4(a, CR4_PKE | CR4_OSXSAVE)?;
        a.mov(eax, 0x201)?;
        a.xor(edx, edx)?;
        a.xor(ecx, ecx)?;
        a.xsetbv()?;
        // OSPKE says so.
        a.mov(eax, 7)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(eax, ecx)?;
        a.shr(eax, 4)?;
        a.and(eax, 1)?;
        progress(a)?;
        // ECX and EDX must be zero.
        attempt(a, |a| {
            a.mov(ecx, 1)?;
            a.rdpkru()
        })?;
        attempt(a, |a| {
            a.mov(edx, 1)?;
            a.xor(ecx, ecx)?;
            a.wrpkru()
        })?;
        a.mov(rdi, WINDOW)?;
        for rights in [0, 1 << 2, 2 << 2] {
            // The second page has key 1. Privileged code is subject to it, since it is a user page.
            wrpkru(a, rights)?;
            attempt(a, |a| a.mov(eax, dword_ptr(rdi + 0x1000)))?;
            attempt(a, |a| a.mov(dword_ptr(rdi + 0x1000), eax))?;
            // The first has key 0, and the third is no user page.
            attempt(a, |a| a.mov(dword_ptr(rdi), eax))?;
            attempt(a, |a| a.mov(dword_ptr(rdi + 0x2000), eax))?;
        }
        // Component 9 of XSAVE.
        wrpkru(a, 0x1234_5678)?;
        xsave_all(a, false)?;
        wrpkru(a, 0x30)?;
        xsave_all(a, true)?;
        report_pkru(a)?;
        // Its initial state is zero.
        a.mov(qword_ptr(rsi + AREA + 512), 0)?;
        xsave_all(a, true)?;
        report_pkru(a)?;
        wrpkru(a, 0x55aa_5500)?;
        a.mov(eax, 0xffff)?;
        progress(a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.cmp(dword_ptr(rsi), 0)?;
        a.je(again)?;
        report_pkru(a)?;
        a.mov(eax, 1)?;
        exit(a)
    });
    catch(&rig);
    let user = |page: u64, key: u64| (DATA + 0x10_0000 + page * 0x1000) | 7 | key << 59;
    map_window(&rig, &[user(0, 0), user(1, 1), user(2, 1) & !4]);
    let reasons = rig.run_while(|rig, stop| {
        rig.bus.wait_for(0xffff);
        stop.stop();
    });
    assert_eq!(reasons, [HaltReason::Stopped]);
    let fault = |code: u64| GP | code;
    // A present page, a key's refusal (bit 5), a write (bit 1).
    let expected = [
        [1, GP, GP].as_slice(),
        &[0, 0, 0, 0],
        &[fault(0x21), fault(0x23), 0, 0],
        &[0, fault(0x23), 0, 0],
        &[0x1234_5678, 0, 0xffff],
    ]
    .concat();
    assert_eq!(rig.bus.progress(), expected);
    assert_eq!(rig.vcpus[0].save().expect("a state").fpu.pkru, 0x55aa_5500);
    // And it goes along with the rest of the state.
    let mut elsewhere = copied(target, &rig);
    elsewhere.write(DATA, &[1]);
    assert_eq!(elsewhere.run(), 1);
    assert_eq!(elsewhere.bus.progress(), [0x55aa_5500]);
}

pub(crate) fn protection_keys_guard_privileged_pages(target: &Target<'_>) {
    if !has(target, &[Feature::PKS]) {
        return;
    }
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let write = |a: &mut CodeAssembler, low: u32, high: u32| {
            a.mov(ecx, PKRS)?;
            a.mov(eax, low)?;
            a.mov(edx, high)?;
            a.wrmsr()
        };
        a.mov(rax, cr0)?;
        a.or(eax, 1 << 16)?; // WP
        a.mov(cr0, rax)?;
        set_cr4(a, CR4_PKS)?;
        attempt(a, |a| write(a, 0, 1))?;
        a.mov(rdi, WINDOW)?;
        for rights in [0, 1 << 2, 2 << 2] {
            write(a, rights, 0)?;
            attempt(a, |a| a.mov(eax, dword_ptr(rdi + 0x1000)))?;
            attempt(a, |a| a.mov(dword_ptr(rdi + 0x1000), eax))?;
            // A user page with the same key is another register's.
            attempt(a, |a| a.mov(dword_ptr(rdi + 0x2000), eax))?;
        }
        a.mov(ecx, PKRS)?;
        a.rdmsr()?;
        exit(a)
    });
    catch(&rig);
    let page = |page: u64, user: u64| (DATA + 0x10_0000 + page * 0x1000) | 3 | user | 1 << 59;
    map_window(&rig, &[page(0, 0), page(1, 0), page(2, 4)]);
    assert_eq!(rig.run(), 2 << 2);
    let fault = |code: u64| GP | code;
    let expected =
        [[GP].as_slice(), &[0, 0, 0], &[fault(0x21), fault(0x23), 0], &[0, fault(0x23), 0]].concat();
    assert_eq!(rig.bus.progress(), expected);
}

pub(crate) fn five_levels_map_57_bits(target: &Target<'_>) {
    if !has(target, &[Feature::LA57]) {
        return;
    }
    const HIGH: u64 = 0x00ab_0000_0000_0000;
    const FS_BASE: u32 = 0xc000_0100;
    let root = 0x3_0000;
    let mut rig = Rig::new(target, 1);
    write_tables(&rig);
    let listing = |a: &mut CodeAssembler| {
        // The same code by an address of 57 bits.
        a.mov(rdi, HIGH + DATA)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rdi + 8), 0x77)?;
        a.mov(eax, dword_ptr(rsi + 8))?;
        progress(a)?;
        let mut there = a.create_label();
        a.lea(rax, ptr(there))?;
        a.mov(rcx, HIGH)?;
        a.add(rax, rcx)?;
        a.jmp(rax)?;
        a.set_label(&mut there)?;
        a.lea(rax, ptr(there))?;
        a.shr(rax, 48)?;
        progress(a)?;
        // The first address that has more than 57 bits, as an operand, as a base, and to return to.
        let beyond = 1u64 << 56;
        attempt(a, |a| {
            a.mov(rax, beyond)?;
            a.mov(eax, dword_ptr(rax))
        })?;
        a.mov(ecx, FS_BASE)?;
        attempt(a, |a| {
            a.xor(eax, eax)?;
            a.mov(edx, (beyond >> 32) as u32)?;
            a.wrmsr()
        })?;
        attempt(a, |a| {
            a.mov(eax, DATA as u32)?;
            a.mov(edx, (HIGH >> 32) as u32)?;
            a.wrmsr()
        })?;
        a.mov(eax, dword_ptr(8).fs())?;
        progress(a)?;
        attempt(a, |a| {
            a.mov(rax, beyond)?;
            a.jmp(rax)
        })?;
        // There is nothing at the upper half's beginning.
        attempt(a, |a| {
            a.mov(rax, 0xff00_0000_0000_0000u64)?;
            a.mov(eax, dword_ptr(rax))
        })?;
        a.mov(rax, cr2)?;
        a.shr(rax, 48)?;
        progress(a)?;
        // Levels cannot be taken away while there is paging.
        attempt(a, |a| {
            a.mov(rax, cr4)?;
            a.and(eax, !(CR4_LA57 as i32))?;
            a.mov(cr4, rax)
        })?;
        a.mov(eax, 1)?;
        exit(a)
    };
    rig.write(CODE, &assemble(64, CODE, listing));
    catch(&rig);
    // The lowest 256 TiB and those at HIGH are the same.
    let mut top = vec![0u64; 512];
    top[0] = PAGE_TABLES | 7;
    top[(HIGH >> 48) as usize & 511] = PAGE_TABLES | 7;
    rig.write(root, &u64s(&top));
    rig.edit(0, |state| {
        crate::guest::long_mode(state, 0, CODE);
        state.cr4 |= CR4_LA57;
        state.cr3 = root;
    });
    assert_eq!(rig.run(), 1);
    // Not present, and read: an error code of zero, where #GP's is zero as well.
    assert_eq!(rig.bus.progress(), [0x77, 0xab, GP, GP, 0, 0x77, GP, GP, 0xff00, GP]);
}
