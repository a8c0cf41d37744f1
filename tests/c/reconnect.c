/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The server is away for a while: meanwhile calls say what they wait for, and afterwards everything goes on.
 *
 * Prints "ready" when the server is to be killed, and reads a line when that has been done; prints "away" when it is to
 * be started again, and reads another line.
 */
#define _GNU_SOURCE
#include "check.h"

#define DEPTH 4
#define BYTES 4096
#define PATIENCE_S 60

static void wait_for_a_line(const char *word)
{
	char line[16];

	printf("%s\n", word);
	fflush(stdout);
	MUST(fgets(line, sizeof(line), stdin) != NULL);
}

static int says(const char *word)
{
	return strstr(raio_errmsg(), word) != NULL;
}

/* A wait that brings nothing says why, once the connection is known to be lost. */
static void wait_in_vain(raio_context_t ctx, const char *word)
{
	double end = seconds_now() + PATIENCE_S;

	do {
		struct timespec timeout = { .tv_nsec = 20 * 1000 * 1000 };
		struct raio_event event;

		MUST(seconds_now() < end);
		EQ(raio_getevents(ctx, 1, 1, &event, &timeout), 0);
	} while (!says(word));
}

int main(int argc, char **argv)
{
	static struct raio_iocb iocbs[DEPTH + 1];
	static char memory[BYTES];
	struct raio_options options = { .size = sizeof(options), .call_timeout_ms = 200 };
	struct raio_iocb *io = &iocbs[0];
	struct timespec now = { 0 };
	struct raio_event event;
	struct raio_stats stats;
	raio_context_t ctx;
	char host[256], port[16], url[320], path[64];
	int fd, file, i;

	begin(argc, argv);
	server_name(argv, host, sizeof(host), port, sizeof(port));
	snprintf(url, sizeof(url), "raio+tcp://%s:%s", host, port);
	MUST((fd = raio_connect(url, &options)) > 0);
	fresh_path(path, sizeof(path), "reconnect");
	file = raio_open(fd, path, O_RDWR | O_CREAT);
	file = file ? file : fd;
	MUST(file > 0);
	MUST(raio_setup(fd, DEPTH, &ctx) == 0);
	raio_prep_pwrite(io, file, memory, BYTES, 0, NULL);
	MUST(raio_submit(ctx, 1, &io) == 1);
	MUST(raio_getevents(ctx, 1, 1, &event, NULL) == 1);
	EQ(event.res, BYTES);
	EQ(raio_getevents(ctx, 0, 1, &event, &now), 0);
	EQ(strcmp(raio_errmsg(), ""), 0);

	wait_for_a_line("ready");
	wait_in_vain(ctx, "The connection to the server was lost ");
	wait_in_vain(ctx, " s ago, and is being made again: Cannot connect to 127.0.0.1:");
	CHECK(says("Connection refused"));

	/* What it takes meanwhile waits. */
	for (i = 0; i < DEPTH; i++) {
		raio_prep_pwrite(&iocbs[i], file, memory, BYTES, (long long)i * BYTES, NULL);
		io = &iocbs[i];
		EQ(raio_submit(ctx, 1, &io), 1);
	}
	raio_prep_fsync(&iocbs[DEPTH], file, 0);
	io = &iocbs[DEPTH];
	EQ(raio_submit(ctx, 1, &io), -EAGAIN);
	CHECK(says("The context is full.") && says("is being made again"));
	FAILS(raio_open(fd, "/mem", O_RDWR), ETIMEDOUT);
	CHECK(says("is being made again") && says("did not wait longer"));

	wait_for_a_line("away");
	for (i = 0; i < DEPTH; i++) {
		MUST(raio_getevents(ctx, 1, 1, &event, NULL) == 1);
		EQ(event.res, BYTES);
	}
	EQ(raio_getevents(ctx, 0, 1, &event, &now), 0);
	EQ(strcmp(raio_errmsg(), ""), 0);
	EQ(raio_get_stats(ctx, &stats, sizeof(stats)), 0);
	EQ(stats.reconnects, 1);
	EQ(stats.unknown, 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_stop(fd), 0);
	return finish("reconnect");
}
