/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A program that does one thing at a time, and bindings: synchronous reads and writes by descriptor alone, from
 * several threads.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include "check.h"

#define THREADS 12
#define ROUNDS 40
#define LONG_BYTES (3 << 20)

static int shared_file;

static void *write_and_read_back(void *argument)
{
	unsigned int seed = (unsigned int)(size_t)argument;
	unsigned char out[5000], in[5000];
	long long offset;
	int i;

	for (i = 0; i < ROUNDS; i++) {
		offset = (seed * ROUNDS + i) * (long long)sizeof(out);
		fill_pattern(out, sizeof(out), seed, offset);
		EQ(raio_pwrite(shared_file, out, sizeof(out), offset), sizeof(out));
		EQ(raio_pread(shared_file, in, sizeof(in), offset), sizeof(in));
		CHECK(is_pattern(in, sizeof(in), seed, offset));
	}
	return NULL;
}

static void reads_and_writes(int fd, int file)
{
	static unsigned char out[LONG_BYTES], in[LONG_BYTES];
	char path[64];
	int other;

	EQ(raio_pread(file, in, 1000, 0), 1000);
	CHECK(is_data_bin(in, 1000, 0));
	EQ(raio_pread(file, in, 1000, DATA_BIN_BYTES - 10), 10);
	CHECK(is_data_bin(in, 10, DATA_BIN_BYTES - 10));
	EQ(raio_pread(file, in, 1000, DATA_BIN_BYTES), 0);
	EQ(raio_pread(file, NULL, 0, 5), 0);
	FAILS(raio_pread(file, NULL, 1, 0), EINVAL);
	FAILS(raio_pread(file, in, 1, -1), EINVAL);
	FAILS(raio_pread(file, in, (size_t)-1, 0), EINVAL);
	FAILS(raio_pread(12345, in, 1, 0), EBADF);
	FAILS(raio_pwrite(file, in, 1, 0), EBADF);

	other = raio_open(fd, fresh_path(path, sizeof(path), "simple"), O_RDWR | O_CREAT);
	MUST(other > 0);
	fill_pattern(out, sizeof(out), 3, 0);
	EQ(raio_pwrite(other, out, sizeof(out), 77), sizeof(out));
	EQ(raio_pread(other, in, sizeof(in), 77), sizeof(in));
	CHECK(is_pattern(in, sizeof(in), 3, 0));
	EQ(raio_close(other), 0);
	FAILS(raio_pread(other, in, 1, 0), EBADF);
}

static void the_status_has_what_fstat_has_and_more(int file)
{
	struct raio_stat status, shorter;
	struct stat64 st;

	memset(&status, 0xff, sizeof(status));
	MUST(raio_fstat(file, &st) == 0);
	EQ(raio_stat_fd(file, &status, sizeof(status)), 0);
	EQ(status.size, sizeof(status));
	EQ(status.file_bytes, DATA_BIN_BYTES);
	EQ(status.file_bytes, st.st_size);
	EQ(status.blocks, st.st_blocks);
	EQ(status.inode, st.st_ino);
	EQ(status.device, st.st_dev);
	EQ(status.rdevice, st.st_rdev);
	EQ(status.mode, st.st_mode);
	EQ(status.links, st.st_nlink);
	EQ(status.uid, st.st_uid);
	EQ(status.gid, st.st_gid);
	EQ(status.block_bytes, st.st_blksize);
	EQ(status.direct_align, 1);
	EQ(status.modified_ns, st.st_mtim.tv_sec * 1000000000LL + st.st_mtim.tv_nsec);
	EQ(status.changed_ns, st.st_ctim.tv_sec * 1000000000LL + st.st_ctim.tv_nsec);
	CHECK(!is_all(status.identity, sizeof(status.identity), 0));

	/* A program of an earlier header passes a smaller size, one of a later header a larger. */
	memset(&shorter, 0xff, sizeof(shorter));
	EQ(raio_stat_fd(file, &shorter, 24), 0);
	EQ(shorter.size, 24);
	EQ(shorter.blocks, st.st_blocks);
	CHECK(is_all(&shorter.inode, sizeof(shorter) - 24, 0xff));
	EQ(raio_stat_fd(file, &status, sizeof(status) + 8), 0);
	EQ(status.size, sizeof(status));
	FAILS(raio_stat_fd(file, &status, 8), EINVAL);
	FAILS(raio_stat_fd(file, NULL, sizeof(status)), EINVAL);
	FAILS(raio_stat_fd(12345, &status, sizeof(status)), EBADF);
}

