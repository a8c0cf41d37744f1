/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the interface has beyond R-AIO's: vectored I/O, fsync, discard, write-zeroes, allocate; and what any program meets: the
 * end of a file, many files, several threads, fork, a foreign event loop, the library's memory, statistics.
 */
#define _GNU_SOURCE
#include "check.h"
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define DEPTH 32

static int make_file(int session_fd, const char *word, int flags)
{
	char path[128];
	int file = raio_open(session_fd, fresh_path(path, sizeof(path), word), O_RDWR | O_CREAT | O_EXCL | flags);

	MUST(file > 0);
	return file;
}

static long long size_of(int file)
{
	struct stat64 st;

	MUST(raio_fstat(file, &st) == 0);
	return st.st_size;
}

static void vectors(raio_context_t ctx, int session_fd)
{
	static char data[10000], back[10000], lines[1024][8];
	int file = make_file(session_fd, "vectors", 0), i;
	struct iovec iov[1024];
	struct raio_iocb iocb, *io = &iocb;
	struct raio_event event;
	raio_mr_t mr;

	fill_pattern(data, sizeof(data), 5, 0);
	/* Uneven pieces, an empty one among them, in another order than memory's. */
	iov[0] = (struct iovec){ data, 1 };
	iov[1] = (struct iovec){ data + 1, 4999 };
	iov[2] = (struct iovec){ NULL, 0 };
	iov[3] = (struct iovec){ data + 5000, 5000 };
	raio_prep_pwritev(&iocb, file, iov, 4, 100, NULL);
	EQ(run_iocb(ctx, &iocb), 10000);
	EQ(size_of(file), 10100);
	iov[0] = (struct iovec){ back + 9000, 1000 };
	iov[1] = (struct iovec){ back, 8999 };
	iov[2] = (struct iovec){ back + 8999, 1 };
	raio_prep_preadv(&iocb, file, iov, 3, 100, NULL);
	EQ(run_iocb(ctx, &iocb), 10000);
	CHECK(is_pattern(back + 9000, 1000, 5, 0));
	CHECK(is_pattern(back, 9000, 5, 1000));
	/* The hole before it. */
	EQ(read_at(ctx, file, back, 100, 0), 100);
	CHECK(is_all(back, 100, 0));

	/* As many as there may be; the iovecs may go once submitted. */
	for (i = 0; i < 1024; i++)
		iov[i] = (struct iovec){ lines[i], 8 };
	fill_pattern(lines, sizeof(lines), 6, 0);
	raio_prep_pwritev(&iocb, file, iov, 1024, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	memset(iov, 0xff, sizeof(iov));
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(lines));
	memset(lines, 0, sizeof(lines));
	for (i = 0; i < 1024; i++)
		iov[i] = (struct iovec){ lines[1023 - i], 8 };
	raio_prep_preadv(&iocb, file, iov, 1024, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	memset(iov, 0xff, sizeof(iov));
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(lines));
	for (i = 0; i < 1024; i++)
		CHECK(is_pattern(lines[1023 - i], 8, 6, 8 * i));

	/* Short at the end of the file: the pieces fill from the front, what lies behind is left alone. */
	memset(back, 0x77, sizeof(back));
	iov[0] = (struct iovec){ back, 60 };
	iov[1] = (struct iovec){ back + 100, 60 };
	raio_prep_preadv(&iocb, file, iov, 2, size_of(file) - 80, NULL);
	EQ(run_iocb(ctx, &iocb), 80);
	CHECK(is_pattern(back, 60, 5, 10000 - 80));
	CHECK(is_pattern(back + 100, 20, 5, 10000 - 20));
	CHECK(is_all(back + 60, 40, 0x77));
	CHECK(is_all(back + 120, 40, 0x77));

	/* Within a registration. */
	MUST(raio_reg_mr(ctx, back, sizeof(back), &mr) == 0);
	iov[0] = (struct iovec){ back + 5000, 5000 };
	iov[1] = (struct iovec){ back, 3000 };
	raio_prep_preadv(&iocb, file, iov, 2, 0, mr);
	EQ(run_iocb(ctx, &iocb), 8000);
	CHECK(is_pattern(back + 5000, 5000, 6, 0));
	CHECK(is_pattern(back, 3000, 6, 5000));
	EQ(raio_dereg_mr(ctx, mr), 0);
	EQ(raio_close(file), 0);
}

