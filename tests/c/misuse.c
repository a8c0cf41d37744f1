/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Every function with what makes no sense: NULL, a descriptor or context that is not or no longer one, counts below
 * zero, flags nobody knows, lengths that wrap. Each gives the value and errno that libraio.h says, and nothing else
 * happens: after all of it the session still works.
 */
#define _GNU_SOURCE
#include "check.h"
#include <glob.h>
#include <limits.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/un.h>

static const int no_fds[] = { -1, 0, INT_MIN, INT_MAX, 1000000 };
#define NO_FDS (sizeof(no_fds) / sizeof(no_fds[0]))

static int has_rdma(void)
{
	glob_t found;
	int has = glob("/sys/class/infiniband/*", 0, NULL, &found) == 0;

	globfree(&found);
	return has;
}

/* Peers that are not raio servers ---------------------------------------------------------------------------- */

static int bind_loopback(struct sockaddr_in *address)
{
	socklen_t len = sizeof(*address);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	memset(address, 0, sizeof(*address));
	address->sin_family = AF_INET;
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	MUST(fd >= 0);
	MUST(bind(fd, (struct sockaddr *)address, sizeof(*address)) == 0);
	MUST(getsockname(fd, (struct sockaddr *)address, &len) == 0);
	return fd;
}

static void *answer_in_http(void *listener)
{
	static const char answer[] = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
	char request[4096];
	int fd = accept(*(int *)listener, NULL, NULL);

	if (fd >= 0) {
		if (recv(fd, request, sizeof(request), 0) > 0)
			(void)!write(fd, answer, sizeof(answer) - 1);
		shutdown(fd, SHUT_WR);
		while (read(fd, request, sizeof(request)) > 0)
			;
		close(fd);
	}
	return NULL;
}

static void *hang_up(void *listener)
{
	int fd = accept(*(int *)listener, NULL, NULL);

	if (fd >= 0)
		close(fd);
	return NULL;
}

static void peers_that_are_no_servers(void)
{
	struct raio_options options = { .size = sizeof(options), .connect_timeout_ms = 300 };
	struct sockaddr_in address;
	pthread_t thread;
	char url[64];
	double start;
	int fd;

	/* Bound, not listening: refused, and nobody else can take the port meanwhile. */
	fd = bind_loopback(&address);
	FAILS(raio_start("tcp", (struct sockaddr *)&address, sizeof(address)), ECONNREFUSED);
	snprintf(url, sizeof(url), "raio+tcp://127.0.0.1:%d", ntohs(address.sin_port));
	FAILS(raio_connect(url, NULL), ECONNREFUSED);
	close(fd);

	fd = bind_loopback(&address);
	MUST(listen(fd, 8) == 0);
	MUST(pthread_create(&thread, NULL, answer_in_http, &fd) == 0);
	FAILS(raio_start("tcp", (struct sockaddr *)&address, sizeof(address)), EPROTO);
	pthread_join(thread, NULL);
	MUST(pthread_create(&thread, NULL, hang_up, &fd) == 0);
	errno = 0;
	EQ(raio_start("tcp", (struct sockaddr *)&address, sizeof(address)), -1);
	CHECK(errno == EPROTO || errno == ECONNRESET || errno == EPIPE);
	pthread_join(thread, NULL);
	/* Connected by the kernel, answered by nobody. */
	start = seconds_now();
	snprintf(url, sizeof(url), "raio+tcp://127.0.0.1:%d", ntohs(address.sin_port));
	FAILS(raio_connect(url, &options), ETIMEDOUT);
	CHECK(seconds_now() - start > 0.2);
	CHECK(seconds_now() - start < 10);
	close(fd);
}

/* Sessions --------------------------------------------------------------------------------------------------- */

static void start(char **argv)
{
	struct sockaddr_storage address;
	struct sockaddr *addr = (struct sockaddr *)&address;
	struct sockaddr_un local;
	socklen_t len = server_address(argv, &address);
	struct sockaddr_in6 short6;

	FAILS(raio_start(NULL, addr, len), EINVAL);
	FAILS(raio_start("tcp", NULL, len), EINVAL);
	FAILS(raio_start("tcp", NULL, 0), EINVAL);
	FAILS(raio_start("tcp", addr, 0), EINVAL);
	FAILS(raio_start("tcp", addr, 1), EINVAL);
	FAILS(raio_start("tcp", addr, sizeof(sa_family_t)), EINVAL);
	FAILS(raio_start("tcp", addr, len - 1), EINVAL);
	FAILS(raio_start("tcp", addr, (socklen_t)-1), EINVAL);
	FAILS(raio_start("", addr, len), EPROTONOSUPPORT);
	FAILS(raio_start("udp", addr, len), EPROTONOSUPPORT);
	FAILS(raio_start("TCP ", addr, len), EPROTONOSUPPORT);
	FAILS(raio_start("\xff\xfe", addr, len), EPROTONOSUPPORT);
	if (!has_rdma())
		FAILS(raio_start("rdma", addr, len), EPROTONOSUPPORT);
	memset(&local, 0, sizeof(local));
	local.sun_family = AF_UNIX;
	strcpy(local.sun_path, "/nowhere");
	FAILS(raio_start("tcp", (struct sockaddr *)&local, sizeof(local)), EAFNOSUPPORT);
	memset(&short6, 0, sizeof(short6));
	short6.sin6_family = AF_INET6;
	FAILS(raio_start("tcp", (struct sockaddr *)&short6, sizeof(struct sockaddr_in)), EINVAL);
}

