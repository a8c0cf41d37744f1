/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What programs rely on that were written for libaio: its calls, through the shim, where they are easily got wrong. */
#define _GNU_SOURCE
#include "check.h"
#include "libaio-shim.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>

#define PAGE 4096
#define PAGES 8

static int file;

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static long one(io_context_t ctx, struct iocb *io)
{
	struct io_event event;
	int n = io_submit(ctx, 1, &io);

	if (n != 1)
		return n;
	MUST(io_getevents(ctx, 1, 1, &event, NULL) == 1);
	CHECK(event.obj == io);
	return (long)event.res;
}

static void a_live_context_is_not_overwritten(void)
{
	io_context_t ctx = NULL, same;

	EQ(io_setup(-1, &ctx), -EINVAL);
	EQ(io_setup(0, &ctx), -EINVAL);
	MUST(io_setup(1, &ctx) == 0);
	same = ctx;
	EQ(io_setup(1, &ctx), -EINVAL);
	CHECK(ctx == same);
	CHECK(raio_errmsg()[0]);
	EQ(io_destroy(ctx), 0);
	EQ(io_destroy(ctx), -EINVAL);
	/* What is not alive any more may be there. */
	EQ(io_setup(1, &ctx), 0);
	EQ(io_destroy(ctx), 0);
}

static void an_unreadable_buffer_fails_its_own_iocb_alone(io_context_t ctx)
{
	static char before[PAGES * PAGE], after[PAGES * PAGE];
	char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iocb iocbs[6], *ios[6];
	struct iovec good[2], bad[2];
	struct io_event events[6];
	long want[6];
	int i, round;
	raio_mr_t mr;

	MUST(memory != MAP_FAILED);
	memset(memory, 'm', PAGES * PAGE);
	memset(before, 'b', sizeof(before));
	io_prep_pwrite(&iocbs[0], file, before, sizeof(before), 0);
	EQ(one(ctx, &iocbs[0]), sizeof(before));
	/* It has been good before. */
	io_prep_pwrite(&iocbs[0], file, memory + 2 * PAGE, PAGE, 6 * PAGE);
	EQ(one(ctx, &iocbs[0]), PAGE);
	MUST(raio_reg_mr(ctx, memory, PAGES * PAGE, &mr) == 0);
	MUST(mprotect(memory + 2 * PAGE, PAGE, PROT_NONE) == 0);
	MUST(munmap(memory + 5 * PAGE, PAGE) == 0);
	good[0].iov_base = memory;
	good[0].iov_len = 10;
	good[1].iov_base = memory + PAGE;
	good[1].iov_len = PAGE;
	bad[0] = good[0];
	bad[1].iov_base = memory + 5 * PAGE - 100;
	bad[1].iov_len = 200;
	for (round = 0; round < 2; round++) {
		io_prep_pwrite(&iocbs[0], file, memory, PAGE, 0);
		want[0] = PAGE;
		io_prep_pwrite(&iocbs[1], file, memory + 2 * PAGE, 100, 2 * PAGE);
		want[1] = -EFAULT;
		/* Its end alone: much of it could have been sent. */
		io_prep_pwrite(&iocbs[2], file, memory + 3 * PAGE, 2 * PAGE + 1, 2 * PAGE);
		want[2] = -EFAULT;
		io_prep_pwritev(&iocbs[3], file, bad, 2, 2 * PAGE);
		want[3] = -EFAULT;
		io_prep_pwritev(&iocbs[4], file, good, 2, 0);
		want[4] = 10 + PAGE;
		io_prep_pread(&iocbs[5], file, after, PAGE, 3 * PAGE);
		want[5] = PAGE;
		for (i = 0; i < 6; i++) {
			if (round == 1 && i == 2)
				iocbs[i].u.c.mr = mr;
			ios[i] = &iocbs[i];
		}
		EQ(io_submit(ctx, 6, ios), 6);
		MUST(io_getevents(ctx, 6, 6, events, NULL) == 6);
		for (i = 0; i < 6; i++)
			EQ((long)events[i].res, want[events[i].obj - iocbs]);
	}
	EQ(raio_dereg_mr(ctx, mr), 0);
	/* The connection lives, and nothing of the bad ones is in the file. */
	io_prep_pread(&iocbs[0], file, after, sizeof(after), 0);
	EQ(one(ctx, &iocbs[0]), sizeof(after));
	EQ(memcmp(after + 2 * PAGE, before, 4 * PAGE), 0);
	munmap(memory, 5 * PAGE);
	munmap(memory + 6 * PAGE, 2 * PAGE);
}