static void end_of_file(raio_context_t ctx, int session_fd)
{
	static char buf[8192];
	int file = raio_open(session_fd, "/ro/data.bin", O_RDONLY), empty = raio_open(session_fd, "/ro/empty", O_RDONLY);
	struct raio_iocb iocb;

	MUST(file > 0 && empty > 0);
	EQ(read_at(ctx, file, buf, sizeof(buf), DATA_BIN_BYTES - 1), 1);
	CHECK(is_data_bin(buf, 1, DATA_BIN_BYTES - 1));
	memset(buf, 0x33, sizeof(buf));
	EQ(read_at(ctx, file, buf, sizeof(buf), DATA_BIN_BYTES), 0);
	EQ(read_at(ctx, file, buf, sizeof(buf), DATA_BIN_BYTES + (1LL << 40)), 0);
	EQ(read_at(ctx, empty, buf, sizeof(buf), 0), 0);
	EQ(read_at(ctx, file, buf, 0, 0), 0);
	EQ(read_at(ctx, file, buf, 0, DATA_BIN_BYTES), 0);
	CHECK(is_all(buf, sizeof(buf), 0x33));
	EQ(read_at(ctx, file, buf, sizeof(buf), DATA_BIN_BYTES - sizeof(buf)), sizeof(buf));
	CHECK(is_data_bin(buf, sizeof(buf), DATA_BIN_BYTES - sizeof(buf)));
	/* The largest offset there is: the range would wrap. The server may say so, or find nothing there. */
	raio_prep_pread(&iocb, file, buf, 1, INT64_MAX, NULL);
	CHECK(run_iocb(ctx, &iocb) <= 0);
	EQ(raio_close(file), 0);
	EQ(raio_close(empty), 0);
}

static void every_size(raio_context_t ctx, int session_fd)
{
	static const long sizes[] = { 1, 7, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 262145, 1 << 20 };
	int file = make_file(session_fd, "sizes", 0);
	long long offset = 0;
	raio_mr_t mr;
	char *memory;
	size_t i;

	MUST((memory = raio_alloc(ctx, 1 << 20, &mr)) != NULL);
	EQ((uintptr_t)memory % 4096, 0);
	CHECK(is_all(memory, 1 << 20, 0));
	for (i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct raio_iocb iocb;

		fill_pattern(memory, sizes[i], 7, offset);
		raio_prep_pwrite(&iocb, file, memory, (size_t)sizes[i], offset, mr);
		EQ(run_iocb(ctx, &iocb), sizes[i]);
		memset(memory, 0, (size_t)sizes[i]);
		raio_prep_pread(&iocb, file, memory, (size_t)sizes[i], offset, mr);
		EQ(run_iocb(ctx, &iocb), sizes[i]);
		CHECK(is_pattern(memory, sizes[i], 7, offset));
		offset += sizes[i];
	}
	EQ(size_of(file), offset);
	EQ(raio_free(ctx, memory), 0);
	EQ(raio_close(file), 0);
}

/* Longer than a request may be: one event, whatever it takes. */
static void long_iocbs(raio_context_t ctx, int session_fd)
{
	static const long bytes = (5 << 20) + 4321;
	int file = make_file(session_fd, "long", 0), i;
	struct raio_iocb iocb, *io = &iocb;
	struct raio_event event;
	struct iovec iov[3];
	raio_mr_t mr;
	char *memory, *back;
	long n;

	MUST((memory = raio_alloc(ctx, bytes, &mr)) != NULL);
	MUST((back = malloc(bytes)) != NULL);
	fill_pattern(memory, bytes, 11, 0);
	raio_prep_pwrite(&iocb, file, memory, bytes, 7, mr);
	EQ(run_iocb(ctx, &iocb), bytes);
	EQ(size_of(file), bytes + 7);
	memset(back, 0, bytes);
	iov[0] = (struct iovec){ back, 1 };
	iov[1] = (struct iovec){ back + 1, 3 << 20 };
	iov[2] = (struct iovec){ back + 1 + (3 << 20), bytes - 1 - (3 << 20) };
	raio_prep_preadv(&iocb, file, iov, 3, 7, NULL);
	EQ(run_iocb(ctx, &iocb), bytes);
	CHECK(is_pattern(back, bytes, 11, 0));
	raio_prep_pwritev(&iocb, file, iov, 3, 0, NULL);
	EQ(run_iocb(ctx, &iocb), bytes);
	memset(memory, 0, bytes);
	raio_prep_pread(&iocb, file, memory, bytes, 100, mr);
	EQ(run_iocb(ctx, &iocb), bytes - 93);
	CHECK(is_pattern(memory, bytes - 100, 11, 100));
	/* Lent memory. */
	raio_prep_pread(&iocb, file, NULL, bytes, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, bytes);
	CHECK(is_pattern(iocb.u.c.buf, bytes, 11, 0));
	EQ(raio_release(ctx, 1, &event), 0);
	/* Memory that ends too early, for the check of a write. */
	back = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(back != MAP_FAILED && mprotect(back + (4 << 20), 4096, PROT_NONE) == 0);
	raio_prep_pwrite(&iocb, file, back, bytes, 0, NULL);
	EQ(run_iocb(ctx, &iocb), -EFAULT);
	EQ(munmap(back, bytes), 0);
	/* Cancelled: at once, or after what was done. */
	for (i = 0; i < 8; i++) {
		raio_prep_pread(&iocb, file, memory, bytes, 0, mr);
		EQ(raio_submit(ctx, 1, &io), 1);
		if (i % 2 && raio_getevents(ctx, 0, 1, &event, NULL) == 1)
			continue;
		if (raio_cancel(ctx, &iocb, &event) == 0) {
			EQ(event.res, (unsigned long)-ECANCELED);
			continue;
		}
		EQ(errno, EAGAIN);
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
		n = (long)event.res;
		CHECK(n > 0 && n <= bytes && is_pattern(memory, n, 11, 0));
	}
	free(iov[0].iov_base);
	EQ(raio_free(ctx, memory), 0);
	EQ(raio_close(file), 0);
}