static void connect_(char **argv)
{
	static const char *const urls[] = {
		"", "raio", "raio:", "raio:/", "raio://", "raio://:7240", "127.0.0.1:7240", "http://127.0.0.1:7240",
		"raio+udp://127.0.0.1:7240", "raio://127.0.0.1:port", "raio://127.0.0.1:-1", "raio://127.0.0.1:0",
		"raio://127.0.0.1:65536", "raio://127.0.0.1:99999999999999999999", "raio://127.0.0.1:", "raio://[::1",
		"raio://[]:7240", "raio://::1:7240", "raio://[127.0.0.1:7240", "raio://\xff\xfe:7240", "RAIO",
	};
	union {
		struct raio_options options;
		unsigned char bytes[2 * sizeof(struct raio_options)];
	} wide;
	struct raio_options options;
	struct addrinfo *found;
	char host[256], port[32], url[320];
	size_t i;
	int fd;

	FAILS(raio_connect(NULL, NULL), EINVAL);
	for (i = 0; i < sizeof(urls) / sizeof(urls[0]); i++) {
		errno = 0;
		fd = raio_connect(urls[i], NULL);
		if (fd != -1 || errno != EINVAL)
			printf("the URL is \"%s\":\n", urls[i]);
		EQ(fd, -1);
		EQ(errno, EINVAL);
	}
	if (!has_rdma())
		FAILS(raio_connect("raio+rdma://127.0.0.1:7240", NULL), EPROTONOSUPPORT);
	fd = getaddrinfo("no-such-host.invalid", "7240", NULL, &found);
	if (fd == EAI_NONAME)
		FAILS(raio_connect("raio://no-such-host.invalid:7240", NULL), ENOENT);
	else
		printf("misuse: not checked: a host that nobody knows (this machine cannot look up names: %s)\n",
		       gai_strerror(fd));

	server_name(argv, host, sizeof(host), port, sizeof(port));
	snprintf(url, sizeof(url), strchr(host, ':') ? "raio+tcp://[%s]:%s" : "raio+tcp://%s:%s", host, port);
	memset(&options, 0, sizeof(options));
	FAILS(raio_connect(url, &options), EINVAL);
	options.size = 3;
	FAILS(raio_connect(url, &options), EINVAL);
	options.size = sizeof(options);
	options.flags = 1u << 31;
	FAILS(raio_connect(url, &options), EINVAL);
	options.flags = 1u << 7;
	FAILS(raio_connect(url, &options), EINVAL);
	options.flags = RAIO_OPT_CRC | RAIO_OPT_NO_CRC;
	FAILS(raio_connect(url, &options), EINVAL);
	options.flags = 0;
	options.reserved[0] = 1;
	FAILS(raio_connect(url, &options), EINVAL);
	options.reserved[0] = 0;
	options.reserved[7] = 1;
	FAILS(raio_connect(url, &options), EINVAL);
	options.reserved[7] = 0;
	fd = raio_connect(url, &options);
	CHECK(fd > 0);
	EQ(raio_stop(fd), 0);
	/* From a newer header: taken while what is new is zero. */
	memset(&wide, 0, sizeof(wide));
	wide.options.size = sizeof(wide);
	fd = raio_connect(url, &wide.options);
	CHECK(fd > 0);
	EQ(raio_stop(fd), 0);
	wide.bytes[sizeof(wide) - 1] = 1;
	FAILS(raio_connect(url, &wide.options), EINVAL);
	wide.options.size = UINT_MAX;
	FAILS(raio_connect(url, &wide.options), EINVAL);
}

static void stop(char **argv)
{
	size_t i;
	int fd;

	for (i = 0; i < NO_FDS; i++)
		FAILS(raio_stop(no_fds[i]), EBADF);
	fd = session(argv);
	/* No kernel descriptor. */
	EQ(fcntl(fd, F_GETFD), -1);
	EQ(errno, EBADF);
	EQ(raio_stop(fd), 0);
	FAILS(raio_stop(fd), EBADF);
}

/* Files ------------------------------------------------------------------------------------------------------ */

static void open_flags(int fd)
{
	static const int flags[] = { O_APPEND, O_DIRECTORY, O_PATH, O_TMPFILE, O_ASYNC, O_NOATIME, O_ACCMODE, 1 << 30 };
	size_t i;
	int file;

	for (i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		errno = 0;
		file = raio_open(fd, "/rw/never-made", flags[i] | O_CREAT);
		if (file != -1 || errno != EINVAL)
			printf("the flag is %#o:\n", flags[i]);
		EQ(file, -1);
		EQ(errno, EINVAL);
	}
	FAILS(raio_open(fd, "/rw/never-made", -1), EINVAL);
	FAILS(raio_open(fd, "/rw/never-made", O_RDWR), ENOENT);
	/* These mean nothing here, or are honoured. */
	file = raio_open(fd, "/ro/data.bin", O_RDONLY | O_CLOEXEC | O_LARGEFILE | O_NOCTTY | O_NONBLOCK | O_NOFOLLOW);
	CHECK(file > 0);
	EQ(raio_close(file), 0);
}

