/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * raio_cat: writes remote files to standard output, from buffers that the library lends.
 *
 * A read with a NULL buffer gets one of the library's when it completes. Reads complete in any order and standard
 * output wants them in theirs, so an event waits in its place in `ring` until all before it are written; only then
 * is its buffer given back. Never more than `depth` parts are asked for or held, which is what the context lends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <libraio.h>
#include "operand.h"

struct part {
	struct raio_iocb iocb;
	struct raio_event event;
	int completed;		/* the event is here, not written yet */
};

static void usage(FILE *out)
{
	fprintf(out,
		"usage: raio_cat [-q depth] [-b bytes] raio://HOST[:PORT]/EXPORT/PATH ...\n"
		"\n"
		"Writes files of a raio_server to standard output.\n"
		"\n"
		"  -q depth   reads in flight at once, 1 to 4096 (default 16)\n"
		"  -b bytes   size of a read, with k or m if you like (default 128k, or what the server allows)\n"
		"  -h         this help\n");
}

static int failed(const char *what, const char *name)
{
	fprintf(stderr, "raio_cat: Cannot %s %s: %s\n", what, name, raio_errmsg());
	return -1;
}

static int write_all(const char *buf, size_t len)
{
	ssize_t n;

	for (; len; buf += n, len -= (size_t)n) {
		n = write(STDOUT_FILENO, buf, len);
		if (n < 0 && errno != EINTR) {
			fprintf(stderr, "raio_cat: Cannot write to standard output: %s.\n", strerror(errno));
			return -1;
		}
		if (n < 0)
			n = 0;
	}
	return 0;
}

static int part_read(raio_context_t ctx, int fd, struct part *part, size_t len, long long offset, const char *name)
{
	struct raio_iocb *iocb = &part->iocb;

	raio_prep_pread(iocb, fd, NULL, len, offset, NULL);
	iocb->data = part;
	return raio_submit(ctx, 1, &iocb) == 1 ? 0 : failed("read", name);
}

/* Writes what was read of the part that is next, and gives its buffer back. Returns how many bytes, or -1. */
static long part_write(raio_context_t ctx, struct part *part, const char *name)
{
	long res = (long)part->event.res;
	long result = -1;

	part->completed = 0;
	if (res < 0)
		failed("read", name);
	else if (write_all(part->iocb.u.c.buf, (size_t)res) == 0)
		result = res;
	if (raio_release(ctx, 1, &part->event))
		result = failed("release a buffer of", name);
	return result;
}

/* Parts `head` up to `tail` are in flight or wait in the ring: part k in ring[k % depth]. */
static int cat_parts(raio_context_t ctx, int fd, const char *name, long long size, size_t bytes, struct part *ring,
		     struct raio_event *events, long depth)
{
	long long head = 0, tail = 0, offset = 0;
	long in_flight = 0, n, i;
	struct part *part;
	size_t left;

	for (;;) {
		for (; tail < head + depth && offset < size; tail++, offset += (long long)left) {
			left = size - offset < (long long)bytes ? (size_t)(size - offset) : bytes;
			if (part_read(ctx, fd, &ring[tail % depth], left, offset, name))
				return -1;
			in_flight++;
		}
		if (head == tail)
			return 0;
		if (in_flight) {
			n = raio_getevents(ctx, ring[head % depth].completed ? 0 : 1, depth, events, NULL);
			if (n < 0 && n != -EINTR)
				return failed("read", name);
			for (i = 0; i < n; i++) {
				part = events[i].data;
				part->event = events[i];
				part->completed = 1;
				in_flight--;
			}
		}
		while (head < tail && ring[head % depth].completed) {
			part = &ring[head % depth];
			n = part_write(ctx, part, name);
			/* 0 is the end of a file that has become shorter. What is still in flight or lent out ends with raio_destroy(). */
			if (n <= 0)
				return (int)n;
			left = part->iocb.u.c.nbytes - (size_t)n;
			if (left == 0) {
				head++;
				continue;
			}
			/* A short read alone is not the end: the rest may have failed, and says so when it is read. */
			if (part_read(ctx, fd, part, left, part->iocb.u.c.offset + n, name))
				return -1;
			in_flight++;
		}
	}
}

static int cat(const char *operand, long depth, long long bytes)
{
	struct part *ring = calloc((size_t)depth, sizeof(*ring));
	struct raio_event *events = calloc((size_t)depth, sizeof(*events));
	struct raio_stats stats;
	raio_context_t ctx = NULL;
	struct stat64 st;
	const char *path;
	char *server;
	int fd, result = -1;

	server = operand_split(operand, &path);
	if (!server || !ring || !events) {
		fprintf(stderr, "raio_cat: %s names no file: write raio://HOST[:PORT]/EXPORT/PATH.\n", operand);
		goto out;
	}
	fd = raio_connect(server, NULL);
	if (fd == -1) {
		failed("reach", server);
		goto out;
	}
	if (raio_open(fd, path, O_RDONLY) == -1) {
		failed("open", operand);
	} else if (raio_fstat(fd, &st)) {
		failed("stat", operand);
	} else if (raio_setup(fd, (int)depth, &ctx)) {
		failed("set up I/O on", operand);
	} else {
		if (raio_get_stats(ctx, &stats, sizeof(stats)))
			result = failed("ask for the limits of", server);
		else
			result = cat_parts(ctx, fd, operand, st.st_size,
					   bytes > 0 ? (size_t)bytes :
					   stats.io_bytes_max < 128 << 10 ? (size_t)stats.io_bytes_max : 128 << 10,
					   ring, events, depth);
		raio_destroy(ctx);
	}
	raio_stop(fd);
out:
	free(server);
	free(events);
	free(ring);
	return result;
}

int main(int argc, char **argv)
{
	long long depth = 16, bytes = 0;
	int option, result = 0;

	while ((option = getopt(argc, argv, "q:b:h")) != -1) {
		switch (option) {
		case 'q':
			depth = operand_size(optarg, 1, 4096);
			if (depth < 0) {
				fprintf(stderr, "raio_cat: -q %s: give a number from 1 to 4096.\n", optarg);
				return 2;
			}
			break;
		case 'b':
			bytes = operand_size(optarg, 1, 1 << 30);
			if (bytes < 0) {
				fprintf(stderr, "raio_cat: -b %s: give a size from 1 to 1024m.\n", optarg);
				return 2;
			}
			break;
		case 'h':
			usage(stdout);
			return 0;
		default:
			usage(stderr);
			return 2;
		}
	}
	if (optind == argc) {
		usage(stderr);
		return 2;
	}
	for (; optind < argc; optind++) {
		if (!operand_is_remote(argv[optind])) {
			fprintf(stderr, "raio_cat: %s is not remote: write raio://HOST[:PORT]/EXPORT/PATH.\n", argv[optind]);
			result = 2;
		} else if (cat(argv[optind], (long)depth, bytes)) {
			result = 1;
		}
	}
	return result;
}
