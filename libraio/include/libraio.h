/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libraio: remote asynchronous I/O.
 *
 * A program reads and writes files of a raio_server in the manner of libaio: prepare iocbs, submit a batch,
 * collect events. This header is the reference; libraio(3) is the tutorial. scripts/manual.py makes the manual page of
 * each call from the comments here, which say `name - what it does`, and then what it returns, with
 * `errno: EXXX (why), EYYY (why)`.
 *
 * The model
 *
 *   session   raio_start() or raio_connect(): one server and its open files. Named by a descriptor.
 *   file      raio_open(): belongs to its session; usable from each of its contexts. Named by a descriptor.
 *   context   raio_setup(): one connection with its own queue. A program has one per thread that does I/O.
 *   iocb      one operation. The library owns it and its buffer from raio_submit() until raio_getevents() or
 *             raio_cancel() returns its event; until then the program must not access either.
 *
 * raio descriptors are not kernel file descriptors: read(2), close(2) and the like fail with EBADF for them.
 *
 * Threads.  Calls on sessions and files (start, stop, open, fstat, pread, close, setup) are thread-safe, and
 * block for a round trip. A context may be used by one thread at a time: it has no locks. The library starts
 * no threads, installs no signal handlers, and prints nothing.
 *
 * Busy-polling.  Before raio_getevents() sleeps it polls the connection for a short time (adaptive
 * busy-polling: `spin_us`, RAIO_OPT_NO_SPIN). It polls less while that does not pay, and not at all while
 * other threads want its core.
 *
 * Keepalive.  While a request is outstanding the library pings a silent server. A server that does not answer
 * for `request_timeout_ms` is considered dead, and the connection fails.
 *
 * Flow control.  The server grants each context a queue depth (credits) and a maximum size of one request.
 * iocbs beyond the queue depth wait in the context, and longer ones are sent in parts; raio_submit() returns
 * fewer than nr (backpressure) once maxevents iocbs are in flight or uncollected.
 *
 * Zero-copy.  Over RDMA, data is placed directly into memory that was registered (raio_reg_mr(),
 * raio_alloc()); other memory is copied through a bounce buffer, which `bounced_bytes` counts. Over TCP the
 * kernel copies in any case.
 *
 * fork.  A child must open its own sessions, files and contexts. The parent's are invalid there: EINVAL for a
 * context, EBADF for a descriptor. The parent is not affected, also when the child exits. raio_stop() ends a
 * session whether or not children are alive. A child does not inherit memory from raio_alloc(). After a
 * process has used RDMA its children cannot: raio_connect() fails with EPROTONOSUPPORT there, or uses TCP.
 *
 * Timeouts.  Each call that waits for the server is bounded by struct raio_options: connect_timeout_ms bounds
 * raio_start(), raio_connect() and raio_setup(); call_timeout_ms bounds raio_open(), raio_fstat(),
 * raio_stat_fd(), raio_pread(), raio_pwrite(), raio_close(), raio_destroy() and the calls on paths if the server
 * answers pings but not the call, and a call that waits for a lost session except raio_destroy(), which waits a second for
 * that; request_timeout_ms applies to a silent server, and to raio_cancel() with any server.
 * raio_set_timeout() bounds an iocb. raio_getevents() has its own timeout: with NULL it waits as long as the
 * server answers pings. The resolver's configuration bounds the lookup of a host name. A signal interrupts
 * only raio_getevents() (EINTR); all other calls continue, with or without SA_RESTART.
 *
 * Errors.  Calls that return int return -1 and set errno or, where stated, return the negated errno as libaio
 * does. An event has the negated errno in `res`. raio_errmsg() returns the message of the latest call,
 * raio_event_errmsg() that of an event. An invalid argument is EINVAL; a descriptor or context that is not,
 * or no longer, valid is EBADF or EINVAL: never a crash, as far as the library can check the pointer.
 *
 * Lost connections.  When the connection breaks, or the server is restarted, the library connects again within
 * its calls, to the same address, and goes on: each iocb completes once, and nothing is done twice. A program
 * notices a pause, during which raio_errmsg() after an empty raio_getevents() says what it waits for, and
 * `reconnects` in the statistics. After a restart the library opens the session's files
 * again. Then these can fail: a write or the like that was under way, with ECONNRESET and RAIO_RES2_UNKNOWN (it
 * may have been done; it will not be done later; RAIO_OPT_REDO does it again instead); everything on a file
 * that is another one now, with ESTALE; and the first fsync after acknowledged writes that the server has lost,
 * with EIO and RAIO_RES2_LOST. If the server is not back within `reconnect_ms`, every iocb in flight completes
 * with ETIMEDOUT, and later calls fail with ENOTCONN. A write that completes with ETIMEDOUT and
 * RAIO_RES2_UNKNOWN may or may not have reached the file, and may still reach it later; so may any write that
 * completes with ENOTCONN, ECONNRESET, EPIPE or ETIMEDOUT in a session with RAIO_OPT_NO_RECONNECT. A forked
 * child never connects again.
 *
 * Order.  Operations in flight at the same time are not ordered, as with libaio: collect one before
 * submitting another that must follow it. An fsync covers the writes whose events were collected before it
 * was submitted, on any context.
 *
 * Keys.  A server that is in the client's key directory is reached by TLS 1.3 alone: both sides prove that
 * they have their keys, and nobody on the way can read or change what they send. That is so for each
 * connection of the session; there is no fallback to one in the clear. All other servers are reached in the
 * clear. The directory is $RAIO_KEYS, which must exist then, else $XDG_CONFIG_HOME/raio, else
 * $HOME/.config/raio. A program with rights that its user does not have (set-user-ID) does not use these
 * variables, and has no keys. When a session begins the library reads two files there: `key`, the client's
 * secret key, which nobody else may read, and `servers`, a line HOST:PORT ed25519:KEY [ed25519:KEY ...] for
 * each server, which nobody else may write. raio(1) makes both. A server is looked up by the host and port of
 * the URL, and then by the address that these lead to. A session with raio:// moves from TLS to RDMA, where
 * its data is neither encrypted nor authenticated, only if the server's operator has allowed that to this
 * client; raio+tcp:// never does. RAIO_OPT_NO_KEYS turns all of this off.
 *
 * Tracing.  With RAIO_TRACE=FILE in the environment the library writes when each request was submitted, sent,
 * answered and collected, in a format that https://ui.perfetto.dev opens: see libraio(3).
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
#define RAIO_ABI_MINOR 6
#define RAIO_ABI_VERSION ((RAIO_ABI_MAJOR << 16) | RAIO_ABI_MINOR)

typedef struct raio_context *raio_context_t;
typedef struct raio_mr *raio_mr_t;
typedef struct raio_dir *raio_dir_t;

enum raio_iocb_cmd {
	RAIO_CMD_PREAD = 0,		/* read into buf */
	RAIO_CMD_PWRITE = 1,		/* write from buf */
	RAIO_CMD_PREADV = 2,		/* buf is a struct iovec[nbytes] */
	RAIO_CMD_PWRITEV = 3,		/* buf is a struct iovec[nbytes] */
	RAIO_CMD_FSYNC = 4,		/* RAIO_IOCB_DATASYNC: data only */
	RAIO_CMD_DISCARD = 5,		/* deallocate the range; zeros if the storage guarantees that */
	RAIO_CMD_WRITE_ZEROES = 6,	/* the range reads as zeros afterwards */
	RAIO_CMD_ALLOCATE = 7,		/* reserve storage, extend the file unless RAIO_IOCB_KEEP_SIZE */
	RAIO_CMD_OPEN = 8,		/* this one, and those from STAT_PATH on: see struct raio_path_args */
	RAIO_CMD_CLOSE = 9,
	RAIO_CMD_STAT_FD = 10,		/* buf is a struct raio_stat, nbytes its size */
	RAIO_CMD_FTRUNCATE = 11,	/* nbytes is the new size of the file */
	RAIO_CMD_STAT_PATH = 12,
	RAIO_CMD_GET = 13,
	RAIO_CMD_PUT = 14,
	RAIO_CMD_MKDIR = 15,
	RAIO_CMD_RMDIR = 16,
	RAIO_CMD_UNLINK = 17,
	RAIO_CMD_RENAME = 18,
	RAIO_CMD_LINK = 19,
	RAIO_CMD_SYMLINK = 20,
	RAIO_CMD_READLINK = 21,
	RAIO_CMD_SET_ATTRIBUTES = 22,	/* RAIO_SET_*: which */
	RAIO_CMD_STATFS = 23,
	RAIO_CMD_GETXATTR = 24,
	RAIO_CMD_SETXATTR = 25,
	RAIO_CMD_LISTXATTR = 26,
	RAIO_CMD_REMOVEXATTR = 27,
	RAIO_CMD_OPENDIR = 28,
	RAIO_CMD_READDIR = 29,
	RAIO_CMD_COPY_FILE_RANGE = 30,	/* from another file: buf is a struct raio_copy_args */
	RAIO_CMD_CHECKSUM = 31,		/* buf is a struct raio_checksum */
	RAIO_CMD_FLOCK = 32		/* nbytes is the operation of flock(2) */
};

