//! Ways to boot: multiboot and PVH with guests of a few instructions, and bzImages unpacked or not, with
//! and without randomized addresses.

use end_to_end::elf::{elf32, multiboot_header};
use end_to_end::{boot, power_off, run};
use std::io::Write;

const LOAD_ADDRESS: u32 = 0x10_0000;
/// What the guests print, and how they leave.
const TEXT: &str = "a small guest speaks\n";
const EXIT: u8 = 21;
/// How they leave when they are not entered as their protocol says.
const WRONG_ENTRY: u8 = 3;

/// 32-bit code that leaves with [`WRONG_ENTRY`] if `check`'s comparison fails, else prints `text`, and leaves
/// with [`EXIT`].
fn program(address: u32, check: &[u8]) -> Vec<u8> {
    let mut code = check.to_vec();
    code.extend([0x75, 0]); // jne wrong
    let wrong_from = code.len();
    code.extend([0xbe, 0, 0, 0, 0]); // mov esi, text
    let text_at = code.len() - 4;
    code.extend([0xfc]); // cld
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xac, 0x84, 0xc0]); // next: lodsb; test al, al
    code.extend([0x74, 0x03, 0xee, 0xeb, 0xf8]); // jz done; out dx, al; jmp next
    code.extend([0xb0, EXIT]); // done: mov al, EXIT
    code.extend([0x66, 0xba, 0x01, 0x05, 0xee]); // leave: mov dx, 0x501; out dx, al
    code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp hlt
    code[wrong_from - 1] = (code.len() - wrong_from) as u8;
    code.extend([0xb0, WRONG_ENTRY, 0xeb]); // wrong: mov al, WRONG_ENTRY; jmp leave
    let back = (code.len() + 1) as i32 - (code.len() as i32 - 3 - 3 - 5);
    code.push(-back as u8);
    let text = address + code.len() as u32;
    code[text_at..text_at + 4].copy_from_slice(&text.to_le_bytes());
    code.extend(TEXT.as_bytes());
    code.push(0);
    code
}

/// An ELF file for multiboot 1: EAX has the loader's magic number.
fn multiboot() -> Vec<u8> {
    let mut text = multiboot_header();
    let entry = LOAD_ADDRESS + text.len() as u32;
    text.extend(program(entry, &[0x3d, 0x02, 0xb0, 0xad, 0x2b])); // cmp eax, 0x2badb002
    elf32(entry, &[(1, &text, LOAD_ADDRESS)])
}

/// An ELF file with Xen's note: EBX points to the start information.
fn pvh() -> Vec<u8> {
    let text = program(LOAD_ADDRESS, &[0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33]); // cmp dword [ebx], 0x336ec578
    let mut note: Vec<u8> = [4u32, 4, 18].iter().flat_map(|word| word.to_le_bytes()).collect();
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    elf32(0, &[(1, &text, LOAD_ADDRESS), (4, &note, 0)])
}

#[test]
fn multiboot_and_pvh_files_run_on_every_machine() {
    for (name, kernel) in [("multiboot", multiboot()), ("PVH", pvh())] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&kernel).unwrap();
        let path = file.path().to_str().unwrap();
        for machine in ["pc", "microvm"] {
            let output =
                run(&["run", "--accel", "dbt", "-M", machine, "-m", "16M", "--kernel", path, "--debug-exit"]);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(String::from_utf8_lossy(&output.stdout), TEXT, "{name} on {machine}: {errors}");
            assert_eq!(output.status.code(), Some(2 * i32::from(EXIT) + 1), "{name} on {machine}: {errors}");
        }
    }
}

/// Where the kernel says that it runs, at the virtual address of its link when it isn't randomized.
const TEXT_AT_LINK: &str = "grep -q '^ffffffff81000000 . _text$' /proc/kallsyms";

#[test]
fn unpacked_kernels_are_randomized_unless_told_not_to() {
    for machine in ["pc", "microvm"] {
        let mut guest = boot(&["debian:13", "-M", machine, "--append", "nokaslr"]);
        assert_eq!(guest.shell(TEXT_AT_LINK), 0, "{machine}");
        power_off(guest);
        // One of hundreds of places is that of the link.
        let moved = (0..2).any(|_| {
            let mut guest = boot(&["debian:13", "-M", machine]);
            let moved = guest.shell(TEXT_AT_LINK) != 0;
            power_off(guest);
            moved
        });
        assert!(moved, "{machine}");
    }
}

#[test]
fn a_kernel_that_unpacks_itself_boots_too() {
    let guest = boot(&["debian:13", "--no-unpack"]);
    power_off(guest);
    let guest = boot(&["debian:12", "--no-unpack", "-M", "microvm"]);
    power_off(guest);
}

#[test]
fn programs_of_32_bit_code_run_under_a_64_bit_kernel() {
    const ADDRESS: u32 = 0x0804_8000 + 52 + 32;
    const SUCCESS: u8 = 42;
    // The sum of the numbers up to a million, by way of the stack: mov ecx, 1000000; xor eax, eax; next: add eax, ecx;
    // push eax; pop edx; dec ecx; jnz next
    let mut code = vec![0xb9, 0x40, 0x42, 0x0f, 0x00, 0x31, 0xc0, 0x01, 0xc8, 0x50, 0x5a, 0x49, 0x75, 0xf9];
    // mov ebx, SUCCESS; cmp edx, the sum; je done; mov bl, 1; done: mov eax, 1 (exit); int 0x80
    code.extend([0xbb, SUCCESS, 0, 0, 0, 0x81, 0xfa]);
    code.extend(((1..=1_000_000u64).sum::<u64>() as u32).to_le_bytes());
    code.extend([0x74, 0x02, 0xb3, 0x01, 0xb8, 0x01, 0, 0, 0, 0xcd, 0x80]);
    let file = elf32(ADDRESS, &[(1, &code, ADDRESS)]);
    let escaped: String = file.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let mut guest = boot(&["debian:13"]);
    assert_eq!(guest.shell(&format!("printf '{escaped}' > /program && chmod +x /program")), 0);
    assert_eq!(guest.shell("/program"), i32::from(SUCCESS));
    power_off(guest);
}

#[test]
fn a_kernel_sleeps_in_memory_until_its_alarm() {
    let mut guest = boot(&["debian:13", "--smp", "2"]);
    assert_eq!(guest.shell("grep -q '\\[deep\\]' /sys/power/mem_sleep && echo here > /kept"), 0);
    let alarm = "/sys/class/rtc/rtc0/wakealarm";
    for _ in 0..2 {
        let sleep = format!("echo 0 > {alarm}; echo +2 > {alarm} && echo mem > /sys/power/state");
        assert_eq!(guest.shell(&sleep), 0);
    }
    assert_eq!(guest.shell("[ $(cat /kept) = here ] && [ $(nproc) = 2 ]"), 0);
    assert_eq!(guest.shell("[ $(dmesg | grep -c 'Low-level resume complete') = 2 ]"), 0);
    power_off(guest);
}
