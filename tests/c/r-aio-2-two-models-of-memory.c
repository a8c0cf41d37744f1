/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * R-AIO habit 2: (a) the caller's buffer, registered or not; (b) a NULL buffer on a read, and the library lends one,
 * valid until raio_release(). Never more than maxevents are lent out.
 */
#define _GNU_SOURCE
#include "check.h"

#define MAXEVENTS 4

static void callers_memory(int fd)
{
	raio_context_t ctx;
	raio_mr_t mr = NULL;
	struct raio_iocb iocb;
	char *buf;

	MUST(raio_setup(fd, MAXEVENTS, &ctx) == 0);
	MUST((buf = malloc(65536)) != NULL);
	EQ(raio_reg_mr(ctx, buf, 65536, &mr), 0);
	CHECK(mr != NULL);
	/* At its start, in its midst, at its very end, and all of it. */
	raio_prep_pread(&iocb, fd, buf, 1000, 17, mr);
	EQ(run_iocb(ctx, &iocb), 1000);
	CHECK(is_data_bin(buf, 1000, 17));
	raio_prep_pread(&iocb, fd, buf + 3001, 5003, 70001, mr);
	EQ(run_iocb(ctx, &iocb), 5003);
	CHECK(is_data_bin(buf + 3001, 5003, 70001));
	CHECK(is_data_bin(buf, 1000, 17));
	raio_prep_pread(&iocb, fd, buf + 65535, 1, 123456, mr);
	EQ(run_iocb(ctx, &iocb), 1);
	CHECK(is_data_bin(buf + 65535, 1, 123456));
	raio_prep_pread(&iocb, fd, buf, 65536, 512, mr);
	EQ(run_iocb(ctx, &iocb), 65536);
	CHECK(is_data_bin(buf, 65536, 512));
	/* The same memory without naming the registration. */
	memset(buf, 0, 65536);
	EQ(read_at(ctx, fd, buf, 65536, 99), 65536);
	CHECK(is_data_bin(buf, 65536, 99));
	EQ(raio_dereg_mr(ctx, mr), 0);
	/* Memory that was never registered. */
	EQ(read_at(ctx, fd, buf, 4096, 1), 4096);
	CHECK(is_data_bin(buf, 4096, 1));
	EQ(raio_destroy(ctx), 0);
	free(buf);
}

static void lent_memory(int fd)
{
	struct raio_iocb iocbs[MAXEVENTS * 2], *ios[MAXEVENTS * 2];
	struct raio_event events[MAXEVENTS], later[MAXEVENTS];
	struct timespec soon = { 0, 100000000 };
	raio_context_t ctx;
	long i, j, n;

	MUST(raio_setup(fd, MAXEVENTS, &ctx) == 0);
	for (i = 0; i < MAXEVENTS * 2; i++) {
		raio_prep_pread(&iocbs[i], fd, NULL, 8192, i * 8192 + 5, NULL);
		ios[i] = &iocbs[i];
	}
	EQ(raio_submit(ctx, MAXEVENTS, ios), MAXEVENTS);
	n = raio_getevents(ctx, MAXEVENTS, MAXEVENTS, events, NULL);
	MUST(n == MAXEVENTS);
	for (i = 0; i < n; i++) {
		EQ(events[i].res, 8192);
		CHECK(events[i].handle != 0);
		MUST(events[i].obj->u.c.buf != NULL);
		CHECK(is_data_bin(events[i].obj->u.c.buf, 8192, events[i].obj->u.c.offset));
		for (j = 0; j < i; j++)
			CHECK(events[j].obj->u.c.buf != events[i].obj->u.c.buf);
	}
	/* All are lent out: the next reads are taken, and wait. Reads with a buffer of their own do not. */
	EQ(raio_submit(ctx, MAXEVENTS - 1, ios + MAXEVENTS), MAXEVENTS - 1);
	EQ(raio_getevents(ctx, 1, MAXEVENTS, later, &soon), 0);
	{
		char own[100];
		struct raio_iocb iocb, *io = &iocb;

		raio_prep_pread(&iocb, fd, own, sizeof(own), 31, NULL);
		EQ(raio_submit(ctx, 1, &io), 1);
		EQ(raio_getevents(ctx, 1, MAXEVENTS, later, NULL), 1);
		CHECK(later[0].obj == &iocb);
		EQ(later[0].handle, 0);
		CHECK(is_data_bin(own, sizeof(own), 31));
		/* It lent nothing: passed over. */
		EQ(raio_release(ctx, 1, later), 0);
	}
	for (i = 0; i < MAXEVENTS; i++)
		CHECK(is_data_bin(events[i].obj->u.c.buf, 8192, events[i].obj->u.c.offset));
	/* One given back lets one go on; what is still held is untouched. */
	EQ(raio_release(ctx, 1, &events[0]), 0);
	EQ(raio_getevents(ctx, 1, MAXEVENTS, later, NULL), 1);
	EQ(later[0].res, 8192);
	CHECK(is_data_bin(later[0].obj->u.c.buf, 8192, later[0].obj->u.c.offset));
	for (i = 1; i < MAXEVENTS; i++)
		CHECK(is_data_bin(events[i].obj->u.c.buf, 8192, events[i].obj->u.c.offset));
	EQ(raio_release(ctx, MAXEVENTS - 1, events + 1), 0);
	EQ(raio_release(ctx, 1, later), 0);
	n = raio_getevents(ctx, MAXEVENTS - 2, MAXEVENTS, later, NULL);
	EQ(n, MAXEVENTS - 2);
	for (i = 0; i < n; i++)
		CHECK(is_data_bin(later[i].obj->u.c.buf, 8192, later[i].obj->u.c.offset));
	/* Some are still lent out: raio_destroy() takes them back. */
	EQ(raio_destroy(ctx), 0);
}