/* raio_iocb_common.flags; every other bit must be 0, except for the timeout: see raio_set_timeout() */
#define RAIO_IOCB_EVENTFD	(1u << 0)	/* add one to eventfd `resfd` when this iocb completes */
#define RAIO_IOCB_DATASYNC	(1u << 1)	/* with RAIO_CMD_FSYNC: fdatasync */
#define RAIO_IOCB_KEEP_SIZE	(1u << 2)	/* with RAIO_CMD_ALLOCATE: the file size does not change */
#define RAIO_IOCB_CRC		(1u << 3)	/* checksums for this iocb, see raio_set_crc() */
#define RAIO_IOCB_TIMEOUT_SHIFT	12
#define RAIO_IOCB_TIMEOUT_MS(ms) ((unsigned int)(ms) << RAIO_IOCB_TIMEOUT_SHIFT)
#define RAIO_IOCB_TIMEOUT_MAX	0xfffffu	/* milliseconds, over 17 minutes */

struct raio_iocb_common {
	void *buf;			/* data, or struct iovec[], or one of the structs that enum raio_iocb_cmd names,
					   or NULL: see raio_submit() */
	unsigned long long nbytes;	/* length in bytes, or number of iovecs */
	long long offset;		/* in bytes, from the start of the file */
	raio_mr_t mr;			/* the registration that contains buf, or NULL */
	unsigned int flags;		/* RAIO_IOCB_* */
	unsigned int resfd;		/* with RAIO_IOCB_EVENTFD: an eventfd(2) */
};

struct raio_iocb {
	void *data;			/* the caller's, returned in the event */
	unsigned int key;		/* set by the library; do not change while in flight */
	int raio_fildes;		/* from raio_open(), or the session's descriptor for its first file */
	int raio_lio_opcode;		/* enum raio_iocb_cmd */
	__extension__ union {
		int pad;
		unsigned int crc;	/* with RAIO_IOCB_CRC: CRC32C of the data. For a write the caller's; for
					   a read set when the event is collected */
	};
	union {
		struct raio_iocb_common c;
	} u;
};

struct raio_stat;

/*
 * Arguments of an iocb on a path: its `buf` points to this struct, and its `nbytes` is the struct's size.
 * Filled in by raio_prep_open() etc. raio_submit() copies the paths. The struct itself, and the memory that
 * `buf` and `stat` point to, belong to the library until the iocb's event is collected.
 */
struct raio_path_args {
	const char *path;
	const char *other;		/* rename, link: the new path; symlink: the target; *xattr: the attribute */
	void *buf;			/* get, put: data, in the iocb's `mr` unless that is NULL; readlink: receives
					   the target, without a terminating zero; *xattr: as of the calls; statfs:
					   a struct raio_statfs; opendir: a raio_dir_t *; readdir: a raio_dir_t */
	unsigned long long nbytes;	/* length of buf; with RAIO_SET_SIZE the size */
	struct raio_stat *stat;		/* stat_path, get: where the status goes; get: or NULL */
	unsigned long long stat_size;	/* sizeof(struct raio_stat) */
	long long modified_ns;		/* with RAIO_PUT_MTIME or RAIO_SET_MTIME */
	unsigned int flags;		/* open: those of raio_open(); else RAIO_PATH_*, RAIO_PUT_*, RAIO_RENAME_*, RAIO_XATTR_*, RAIO_SET_* */
	unsigned int mode;		/* of what is created; with RAIO_SET_MODE */
	unsigned long long reserved[2];	/* 0 */
};

/* What RAIO_CMD_COPY_FILE_RANGE copies from. raio_submit() copies the struct. */
struct raio_copy_args {
	int fd;				/* the file, of the same session */
	unsigned int reserved_0;	/* 0 */
	long long offset;		/* in it */
	unsigned long long reserved[2];	/* 0 */
};

/* The checksum of a range of a file. */
struct raio_checksum {
	unsigned int type;		/* which is asked for: RAIO_CHECKSUM_* */
	unsigned int crc32c;		/* of the type RAIO_CHECKSUM_CRC32C: the checksum */
	unsigned char blake3[32];	/* of the type RAIO_CHECKSUM_BLAKE3: the checksum */
};

#define RAIO_CHECKSUM_CRC32C	1u	/* CRC32C (Castagnoli), as raio_crc32c(): detects accidental corruption, not tampering */
#define RAIO_CHECKSUM_BLAKE3	2u	/* BLAKE3: detects tampering, too */

#define RAIO_PATH_NOFOLLOW	(1u << 0)	/* stat_path, utimens: of a symbolic link itself */
#define RAIO_PUT_EXCL		(1u << 1)	/* EEXIST if there is something already */
#define RAIO_PUT_FSYNC		(1u << 2)	/* the file and its name are durable when it completes */
#define RAIO_PUT_MTIME		(1u << 3)	/* iocb: sets the modification time to modified_ns */
#define RAIO_RENAME_NOREPLACE	(1u << 1)	/* EEXIST if there is something already */
#define RAIO_XATTR_CREATE	(1u << 1)	/* EEXIST if there is one with the name */
#define RAIO_SET_MTIME		(1u << 3)	/* sets the modification time to modified_ns */
#define RAIO_SET_MODE		(1u << 4)	/* sets the permissions to mode */
#define RAIO_SET_SIZE		(1u << 5)	/* sets the size to nbytes */

struct raio_event {
	void *data;			/* of the iocb */
	struct raio_iocb *obj;		/* the iocb */
	unsigned long long handle;	/* of the lent buffer, for raio_release(); 0 if none */
	unsigned long res;		/* bytes transferred, the descriptor that was opened, 0 for what has no
					   number; or a negated errno. A short count: end of file,
					   or the rest failed; the same operation on the rest returns
					   which (0 at the end, or the error) */
	unsigned long res2;		/* 0; for a failure RAIO_RES2_* */
};

/* raio_event.res2 of a failure: its origin, and whether a retry may succeed */
#define RAIO_RES2_TRANSPORT	1ul	/* the connection. EILSEQ: the data arrived damaged, and was not used;
					   else a write's outcome is unknown */
#define RAIO_RES2_PROTOCOL	2ul	/* a peer broke the protocol */
#define RAIO_RES2_STORAGE	3ul	/* the server's file or device */
#define RAIO_RES2_POLICY	4ul	/* the server's configuration forbids it */
#define RAIO_RES2_CLASS		0xfful	/* mask of the above */
#define RAIO_RES2_RETRYABLE	0x100ul	/* the same request may succeed later */
#define RAIO_RES2_UNKNOWN	0x200ul	/* it may have been done; and with the errno ETIMEDOUT, or with
					   RAIO_OPT_NO_RECONNECT, it may yet be */
#define RAIO_RES2_LOST		0x400ul	/* an fsync: acknowledged writes may be gone (EIO) */

/* Sessions ---------------------------------------------------------------------------------------------- */

/*
 * Options for raio_connect(). Zero the struct, set `size` to sizeof(struct raio_options), then set what you
 * need: zero is always the default. A larger struct (from a newer header) is accepted if the fields that this
 * library does not know are zero; otherwise EINVAL.
 */
struct raio_options {
	unsigned int size;			/* sizeof(struct raio_options) */
	unsigned int flags;			/* RAIO_OPT_* */
	unsigned int queue_depth;		/* outstanding requests per context; default and maximum:
						   the server's grant */
	unsigned int connect_timeout_ms;	/* connecting and the handshake, over all addresses of the
						   server; default 5,000 */
	unsigned int request_timeout_ms;	/* a server silent for this long with a request outstanding
						   is dead; default: three keepalive intervals */
	unsigned int spin_us;			/* busy-poll for this long before raio_getevents() sleeps, up
						   to four times as long with many iocbs in flight;
						   default 50 */
	unsigned int reconnect_ms;		/* how long a session whose connection was lost tries to go
						   on; default 60,000 */
	unsigned int call_timeout_ms;		/* raio_open() and the like, if the server answers pings but
						   not the call; default 30,000 */
	unsigned int reserved[8];		/* 0 */
};

#define RAIO_OPT_CRC		(1u << 0)	/* CRC32C of headers and data; fails if the server cannot.
						   Without this and RAIO_OPT_NO_CRC: over TCP to another host,
						   if the server can, and TLS does not protect them already */
#define RAIO_OPT_NO_SPIN	(1u << 1)	/* no busy-polling: least CPU, more latency */
#define RAIO_OPT_REDO		(1u << 2)	/* after a restart of the server, do again what may have been
						   done: for a program that alone writes to its files */