static void open_(char **argv)
{
	char *path = malloc(1 << 20), fresh[128];
	int fd, file;
	size_t i;

	MUST(path != NULL);
	for (i = 0; i < NO_FDS; i++) {
		FAILS(raio_open(no_fds[i], "/ro/data.bin", O_RDONLY), EBADF);
		FAILS(raio_open_mode(no_fds[i], "/ro/data.bin", O_RDONLY, 0644), EBADF);
	}
	fd = session(argv);
	FAILS(raio_close(fd), EBADF);
	FAILS(raio_open(fd, NULL, O_RDONLY), EINVAL);
	FAILS_EITHER(raio_open(fd, "", O_RDONLY), EINVAL, ENOENT);
	FAILS_EITHER(raio_open(fd, "data.bin", O_RDONLY), EINVAL, ENOENT);
	FAILS_EITHER(raio_open(fd, "ro/data.bin", O_RDONLY), EINVAL, ENOENT);
	FAILS_EITHER(raio_open(fd, "/", O_RDONLY), EINVAL, ENOENT);
	FAILS_EITHER(raio_open(fd, "//", O_RDONLY), EINVAL, ENOENT);
	FAILS(raio_open(fd, "/no-such-export/data.bin", O_RDONLY), ENOENT);
	FAILS(raio_open(fd, "/r", O_RDONLY), ENOENT);
	FAILS(raio_open(fd, "/roo/data.bin", O_RDONLY), ENOENT);
	FAILS(raio_open(fd, "/ro/nothing-here", O_RDONLY), ENOENT);
	FAILS(raio_open(fd, "/rw/no/such/directory", O_RDWR | O_CREAT), ENOENT);
	FAILS(raio_open(fd, "/ro/data.bin/below", O_RDONLY), ENOTDIR);
	FAILS(raio_open(fd, "/rw", O_RDWR), EISDIR);
	FAILS_EITHER(raio_open(fd, "/ro", O_RDONLY), EISDIR, ENODEV);
	FAILS(raio_open(fd, "/ro/data.bin", O_RDWR), EROFS);
	FAILS(raio_open(fd, "/ro/data.bin", O_WRONLY), EROFS);
	FAILS(raio_open(fd, "/ro/data.bin", O_RDONLY | O_TRUNC), EROFS);
	FAILS(raio_open(fd, "/ro/new", O_RDWR | O_CREAT), EROFS);
	FAILS(raio_open(fd, "/rw/../ro/escape", O_RDWR | O_CREAT), EXDEV);
	FAILS(raio_open(fd, "/ro/../../../etc/passwd", O_RDONLY), EXDEV);
	FAILS(raio_open(fd, "/rw/..", O_RDONLY), EXDEV);
	/* PATH_MAX counts the NUL: one less is a path that is merely not there. */
	memset(path, 'a', 1 << 20);
	memcpy(path, "/ro/", 4);
	for (i = 3; i < 1 << 20; i += 2)
		path[i] = '/';
	path[PATH_MAX - 1] = '\0';
	FAILS(raio_open(fd, path, O_RDONLY), ENOENT);
	path[PATH_MAX - 1] = 'a';
	path[PATH_MAX] = '\0';
	FAILS(raio_open(fd, path, O_RDONLY), ENAMETOOLONG);
	path[PATH_MAX] = 'a';
	path[(1 << 20) - 1] = '\0';
	FAILS(raio_open(fd, path, O_RDONLY), ENAMETOOLONG);
	/* One name of more than 255 bytes. */
	memset(path + 4, 'b', 256);
	path[260] = '\0';
	FAILS(raio_open(fd, path, O_RDONLY), ENAMETOOLONG);
	/* After all that nothing has been opened. */
	FAILS(raio_close(fd), EBADF);
	EQ(raio_open(fd, fresh_path(fresh, sizeof(fresh), "exists"), O_RDWR | O_CREAT | O_EXCL), 0);
	FAILS(raio_open(fd, fresh, O_RDWR | O_CREAT | O_EXCL), EEXIST);
	open_flags(fd);
	file = raio_open_mode(fd, fresh_path(fresh, sizeof(fresh), "mode"), O_RDWR | O_CREAT, 0600);
	CHECK(file > 0);
	FAILS(raio_open(file, fresh, O_RDONLY), EBADF);
	EQ(raio_close(file), 0);
	FAILS(raio_close(file), EBADF);
	EQ(raio_close(fd), 0);
	FAILS(raio_close(fd), EBADF);
	EQ(raio_stop(fd), 0);
	FAILS(raio_open(fd, fresh, O_RDONLY), EBADF);
	free(path);
}

static void fstat_and_close(char **argv)
{
	struct stat64 st;
	size_t i;
	int fd;

	for (i = 0; i < NO_FDS; i++) {
		FAILS(raio_fstat(no_fds[i], &st), EBADF);
		FAILS(raio_close(no_fds[i]), EBADF);
	}
	fd = session(argv);
	FAILS(raio_fstat(fd, &st), EBADF);
	MUST(raio_open(fd, "/ro/empty", O_RDONLY) == 0);
	FAILS(raio_fstat(fd, NULL), EINVAL);
	EQ(raio_fstat(fd, &st), 0);
	EQ(st.st_size, 0);
	EQ(raio_stop(fd), 0);
	FAILS(raio_fstat(fd, &st), EBADF);
	FAILS(raio_close(fd), EBADF);
}

/* Contexts --------------------------------------------------------------------------------------------------- */

static void setup_and_destroy(char **argv)
{
	static long long zeros[512];
	raio_context_t ctx, kept, not_one = (raio_context_t)&zeros;
	size_t i;
	int fd, other;

	for (i = 0; i < NO_FDS; i++) {
		ctx = not_one;
		FAILS(raio_setup(no_fds[i], 4, &ctx), EBADF);
		CHECK(ctx == NULL);
	}
	fd = session(argv);
	FAILS(raio_setup(fd, 4, NULL), EINVAL);
	ctx = not_one;
	FAILS(raio_setup(fd, 0, &ctx), EINVAL);
	CHECK(ctx == NULL);
	FAILS(raio_setup(fd, -1, &ctx), EINVAL);
	FAILS(raio_setup(fd, INT_MIN, &ctx), EINVAL);
	FAILS(raio_setup(fd, 65537, &ctx), EINVAL);
	FAILS(raio_setup(fd, INT_MAX, &ctx), EINVAL);
	CHECK(ctx == NULL);
	EQ(raio_setup(fd, 65536, &ctx), 0);
	EQ(raio_destroy(ctx), 0);
	FAILS(raio_destroy(ctx), EINVAL);
	FAILS(raio_destroy(NULL), EINVAL);
	FAILS(raio_destroy(not_one), EINVAL);
	MUST(raio_setup(fd, 1, &ctx) == 0);
	EQ(raio_stop(fd), 0);
	/* Dead, but not destroyed: it is not lost by being written over. */
	other = session(argv);
	kept = ctx;
	FAILS(raio_setup(other, 1, &ctx), EINVAL);
	CHECK(ctx == kept);
	EQ(raio_stop(other), 0);
	EQ(raio_destroy(ctx), 0);
	FAILS(raio_destroy(ctx), EINVAL);
	FAILS(raio_setup(fd, 1, &ctx), EBADF);
}

