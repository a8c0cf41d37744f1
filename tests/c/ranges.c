/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Copies and checksums within the server, and locks: as calls, and the same as iocbs.
 */
#define _GNU_SOURCE
#include <sys/file.h>
#include "check.h"

#define BIG (20 << 20)

static char top[64];

static int file(int fd, const char *name)
{
	char path[128];
	int opened;

	snprintf(path, sizeof(path), "%s/%s", top, name);
	opened = raio_open(fd, path, O_RDWR | O_CREAT);
	MUST(opened > 0);
	return opened;
}

static void copies(int fd, raio_context_t ctx)
{
	int data = raio_open(fd, "/ro/data.bin", O_RDONLY), null = raio_open(fd, "/null", O_RDWR);
	int a = file(fd, "a"), b = file(fd, "b");
	static char in[100], out[100];
	struct raio_copy_args args;
	struct raio_iocb iocb, *ios[1] = {&iocb};
	struct raio_event event;

	EQ(raio_copy_file_range(data, 5, a, 7, 100), 100);
	EQ(raio_pread(data, in, 100, 5), 100);
	EQ(raio_pread(a, out, 100, 7), 100);
	CHECK(!memcmp(in, out, 100));
	EQ(raio_copy_file_range(data, 0, a, 0, DATA_BIN_BYTES + 1000), DATA_BIN_BYTES);
	EQ(raio_copy_file_range(data, DATA_BIN_BYTES, a, 0, 1), 0);
	EQ(raio_copy_file_range(a, 0, a, DATA_BIN_BYTES, 100), 100);
	FAILS(raio_copy_file_range(a, 0, a, 50, 100), EINVAL);
	FAILS(raio_copy_file_range(a, -1, b, 0, 1), EINVAL);
	FAILS(raio_copy_file_range(a, 0, b, -1, 1), EINVAL);
	FAILS(raio_copy_file_range(a, 1, b, 0, 1ull << 63), EINVAL);
	FAILS(raio_copy_file_range(a, 0, data, 0, 1), EBADF);
	FAILS(raio_copy_file_range(12345, 0, a, 0, 1), EBADF);
	FAILS(raio_copy_file_range(a, 0, 12345, 0, 1), EBADF);
	FAILS(raio_copy_file_range(null, 0, a, 0, 1), EOPNOTSUPP);

	/* The arguments are not needed after raio_submit(). */
	raio_prep_copy_file_range(&iocb, &args, a, 1, b, 2, 5000);
	EQ(raio_submit(ctx, 1, ios), 1);
	memset(&args, 0xff, sizeof(args));
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 5000);
	EQ(raio_pread(a, in, 100, 1 + 4900), 100);
	EQ(raio_pread(b, out, 100, 2 + 4900), 100);
	CHECK(!memcmp(in, out, 100));
	raio_prep_copy_file_range(&iocb, &args, a, 0, data, 0, 1);
	EQ(run_iocb(ctx, &iocb), -EBADF);
	raio_prep_copy_file_range(&iocb, &args, 12345, 0, b, 0, 1);
	EQ(raio_submit(ctx, 1, ios), -EBADF);
	raio_prep_copy_file_range(&iocb, &args, a, -1, b, 0, 1);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_copy_file_range(&iocb, &args, a, 0, b, 0, 1);
	args.reserved[0] = 1;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	iocb.u.c.buf = NULL;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	EQ(raio_close(a), 0);
	EQ(raio_close(b), 0);
	EQ(raio_close(data), 0);
	EQ(raio_close(null), 0);
}

