/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * R-AIO habit 5: the fio engine of that time named files /HOST/PORT/PATH. This is such a program, with the mapping it
 * needs: HOST and PORT go to raio_start(), /PATH, which begins with the export, to raio_open().
 */
#define _GNU_SOURCE
#include "check.h"

struct old_name {
	char host[256];
	char port[16];
	const char *path;
};

/* Returns 0, or -1 if the name is not of that form. */
static int old_name_split(const char *name, struct old_name *old)
{
	const char *host = name + 1, *port, *path;

	if (name[0] != '/')
		return -1;
	port = strchr(host, '/');
	path = port ? strchr(port + 1, '/') : NULL;
	if (!path || !path[1])
		return -1;
	if (port == host || (size_t)(port - host) >= sizeof(old->host))
		return -1;
	if (path == port + 1 || (size_t)(path - port - 1) >= sizeof(old->port))
		return -1;
	memcpy(old->host, host, (size_t)(port - host));
	old->host[port - host] = '\0';
	memcpy(old->port, port + 1, (size_t)(path - port - 1));
	old->port[path - port - 1] = '\0';
	if (strspn(old->port, "0123456789") != strlen(old->port))
		return -1;
	old->path = path;
	return 0;
}

/* Reads all of the file so named. Returns its length, or -1. */
static long long read_old_name(const char *name, char *buf, size_t len)
{
	struct addrinfo hints, *found;
	struct raio_iocb iocb, *ios = &iocb;
	struct raio_event event;
	struct old_name old;
	raio_context_t ctx;
	long long offset = 0;
	int fd;

	if (old_name_split(name, &old))
		return -1;
	memset(&hints, 0, sizeof(hints));
	hints.ai_socktype = SOCK_STREAM;
	if (getaddrinfo(old.host, old.port, &hints, &found))
		return -1;
	fd = raio_start("tcp", found->ai_addr, found->ai_addrlen);
	freeaddrinfo(found);
	if (fd == -1)
		return -1;
	if (raio_open(fd, old.path, O_RDONLY) == -1 || raio_setup(fd, 1, &ctx)) {
		raio_stop(fd);
		return -1;
	}
	for (;;) {
		raio_prep_pread(&iocb, fd, buf + offset, len - (size_t)offset < 65536 ? len - (size_t)offset : 65536,
				offset, NULL);
		MUST(raio_submit(ctx, 1, &ios) == 1);
		MUST(raio_getevents(ctx, 1, 1, &event, NULL) == 1);
		if ((long)event.res <= 0)
			break;
		offset += (long)event.res;
		MUST((size_t)offset < len);
	}
	EQ(event.res, 0);
	EQ(raio_destroy(ctx), 0);
	EQ(raio_close(fd), 0);
	EQ(raio_stop(fd), 0);
	return offset;
}

int main(int argc, char **argv)
{
	char host[256], port[32], name[512], *buf;
	struct old_name old;

	begin(argc, argv);
	EQ(old_name_split("/192.0.2.7/1234/disk/a/b", &old), 0);
	EQ(strcmp(old.host, "192.0.2.7"), 0);
	EQ(strcmp(old.port, "1234"), 0);
	EQ(strcmp(old.path, "/disk/a/b"), 0);
	EQ(old_name_split("192.0.2.7/1234/disk", &old), -1);
	EQ(old_name_split("/192.0.2.7/disk", &old), -1);
	EQ(old_name_split("/192.0.2.7/disk/a", &old), -1);
	EQ(old_name_split("/192.0.2.7/1234", &old), -1);
	EQ(old_name_split("/192.0.2.7/1234/", &old), -1);
	EQ(old_name_split("//1234/disk", &old), -1);
	EQ(old_name_split("/", &old), -1);

	server_name(argv, host, sizeof(host), port, sizeof(port));
	MUST((buf = malloc(DATA_BIN_BYTES + 1)) != NULL);
	snprintf(name, sizeof(name), "/%s/%s/ro/data.bin", host, port);
	EQ(read_old_name(name, buf, DATA_BIN_BYTES + 1), DATA_BIN_BYTES);
	CHECK(is_data_bin(buf, DATA_BIN_BYTES, 0));
	snprintf(name, sizeof(name), "/%s/%s/ro/empty", host, port);
	EQ(read_old_name(name, buf, DATA_BIN_BYTES + 1), 0);
	snprintf(name, sizeof(name), "/%s/%s/ro/nothing-here", host, port);
	EQ(read_old_name(name, buf, DATA_BIN_BYTES + 1), -1);
	free(buf);
	return finish("r-aio-5-old-file-names");
}
