/* AVX2 and FMA workloads, for processors that have these. */
#include "workloads.h"
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))

AVX2 static uint64_t saxpy(uint64_t n)
{
	static float x[1024], y[1024];
	__m256 factor = _mm256_set1_ps(0.5f);
	for (int i = 0; i < 1024; i++)
		x[i] = i;
	for (uint64_t round = 0; round < n; round++)
		for (int i = 0; i < 1024; i += 8) {
			__m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), factor, _mm256_loadu_ps(y + i));
			_mm256_storeu_ps(y + i, sum);
		}
	return (uint64_t)y[5];
}

AVX2 static uint64_t packed_int(uint64_t n)
{
	static __m256i data[512];
	__m256i sum = _mm256_set1_epi32(1);
	for (uint64_t round = 0; round < n; round++)
		for (int i = 0; i < 512; i++) {
			__m256i value = _mm256_xor_si256(_mm256_add_epi32(data[i], sum), _mm256_slli_epi32(sum, 3));
			sum = _mm256_sub_epi16(_mm256_permute4x64_epi64(value, 0x1b), _mm256_srli_epi64(value, 7));
			data[i] = value;
		}
	uint64_t parts[4];
	_mm256_storeu_si256((__m256i *)parts, sum);
	return parts[2];
}

AVX2 static uint64_t matmul(uint64_t n)
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
			for (int j = 0; j < N; j += 4) {
				__m256d sum = _mm256_setzero_pd();
				for (int k = 0; k < N; k++)
					sum = _mm256_fmadd_pd(_mm256_set1_pd(a[i][k]), _mm256_loadu_pd(&b[k][j]), sum);
				_mm256_storeu_pd(&c[i][j], sum);
			}
	return (uint64_t)c[3][5];
}

const struct workload avx_workloads[] = {
	{ "saxpy_fma", saxpy, 160000 },
	{ "packed_avx2", packed_int, 24000 },
	{ "matmul_fma", matmul, 500 },
	{ 0 },
};

int has_avx_workloads(void)
{
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
