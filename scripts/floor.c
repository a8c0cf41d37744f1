/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * floor: what requests and responses over loopback TCP can do at most, for scripts/bench to hold raio against.
 *
 * One connection between two processes, and nothing that a real protocol needs. The client keeps --depth requests of 64 bytes
 * in flight: whatever it has to send leaves in one send, whatever has come is taken in one receive. The server reads all whole
 * requests that have arrived, preads a block for each at the offset that the request names, behind a header of 64
 * bytes, and sends all of it at once. Both sides spin, or both block; nothing else is ever waited for.
 *
 * Latency is a request's, from when it is made to when its last byte has been received. The server answers in order, so the
 * times of the requests in flight are a ring. JSON goes to standard output.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_BYTES = 64 };

struct work {
	const char *file;
	size_t depth, block_bytes, blocks;
	double seconds;
	int spin, sequential;
	int server_cpu, client_cpu; /* -1: any */
};

static void die(const char *what)
{
	fprintf(stderr, "floor: cannot %s: %s.\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double cpu_us(int who)
{
	struct rusage u;

	getrusage(who, &u);
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e6 + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void stay_on(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("stay on the processor that --cpus names");
}

/* Memory that is all there before the clock starts. */
static char *buffer(size_t len)
{
	char *bytes = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (bytes == MAP_FAILED)
		die("map its buffers; give a smaller --depth or --bs");
	return bytes;
}

static void send_all(int socket, const char *bytes, size_t len)
{
	while (len) {
		ssize_t n = send(socket, bytes, len, MSG_NOSIGNAL);

		if (n < 0)
			die("send");
		bytes += n;
		len -= (size_t)n;
	}
}

/* At least a byte, or 0 at the end of the stream. */
static size_t receive(int socket, char *bytes, size_t len, int spin)
{
	ssize_t n;

	do
		n = recv(socket, bytes, len, spin ? MSG_DONTWAIT : 0);
	while (n < 0 && (errno == EAGAIN || errno == EINTR));
	if (n < 0)
		die("receive");
	return (size_t)n;
}

static void serve(int socket, const struct work *work)
{
	size_t response_bytes = HEADER_BYTES + work->block_bytes, requests_bytes = 2 * work->depth * HEADER_BYTES;
	int fd = open(work->file, O_RDONLY);
	char *in = buffer(requests_bytes), *out = buffer(work->depth * response_bytes);
	size_t have = 0, n, i, taken;

	if (fd < 0)
		die("open the file; give one that it may read with --file");
	while ((n = receive(socket, in + have, requests_bytes - have, work->spin))) {
		have += n;
		taken = have / HEADER_BYTES;
		for (i = 0; i < taken; i++) {
			char *response = out + i * response_bytes;
			uint64_t offset;

			memcpy(response, in + i * HEADER_BYTES, HEADER_BYTES);
			memcpy(&offset, response, sizeof(offset));
			if (pread(fd, response + HEADER_BYTES, work->block_bytes, (off_t)offset) !=
			    (ssize_t)work->block_bytes)
				die("read a whole block of the file");
		}
		if (taken) {
			send_all(socket, out, taken * response_bytes);
			have -= taken * HEADER_BYTES;
			memmove(in, in + taken * HEADER_BYTES, have);
		}
	}
}

/* A histogram of latencies: 32 steps for each doubling, so a bucket is at most 3 % wide. */
enum { STEPS = 32, BUCKETS = 64 * STEPS };

static unsigned bucket(uint64_t ns)
{
	unsigned shift = ns < 2 * STEPS ? 0 : 58 - (unsigned)__builtin_clzll(ns);

	return shift * STEPS + (unsigned)(ns >> shift);
}

static double percentile(const uint64_t *histogram, uint64_t count, double part)
{
	uint64_t below = 0, rank = (uint64_t)(part * (double)count);
	unsigned b;

	for (b = 0; b < BUCKETS; b++) {
		below += histogram[b];
		if (below > rank)
			break;
	}
	/* the middle of the bucket */
	return b < 2 * STEPS ? b : ((b % STEPS + STEPS) + 0.5) * (double)(1ull << (b / STEPS - 1));
}

struct measured {
	uint64_t done, latency_sum_ns, elapsed_ns;
	double cpu_us;
	uint64_t histogram[BUCKETS];
};

static void ask(int socket, const struct work *work, struct measured *m)
{
	size_t response_bytes = HEADER_BYTES + work->block_bytes, responses_bytes = work->depth * response_bytes;
	char *requests = buffer(work->depth * HEADER_BYTES), *in = buffer(responses_bytes);
	uint64_t *made = calloc(work->depth, sizeof(*made)), random = 0x9e3779b97f4a7c15u, block = 0;
	uint64_t begin, now, end;
	size_t have = 0, missing = work->depth, oldest = 0, newest = 0, n, i;

	if (!made)
		die("allocate");
	m->cpu_us = -cpu_us(RUSAGE_SELF);
	begin = now = now_ns();
	end = begin + (uint64_t)(work->seconds * 1e9);
	while (now < end) {
		for (i = 0; i < missing; i++) {
			uint64_t offset;

			if (work->sequential) {
				offset = block++ % work->blocks * work->block_bytes;
			} else {
				random ^= random << 13; /* xorshift64 */
				random ^= random >> 7;
				random ^= random << 17;
				offset = random % work->blocks * work->block_bytes;
			}
			memcpy(requests + i * HEADER_BYTES, &offset, sizeof(offset));
			made[newest] = now;
			newest = newest + 1 == work->depth ? 0 : newest + 1;
		}
		if (missing)
			send_all(socket, requests, missing * HEADER_BYTES);
		n = receive(socket, in + have, responses_bytes - have, work->spin);
		if (!n) {
			errno = ECONNRESET;
			die("go on without its server");
		}
		now = now_ns();
		have += n;
		missing = have / response_bytes;
		have %= response_bytes;
		if (missing) /* a part of one stays, at the front, where the memory is in the cache */
			memmove(in, in + missing * response_bytes, have);
		for (i = 0; i < missing; i++) {
			uint64_t took = now - made[oldest];

			oldest = oldest + 1 == work->depth ? 0 : oldest + 1;
			m->latency_sum_ns += took;
			m->histogram[bucket(took)]++;
		}
		m->done += missing;
	}
	m->elapsed_ns = now - begin;
	m->cpu_us += cpu_us(RUSAGE_SELF);
}

static _Noreturn void usage(int status)
{
	fprintf(status ? stderr : stdout,
		"usage: floor --file FILE [--depth N] [--bs BYTES] [--seconds S] [--spin] [--sequential] [--cpus SERVER,CLIENT]\n"
		"\n"
		"Measures requests and responses over loopback TCP that do nothing but read FILE. Defaults: depth 1, 4096 bytes, 3 s,\n"
		"blocking, random offsets.\n");
	exit(status);
}

static struct work parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "file", required_argument, NULL, 'f' },  { "depth", required_argument, NULL, 'd' },
		{ "bs", required_argument, NULL, 'b' },	   { "seconds", required_argument, NULL, 's' },
		{ "spin", no_argument, NULL, 'p' },	   { "sequential", no_argument, NULL, 'q' },
		{ "cpus", required_argument, NULL, 'c' },  { "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	struct work work = { .depth = 1, .block_bytes = 4096, .seconds = 3, .server_cpu = -1, .client_cpu = -1 };
	struct stat status;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'f': work.file = optarg; break;
		case 'd': work.depth = strtoul(optarg, NULL, 10); break;
		case 'b': work.block_bytes = strtoul(optarg, NULL, 10); break;
		case 's': work.seconds = strtod(optarg, NULL); break;
		case 'p': work.spin = 1; break;
		case 'q': work.sequential = 1; break;
		case 'c':
			if (sscanf(optarg, "%d,%d", &work.server_cpu, &work.client_cpu) != 2)
				usage(2);
			break;
		case 'h': usage(0);
		default: usage(2);
		}
	}
	if (!work.file || optind != argc || work.seconds <= 0 || work.depth < 1 || work.depth > 4096 || work.block_bytes < 1 ||
	    work.block_bytes > 64 << 20)
		usage(2);
	if (stat(work.file, &status))
		die("find the file; give one that exists with --file");
	work.blocks = (size_t)status.st_size / work.block_bytes;
	if (!work.blocks) {
		fprintf(stderr, "floor: %s is smaller than a block. Give a larger file, or a smaller --bs.\n", work.file);
		exit(2);
	}
	return work;
}

