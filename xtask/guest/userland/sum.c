// A 32-bit program: integers, memory and floating point.
#include <math.h>
#include <stdint.h>
#include <stdio.h>

static uint32_t table[1 << 16];

int main(void)
{
    double sum = 0;
    uint32_t state = 1;
    uint64_t wide = 0;
    for (int i = 1; i < 3000000; i++) {
        state = state * 1664525 + 1013904223;
        table[state >> 16] += i;
        wide += (uint64_t)state * table[i & 0xffff];
        sum += sqrt(i) / state;
    }
    printf("%u %llu %.10f\n", table[77], (unsigned long long)wide, sum);
    return 0;
}
