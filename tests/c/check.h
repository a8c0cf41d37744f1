/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the C tests share: checks that print one line when they fail and go on, and the way to a server.
 *
 * A program takes HOST PORT (or the path of a Unix socket, and any PORT), or a raio URL, and further words of its own. It calls begin(), checks, and returns
 * finish(). What a later step cannot do without is MUST(). A program that hangs is ended by SIGALRM.
 *
 * The server offers /rw (writable), /ro (read-only, with data.bin and empty), /mem and /null.
 */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <libraio.h>

#define DATA_BIN_BYTES ((1 << 20) + 1234)

static int checks_done;
static int checks_failed;

static inline void check_failed(const char *file, int line, const char *expression, const char *format, long long got,
				long long expected)
{
	__sync_fetch_and_add(&checks_failed, 1);
	printf("%s:%d: %s: ", file, line, expression);
	printf(format, got, expected);
	printf("; errno %d (%s); \"%s\"\n", errno, strerror(errno), raio_errmsg());
	fflush(stdout);
}

/* Any two integers. Evaluates each once. */
#define EQ(expression, want)                                                                                       \
	do {                                                                                                       \
		long long got_ = (long long)(expression), want_ = (long long)(want);                               \
		__sync_fetch_and_add(&checks_done, 1);                                                             \
		if (got_ != want_)                                                                                 \
			check_failed(__FILE__, __LINE__, #expression, "got %lld, expected %lld", got_, want_);     \
	} while (0)

#define CHECK(condition)                                                                                           \
	do {                                                                                                       \
		__sync_fetch_and_add(&checks_done, 1);                                                             \
		if (!(condition))                                                                                  \
			check_failed(__FILE__, __LINE__, #condition, "got %lld, expected other than %lld", 0, 0);  \
	} while (0)

/* -1 and this errno */
#define FAILS(expression, want_errno)                                                                              \
	do {                                                                                                       \
		long long got_;                                                                                    \
		errno = 0;                                                                                         \
		got_ = (long long)(expression);                                                                    \
		__sync_fetch_and_add(&checks_done, 1);                                                             \
		if (got_ != -1 || errno != (want_errno))                                                           \
			check_failed(__FILE__, __LINE__, #expression, "got %lld, expected -1 with errno %lld",     \
				     got_, (long long)(want_errno));                                               \
		else if (!raio_errmsg()[0])                                                                        \
			check_failed(__FILE__, __LINE__, #expression, "raio_errmsg() is silent", 0, 0);            \
	} while (0)

/* -1 and one of two errnos, where the header leaves it open */
#define FAILS_EITHER(expression, one, other)                                                                       \
	do {                                                                                                       \
		long long got_;                                                                                    \
		errno = 0;                                                                                         \
		got_ = (long long)(expression);                                                                    \
		__sync_fetch_and_add(&checks_done, 1);                                                             \
		if (got_ != -1 || (errno != (one) && errno != (other)))                                            \
			check_failed(__FILE__, __LINE__, #expression, "got %lld, expected -1 with errno " #one     \
				     " or " #other " (%lld)", got_, (long long)(one));                             \
	} while (0)

/* A step that the rest stands on. */
#define MUST(condition)                                                                                            \
	do {                                                                                                       \
		__sync_fetch_and_add(&checks_done, 1);                                                             \
		if (!(condition)) {                                                                                \
			check_failed(__FILE__, __LINE__, #condition, "got %lld, cannot go on (%lld)", 0, 0);       \
			exit(1);                                                                                   \
		}                                                                                                  \
	} while (0)

static inline int finish(const char *name)
{
	printf("%s: %d checks, %d failed\n", name, checks_done, checks_failed);
	return checks_failed ? 1 : 0;
}

/* How many words of the command line name the server: 1 for a URL, 2 for HOST PORT. Further ones begin after them. */
static inline int server_words(int argc, char **argv)
{
	if (argc > 1 && strstr(argv[1], "://"))
		return 1;
	if (argc > 2)
		return 2;
	fprintf(stderr, "usage: %s HOST PORT [...]   or   %s raio://HOST:PORT [...]\n", argv[0], argv[0]);
	exit(2);
}

static inline void begin(int argc, char **argv)
{
	const char *seconds = getenv("CHECK_SECONDS");

	server_words(argc, argv);
	setvbuf(stdout, NULL, _IOLBF, 0);
	alarm(seconds ? (unsigned int)atoi(seconds) : 120);
}

/* The server as host and port, whichever way it was given. */
static inline void server_name(char **argv, char *host, size_t host_len, char *port, size_t port_len)
{
	const char *at = strstr(argv[1], "://"), *colon;

	if (!at) {
		snprintf(host, host_len, "%s", argv[1]);
		snprintf(port, port_len, "%s", argv[2]);
		return;
	}
	at += 3;
	colon = strrchr(at, ':');
	if (!colon || strchr(colon, ']'))
		colon = at + strlen(at);
	if (*at == '[')
		snprintf(host, host_len, "%.*s", (int)(colon - at - 2), at + 1);
	else
		snprintf(host, host_len, "%.*s", (int)(colon - at), at);
	snprintf(port, port_len, "%s", *colon ? colon + 1 : "7240");
}

static inline socklen_t server_address(char **argv, struct sockaddr_storage *address)
{
	struct addrinfo hints, *found;
	char host[256], port[32];
	socklen_t len;

	memset(&hints, 0, sizeof(hints));
	hints.ai_socktype = SOCK_STREAM;
	server_name(argv, host, sizeof(host), port, sizeof(port));
	if (getaddrinfo(host, port, &hints, &found)) {
		fprintf(stderr, "%s: Nobody knows the address of %s port %s.\n", argv[0], host, port);
		exit(2);
	}
	len = found->ai_addrlen;
	memcpy(address, found->ai_addr, len);
	freeaddrinfo(found);
	return len;
}

/* Whether the path of a Unix socket was given in the place of HOST. */
static inline int is_unix(char **argv)
{
	return argv[1][0] == '/';
}

/* The server's URL, with this scheme unless it is a Unix socket. */
static inline void server_url(char **argv, const char *scheme, char *url, size_t len)
{
	char host[256], port[32];

	if (is_unix(argv)) {
		snprintf(url, len, "raio+unix:///?socket=%s", argv[1]);
		return;
	}
	server_name(argv, host, sizeof(host), port, sizeof(port));
	snprintf(url, len, strchr(host, ':') ? "%s://[%s]:%s" : "%s://%s:%s", scheme, host, port);
}

/* A session with the server, with these RAIO_OPT_*. */
static inline int session_with(char **argv, unsigned int flags)
{
	struct raio_options options = { .size = sizeof(options), .flags = flags };
	char url[320];
	int fd;

	if (strstr(argv[1], "://"))
		snprintf(url, sizeof(url), "%s", argv[1]);
	else
		server_url(argv, "raio+tcp", url, sizeof(url));
	fd = raio_connect(url, &options);
	MUST(fd > 0);
	return fd;
}

/* A session with the server: by raio_connect() if a URL was given, else by raio_start(). */
static inline int session(char **argv)
{
	struct sockaddr_storage address;
	struct sockaddr_un local;
	socklen_t len;
	int fd;

	if (strstr(argv[1], "://")) {
		fd = raio_connect(argv[1], NULL);
	} else if (is_unix(argv)) {
		memset(&local, 0, sizeof(local));
		local.sun_family = AF_UNIX;
		snprintf(local.sun_path, sizeof(local.sun_path), "%s", argv[1]);
		fd = raio_start("unix", (struct sockaddr *)&local, sizeof(local));
	} else {
		len = server_address(argv, &address);
		fd = raio_start("tcp", (struct sockaddr *)&address, len);
	}
	MUST(fd > 0);
	return fd;
}

/* A name in /rw that no other run uses. */
static inline const char *fresh_path(char *path, size_t len, const char *word)
{
	static int count;

	snprintf(path, len, "/rw/c-%s-%ld-%d", word, (long)getpid(), __sync_add_and_fetch(&count, 1));
	return path;
}

/* One operation from submit to event. Returns its res. */
static inline long run_iocb(raio_context_t ctx, struct raio_iocb *iocb)
{
	struct raio_event event;
	long n;

	n = raio_submit(ctx, 1, &iocb);
	if (n != 1)
		return n;
	do
		n = raio_getevents(ctx, 1, 1, &event, NULL);
	while (n == -EINTR);
	if (n != 1)
		return n < 0 ? n : -EIO;
	CHECK(event.obj == iocb);
	CHECK(event.data == iocb->data);
	return (long)event.res;
}

static inline long read_at(raio_context_t ctx, int fd, void *buf, size_t len, long long offset)
{
	struct raio_iocb iocb;

	raio_prep_pread(&iocb, fd, buf, len, offset, NULL);
	return run_iocb(ctx, &iocb);
}

static inline long write_at(raio_context_t ctx, int fd, const void *buf, size_t len, long long offset)
{
	struct raio_iocb iocb;

	raio_prep_pwrite(&iocb, fd, (void *)buf, len, offset, NULL);
	return run_iocb(ctx, &iocb);
}

/* What /ro/data.bin holds at this offset. */
static inline unsigned char data_bin_byte(long long i)
{
	return (unsigned char)((i * 7 + i / 251) & 0xff);
}

/* Whether these bytes are data.bin's from this offset on. */
static inline int is_data_bin(const void *buf, long len, long long offset)
{
	const unsigned char *bytes = buf;
	long i;

	for (i = 0; i < len; i++)
		if (bytes[i] != data_bin_byte(offset + i))
			return 0;
	return 1;
}

/* A pattern that tells files and offsets apart. */
static inline unsigned char pattern_byte(unsigned int seed, long long i)
{
	return (unsigned char)(seed * 37 + (unsigned long long)i * 11 + (unsigned long long)i / 509);
}

static inline void fill_pattern(void *buf, long len, unsigned int seed, long long offset)
{
	unsigned char *bytes = buf;
	long i;

	for (i = 0; i < len; i++)
		bytes[i] = pattern_byte(seed, offset + i);
}

static inline int is_pattern(const void *buf, long len, unsigned int seed, long long offset)
{
	const unsigned char *bytes = buf;
	long i;

	for (i = 0; i < len; i++)
		if (bytes[i] != pattern_byte(seed, offset + i))
			return 0;
	return 1;
}

static inline int is_all(const void *buf, long len, unsigned char value)
{
	const unsigned char *bytes = buf;
	long i;

	for (i = 0; i < len; i++)
		if (bytes[i] != value)
			return 0;
	return 1;
}

static inline double seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

#endif /* CHECK_H */
