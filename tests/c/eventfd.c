/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* raio_set_eventfd(): one tick for each iocb that asked, at its completion, never before. */
#define _GNU_SOURCE
#include "check.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

#define DEPTH 32
#define BYTES 2048

static char buf[DEPTH][BYTES];

static long ticks(int fd)
{
	unsigned long long value = 0;

	if (read(fd, &value, sizeof(value)) < 0)
		return errno == EAGAIN ? 0 : -1;
	return (long)value;
}

static void counts_are_exact(raio_context_t ctx, int file, int all, int odd)
{
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct raio_event events[DEPTH];
	long i, n;

	for (i = 0; i < DEPTH; i++) {
		raio_prep_pread(&iocbs[i], file, buf[i], BYTES, i * BYTES, NULL);
		if (i % 4 != 3)
			raio_set_eventfd(&iocbs[i], i % 2 ? odd : all);
		ios[i] = &iocbs[i];
	}
	EQ(raio_submit(ctx, DEPTH, ios), DEPTH);
	n = raio_getevents(ctx, DEPTH, DEPTH, events, NULL);
	MUST(n == DEPTH);
	EQ(ticks(all), DEPTH / 2);
	EQ(ticks(odd), DEPTH / 4);
	for (i = 0; i < DEPTH; i++)
		CHECK(is_data_bin(buf[i], BYTES, i * BYTES));
	/* Those that do not ask do not tick, and an old flag does not linger in an iocb prepared anew. */
	raio_prep_pread(&iocbs[0], file, buf[0], BYTES, 0, NULL);
	EQ(run_iocb(ctx, &iocbs[0]), BYTES);
	EQ(ticks(all), 0);
	/* At the end of the file as well. */
	raio_prep_pread(&iocbs[0], file, buf[0], BYTES, DATA_BIN_BYTES, NULL);
	raio_set_eventfd(&iocbs[0], all);
	EQ(run_iocb(ctx, &iocbs[0]), 0);
	EQ(ticks(all), 1);
	raio_prep_fsync(&iocbs[0], file, 0);
	raio_set_eventfd(&iocbs[0], all);
	n = run_iocb(ctx, &iocbs[0]);
	EQ(n, 0);
	EQ(ticks(all), 1);
}

/* A read that waits for a lent buffer has been submitted and has not completed. */
static void no_tick_before_completion(int session_fd, int file, int eventfd_fd)
{
	struct timespec soon = { 0, 50000000 };
	struct raio_iocb first, second, *io = &first;
	struct raio_event event, other;
	raio_context_t ctx;

	MUST(raio_setup(session_fd, 1, &ctx) == 0);
	raio_prep_pread(&first, file, NULL, 512, 0, NULL);
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	raio_prep_pread(&second, file, NULL, 512, 512, NULL);
	raio_set_eventfd(&second, eventfd_fd);
	io = &second;
	EQ(raio_submit(ctx, 1, &io), 1);
	EQ(ticks(eventfd_fd), 0);
	EQ(raio_getevents(ctx, 1, 1, &other, &soon), 0);
	EQ(ticks(eventfd_fd), 0);
	EQ(raio_release(ctx, 1, &event), 0);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(ticks(eventfd_fd), 1);
	CHECK(is_data_bin(second.u.c.buf, 512, 512));
	EQ(raio_release(ctx, 1, &event), 0);
	EQ(raio_destroy(ctx), 0);
}

/* An event loop that has both descriptors sees as many ticks as completions, and never more than completed. */
static void in_an_event_loop(raio_context_t ctx, int file, int eventfd_fd)
{
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct epoll_event interest, ready[4];
	struct raio_event events[8];
	long submitted = 0, collected = 0, ticked = 0, total = 4 * DEPTH, i, n;
	int loop = epoll_create1(EPOLL_CLOEXEC);

	MUST(loop >= 0);
	memset(&interest, 0, sizeof(interest));
	interest.events = EPOLLIN;
	interest.data.fd = eventfd_fd;
	MUST(epoll_ctl(loop, EPOLL_CTL_ADD, eventfd_fd, &interest) == 0);
	interest.data.fd = raio_poll_fd(ctx);
	MUST(interest.data.fd >= 0);
	MUST(epoll_ctl(loop, EPOLL_CTL_ADD, interest.data.fd, &interest) == 0);
	for (i = 0; i < DEPTH; i++) {
		raio_prep_pread(&iocbs[i], file, buf[i], BYTES, i * BYTES, NULL);
		raio_set_eventfd(&iocbs[i], eventfd_fd);
		ios[i] = &iocbs[i];
	}
	MUST(raio_submit(ctx, DEPTH, ios) == DEPTH);
	submitted = DEPTH;
	while (collected < total || ticked < total) {
		MUST(epoll_wait(loop, ready, 4, 10000) > 0);
		ticked += ticks(eventfd_fd);
		CHECK(ticked <= submitted);
		do {
			n = raio_getevents(ctx, 0, 8, events, NULL);
			MUST(n >= 0);
			for (i = 0; i < n; i++) {
				EQ(events[i].res, BYTES);
				collected++;
				if (submitted == total)
					continue;
				raio_prep_pread(events[i].obj, file, events[i].obj->u.c.buf, BYTES, submitted * 64, NULL);
				raio_set_eventfd(events[i].obj, eventfd_fd);
				MUST(raio_submit(ctx, 1, &events[i].obj) == 1);
				submitted++;
			}
		} while (n == 8);
		ticked += ticks(eventfd_fd);
		CHECK(collected <= ticked);
	}
	EQ(collected, total);
	EQ(ticked, total);
	EQ(epoll_wait(loop, ready, 4, 50), 0);
	EQ(ticks(eventfd_fd), 0);
	close(loop);
}

int main(int argc, char **argv)
{
	int fd, all = eventfd(0, EFD_NONBLOCK), odd = eventfd(0, EFD_NONBLOCK);
	raio_context_t ctx;

	begin(argc, argv);
	MUST(all >= 0 && odd >= 0);
	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	counts_are_exact(ctx, fd, all, odd);
	no_tick_before_completion(fd, fd, all);
	in_an_event_loop(ctx, fd, all);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	close(all);
	close(odd);
	return finish("eventfd");
}
