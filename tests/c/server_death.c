/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The server is killed with SIGKILL while many iocbs are in flight: each completes exactly once, those that did not
 * make it with an error, and from then on every call says ENOTCONN.
 *
 * Prints "ready" when the queue is deep; whoever runs this kills the server then. With its process id as a further
 * word (server_death HOST PORT PID) the program does so itself.
 */
#define _GNU_SOURCE
#include "check.h"
#include <signal.h>

#define DEPTH 128
#define BYTES 65536
#define PATIENCE_S 60

struct slot {
	struct raio_iocb iocb;
	int submitted;
	int completed;
};

static int is_connection_error(long error)
{
	return error == -ENOTCONN || error == -ECONNRESET || error == -EPIPE || error == -ETIMEDOUT;
}

/* Half reads, half writes: both sockets' directions are busy. */
static void prepare(struct slot *slot, int reads, int writes, char *buf, long i)
{
	if (i % 2)
		raio_prep_pread(&slot->iocb, reads, buf, BYTES, i * BYTES, NULL);
	else
		raio_prep_pwrite(&slot->iocb, writes, buf, BYTES, i * BYTES, NULL);
	slot->iocb.data = slot;
}

int main(int argc, char **argv)
{
	static struct slot slots[DEPTH];
	struct raio_event events[DEPTH], event;
	struct raio_iocb *io;
	struct stat64 st;
	raio_context_t ctx, idle, unused;
	raio_mr_t mr;
	char *memory;
	double end;
	long i, n, succeeded = 0, failed = 0, in_flight = 0;
	int fd, writes, words, refused = 0;

	begin(argc, argv);
	words = server_words(argc, argv);
	fd = session_with(argv, RAIO_OPT_NO_RECONNECT);
	MUST(raio_open(fd, "/null", O_RDWR) == 0);
	writes = raio_open(fd, "/mem", O_RDWR);
	MUST(writes > 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	MUST(raio_setup(fd, DEPTH, &idle) == 0);
	MUST((memory = raio_alloc(ctx, (size_t)DEPTH * BYTES, &mr)) != NULL);
	for (i = 0; i < DEPTH; i++) {
		prepare(&slots[i], fd, writes, memory + i * BYTES, i);
		io = &slots[i].iocb;
		MUST(raio_submit(ctx, 1, &io) == 1);
		slots[i].submitted++;
		in_flight++;
	}
	printf("ready\n");
	fflush(stdout);
	if (argc > words + 1)
		MUST(kill((pid_t)atol(argv[words + 1]), SIGKILL) == 0);

	/* The queue is kept full until a submit is refused; then everything still in flight comes, and no more. */
	end = seconds_now() + PATIENCE_S;
	while (in_flight) {
		MUST(seconds_now() < end);
		n = raio_getevents(ctx, 1, DEPTH, events, NULL);
		if (n == -EINTR)
			continue;
		if (n <= 0)
			EQ(n, -ENOTCONN);
		MUST(n > 0 && n <= in_flight);
		in_flight -= n;
		for (i = 0; i < n; i++) {
			struct slot *slot = events[i].data;

			MUST(slot >= slots && slot < slots + DEPTH);
			CHECK(events[i].obj == &slot->iocb);
			slot->completed++;
			EQ(slot->completed, slot->submitted);
			if (events[i].res == BYTES) {
				succeeded++;
				EQ(events[i].res2, 0);
			} else {
				failed++;
				CHECK(is_connection_error((long)events[i].res));
				EQ(events[i].res2 & RAIO_RES2_CLASS, RAIO_RES2_TRANSPORT);
			}
			if (refused)
				continue;
			prepare(slot, fd, writes, slot->iocb.u.c.buf, slot - slots);
			io = &slot->iocb;
			if (raio_submit(ctx, 1, &io) == 1) {
				slot->submitted++;
				in_flight++;
			} else {
				EQ(raio_submit(ctx, 1, &io), -ENOTCONN);
				refused = 1;
			}
		}
	}
	for (i = 0; i < DEPTH; i++)
		EQ(slots[i].completed, slots[i].submitted);
	CHECK(failed > 0);
	CHECK(raio_errmsg()[0] != '\0');

	/* This context is dead. */
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), -ENOTCONN);
	EQ(raio_getevents(ctx, 0, 1, &event, NULL), -ENOTCONN);
	io = &slots[0].iocb;
	EQ(raio_submit(ctx, 1, &io), -ENOTCONN);
	FAILS_EITHER(raio_cancel(ctx, io, &event), ENOTCONN, EINVAL);

	/* The one that had nothing in flight notices by itself, or when it is used. */
	prepare(&slots[0], fd, writes, memory, 1);
	n = raio_submit(idle, 1, &io);
	if (n == 1) {
		n = raio_getevents(idle, 1, 1, &event, NULL);
		EQ(n, 1);
		CHECK(n == 1 && is_connection_error((long)event.res));
		n = raio_submit(idle, 1, &io);
	}
	EQ(n, -ENOTCONN);

	/* So is the session. */
	errno = 0;
	EQ(raio_fstat(writes, &st), -1);
	CHECK(is_connection_error(-errno));
	errno = 0;
	EQ(raio_open(fd, "/mem", O_RDWR), -1);
	CHECK(is_connection_error(-errno));
	FAILS(raio_fstat(writes, &st), ENOTCONN);
	FAILS(raio_open(fd, "/mem", O_RDWR), ENOTCONN);
	unused = (raio_context_t)&st;
	EQ(raio_setup(fd, 4, &unused), -1);
	CHECK(unused == NULL);
	errno = 0;
	EQ(raio_close(writes), -1);
	CHECK(is_connection_error(-errno));
	/* Closed all the same. */
	FAILS(raio_close(writes), EBADF);

	/* What is the program's can be given back. */
	EQ(raio_free(ctx, memory), 0);
	EQ(raio_destroy(idle), 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	printf("server_death: %ld succeeded before, %ld failed\n", succeeded, failed);
	return finish("server_death");
}
