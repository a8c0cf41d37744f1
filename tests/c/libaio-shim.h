/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libaio's calls on libraio, for programs written for it: the header's names, over remote files. A program names its
 * session once with libaio_shim_session(). What differs is listed in libraio(3), "COMING FROM LIBAIO".
 */
#ifndef LIBAIO_SHIM_H
#define LIBAIO_SHIM_H

#include <errno.h>
#include <libraio.h>

typedef raio_context_t io_context_t;
#define iocb raio_iocb
#define io_event raio_event

static int shim_session;

static inline void libaio_shim_session(int fd)
{
	shim_session = fd;
}

static inline int io_setup(int maxevents, io_context_t *ctxp)
{
	return raio_setup(shim_session, maxevents, ctxp) ? -errno : 0;
}

static inline int io_queue_init(int maxevents, io_context_t *ctxp)
{
	*ctxp = NULL;
	return io_setup(maxevents, ctxp);
}

static inline int io_destroy(io_context_t ctx)
{
	return raio_destroy(ctx) ? -errno : 0;
}

static inline int io_submit(io_context_t ctx, long nr, struct iocb *ios[])
{
	return (int)raio_submit(ctx, nr, ios);
}

static inline int io_getevents(io_context_t ctx, long min_nr, long nr, struct io_event *events, struct timespec *timeout)
{
	return (int)raio_getevents(ctx, min_nr, nr, events, timeout);
}

static inline int io_cancel(io_context_t ctx, struct iocb *io, struct io_event *event)
{
	return raio_cancel(ctx, io, event) ? -errno : 0;
}

static inline void io_prep_pread(struct iocb *io, int fd, void *buf, size_t count, long long offset)
{
	raio_prep_pread(io, fd, buf, count, offset, NULL);
}

static inline void io_prep_pwrite(struct iocb *io, int fd, void *buf, size_t count, long long offset)
{
	raio_prep_pwrite(io, fd, buf, count, offset, NULL);
}

static inline void io_prep_preadv(struct iocb *io, int fd, const struct iovec *iov, int iovcnt, long long offset)
{
	raio_prep_preadv(io, fd, iov, iovcnt, offset, NULL);
}

static inline void io_prep_pwritev(struct iocb *io, int fd, const struct iovec *iov, int iovcnt, long long offset)
{
	raio_prep_pwritev(io, fd, iov, iovcnt, offset, NULL);
}

static inline void io_set_eventfd(struct iocb *io, int eventfd)
{
	raio_set_eventfd(io, eventfd);
}

#endif /* LIBAIO_SHIM_H */
