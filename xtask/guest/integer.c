/* Integer, memory and control-flow workloads. */
#include "workloads.h"
#include <stdlib.h>
#include <string.h>

#define NOINLINE __attribute__((noinline))

static uint64_t rng_state = 88172645463325252ull;
static uint64_t next_random(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	return rng_state ^= rng_state << 17;
}

static uint64_t alu(uint64_t n)
{
	uint64_t a = 1, b = 2, c = 3;
	for (uint64_t i = 0; i < n; i++) {
		a = (a << 3) ^ b;
		b += a >> 5;
		c = (c - a) ^ i;
	}
	return a + b + c;
}

static uint64_t branch(uint64_t n)
{
	uint64_t state = 12345, taken = 0;
	for (uint64_t i = 0; i < n; i++) {
		state = state * 6364136223846793005ull + 1442695040888963407ull;
		if (state >> 63)
			taken += i;
		else
			taken ^= state;
		if ((state >> 40 & 7) == 3)
			taken *= 3;
	}
	return taken;
}

static uint64_t chase(uint64_t n)
{
	enum { NODES = 2048 };
	static void *ring[NODES];
	static int made;
	if (!made) {
		uint16_t order[NODES];
		for (int i = 0; i < NODES; i++)
			order[i] = i;
		for (int i = NODES - 1; i > 0; i--) {
			int j = next_random() % (i + 1);
			uint16_t swap = order[i];
			order[i] = order[j];
			order[j] = swap;
		}
		for (int i = 0; i < NODES; i++)
			ring[order[i]] = &ring[order[(i + 1) % NODES]];
		made = 1;
	}
	void **at = ring;
	for (uint64_t i = 0; i < n; i++)
		at = *at;
	return (uint64_t)(at - ring);
}

static uint64_t copy8(uint64_t n)
{
	static uint64_t from[4096], to[4096];
	for (uint64_t i = 0; i < n; i++) {
		for (int j = 0; j < 4096; j++) {
			to[j] = from[j];
			__asm__ volatile("" ::: "memory");
		}
		from[i & 4095]++;
	}
	return to[7];
}

static uint64_t histogram(uint64_t n)
{
	static uint32_t counts[256];
	static uint8_t data[65536];
	for (int i = 0; i < 65536; i++)
		data[i] = next_random();
	for (uint64_t i = 0; i < n; i++)
		for (int j = 0; j < 65536; j++)
			counts[data[j]]++;
	return counts[42];
}

static uint64_t crc32(uint64_t n)
{
	static uint32_t table[256];
	static uint8_t data[65536];
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t value = i;
		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
		table[i] = value;
	}
	uint32_t crc = ~0u;
	for (uint64_t i = 0; i < n; i++)
		for (int j = 0; j < 65536; j++)
			crc = table[(crc ^ data[j]) & 0xff] ^ crc >> 8;
	return crc;
}