/* A limit on the size of the process's own files says nothing about remote ones. */
static void a_limit_on_file_sizes_bounds_no_remote_write(io_context_t ctx)
{
	static char buf[32 * PAGE];
	struct rlimit before, limit;
	struct iocb one_page, many;
	long done[2][2];
	int i;

	MUST(getrlimit(RLIMIT_FSIZE, &before) == 0);
	limit = before;
	fflush(stdout);
	for (i = 0; i < 2; i++) {
		limit.rlim_cur = i ? 10 : 0;
		MUST(setrlimit(RLIMIT_FSIZE, &limit) == 0);
		io_prep_pwrite(&one_page, file, buf, PAGE, 0);
		io_prep_pwrite(&many, file, buf, sizeof(buf), 0);
		done[i][0] = one(ctx, &one_page);
		done[i][1] = one(ctx, &many);
	}
	MUST(setrlimit(RLIMIT_FSIZE, &before) == 0);
	for (i = 0; i < 2; i++) {
		EQ(done[i][0], PAGE);
		EQ(done[i][1], sizeof(buf));
	}
}

static void a_tick_goes_to_the_eventfd_that_was_submitted(io_context_t ctx)
{
	static char buf[PAGE];
	char path[] = "/tmp/libaio-test-XXXXXX";
	struct iocb io, *ios = &io;
	struct io_event event;
	int ticks = eventfd(0, EFD_NONBLOCK), held = dup(ticks), plain = mkstemp(path), closed;
	unsigned long long count = 0;

	MUST(ticks >= 0 && held >= 0 && plain >= 0);
	unlink(path);
	io_prep_pread(&io, file, buf, PAGE, 0);
	io_set_eventfd(&io, plain);
	EQ(io_submit(ctx, 1, &ios), -EINVAL);
	io_set_eventfd(&io, -1);
	EQ(io_submit(ctx, 1, &ios), -EINVAL);
	closed = dup(plain);
	close(closed);
	io_set_eventfd(&io, closed);
	EQ(io_submit(ctx, 1, &ios), -EBADF);

	/* Its number is another file's when the iocb ends. */
	io_set_eventfd(&io, ticks);
	MUST(io_submit(ctx, 1, &ios) == 1);
	MUST(dup2(plain, ticks) == ticks);
	EQ(io_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(lseek(plain, 0, SEEK_END), 0);
	EQ(read(held, &count, sizeof(count)), sizeof(count));
	EQ(count, 1);
	close(ticks);
	close(held);
	close(plain);
}

/* As with libaio, an eventfd is held by the iocbs in flight, and takes a descriptor once rather than for each of them. */
static void one_eventfd_takes_one_descriptor(void)
{
	enum { IOCBS = 200 };
	static char buf[IOCBS];
	static struct iocb iocbs[IOCBS];
	static struct io_event events[IOCBS];
	struct rlimit before, limit;
	struct iocb *io;
	io_context_t ctx = NULL;
	int ticks = eventfd(0, EFD_NONBLOCK), other = eventfd(0, EFD_NONBLOCK), spare, i, n;
	unsigned long long count = 0;

	MUST(ticks >= 0 && other >= 0 && io_setup(IOCBS, &ctx) == 0);
	/* Room for few more. */
	spare = dup(ticks);
	close(spare);
	MUST(getrlimit(RLIMIT_NOFILE, &before) == 0);
	limit = before;
	limit.rlim_cur = (rlim_t)spare + 8;
	MUST(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	for (n = 0; n < IOCBS; n++) {
		/* In the middle its number becomes that of another, which has the ticks of the second half. */
		if (n == IOCBS / 2)
			MUST((spare = dup(ticks)) >= 0 && dup2(other, ticks) == ticks);
		io = &iocbs[n];
		io_prep_pread(io, file, buf + n, 1, n);
		io_set_eventfd(io, ticks);
		if (io_submit(ctx, 1, &io) != 1)
			break;
	}
	EQ(n, IOCBS);
	MUST(setrlimit(RLIMIT_NOFILE, &before) == 0);
	EQ(io_getevents(ctx, n, IOCBS, events, NULL), n);
	for (i = 0; i < n; i++)
		EQ((long)events[i].res, 1);
	EQ(read(spare, &count, sizeof(count)), sizeof(count));
	EQ(count, IOCBS / 2);
	EQ(read(other, &count, sizeof(count)), sizeof(count));
	EQ(count, IOCBS / 2);
	EQ(io_destroy(ctx), 0);
	close(spare);
	close(ticks);
	close(other);
}

static void a_full_eventfd_holds_nothing_up(io_context_t ctx)
{
	static char buf[PAGE];
	unsigned long long count = ~0ull - 1;
	struct iocb io, *ios = &io;
	int full = eventfd(0, 0);

	MUST(full >= 0 && write(full, &count, sizeof(count)) == sizeof(count));
	io_prep_pread(&io, file, buf, PAGE, 0);
	io_set_eventfd(&io, full);
	EQ(one(ctx, &io), PAGE);
	/* Nor when nobody collects. */
	MUST(io_submit(ctx, 1, &ios) == 1);
	EQ(io_destroy(ctx), 0);
	EQ(read(full, &count, sizeof(count)), sizeof(count));
	EQ(count, ~0ull - 1);
	close(full);
}

static void a_timeout_is_slept_out(io_context_t ctx)
{
	static char buf[PAGE];
	struct timespec tenth = { 0, 100000000 }, none = { 0, 0 };
	struct pollfd arrived = { raio_poll_fd(ctx), POLLIN, 0 };
	struct iocb io, *ios = &io;
	struct io_event events[2];
	double begin = seconds();

	EQ(io_getevents(ctx, 1, 1, events, &tenth), 0);
	CHECK(seconds() - begin >= 0.1);
	io_prep_pread(&io, file, buf, PAGE, 0);
	MUST(io_submit(ctx, 1, &ios) == 1);
	/* However long the answer takes. */
	MUST(poll(&arrived, 1, 20000) == 1);
	begin = seconds();
	EQ(io_getevents(ctx, 2, 2, events, &tenth), 1);
	CHECK(seconds() - begin >= 0.1);
	EQ(io_getevents(ctx, 1, 1, events, &none), 0);
	/* Without one there is nothing to wait for. */
	EQ(io_getevents(ctx, 1, 1, events, NULL), 0);
}

static void on_alarm(int signal)
{
	(void)signal;
}

/* getevents alone is interrupted. */
static void signals(io_context_t ctx)
{
	static char buf[PAGE];
	struct sigaction action, old;
	struct itimerval often = { { 0, 200 }, { 0, 200 } }, never = { { 0, 0 }, { 0, 0 } };
	struct timespec second = { 1, 0 };
	struct io_event event;
	struct stat64 status;
	struct iocb io;
	io_context_t other;
	int i, fd;
	double begin;

	memset(&action, 0, sizeof(action));
	action.sa_handler = on_alarm;
	action.sa_flags = SA_RESTART;
	MUST(sigaction(SIGALRM, &action, &old) == 0);
	alarm(0);
	MUST(setitimer(ITIMER_REAL, &often, NULL) == 0);
	begin = seconds();
	EQ(io_getevents(ctx, 1, 1, &event, &second), -EINTR);
	CHECK(seconds() - begin < 0.9);
	for (i = 0; i < 20; i++) {
		other = NULL;
		fd = raio_open(shim_session, "/ro/data.bin", O_RDONLY);
		CHECK(fd > 0);
		EQ(raio_fstat(fd, &status), 0);
		EQ(raio_close(fd), 0);
		MUST(io_setup(1, &other) == 0);
		io_prep_pread(&io, file, buf, PAGE, 0);
		{
			struct iocb *ios = &io;
			MUST(io_submit(other, 1, &ios) == 1);
		}
		EQ(io_destroy(other), 0);
	}
	MUST(setitimer(ITIMER_REAL, &never, NULL) == 0);
	MUST(sigaction(SIGALRM, &old, NULL) == 0);
	alarm(60);
}

/* Each failure of a batch has its own text, and raio_errmsg() is one array. */
static void texts(io_context_t ctx)
{
	struct iocb iocbs[3], *ios[3];
	struct io_event events[3];
	const char *message = raio_errmsg();
	static char buf[16];
	char *hole = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int i, readable = raio_open(shim_session, "/ro/data.bin", O_RDONLY);

	MUST(readable > 0 && hole != MAP_FAILED);
	EQ(strcmp(message, ""), 0);
	EQ(raio_open(shim_session, "/nowhere/at/all", O_RDONLY), -1);
	CHECK(raio_errmsg() == message && message[0]);
	io_prep_pwrite(&iocbs[0], file, hole, 16, 0);
	io_prep_pwrite(&iocbs[1], readable, buf, 16, 0);
	io_prep_pread(&iocbs[2], readable, buf, 16, 0);
	for (i = 0; i < 3; i++)
		ios[i] = &iocbs[i];
	EQ(io_submit(ctx, 3, ios), 3);
	EQ(strcmp(message, ""), 0);
	MUST(io_getevents(ctx, 3, 3, events, NULL) == 3);
	CHECK(message[0]);
	for (i = 0; i < 3; i++) {
		const char *text = raio_event_errmsg(ctx, &events[i]);

		if (events[i].obj == &iocbs[0])
			CHECK(strstr(text, "cannot be read") != NULL);
		else if (events[i].obj == &iocbs[1])
			CHECK(text[0] && !strstr(text, "cannot be read"));
		else
			EQ(strcmp(text, ""), 0);
	}
	errno = 0;
	EQ(strcmp(raio_event_errmsg(ctx, NULL), ""), 0);
	EQ(errno, EINVAL);
	EQ(raio_close(readable), 0);
	EQ(strcmp(message, ""), 0);
	munmap(hole, PAGE);
}

/* The text of a cancelled iocb is not that of its failure before, which stays valid all the same. */
static void the_text_of_an_iocb_that_is_used_again(void)
{
	struct iocb lent, io, *ios = &io;
	struct io_event event, evt;
	char *hole = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	io_context_t ctx = NULL;
	const char *text = "";
	int asked;

	MUST(hole != MAP_FAILED && io_setup(1, &ctx) == 0);
	/* While the one lent buffer is out, a second read of that kind waits, and cancelling it always works. */
	io_prep_pread(&lent, file, NULL, 1, 0);
	EQ(one(ctx, &lent), 1);
	for (asked = 0; asked < 2; asked++) {
		io_prep_pwrite(&io, file, hole, 16, 0);
		MUST(io_submit(ctx, 1, &ios) == 1);
		EQ(io_getevents(ctx, 1, 1, &event, NULL), 1);
		EQ((long)event.res, -EFAULT);
		if (asked)
			text = raio_event_errmsg(ctx, &event);
		io_prep_pread(&io, file, NULL, 1, 0);
		MUST(io_submit(ctx, 1, &ios) == 1);
		EQ(io_cancel(ctx, &io, &evt), 0);
		EQ(strcmp(raio_errmsg(), ""), 0);
		EQ((long)evt.res, -ECANCELED);
		CHECK(strstr(raio_event_errmsg(ctx, &evt), "cancelled") != NULL);
	}
	CHECK(strstr(text, "cannot be read") != NULL);
	EQ(io_destroy(ctx), 0);
	munmap(hole, PAGE);
}

static void a_child_has_nothing_of_its_parents(io_context_t ctx)
{
	static char buf[PAGE];
	struct iocb io, *ios = &io;
	struct io_event event;
	struct timespec none = { 0, 0 };
	void *memory = raio_alloc(ctx, PAGE, NULL);
	int status;
	pid_t child;

	MUST(memory != NULL);
	io_prep_pread(&io, file, buf, PAGE, 0);
	MUST(io_submit(ctx, 1, &ios) == 1);
	fflush(stdout);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		int before = checks_failed;
		struct iocb own;

		io_prep_pread(&own, file, buf, 1, 0);
		ios = &own;
		EQ(io_submit(ctx, 1, &ios), -EINVAL);
		EQ(io_getevents(ctx, 0, 1, &event, &none), -EINVAL);
		EQ(io_cancel(ctx, &io, &event), -EINVAL);
		FAILS(raio_free(ctx, memory), EINVAL);
		FAILS(raio_open(shim_session, "/ro/data.bin", O_RDONLY), EBADF);
		FAILS(raio_close(file), EBADF);
		FAILS(raio_stop(shim_session), EBADF);
		EQ(io_destroy(ctx), -EINVAL);
		/* Not a quick exit: handlers and destructors run. */
		exit(checks_failed != before);
	}
	MUST(waitpid(child, &status, 0) == child);
	EQ(status, 0);
	EQ(io_getevents(ctx, 1, 1, &event, NULL), 1);
	EQ(event.res, PAGE);
	EQ(raio_free(ctx, memory), 0);
	io_prep_pread(&io, file, buf, PAGE, 0);
	EQ(one(ctx, &io), PAGE);
}

/* With a child that lives on the session ends all the same: prints "stopped" then, and waits for the end of its input. */
static void stop_with_a_living_child(void)
{
	char end;
	int status, gate[2];
	pid_t child;

	MUST(pipe(gate) == 0);
	fflush(stdout);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		close(gate[1]);
		_exit(read(gate[0], &end, 1) == 0 ? 0 : 1);
	}
	EQ(raio_stop(shim_session), 0);
	printf("stopped\n");
	fflush(stdout);
	while (read(0, &end, 1) > 0)
		;
	close(gate[1]);
	MUST(waitpid(child, &status, 0) == child);
	EQ(status, 0);
}

int main(int argc, char **argv)
{
	io_context_t ctx = NULL, other = NULL;

	begin(argc, argv);
	libaio_shim_session(session(argv));
	MUST(raio_open(shim_session, "/rw/libaio", O_RDWR | O_CREAT) == 0);
	file = shim_session;
	a_live_context_is_not_overwritten();
	MUST(io_setup(16, &ctx) == 0 && io_setup(16, &other) == 0);
	an_unreadable_buffer_fails_its_own_iocb_alone(ctx);
	a_limit_on_file_sizes_bounds_no_remote_write(ctx);
	a_tick_goes_to_the_eventfd_that_was_submitted(ctx);
	one_eventfd_takes_one_descriptor();
	a_full_eventfd_holds_nothing_up(other);
	a_timeout_is_slept_out(ctx);
	signals(ctx);
	texts(ctx);
	the_text_of_an_iocb_that_is_used_again();
	a_child_has_nothing_of_its_parents(ctx);
	stop_with_a_living_child();
	EQ(io_destroy(ctx), 0);
	return finish("libaio");
}