static void syncs(raio_context_t ctx, int session_fd)
{
	int file = make_file(session_fd, "syncs", 0), sync_file = make_file(session_fd, "osync", O_SYNC);
	struct raio_iocb iocb;
	char buf[100];

	fill_pattern(buf, sizeof(buf), 8, 0);
	EQ(write_at(ctx, file, buf, sizeof(buf), 0), sizeof(buf));
	raio_prep_fsync(&iocb, file, 0);
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_fsync(&iocb, file, 1);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(write_at(ctx, sync_file, buf, sizeof(buf), 0), sizeof(buf));
	EQ(raio_close(sync_file), 0);
	EQ(raio_close(file), 0);
}

static void allocation(raio_context_t ctx, int session_fd)
{
	int file = make_file(session_fd, "allocated", 0);
	char data[100], back[4096];
	struct raio_iocb iocb;

	memset(data, 7, sizeof(data));
	EQ(write_at(ctx, file, data, sizeof(data), 0), sizeof(data));
	raio_prep_allocate(&iocb, file, 0, 1 << 20, 1);
	if (run_iocb(ctx, &iocb) == -EOPNOTSUPP) {
		printf("io: allocate not checked: the server's file system cannot\n");
		EQ(raio_close(file), 0);
		return;
	}
	EQ(size_of(file), sizeof(data));
	raio_prep_allocate(&iocb, file, 50, 4096 - 50, 0);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(size_of(file), 4096);
	EQ(read_at(ctx, file, back, sizeof(back), 0), sizeof(back));
	CHECK(is_all(back, sizeof(data), 7));
	CHECK(is_all(back + sizeof(data), sizeof(back) - sizeof(data), 0));
	EQ(raio_close(file), 0);
}

static void discard_and_zeroes(raio_context_t ctx, int session_fd)
{
	int file = make_file(session_fd, "zeroes", 0);
	static char data[65536], back[65536];
	struct raio_iocb iocb;
	long n;

	fill_pattern(data, sizeof(data), 9, 0);
	EQ(write_at(ctx, file, data, sizeof(data), 0), sizeof(data));
	raio_prep_write_zeroes(&iocb, file, 4096 + 3, 8192 + 5);
	EQ(run_iocb(ctx, &iocb), 0);
	EQ(read_at(ctx, file, back, sizeof(back), 0), sizeof(back));
	CHECK(is_pattern(back, 4099, 9, 0));
	CHECK(is_all(back + 4099, 8197, 0));
	CHECK(is_pattern(back + 4099 + 8197, sizeof(back) - 4099 - 8197, 9, 4099 + 8197));
	raio_prep_discard(&iocb, file, 32768, 16384);
	n = run_iocb(ctx, &iocb);
	if (n == -EOPNOTSUPP) {
		printf("io: discard not checked: the server's file system cannot\n");
	} else {
		EQ(n, 0);
		EQ(read_at(ctx, file, back, sizeof(back), 0), sizeof(back));
		CHECK(is_all(back + 32768, 16384, 0));
		CHECK(is_pattern(back + 49152, 16384, 9, 49152));
		CHECK(is_pattern(back + 16384, 16384, 9, 16384));
	}
	EQ(size_of(file), sizeof(data));
	EQ(raio_close(file), 0);
}