static uint64_t sieve(uint64_t n)
{
	static uint8_t composite[1 << 18];
	uint64_t primes = 0;
	for (uint64_t round = 0; round < n; round++) {
		memset(composite, 0, sizeof composite);
		for (uint64_t i = 2; i < sizeof composite; i++) {
			if (composite[i])
				continue;
			primes++;
			for (uint64_t j = i * i; j < sizeof composite; j += i)
				composite[j] = 1;
		}
	}
	return primes;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static uint64_t sort(uint64_t n)
{
	static uint32_t values[20000];
	for (uint64_t round = 0; round < n; round++) {
		for (int i = 0; i < 20000; i++)
			values[i] = next_random();
		qsort(values, 20000, sizeof values[0], compare);
	}
	return values[100];
}

static NOINLINE uint64_t fib_of(uint64_t n)
{
	return n < 2 ? n : fib_of(n - 1) + fib_of(n - 2);
}

static uint64_t fib(uint64_t n)
{
	return fib_of(n);
}

static NOINLINE uint64_t op_add(uint64_t x) { return x + 7; }
static NOINLINE uint64_t op_mul(uint64_t x) { return x * 3; }
static NOINLINE uint64_t op_xor(uint64_t x) { return x ^ 0x5555; }
static NOINLINE uint64_t op_shift(uint64_t x) { return x >> 1; }

static uint64_t indirect(uint64_t n)
{
	static uint64_t (*volatile table[4])(uint64_t) = { op_add, op_mul, op_xor, op_shift };
	uint64_t x = 1;
	for (uint64_t i = 0; i < n; i++)
		x = table[(i ^ i >> 3) & 3](x);
	return x;
}

/* A bytecode interpreter with a computed goto per instruction, as language run-times have it. */
static uint64_t bytecode(uint64_t n)
{
	static const uint8_t program[] = { 0, 1, 2, 3, 1, 4, 2, 0, 5 };
	static void *const labels[] = { &&inc, &&dup, &&add, &&xor, &&shift, &&loop };
	uint64_t stack[16] = { 1 }, top = 0, at = 0;
#define NEXT goto *labels[program[at++]]
	NEXT;
inc:
	stack[top]++;
	NEXT;
dup:
	stack[top + 1] = stack[top];
	top++;
	NEXT;
add:
	top--;
	stack[top] += stack[top + 1];
	NEXT;
xor:
	stack[top] ^= 0x1234567;
	NEXT;
shift:
	stack[top] >>= 1;
	NEXT;
loop:
	at = 0;
	if (n--)
		NEXT;
	return stack[0];
}

static uint64_t adc_chain(uint64_t n)
{
	unsigned long a = 1, b = 2, c = 3, d = 4;
	for (unsigned long i = 0; i < n; i++)
		__asm__("add %4, %0\n\tadc %4, %1\n\tadc $0, %2\n\tsbb %0, %3\n\tadc $1, %0"
			: "+r"(a), "+r"(b), "+r"(c), "+r"(d) : "r"(i) : "cc");
	return a ^ b ^ c ^ d;
}

static uint64_t divide(uint64_t n)
{
	uint64_t x = ~0ull, sum = 0;
	for (uint64_t i = 1; i <= n; i++) {
		sum += x / (i | 1);
		sum ^= (uint32_t)x % (uint32_t)(i | 1);
		x = x * 3 + i;
	}
	return sum;
}

static uint64_t string_copy(uint64_t n)
{
	static char from[4096], to[4096];
	for (uint64_t i = 0; i < n; i++) {
		void *s = from, *d = to;
		unsigned long count = sizeof from;
		__asm__ volatile("rep movsb" : "+S"(s), "+D"(d), "+c"(count) :: "memory");
	}
	return to[9];
}

static uint64_t string_store(uint64_t n)
{
	static unsigned long to[4096 / sizeof(long)];
	for (unsigned long i = 0; i < n; i++) {
		void *d = to;
		unsigned long count = sizeof to / sizeof to[0];
#ifdef __x86_64__
		__asm__ volatile("rep stosq" : "+D"(d), "+c"(count) : "a"(i) : "memory");
#else
		__asm__ volatile("rep stosl" : "+D"(d), "+c"(count) : "a"(i) : "memory");
#endif
	}
	return to[9];
}

static uint64_t lock_add(uint64_t n)
{
	static uint64_t counter;
	for (uint64_t i = 0; i < n; i++)
		__atomic_fetch_add(&counter, i, __ATOMIC_SEQ_CST);
	return counter;
}

const struct workload integer_workloads[] = {
	{ "alu", alu, 10000000 },
	{ "branch", branch, 3000000 },
	{ "chase", chase, 8000000 },
	{ "copy8", copy8, 8000 },
	{ "histogram", histogram, 500 },
	{ "crc32", crc32, 150 },
	{ "sieve", sieve, 30 },
	{ "qsort", sort, 10 },
	{ "fib", fib, 31 },
	{ "indirect", indirect, 8000000 },
	{ "bytecode", bytecode, 1500000 },
	{ "adc", adc_chain, 8000000 },
	{ "divide", divide, 2000000 },
	{ "rep_movsb", string_copy, 200000 },
	{ "rep_stosq", string_store, 200000 },
	{ "lock_add", lock_add, 5000000 },
	{ 0 },
};
