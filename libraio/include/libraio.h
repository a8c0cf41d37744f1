/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libraio: remote asynchronous I/O.
 *
 * A program reads and writes files of a raio_server in the manner of libaio: prepare control blocks, submit a
 * batch, collect completions. This header is the reference; docs/man/libraio.3 is the tour.
 *
 * The model
 *
 *   session   raio_start() or raio_connect(): one server, its open files. Named by a descriptor.
 *   file      raio_open(): belongs to its session, usable from each of its contexts. Named by a descriptor.
 *   context   raio_setup(): one connection with its own queue. A session has as many as the program has threads.
 *   iocb      one operation. It and its buffer belong to the library from raio_submit() until its event is
 *             collected by raio_getevents() (or returned by raio_cancel()); until then touch neither.
 *
 * raio descriptors are not kernel file descriptors: read(2), close(2) and the like answer EBADF for them.
 *
 * Threads.  Calls on a session or a file (start, stop, open, fstat, close, setup) may come from any thread, and
 * block for a round trip. A context belongs to one thread at a time: nothing in it is locked. The library starts
 * no threads, installs no signal handlers, and prints nothing.
 *
 * fork.  A child opens sessions, files and contexts of its own. Those of its parent it does not have: a context is
 * EINVAL there, a descriptor EBADF, and the parent goes on undisturbed, also when the child exits. raio_stop() ends a
 * session whether or not children live. Memory from raio_alloc() is not inherited by a child. A process
 * that has used RDMA has children that cannot: there raio_connect() says so with EPROTONOSUPPORT, or uses TCP.
 *
 * Time.  Each call that waits for the server has a limit, in struct raio_options: connect_timeout_ms for raio_start(),
 * raio_connect() and raio_setup(); call_timeout_ms for raio_open(), raio_fstat(), raio_close() and raio_destroy(), if
 * the server answers pings but not the call; request_timeout_ms for a server that is silent, and for raio_cancel() with
 * any server. raio_getevents() has its own: with a NULL timeout it waits as long as a server that answers pings takes.
 * The lookup of a host name has that of the system's resolver. A signal interrupts raio_getevents() alone (EINTR); all
 * others go on, whatever SA_RESTART says.
 *
 * Errors.  Calls that return int give -1 and set errno, or, where they say so, return the negated errno as libaio
 * does. An event carries the negated errno in `res`. raio_errmsg() has the text of the latest call's failure, and
 * raio_event_errmsg() that of an event. An
 * argument that makes no sense is EINVAL, a descriptor or context that is not (any longer) one is EBADF or EINVAL:
 * never a crash, as far as the library can see the pointer. When the server goes away, everything in flight
 * completes once, with ENOTCONN, ECONNRESET, EPIPE or ETIMEDOUT in its event, and later calls fail with ENOTCONN.
 * A write that completes with one of those may or may not have reached the file, and may still reach the file later.
 *
 * Order.  Operations in flight at the same time run in no particular order, as with libaio: wait for one before
 * submitting another that must follow it. An fsync covers the writes whose events were collected before it was
 * submitted, whichever context they used.
 */
#ifndef LIBRAIO_H
#define LIBRAIO_H

#include <string.h>
#include <sys/types.h>
#include <sys/socket.h>

