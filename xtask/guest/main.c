/* Runs the workloads and prints a line for each: "bench NAME NANOSECONDS CHECKSUM", the best of some runs.
 * As process 1 it is the whole userland of a guest: it mounts what it needs and powers the guest off;
 * the kernel passes on what stands behind "--" on its command line.
 * Arguments are names of workloads to run; none means all. "--nothing" ends at once. */
#define _GNU_SOURCE
#include "workloads.h"
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { RUNS = 3 };

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static int wanted(const char *name, int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		if (!strcmp(name, argv[i]))
			return 1;
	return argc < 2;
}

static void run_all(const struct workload *table, int argc, char **argv)
{
	for (; table->name; table++) {
		uint64_t best = ~0ull, checksum = 0;
		if (!wanted(table->name, argc, argv))
			continue;
		for (int i = 0; i < RUNS; i++) {
			uint64_t start = now();
			checksum += table->run(table->n);
			uint64_t taken = now() - start;
			if (taken < best)
				best = taken;
		}
		printf("bench %s %llu %llx\n", table->name, (unsigned long long)best, (unsigned long long)checksum);
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	int is_init = getpid() == 1;
	if (argc == 2 && !strcmp(argv[1], "--nothing"))
		return 0;
	if (is_init) {
		mkdir("/proc", 0755);
		mount("proc", "/proc", "proc", 0, 0);
	}
	printf("bench-init\n");
	fflush(stdout);
	if (!(is_init && access("/boot-only", F_OK) == 0)) {
		run_all(integer_workloads, argc, argv);
		run_all(vector_workloads, argc, argv);
		if (has_avx_workloads())
			run_all(avx_workloads, argc, argv);
		run_all(system_workloads, argc, argv);
	}
	printf("bench-end\n");
	fflush(stdout);
	if (is_init) {
		sync();
		reboot(RB_POWER_OFF);
	}
	return 0;
}
