/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Print the names and sizes of a directory's entries */
#include <stdio.h>
#include <libraio.h>

int list(int fd, const char *path)
{
	struct raio_dirent entry;
	raio_dir_t dir = raio_opendir(fd, path);
	int more;

	if (!dir)
		return -1;
	while ((more = raio_readdir(dir, &entry, sizeof(entry))) == 1)
		printf("%12llu %s\n", entry.file_bytes, entry.name);
	if (more == -1)
		fprintf(stderr, "%s: %s\n", path, raio_errmsg());
	raio_closedir(dir);
	return more;
}