#define RAIO_OPT_NO_RECONNECT	(1u << 3)	/* a session ends with its connection */
#define RAIO_OPT_NO_CRC		(1u << 4)	/* no CRC32C but that of iocbs with RAIO_IOCB_CRC */
#define RAIO_OPT_NO_KEYS	(1u << 5)	/* connect in the clear, also to a server in the key directory */
#define RAIO_OPT_FD_ALWAYS	(1u << 6)	/* raio_open() returns a new descriptor > 0 for each file, also
						   the first, and the session's descriptor names none */

/*
 * raio_start - opens a session to the server at `addr`. `transport` is "tcp" or "rdma", for IPv4 and IPv6, or
 * "unix", for a struct sockaddr_un with a path; "rdma" fails with EPROTONOSUPPORT in a library built without
 * it.
 *
 * Returns the session's descriptor (> 0), or -1 with errno: EINVAL (NULL, an address of the wrong length or
 * without a path), EPROTONOSUPPORT (the library does not have this transport), EAFNOSUPPORT (an address of another
 * family than those of the transport),
 * ECONNREFUSED, ENOENT (there is no such Unix socket), EACCES (this user may not write to it), EHOSTUNREACH,
 * ENETUNREACH, ETIMEDOUT, EPROTO (not a raio server, or a protocol violation), EPROTONOSUPPORT (no protocol
 * version in common), EUSERS (the server has its maximum of sessions), ENOMEM, EMFILE. With keys also: ENOKEY (the server
 * is in the key directory, and there is no `key`; or it takes only clients that have keys), EKEYREJECTED (the
 * server has another key than the directory says, or does not accept this client's), EPROTO (it does not
 * speak TLS), EPROTONOSUPPORT ("rdma" to a server in the key directory: that would not be encrypted), EACCES
 * (others can read `key` or write `servers`), EINVAL (one of the files is malformed).
 */
int raio_start(const char *transport, const struct sockaddr *addr, socklen_t addrlen);

/*
 * raio_connect - is raio_start() by URL. The default port is 7240. IPv6 addresses are in brackets. `options` may
 * be NULL. Names are resolved with getaddrinfo(3), and each address is tried in turn.
 *
 *   raio://host:port       connects over TCP, to a port that the server listens on with tcp://, and upgrades
 *                          to RDMA if both hosts have it for the addresses of that connection. Otherwise it
 *                          stays on TCP, and raio_errmsg() returns the reason; it is "" if the
 *                          session is on RDMA.
 *   raio+tcp://host:port   TCP only.
 *   raio+rdma://host:port  RDMA only, by rdma_cm, to a port that the server listens on with rdma://.
 *   raio+unix:///?socket=PATH
 *                          a Unix socket of this machine, which the server listens on with unix://PATH. Keys
 *                          are not used: the kernel tells the server which user connects. In PATH, %20 and so
 *                          on stand for other characters.
 *
 * Returns as raio_start(), or -1 with errno: those of raio_start(), EINVAL (an invalid URL or invalid options),
 * ENOENT (an unknown host name), EKEYREJECTED (the server does not take this user over its Unix socket).
 */
int raio_connect(const char *url, const struct raio_options *options);

/*
 * raio_stop - ends the session immediately: closes its files and connections. The rest of a write in flight
 * is not sent; what the server has received may still reach the file later. The session's contexts become
 * unusable: I/O in flight completes without an event; raio_submit(), raio_getevents(), raio_cancel() and
 * raio_poll_fd() fail with ENOTCONN; raio_destroy() frees them. A raio_open(), raio_fstat() or raio_close()
 * that waits for the server in another thread fails with ENOTCONN. No other thread may use a context of the
 * session during the call.
 *
 * Returns 0, or -1 with errno: EBADF (fd is not a session).
 */
int raio_stop(int fd);

/* Files ------------------------------------------------------------------------------------------------- */

/*
 * raio_open - opens `pathname`, of the form /EXPORT/path/in/the/export, on the server of session `fd`.
 * `flags` are those of open(2): O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_SYNC,
 * O_DSYNC; O_CLOEXEC, O_LARGEFILE, O_NOCTTY, O_NONBLOCK and O_NOFOLLOW are accepted (O_NOFOLLOW is honoured,
 * the others are ignored); any other flag is EINVAL. With O_CREAT the file's mode is 0644: see
 * raio_open_mode().
 *
 * Returns 0 for the first successful open of a session: from then on the session's own descriptor also names
 * that file, until raio_close(). Each further open returns a new descriptor > 0, as the first one does in a
 * session with RAIO_OPT_FD_ALWAYS. On failure -1 with errno:
 * EBADF (fd is not a session), EINVAL, ENAMETOOLONG, ENOENT, EACCES, EROFS (the export is read-only), EEXIST,
 * EISDIR, EXDEV (the path leads out of the export), ELOOP, ENOTDIR, EMFILE, ENOSPC, ENODEV (neither a regular
 * file nor a block device), ENXIO (the device, or the export's mount, is missing), ETIMEDOUT (if the server
 * opens the file later, the session's next call to the server or its end closes it), ENOTCONN, ECONNRESET or
 * EPIPE (the server is lost).
 */
int raio_open(int fd, const char *pathname, int flags);

/* raio_open_mode - is raio_open() with the mode of a file that O_CREAT creates; the server's umask applies. */
int raio_open_mode(int fd, const char *pathname, int flags, mode_t mode);

/*
 * raio_fstat - gets the file's current status from the server. `fd` is a file, or a session for its first
 * file. For a block device st_size is its capacity in bytes.
 *
 * struct stat64 needs _GNU_SOURCE or _LARGEFILE64_SOURCE, defined before the first #include. raio_stat_fd()
 * needs neither.
 *
 * Returns 0, or -1 with errno: EBADF, EINVAL (NULL), EIO, ETIMEDOUT, ENOTCONN, ECONNRESET, EPIPE.
 */
int raio_fstat(int fd, struct stat64 *buf);

/*
 * The status of a file, the same on each system. Nanoseconds count from 1970-01-01 UTC, and are negative before.
 * `size` is first, so that later versions can append fields.
 */
struct raio_stat {
	unsigned long long size;		/* bytes of this struct that were filled in */
	unsigned long long file_bytes;		/* length; of a block device its capacity */
	unsigned long long blocks;		/* allocated, of 512 bytes */
	unsigned long long inode;
	unsigned long long device;		/* that holds the file, as makedev(3) has it on the server */
	unsigned long long rdevice;		/* of a device file: the device that it is */
	long long accessed_ns;
	long long modified_ns;			/* the contents */
	long long changed_ns;			/* the status */
	unsigned int mode;			/* type and permissions, as st_mode */
	unsigned int links;
	unsigned int uid;			/* on the server */
	unsigned int gid;
	unsigned int block_bytes;		/* preferred I/O size */
	unsigned int direct_align;		/* offsets and lengths of writes must be multiples of this: 1
						   unless the file was opened with O_DIRECT */
	unsigned char identity[16];		/* the same as long as it is the same file, another for any
						   other file; zeros if the server cannot tell */
	unsigned long long verifier;		/* changes when acknowledged writes without a later fsync
						   may be lost */
};

/*
 * raio_stat_fd - is raio_fstat() with the whole status that the server has. Fills in at most `size` bytes of *buf.
 *
 * Returns as raio_fstat(), or -1 with errno: those of raio_fstat(), EINVAL (a size that does not reach beyond the
 * first field).
 */
int raio_stat_fd(int fd, struct raio_stat *buf, size_t size);

/*
 * raio_close - closes a file, or the first file of a session (the session continues until raio_stop()). I/O
 * in flight on it completes, and the server closes the file afterwards; errors of that close are lost, so
 * collect the events first.
 *
 * Returns 0, or -1 with errno: EBADF, ETIMEDOUT, ENOTCONN, ECONNRESET, EPIPE, or the errno of close(2) on the
 * server. The file is closed in either case. Some file systems (NFS, FUSE) write back at close, and
 * report EDQUOT, ENOSPC or EIO: written data may be lost then. Only an fsync before the close rules that out.
 */
int raio_close(int fd);

/*
 * raio_pread, raio_pwrite - read or write `count` bytes at `offset` of a file, and wait for the end of it, as
 * pread(2) and pwrite(2) do. `fd` is a file, or a session for its first file. Thread-safe. For programs that do
 * one thing at a time; a context (raio_setup()) does many at a time, and each at less cost.
 *
 * Cost: a round trip. The session keeps up to 8 connections for these calls. Each is made by the first call that
 * finds the others in use, which then takes one or two round trips longer (bounded by connect_timeout_ms), and
 * stays until raio_stop(). With 8 calls in progress further ones wait for their turn. They count as connections of
 * this client for the server's limits.
 *
 * Short counts: as raio_event.res. Fewer than `count` bytes: the end of the file, or the rest failed; the same
 * call on the rest returns which. Any count; more than the server's --io-max is sent in parts. Signals do not
 * interrupt the call. After a lost connection the call waits until the session goes on. A forked child has EBADF.
 * raio_stop() in another thread ends the call with ENOTCONN. After call_timeout_ms the request is cancelled, and
 * the call fails with ETIMEDOUT, 0.1 s later at most; over RDMA its connection is closed then if the server
 * has not answered. In each case `buf` is not accessed any more. A write that fails with ETIMEDOUT,
 * ENOTCONN, ECONNRESET or EPIPE may or may not have been done, and may still reach the file.
 *
 * Returns the bytes read or written, 0 at the end of the file, or -1 with errno: EBADF, EINVAL (negative offset,
 * NULL, a count beyond SSIZE_MAX), EFAULT (a write from unreadable memory), those of raio_setup(), those of an
 * event.
 */