/* fsync, discard and write-zeroes count no bytes; reads and writes do. */
static void statistics(int session_fd, int file)
{
	struct raio_stats before, after;
	struct raio_iocb iocb, *io = &iocb;
	struct raio_event event;
	raio_context_t ctx;
	char buf[1000];
	int scratch = make_file(session_fd, "stats", 0), i;

	MUST(raio_setup(session_fd, 8, &ctx) == 0);
	MUST(raio_get_stats(ctx, &before, sizeof(before)) == 0);
	EQ(before.size, sizeof(before));
	EQ(before.submitted, 0);
	EQ(before.completed, 0);
	EQ(before.failed, 0);
	EQ(before.bytes_read, 0);
	EQ(before.bytes_written, 0);
	EQ(before.in_flight, 0);
	EQ(before.reconnects, 0);
	CHECK(before.queue_depth > 0);
	CHECK(before.io_bytes_max >= 4096);
	for (i = 0; i < 5; i++)
		EQ(read_at(ctx, file, buf, sizeof(buf), i * 1000), 1000);
	EQ(read_at(ctx, file, buf, sizeof(buf), DATA_BIN_BYTES - 10), 10);
	EQ(write_at(ctx, scratch, buf, 300, 0), 300);
	raio_prep_fsync(&iocb, scratch, 0);
	EQ(run_iocb(ctx, &iocb), 0);
	raio_prep_pread(&iocb, file, buf, 1, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	MUST(raio_get_stats(ctx, &after, sizeof(after)) == 0);
	EQ(after.submitted, 9);
	EQ(after.in_flight, 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	MUST(raio_get_stats(ctx, &after, sizeof(after)) == 0);
	EQ(after.submitted, 9);
	EQ(after.completed, 9);
	EQ(after.failed, 0);
	EQ(after.in_flight, 0);
	EQ(after.bytes_read, 5011);
	EQ(after.bytes_written, 300);
	CHECK(after.sends > 0 && after.receives > 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_close(scratch), 0);
}

static void many_files(raio_context_t ctx, int session_fd)
{
	enum { FILES = 64 };
	struct raio_iocb iocbs[FILES], *ios[FILES];
	struct raio_event events[FILES];
	char bufs[FILES][600];
	int files[FILES];
	long i, n, done;

	for (i = 0; i < FILES; i++) {
		files[i] = make_file(session_fd, "many", 0);
		fill_pattern(bufs[i], sizeof(bufs[i]), (unsigned int)i, 0);
		raio_prep_pwrite(&iocbs[i], files[i], bufs[i], sizeof(bufs[i]), i, NULL);
		ios[i] = &iocbs[i];
	}
	for (i = done = 0; done < FILES; done += n) {
		if (i < FILES) {
			n = raio_submit(ctx, FILES - i, ios + i);
			MUST(n > 0);
			i += n;
		}
		n = raio_getevents(ctx, 1, FILES, events, NULL);
		MUST(n > 0);
		for (long k = 0; k < n; k++)
			EQ(events[k].res, sizeof(bufs[0]));
	}
	/* Every other closed, the rest still theirs. */
	for (i = 0; i < FILES; i += 2)
		EQ(raio_close(files[i]), 0);
	for (i = 1; i < FILES; i += 2) {
		EQ(size_of(files[i]), i + 600);
		memset(bufs[i], 0, sizeof(bufs[i]));
		EQ(read_at(ctx, files[i], bufs[i], sizeof(bufs[i]), i), sizeof(bufs[i]));
		CHECK(is_pattern(bufs[i], sizeof(bufs[i]), (unsigned int)i, 0));
		EQ(raio_close(files[i]), 0);
	}
}

/* I/O in flight on a file that is closed runs to its end. */
static void close_with_io_in_flight(raio_context_t ctx, int session_fd)
{
	static char bufs[DEPTH][4096];
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct raio_event events[DEPTH];
	int file = raio_open(session_fd, "/ro/data.bin", O_RDONLY), i;

	MUST(file > 0);
	for (i = 0; i < DEPTH; i++) {
		raio_prep_pread(&iocbs[i], file, bufs[i], 4096, i * 4096, NULL);
		ios[i] = &iocbs[i];
	}
	MUST(raio_submit(ctx, DEPTH, ios) == DEPTH);
	EQ(raio_close(file), 0);
	EQ(raio_getevents(ctx, DEPTH, DEPTH, events, NULL), DEPTH);
	for (i = 0; i < DEPTH; i++)
		EQ(events[i].res, 4096);
	CHECK(is_data_bin(bufs, sizeof(bufs), 0));
	EQ(raio_submit(ctx, 1, ios), -EBADF);
}

/* The descriptor is readable when there is something to collect, and quiet when all is collected. */
static void poll_descriptor(int session_fd, int file)
{
	struct raio_iocb iocbs[8], *ios[8];
	struct raio_event events[8];
	struct pollfd ready;
	raio_context_t ctx;
	char bufs[8][512];
	long i, n, done = 0;

	MUST(raio_setup(session_fd, 8, &ctx) == 0);
	ready.fd = raio_poll_fd(ctx);
	ready.events = POLLIN;
	MUST(ready.fd >= 0);
	EQ(raio_poll_fd(ctx), ready.fd);
	CHECK(fcntl(ready.fd, F_GETFD) != -1);
	for (i = 0; i < 8; i++) {
		raio_prep_pread(&iocbs[i], file, bufs[i], 512, i * 512, NULL);
		ios[i] = &iocbs[i];
	}
	MUST(raio_submit(ctx, 8, ios) == 8);
	while (done < 8) {
		MUST(poll(&ready, 1, 10000) == 1);
		do {
			n = raio_getevents(ctx, 0, 3, events, NULL);
			MUST(n >= 0);
			done += n;
		} while (n == 3);
	}
	EQ(done, 8);
	CHECK(is_data_bin(bufs, sizeof(bufs), 0));
	EQ(raio_getevents(ctx, 0, 8, events, NULL), 0);
	EQ(poll(&ready, 1, 50), 0);
	/* Events that the library has but the program left: readable still. */
	MUST(raio_submit(ctx, 8, ios) == 8);
	EQ(raio_getevents(ctx, 8, 8, events, NULL), 8);
	MUST(raio_submit(ctx, 8, ios) == 8);
	for (done = 0; done < 8; done++) {
		EQ(poll(&ready, 1, 10000), 1);
		while ((n = raio_getevents(ctx, 0, 1, events, NULL)) == 0)
			MUST(poll(&ready, 1, 10000) == 1);
		EQ(n, 1);
	}
	EQ(raio_destroy(ctx), 0);
	/* It was the context's. */
	EQ(fcntl(ready.fd, F_GETFD), -1);
}

/* One session, a context for each thread; the threads share a file and open more of their own meanwhile. */
enum { THREADS = 4, ROUNDS = 60, REGION = 1 << 20 };

struct worker {
	pthread_t thread;
	int session_fd;
	int shared;
	unsigned int number;
};

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct raio_event events[DEPTH];
	long long base = (long long)worker->number * REGION;
	raio_context_t ctx;
	struct stat64 st;
	raio_mr_t mr;
	char *memory, byte = 'x';
	int own, round, i;

	MUST(raio_setup(worker->session_fd, DEPTH, &ctx) == 0);
	MUST((memory = raio_alloc(ctx, DEPTH * 4096, &mr)) != NULL);
	for (round = 0; round < ROUNDS; round++) {
		int writing = round % 2 == 0;
		long long offset = base + round / 2 * 4096;

		if (writing)
			fill_pattern(memory, DEPTH * 4096, worker->number + 100 * (unsigned int)round, offset);
		else
			memset(memory, 0, DEPTH * 4096);
		for (i = 0; i < DEPTH; i++) {
			raio_prep_(&iocbs[i], writing ? RAIO_CMD_PWRITE : RAIO_CMD_PREAD, worker->shared,
				   memory + i * 4096, 4096, offset + i * 4096, mr);
			ios[i] = &iocbs[i];
		}
		MUST(raio_submit(ctx, DEPTH, ios) == DEPTH);
		if (round % 10 == 3) {
			/* The control path, while this thread's I/O and everybody else's goes on. */
			own = make_file(worker->session_fd, "thread", 0);
			EQ(raio_fstat(own, &st), 0);
			EQ(raio_close(own), 0);
		}
		MUST(raio_getevents(ctx, DEPTH, DEPTH, events, NULL) == DEPTH);
		for (i = 0; i < DEPTH; i++)
			EQ(events[i].res, 4096);
		if (!writing)
			CHECK(is_pattern(memory, DEPTH * 4096, worker->number + 100 * (unsigned int)(round - 1), offset));
	}
	own = make_file(worker->session_fd, "thread", 0);
	EQ(write_at(ctx, own, &byte, 1, 0), 1);
	EQ(raio_close(own), 0);
	EQ(raio_free(ctx, memory), 0);
	EQ(raio_destroy(ctx), 0);
	return NULL;
}

static void threads(int session_fd)
{
	struct worker workers[THREADS];
	int shared = make_file(session_fd, "shared", 0), i;

	for (i = 0; i < THREADS; i++) {
		workers[i].session_fd = session_fd;
		workers[i].shared = shared;
		workers[i].number = (unsigned int)i;
		MUST(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
	}
	for (i = 0; i < THREADS; i++)
		pthread_join(workers[i].thread, NULL);
	EQ(raio_close(shared), 0);
}

/* A context goes from thread to thread, one at a time. */
static void *read_elsewhere(void *argument)
{
	raio_context_t *ctx = argument;
	struct raio_event event;

	EQ(raio_getevents(*ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 100);
	return NULL;
}

static void handed_over(int session_fd, int file)
{
	struct raio_iocb iocb, *io = &iocb;
	raio_context_t ctx;
	pthread_t thread;
	char buf[100];

	MUST(raio_setup(session_fd, 1, &ctx) == 0);
	raio_prep_pread(&iocb, file, buf, sizeof(buf), 7, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	MUST(pthread_create(&thread, NULL, read_elsewhere, &ctx) == 0);
	pthread_join(thread, NULL);
	CHECK(is_data_bin(buf, sizeof(buf), 7));
	EQ(raio_destroy(ctx), 0);
}

/* Children that leave the parent's session alone, while its I/O is in flight; one opens a session of its own. */
static void forks(char **argv, raio_context_t ctx, int file)
{
	static char bufs[DEPTH][4096];
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct raio_event events[DEPTH];
	int i, round, status;
	unsigned char resident;
	raio_mr_t mr;
	char *memory;
	pid_t child;

	MUST((memory = raio_alloc(ctx, 8192, &mr)) != NULL);
	for (round = 0; round < 3; round++) {
		memset(bufs, 0, sizeof(bufs));
		for (i = 0; i < DEPTH; i++) {
			raio_prep_pread(&iocbs[i], file, bufs[i], 4096, (i + round) * 4096, NULL);
			ios[i] = &iocbs[i];
		}
		MUST(raio_submit(ctx, DEPTH, ios) == DEPTH);
		fflush(stdout);
		child = fork();
		MUST(child >= 0);
		if (child == 0) {
			if (round == 0)
				_exit(0);
			if (round == 1) {
				/* The library's memory is the parent's alone. */
				_exit(mincore(memory, 8192, (void *)&resident) == -1 && errno == ENOMEM ? 0 : 1);
			} else {
				char buf[500];
				raio_context_t own;
				int fd = session(argv);

				if (raio_open(fd, "/ro/data.bin", O_RDONLY) || raio_setup(fd, 1, &own) ||
				    read_at(own, fd, buf, sizeof(buf), 4321) != sizeof(buf) ||
				    !is_data_bin(buf, sizeof(buf), 4321))
					_exit(1);
				raio_destroy(own);
				raio_stop(fd);
				_exit(0);
			}
		}
		MUST(waitpid(child, &status, 0) == child);
		EQ(status, 0);
		MUST(raio_getevents(ctx, DEPTH, DEPTH, events, NULL) == DEPTH);
		for (i = 0; i < DEPTH; i++)
			EQ(events[i].res, 4096);
		CHECK(is_data_bin(bufs, sizeof(bufs), round * 4096));
	}
	EQ(raio_free(ctx, memory), 0);
}

/* With exec as well: the library's descriptors do not leak into other programs. */
static void descriptors_close_on_exec(raio_context_t ctx)
{
	char number[32];
	int fd = raio_poll_fd(ctx);

	MUST(fd >= 0);
	snprintf(number, sizeof(number), "descriptor %d", fd);
	if (!(fcntl(fd, F_GETFD) & FD_CLOEXEC))
		printf("%s:\n", number);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
}

static void memory_exports(raio_context_t ctx, int session_fd)
{
	static char data[100000], back[100000];
	int mem = raio_open(session_fd, "/mem", O_RDWR), null = raio_open(session_fd, "/null", O_RDWR);

	MUST(mem > 0);
	MUST(null > 0);
	EQ(size_of(mem), 64LL << 20);
	EQ(size_of(null), 1LL << 30);
	fill_pattern(data, sizeof(data), 11, 0);
	EQ(write_at(ctx, mem, data, sizeof(data), (64LL << 20) - (long long)sizeof(data)), sizeof(data));
	EQ(read_at(ctx, mem, back, sizeof(back), (64LL << 20) - (long long)sizeof(back)), sizeof(back));
	CHECK(is_pattern(back, sizeof(back), 11, 0));
	EQ(read_at(ctx, mem, back, 100, (64LL << 20) - 10), 10);
	EQ(read_at(ctx, mem, back, 100, 64LL << 20), 0);
	EQ(write_at(ctx, null, data, sizeof(data), 0), sizeof(data));
	EQ(read_at(ctx, null, back, sizeof(back), 0), sizeof(back));
	EQ(read_at(ctx, null, back, sizeof(back), (1LL << 30) - 5), 5);
	EQ(raio_close(mem), 0);
	EQ(raio_close(null), 0);
}

/* Options change how it is done, not what is read. */
static void options(char **argv)
{
	struct raio_options options;
	char url[320], buf[9000];
	struct raio_stats stats;
	raio_context_t ctx;
	int fd, i;

	server_url(argv, "raio", url, sizeof(url));
	for (i = 0; i < 4; i++) {
		memset(&options, 0, sizeof(options));
		options.size = sizeof(options);
		options.queue_depth = i == 1 ? 1 : 0;
		options.flags = i == 2 ? RAIO_OPT_CRC : i == 3 ? RAIO_OPT_NO_SPIN : 0;
		options.spin_us = i == 1 ? 200 : 0;
		fd = raio_connect(url, &options);
		if (fd == -1 && i == 2 && errno == EPROTONOSUPPORT) {
			printf("io: RAIO_OPT_CRC not checked: the server cannot\n");
			continue;
		}
		MUST(fd > 0);
		/* Over RDMA, or why not. */
		CHECK(!raio_errmsg()[0] || !strncmp(raio_errmsg(), "Connected over TCP, not RDMA: ", 30));
		MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
		MUST(raio_setup(fd, 8, &ctx) == 0);
		MUST(raio_get_stats(ctx, &stats, sizeof(stats)) == 0);
		if (i == 1)
			EQ(stats.queue_depth, 1);
		struct raio_iocb iocbs[8], *ios[8];
		struct raio_event events[8];
		for (int k = 0; k < 8; k++) {
			raio_prep_pread(&iocbs[k], fd, buf + k * 1000, 1000, k * 1000, NULL);
			ios[k] = &iocbs[k];
		}
		EQ(raio_submit(ctx, 8, ios), 8);
		EQ(raio_getevents(ctx, 8, 8, events, NULL), 8);
		CHECK(is_data_bin(buf, 8000, 0));
		EQ(raio_destroy(ctx), 0);
		EQ(raio_stop(fd), 0);
	}
}

/* Modes of files made here, emptied ones, and O_DIRECT at odd offsets. */
static void open_flags(raio_context_t ctx, int session_fd)
{
	char path[128], buf[5000], back[5000];
	struct stat64 st;
	int file, direct;

	file = raio_open_mode(session_fd, fresh_path(path, sizeof(path), "flags"), O_RDWR | O_CREAT | O_EXCL, 0600);
	MUST(file > 0);
	EQ(raio_fstat(file, &st), 0);
	EQ(st.st_mode & 07777, 0600);
	fill_pattern(buf, sizeof(buf), 12, 0);
	EQ(write_at(ctx, file, buf, sizeof(buf), 0), sizeof(buf));
	EQ(size_of(file), sizeof(buf));
	direct = raio_open(session_fd, path, O_RDONLY | O_DIRECT);
	if (direct == -1 && errno == EINVAL) {
		printf("io: O_DIRECT not checked: the server's file system cannot\n");
	} else {
		long n;

		MUST(direct > 0);
		n = read_at(ctx, direct, back, 4096, 0);
		EQ(n, 4096);
		CHECK(is_pattern(back, 4096, 12, 0));
		n = read_at(ctx, direct, back, 1001, 777);
		if (n != -EINVAL) {
			EQ(n, 1001);
			CHECK(is_pattern(back, 1001, 12, 777));
		}
		EQ(raio_close(direct), 0);
	}
	EQ(raio_close(file), 0);
	file = raio_open(session_fd, path, O_WRONLY | O_TRUNC);
	MUST(file > 0);
	EQ(size_of(file), 0);
	EQ(read_at(ctx, file, back, 10, 0), -EBADF);
	EQ(raio_close(file), 0);
}

/* Iocbs with checksums of their own: in a session that has none, and in one that has them for all. */
static void checksums(char **argv)
{
	static const unsigned int flags[] = { RAIO_OPT_NO_CRC, RAIO_OPT_CRC };
	static char data[5000], back[6000];
	const long bytes = (3 << 20) + 77;
	struct raio_iocb iocb, *io = &iocb;
	struct raio_event event;
	struct raio_stats stats;
	raio_context_t ctx;
	char *memory;
	unsigned int crc;
	int fd, file, i;

	EQ(raio_crc32c(0, "123456789", 9), 0xe3069283u);
	EQ(raio_crc32c(raio_crc32c(0, "1234", 4), "56789", 5), 0xe3069283u);
	EQ(raio_crc32c(7, NULL, 0), 7);
	fill_pattern(data, sizeof(data), 21, 0);
	MUST((memory = malloc(bytes)) != NULL);
	fill_pattern(memory, bytes, 22, 0);
	for (i = 0; i < 2; i++) {
		fd = session_with(argv, flags[i]);
		ctx = NULL;
		MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
		MUST(raio_setup(fd, 4, &ctx) == 0);
		file = make_file(fd, "checksums", 0);
		crc = raio_crc32c(0, data, sizeof(data));
		/* Not that of the data: nothing is written, and the session goes on. */
		raio_prep_pwrite(&iocb, file, data, sizeof(data), 0, NULL);
		raio_set_crc(&iocb, crc + 1);
		EQ(raio_submit(ctx, 1, &io), 1);
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
		EQ(event.res, (unsigned long)-EILSEQ);
		EQ(event.res2 & RAIO_RES2_CLASS, RAIO_RES2_TRANSPORT);
		EQ(event.res2 & RAIO_RES2_UNKNOWN, 0);
		CHECK(strstr(raio_event_errmsg(ctx, &event), "checksum") != NULL);
		EQ(size_of(file), 0);
		raio_set_crc(&iocb, crc);
		EQ(run_iocb(ctx, &iocb), sizeof(data));
		EQ(iocb.crc, crc);
		/* A read has that of what there was. */
		raio_prep_pread(&iocb, file, back, sizeof(back), 0, NULL);
		raio_set_crc(&iocb, 0);
		EQ(run_iocb(ctx, &iocb), sizeof(data));
		EQ(iocb.crc, crc);
		CHECK(is_pattern(back, sizeof(data), 21, 0));
		raio_prep_pread(&iocb, file, NULL, 100, 4950, NULL);
		raio_set_crc(&iocb, 0);
		EQ(raio_submit(ctx, 1, &io), 1);
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
		EQ(event.res, 50);
		EQ(iocb.crc, raio_crc32c(0, data + 4950, 50));
		EQ(raio_release(ctx, 1, &event), 0);
		raio_prep_fsync(&iocb, file, 0);
		raio_set_crc(&iocb, 5);
		EQ(run_iocb(ctx, &iocb), 0);
		EQ(iocb.crc, 5);
		/* Longer than a request: that of the whole is put together of its parts'. */
		crc = raio_crc32c(0, memory, bytes);
		raio_prep_pwrite(&iocb, file, memory, bytes, 10000, NULL);
		raio_set_crc(&iocb, crc ^ 1);
		EQ(run_iocb(ctx, &iocb), -EILSEQ);
		EQ(size_of(file), sizeof(data));
		raio_set_crc(&iocb, crc);
		EQ(run_iocb(ctx, &iocb), bytes);
		memset(memory, 0, bytes);
		raio_prep_pread(&iocb, file, memory, bytes, 10000, NULL);
		raio_set_crc(&iocb, 0);
		EQ(run_iocb(ctx, &iocb), bytes);
		EQ(iocb.crc, crc);
		CHECK(is_pattern(memory, bytes, 22, 0));
		EQ(raio_get_stats(ctx, &stats, sizeof(stats)), 0);
		EQ(stats.checksum_errors, stats.io_bytes_max < sizeof(data) ? 2 : 4);
		EQ(stats.reconnects, 0);
		EQ(stats.crc, i);
		EQ(raio_destroy(ctx), 0);
		EQ(raio_stop(fd), 0);
	}
	free(memory);
}

/*
 * Buffers that the program changes while they are written: what the server gets is not what the checksum was computed
 * of, also when it is sent again. These writes fail, and nothing else. There are more than a connection holds, so that
 * the data of most has not left when they are changed.
 */
static void changed_while_written(char **argv)
{
	enum { WRITES = 32, BYTES = 1 << 20 };
	struct raio_iocb iocbs[WRITES], *ios[WRITES];
	struct raio_event events[WRITES];
	struct raio_stats stats;
	raio_context_t ctx = NULL;
	raio_mr_t mr;
	unsigned char *memory;
	int fd = session_with(argv, RAIO_OPT_CRC), file, k, done = 0, damaged = 0;
	long n;

	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	file = make_file(fd, "changing", 0);
	MUST(raio_setup(fd, WRITES, &ctx) == 0);
	MUST((memory = raio_alloc(ctx, WRITES * BYTES, &mr)) != NULL);
	EQ(raio_get_stats(ctx, &stats, sizeof(stats)), 0);
	if (stats.io_bytes_max < BYTES || stats.queue_depth < WRITES) {
		printf("io: buffers that change are not checked: the server takes too little at a time\n");
		goto end;
	}
	for (k = 0; k < WRITES; k++) {
		ios[k] = &iocbs[k];
		raio_prep_pwrite(ios[k], file, memory + k * BYTES, BYTES, (long long)k * BYTES, mr);
	}
	EQ(raio_submit(ctx, WRITES, ios), WRITES);
	while (done < WRITES) {
		for (k = 0; k < WRITES; k++)
			memory[(k + 1) * BYTES - 1]++;
		n = raio_getevents(ctx, 0, WRITES, events, NULL);
		MUST(n >= 0);
		done += n;
		for (k = 0; k < n; k++) {
			damaged += events[k].res == (unsigned long)-EILSEQ;
			CHECK(events[k].res == (unsigned long)-EILSEQ || events[k].res == BYTES);
		}
	}
	CHECK(damaged > 0);
	EQ(write_at(ctx, file, memory, BYTES, 0), BYTES);
	EQ(raio_get_stats(ctx, &stats, sizeof(stats)), 0);
	CHECK(stats.checksum_errors >= 3 * (unsigned long long)damaged);
	EQ(stats.reconnects, 0);
end:
	EQ(raio_free(ctx, memory), 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
}

int main(int argc, char **argv)
{
	raio_context_t ctx;
	int fd;

	begin(argc, argv);
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	vectors(ctx, fd);
	end_of_file(ctx, fd);
	every_size(ctx, fd);
	long_iocbs(ctx, fd);
	syncs(ctx, fd);
	discard_and_zeroes(ctx, fd);
	allocation(ctx, fd);
	statistics(fd, fd);
	many_files(ctx, fd);
	close_with_io_in_flight(ctx, fd);
	poll_descriptor(fd, fd);
	threads(fd);
	handed_over(fd, fd);
	forks(argv, ctx, fd);
	descriptors_close_on_exec(ctx);
	memory_exports(ctx, fd);
	options(argv);
	checksums(argv);
	changed_while_written(argv);
	open_flags(ctx, fd);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	return finish("io");
}