static void checksums(int fd, raio_context_t ctx)
{
	/* BLAKE3 of no bytes, and of the byte 0. */
	static const unsigned char none[4] = {0xaf, 0x13, 0x49, 0xb9}, zero[4] = {0x2d, 0x3a, 0xde, 0xdf};
	int data = raio_open(fd, "/ro/data.bin", O_RDONLY), big = file(fd, "big");
	static char bytes[DATA_BIN_BYTES];
	struct raio_checksum sum, of_iocb;
	struct raio_iocb iocb, *ios[1] = {&iocb};

	EQ(raio_pread(data, bytes, sizeof(bytes), 0), DATA_BIN_BYTES);
	memset(&sum, 0, sizeof(sum));
	sum.type = RAIO_CHECKSUM_CRC32C;
	EQ(raio_checksum_range(data, 0, 1ull << 40, &sum), DATA_BIN_BYTES);
	EQ(sum.crc32c, raio_crc32c(0, bytes, sizeof(bytes)));
	EQ(raio_checksum_range(data, 77, 1000, &sum), 1000);
	EQ(sum.crc32c, raio_crc32c(0, bytes + 77, 1000));
	EQ(raio_ftruncate(big, BIG), 0);
	sum.type = RAIO_CHECKSUM_BLAKE3;
	EQ(raio_checksum_range(big, BIG, 1, &sum), 0);
	CHECK(!memcmp(sum.blake3, none, 4));
	EQ(raio_checksum_range(big, 5, 1, &sum), 1);
	CHECK(!memcmp(sum.blake3, zero, 4));
	EQ(raio_checksum_range(big, 0, BIG, &sum), BIG);
	raio_prep_checksum(&iocb, big, RAIO_CHECKSUM_BLAKE3, 0, BIG, &of_iocb);
	EQ(run_iocb(ctx, &iocb), BIG);
	CHECK(!memcmp(sum.blake3, of_iocb.blake3, 32));
	raio_prep_checksum(&iocb, data, RAIO_CHECKSUM_CRC32C, 77, 1000, &of_iocb);
	EQ(run_iocb(ctx, &iocb), 1000);
	EQ(of_iocb.crc32c, raio_crc32c(0, bytes + 77, 1000));
	raio_prep_checksum(&iocb, data, 3, 0, 1, &of_iocb);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	iocb.u.c.buf = NULL;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	sum.type = 0;
	FAILS(raio_checksum_range(data, 0, 1, &sum), EINVAL);
	FAILS(raio_checksum_range(data, 0, 1, NULL), EINVAL);
	sum.type = RAIO_CHECKSUM_CRC32C;
	FAILS(raio_checksum_range(data, -1, 1, &sum), EINVAL);
	FAILS(raio_checksum_range(12345, 0, 1, &sum), EBADF);
	EQ(raio_close(big), 0);
	EQ(raio_close(data), 0);
}

static void locks(int fd, raio_context_t ctx, int other)
{
	int a = file(fd, "locked"), b = file(other, "locked");
	int data = raio_open(fd, "/ro/data.bin", O_RDONLY), mem = raio_open(fd, "/mem", O_RDWR);
	struct raio_iocb iocb, *ios[1] = {&iocb};

	EQ(raio_flock(a, LOCK_SH), 0);
	EQ(raio_flock(b, LOCK_SH | LOCK_NB), 0);
	FAILS(raio_flock(b, LOCK_EX), EWOULDBLOCK);
	EQ(raio_flock(b, LOCK_UN), 0);
	raio_prep_flock(&iocb, a, LOCK_EX);
	EQ(run_iocb(ctx, &iocb), 0);
	FAILS(raio_flock(b, LOCK_SH), EWOULDBLOCK);
	EQ(raio_close(a), 0);
	EQ(raio_flock(b, LOCK_EX), 0);
	a = file(fd, "locked");
	raio_prep_flock(&iocb, a, LOCK_SH);
	EQ(run_iocb(ctx, &iocb), -EWOULDBLOCK);
	EQ(raio_stop(other), 0);
	/* The session ends a while after its connections. */
	while (raio_flock(a, LOCK_EX) && errno == EWOULDBLOCK)
		usleep(1000);
	EQ(raio_flock(a, LOCK_UN), 0);
	FAILS(raio_flock(a, 0), EINVAL);
	FAILS(raio_flock(a, LOCK_SH | LOCK_EX), EINVAL);
	FAILS(raio_flock(data, LOCK_EX), EBADF);
	EQ(raio_flock(data, LOCK_SH), 0);
	FAILS(raio_flock(mem, LOCK_SH), EOPNOTSUPP);
	FAILS(raio_flock(12345, LOCK_SH), EBADF);
	raio_prep_flock(&iocb, a, 77);
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	EQ(raio_close(a), 0);
	EQ(raio_close(mem), 0);
	EQ(raio_close(data), 0);
}

int main(int argc, char **argv)
{
	raio_context_t ctx = NULL;
	int fd, other;

	begin(argc, argv);
	fd = session(argv);
	other = session(argv);
	fresh_path(top, sizeof(top), "ranges");
	MUST(raio_mkdir(fd, top, 0755) == 0);
	/* The first file of each has the session's descriptor. */
	MUST(raio_open(fd, "/ro/empty", O_RDONLY) == 0 && raio_open(other, "/ro/empty", O_RDONLY) == 0);
	MUST(raio_setup(fd, 8, &ctx) == 0);
	copies(fd, ctx);
	checksums(fd, ctx);
	locks(fd, ctx, other);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	return finish("ranges");
}
