/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How the examples read their command lines: remote operands (a raio URL with the file's path behind it) and sizes.
 */
#ifndef OPERAND_H
#define OPERAND_H

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static inline int operand_is_remote(const char *operand)
{
	return !strncmp(operand, "raio://", 7) || !strncmp(operand, "raio+tcp://", 11) ||
	       !strncmp(operand, "raio+rdma://", 12);
}

/*
 * Splits "raio://host:port/EXPORT/path" into the server's URL, which the caller frees, and the path, which points
 * into the operand. Returns NULL if there is no path, or no memory.
 */
static inline char *operand_split(const char *operand, const char **path)
{
	const char *slash = strchr(strstr(operand, "://") + 3, '/');
	char *server;
	size_t len;

	if (!slash || !slash[1])
		return NULL;
	len = (size_t)(slash - operand);
	server = malloc(len + 1);
	if (!server)
		return NULL;
	memcpy(server, operand, len);
	server[len] = '\0';
	*path = slash;
	return server;
}

/* A number with an optional suffix k, m or g (binary), from min to max. Returns it, or -1. */
static inline long long operand_size(const char *text, long long min, long long max)
{
	static const char suffixes[] = "kmg";
	const char *suffix;
	long long value;
	char *end;

	errno = 0;
	value = strtoll(text, &end, 10);
	if (end == text || errno || value < 0)
		return -1;
	if (*end) {
		suffix = strchr(suffixes, *end | 0x20);
		if (!suffix || end[1] || value > max >> (10 * (suffix - suffixes + 1)))
			return -1;
		value <<= 10 * (suffix - suffixes + 1);
	}
	return value < min || value > max ? -1 : value;
}

#endif /* OPERAND_H */