/* Calls on something that is no context, of whichever kind. */
static void calls_without_context(raio_context_t ctx)
{
	struct raio_iocb iocb, *ios = &iocb;
	struct timespec zero = { 0, 0 };
	struct raio_event event;
	struct raio_stats stats;
	raio_mr_t mr = NULL;
	char buf[64];

	raio_prep_pread(&iocb, 1, buf, sizeof(buf), 0, NULL);
	memset(&event, 0, sizeof(event));
	EQ(raio_submit(ctx, 1, &ios), -EINVAL);
	EQ(raio_getevents(ctx, 0, 1, &event, &zero), -EINVAL);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), -EINVAL);
	FAILS(raio_release(ctx, 1, &event), EINVAL);
	FAILS(raio_cancel(ctx, &iocb, &event), EINVAL);
	FAILS(raio_poll_fd(ctx), EINVAL);
	FAILS(raio_reg_mr(ctx, buf, sizeof(buf), &mr), EINVAL);
	FAILS(raio_dereg_mr(ctx, mr), EINVAL);
	errno = 0;
	CHECK(raio_alloc(ctx, 4096, &mr) == NULL);
	EQ(errno, EINVAL);
	FAILS(raio_free(ctx, buf), EINVAL);
	FAILS(raio_get_stats(ctx, &stats, sizeof(stats)), EINVAL);
}

static long submit_one(raio_context_t ctx, struct raio_iocb *iocb)
{
	return raio_submit(ctx, 1, &iocb);
}

/* An iocb that raio_submit() refuses with this, by itself and behind a good one. */
static void refused(raio_context_t ctx, int file, struct raio_iocb *bad, int error, int line)
{
	struct raio_iocb good, *ios[3];
	struct raio_event event = { .obj = NULL };
	char byte;
	long n;

	n = submit_one(ctx, bad);
	if (n != -error)
		printf("of the iocb on line %d:\n", line);
	EQ(n, -error);
	if (n == 1)
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	raio_prep_pread(&good, file, &byte, 1, 0, NULL);
	ios[0] = &good;
	ios[1] = bad;
	ios[2] = &good;
	n = raio_submit(ctx, 3, ios);
	if (n != 1)
		printf("of the iocb on line %d:\n", line);
	EQ(n, 1);
	for (; n > 0; n--)
		EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	CHECK(event.obj == &good);
}
#define REFUSED(error) refused(ctx, file, &iocb, error, __LINE__)