/* The lending is a ring that goes round for ever. */
static void lent_memory_again_and_again(int fd)
{
	struct raio_iocb iocbs[MAXEVENTS], *io;
	struct raio_event event;
	raio_context_t ctx;
	int i;

	MUST(raio_setup(fd, MAXEVENTS, &ctx) == 0);
	for (i = 0; i < MAXEVENTS; i++) {
		raio_prep_pread(&iocbs[i], fd, NULL, 512, 512 * i, NULL);
		io = &iocbs[i];
		EQ(raio_submit(ctx, 1, &io), 1);
	}
	for (; i < 500; i++) {
		MUST(raio_getevents(ctx, 1, 1, &event, NULL) == 1);
		MUST(event.res == 512);
		CHECK(is_data_bin(event.obj->u.c.buf, 512, event.obj->u.c.offset));
		EQ(raio_release(ctx, 1, &event), 0);
		raio_prep_pread(event.obj, fd, NULL, 512, 512 * i, NULL);
		EQ(raio_submit(ctx, 1, &event.obj), 1);
	}
	/* In flight when the context ends: dropped. */
	EQ(raio_destroy(ctx), 0);
}

/* A lent buffer at the end of the file, and past it. */
static void lent_memory_at_the_end(int fd)
{
	struct raio_iocb iocb, *io = &iocb;
	struct raio_event event;
	raio_context_t ctx;

	MUST(raio_setup(fd, 1, &ctx) == 0);
	raio_prep_pread(&iocb, fd, NULL, 4096, DATA_BIN_BYTES - 100, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 100);
	CHECK(is_data_bin(iocb.u.c.buf, 100, DATA_BIN_BYTES - 100));
	EQ(raio_release(ctx, 1, &event), 0);
	raio_prep_pread(&iocb, fd, NULL, 4096, DATA_BIN_BYTES + 100, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 0);
	EQ(raio_release(ctx, 1, &event), 0);
	/* Nothing leaked: the only buffer there is comes again. */
	raio_prep_pread(&iocb, fd, NULL, 4096, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 4096);
	EQ(raio_release(ctx, 1, &event), 0);
	EQ(raio_destroy(ctx), 0);
}

int main(int argc, char **argv)
{
	int fd;

	begin(argc, argv);
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	callers_memory(fd);
	lent_memory(fd);
	lent_memory_again_and_again(fd);
	lent_memory_at_the_end(fd);
	EQ(raio_stop(fd), 0);
	return finish("r-aio-2-two-models-of-memory");
}
