/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * raio_epoll: reads a remote file inside an epoll loop of the program's own and says how far it is.
 *
 * A model for foreign event loops: the context is one descriptor among others, here a timer and the signals. When
 * it becomes readable, collect until there is nothing more and submit what comes next; never wait inside raio.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#include <libraio.h>
#include "operand.h"

#define DEPTH 16
#define BLOCK_BYTES (64 << 10)

struct reader {
	raio_context_t ctx;
	int file;		/* raio descriptor */
	const char *name;
	char *buffers;		/* DEPTH blocks */
	raio_mr_t mr;
	struct raio_iocb iocbs[DEPTH];
	long long size;
	long long next;		/* offset of the next read */
	long long bytes;	/* read so far */
	int in_flight;
};

static int failed(const char *what, const char *name)
{
	fprintf(stderr, "raio_epoll: Cannot %s %s: %s\n", what, name, raio_errmsg());
	return -1;
}

static int submit(struct reader *reader, struct raio_iocb *iocb)
{
	if (raio_submit(reader->ctx, 1, &iocb) != 1)
		return failed("read", reader->name);
	reader->in_flight++;
	return 0;
}

/* Reads the next block into the place of this iocb, unless the file is at its end. */
static int read_next(struct reader *reader, struct raio_iocb *iocb)
{
	long long left = reader->size - reader->next, bytes = left < BLOCK_BYTES ? left : BLOCK_BYTES;
	long slot = iocb - reader->iocbs;

	if (left <= 0)
		return 0;
	raio_prep_pread(iocb, reader->file, reader->buffers + slot * BLOCK_BYTES, (size_t)bytes, reader->next,
			reader->mr);
	reader->next += bytes;
	return submit(reader, iocb);
}

/* `res` bytes of a block have been read: submits a read of the rest of it after a short read, else of the next block. */
static int read_on(struct reader *reader, struct raio_iocb *iocb, long res)
{
	struct raio_iocb_common *c = &iocb->u.c;

	reader->bytes += res;
	/* 0 is the end of a file that has become shorter. */
	if (res == 0 || (unsigned long long)res == c->nbytes)
		return read_next(reader, iocb);
	raio_prep_pread(iocb, reader->file, (char *)c->buf + res, c->nbytes - (size_t)res, c->offset + res, reader->mr);
	return submit(reader, iocb);
}

/* The context's descriptor is readable: collect without waiting until less than asked for comes. */
static int on_raio(struct reader *reader)
{
	struct raio_event events[DEPTH];
	long n, i;

	do {
		n = raio_getevents(reader->ctx, 0, DEPTH, events, NULL);
		if (n < 0 && n != -EINTR)
			return failed("read", reader->name);
		for (i = 0; i < n; i++) {
			reader->in_flight--;
			if ((long)events[i].res < 0)
				return failed("read", reader->name);
			/* Here a program would use the data: events[i].obj->u.c.buf, events[i].res bytes. */
			if (read_on(reader, events[i].obj, (long)events[i].res))
				return -1;
		}
	} while (n == DEPTH);
	return 0;
}

static void progress(const struct reader *reader)
{
	fprintf(stderr, "%lld of %lld bytes, %d reads in flight\n", reader->bytes, reader->size, reader->in_flight);
}

static int watch(int epoll_fd, int fd)
{
	struct epoll_event interest = { .events = EPOLLIN };

	interest.data.fd = fd;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &interest) == 0)
		return 0;
	fprintf(stderr, "raio_epoll: Cannot watch a descriptor: %s.\n", strerror(errno));
	return -1;
}

