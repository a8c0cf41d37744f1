/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Read a small file, and write it back with another byte at its end, so that others see the old file or the new one */
#include <stdio.h>
#include <libraio.h>

int append_byte(int fd, const char *path, char byte)
{
	char buf[4096];
	struct raio_stat stat;
	ssize_t len = raio_get(fd, path, buf, sizeof(buf) - 1, &stat, sizeof(stat));

	if (len == -1 || stat.file_bytes > (unsigned long long)len) {
		fprintf(stderr, "%s: %s\n", path, len == -1 ? raio_errmsg() : "longer than 4095 bytes");
		return -1;
	}
	buf[len] = byte;
	return raio_put(fd, path, buf, (size_t)len + 1, stat.mode & 0777, RAIO_PUT_FSYNC);
}