ssize_t raio_pread(int fd, void *buf, size_t count, long long offset);
ssize_t raio_pwrite(int fd, const void *buf, size_t count, long long offset);

/*
 * raio_fsync - makes durable what was written to the file and completed, by any context and call. data_only: as
 * fdatasync(2). Thread-safe; it waits, costs and fails as raio_pwrite(), and with EIO if acknowledged writes were
 * lost (RAIO_RES2_LOST).
 *
 * Returns 0, or -1 with errno: those of raio_pwrite(), or EIO (the storage failed, or acknowledged writes were lost).
 */
int raio_fsync(int fd, int data_only);

/*
 * raio_ftruncate - sets the size of a file that is open for writing. As raio_fsync().
 *
 * Returns 0, or -1 with errno: those of raio_fsync(), EFBIG, ENOSPC, EINVAL (not a regular file, or a size beyond
 * 2^63 - 1).
 */
int raio_ftruncate(int fd, unsigned long long size);

/* A part of a file that has data. What lies between such parts reads as zeros. */
struct raio_extent {
	unsigned long long offset;
	unsigned long long length;
};

/*
 * raio_extents - tells which parts of [offset, offset + length) have data, at most `nr` of them, in order. *end is the
 * offset up to which these are all: ask again from there on until it is offset + length. As raio_fsync().
 *
 * Returns how many, or -1 with errno: EINVAL (NULL, nr below 1, a negative offset, a range beyond 2^63 - 1),
 * EOPNOTSUPP (the server is too old).
 */
int raio_extents(int fd, long long offset, unsigned long long length, struct raio_extent *extents, int nr,
		 unsigned long long *end);

/*
 * raio_copy_file_range - copies `len` bytes within the server, from off_in of one file to off_out of another, or of the
 * same if the ranges do not overlap. The data does not come here; file systems that can share the extents (reflink) do.
 * Both files are of the same session, fd_in open for reading, fd_out for writing. Any length; the destination must
 * have room for it, whatever the source has. Not atomic: of what others write meanwhile it copies the old or the new.
 * As raio_pwrite(), but it takes as long as the storage does: call_timeout_ms does not apply.
 *
 * Returns the bytes copied: fewer than `len` at the end of the source, or if the rest failed; the same call on the rest
 * returns which (0 at the end). Or -1 with errno: EINVAL (ranges that overlap, or beyond 2^63 - 1), EBADF, EOPNOTSUPP (a
 * server that does not know it, or an export null:), EFBIG, ENOSPC, EDQUOT.
 */
long long raio_copy_file_range(int fd_in, long long off_in, int fd_out, long long off_out, unsigned long long len);

/*
 * raio_checksum_range - gets the checksum of a range, which the server reads: the data does not come here. Set
 * checksum->type; the field of that type is filled in. Thread-safe, and as raio_copy_file_range() without a timeout.
 *
 * Returns the number of bytes covered, fewer than `len` at the end of the file, or -1 with errno: EINVAL (NULL, no such
 * type), EBADF, EOPNOTSUPP (the server is too old).
 */
long long raio_checksum_range(int fd, long long offset, unsigned long long len, struct raio_checksum *checksum);

/*
 * raio_flock - takes, converts or releases an advisory lock on the whole file, as flock(2) with LOCK_NB: `operation` is
 * LOCK_SH, LOCK_EX (fd must be open for writing, or EBADF) or LOCK_UN. It never waits. The lock conflicts with those of
 * all other opens of the file: of this session, of other clients, and of programs on the server's host. It does not
 * restrict reads or writes. raio_close() and the end of the session release it. Converting it releases it first, so it may
 * be lost when that fails. If the session ends on the server, which was restarted or not reached for too long, so does the
 * lock, and all calls and iocbs on fd fail with ENOLCK then: others may have changed the file. The lock of a program that
 * is killed ends when the server gives up its session: after its --linger (90 s), or earlier with a smaller reconnect_ms.
 *
 * Returns 0, or -1 with errno: EWOULDBLOCK (another open file has a lock that conflicts), EINVAL, EBADF, EOPNOTSUPP (an
 * export mem: or null:).
 */
int raio_flock(int fd, int operation);

/* Names -------------------------------------------------------------------------------------------------- */

/*
 * Calls on paths. `fd` is a session, or a file of it. A path has the form /EXPORT/path/in/the/export, as that of
 * raio_open(); symbolic links that lead out of the export are not followed (EXDEV). Each call waits for its answer,
 * a round trip, and the calls of a session wait for one another: iocbs do many at a time. Thread-safe. Nothing is
 * kept of the caller's memory.
 *
 * They return 0, or where stated a number, or -1 with errno: EBADF, EINVAL (NULL, unknown flags), ENOENT (also for an
 * empty path), ENAMETOOLONG (4,096 bytes or more; a name of more than 255), ENOTDIR, EACCES, EPERM, EROFS (the
 * export is read-only), ELOOP, EXDEV (another export), EOPNOTSUPP (the server is too old, or its file system cannot),
 * EIO, ENOSPC, EDQUOT, ETIMEDOUT, ENOTCONN; and what the system call of that name says. After ETIMEDOUT, ENOTCONN,
 * or ECONNRESET (the server was restarted meanwhile) a change may have been done; after the first two it may yet be.
 */

/*
 * raio_stat_path, raio_lstat_path - get the status of a path. raio_stat_path() follows a symbolic link,
 * raio_lstat_path() does not. They fill in at most `size` bytes. Identity and verifier are zeros. "/" is the
 * list of exports.
 */
int raio_stat_path(int fd, const char *path, struct raio_stat *buf, size_t size);
int raio_lstat_path(int fd, const char *path, struct raio_stat *buf, size_t size);

/*
 * raio_get - opens a file, reads at most `count` bytes from its start and its status, and closes it: in one request.
 * If stat->file_bytes is more than was returned, there is more: open it. More than the server's --io-max (default
 * 1 MiB) is never returned. `stat` may be NULL.
 *
 * Returns the bytes read, or -1.
 */
ssize_t raio_get(int fd, const char *path, void *buf, size_t count, struct raio_stat *stat, size_t size);

/*
 * raio_put - atomically creates or replaces a file with these bytes, in one request. Others see the
 * complete new file or the old one, also after a crash of the server process. `flags`: RAIO_PUT_EXCL,
 * RAIO_PUT_FSYNC. At most the server's --io-max bytes, else EFBIG. The server's umask applies to `mode`.
 */
int raio_put(int fd, const char *path, const void *buf, size_t count, mode_t mode, unsigned int flags);

/* raio_mkdir - creates a directory. The server's umask applies to `mode`, which is at most 0777, else EPERM. */
int raio_mkdir(int fd, const char *path, mode_t mode);
/* raio_rmdir - removes an empty directory. */
int raio_rmdir(int fd, const char *path);
/* raio_unlink - removes a name of a file, or a symbolic link. */
int raio_unlink(int fd, const char *path);
/*
 * raio_rename - gives a file or directory another name, and replaces what has that name, as rename(2). `flags`: 0 or
 * RAIO_RENAME_NOREPLACE. Both paths are in one export.
 */
int raio_rename(int fd, const char *from, const char *to, unsigned int flags);
/* raio_link - gives a file a second name. Both paths are in one export. */
int raio_link(int fd, const char *original, const char *link);
/* raio_symlink - creates a symbolic link. `target` is kept as it is. The server follows links that stay in the export. */
int raio_symlink(int fd, const char *target, const char *link);
/*
 * raio_readlink - reads the target of a symbolic link, of which it stores at most `size` bytes, without a terminating
 * zero.
 *
 * Returns the length of the target, or -1.
 */
ssize_t raio_readlink(int fd, const char *path, char *buf, size_t size);

/* raio_truncate - sets the size of a regular file: raio_ftruncate() without an open. */
int raio_truncate(int fd, const char *path, unsigned long long size);
/* raio_chmod - sets the permissions, at most 0777: a client gives no set-user-ID bits. */
int raio_chmod(int fd, const char *path, mode_t mode);
/* raio_utimens - sets the modification time, in nanoseconds since 1970-01-01 UTC. `flags`: 0 or RAIO_PATH_NOFOLLOW. */
int raio_utimens(int fd, const char *path, long long modified_ns, unsigned int flags);

