/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * requests URL PATH read|write DEPTH BATCHES: reads or writes 4 KiB DEPTH at a time, for tests/instructions/run to count.
 *
 * How many system calls, turns of the server's loop and looks at a socket a request takes would depend on who is faster. So
 * here nobody is ever early: the program sleeps before it collects, until the server has answered all, and again before
 * it submits, until the server has nothing left to do.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <libraio.h>

enum { BLOCK_BYTES = 4096, DEPTH_MAX = 128, BLOCKS = 1024, PAUSE_NS = 2000000 };

static int failed(const char *what)
{
	fprintf(stderr, "requests: cannot %s: %s\n", what, raio_errmsg());
	return 1;
}

int main(int argc, char **argv)
{
	static char buffers[DEPTH_MAX][BLOCK_BYTES];
	static const struct timespec pause = { .tv_nsec = PAUSE_NS };
	struct raio_options options = { .size = sizeof(options), .flags = RAIO_OPT_NO_SPIN };
	struct raio_iocb iocbs[DEPTH_MAX], *batch[DEPTH_MAX];
	struct raio_event events[DEPTH_MAX];
	raio_context_t ctx;
	long depth, batches, i, k, block = 0;
	int fd, is_write;

	if (argc != 6 || (depth = atol(argv[4])) < 1 || depth > DEPTH_MAX || (batches = atol(argv[5])) < 1)
		return fprintf(stderr, "usage: requests URL PATH read|write DEPTH(1-%d) BATCHES\n", DEPTH_MAX), 2;
	is_write = !strcmp(argv[3], "write");
	fd = raio_connect(argv[1], &options);
	if (fd == -1 || raio_open(fd, argv[2], is_write ? O_RDWR : O_RDONLY) == -1 || raio_setup(fd, (int)depth, &ctx) == -1)
		return failed("begin");

	for (i = 0; i < batches; i++) {
		for (k = 0; k < depth; k++) {
			long long offset = (long long)(block++ % BLOCKS) * BLOCK_BYTES;

			batch[k] = &iocbs[k];
			if (is_write)
				raio_prep_pwrite(batch[k], fd, buffers[k], BLOCK_BYTES, offset, NULL);
			else
				raio_prep_pread(batch[k], fd, buffers[k], BLOCK_BYTES, offset, NULL);
		}
		if (raio_submit(ctx, depth, batch) != depth)
			return failed("submit");
		nanosleep(&pause, NULL);
		if (raio_getevents(ctx, depth, depth, events, NULL) != depth)
			return failed("collect");
		for (k = 0; k < depth; k++)
			if (events[k].res != BLOCK_BYTES)
				return failed("read or write a whole block");
		nanosleep(&pause, NULL);
	}
	raio_destroy(ctx);
	raio_stop(fd);
	return 0;
}
