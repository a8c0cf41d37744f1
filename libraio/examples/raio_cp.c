/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * raio_cp: copies a remote file to a local one, or a local file to a remote one, with a deep queue.
 *
 * Each of `depth` blocks goes round on its own: a part of the file is read at one end and written at the other, then
 * the block takes the next part. The remote end is asynchronous, the local end is plain pread(2) and pwrite(2). A
 * block's buffer belongs to the library while its iocb is in flight and to this program otherwise.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <libraio.h>
#include "operand.h"

struct block {
	struct raio_iocb iocb;
	char *buf;
	long long offset;	/* of this part in the file */
	size_t len;		/* of this part */
	size_t done;		/* of len, at the remote end */
};

struct copy {
	raio_context_t ctx;
	raio_mr_t mr;		/* all the blocks' buffers */
	int upload;		/* from local to remote */
	int remote;		/* raio descriptor */
	int local;		/* file descriptor */
	const char *local_name;
	const char *remote_name;
	long long size;		/* of the source when the copy began */
	long long next;		/* what no block has taken yet begins here */
	long flying;		/* iocbs that the library has */
	size_t block_bytes;
};

static void usage(FILE *out)
{
	fprintf(out,
		"usage: raio_cp [-s] [-q depth] [-b bytes] SOURCE DESTINATION\n"
		"\n"
		"One of the two is a file of a raio_server, as raio://HOST[:PORT]/EXPORT/PATH (or raio+tcp://, raio+rdma://),\n"
		"the other a local one. The destination is created, or emptied first. Only the data is copied.\n"
		"\n"
		"  -q depth   blocks in flight at once, 1 to 4096 (default 32)\n"
		"  -b bytes   size of a block, with k or m if you like (default 128k, or what the server allows)\n"
		"  -s         the destination is on stable storage before raio_cp ends (fsync)\n"
		"  -h         this help\n");
}

static int remote_failed(const char *what, const char *name)
{
	fprintf(stderr, "raio_cp: Cannot %s %s: %s\n", what, name, raio_errmsg());
	return -1;
}

static int local_failed(const char *what, const char *name)
{
	fprintf(stderr, "raio_cp: Cannot %s %s: %s.\n", what, name, strerror(errno));
	return -1;
}

static int changed(const char *name)
{
	fprintf(stderr, "raio_cp: %s became shorter while it was being copied. The copy is not complete: try again.\n", name);
	return -1;
}

static int local_read(struct copy *copy, char *buf, size_t len, long long offset)
{
	ssize_t n;

	for (; len; buf += n, len -= (size_t)n, offset += n) {
		n = pread(copy->local, buf, len, offset);
		if (n == 0)
			return changed(copy->local_name);
		if (n < 0 && errno != EINTR)
			return local_failed("read", copy->local_name);
		if (n < 0)
			n = 0;
	}
	return 0;
}

static int local_write(struct copy *copy, const char *buf, size_t len, long long offset)
{
	ssize_t n;

	for (; len; buf += n, len -= (size_t)n, offset += n) {
		n = pwrite(copy->local, buf, len, offset);
		if (n < 0 && errno != EINTR)
			return local_failed("write", copy->local_name);
		if (n < 0)
			n = 0;
	}
	return 0;
}

/* Prepares what is left of the block's part. */
static void block_prep(struct copy *copy, struct block *block)
{
	char *buf = block->buf + block->done;
	size_t len = block->len - block->done;
	long long offset = block->offset + (long long)block->done;

	if (copy->upload)
		raio_prep_pwrite(&block->iocb, copy->remote, buf, len, offset, copy->mr);
	else
		raio_prep_pread(&block->iocb, copy->remote, buf, len, offset, copy->mr);
	block->iocb.data = block;
}

/* Takes the next part of the file. Returns 1 if the block is ready to be submitted, 0 at the end, -1 for an error. */
static int block_next(struct copy *copy, struct block *block)
{
	long long left = copy->size - copy->next;

	if (left == 0)
		return 0;
	block->offset = copy->next;
	block->len = left < (long long)copy->block_bytes ? (size_t)left : copy->block_bytes;
	block->done = 0;
	copy->next += (long long)block->len;
	if (copy->upload && local_read(copy, block->buf, block->len, block->offset))
		return -1;
	block_prep(copy, block);
	return 1;
}

