/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* hello: prints the first 4 KiB of a remote file, e.g. hello raio://127.0.0.1:7240 /demo/hello.txt */
#include <fcntl.h>
#include <stdio.h>
#include <libraio.h>

int main(int argc, char **argv)
{
	static char text[4096];
	struct raio_iocb io, *batch[] = { &io };
	struct raio_event event;
	raio_context_t ctx = NULL;
	int fd;

	if (argc != 3)
		return fprintf(stderr, "usage: %s raio://HOST /EXPORT/FILE\n", argv[0]), 2;
	fd = raio_connect(argv[1], NULL);
	if (fd == -1 || raio_open(fd, argv[2], O_RDONLY) == -1 || raio_setup(fd, 1, &ctx) == -1)
		return fprintf(stderr, "%s\n", raio_errmsg()), 1;
	raio_prep_pread(&io, fd, text, sizeof(text), 0, NULL);
	if (raio_submit(ctx, 1, batch) != 1 || raio_getevents(ctx, 1, 1, &event, NULL) != 1 || (long)event.res < 0)
		return fprintf(stderr, "%s\n", raio_errmsg()), 1;
	fwrite(text, 1, event.res, stdout);
	raio_destroy(ctx);
	raio_stop(fd);
	return 0;
}