/* Space and inodes of a file system. `size` is first, so that later versions can append fields. */
struct raio_statfs {
	unsigned long long size;		/* bytes of this struct that were filled in */
	unsigned long long block_bytes;		/* the unit of the numbers of blocks */
	unsigned long long blocks;
	unsigned long long blocks_free;
	unsigned long long blocks_available;	/* free, and not reserved for root */
	unsigned long long files;		/* inodes; 0: the file system does not count them */
	unsigned long long files_free;
	unsigned long long name_bytes_max;
};

/* raio_statfs_path - gets space and inodes of the path's file system. It fills in at most `size` bytes of *buf. */
int raio_statfs_path(int fd, const char *path, struct raio_statfs *buf, size_t size);

/*
 * raio_getxattr, raio_setxattr, raio_listxattr, raio_removexattr - get, set, list and remove the extended attributes of
 * a file or directory. Their names begin with "user.". A value has at most 64 KiB. With size 0 a get and a list store
 * nothing. `flags`: 0 or RAIO_XATTR_CREATE.
 *
 * A get and a list return the length of the value, or of the names, each of which ends with a zero byte. The others
 * return 0. All return -1 with errno: those of all calls on paths, or ERANGE (`size` is too small), E2BIG (a value of more than 64 KiB),
 * ENODATA (there is no such attribute), EEXIST (with RAIO_XATTR_CREATE there is one).
 */
ssize_t raio_getxattr(int fd, const char *path, const char *name, void *value, size_t size);
int raio_setxattr(int fd, const char *path, const char *name, const void *value, size_t size, unsigned int flags);
ssize_t raio_listxattr(int fd, const char *path, char *list, size_t size);
int raio_removexattr(int fd, const char *path, const char *name);

/* An entry of a directory. `size` is first, so that later versions can append fields. */
struct raio_dirent {
	unsigned long long size;	/* bytes of this struct that were filled in */
	unsigned long long file_bytes;	/* length */
	long long modified_ns;
	unsigned long long inode;
	unsigned int mode;		/* type and permissions, as st_mode; of a symbolic link its own */
	unsigned int has_status;	/* 0: only name and type are known (of exports that are files) */
	char name[256];			/* any bytes but '/', with a terminating zero */
};

/*
 * raio_opendir - begins to list a directory; "/" lists the exports. The server keeps the listing until
 * raio_closedir(), or until the session has begun 16 others. A directory belongs to one thread at a time.
 *
 * Returns it, or NULL with errno: those of all calls on paths, or EMFILE (too many listings of this client).
 */
raio_dir_t raio_opendir(int fd, const char *path);

/*
 * raio_readdir - gets the next entry, in no particular order, without "." and "..". Entries come in pages, a request each.
 * Fills in at most `size` bytes of *entry.
 *
 * Returns 1, 0 at the end, or -1 with errno: EINVAL (not a directory of raio_opendir(), NULL), EBUSY (an iocb
 * reads the next page), ESTALE (the server was restarted, or the session has begun 16 other lists: begin
 * again). After -1, except with EINVAL and EBUSY, there are no more.
 */
int raio_readdir(raio_dir_t dir, struct raio_dirent *entry, size_t size);

/*
 * raio_closedir - ends it, also after raio_stop().
 *
 * Returns 0, or -1 with errno: EINVAL (not a directory of raio_opendir()).
 */
int raio_closedir(raio_dir_t dir);

/* Contexts ---------------------------------------------------------------------------------------------- */

/*
 * raio_setup - creates a context for at most `maxevents` iocbs in flight (1 to 65,536), on the session of
 * `fd`. It opens its own connection. May be called before or after raio_open(). `*ctxp` should be NULL before
 * the call, as with io_setup(); it is set to the context on success and to NULL on failure, except that a
 * context that was not destroyed is left there.
 *
 * Returns 0, or -1 with errno: EBADF, EINVAL (also if `*ctxp` is a context that was not destroyed, even after
 * raio_stop()), ENOMEM, those of raio_start(), or, with RAIO_TRACE, those of open(2).
 */
int raio_setup(int fd, int maxevents, raio_context_t *ctxp);

/*
 * raio_destroy - waits until nothing is in flight (at most the request timeout if the server is silent, and
 * the call timeout if it only answers pings; the rest is abandoned, and a write may still reach the file
 * later), drops uncollected events, and frees the context with its registrations and lent buffers. Memory
 * from raio_alloc() remains valid until raio_free().
 *
 * Returns 0, or -1 with errno: EINVAL (NULL, or not a context).
 */
int raio_destroy(raio_context_t ctx);

/*
 * raio_submit - queues `nr` iocbs and sends as many as the server has granted credits for; the rest is sent
 * as responses arrive. It never blocks.
 *
 * Memory.  `buf` may be any memory of the caller. If it is in a registration (raio_reg_mr(), raio_alloc()),
 * set `mr` to that for zero-copy over RDMA; over TCP it makes no difference. A read with `buf` NULL uses one
 * of the library's buffers, which it lends: when the event is collected, obj->u.c.buf points at the data, and
 * the caller owns it until raio_release() of that event. While maxevents buffers are lent out, such reads
 * wait.
 *
 * A write from unreadable memory fails with -EFAULT in the event of that iocb, and nothing is written. The
 * memory of a read is not checked: if it is not writable, the program gets SIGSEGV where the library copies
 * into it, as it does at least with the beginning of each read, and loses the connection where the kernel
 * copies.
 *
 * Length.  Any. A read or write of more bytes than `io_bytes_max` (the server's --io-max, default 1 MiB) is
 * sent as several requests, its parts, as credits allow, between the requests of other iocbs. It has one event,
 * as from preadv(2) or pwritev(2): the bytes that were done without a gap from its start, or why the first was
 * not; what lies behind a gap does not count, though parts behind it may have been done. RAIO_RES2_UNKNOWN
 * applies to the whole if it applies to a part. A read with `buf` NULL may have at most 1 GiB.
 *
 * Returns how many were accepted, from the front: fewer than nr if the context is full, or if a later one is
 * invalid (submit that one again to get its error). nr 0 returns 0. If the first was not accepted it returns the
 * negated errno: -EAGAIN (the context was full already), -EINVAL (NULL, nr negative, opcode, flags, length, negative
 * offset, buf not within mr, resfd not an eventfd), -EBADF (raio_fildes is not an open file of this session, or resfd is
 * not open), -EMFILE (for an eventfd, see raio_set_eventfd()), -ENOTCONN (the connection has failed). For operations on
 * paths also: -ENOENT (an empty path), -ENAMETOOLONG, -EFBIG (a put of more than `io_bytes_max`), -E2BIG (an attribute's
 * value of more than 64 KiB), -ERANGE (its name has more than 255 bytes).
 */
int raio_submit(raio_context_t ctx, long nr, struct raio_iocb *ios[]);

/*
 * raio_getevents - collects at least `min_nr` and at most `nr` events. With `timeout` NULL it waits for
 * min_nr; with a zero timeout it polls; otherwise it returns what has completed when the timeout expires.
 * min_nr 0 returns what has completed now. If fewer than min_nr are in flight, it still waits for the
 * timeout; without one it returns what there is instead of waiting forever.
 *
 * Returns how many, or the negated errno: -EINVAL (NULL, negative, min_nr > nr, a malformed timeout), -EINTR (a
 * signal, with nothing collected yet), -ENOTCONN (the connection has failed and every event was collected).
 */
int raio_getevents(raio_context_t ctx, long min_nr, long nr, struct raio_event *events,
		   struct timespec *timeout);

/*
 * raio_release - returns the lent buffers of these events. Events without one are skipped.
 *
 * Returns 0, or -1 with errno: EINVAL (NULL, negative nr, or a handle that is not lent out; the others are
 * still released).
 */
int raio_release(raio_context_t ctx, long nr, struct raio_event *events);

/*
 * raio_cancel - tries to cancel an iocb. Blocks for a round trip if it was sent. If the server does not
 * answer the cancel request within the request timeout, the context's connection ends with everything in
 * flight on it, even if the server answers pings.
 *
 * Returns 0 if the iocb was cancelled and has no effect; *evt is its event (res -ECANCELED), and
 * raio_getevents() will not return it. Otherwise raio_getevents() returns its event as usual, and this call -1
 * with errno: EAGAIN (too late: it is executing or has completed; a long one whose first parts are done ends with
 * as many bytes), EINVAL (NULL, or not in flight), ENOTCONN.
 */
int raio_cancel(raio_context_t ctx, struct raio_iocb *iocb, struct raio_event *evt);

/*
 * raio_poll_fd - gets a kernel descriptor for poll(2), epoll(7), libevent, libuv: readable when raio_getevents()
 * may have work. Then call raio_getevents(ctx, 0, nr, ...) until it returns fewer than nr. It belongs to the
 * context; do not read, write or close it.
 *
 * Returns it, or -1 with errno: EINVAL, ENOTCONN, EMFILE, ENOMEM.
 */
