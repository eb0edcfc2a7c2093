/* Workloads that live in the kernel: system calls, faults, processes, and code that writes code. */
#define _GNU_SOURCE
#include "workloads.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t system_call(uint64_t n)
{
	uint64_t sum = 0;
	for (uint64_t i = 0; i < n; i++)
		sum += syscall(SYS_getppid);
	return sum;
}

static uint64_t page_fault(uint64_t n)
{
	enum { LEN = 4 << 20 };
	for (uint64_t i = 0; i < n; i++) {
		char *memory = mmap(0, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (int at = 0; at < LEN; at += 4096)
			memory[at] = 1;
		munmap(memory, LEN);
	}
	return n;
}

static uint64_t fork_wait(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		pid_t child = fork();
		if (child == 0)
			_exit(0);
		waitpid(child, 0, 0);
	}
	return n;
}

static uint64_t fork_exec(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		pid_t child = vfork();
		if (child == 0) {
			execl("/proc/self/exe", "bench", "--nothing", (char *)0);
			_exit(1);
		}
		waitpid(child, 0, 0);
	}
	return n;
}

static uint64_t pipe_switch(uint64_t n)
{
	int there[2], back[2];
	char byte = 1;
	if (pipe(there) || pipe(back))
		abort();
	pid_t child = fork();
	if (child == 0) {
		while (read(there[0], &byte, 1) == 1 && byte)
			if (write(back[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	for (uint64_t i = 0; i < n; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			abort();
	byte = 0;
	if (write(there[1], &byte, 1) != 1)
		abort();
	waitpid(child, 0, 0);
	close(there[0]), close(there[1]), close(back[0]), close(back[1]);
	return n;
}

static uint64_t self_modify(uint64_t n)
{
	static const uint8_t code[] = { 0xb8, 0, 0, 0, 0, 0xc3 }; /* mov eax, imm32; ret */
	uint8_t *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t sum = 0;
	memcpy(page, code, sizeof code);
	for (uint32_t i = 0; i < n; i++) {
		memcpy(page + 1, &i, 4);
		__asm__ volatile("" ::: "memory");
		sum += ((uint32_t(*)(void))page)();
	}
	munmap(page, 4096);
	return sum;
}

const struct workload system_workloads[] = {
	{ "syscall", system_call, 200000 },
	{ "page_fault", page_fault, 20 },
	{ "fork_wait", fork_wait, 200 },
	{ "fork_exec", fork_exec, 100 },
	{ "pipe_switch", pipe_switch, 5000 },
	{ "self_modify", self_modify, 20000 },
	{ 0 },
};
