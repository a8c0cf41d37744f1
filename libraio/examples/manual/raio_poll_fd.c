/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Wait for completions and for another descriptor at the same time */
#include <poll.h>
#include <libraio.h>

int wait_for_either(raio_context_t ctx, int other, void (*completed)(struct raio_event *))
{
	struct pollfd fds[2] = {
		{ .fd = raio_poll_fd(ctx), .events = POLLIN },
		{ .fd = other, .events = POLLIN },
	};
	struct raio_event events[16];
	int i, n;

	if (fds[0].fd == -1 || poll(fds, 2, -1) == -1)
		return -1;
	if (fds[0].revents) {
		do {
			n = raio_getevents(ctx, 0, 16, events, NULL);
			for (i = 0; i < n; i++)
				completed(&events[i]);
		} while (n == 16);
	}
	return fds[1].revents != 0;
}
