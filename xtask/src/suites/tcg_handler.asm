; Where all exceptions of a program under TCG go, with their vector on the stack: puts the state into SAVED, writes that
; to the debug console, and ends QEMU.
bits 64
default rel
org HANDLER
begin:
; Relative to the code, which is beyond what absolute addresses reach.
saved equ begin + (SAVED - HANDLER)
frame equ begin + (FRAME - HANDLER)
    mov [saved + 0], rax
    mov [saved + 8], rcx
    mov [saved + 16], rdx
    mov [saved + 24], rbx
    mov [saved + 40], rbp
    mov [saved + 48], rsi
    mov [saved + 56], rdi
    mov [saved + 64], r8
    mov [saved + 72], r9
    mov [saved + 80], r10
    mov [saved + 88], r11
    mov [saved + 96], r12
    mov [saved + 104], r13
    mov [saved + 112], r14
    mov [saved + 120], r15
    mov rax, [frame + 24]
    mov [saved + 32], rax
    pop rbx
    mov [saved + 128], rbx
    mov rcx, [frame]
    mov [saved + 136], rcx
    rdfsbase rax
    mov [saved + 144], rax
    rdgsbase rax
    mov [saved + 152], rax
    ; What instruction it was, of faults that instructions have that were fetched.
    xor eax, eax
    cmp ebx, 13
    je .fetched
    cmp ebx, 6
    jne .done
.fetched:
    movzx eax, byte [rcx]
    cmp al, 0x0f
    jne .done
    mov ah, [rcx + 1]
.done:
    mov [saved + 160], rax
    mov eax, 7
    xor edx, edx
    xsave64 [saved + 256]
    cld
    lea rsi, [saved]
    mov ecx, SAVED_LEN
    mov edx, CONSOLE
    rep outsb
    mov edx, EXIT
    out dx, al
    hlt
