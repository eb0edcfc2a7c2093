/* A guest without an operating system that does nothing but leave to its monitor: reads of the first serial
 * port's scratch register, and of the HPET's capability register. A line on the serial port stands before
 * and after each kind. Entered as a PVH guest: 32-bit protected mode without paging. */

#define COUNT 10000
#define SERIAL 0x3f8
#define SCRATCH (SERIAL + 7)
#define HPET 0xfed00000

	.section .note.Xen, "a", @note
	.long 4, 4, 18		/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long start

	.text
	.code32
	.globl start
start:
	mov $stack, %esp
	mov $pio_begin, %esi
	call print
	mov $COUNT, %ecx
	mov $SCRATCH, %dx
1:	in %dx, %al
	dec %ecx
	jnz 1b
	mov $pio_end, %esi
	call print
	mov $mmio_begin, %esi
	call print
	mov $COUNT, %ecx
2:	mov HPET, %eax
	dec %ecx
	jnz 2b
	mov $mmio_end, %esi
	call print
3:	hlt
	jmp 3b

print:	lodsb
	test %al, %al
	jz 5f
	mov %al, %ah
	mov $(SERIAL + 5), %dx
4:	in %dx, %al
	test $0x20, %al
	jz 4b
	mov %ah, %al
	mov $SERIAL, %dx
	out %al, %dx
	jmp print
5:	ret

pio_begin: .asciz "pio-begin\n"
pio_end: .asciz "pio-end\n"
mmio_begin: .asciz "mmio-begin\n"
mmio_end: .asciz "mmio-end\n"

	.bss
	.skip 1024
stack:
