/* The first program of the guests that are measured under KVM. It says that it was reached, and waits to be
 * ended; with the word "disk" it reads /dev/vda at random and prints "bench-disk READS NANOSECONDS". */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 8, BLOCK = 4096, SECONDS = 4 };

static uint64_t blocks, end;
static int disk;

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void *reader(void *argument)
{
	uint64_t random = (uintptr_t)argument * 0x9e3779b97f4a7c15ull + 1, reads = 0;
	void *buffer;
	if (posix_memalign(&buffer, BLOCK, BLOCK))
		exit(1);
	while (now() < end) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		if (pread(disk, buffer, BLOCK, random % blocks * BLOCK) != BLOCK) {
			printf("bench-disk failed\n");
			exit(1);
		}
		reads++;
	}
	return (void *)reads;
}

static void read_at_random(void)
{
	pthread_t threads[THREADS];
	uint64_t size = 0, start, reads = 0;
	disk = open("/dev/vda", O_RDONLY | O_DIRECT);
	if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) || size < BLOCK) {
		printf("bench-disk failed: no /dev/vda\n");
		return;
	}
	blocks = size / BLOCK;
	start = now();
	end = start + SECONDS * 1000000000ull;
	for (long i = 0; i < THREADS; i++)
		pthread_create(&threads[i], 0, reader, (void *)(i + 1));
	for (int i = 0; i < THREADS; i++) {
		void *result;
		pthread_join(threads[i], &result);
		reads += (uintptr_t)result;
	}
	printf("bench-disk %llu %llu\n", (unsigned long long)reads, (unsigned long long)(now() - start));
}

int main(int argc, char **argv)
{
	printf("bench-init\n");
	fflush(stdout);
	if (argc > 1 && !strcmp(argv[1], "disk"))
		read_at_random();
	fflush(stdout);
	for (;;)
		sleep(1000);
}
