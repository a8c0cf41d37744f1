/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* R-AIO habit 4: raio_setup() before raio_open(). A context is the session's, for files opened later too. */
#define _GNU_SOURCE
#include "check.h"

int main(int argc, char **argv)
{
	raio_context_t ctx = NULL, second = NULL;
	int fd, other, again;
	char buf[700], path[128];

	begin(argc, argv);
	fd = session(argv);
	EQ(raio_setup(fd, 4, &ctx), 0);
	MUST(ctx != NULL);
	/* Nothing is open yet: the session's descriptor is no file. */
	EQ(read_at(ctx, fd, buf, sizeof(buf), 0), -EBADF);
	EQ(raio_open(fd, "/ro/data.bin", O_RDONLY), 0);
	EQ(read_at(ctx, fd, buf, sizeof(buf), 1000), sizeof(buf));
	CHECK(is_data_bin(buf, sizeof(buf), 1000));

	/* A file opened while contexts exist is usable from each, and from one made later. */
	other = raio_open(fd, fresh_path(path, sizeof(path), "later"), O_RDWR | O_CREAT | O_EXCL);
	MUST(other > 0);
	EQ(raio_setup(fd, 4, &second), 0);
	MUST(second != NULL);
	fill_pattern(buf, sizeof(buf), 3, 0);
	EQ(write_at(ctx, other, buf, sizeof(buf), 0), sizeof(buf));
	memset(buf, 0, sizeof(buf));
	EQ(read_at(second, other, buf, sizeof(buf), 0), sizeof(buf));
	CHECK(is_pattern(buf, sizeof(buf), 3, 0));

	/* A context made by way of a file belongs to the file's session. */
	EQ(raio_destroy(second), 0);
	EQ(raio_setup(other, 2, &second), 0);
	MUST(second != NULL);
	EQ(read_at(second, fd, buf, sizeof(buf), 77), sizeof(buf));
	CHECK(is_data_bin(buf, sizeof(buf), 77));

	/* Closed and opened anew, the contexts go on. */
	EQ(raio_close(other), 0);
	EQ(read_at(ctx, other, buf, sizeof(buf), 0), -EBADF);
	again = raio_open(fd, path, O_RDONLY);
	MUST(again > 0);
	EQ(read_at(ctx, again, buf, sizeof(buf), 0), sizeof(buf));
	CHECK(is_pattern(buf, sizeof(buf), 3, 0));
	EQ(raio_destroy(ctx), 0);
	EQ(raio_destroy(second), 0);
	EQ(raio_stop(fd), 0);
	return finish("r-aio-4-setup-before-open");
}
