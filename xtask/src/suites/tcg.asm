; A ROM in the BIOS's place: makes an address space, goes to user code in it, and tells the registers that this leaves.
; ROM_START is where it begins (it ends at 4 GiB), IMAGE and IMAGE_LEN what goes to physical address 0, PIECES and
; PIECE_COUNT what goes where in the address space: destination, source and length, eight bytes each.
bits 16
org ROM_CODE
; The last 64 KiB, which is where the processor begins.
begin:
    cli
    o32 lgdt [cs:(table - ROM_CODE)]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x08:in_protected_mode

bits 32
in_protected_mode:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    cld
    mov esi, IMAGE
    xor edi, edi
    mov ecx, IMAGE_LEN
    rep movsb
    mov eax, CR4
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80050033
    mov cr0, eax
    jmp dword 0x18:in_long_mode

bits 64
in_long_mode:
    mov rsp, STACK
    fninit
    xor ecx, ecx
    xor edx, edx
    mov eax, 7
    xsetbv
    mov ebx, PIECES
    mov ebp, PIECE_COUNT
.piece:
    mov rdi, [rbx]
    mov rsi, [rbx + 8]
    mov rcx, [rbx + 16]
    rep movsb
    add rbx, 24
    dec ebp
    jnz .piece
    mov rbx, TABLES
    lgdt [rbx]
    lidt [rbx + 16]
    mov eax, LDT_SELECTOR
    lldt ax
    mov eax, TSS_SELECTOR
    ltr ax
    mov eax, DATA_SELECTOR
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    push DATA_SELECTOR
    mov rax, USER_STACK
    push rax
    push 0x202
    push CODE_SELECTOR
    mov rax, USER_CODE
    push rax
    xor eax, eax
    xor ecx, ecx
    xor edx, edx
    xor ebx, ebx
    xor ebp, ebp
    xor esi, esi
    xor edi, edi
    xor r8d, r8d
    xor r9d, r9d
    xor r10d, r10d
    xor r11d, r11d
    xor r12d, r12d
    xor r13d, r13d
    xor r14d, r14d
    xor r15d, r15d
    iretq

align 8
descriptors:
    dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
table:
    dw 31
    dd descriptors
    times 0xfff0 - ($ - $$) db 0
    bits 16
    jmp near begin
    times 0x10000 - ($ - $$) db 0