int raio_poll_fd(raio_context_t ctx);

/* Memory ------------------------------------------------------------------------------------------------ */

/*
 * raio_reg_mr - registers the caller's memory [buf, buf + len) for I/O on this context. The memory must stay
 * mapped until raio_dereg_mr() or raio_destroy(). Register few large regions, not one per I/O.
 *
 * Returns 0 and sets *mr, or -1 with errno: EINVAL (NULL, length 0, wraps around), ENOMEM.
 */
int raio_reg_mr(raio_context_t ctx, void *buf, size_t len, raio_mr_t *mr);

/*
 * raio_dereg_mr - unregisters it.
 *
 * Returns 0, or -1 with errno: EINVAL (not a registration of this context), EBUSY (I/O in flight uses it).
 */
int raio_dereg_mr(raio_context_t ctx, raio_mr_t mr);

/*
 * raio_alloc - allocates `len` bytes, zeroed, aligned to at least 4 KiB, on huge pages if the system has free
 * ones, and registers them. The pages are prefaulted, so that the first I/O on them is as fast as later I/O.
 * `*mr` is set to the registration if mr is not NULL. raio_free() ends it.
 *
 * Returns the memory, or NULL with errno: EINVAL (ctx, or length 0), ENOMEM.
 */
void *raio_alloc(raio_context_t ctx, size_t len, raio_mr_t *mr);

/*
 * raio_free - frees memory from raio_alloc(), of this context or of one that was destroyed.
 *
 * Returns 0, or -1 with errno: EINVAL (not from raio_alloc()), EBUSY (I/O in flight uses it).
 */
int raio_free(raio_context_t ctx, void *buf);

/* Information ------------------------------------------------------------------------------------------- */

/* The counters of a context since raio_setup(). `size` is first, so that later versions can append fields. */
struct raio_stats {
	unsigned long long size;		/* bytes of this struct that were filled in */
	unsigned long long submitted;		/* iocbs accepted by raio_submit() */
	unsigned long long completed;		/* including failures */
	unsigned long long failed;		/* events with a negative res */
	unsigned long long bytes_read;
	unsigned long long bytes_written;
	unsigned long long bounced_bytes;	/* copied by the library to or from the caller's memory */
	unsigned long long sends;		/* system calls that sent */
	unsigned long long receives;		/* system calls that received something */
	unsigned long long sleeps;		/* times raio_getevents() went to sleep */
	unsigned long long reconnects;		/* connections that took the place of a lost one */
	unsigned long long in_flight;		/* now */
	unsigned long long queue_depth;		/* granted by the server */
	unsigned long long io_bytes_max;	/* granted by the server: longer iocbs are sent in parts */
	unsigned long long resent;		/* requests sent again over another connection */
	unsigned long long unknown;		/* iocbs that failed with RAIO_RES2_UNKNOWN */
	unsigned long long lost;		/* fsyncs that failed with RAIO_RES2_LOST */
	unsigned long long checksum_errors;	/* requests whose data arrived damaged, each time */
	unsigned long long crc;			/* 1: all requests have CRC32C, see RAIO_OPT_CRC */
};

/*
 * raio_get_stats - gets the counters of a context. It fills in at most `size` bytes of *stats.
 *
 * Returns 0, or -1 with errno: EINVAL (NULL, not a context, or a size that does not reach beyond the first field).
 */
int raio_get_stats(raio_context_t ctx, struct raio_stats *stats, size_t size);

/*
 * raio_errmsg - tells of the latest raio call in this thread why it failed and what to do about it.
 *
 * Returns the message, "" after success. After a raio_getevents() that returned failures it is the message of the
 * last of them; after one that returned 0 while the connection is being made again, since when that is, and what
 * stands in the way; after a raio_connect() it is why the session is not on RDMA. The address is the same for all calls of a thread;
 * the text is valid until the next one. It is meant for people: the wording may change.
 */
const char *raio_errmsg(void);

/*
 * raio_event_errmsg - tells why an event failed, which is of the context's latest raio_getevents() or a later
 * raio_cancel().
 *
 * Returns the message, valid until the context's next raio_getevents(); "" for an event that did not fail; "" with errno: EINVAL (NULL, not a context, an
 * earlier event).
 */
const char *raio_event_errmsg(raio_context_t ctx, const struct raio_event *event);

/*
 * raio_crc32c - computes the CRC32C (Castagnoli, as in iSCSI and SSE 4.2) of `len` bytes.
 *
 * Returns it. Start with `crc` 0; the result, passed as `crc` with the bytes that follow, gives that of both.
 */
unsigned int raio_crc32c(unsigned int crc, const void *buf, size_t len);

/*
 * raio_abi_version - tells which library is loaded.
 *
 * Returns its RAIO_ABI_VERSION.
 */
unsigned int raio_abi_version(void);

/* Preparing control blocks ------------------------------------------------------------------------------ */

/*
 * Each raio_prep_* zeroes the iocb, including `data`, and sets it up. Set `data` afterwards. The raio_set_*
 * come after it.
 *
 * These functions are inline, and the library exports them under the same names, for bindings that cannot
 * compile C. A program that defines RAIO_NO_INLINE before the first #include calls those of the library.
 */

#ifdef RAIO_NO_INLINE

void raio_prep_pread(struct raio_iocb *iocb, int fd, void *buf, size_t count, long long offset,
		raio_mr_t mr);
void raio_prep_pwrite(struct raio_iocb *iocb, int fd, void *buf, size_t count, long long offset,
		raio_mr_t mr);
void raio_prep_preadv(struct raio_iocb *iocb, int fd, const struct iovec *iov, int iovcnt,
		long long offset, raio_mr_t mr);
void raio_prep_pwritev(struct raio_iocb *iocb, int fd, const struct iovec *iov, int iovcnt,
		long long offset, raio_mr_t mr);
void raio_prep_fsync(struct raio_iocb *iocb, int fd, int data_only);
void raio_prep_discard(struct raio_iocb *iocb, int fd, long long offset, unsigned long long nbytes);
void raio_prep_write_zeroes(struct raio_iocb *iocb, int fd, long long offset, unsigned long long nbytes);
void raio_prep_allocate(struct raio_iocb *iocb, int fd, long long offset, unsigned long long nbytes,
		int keep_size);
void raio_prep_close(struct raio_iocb *iocb, int fd);
void raio_prep_stat_fd(struct raio_iocb *iocb, int fd, struct raio_stat *stat);
void raio_prep_ftruncate(struct raio_iocb *iocb, int fd, unsigned long long size);
void raio_prep_copy_file_range(struct raio_iocb *iocb, struct raio_copy_args *args, int fd_in, long long off_in,
		int fd_out, long long off_out, unsigned long long len);
void raio_prep_checksum(struct raio_iocb *iocb, int fd, unsigned int type, long long offset,
		unsigned long long len, struct raio_checksum *checksum);
void raio_prep_flock(struct raio_iocb *iocb, int fd, int operation);
void raio_prep_open(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, int flags,
		mode_t mode);
void raio_prep_stat_path(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		struct raio_stat *stat, unsigned int flags);
void raio_prep_get(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, void *buf,
		size_t count, struct raio_stat *stat, raio_mr_t mr);
void raio_prep_put(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, const void *buf,
		size_t count, mode_t mode, unsigned int flags, raio_mr_t mr);
void raio_prep_mkdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, mode_t mode);
void raio_prep_rmdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path);
void raio_prep_unlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path);
void raio_prep_rename(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *from,
		const char *to, unsigned int flags);
void raio_prep_link(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *original,
		const char *link);
void raio_prep_symlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *target,
		const char *link);
void raio_prep_readlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, char *buf,
		size_t size);
void raio_prep_truncate(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		unsigned long long size);
void raio_prep_chmod(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, mode_t mode);
void raio_prep_utimens(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		long long modified_ns, unsigned int flags);
void raio_prep_statfs_path(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		struct raio_statfs *buf);
void raio_prep_getxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		const char *name, void *value, size_t size);
void raio_prep_setxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		const char *name, const void *value, size_t size, unsigned int flags);
void raio_prep_listxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path, char *list,
		size_t size);
void raio_prep_removexattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		const char *name);
void raio_prep_opendir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
		raio_dir_t *dir);
void raio_prep_readdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, raio_dir_t dir);
void raio_set_eventfd(struct raio_iocb *iocb, int eventfd);
void raio_set_crc(struct raio_iocb *iocb, unsigned int crc);
void raio_set_timeout(struct raio_iocb *iocb, unsigned int timeout_ms);

#else /* RAIO_NO_INLINE */

