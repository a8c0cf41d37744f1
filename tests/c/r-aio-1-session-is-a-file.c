/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * R-AIO habit 1: the session's descriptor is also a file's.
 *
 * Two programs of that time, one after the other: one looks at raio_open() for -1 only, the other tests `if (ret)`.
 * Both go on with the descriptor of raio_start(). Then what the documentation always promised: more files, each with
 * a descriptor of its own.
 */
#define _GNU_SOURCE
#include "check.h"

/* Looks for -1 only. */
static void program_compares_with_minus_one(const char *path, const struct sockaddr *addr, socklen_t addrlen)
{
	static char buf[8192];
	raio_context_t ctx = NULL;
	struct raio_iocb iocb, *ios = &iocb;
	struct raio_event event;
	struct stat64 stat;
	int fd;

	fd = raio_start("tcp", addr, addrlen);
	MUST(fd != -1);
	if (raio_open(fd, path, O_RDONLY | O_LARGEFILE) == -1)
		MUST(!"raio_open");
	EQ(raio_fstat(fd, &stat), 0);
	EQ(stat.st_size, DATA_BIN_BYTES);
	CHECK(S_ISREG(stat.st_mode));
	EQ(raio_setup(fd, 8, &ctx), 0);
	raio_prep_pread(&iocb, fd, buf, sizeof(buf), 4096, NULL);
	iocb.data = buf;
	EQ(raio_submit(ctx, 1, &ios), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(buf));
	EQ(event.res2, 0);
	CHECK(event.data == buf && event.obj == &iocb);
	CHECK(is_data_bin(buf, sizeof(buf), 4096));
	EQ(raio_release(ctx, 1, &event), 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_close(fd), 0);
	EQ(raio_stop(fd), 0);
}

/* Takes anything but 0 for a failure. */
static void program_tests_if_ret(const char *path, const struct sockaddr *addr, socklen_t addrlen)
{
	static char buf[4096], back[4096];
	raio_context_t ctx;
	struct raio_iocb iocb, *ios = &iocb;
	struct raio_event event;
	int fd, ret;

	fd = raio_start("tcp", addr, addrlen);
	MUST(fd >= 0);
	ret = raio_open(fd, path, O_RDWR | O_CREAT | O_TRUNC);
	if (ret)
		MUST(!"raio_open");
	ret = raio_setup(fd, 4, &ctx);
	if (ret)
		MUST(!"raio_setup");
	fill_pattern(buf, sizeof(buf), 1, 0);
	raio_prep_pwrite(&iocb, fd, buf, sizeof(buf), 0, NULL);
	EQ(raio_submit(ctx, 1, &ios), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(buf));
	raio_prep_pread(&iocb, fd, back, sizeof(back), 0, NULL);
	EQ(raio_submit(ctx, 1, &ios), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(back));
	EQ(memcmp(buf, back, sizeof(buf)), 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_close(fd), 0);
	EQ(raio_stop(fd), 0);
}

/* A failed open does not count: the first that succeeds is the session's. */
static void further_files(const struct sockaddr *addr, socklen_t addrlen)
{
	raio_context_t ctx;
	struct stat64 stat;
	char path[128], byte;
	int fd, more[16], i, j;

	fd = raio_start("tcp", addr, addrlen);
	MUST(fd > 0);
	FAILS(raio_open(fd, "/ro/nothing-here", O_RDONLY), ENOENT);
	FAILS(raio_fstat(fd, &stat), EBADF);
	EQ(raio_open(fd, "/ro/data.bin", O_RDONLY), 0);
	for (i = 0; i < 16; i++) {
		more[i] = raio_open(fd, fresh_path(path, sizeof(path), "further"), O_RDWR | O_CREAT | O_EXCL);
		CHECK(more[i] > 0 && more[i] != fd);
		for (j = 0; j < i; j++)
			CHECK(more[j] != more[i]);
		/* It is no session's. */
		FAILS(raio_stop(more[i]), EBADF);
		FAILS(raio_open(more[i], "/ro/data.bin", O_RDONLY), EBADF);
	}
	MUST(raio_setup(fd, 4, &ctx) == 0);
	for (i = 0; i < 16; i++) {
		byte = (char)('a' + i);
		EQ(write_at(ctx, more[i], &byte, 1, i), 1);
	}
	for (i = 0; i < 16; i++) {
		EQ(raio_fstat(more[i], &stat), 0);
		EQ(stat.st_size, i + 1);
		EQ(read_at(ctx, more[i], &byte, 1, i), 1);
		EQ(byte, 'a' + i);
	}
	/* The first file is the session's still, and ends without the others. */
	EQ(raio_fstat(fd, &stat), 0);
	EQ(stat.st_size, DATA_BIN_BYTES);
	EQ(raio_close(fd), 0);
	FAILS(raio_fstat(fd, &stat), EBADF);
	FAILS(raio_close(fd), EBADF);
	EQ(read_at(ctx, fd, &byte, 1, 0), -EBADF);
	EQ(read_at(ctx, more[3], &byte, 1, 3), 1);
	EQ(byte, 'a' + 3);
	/* The session's own descriptor stood for its first file alone. */
	i = raio_open(fd, "/ro/data.bin", O_RDONLY);
	CHECK(i > 0 && i != fd);
	EQ(raio_fstat(i, &stat), 0);
	EQ(stat.st_size, DATA_BIN_BYTES);
	EQ(raio_close(more[3]), 0);
	FAILS(raio_close(more[3]), EBADF);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	FAILS(raio_fstat(more[0], &stat), EBADF);
}

int main(int argc, char **argv)
{
	struct sockaddr_storage address;
	socklen_t len;
	char path[128];

	begin(argc, argv);
	len = server_address(argv, &address);
	program_compares_with_minus_one("/ro/data.bin", (struct sockaddr *)&address, len);
	program_tests_if_ret(fresh_path(path, sizeof(path), "if-ret"), (struct sockaddr *)&address, len);
	further_files((struct sockaddr *)&address, len);
	return finish("r-aio-1-session-is-a-file");
}