static void an_iocb_that_takes_too_long_ends(int fd, int file)
{
	struct raio_event events[2];
	struct raio_iocb first, second, *ios[1] = { &second };
	raio_context_t ctx = NULL;
	struct pollfd poller;
	char buf[10];

	EQ(raio_setup(fd, 1, &ctx), 0);
	/* One that is over in time. */
	raio_prep_pread(&first, file, buf, sizeof(buf), 0, NULL);
	raio_set_timeout(&first, 60000);
	EQ(run_iocb(ctx, &first), sizeof(buf));
	/* Reads into lent buffers wait until one is released. */
	raio_prep_pread(&first, file, NULL, 10, 0, NULL);
	ios[0] = &first;
	EQ(raio_submit(ctx, 1, ios), 1);
	EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);
	raio_prep_pread(&second, file, NULL, 10, 0, NULL);
	raio_set_timeout(&second, 100);
	ios[0] = &second;
	poller.fd = raio_poll_fd(ctx);
	poller.events = POLLIN;
	EQ(raio_submit(ctx, 1, ios), 1);
	EQ(raio_getevents(ctx, 0, 1, &events[1], NULL), 0);
	EQ(poll(&poller, 1, 10000), 1);
	EQ(raio_getevents(ctx, 1, 1, &events[1], NULL), 1);
	EQ(events[1].res, -ETIMEDOUT);
	EQ(events[1].res2, 0);
	CHECK(events[1].obj == &second && raio_event_errmsg(ctx, &events[1])[0]);
	EQ(raio_release(ctx, 2, events), 0);
	EQ(read_at(ctx, file, buf, sizeof(buf), 0), sizeof(buf));
	EQ(raio_destroy(ctx), 0);
}

static void unreadable_memory_is_an_error(int fd, int file)
{
	struct raio_path_args args;
	raio_context_t ctx = NULL;
	struct raio_iocb iocb;
	char path[64];
	void *page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	MUST(page != MAP_FAILED);
	FAILS(raio_pwrite(file, page, 10, 0), EFAULT);
	EQ(raio_setup(fd, 1, &ctx), 0);
	raio_prep_put(&iocb, fd, &args, fresh_path(path, sizeof(path), "simple"), page, 10, 0600, 0, NULL);
	EQ(run_iocb(ctx, &iocb), -EFAULT);
	EQ(raio_destroy(ctx), 0);
	munmap(page, 4096);
}

static void threads_share_a_file(void)
{
	pthread_t threads[THREADS];
	size_t i;

	for (i = 0; i < THREADS; i++)
		MUST(pthread_create(&threads[i], NULL, write_and_read_back, (void *)i) == 0);
	for (i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

static void a_child_has_none_of_it(int file)
{
	char byte;
	int status;
	pid_t child = fork();

	MUST(child >= 0);
	if (!child)
		_exit(raio_pread(file, &byte, 1, 0) == -1 && errno == EBADF ? 0 : 1);
	MUST(waitpid(child, &status, 0) == child);
	EQ(status, 0);
	EQ(raio_pread(file, &byte, 1, 0), 1);
}

static void each_file_has_a_descriptor_of_its_own(char **argv)
{
	int fd = session_with(argv, RAIO_OPT_FD_ALWAYS), first, second;
	raio_context_t ctx = NULL;
	char bytes[10];

	first = raio_open(fd, "/ro/data.bin", O_RDONLY);
	second = raio_open(fd, "/ro/empty", O_RDONLY);
	CHECK(first > 0 && second > 0 && first != second && first != fd && second != fd);
	FAILS(raio_pread(fd, bytes, 1, 0), EBADF);
	EQ(raio_pread(first, bytes, sizeof(bytes), 3), sizeof(bytes));
	CHECK(is_data_bin(bytes, sizeof(bytes), 3));
	EQ(raio_pread(second, bytes, sizeof(bytes), 0), 0);
	EQ(raio_setup(fd, 4, &ctx), 0);
	EQ(read_at(ctx, fd, bytes, 1, 0), -EBADF);
	EQ(read_at(ctx, first, bytes, 1, 0), 1);
	EQ(raio_destroy(ctx), 0);
	FAILS(raio_close(fd), EBADF);
	EQ(raio_close(first), 0);
	first = raio_open(fd, "/ro/data.bin", O_RDONLY);
	CHECK(first > 0);
	EQ(raio_stop(fd), 0);
}

int main(int argc, char **argv)
{
	char path[64], byte = 'x';
	int fd;

	begin(argc, argv);
	fd = session(argv);
	/* The session itself is the first file. */
	EQ(raio_open(fd, "/ro/data.bin", O_RDONLY), 0);
	reads_and_writes(fd, fd);
	an_iocb_that_takes_too_long_ends(fd, fd);
	the_status_has_what_fstat_has_and_more(fd);
	shared_file = raio_open(fd, fresh_path(path, sizeof(path), "simple"), O_RDWR | O_CREAT);
	MUST(shared_file > 0);
	threads_share_a_file();
	unreadable_memory_is_an_error(fd, shared_file);
	a_child_has_none_of_it(shared_file);
	EQ(raio_stop(fd), 0);
	FAILS(raio_pwrite(shared_file, &byte, 1, 0), EBADF);
	FAILS(raio_pread(fd, &byte, 1, 0), EBADF);
	each_file_has_a_descriptor_of_its_own(argv);
	return finish("simple");
}