#ifdef __cplusplus
extern "C" {
#endif

struct timespec;
struct stat64;		/* define _GNU_SOURCE before the first #include to have it: see raio_fstat() */
struct iovec;

/* What raio_abi_version() returned when this header was written. The major number changes with the soname. */
#define RAIO_ABI_MAJOR 0
#define RAIO_ABI_MINOR 1
#define RAIO_ABI_VERSION ((RAIO_ABI_MAJOR << 16) | RAIO_ABI_MINOR)

typedef struct raio_context *raio_context_t;
typedef struct raio_mr *raio_mr_t;

enum raio_iocb_cmd {
	RAIO_CMD_PREAD = 0,		/* read into buf */
	RAIO_CMD_PWRITE = 1,		/* write from buf */
	RAIO_CMD_PREADV = 2,		/* buf is a struct iovec[nbytes] */
	RAIO_CMD_PWRITEV = 3,		/* buf is a struct iovec[nbytes] */
	RAIO_CMD_FSYNC = 4,		/* RAIO_IOCB_DATASYNC: data only */
	RAIO_CMD_DISCARD = 5,		/* give the range back; it reads as zeros where the storage says so */
	RAIO_CMD_WRITE_ZEROES = 6,	/* the range reads as zeros afterwards */
	RAIO_CMD_ALLOCATE = 7		/* reserve storage, extend the file; RAIO_IOCB_KEEP_SIZE: its size stays */
};

/* raio_iocb_common.flags; every other bit must be 0 */
#define RAIO_IOCB_EVENTFD	(1u << 0)	/* add one to eventfd `resfd` when this iocb completes */
#define RAIO_IOCB_DATASYNC	(1u << 1)	/* with RAIO_CMD_FSYNC: fdatasync */
#define RAIO_IOCB_KEEP_SIZE	(1u << 2)	/* with RAIO_CMD_ALLOCATE: the file's size stays */

struct raio_iocb_common {
	void *buf;			/* data, or struct iovec[], or NULL: see raio_submit() */
	unsigned long long nbytes;	/* length in bytes, or number of iovecs */
	long long offset;		/* in bytes, from the start of the file */
	raio_mr_t mr;			/* the registration that buf lies in, or NULL */
	unsigned int flags;		/* RAIO_IOCB_* */
	unsigned int resfd;		/* with RAIO_IOCB_EVENTFD: an eventfd(2) */
};

struct raio_iocb {
	void *data;			/* the caller's, returned in the event */
	unsigned int key;		/* the library's while in flight */
	int raio_fildes;		/* from raio_open(), or the session's descriptor for its first file */
	int raio_lio_opcode;		/* enum raio_iocb_cmd */
	int pad;
	union {
		struct raio_iocb_common c;
	} u;
};

struct raio_event {
	void *data;			/* of the iocb */
	struct raio_iocb *obj;		/* the iocb */
	unsigned long long handle;	/* names what the library lent for it, for raio_release(); 0 if nothing */
	unsigned long res;		/* bytes done, or a negated errno. Fewer than asked: the file ended there, or what is behind
					   failed; the same operation on the rest tells which (a read: 0, or the error) */
	unsigned long res2;		/* 0; for a failure RAIO_RES2_* */
};

/* raio_event.res2 of a failure: where it arose, and whether trying again may help */
#define RAIO_RES2_TRANSPORT	1ul	/* the connection; a write's outcome is unknown */
#define RAIO_RES2_PROTOCOL	2ul	/* a peer broke the protocol */
#define RAIO_RES2_STORAGE	3ul	/* the server's file or device */
#define RAIO_RES2_POLICY	4ul	/* the server's configuration forbids it */
#define RAIO_RES2_CLASS		0xfful	/* mask of the above */
#define RAIO_RES2_RETRYABLE	0x100ul	/* the same request may succeed later */

/* Sessions ------------------------------------------------------------------------------------------------- */

/*
 * Options for raio_connect(). Set everything to zero, `size` to sizeof(struct raio_options), then what you need:
 * zero always means the default. A larger struct (from a newer header) is accepted while what this library does
 * not know is zero; EINVAL otherwise.
 */
struct raio_options {
	unsigned int size;			/* sizeof(struct raio_options) */
	unsigned int flags;			/* RAIO_OPT_* */
	unsigned int queue_depth;		/* requests on the wire per context; default and most: what the server grants */
	unsigned int connect_timeout_ms;	/* for connecting and the handshake, all addresses of the server together; default
						   5,000 */
	unsigned int request_timeout_ms;	/* the server is taken for dead if it is silent this long while asked
						   something; default: three times the keepalive interval it grants */
	unsigned int spin_us;			/* wait actively this long before sleeping in raio_getevents(), up to four times
						   as long with many operations in flight; default 50 */
	unsigned int reserved_0;		/* 0 */
	unsigned int call_timeout_ms;		/* how long raio_open() and the like wait for a server that answers pings but not
						   the call; default 30,000 */
	unsigned int reserved[8];		/* 0 */
};

#define RAIO_OPT_CRC		(1u << 0)	/* protect headers and data with CRC32C; fails if the server cannot */
#define RAIO_OPT_NO_SPIN	(1u << 1)	/* sleep at once: least CPU, more latency */

/*
 * raio_start - opens a session to the server at `addr` (IPv4 or IPv6). `transport` is "tcp"; "rdma" fails with
 * EPROTONOSUPPORT in a library built without it.
 *
 * Returns the session's descriptor (> 0), or -1 with errno: EINVAL (NULL, or an address of the wrong length),
 * EPROTONOSUPPORT (transport), EAFNOSUPPORT (address family), ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT,
 * EPROTO (what answers is not a raio server, or broke the protocol), EPROTONOSUPPORT (no protocol version in
 * common), EUSERS (the server has all the sessions it takes), ENOMEM, EMFILE.
 */
int raio_start(const char *transport, const struct sockaddr *addr, socklen_t addrlen);

/*
 * raio_connect - raio_start() by URL. The port may be left out: 7240. IPv6 in brackets. `options` may be NULL.
 * Names are looked up with getaddrinfo(3) and each address is tried in turn.
 *
 *   raio://host:port       connects over TCP, to a port that the server listens on with tcp://, and moves to RDMA
 *                          if both sides have it for the addresses of that connection. If they do not, it stays
 *                          on TCP, and raio_errmsg() says why: it is "" after a raio_connect() that did as well
 *                          as could be.
 *   raio+tcp://host:port   TCP only.
 *   raio+rdma://host:port  RDMA only, by rdma_cm, to a port that the server listens on with rdma://.
 *
 * Returns and fails as raio_start(), and EINVAL for a URL or options that make no sense, ENOENT for a host name
 * that nobody knows.
 */
int raio_connect(const char *url, const struct raio_options *options);

/*
 * raio_stop - ends the session at once: closes its files and connections. No more of a write in flight is sent; if the
 * server has it already it may still reach the file later. The session's contexts cannot be used any more: I/O in flight
 * completes without an event, raio_submit(), raio_getevents(), raio_cancel() and raio_poll_fd() fail with ENOTCONN,
 * raio_destroy() frees them. A raio_open(), raio_fstat() or raio_close() of another thread that waits for
 * the server fails with ENOTCONN.
 * No context of the session may be in use by another thread meanwhile.
 *
 * Returns 0, or -1 with errno EBADF.
 */
int raio_stop(int fd);

/* Files ---------------------------------------------------------------------------------------------------- */

/*
 * raio_open - opens `pathname`, which reads /EXPORT/path/beneath/it, on the server of session `fd`. `flags` are
 * those of open(2): O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_SYNC, O_DSYNC; O_CLOEXEC,
 * O_LARGEFILE, O_NOCTTY, O_NONBLOCK and O_NOFOLLOW are accepted (O_NOFOLLOW is honoured, the rest mean nothing
 * here); others are EINVAL. With O_CREAT the file's mode is 0644: see raio_open_mode().
 *
 * Returns 0 for the first successful open of a session: from then on the session's own descriptor stands for that
 * file, until raio_close(). Each further open returns a new descriptor > 0. On failure -1 with errno: EBADF (fd is
 * no session), EINVAL, ENAMETOOLONG, ENOENT, EACCES, EROFS (the export is read-only), EEXIST, EISDIR, EXDEV (the path
 * leads out of the export), ELOOP, ENOTDIR, EMFILE, ENOSPC, ENODEV (neither a regular file nor a block device),
 * ENXIO (the device, or what is to be mounted, is not there), ETIMEDOUT (not done in time; what the server opens later
 * is closed by the session's next call that asks the server, or its end), ENOTCONN and its kind (the server is gone).
 */
int raio_open(int fd, const char *pathname, int flags);

/* raio_open_mode - raio_open() with the permission bits of a file that O_CREAT creates, less the server's umask. */
int raio_open_mode(int fd, const char *pathname, int flags, mode_t mode);

/*
 * raio_fstat - asks the server for the file's present status. `fd` is a file, or a session for its first file. For
 * a block device st_size is its capacity in bytes.
 *
 * struct stat64 needs _GNU_SOURCE or _LARGEFILE64_SOURCE, defined before the first #include.
 *
 * Returns 0, or -1 with errno: EBADF, EINVAL (NULL), EIO, ETIMEDOUT (not done in time), ENOTCONN and its kind.
 */
int raio_fstat(int fd, struct stat64 *buf);

/*
 * raio_close - closes a file, or the first file of a session (the session itself lives on until raio_stop()). I/O
 * in flight on it runs to its end, and the server closes the file after it; then its errors are lost, so collect
 * the completions first.
 *
 * Returns 0, or -1 with errno, and it is closed all the same: EBADF; ETIMEDOUT, ENOTCONN and its kind; or what close(2) said on
 * the server. Some file systems (NFS, FUSE) store what was written only then, and report EDQUOT, ENOSPC or EIO: what
 * was written may be lost. Only an fsync before it makes sure.
 */
int raio_close(int fd);

/* Contexts ------------------------------------------------------------------------------------------------- */

/*
 * raio_setup - makes a context for at most `maxevents` iocbs in flight (1 to 65,536), on the session of `fd`. It
 * opens a connection of its own. May come before or after raio_open(). `*ctxp` should be NULL before, as with io_setup(),
 * and is set on success, else NULL. A context that was not destroyed is left there.
 *
 * Returns 0, or -1 with errno: EBADF, EINVAL (also if `*ctxp` is a context that was not destroyed, were it dead by
 * raio_stop()), ENOMEM, or one of raio_start()'s.
 */
int raio_setup(int fd, int maxevents, raio_context_t *ctxp);

/*
 * raio_destroy - waits until nothing is in flight (no longer than the request timeout if the server is silent, than the
 * call timeout if it answers pings alone; what is left then is given up, and a write may still reach the file later),
 * drops the uncollected events, and frees the context with its registrations and lent buffers. Memory from
 * raio_alloc() lives until raio_free().
 *
 * Returns 0, or -1 with errno EINVAL.
 */
int raio_destroy(raio_context_t ctx);

/*
 * raio_submit - queues `nr` control blocks, and sends what the server can take; the rest follows as answers come.
 * Never blocks.
 *
 * Memory.  `buf` may be any memory of the caller's. If it lies in a registration (raio_reg_mr(), raio_alloc())
 * name that in `mr`, and RDMA moves the data with no copy; on TCP it makes no difference. A read with `buf` NULL
 * lends one of the library's buffers: when the event is collected, obj->u.c.buf points at the data, which is the
 * caller's until raio_release() of that event. While maxevents buffers are lent out, such reads wait.
 *
 * Memory to be written that cannot be read fails that iocb alone: its event says -EFAULT, and nothing is written.
 * Memory to be read into is not checked: if it cannot be written to, the program gets SIGSEGV where the library copies
 * into it, as it does at least with the beginning of each read, and loses the connection where the kernel does.
 *
 * Length.  At most the server's --io-max in one iocb (1 MiB unless configured); more is EINVAL.
 *
 * Returns how many were taken, from the front: fewer than nr when the context fills up, or when a later one is
 * bad (submitting that one again then gives its error). -EAGAIN: full already. For the first one being bad:
 * -EINVAL (NULL, opcode, flags, length, negative offset, buf not within mr, resfd no eventfd), -EBADF (raio_fildes is no
 * open file of this session, resfd is not open), -EMFILE (for an eventfd, see raio_set_eventfd()). -ENOTCONN: the
 * connection has failed. nr 0 returns 0; nr negative is -EINVAL.
 */
int raio_submit(raio_context_t ctx, long nr, struct raio_iocb *ios[]);

/*
 * raio_getevents - collects at least `min_nr` and at most `nr` completions. `timeout` NULL waits for min_nr; zero
 * polls; otherwise whatever is there at its end is returned. min_nr may be 0: what is there now. If less than
 * min_nr is in flight, it waits until the timeout all the same; without one it returns what there is rather than wait
 * for ever.
 *
 * Returns how many, or -EINVAL (NULL, negative, min_nr > nr, a malformed timeout), -EINTR (a signal, with nothing
 * collected yet), -ENOTCONN (the connection has failed and every event was collected).
 */
int raio_getevents(raio_context_t ctx, long min_nr, long nr, struct raio_event *events, struct timespec *timeout);

/*
 * raio_release - gives back what the library lent for these events. Events that lent nothing are passed over.
 *
 * Returns 0, or -1 with errno EINVAL (NULL, negative nr, or a handle that is not lent out; the others are released
 * all the same).
 */
int raio_release(raio_context_t ctx, long nr, struct raio_event *events);

/*
 * raio_cancel - tries to cancel an iocb. Blocks for a round trip if it has been sent. A server that does not answer
 * this within the request timeout is taken for dead, though it answers pings: the context's connection ends, and all
 * that is in flight with it.
 *
 * Returns 0: cancelled, it did nothing and will do nothing; *evt is its event (res -ECANCELED), and raio_getevents()
 * will not report it. Else -1 with errno, and its own event comes in the normal way: EAGAIN (too late, it is being
 * done or is done), EINVAL (NULL, or not in flight), ENOTCONN.
 */
int raio_cancel(raio_context_t ctx, struct raio_iocb *iocb, struct raio_event *evt);

/*
 * raio_poll_fd - a kernel descriptor for poll(2), epoll(7), libevent, libuv: readable when raio_getevents() may
 * have something to do. Call raio_getevents(ctx, 0, nr, ...) then, until it returns fewer than nr. It belongs to
 * the context; do not read, write or close it.
 *
 * Returns it, or -1 with errno: EINVAL, ENOTCONN, EMFILE, ENOMEM.
 */
int raio_poll_fd(raio_context_t ctx);

/* Memory --------------------------------------------------------------------------------------------------- */

/*
 * raio_reg_mr - registers the caller's memory [buf, buf + len) for I/O on this context. The memory must stay mapped
 * until raio_dereg_mr() or raio_destroy(). Register few large regions, not one for each I/O.
 *
 * Returns 0 and sets *mr, or -1 with errno: EINVAL (NULL, length 0, wraps around), ENOMEM.
 */
int raio_reg_mr(raio_context_t ctx, void *buf, size_t len, raio_mr_t *mr);

/*
 * raio_dereg_mr - undoes it. Returns 0, or -1 with errno: EINVAL (not a registration of this context), EBUSY (I/O in
 * flight uses it).
 */
int raio_dereg_mr(raio_context_t ctx, raio_mr_t mr);

/*
 * raio_alloc - allocates `len` bytes, zeroed, aligned to 4 KiB at least, on huge pages if the system has some to
 * spare, and registers them. Their pages are faulted in, so that the first I/O on them is as fast as the others.
 * `*mr` (which may be NULL) is set to the registration. It ends with raio_free().
 *
 * Returns the memory, or NULL with errno: EINVAL, ENOMEM.
 */
void *raio_alloc(raio_context_t ctx, size_t len, raio_mr_t *mr);

/* raio_free - frees it. Returns 0, or -1 with errno: EINVAL (not from raio_alloc()), EBUSY (I/O in flight uses it). */
int raio_free(raio_context_t ctx, void *buf);

/* Information ---------------------------------------------------------------------------------------------- */

/* The counters of a context since raio_setup(). `size` first, so that later versions can add to the end. */
struct raio_stats {
	unsigned long long size;		/* bytes of this struct that were filled in */
	unsigned long long submitted;		/* iocbs taken by raio_submit() */
	unsigned long long completed;		/* events made, failures among them */
	unsigned long long failed;		/* events with a negative res */
	unsigned long long bytes_read;
	unsigned long long bytes_written;
	unsigned long long bounced_bytes;	/* copied within the library on their way to or from the caller's memory */
	unsigned long long sends;		/* system calls that sent */
	unsigned long long receives;		/* system calls that received something */
	unsigned long long sleeps;		/* times raio_getevents() went to sleep */
	unsigned long long reconnects;		/* 0: a lost session is reported, not replaced */
	unsigned long long in_flight;		/* now */
	unsigned long long queue_depth;		/* granted by the server */
	unsigned long long io_bytes_max;	/* granted by the server: largest nbytes of one iocb */
};

/* raio_get_stats - fills in at most `size` bytes of *stats. Returns 0, or -1 with errno EINVAL. */
int raio_get_stats(raio_context_t ctx, struct raio_stats *stats, size_t size);

/*
 * raio_errmsg - the text of the latest raio call in this thread: why it failed, "" after success. After a raio_getevents()
 * that has collected failures it is that of the last of them, after a raio_connect() why it is not over RDMA: see
 * there. It is always at the same address in a thread, until the next raio call there. For people: its wording may
 * change.
 */
const char *raio_errmsg(void);

/*
 * raio_event_errmsg - why an event failed, for an event of the context's latest raio_getevents() or of a raio_cancel()
 * since. Valid until the context's next raio_getevents().
 *
 * Returns the text, or "" for an event that has not failed, or with errno EINVAL (NULL, no context, an earlier event).
 */
const char *raio_event_errmsg(raio_context_t ctx, const struct raio_event *event);

/* raio_abi_version - the RAIO_ABI_VERSION of the library that is loaded. */
unsigned int raio_abi_version(void);

/* Preparing control blocks --------------------------------------------------------------------------------- */

/* Each clears the iocb, `data` included, and sets it up. Set `data` afterwards. */

static inline void raio_prep_(struct raio_iocb *iocb, int opcode, int fd, void *buf, unsigned long long nbytes,
			      long long offset, raio_mr_t mr)
{
	memset(iocb, 0, sizeof(*iocb));
	iocb->raio_fildes = fd;
	iocb->raio_lio_opcode = opcode;
	iocb->u.c.buf = buf;
	iocb->u.c.nbytes = nbytes;
	iocb->u.c.offset = offset;
	iocb->u.c.mr = mr;
}

static inline void raio_prep_pread(struct raio_iocb *iocb, int fd, void *buf, size_t count, long long offset,
				   raio_mr_t mr)
{
	raio_prep_(iocb, RAIO_CMD_PREAD, fd, buf, count, offset, mr);
}

static inline void raio_prep_pwrite(struct raio_iocb *iocb, int fd, void *buf, size_t count, long long offset,
				    raio_mr_t mr)
{
	raio_prep_(iocb, RAIO_CMD_PWRITE, fd, buf, count, offset, mr);
}

/* The iovecs are read by raio_submit(), and may go afterwards; what they point at stays the library's. At most 1,024. */
static inline void raio_prep_preadv(struct raio_iocb *iocb, int fd, const struct iovec *iov, int iovcnt,
				    long long offset, raio_mr_t mr)
{
	raio_prep_(iocb, RAIO_CMD_PREADV, fd, (void *)iov, (unsigned long long)iovcnt, offset, mr);
}

static inline void raio_prep_pwritev(struct raio_iocb *iocb, int fd, const struct iovec *iov, int iovcnt,
				     long long offset, raio_mr_t mr)
{
	raio_prep_(iocb, RAIO_CMD_PWRITEV, fd, (void *)iov, (unsigned long long)iovcnt, offset, mr);
}

/* data_only: fdatasync */
static inline void raio_prep_fsync(struct raio_iocb *iocb, int fd, int data_only)
{
	raio_prep_(iocb, RAIO_CMD_FSYNC, fd, NULL, 0, 0, NULL);
	if (data_only)
		iocb->u.c.flags |= RAIO_IOCB_DATASYNC;
}

/* Any length: --io-max does not bound these three. */
static inline void raio_prep_discard(struct raio_iocb *iocb, int fd, long long offset, unsigned long long nbytes)
{
	raio_prep_(iocb, RAIO_CMD_DISCARD, fd, NULL, nbytes, offset, NULL);
}

static inline void raio_prep_write_zeroes(struct raio_iocb *iocb, int fd, long long offset,
					  unsigned long long nbytes)
{
	raio_prep_(iocb, RAIO_CMD_WRITE_ZEROES, fd, NULL, nbytes, offset, NULL);
}

/*
 * fallocate(2) with mode 0, or with keep_size FALLOC_FL_KEEP_SIZE: no byte of the file changes, whoever writes it meanwhile.
 * -EOPNOTSUPP where the server's storage cannot do it.
 */
static inline void raio_prep_allocate(struct raio_iocb *iocb, int fd, long long offset, unsigned long long nbytes,
				      int keep_size)
{
	raio_prep_(iocb, RAIO_CMD_ALLOCATE, fd, NULL, nbytes, offset, NULL);
	if (keep_size)
		iocb->u.c.flags |= RAIO_IOCB_KEEP_SIZE;
}

/*
 * One tick on `eventfd` when this iocb completes. Call it after raio_prep_*. The library holds the eventfd open while
 * iocbs with it are in flight, by one more descriptor for each context and eventfd, so that it may be closed meanwhile.
 * (Where kcmp(2) is forbidden it takes one for each raio_submit().) A full eventfd is left as it is rather than waited for,
 * unless it becomes full by another thread, and has no EFD_NONBLOCK, at the moment of the tick. The library has no
 * thread of its own: it notices completions, and ticks, within calls on the context (raio_submit, raio_getevents, raio_cancel). A program
 * that sleeps on the eventfd sleeps on raio_poll_fd() too, and calls raio_getevents(ctx, 0, nr, ...) when that wakes it.
 */
static inline void raio_set_eventfd(struct raio_iocb *iocb, int eventfd)
{
	iocb->u.c.flags |= RAIO_IOCB_EVENTFD;
	iocb->u.c.resfd = (unsigned int)eventfd;
}

#ifdef __cplusplus
}
#endif

#endif /* LIBRAIO_H */
