/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Count the bytes of a file by 32 reads in flight, of a block each; the context is for at least 32 iocbs */
#include <string.h>
#include <libraio.h>

enum { DEPTH = 32, BLOCK_BYTES = 64 << 10 };

long long count_bytes(int fd, raio_context_t ctx)
{
	static char blocks[DEPTH][BLOCK_BYTES];
	struct raio_iocb iocbs[DEPTH], *ios[DEPTH];
	struct raio_event events[DEPTH];
	long long next = 0, total = 0;
	int in_flight = 0, at_end = 0, i, n;

	for (i = 0; i < DEPTH; i++) {
		raio_prep_pread(&iocbs[i], fd, blocks[i], BLOCK_BYTES, next, NULL);
		next += BLOCK_BYTES;
		ios[i] = &iocbs[i];
	}
	n = raio_submit(ctx, DEPTH, ios);
	while (n > 0 || in_flight) {
		if (n > 0)
			in_flight += n;
		/* The timeout is NULL: wait for one event at least. */
		n = raio_getevents(ctx, 1, DEPTH, events, NULL);
		if (n < 0)
			return n;
		in_flight -= n;
		for (i = 0; i < n; i++) {
			long result = (long)events[i].res;

			if (result < 0)
				return result;	/* raio_event_errmsg() says why */
			total += result;
			at_end |= result < BLOCK_BYTES;
			/* The iocb and its block are the program's again. */
			ios[i] = events[i].obj;
			ios[i]->u.c.offset = next;
			next += BLOCK_BYTES;
		}
		n = at_end ? 0 : raio_submit(ctx, n, ios);
	}
	return n < 0 ? n : total;
}
