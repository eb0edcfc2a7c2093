/* What every group of workloads offers: a table of named kernels. */
#ifndef WORKLOADS_H
#define WORKLOADS_H
#include <stdint.h>

struct workload {
	const char *name;
	/* Does the work `n` times over and returns something that depends on all of it. */
	uint64_t (*run)(uint64_t n);
	/* Chosen so that one run takes some tens of milliseconds natively. */
	uint64_t n;
};

extern const struct workload integer_workloads[];
extern const struct workload vector_workloads[];
extern const struct workload system_workloads[];
extern const struct workload avx_workloads[];

/* Whether this processor can run `avx_workloads`. */
int has_avx_workloads(void);
#endif