/* Goes on after the block's iocb completed. Returns as block_next(). */
static int block_completed(struct copy *copy, struct block *block, const struct raio_event *event)
{
	long res = (long)event->res;

	if (res < 0)
		return remote_failed(copy->upload ? "write" : "read", copy->remote_name);
	if (res == 0 && copy->upload) {
		fprintf(stderr, "raio_cp: Cannot write %s: the server wrote nothing. Is there space left?\n",
			copy->remote_name);
		return -1;
	}
	if (res == 0)
		return changed(copy->remote_name);
	if (!copy->upload && local_write(copy, block->buf + block->done, (size_t)res,
					 block->offset + (long long)block->done))
		return -1;
	block->done += (size_t)res;
	if (block->done == block->len)
		return block_next(copy, block);
	block_prep(copy, block);
	return 1;
}

static int submit_all(struct copy *copy, struct raio_iocb **batch, long nr)
{
	long n;

	for (; nr; batch += n, nr -= n) {
		n = raio_submit(copy->ctx, nr, batch);
		if (n <= 0)
			return remote_failed(copy->upload ? "write" : "read", copy->remote_name);
		copy->flying += n;
	}
	return 0;
}

static int copy_run(struct copy *copy, struct block *blocks, struct raio_iocb **batch, struct raio_event *events,
		    int depth)
{
	long ready, n, i;
	int more = 1;

	for (ready = 0; ready < depth && more; ready += more) {
		more = block_next(copy, &blocks[ready]);
		if (more < 0)
			return -1;
		if (more)
			batch[ready] = &blocks[ready].iocb;
	}
	for (;;) {
		if (submit_all(copy, batch, ready))
			return -1;
		if (!copy->flying)
			return 0;
		n = raio_getevents(copy->ctx, 1, copy->flying, events, NULL);
		if (n == -EINTR)
			n = 0;
		if (n < 0)
			return remote_failed(copy->upload ? "write" : "read", copy->remote_name);
		copy->flying -= n;
		for (ready = 0, i = 0; i < n; i++) {
			more = block_completed(copy, events[i].data, &events[i]);
			if (more < 0)
				return -1;
			if (more)
				batch[ready++] = events[i].obj;
		}
	}
}

/* After a failure: the buffers are the library's until what is in flight has ended. */
static void drain(struct copy *copy, struct raio_event *events)
{
	long n;

	while (copy->flying) {
		n = raio_getevents(copy->ctx, 1, copy->flying, events, NULL);
		if (n < 0 && n != -EINTR)
			return;
		if (n > 0)
			copy->flying -= n;
	}
}

static int remote_fsync(struct copy *copy)
{
	struct raio_iocb iocb, *batch[] = { &iocb };
	struct raio_event event;

	raio_prep_fsync(&iocb, copy->remote, 0);
	if (raio_submit(copy->ctx, 1, batch) != 1 || raio_getevents(copy->ctx, 1, 1, &event, NULL) != 1 || event.res)
		return remote_failed("sync", copy->remote_name);
	return 0;
}

/* The destination is opened last, when nothing but I/O can fail any more: opening it empties it. */
static int open_remote(struct copy *copy, const char *path)
{
	struct stat64 st;
	int flags = copy->upload ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY;

	/* The first file of a session goes by the session's own descriptor. */
	if (raio_open(copy->remote, path, flags) == -1)
		return remote_failed("open", copy->remote_name);
	if (copy->upload)
		return 0;
	if (raio_fstat(copy->remote, &st))
		return remote_failed("stat", copy->remote_name);
	copy->size = st.st_size;
	return 0;
}

static int open_local(struct copy *copy)
{
	struct stat st;

	if (!copy->upload) {
		copy->local = open(copy->local_name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
		return copy->local < 0 ? local_failed("create", copy->local_name) : 0;
	}
	copy->local = open(copy->local_name, O_RDONLY | O_CLOEXEC);
	if (copy->local < 0 || fstat(copy->local, &st))
		return local_failed("open", copy->local_name);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
		fprintf(stderr, "raio_cp: %s is neither a regular file nor a block device: name one that is.\n",
			copy->local_name);
		return -1;
	}
	copy->size = lseek(copy->local, 0, SEEK_END);
	return copy->size < 0 ? local_failed("find the size of", copy->local_name) : 0;
}

/* The block size asked for, or the default, held against what the server grants. */
static int choose_block_bytes(struct copy *copy, long long asked)
{
	struct raio_stats stats;

	if (raio_get_stats(copy->ctx, &stats, sizeof(stats)))
		return remote_failed("ask for the limits of", copy->remote_name);
	if (asked > 0)
		copy->block_bytes = (size_t)asked;
	else
		copy->block_bytes = stats.io_bytes_max < 128 << 10 ? (size_t)stats.io_bytes_max : 128 << 10;
	return 0;
}

