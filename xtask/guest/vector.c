/* Floating-point and SIMD workloads. */
#include "workloads.h"
#include <emmintrin.h>
#include <math.h>
#include <string.h>

static uint64_t bits(double x)
{
	uint64_t value;
	memcpy(&value, &x, sizeof value);
	return value;
}

static uint64_t scalar(uint64_t n)
{
	double a = 1.5, b = 0.75, c = 0.1;
	for (uint64_t i = 0; i < n; i++) {
		a = a * 0.999 + b;
		b = b * 0.5 - c;
		c = c + a * 1e-9;
	}
	return bits(a + b + c);
}

static uint64_t matmul(uint64_t n)
{
	enum { N = 64 };
	static double a[N][N], b[N][N], c[N][N];
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			a[i][j] = i + j;
			b[i][j] = i - j;
		}
	for (uint64_t round = 0; round < n; round++)
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j++) {
				double sum = 0;
				for (int k = 0; k < N; k++)
					sum += a[i][k] * b[k][j];
				c[i][j] += sum;
			}
	return bits(c[3][5]);
}

static uint64_t div_sqrt(uint64_t n)
{
	double x = 2;
	for (uint64_t i = 0; i < n; i++)
		x = __builtin_sqrt(x + 3.0) / 1.0001;
	return bits(x);
}

static uint64_t saxpy(uint64_t n)
{
	static float x[1024], y[1024];
	__m128 factor = _mm_set1_ps(0.5f);
	for (uint64_t round = 0; round < n; round++)
		for (int i = 0; i < 1024; i += 4) {
			__m128 sum = _mm_add_ps(_mm_mul_ps(_mm_load_ps(x + i), factor), _mm_load_ps(y + i));
			_mm_store_ps(y + i, sum);
		}
	return (uint64_t)y[5];
}

static uint64_t packed_int(uint64_t n)
{
	static __m128i data[1024];
	__m128i sum = _mm_set1_epi32(1);
	for (uint64_t round = 0; round < n; round++)
		for (int i = 0; i < 1024; i++) {
			__m128i value = _mm_xor_si128(_mm_add_epi32(data[i], sum), _mm_slli_epi32(sum, 3));
			sum = _mm_sub_epi16(_mm_shuffle_epi32(value, 0x1b), _mm_srli_epi64(value, 7));
			data[i] = value;
		}
	uint64_t low;
	_mm_storel_epi64((__m128i *)&low, sum);
	return low;
}

static uint64_t memcpy_64k(uint64_t n)
{
	static char from[65536], to[65536];
	for (uint64_t i = 0; i < n; i++) {
		memcpy(to, from, sizeof from);
		__asm__ volatile("" ::: "memory");
		from[i & 65535]++;
	}
	return to[1];
}

static uint64_t x87(uint64_t n)
{
	long double x = 1.0L, y = 0.5L;
	for (uint64_t i = 0; i < n; i++) {
		x = x * 0.9999L + y;
		y = y - x * 1e-6L;
	}
	return bits((double)(x + y));
}

const struct workload vector_workloads[] = {
	{ "scalar_fp", scalar, 5000000 },
	{ "matmul", matmul, 80 },
	{ "div_sqrt", div_sqrt, 1500000 },
	{ "saxpy", saxpy, 80000 },
	{ "packed_int", packed_int, 12000 },
	{ "memcpy", memcpy_64k, 8000 },
	{ "x87", x87, 1000000 },
	{ 0 },
};