static void submit(char **argv, int fd, int file, raio_context_t ctx)
{
	struct raio_iocb iocb, *ios[8];
	struct iovec iov[1025];
	struct raio_event events[8];
	struct raio_stats stats;
	struct stat64 st;
	raio_context_t other, full;
	raio_mr_t mr, others_mr, old_mr;
	int other_session, writable, closed, i;
	char buf[4096], path[128], *lines;

	writable = raio_open(fd, fresh_path(path, sizeof(path), "refused"), O_RDWR | O_CREAT | O_EXCL);
	MUST(writable > 0);

	EQ(raio_submit(ctx, 0, ios), 0);
	EQ(raio_submit(ctx, 0, NULL), 0);
	EQ(raio_submit(ctx, 1, NULL), -EINVAL);
	EQ(raio_submit(ctx, -1, ios), -EINVAL);
	EQ(raio_submit(ctx, LONG_MIN, ios), -EINVAL);
	ios[0] = NULL;
	EQ(raio_submit(ctx, 1, ios), -EINVAL);
	raio_prep_pread(&iocb, file, buf, 1, 0, NULL);
	ios[0] = &iocb;
	ios[1] = NULL;
	EQ(raio_submit(ctx, 2, ios), 1);
	EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);

	/* Opcode, flags, offset, length. */
	static const int opcodes[] = { -1, RAIO_CMD_OPEN, RAIO_CMD_CLOSE, RAIO_CMD_READLINK, RAIO_CMD_READLINK + 1, 100, INT_MAX, INT_MIN };
	for (i = 0; i < (int)(sizeof(opcodes) / sizeof(opcodes[0])); i++) {
		raio_prep_(&iocb, opcodes[i], file, buf, 1, 0, NULL);
		REFUSED(EINVAL);
	}
	for (i = 2; i < RAIO_IOCB_TIMEOUT_SHIFT; i++) {
		raio_prep_pread(&iocb, file, buf, 1, 0, NULL);
		iocb.u.c.flags = 1u << i;
		if (iocb.u.c.flags == RAIO_IOCB_CRC)
			continue;
		REFUSED(EINVAL);
	}
	raio_prep_pread(&iocb, file, buf, 1, -1, NULL);
	REFUSED(EINVAL);
	raio_prep_pwrite(&iocb, writable, buf, 1, LLONG_MIN, NULL);
	REFUSED(EINVAL);
	MUST(raio_get_stats(ctx, &stats, sizeof(stats)) == 0);
	MUST(stats.io_bytes_max > 0);
	raio_prep_pread(&iocb, file, NULL, (1 << 30) + 1, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf, stats.io_bytes_max + 1, LLONG_MAX - 1, NULL);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, (void *)-4096, stats.io_bytes_max + 1, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf, SIZE_MAX, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pwrite(&iocb, writable, buf, SIZE_MAX, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pwrite(&iocb, writable, buf, (size_t)SSIZE_MAX + 1, 4096, NULL);
	REFUSED(EINVAL);
	raio_prep_pwrite(&iocb, writable, NULL, 1, 0, NULL);
	REFUSED(EINVAL);

	/* iovecs */
	for (i = 0; i < 1025; i++) {
		iov[i].iov_base = buf;
		iov[i].iov_len = 1;
	}
	raio_prep_preadv(&iocb, file, NULL, 1, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_preadv(&iocb, file, iov, 1025, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pwritev(&iocb, writable, iov, -1, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pwritev(&iocb, writable, iov, INT_MAX, 0, NULL);
	REFUSED(EINVAL);
	iov[1].iov_base = NULL;
	raio_prep_pwritev(&iocb, writable, iov, 2, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_preadv(&iocb, file, iov, 2, 0, NULL);
	REFUSED(EINVAL);
	iov[1].iov_base = buf;
	iov[0].iov_len = SIZE_MAX;
	iov[1].iov_len = 2;
	raio_prep_preadv(&iocb, file, iov, 2, 0, NULL);
	REFUSED(EINVAL);
	raio_prep_pwritev(&iocb, writable, iov, 2, 0, NULL);
	REFUSED(EINVAL);

	/* Ranges of discard, write-zeroes and allocate. */
	raio_prep_discard(&iocb, writable, -4096, 4096);
	REFUSED(EINVAL);
	raio_prep_write_zeroes(&iocb, writable, -1, 1);
	REFUSED(EINVAL);
	raio_prep_write_zeroes(&iocb, writable, LLONG_MAX, ULLONG_MAX);
	REFUSED(EINVAL);
	raio_prep_allocate(&iocb, writable, -1, 1, 1);
	REFUSED(EINVAL);
	raio_prep_write_zeroes(&iocb, writable, 0, 1);
	iocb.u.c.flags = RAIO_IOCB_KEEP_SIZE;
	REFUSED(EINVAL);

	/* Descriptors. */
	for (i = 0; i < (int)NO_FDS; i++) {
		raio_prep_pread(&iocb, no_fds[i], buf, 1, 0, NULL);
		REFUSED(EBADF);
		raio_prep_fsync(&iocb, no_fds[i], 0);
		REFUSED(EBADF);
	}
	closed = raio_open(fd, "/ro/data.bin", O_RDONLY);
	MUST(closed > 0 && raio_close(closed) == 0);
	raio_prep_pread(&iocb, closed, buf, 1, 0, NULL);
	REFUSED(EBADF);
	other_session = session(argv);
	MUST(raio_open(other_session, "/ro/data.bin", O_RDONLY) == 0);
	raio_prep_pread(&iocb, other_session, buf, 1, 0, NULL);
	REFUSED(EBADF);

	/* Registrations. */
	MUST(raio_setup(fd, 4, &other) == 0);
	MUST(raio_reg_mr(ctx, buf + 1024, 1024, &mr) == 0);
	MUST(raio_reg_mr(other, buf, sizeof(buf), &others_mr) == 0);
	MUST(raio_reg_mr(ctx, buf, sizeof(buf), &old_mr) == 0);
	EQ(raio_dereg_mr(ctx, old_mr), 0);
	raio_prep_pread(&iocb, file, buf + 1023, 1, 0, mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf + 2048, 1, 0, mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf + 2047, 2, 0, mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf + 1023, 1024, 0, mr);
	REFUSED(EINVAL);
	raio_prep_pwrite(&iocb, writable, buf, sizeof(buf), 0, mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf, 1, 0, others_mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf, 1, 0, old_mr);
	REFUSED(EINVAL);
	raio_prep_pread(&iocb, file, buf, 1, 0, (raio_mr_t)&iov);
	REFUSED(EINVAL);
	iov[0].iov_base = buf + 1024;
	iov[0].iov_len = 10;
	iov[1].iov_base = buf + 2040;
	iov[1].iov_len = 10;
	raio_prep_preadv(&iocb, file, iov, 2, 0, mr);
	REFUSED(EINVAL);

	/* I/O that the open mode forbids: refused at once, or by the server. */
	raio_prep_pwrite(&iocb, file, buf, 1, 0, NULL);
	EQ(run_iocb(ctx, &iocb), -EBADF);

	/* An eventfd that is none: refused, or done without a tick. Once. */
	raio_prep_pread(&iocb, file, buf, 1, 0, NULL);
	raio_set_eventfd(&iocb, -1);
	i = (int)submit_one(ctx, &iocb);
	CHECK(i == 1 || i == -EINVAL || i == -EBADF);
	if (i == 1)
		EQ(raio_getevents(ctx, 1, 1, events, NULL), 1);
	EQ(raio_getevents(ctx, 0, 1, events, NULL), 0);

	/* Full. */
	MUST(raio_setup(fd, 4, &full) == 0);
	MUST((lines = malloc(8 * 512)) != NULL);
	struct raio_iocb eight[8];
	for (i = 0; i < 8; i++) {
		raio_prep_pread(&eight[i], file, lines + i * 512, 512, i * 512, NULL);
		ios[i] = &eight[i];
	}
	EQ(raio_submit(full, 8, ios), 4);
	EQ(raio_submit(full, 4, ios + 4), -EAGAIN);
	EQ(raio_submit(full, 1, ios + 4), -EAGAIN);
	EQ(raio_submit(full, 0, ios), 0);
	EQ(raio_getevents(full, 4, 8, events, NULL), 4);
	EQ(raio_submit(full, 4, ios + 4), 4);
	EQ(raio_destroy(full), 0);
	free(lines);

	/* Nothing that was refused has been written. */
	MUST(raio_fstat(writable, &st) == 0);
	EQ(st.st_size, 0);
	EQ(raio_close(writable), 0);
	EQ(raio_dereg_mr(ctx, mr), 0);
	EQ(raio_destroy(other), 0);
	EQ(raio_stop(other_session), 0);
}

static void nothing(int signal)
{
	(void)signal;
}

static void getevents(int fd, int file, raio_context_t ctx)
{
	struct timespec zero = { 0, 0 }, bad_nsec = { 0, 1000000000 }, negative_nsec = { 0, -1 }, negative = { -1, 0 },
			soon = { 0, 30000000 }, long_time = { 20, 0 };
	struct itimerspec every = { { 0, 20000000 }, { 0, 20000000 } }, never = { { 0, 0 }, { 0, 0 } };
	struct sigaction action;
	struct raio_event events[4], event;
	struct raio_iocb first, second;
	raio_context_t one;
	timer_t timer;
	struct sigevent notify;
	double start;

	EQ(raio_getevents(ctx, 0, 0, NULL, NULL), 0);
	EQ(raio_getevents(ctx, 0, 4, NULL, NULL), -EINVAL);
	EQ(raio_getevents(ctx, 1, 1, NULL, &zero), -EINVAL);
	EQ(raio_getevents(ctx, -1, 4, events, &zero), -EINVAL);
	EQ(raio_getevents(ctx, 0, -1, events, &zero), -EINVAL);
	EQ(raio_getevents(ctx, -2, -1, events, &zero), -EINVAL);
	EQ(raio_getevents(ctx, LONG_MIN, LONG_MIN, events, &zero), -EINVAL);
	EQ(raio_getevents(ctx, 2, 1, events, &zero), -EINVAL);
	EQ(raio_getevents(ctx, 1, 4, events, &bad_nsec), -EINVAL);
	EQ(raio_getevents(ctx, 1, 4, events, &negative_nsec), -EINVAL);
	EQ(raio_getevents(ctx, 1, 4, events, &negative), -EINVAL);
	/* Nothing in flight: nothing to wait for without a timeout. */
	start = seconds_now();
	EQ(raio_getevents(ctx, 1, 4, events, NULL), 0);
	EQ(raio_getevents(ctx, 4, 4, events, &soon), 0);
	EQ(raio_getevents(ctx, 0, 4, events, NULL), 0);
	EQ(raio_getevents(ctx, 0, 4, events, &long_time), 0);
	EQ(raio_getevents(ctx, 1, 4, events, &zero), 0);
	CHECK(seconds_now() - start < 5);

	/* A read that waits for the one lent buffer there is stays in flight as long as we like. */
	MUST(raio_setup(fd, 1, &one) == 0);
	raio_prep_pread(&first, file, NULL, 100, 0, NULL);
	EQ(submit_one(one, &first), 1);
	EQ(raio_getevents(one, 1, 1, &event, NULL), 1);
	raio_prep_pread(&second, file, NULL, 100, 100, NULL);
	EQ(submit_one(one, &second), 1);
	start = seconds_now();
	EQ(raio_getevents(one, 1, 4, events, &soon), 0);
	CHECK(seconds_now() - start >= 0.029);
	CHECK(seconds_now() - start < 5);
	EQ(raio_getevents(one, 0, 4, events, NULL), 0);
	EQ(raio_getevents(one, 1, 4, events, &zero), 0);
	/* The most that can be asked for with less in flight: waits for what there is, not for four. */
	memset(&action, 0, sizeof(action));
	action.sa_handler = nothing;
	MUST(sigaction(SIGUSR1, &action, NULL) == 0);
	memset(&notify, 0, sizeof(notify));
	notify.sigev_notify = SIGEV_SIGNAL;
	notify.sigev_signo = SIGUSR1;
	MUST(timer_create(CLOCK_MONOTONIC, &notify, &timer) == 0);
	MUST(timer_settime(timer, 0, &every, NULL) == 0);
	start = seconds_now();
	EQ(raio_getevents(one, 1, 4, events, NULL), -EINTR);
	EQ(raio_getevents(one, 1, 4, events, &long_time), -EINTR);
	CHECK(seconds_now() - start < 10);
	MUST(timer_settime(timer, 0, &never, NULL) == 0);
	timer_delete(timer);
	EQ(raio_release(one, 1, &event), 0);
	EQ(raio_getevents(one, 4, 4, events, NULL), 1);
	CHECK(events[0].obj == &second);
	EQ(raio_release(one, 1, events), 0);
	EQ(raio_destroy(one), 0);
}

static void release(int file, raio_context_t ctx)
{
	struct raio_iocb iocb;
	struct raio_event event, copy, two[2];

	EQ(raio_release(ctx, 0, NULL), 0);
	FAILS(raio_release(ctx, 1, NULL), EINVAL);
	raio_prep_pread(&iocb, file, NULL, 100, 0, NULL);
	EQ(submit_one(ctx, &iocb), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	FAILS(raio_release(ctx, -1, &event), EINVAL);
	FAILS(raio_release(ctx, LONG_MIN, &event), EINVAL);
	CHECK(is_data_bin(iocb.u.c.buf, 100, 0));
	copy = event;
	copy.handle ^= 0x5555;
	FAILS(raio_release(ctx, 1, &copy), EINVAL);
	copy.handle = ~0ull;
	FAILS(raio_release(ctx, 1, &copy), EINVAL);
	/* The others are released all the same. */
	two[0] = copy;
	two[1] = event;
	FAILS(raio_release(ctx, 2, two), EINVAL);
	FAILS(raio_release(ctx, 1, &event), EINVAL);
	/* A handle of old does not name the buffer's next loan. */
	copy = event;
	raio_prep_pread(&iocb, file, NULL, 100, 0, NULL);
	EQ(submit_one(ctx, &iocb), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	CHECK(copy.handle != event.handle);
	FAILS(raio_release(ctx, 1, &copy), EINVAL);
	CHECK(is_data_bin(iocb.u.c.buf, 100, 0));
	EQ(raio_release(ctx, 1, &event), 0);
}

static void cancel(int fd, int file, raio_context_t ctx)
{
	struct timespec zero = { 0, 0 };
	struct raio_event lent, event, evt;
	struct raio_iocb first, second, third;
	raio_context_t one = NULL;
	char buf[100];
	int i, cancelled = 0;
	long n;

	raio_prep_pread(&first, file, buf, sizeof(buf), 0, NULL);
	FAILS(raio_cancel(ctx, NULL, &evt), EINVAL);
	FAILS(raio_cancel(ctx, &first, NULL), EINVAL);
	FAILS(raio_cancel(ctx, &first, &evt), EINVAL);
	EQ(submit_one(ctx, &first), 1);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	FAILS(raio_cancel(ctx, &first, &evt), EINVAL);

	/* One that waits for a lent buffer has not been sent: cancelling it always works. */
	MUST(raio_setup(fd, 1, &one) == 0);
	raio_prep_pread(&first, file, NULL, 100, 0, NULL);
	EQ(submit_one(one, &first), 1);
	EQ(raio_getevents(one, 1, 1, &lent, NULL), 1);
	raio_prep_pread(&second, file, NULL, 100, 100, NULL);
	second.data = &third;
	EQ(submit_one(one, &second), 1);
	FAILS(raio_cancel(one, &second, NULL), EINVAL);
	/* In flight, but elsewhere. */
	FAILS(raio_cancel(ctx, &second, &evt), EINVAL);
	memset(&evt, 0xff, sizeof(evt));
	EQ(raio_cancel(one, &second, &evt), 0);
	EQ(evt.res, -ECANCELED);
	CHECK(evt.obj == &second);
	CHECK(evt.data == &third);
	EQ(evt.handle, 0);
	FAILS(raio_cancel(one, &second, &evt), EINVAL);
	EQ(raio_getevents(one, 1, 1, &event, NULL), 0);
	/* Its place is free again. */
	raio_prep_pread(&third, file, buf, sizeof(buf), 5, NULL);
	EQ(submit_one(one, &third), 1);
	EQ(raio_getevents(one, 1, 1, &event, NULL), 1);
	CHECK(event.obj == &third);
	EQ(raio_release(one, 1, &lent), 0);
	EQ(raio_getevents(one, 0, 1, &event, &zero), 0);
	EQ(raio_destroy(one), 0);

	/* One that has been sent: cancelled, or too late and then it comes by itself. Never both, never neither. */
	for (i = 0; i < 200; i++) {
		raio_prep_pread(&first, file, buf, sizeof(buf), i, NULL);
		MUST(submit_one(ctx, &first) == 1);
		errno = 0;
		n = raio_cancel(ctx, &first, &evt);
		if (n == 0) {
			cancelled++;
			EQ(evt.res, -ECANCELED);
			EQ(raio_getevents(ctx, 1, 1, &event, NULL), 0);
		} else {
			EQ(errno, EAGAIN);
			EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
			CHECK(event.obj == &first);
			EQ(event.res, sizeof(buf));
			CHECK(is_data_bin(buf, sizeof(buf), i));
		}
	}
	printf("misuse: %d of 200 cancelled after they were sent\n", cancelled);
}

/* Memory ----------------------------------------------------------------------------------------------------- */

static void memory(int fd, int file, raio_context_t ctx)
{
	static char buf[8192];
	raio_mr_t mr = NULL, others = NULL;
	struct raio_event event;
	struct raio_iocb iocb;
	raio_context_t other;
	char *allocated;

	FAILS(raio_reg_mr(ctx, NULL, 4096, &mr), EINVAL);
	FAILS(raio_reg_mr(ctx, buf, 0, &mr), EINVAL);
	FAILS(raio_reg_mr(ctx, buf, sizeof(buf), NULL), EINVAL);
	FAILS(raio_reg_mr(ctx, buf, SIZE_MAX, &mr), EINVAL);
	FAILS(raio_reg_mr(ctx, buf, SIZE_MAX - (uintptr_t)buf + 2, &mr), EINVAL);
	CHECK(mr == NULL);
	FAILS(raio_dereg_mr(ctx, NULL), EINVAL);
	FAILS(raio_dereg_mr(ctx, (raio_mr_t)buf), EINVAL);
	MUST(raio_setup(fd, 4, &other) == 0);
	MUST(raio_reg_mr(other, buf, sizeof(buf), &others) == 0);
	FAILS(raio_dereg_mr(ctx, others), EINVAL);
	EQ(raio_dereg_mr(other, others), 0);
	FAILS(raio_dereg_mr(other, others), EINVAL);
	/* Busy until the event is collected. */
	MUST(raio_reg_mr(ctx, buf, sizeof(buf), &mr) == 0);
	raio_prep_pread(&iocb, file, buf, sizeof(buf), 0, mr);
	EQ(submit_one(ctx, &iocb), 1);
	FAILS(raio_dereg_mr(ctx, mr), EBUSY);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, sizeof(buf));
	EQ(raio_dereg_mr(ctx, mr), 0);
	FAILS(raio_dereg_mr(ctx, mr), EINVAL);

	errno = 0;
	CHECK(raio_alloc(ctx, 0, &mr) == NULL);
	EQ(errno, EINVAL);
	errno = 0;
	CHECK(raio_alloc(ctx, SIZE_MAX, &mr) == NULL);
	CHECK(errno == ENOMEM || errno == EINVAL);
	errno = 0;
	CHECK(raio_alloc(ctx, SIZE_MAX / 2, &mr) == NULL);
	CHECK(errno == ENOMEM || errno == EINVAL);
	FAILS(raio_free(ctx, NULL), EINVAL);
	FAILS(raio_free(ctx, buf), EINVAL);
	allocated = raio_alloc(ctx, 10000, &mr);
	MUST(allocated != NULL && mr != NULL);
	FAILS(raio_free(ctx, allocated + 4096), EINVAL);
	raio_prep_pread(&iocb, file, allocated, 10000, 0, mr);
	EQ(submit_one(ctx, &iocb), 1);
	FAILS(raio_free(ctx, allocated), EBUSY);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, 10000);
	CHECK(is_data_bin(allocated, 10000, 0));
	EQ(raio_free(ctx, allocated), 0);
	FAILS(raio_free(ctx, allocated), EINVAL);
	raio_prep_pread(&iocb, file, buf, 1, 0, mr);
	EQ(submit_one(ctx, &iocb), -EINVAL);
	EQ(raio_destroy(other), 0);
}

/* Information ------------------------------------------------------------------------------------------------ */

static void *errmsg_of_a_new_thread(void *failed)
{
	if (strcmp(raio_errmsg(), ""))
		*(int *)failed += 1;
	raio_stop(-1);
	if (!raio_errmsg()[0])
		*(int *)failed += 2;
	return NULL;
}

static void information(raio_context_t ctx)
{
	union {
		struct raio_stats stats;
		unsigned char bytes[sizeof(struct raio_stats) + 64];
	} wide;
	char message[1024];
	pthread_t thread;
	int failed = 0;

	EQ(raio_abi_version() >> 16, RAIO_ABI_MAJOR);
	CHECK(raio_abi_version() >= RAIO_ABI_VERSION);
	FAILS(raio_get_stats(ctx, NULL, sizeof(wide.stats)), EINVAL);
	/* A newer header's struct is longer than this library knows, an older one's shorter. */
	memset(&wide, 0xa5, sizeof(wide));
	EQ(raio_get_stats(ctx, &wide.stats, sizeof(wide)), 0);
	EQ(wide.stats.size, sizeof(wide.stats));
	CHECK(is_all(wide.bytes + sizeof(wide.stats), 64, 0xa5));
	memset(&wide, 0xa5, sizeof(wide));
	EQ(raio_get_stats(ctx, &wide.stats, 16), 0);
	EQ(wide.stats.size, 16);
	CHECK(is_all(wide.bytes + 16, sizeof(wide) - 16, 0xa5));

	/* The sentence is the thread's own. */
	FAILS(raio_stop(-1), EBADF);
	snprintf(message, sizeof(message), "%s", raio_errmsg());
	MUST(pthread_create(&thread, NULL, errmsg_of_a_new_thread, &failed) == 0);
	pthread_join(thread, NULL);
	EQ(failed, 0);
	EQ(strcmp(message, raio_errmsg()), 0);
}

/* After raio_stop() ------------------------------------------------------------------------------------------ */

static void dead_context(char **argv)
{
	struct raio_iocb iocb, waiting;
	struct timespec zero = { 0, 0 };
	struct raio_event event, lent;
	raio_context_t ctx;
	raio_mr_t mr;
	char buf[64], *allocated;
	int fd;

	fd = session(argv);
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, 4, &ctx) == 0);
	MUST(raio_reg_mr(ctx, buf, sizeof(buf), &mr) == 0);
	MUST((allocated = raio_alloc(ctx, 4096, NULL)) != NULL);
	raio_prep_pread(&iocb, fd, NULL, 100, 0, NULL);
	EQ(submit_one(ctx, &iocb), 1);
	EQ(raio_getevents(ctx, 1, 1, &lent, NULL), 1);
	raio_prep_pread(&waiting, fd, buf, sizeof(buf), 0, mr);
	EQ(submit_one(ctx, &waiting), 1);
	EQ(raio_stop(fd), 0);
	EQ(submit_one(ctx, &iocb), -ENOTCONN);
	EQ(raio_getevents(ctx, 1, 1, &event, NULL), -ENOTCONN);
	EQ(raio_getevents(ctx, 0, 1, &event, &zero), -ENOTCONN);
	FAILS_EITHER(raio_cancel(ctx, &waiting, &event), ENOTCONN, EINVAL);
	FAILS(raio_poll_fd(ctx), ENOTCONN);
	/* What was lent is the caller's until the context goes. */
	CHECK(is_data_bin(lent.obj->u.c.buf, 100, 0));
	/* Memory outlives the context that it came from. */
	memset(allocated, 1, 4096);
	EQ(raio_destroy(ctx), 0);
	memset(allocated, 2, 4096);
	EQ(raio_free(ctx, allocated), 0);
	FAILS(raio_free(ctx, allocated), EINVAL);
	calls_without_context(ctx);
}

int main(int argc, char **argv)
{
	static long long zeros[512];
	raio_context_t ctx, destroyed;
	char buf[1000];
	int fd, file;

	begin(argc, argv);
	EQ(strcmp(raio_errmsg(), ""), 0);
	peers_that_are_no_servers();
	start(argv);
	connect_(argv);
	stop(argv);
	open_(argv);
	fstat_and_close(argv);
	setup_and_destroy(argv);
	dead_context(argv);

	fd = session(argv);
	file = fd;
	MUST(raio_open(fd, "/ro/data.bin", O_RDONLY) == 0);
	MUST(raio_setup(fd, 16, &destroyed) == 0);
	MUST(raio_setup(fd, 16, &ctx) == 0);
	EQ(raio_destroy(destroyed), 0);
	calls_without_context(NULL);
	calls_without_context(destroyed);
	calls_without_context((raio_context_t)&zeros);
	submit(argv, fd, file, ctx);
	getevents(fd, file, ctx);
	release(file, ctx);
	cancel(fd, file, ctx);
	memory(fd, file, ctx);
	information(ctx);
	/* It all came to nothing: the session goes on. */
	EQ(read_at(ctx, file, buf, sizeof(buf), 12345), sizeof(buf));
	CHECK(is_data_bin(buf, sizeof(buf), 12345));
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	return finish("misuse");
}