int main(int argc, char **argv)
{
	static struct measured m;
	struct work work = parse(argc, argv);
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), connection, one = 1, status;
	double n;
	pid_t server;

	if (listener < 0 || bind(listener, (struct sockaddr *)&address, len) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &len))
		die("listen on loopback");
	server = fork();
	if (server < 0)
		die("start its server");
	if (server == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		stay_on(work.server_cpu);
		connection = accept(listener, NULL, NULL);
		if (connection < 0 || setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
			die("accept");
		serve(connection, &work);
		exit(0);
	}
	stay_on(work.client_cpu);
	connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connection < 0 || connect(connection, (struct sockaddr *)&address, len) ||
	    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("connect");
	ask(connection, &work, &m);
	/* What is still in flight does not count, but its server must be able to send it. */
	shutdown(connection, SHUT_WR);
	while (recv(connection, (char[1 << 16]){ 0 }, 1 << 16, 0) > 0)
		;
	close(connection);
	if (waitpid(server, &status, 0) < 0 || status)
		die("measure, for its server failed");
	n = (double)m.done;
	printf("{\"iops\": %.1f, \"mean_us\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"p99_9_us\": %.3f, "
	       "\"client_cpu_us\": %.3f, \"server_cpu_us\": %.3f}\n",
	       n / ((double)m.elapsed_ns / 1e9), (double)m.latency_sum_ns / n / 1e3, percentile(m.histogram, m.done, 0.5) / 1e3,
	       percentile(m.histogram, m.done, 0.99) / 1e3, percentile(m.histogram, m.done, 0.999) / 1e3, m.cpu_us / n,
	       cpu_us(RUSAGE_CHILDREN) / n);
	return 0;
}