static int copy_file(struct copy *copy, const char *server, const char *path, long long asked, int depth, int sync)
{
	struct raio_event *events = calloc((size_t)depth, sizeof(*events));
	struct raio_iocb **batch = calloc((size_t)depth, sizeof(*batch));
	struct block *blocks = calloc((size_t)depth, sizeof(*blocks));
	char *memory;
	int i, result = -1;

	if (!events || !batch || !blocks) {
		local_failed("copy", copy->remote_name);
		goto out;
	}
	if (copy->upload && open_local(copy))
		goto out;
	copy->remote = raio_connect(server, NULL);
	if (copy->remote == -1) {
		remote_failed("reach", server);
		goto out;
	}
	if (raio_setup(copy->remote, depth, &copy->ctx)) {
		remote_failed("set up I/O on", copy->remote_name);
		goto stop;
	}
	if (choose_block_bytes(copy, asked))
		goto destroy;
	memory = raio_alloc(copy->ctx, (size_t)depth * copy->block_bytes, &copy->mr);
	if (!memory) {
		remote_failed("allocate buffers for", copy->remote_name);
		goto destroy;
	}
	for (i = 0; i < depth; i++)
		blocks[i].buf = memory + (size_t)i * copy->block_bytes;
	if (open_remote(copy, path))
		goto free;
	if (!copy->upload && open_local(copy))
		goto close;
	result = copy_run(copy, blocks, batch, events, depth);
	if (!result && sync)
		result = copy->upload ? remote_fsync(copy) :
			 fsync(copy->local) ? local_failed("sync", copy->local_name) : 0;
	drain(copy, events);
close:
	if (raio_close(copy->remote) && !result)
		result = remote_failed("close", copy->remote_name);
free:
	raio_free(copy->ctx, memory);
destroy:
	raio_destroy(copy->ctx);
stop:
	raio_stop(copy->remote);
out:
	if (copy->local >= 0 && close(copy->local) && !result)
		result = local_failed("close", copy->local_name);
	free(blocks);
	free(batch);
	free(events);
	return result;
}

/* A local directory as destination means: a file in it, of the source's name. Returns the name to use; free it. */
static char *destination_in(const char *local, const char *path)
{
	char *copy = strdup(path), *name = NULL;
	const char *base;
	struct stat st;

	if (copy && stat(local, &st) == 0 && S_ISDIR(st.st_mode)) {
		base = basename(copy);
		name = malloc(strlen(local) + strlen(base) + 2);
		if (name)
			sprintf(name, "%s/%s", local, base);
	} else if (copy) {
		name = strdup(local);
	}
	free(copy);
	return name;
}

int main(int argc, char **argv)
{
	struct copy copy = { .local = -1, .remote = -1 };
	long long bytes = 0, depth = 32;
	char *server, *local;
	const char *path;
	int option, sync = 0, result;

	while ((option = getopt(argc, argv, "q:b:sh")) != -1) {
		switch (option) {
		case 'q':
			depth = operand_size(optarg, 1, 4096);
			if (depth < 0) {
				fprintf(stderr, "raio_cp: -q %s: give a number from 1 to 4096.\n", optarg);
				return 2;
			}
			break;
		case 'b':
			bytes = operand_size(optarg, 512, 1 << 30);
			if (bytes < 0) {
				fprintf(stderr, "raio_cp: -b %s: give a size from 512 to 1024m.\n", optarg);
				return 2;
			}
			break;
		case 's':
			sync = 1;
			break;
		case 'h':
			usage(stdout);
			return 0;
		default:
			usage(stderr);
			return 2;
		}
	}
	if (argc - optind != 2) {
		usage(stderr);
		return 2;
	}
	copy.upload = operand_is_remote(argv[optind + 1]);
	if (copy.upload == operand_is_remote(argv[optind])) {
		fprintf(stderr, "raio_cp: One of the two must be remote (raio://HOST/EXPORT/PATH) and the other local.\n");
		return 2;
	}
	copy.remote_name = argv[optind + (copy.upload ? 1 : 0)];
	server = operand_split(copy.remote_name, &path);
	if (!server) {
		fprintf(stderr, "raio_cp: %s names no file: write raio://HOST[:PORT]/EXPORT/PATH.\n", copy.remote_name);
		return 2;
	}
	local = copy.upload ? strdup(argv[optind]) : destination_in(argv[optind + 1], path);
	if (!local) {
		local_failed("copy", copy.remote_name);
		free(server);
		return 1;
	}
	copy.local_name = local;
	result = copy_file(&copy, server, path, bytes, (int)depth, sync);
	free(local);
	free(server);
	return result ? 1 : 0;
}
