/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * R-AIO habit 3: submit more than fits and resubmit the rest; collect one event at a time; read the last block of a
 * file with the full block size; stop without closing; destroy before close.
 */
#define _GNU_SOURCE
#include "check.h"

#define BLOCK 4096
#define DEPTH 16

/* Reads the whole of data.bin as those programs did: all blocks in one array, submitted until it is empty. */
static void read_file(int fd)
{
	struct raio_iocb *iocbs, **ios;
	struct raio_event event;
	long blocks, next = 0, done = 0, n, full = 0;
	unsigned long long bytes = 0;
	raio_context_t ctx;
	struct stat64 stat;
	char *file, *seen;

	MUST(raio_fstat(fd, &stat) == 0);
	blocks = (long)((stat.st_size + BLOCK - 1) / BLOCK);
	iocbs = calloc((size_t)blocks, sizeof(*iocbs));
	ios = calloc((size_t)blocks, sizeof(*ios));
	seen = calloc((size_t)blocks, 1);
	file = malloc((size_t)blocks * BLOCK);
	MUST(iocbs && ios && seen && file);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	for (n = 0; n < blocks; n++) {
		raio_prep_pread(&iocbs[n], fd, file + n * BLOCK, BLOCK, n * BLOCK, NULL);
		iocbs[n].data = &seen[n];
		ios[n] = &iocbs[n];
	}
	while (done < blocks) {
		if (next < blocks) {
			n = raio_submit(ctx, blocks - next, ios + next);
			if (n == -EAGAIN)
				full++;
			else
				MUST(n > 0 && n <= DEPTH);
			if (n > 0)
				next += n;
			MUST(next - done <= DEPTH);
		}
		MUST(raio_getevents(ctx, 1, 1, &event, NULL) == 1);
		EQ(++*(char *)event.data, 1);
		if (event.obj == &iocbs[blocks - 1])
			EQ(event.res, stat.st_size % BLOCK);
		else
			EQ(event.res, BLOCK);
		bytes += event.res;
		done++;
		/* One place is free: of two, one is taken. Full again is -EAGAIN, not 0, as the loop sees next. */
		if (done == 1) {
			EQ(raio_submit(ctx, 2, ios + next), 1);
			next++;
		}
	}
	EQ(full, 1);
	EQ(bytes, stat.st_size);
	CHECK(is_data_bin(file, (long)stat.st_size, 0));
	EQ(raio_destroy(ctx), 0);
	free(file);
	free(seen);
	free(ios);
	free(iocbs);
}

static void endings(char **argv)
{
	static char buf[DEPTH][BLOCK];
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	raio_context_t ctx;
	char path[128];
	int fd, i;

	/* Destroy with much in flight, then close, then stop. */
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	for (i = 0; i < DEPTH; i++) {
		raio_prep_pread(&iocbs[i], fd, buf[i], BLOCK, i * BLOCK, NULL);
		ios[i] = &iocbs[i];
	}
	EQ(raio_submit(ctx, DEPTH, ios), DEPTH);
	EQ(raio_destroy(ctx), 0);
	/* Drained: the memory is ours again and nothing comes any more. */
	memset(buf, 0x5a, sizeof(buf));
	usleep(20000);
	CHECK(is_all(buf, sizeof(buf), 0x5a));
	EQ(raio_close(fd), 0);
	EQ(raio_stop(fd), 0);

	/* What was written and drained by raio_destroy() has been written. */
	fd = session(argv);
	MUST(raio_open(fd, fresh_path(path, sizeof(path), "drained"), O_RDWR | O_CREAT | O_EXCL) == 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	for (i = 0; i < DEPTH; i++) {
		fill_pattern(buf[i], BLOCK, 9, i * BLOCK);
		raio_prep_pwrite(&iocbs[i], fd, buf[i], BLOCK, i * BLOCK, NULL);
	}
	EQ(raio_submit(ctx, DEPTH, ios), DEPTH);
	EQ(raio_destroy(ctx), 0);
	memset(buf, 0, sizeof(buf));
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	for (i = 0; i < DEPTH; i++)
		EQ(read_at(ctx, fd, buf[i], BLOCK, i * BLOCK), BLOCK);
	CHECK(is_pattern(buf, sizeof(buf), 9, 0));
	EQ(raio_destroy(ctx), 0);

	/* Stop without close, and without destroy: the context is dead and can only be destroyed. */
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	EQ(raio_stop(fd), 0);
	EQ(raio_destroy(ctx), 0);

	/* Stop with everything in flight. */
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	for (i = 0; i < DEPTH; i++)
		raio_prep_pread(&iocbs[i], fd, buf[i], BLOCK, i * BLOCK, NULL);
	EQ(raio_submit(ctx, DEPTH, ios), DEPTH);
	EQ(raio_stop(fd), 0);
	EQ(raio_submit(ctx, DEPTH, ios), -ENOTCONN);
	EQ(raio_destroy(ctx), 0);

	/* Stop, and nothing else, right after the start. */
	EQ(raio_stop(session(argv)), 0);
}

int main(int argc, char **argv)
{
	int fd;

	begin(argc, argv);
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	read_file(fd);
	EQ(raio_stop(fd), 0);
	endings(argv);
	return finish("r-aio-3-batches-and-endings");
}