static inline void raio_prep_(struct raio_iocb *iocb, int opcode, int fd, void *buf,
			      unsigned long long nbytes, long long offset, raio_mr_t mr)
{
	memset(iocb, 0, sizeof(*iocb));
	iocb->raio_fildes = fd;
	iocb->raio_lio_opcode = opcode;
	iocb->u.c.buf = buf;
	iocb->u.c.nbytes = nbytes;
	iocb->u.c.offset = offset;
	iocb->u.c.mr = mr;
}

/*
 * raio_prep_pread, raio_prep_pwrite - prepare a read into `buf`, or a write from it, of `count` bytes. `mr` is the
 * registration that contains `buf`, or NULL. For a read with `buf` NULL the library lends a buffer: see raio_submit().
 * The event's `res` is the bytes that were read or written.
 */
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

/*
 * raio_prep_preadv, raio_prep_pwritev - prepare the same with several buffers, which are contiguous in the file.
 * raio_submit() copies the iovecs, at most 1,024; the library owns the buffers that they point at while in
 * flight.
 */
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

/*
 * raio_prep_fsync - prepares an fsync: it makes durable every write whose event was collected before it was submitted,
 * on any context. data_only: as fdatasync(2), and RAIO_IOCB_DATASYNC is set.
 */
static inline void raio_prep_fsync(struct raio_iocb *iocb, int fd, int data_only)
{
	raio_prep_(iocb, RAIO_CMD_FSYNC, fd, NULL, 0, 0, NULL);
	if (data_only)
		iocb->u.c.flags |= RAIO_IOCB_DATASYNC;
}

/*
 * raio_prep_discard, raio_prep_write_zeroes - prepare to deallocate a range, or to have it read as zeros. Any length, in
 * one request: --io-max does not apply to these two and raio_prep_allocate(). On a server that is too old to know one,
 * its event has -EOPNOTSUPP, and nothing is sent.
 */
static inline void raio_prep_discard(struct raio_iocb *iocb, int fd, long long offset,
				     unsigned long long nbytes)
{
	raio_prep_(iocb, RAIO_CMD_DISCARD, fd, NULL, nbytes, offset, NULL);
}

static inline void raio_prep_write_zeroes(struct raio_iocb *iocb, int fd, long long offset,
					  unsigned long long nbytes)
{
	raio_prep_(iocb, RAIO_CMD_WRITE_ZEROES, fd, NULL, nbytes, offset, NULL);
}

/*
 * raio_prep_allocate - prepares an fallocate(2) with mode 0, or FALLOC_FL_KEEP_SIZE if keep_size: no byte of the file changes, also with
 * concurrent writers. -EOPNOTSUPP if the server's storage does not support it.
 */
static inline void raio_prep_allocate(struct raio_iocb *iocb, int fd, long long offset,
				      unsigned long long nbytes, int keep_size)
{
	raio_prep_(iocb, RAIO_CMD_ALLOCATE, fd, NULL, nbytes, offset, NULL);
	if (keep_size)
		iocb->u.c.flags |= RAIO_IOCB_KEEP_SIZE;
}

/*
 * raio_prep_close - prepares to close a file, as raio_close(): its descriptor ends when raio_submit() accepts the iocb. If other iocbs are in
 * flight on it, this one completes at once, and the server closes the file when they have. One that is cancelled or
 * times out is closed nevertheless, later.
 */
static inline void raio_prep_close(struct raio_iocb *iocb, int fd)
{
	raio_prep_(iocb, RAIO_CMD_CLOSE, fd, NULL, 0, 0, NULL);
}

/* raio_prep_stat_fd - prepares a raio_stat_fd(). *stat is filled in when the event is collected. */
static inline void raio_prep_stat_fd(struct raio_iocb *iocb, int fd, struct raio_stat *stat)
{
	raio_prep_(iocb, RAIO_CMD_STAT_FD, fd, stat, sizeof(*stat), 0, NULL);
}

/* raio_prep_ftruncate - prepares a raio_ftruncate(). */
static inline void raio_prep_ftruncate(struct raio_iocb *iocb, int fd, unsigned long long size)
{
	raio_prep_(iocb, RAIO_CMD_FTRUNCATE, fd, NULL, size, 0, NULL);
}

/*
 * raio_prep_copy_file_range - prepares a raio_copy_file_range(), in one request: `res` is the bytes copied. Fills in *args, which raio_submit() copies. One that
 * is cancelled, or times out, when a part is done ends with that part.
 */
static inline void raio_prep_copy_file_range(struct raio_iocb *iocb, struct raio_copy_args *args, int fd_in,
					     long long off_in, int fd_out, long long off_out, unsigned long long len)
{
	memset(args, 0, sizeof(*args));
	args->fd = fd_in;
	args->offset = off_in;
	raio_prep_(iocb, RAIO_CMD_COPY_FILE_RANGE, fd_out, args, len, off_out, NULL);
}

/*
 * raio_prep_checksum - prepares a raio_checksum_range() of this type, in one request: `res` is the number of bytes covered, and *checksum, which
 * belongs to the library until then, is filled in when the event is collected.
 */
static inline void raio_prep_checksum(struct raio_iocb *iocb, int fd, unsigned int type, long long offset,
				      unsigned long long len, struct raio_checksum *checksum)
{
	memset(checksum, 0, sizeof(*checksum));
	checksum->type = type;
	raio_prep_(iocb, RAIO_CMD_CHECKSUM, fd, checksum, len, offset, NULL);
}

/* raio_prep_flock - prepares a raio_flock(). */
static inline void raio_prep_flock(struct raio_iocb *iocb, int fd, int operation)
{
	raio_prep_(iocb, RAIO_CMD_FLOCK, fd, NULL, (unsigned long long)operation, 0, NULL);
}

/*
 * Operations on paths, as the calls under "Names". `fd` is the session, or a file of it. Each needs a struct
 * raio_path_args of its own, which these functions fill in: see there what must stay valid, and until when. The
 * event's `res` is 0 unless stated. raio_submit() itself fails with -ENOENT (an empty path), -ENAMETOOLONG, or -EFBIG
 * (a put of more than `io_bytes_max`).
 */
static inline void raio_prep_path_(struct raio_iocb *iocb, int opcode, int fd, struct raio_path_args *args,
				   const char *path)
{
	memset(args, 0, sizeof(*args));
	args->path = path;
	raio_prep_(iocb, opcode, fd, args, sizeof(*args), 0, NULL);
}

/*
 * raio_prep_open - prepares a raio_open_mode(). `res` is a new descriptor > 0 for each file, also for the first of a session. A file whose open
 * times out is closed again.
 */
static inline void raio_prep_open(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				  int flags, mode_t mode)
{
	raio_prep_path_(iocb, RAIO_CMD_OPEN, fd, args, path);
	args->flags = (unsigned int)flags;
	args->mode = mode;
}

/* raio_prep_stat_path - prepares a raio_stat_path(), or with RAIO_PATH_NOFOLLOW a raio_lstat_path(). */
static inline void raio_prep_stat_path(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				       struct raio_stat *stat, unsigned int flags)
{
	raio_prep_path_(iocb, RAIO_CMD_STAT_PATH, fd, args, path);
	args->stat = stat;
	args->stat_size = sizeof(*stat);
	args->flags = flags;
}

/* raio_prep_get - prepares a raio_get(): `res` is the bytes read. `stat` may be NULL. raio_set_crc() protects it, as a read. */
static inline void raio_prep_get(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				 void *buf, size_t count, struct raio_stat *stat, raio_mr_t mr)
{
	raio_prep_path_(iocb, RAIO_CMD_GET, fd, args, path);
	args->buf = buf;
	args->nbytes = count;
	args->stat = stat;
	args->stat_size = sizeof(*stat);
	iocb->u.c.mr = mr;
}

/*
 * raio_prep_put - prepares a raio_put(): `res` is `count`. raio_set_crc() protects it, as a write. To set the modification time, set
 * args->modified_ns afterwards, and RAIO_PUT_MTIME in args->flags.
 */
static inline void raio_prep_put(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				 const void *buf, size_t count, mode_t mode, unsigned int flags, raio_mr_t mr)
{
	raio_prep_path_(iocb, RAIO_CMD_PUT, fd, args, path);
	args->buf = (void *)buf;
	args->nbytes = count;
	args->mode = mode;
	args->flags = flags;
	iocb->u.c.mr = mr;
}

/*
 * raio_prep_mkdir, raio_prep_rmdir, raio_prep_unlink, raio_prep_rename, raio_prep_link, raio_prep_symlink - prepare the
 * calls of these names.
 */
static inline void raio_prep_mkdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				   mode_t mode)
{
	raio_prep_path_(iocb, RAIO_CMD_MKDIR, fd, args, path);
	args->mode = mode;
}

static inline void raio_prep_rmdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path)
{
	raio_prep_path_(iocb, RAIO_CMD_RMDIR, fd, args, path);
}

static inline void raio_prep_unlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path)
{
	raio_prep_path_(iocb, RAIO_CMD_UNLINK, fd, args, path);
}

