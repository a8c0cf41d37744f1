/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Open a file by an iocb, and return its descriptor. args belongs to the library until the event is collected */
#include <fcntl.h>
#include <libraio.h>

int open_it(int session, raio_context_t ctx, const char *path)
{
	struct raio_path_args args;
	struct raio_iocb iocb, *ios[1] = { &iocb };
	struct raio_event event;
	int n;

	raio_prep_open(&iocb, session, &args, path, O_RDONLY, 0);
	n = raio_submit(ctx, 1, ios);
	if (n != 1)
		return n;
	n = raio_getevents(ctx, 1, 1, &event, NULL);
	return n == 1 ? (int)(long)event.res : n;	/* the descriptor, or a negated errno */
}
