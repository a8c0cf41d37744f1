/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Stands in for libaio's header when its own tests are compiled: the shim, and files that a test opens here but reads and
 * writes remotely. A server exports the directories below $HARNESS_ROOT by their names; $HARNESS_URL names it.
 */
#ifndef LIBAIO_H
#define LIBAIO_H

#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include "../c/libaio-shim.h"

struct remote_file {
	dev_t dev;
	ino_t ino;
	int flags, fd;
};

static pthread_mutex_t remote_lock = PTHREAD_MUTEX_INITIALIZER;
static struct remote_file remote_files[64];
static int remote_count;
static pid_t remote_owner;

static void die(const char *what)
{
	printf("libaio.h: %s: %s\n", what, raio_errmsg());
	exit(1);
}

/* Called with the lock. A forked child has a session and files of its own. */
static void connect_anew(void)
{
	int fd;

	if (remote_owner == getpid())
		return;
	fd = raio_connect(getenv("HARNESS_URL"), NULL);
	if (fd < 0)
		die("raio_connect");
	libaio_shim_session(fd);
	remote_owner = getpid();
	remote_count = 0;
}

static inline int connected(void)
{
	pthread_mutex_lock(&remote_lock);
	connect_anew();
	pthread_mutex_unlock(&remote_lock);
	return 0;
}

static int open_remote(int fd, int flags)
{
	const char *root = getenv("HARNESS_ROOT");
	char link[64], path[PATH_MAX];
	ssize_t len;
	int opened;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	len = readlink(link, path, sizeof(path) - 1);
	if (len < 0)
		return -1;
	path[len] = 0;
	if (strncmp(path, root, strlen(root)))
		die(path);
	opened = raio_open(shim_session, path + strlen(root), flags);
	if (opened < 0)
		die(path);
	return opened ? opened : shim_session;
}

/* The remote counterpart of a file that is open here, with the flags it has now; -1 if it is not open. */
static inline int remote(int fd)
{
	int i, flags = fcntl(fd, F_GETFL);
	struct stat file;

	if (flags < 0 || fstat(fd, &file))
		return -1;
	pthread_mutex_lock(&remote_lock);
	connect_anew();
	for (i = 0; i < remote_count; i++)
		if (remote_files[i].dev == file.st_dev && remote_files[i].ino == file.st_ino && remote_files[i].flags == flags)
			break;
	if (i == remote_count) {
		if (i == sizeof(remote_files) / sizeof(remote_files[0]))
			die("too many files");
		remote_files[i].dev = file.st_dev;
		remote_files[i].ino = file.st_ino;
		remote_files[i].flags = flags;
		remote_files[i].fd = open_remote(fd, flags);
		remote_count++;
	}
	fd = remote_files[i].fd;
	pthread_mutex_unlock(&remote_lock);
	return fd;
}

#define io_setup(n, ctxp)			 (connected(), io_setup(n, ctxp))
#define io_queue_init(n, ctxp)			 (connected(), io_queue_init(n, ctxp))
#define io_prep_pread(io, fd, buf, n, offset)	 io_prep_pread(io, remote(fd), buf, n, offset)
#define io_prep_pwrite(io, fd, buf, n, offset)	 io_prep_pwrite(io, remote(fd), buf, n, offset)
#define io_prep_preadv(io, fd, iov, n, offset)	 io_prep_preadv(io, remote(fd), iov, n, offset)
#define io_prep_pwritev(io, fd, iov, n, offset)	 io_prep_pwritev(io, remote(fd), iov, n, offset)

#endif /* LIBAIO_H */