static inline void raio_prep_rename(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *from,
				    const char *to, unsigned int flags)
{
	raio_prep_path_(iocb, RAIO_CMD_RENAME, fd, args, from);
	args->other = to;
	args->flags = flags;
}

static inline void raio_prep_link(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *original,
				  const char *link)
{
	raio_prep_path_(iocb, RAIO_CMD_LINK, fd, args, original);
	args->other = link;
}

static inline void raio_prep_symlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *target,
				     const char *link)
{
	raio_prep_path_(iocb, RAIO_CMD_SYMLINK, fd, args, link);
	args->other = target;
}

/* raio_prep_readlink - prepares a raio_readlink(): `res` is how many bytes were stored. */
static inline void raio_prep_readlink(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				      char *buf, size_t size)
{
	raio_prep_path_(iocb, RAIO_CMD_READLINK, fd, args, path);
	args->buf = buf;
	args->nbytes = size;
}

/*
 * raio_prep_truncate, raio_prep_chmod, raio_prep_utimens - prepare a RAIO_CMD_SET_ATTRIBUTES each. To set several attributes at once,
 * set the others in *args afterwards, and their RAIO_SET_* in args->flags.
 */
static inline void raio_prep_truncate(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				      unsigned long long size)
{
	raio_prep_path_(iocb, RAIO_CMD_SET_ATTRIBUTES, fd, args, path);
	args->nbytes = size;
	args->flags = RAIO_SET_SIZE;
}

static inline void raio_prep_chmod(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				   mode_t mode)
{
	raio_prep_path_(iocb, RAIO_CMD_SET_ATTRIBUTES, fd, args, path);
	args->mode = mode;
	args->flags = RAIO_SET_MODE;
}

static inline void raio_prep_utimens(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				     long long modified_ns, unsigned int flags)
{
	raio_prep_path_(iocb, RAIO_CMD_SET_ATTRIBUTES, fd, args, path);
	args->modified_ns = modified_ns;
	args->flags = flags | RAIO_SET_MTIME;
}

/* raio_prep_statfs_path - prepares a raio_statfs_path(). */
static inline void raio_prep_statfs_path(struct raio_iocb *iocb, int fd, struct raio_path_args *args,
					 const char *path, struct raio_statfs *buf)
{
	raio_prep_path_(iocb, RAIO_CMD_STATFS, fd, args, path);
	args->buf = buf;
	args->nbytes = sizeof(*buf);
}

/*
 * raio_prep_getxattr, raio_prep_setxattr, raio_prep_listxattr, raio_prep_removexattr - prepare the calls of these names.
 * `res` of a get and a list is the length. raio_submit() copies the attribute's name, and fails with -E2BIG (a value of
 * more than 64 KiB) or -ERANGE (a name of more than 255 bytes). raio_set_crc() protects a set, as a write.
 */
static inline void raio_prep_getxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				      const char *name, void *value, size_t size)
{
	raio_prep_path_(iocb, RAIO_CMD_GETXATTR, fd, args, path);
	args->other = name;
	args->buf = value;
	args->nbytes = size;
}

static inline void raio_prep_setxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				      const char *name, const void *value, size_t size, unsigned int flags)
{
	raio_prep_path_(iocb, RAIO_CMD_SETXATTR, fd, args, path);
	args->other = name;
	args->buf = (void *)value;
	args->nbytes = size;
	args->flags = flags;
}

static inline void raio_prep_listxattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				       char *list, size_t size)
{
	raio_prep_path_(iocb, RAIO_CMD_LISTXATTR, fd, args, path);
	args->buf = list;
	args->nbytes = size;
}

static inline void raio_prep_removexattr(struct raio_iocb *iocb, int fd, struct raio_path_args *args,
					 const char *path, const char *name)
{
	raio_prep_path_(iocb, RAIO_CMD_REMOVEXATTR, fd, args, path);
	args->other = name;
}

/*
 * raio_prep_opendir - prepares a raio_opendir(): *dir is set when the event is collected, unless it is a failure. `res` is how many entries
 * raio_readdir() has without waiting for the server: 0 if the directory is empty. For more, see raio_prep_readdir().
 */
static inline void raio_prep_opendir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, const char *path,
				     raio_dir_t *dir)
{
	raio_prep_path_(iocb, RAIO_CMD_OPENDIR, fd, args, path);
	args->buf = dir;
	args->nbytes = sizeof(*dir);
}

/*
 * raio_prep_readdir - prepares to bring the next page of a directory's entries. `res` is the number of entries that raio_readdir() can then return
 * without waiting; 0: there are no more. Until the event is collected raio_readdir() fails with EBUSY; raio_closedir()
 * does not, and the entries are dropped. If the iocb fails, or is cancelled, the directory has no more entries: close
 * it, and begin again.
 */
static inline void raio_prep_readdir(struct raio_iocb *iocb, int fd, struct raio_path_args *args, raio_dir_t dir)
{
	raio_prep_path_(iocb, RAIO_CMD_READDIR, fd, args, NULL);
	args->buf = dir;
}

/*
 * raio_set_eventfd - adds 1 to `eventfd` when this iocb completes. Call it after raio_prep_*. The library holds the eventfd open
 * while iocbs that use it are in flight, with one duplicate descriptor per context and eventfd, so the
 * program may close its own. (Where kcmp(2) is forbidden, it takes one per raio_submit().) A full eventfd is
 * skipped rather than waited for, unless it has no EFD_NONBLOCK and another thread fills it at that moment.
 * The library has no threads: it detects completions, and signals the eventfd, only within calls on the
 * context (raio_submit, raio_getevents, raio_cancel). A program that sleeps on the eventfd must also watch
 * raio_poll_fd(), and call raio_getevents(ctx, 0, nr, ...) when that becomes readable.
 */
static inline void raio_set_eventfd(struct raio_iocb *iocb, int eventfd)
{
	iocb->u.c.flags |= RAIO_IOCB_EVENTFD;
	iocb->u.c.resfd = (unsigned int)eventfd;
}

/*
 * raio_set_crc - protects an iocb by checksums from memory to memory, also in a session without (RAIO_OPT_NO_CRC). Call it
 * after raio_prep_*. For a write, `crc` is the raio_crc32c() of its data, computed when the data was made: the
 * server compares before it writes. For a read, iocb->crc is that of the bytes that were read, as the server
 * has said and as the library has compared it with the buffer: no other pass over the data is needed. For all
 * others `crc` is not used; the request itself is protected.
 *
 * What arrives damaged is sent again. The third time the iocb fails with -EILSEQ and RAIO_RES2_TRANSPORT, and
 * the session goes on: so it does if a buffer is changed while it is being written, or `crc` is wrong. Nothing
 * is written then, except that of a write longer than `io_bytes_max` parts may have been. (Its data is compared
 * with `crc` before the first part is sent.) -EOPNOTSUPP: the server is too old.
 */
static inline void raio_set_crc(struct raio_iocb *iocb, unsigned int crc)
{
	iocb->u.c.flags |= RAIO_IOCB_CRC;
	iocb->crc = crc;
}

/*
 * raio_set_timeout - sets a timeout: the iocb completes with -ETIMEDOUT if it has not completed `timeout_ms` milliseconds
 * after raio_submit(). Call it after raio_prep_*; the timeout stays set when the iocb is submitted again.
 * 0: no timeout (default). Values above RAIO_IOCB_TIMEOUT_MAX are reduced to it.
 *
 * If the iocb was sent, the server is asked to cancel it. -ETIMEDOUT without RAIO_RES2_UNKNOWN: it was not done,
 * and will not be. If the server cannot cancel it any more, or does not answer within 50 ms, the iocb completes
 * nevertheless, and its buffer is the program's again. A write, another change of the file, or a lock, then has
 * RAIO_RES2_UNKNOWN: it may have been done, or may yet be. The request keeps its place in the queue depth until
 * the server answers. Over RDMA, where the server may still reach the buffer, the iocb completes when the server
 * has answered; if it was too late to cancel, as if there were no timeout. An iocb longer than `io_bytes_max`
 * completes with the bytes that were done without a gap from its start, if there are any.
 *
 * The library has no threads: it looks at timeouts within raio_getevents() and raio_cancel(). raio_poll_fd()
 * becomes readable in time.
 */
static inline void raio_set_timeout(struct raio_iocb *iocb, unsigned int timeout_ms)
{
	if (timeout_ms > RAIO_IOCB_TIMEOUT_MAX)
		timeout_ms = RAIO_IOCB_TIMEOUT_MAX;
	iocb->u.c.flags &= (1u << RAIO_IOCB_TIMEOUT_SHIFT) - 1;
	iocb->u.c.flags |= RAIO_IOCB_TIMEOUT_MS(timeout_ms);
}

#endif /* RAIO_NO_INLINE */

#ifdef __cplusplus
}
#endif

#endif /* LIBRAIO_H */