/* The program's own loop. Returns 0 when the file is read, 1 when a signal stopped it, -1 for an error. */
static int loop(struct reader *reader, int epoll_fd, int raio_fd, int timer_fd, int signal_fd)
{
	struct epoll_event ready[8];
	unsigned long long ticks;
	int n, i;

	for (i = 0; i < DEPTH; i++)
		if (read_next(reader, &reader->iocbs[i]))
			return -1;
	while (reader->in_flight) {
		n = epoll_wait(epoll_fd, ready, 8, -1);
		if (n < 0 && errno != EINTR) {
			fprintf(stderr, "raio_epoll: Cannot wait: %s.\n", strerror(errno));
			return -1;
		}
		for (i = 0; i < n; i++) {
			if (ready[i].data.fd == raio_fd && on_raio(reader))
				return -1;
			if (ready[i].data.fd == timer_fd && read(timer_fd, &ticks, sizeof(ticks)) > 0)
				progress(reader);
			if (ready[i].data.fd == signal_fd)
				return 1;
		}
	}
	return 0;
}

static int read_file(struct reader *reader)
{
	struct itimerspec interval = { { 0, 200000000 }, { 0, 200000000 } };
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	int timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	int signal_fd, raio_fd, result = -1;
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	raio_fd = raio_poll_fd(reader->ctx);
	if (raio_fd == -1)
		failed("watch", reader->name);
	else if (epoll_fd < 0 || timer_fd < 0 || signal_fd < 0 || timerfd_settime(timer_fd, 0, &interval, NULL))
		fprintf(stderr, "raio_epoll: Cannot set up the loop: %s.\n", strerror(errno));
	else if (!watch(epoll_fd, raio_fd) && !watch(epoll_fd, timer_fd) && !watch(epoll_fd, signal_fd))
		result = loop(reader, epoll_fd, raio_fd, timer_fd, signal_fd);
	/* raio_fd is the context's: raio_destroy() closes it. */
	if (signal_fd >= 0)
		close(signal_fd);
	if (timer_fd >= 0)
		close(timer_fd);
	if (epoll_fd >= 0)
		close(epoll_fd);
	progress(reader);
	return result;
}

int main(int argc, char **argv)
{
	static struct reader reader;
	int session, option, usage = 0, result = -1;
	struct stat64 st;
	const char *path;
	char *server;

	while ((option = getopt(argc, argv, "h")) != -1)
		usage = option == 'h' ? 1 : 2;
	if (usage || argc - optind != 1 || !operand_is_remote(argv[optind])) {
		fprintf(usage == 1 ? stdout : stderr,
			"usage: raio_epoll raio://HOST[:PORT]/EXPORT/PATH\n"
			"\n"
			"Reads a file of a raio_server in an epoll loop and reports on standard error five times a second.\n"
			"Ends with 0 when all is read, 1 for an error, 3 when SIGINT or SIGTERM stopped it.\n");
		return usage == 1 ? 0 : 2;
	}
	reader.name = argv[optind];
	server = operand_split(reader.name, &path);
	if (!server) {
		fprintf(stderr, "raio_epoll: %s names no file: write raio://HOST[:PORT]/EXPORT/PATH.\n", reader.name);
		return 2;
	}
	session = raio_connect(server, NULL);
	free(server);
	if (session == -1) {
		failed("reach the server of", reader.name);
		return 1;
	}
	/* The first file of a session goes by the session's own descriptor. */
	reader.file = session;
	if (raio_open(session, path, O_RDONLY) == -1 || raio_fstat(session, &st)) {
		failed("open", reader.name);
	} else if (raio_setup(session, DEPTH, &reader.ctx)) {
		failed("set up I/O on", reader.name);
	} else {
		reader.size = st.st_size;
		reader.buffers = raio_alloc(reader.ctx, DEPTH * BLOCK_BYTES, &reader.mr);
		result = reader.buffers ? read_file(&reader) : failed("allocate buffers for", reader.name);
		/* Waits for what is in flight; the memory lives on until it is freed. */
		raio_destroy(reader.ctx);
		if (reader.buffers)
			raio_free(reader.ctx, reader.buffers);
	}
	raio_stop(session);
	return result < 0 ? 1 : result ? 3 : 0;
}
