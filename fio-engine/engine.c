/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The fio ioengine `raio`: fio reads and writes files of a raio_server through libraio's C API.
 *
 * One fio job is one session with one context. fio calls setup() and prepopulate() in the parent, before it forks or
 * starts the job's thread, so those two open a session of their own and end it before they return; init() opens the
 * one that carries the I/O. Every io_u owns one iocb and the text of its failure, for life. queue() fills it in and puts it on `queued`; commit()
 * hands the whole queue to raio_submit(), at the latest when fio's queue is full; getevents() collects. All I/O buffers of a job lie in one
 * raio_alloc() region.
 *
 * fio must never touch a local file of the same name: FIO_DISKLESSIO keeps it from creating, statting, invalidating
 * and laying out, and what it would do locally all the same is refused in setup().
 */
#include "fio.h"
#include "optgroup.h"

#include <limits.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "libraio.h"

/* A layout keeps this many bytes in flight, in blocks of the job's own size. */
#define LAYOUT_BYTES	(4u << 20)

/* How often the end of a child is looked for. */
#define CHILD_POLL_US	5000

struct raio_fio_options {
	void *td;			/* fio's */
	char *url;
	unsigned int queue_depth;
	unsigned int request_timeout_ms;
	unsigned int crc;
	unsigned int spin_us;
	unsigned int batch;
	unsigned int reconnect;
	unsigned int redo;
};

/* What belongs to an io_u, for life: its engine_data */
struct request {
	struct raio_iocb iocb;		/* ->data is the io_u */
	char *failure;			/* why it failed the last time: fio asks once it has printed the error itself */
};

/* td->io_ops_data, from init() to cleanup() */
struct job {
	int session;
	bool lost;			/* the connection has failed: asking this server for more would wait for another timeout */
	raio_context_t ctx;
	void *buffers;			/* td->orig_buffer to be */
	size_t buffers_bytes;
	raio_mr_t mr;			/* of `buffers` */
	unsigned int depth;		/* how many io_us there are: bounds every array below */
	unsigned int batch;		/* send when so many are queued, or fio is about to wait */
	struct request *requests;	/* by io_u->index */
	struct raio_iocb **queued;	/* not yet taken by raio_submit(), oldest first */
	unsigned int queued_nr;
	struct io_u **refused;		/* raio_submit() would not have them: getevents() reports them */
	unsigned int refused_nr;
	struct raio_event *events;	/* collected from libraio; from `events_at` on not yet handed to fio */
	unsigned int events_at;
	unsigned int events_nr;
	struct io_u **done;		/* what the last getevents() handed to fio, for event() */
};

static struct ioengine_ops ioengine;

static struct fio_option options[] = {
	{
		.name	= "raio_url",
		.lname	= "raio server URL",
		.help	= "The server: raio://HOST[:PORT], raio+tcp://HOST[:PORT], raio+rdma://HOST[:PORT] or raio+unix:///?socket=PATH",
		.type	= FIO_OPT_STR_STORE,
		.off1	= offsetof(struct raio_fio_options, url),
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_queue_depth",
		.lname	= "raio queue depth",
		.help	= "Requests on the wire for each job (0: what the server grants; iodepth beyond it waits here)",
		.type	= FIO_OPT_INT,
		.off1	= offsetof(struct raio_fio_options, queue_depth),
		.def	= "0",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_request_timeout_ms",
		.lname	= "raio request timeout",
		.help	= "The job fails if the server is silent for this many milliseconds while it owes an answer (0: three times "
			  "the keepalive interval that it grants)",
		.type	= FIO_OPT_INT,
		.off1	= offsetof(struct raio_fio_options, request_timeout_ms),
		.def	= "0",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_crc",
		.lname	= "raio CRC32C",
		.help	= "Protect headers and data on the wire with CRC32C",
		.type	= FIO_OPT_STR,
		.off1	= offsetof(struct raio_fio_options, crc),
		.posval	= {
			{ .ival = "auto", .oval = 0, .help = "Over TCP to another host" },
			{ .ival = "1", .oval = RAIO_OPT_CRC, .help = "Yes" },
			{ .ival = "0", .oval = RAIO_OPT_NO_CRC, .help = "No" },
		},
		.def	= "auto",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_spin_us",
		.lname	= "raio spin time",
		.help	= "Wait actively this many microseconds for a completion before sleeping, up to 4 times as many at great depth (0: sleep at once)",
		.type	= FIO_OPT_INT,
		.off1	= offsetof(struct raio_fio_options, spin_us),
		.def	= "50",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_reconnect",
		.lname	= "raio reconnect window",
		.help	= "Seconds that a job whose connection is lost tries to go on (0: it fails at once)",
		.type	= FIO_OPT_INT,
		.off1	= offsetof(struct raio_fio_options, reconnect),
		.def	= "60",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_redo",
		.lname	= "raio redo",
		.help	= "After a restart of the server do again what may have been done (1), as nobody else writes to the job's "
			  "files; 0: such a write fails",
		.type	= FIO_OPT_BOOL,
		.off1	= offsetof(struct raio_fio_options, redo),
		.def	= "1",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= "raio_batch",
		.lname	= "raio batch",
		.help	= "Send up to this many I/Os together while fio fills its queue (0: half of iodepth, from 4 to 32; "
			  "1: each by itself). Only with iodepth_batch_submit=1 and no thinktime or rate",
		.type	= FIO_OPT_INT,
		.off1	= offsetof(struct raio_fio_options, batch),
		.def	= "0",
		.category = FIO_OPT_C_ENGINE,
		.group	= FIO_OPT_G_INVALID,
	},
	{
		.name	= NULL,
	},
};

/* Reports a failure, and returns 1 for fio's hooks to return. */
static int failed(struct thread_data *td, const char *what, const char *call, int err, const char *text)
{
	log_err("raio: %s: %s\n", what, *text ? text : strerror(err));
	td_verror(td, err, call);
	return 1;
}

/* The same for the raio call that has just failed. */
static int raio_failed(struct thread_data *td, const char *what, const char *call)
{
	return failed(td, what, call, errno, raio_errmsg());
}

/* Sessions and files ---------------------------------------------------------------------------------------- */

/* A new session's descriptor, or -1 after reporting why not. */
static int start_session(struct thread_data *td)
{
	struct raio_fio_options *o = td->eo;
	struct raio_options opts;
	int session;

	memset(&opts, 0, sizeof(opts));
	opts.size = sizeof(opts);
	opts.queue_depth = o->queue_depth;
	opts.request_timeout_ms = o->request_timeout_ms;
	opts.spin_us = o->spin_us;
	opts.flags |= o->crc;
	if (!o->spin_us)
		opts.flags |= RAIO_OPT_NO_SPIN;
	if (!o->reconnect)
		opts.flags |= RAIO_OPT_NO_RECONNECT;
	else if (o->reconnect <= UINT_MAX / 1000)
		opts.reconnect_ms = o->reconnect * 1000;
	else
		opts.reconnect_ms = UINT_MAX;
	if (o->redo)
		opts.flags |= RAIO_OPT_REDO;

	session = raio_connect(o->url, &opts);
	if (session < 0)
		raio_failed(td, o->url, "raio_connect");
	return session;
}

/* The file's descriptor, or -1 with errno: a session's first file goes by the session's own descriptor. */
static int open_in(int session, const char *path, int flags)
{
	int fd = raio_open(session, path, flags);

	return fd ? fd : session;
}

/*
 * Waits for completions as raio_getevents() does, but no longer than until fio is to end: 0 then. Storage that hangs may hold up
 * a completion for ever.
 */
static long wait_for_events(struct thread_data *td, raio_context_t ctx, long nr, struct raio_event *events)
{
	struct timespec timeout;
	long ret;

	do {
		timeout = (struct timespec) { .tv_sec = 1 };
		ret = raio_getevents(ctx, 1, nr, events, &timeout);
	} while ((!ret || ret == -EINTR) && !td->terminate);
	return ret == -EINTR ? 0 : ret;
}

/*
 * Submits one iocb, with nothing else in flight, and waits for its event. Returns that event's result; raio_errmsg() says why it
 * failed. -EINTR if fio is to end: then the iocb is in flight still.
 */
static long run_one(struct thread_data *td, raio_context_t ctx, struct raio_iocb *iocb, struct raio_event *event)
{
	long ret = raio_submit(ctx, 1, &iocb);

	event->res2 = RAIO_RES2_TRANSPORT;
	if (ret == 1)
		ret = wait_for_events(td, ctx, 1, event);
	if (ret == 1)
		return (long)event->res;
	return ret < 0 ? ret : -EINTR;
}

/* Before the job: sizes and layout -------------------------------------------------------------------------- */

/* What fio would do to a local file of that name, whatever the engine says. */
static int refuse_unsupported(struct thread_data *td)
{
	struct thread_options *o = &td->o;
	const struct {
		bool set;
		const char *option, *instead;
	} unsupported[] = {
		{ o->unlink || o->unlink_each_loop, "unlink", "Leave it out, and remove the file on the server" },
		{ o->pre_read, "pre_read", "Leave it out, and read the file with a job of its own first" },
		{ o->fsync_on_close, "fsync_on_close", "Use end_fsync=1" },
		{ o->fill_device, "fill_device", "Give size=" },
		{ o->opendir != NULL, "opendir", "Name the files with filename=/EXPORT/path" },
		{ o->directory != NULL, "directory", "Name the files with filename=/EXPORT/path or filename_format=" },
		{ fio_option_is_set(o, mem_type), "mem", "Leave it out: libraio allocates the I/O buffers" },
	};
	size_t i;

	for (i = 0; i < sizeof(unsupported) / sizeof(unsupported[0]); i++) {
		if (!unsupported[i].set)
			continue;
		log_err("raio: the engine does not support %s=. %s.\n", unsupported[i].option,
			unsupported[i].instead);
		td_verror(td, EOPNOTSUPP, unsupported[i].option);
		return 1;
	}
	return 0;
}

static int stat_file(struct thread_data *td, int session, struct fio_file *f)
{
	struct stat64 st;
	int fd;

	if (f->file_name[0] != '/') {
		log_err("raio: %s is no path on a server. Give filename=/EXPORT/path.\n", f->file_name);
		td_verror(td, EINVAL, "filename");
		return 1;
	}

	/* fio has looked at a local file of that name for these two */
	f->filetype = FIO_TYPE_FILE;
	f->real_file_size = 0;

	fd = open_in(session, f->file_name, O_RDONLY);
	if (fd < 0) {
		if (errno == ENOENT)
			return 0;
		return raio_failed(td, f->file_name, "raio_open");
	}
	/* the end of the session closes it, with no second timeout if the server hangs */
	if (raio_fstat(fd, &st))
		return raio_failed(td, f->file_name, "raio_fstat");
	f->real_file_size = (uint64_t)st.st_size;
	if (S_ISBLK(st.st_mode))
		f->filetype = FIO_TYPE_BLOCK;
	raio_close(fd);
	return 0;
}

/*
 * Does work that connects before fio forks its jobs. A process that was forked from one that has used RDMA cannot use it:
 * so where RDMA may be used this happens in a child of its own. What it finds out goes into memory that fio shares with its children.
 */
static int before_fork(struct thread_data *td, int (*work)(struct thread_data *, struct fio_file *), struct fio_file *f)
{
	struct raio_fio_options *o = td->eo;
	int status;
	pid_t pid, ended;

	if (td->o.use_thread || !strncmp(o->url, "raio+tcp:", 9))
		return work(td, f);

	fflush(NULL);
	pid = fork();
	if (pid < 0) {
		td_verror(td, errno, "fork");
		return 1;
	}
	if (!pid) {
		status = work(td, f);
		fflush(NULL);
		_exit(status ? 1 : 0);
	}
	/* a signal sets td->terminate and interrupts nothing */
	while (!(ended = waitpid(pid, &status, WNOHANG))) {
		if (td->terminate)
			kill(pid, SIGKILL);
		usleep(CHILD_POLL_US);
	}
	if (ended < 0) {
		td_verror(td, errno, "waitpid");
		return 1;
	}
	if (!WIFEXITED(status) && !td->error)
		td_verror(td, EIO, "setup");
	return !WIFEXITED(status) || WEXITSTATUS(status);
}

static int stat_files(struct thread_data *td, struct fio_file *unused)
{
	struct fio_file *f;
	unsigned int i;
	int session, ret = 0;

	(void)unused;
	session = start_session(td);
	if (session < 0)
		return 1;
	for_each_file(td, f, i) {
		ret = stat_file(td, session, f);
		if (ret)
			break;
	}
	raio_stop(session);
	return ret;
}

static int raio_fio_setup(struct thread_data *td)
{
	struct raio_fio_options *o = td->eo;

	/* io_ops lies deep in thread_data, behind all that a differently configured fio may lay out differently */
	if (td->io_ops != &ioengine) {
		log_err("raio: this fio lays out its structures differently from the headers that libraio_fio.so was built "
			"with. Rebuild it with FIO_INCLUDE set to this fio's own, configured source tree.\n");
		return 1;
	}
	if (!o->url) {
		log_err("raio: which server? Give raio_url=raio://HOST:PORT.\n");
		td_verror(td, EINVAL, "raio_url");
		return 1;
	}
	if (refuse_unsupported(td))
		return 1;

	return before_fork(td, stat_files, NULL);
}

/* What lays out one file, from lay_out() to end_layout() */
struct layout {
	int session;
	int fd;
	raio_context_t ctx;
	char *buf;			/* what is being written */
	struct raio_iocb *iocbs;
	struct raio_iocb **ios;
	struct raio_event *events;
};

/* Ends the session first: that cancels what is still in flight after a signal, so that its memory can be freed. */
static void end_layout(struct layout *l)
{
	raio_stop(l->session);
	if (l->ctx)
		raio_destroy(l->ctx);
	if (l->buf)
		raio_free(l->ctx, l->buf);
	free(l->iocbs);
	free(l->ios);
	free(l->events);
}

static int layout_failed(struct thread_data *td, struct fio_file *f, long res, const char *text)
{
	return failed(td, f->file_name, "layout", (int)-res, text);
}

/*
 * Takes in the events of a layout. What was written in part goes back to the iocbs to be sent, whose number sent before is `*sent`: the
 * server says why it cannot write the rest. Returns how many are done, or -1 after reporting a failure.
 */
static long take_layout_events(struct thread_data *td, struct fio_file *f, struct layout *l, long nr, long *sent)
{
	long i, done = 0;

	for (i = 0; i < nr; i++) {
		struct raio_iocb *iocb = l->events[i].obj;
		long res = (long)l->events[i].res;

		if (res < 0) {
			layout_failed(td, f, res, raio_event_errmsg(l->ctx, &l->events[i]));
			return -1;
		}
		if ((unsigned long long)res == iocb->u.c.nbytes) {
			done++;
			continue;
		}
		if (!res) {
			layout_failed(td, f, -EIO, "The server wrote nothing.");
			return -1;
		}
		iocb->u.c.buf = (char *)iocb->u.c.buf + res;
		iocb->u.c.nbytes -= res;
		iocb->u.c.offset += res;
		l->ios[--*sent] = iocb;
	}
	return done;
}

/* Writes l->ios[0 to nr). */
static int write_batch(struct thread_data *td, struct fio_file *f, struct layout *l, long nr, long events_max)
{
	long sent = 0, done = 0, ret;

	while (done < nr) {
		ret = raio_submit(l->ctx, nr - sent, l->ios + sent);
		if (ret < 0 && ret != -EAGAIN)
			return layout_failed(td, f, ret, raio_errmsg());
		if (ret > 0)
			sent += ret;
		ret = wait_for_events(td, l->ctx, events_max, l->events);
		if (ret < 0)
			return layout_failed(td, f, ret, raio_errmsg());
		if (!ret)
			return 0;	/* fio is to end */
		ret = take_layout_events(td, f, l, ret, &sent);
		if (ret < 0)
			return 1;
		done += ret;
	}
	return 0;
}

/*
 * Writes the whole file with what fio would have written into a local one: blocks of the job's write size, filled in
 * order, because the random stream is cut at block boundaries.
 */
static int write_layout(struct thread_data *td, struct fio_file *f, struct layout *l)
{
	unsigned long long bs = td->o.max_bs[DDIR_WRITE], size = f->real_file_size, offset = 0;
	unsigned int blocks = bs < LAYOUT_BYTES ? LAYOUT_BYTES / bs : 1;
	long nr_max = (long)blocks;
	raio_mr_t mr;
	int ret = 0;

	l->iocbs = calloc(nr_max, sizeof(*l->iocbs));
	l->ios = calloc(nr_max, sizeof(*l->ios));
	l->events = calloc(nr_max, sizeof(*l->events));
	l->buf = raio_alloc(l->ctx, blocks * bs, &mr);
	if (!l->iocbs || !l->ios || !l->events || !l->buf) {
		td_verror(td, ENOMEM, "layout buffers");
		return 1;
	}

	while (!ret && offset < size && !td->terminate) {
		unsigned long long start = offset, pos;
		long nr = 0;

		for (pos = 0; pos < blocks * bs && offset < size; pos += bs) {
			unsigned long long len = min(bs, size - offset);

			fill_io_buffer(td, l->buf + pos, len, len);
			l->ios[nr] = &l->iocbs[nr];
			raio_prep_pwrite(&l->iocbs[nr++], l->fd, l->buf + pos, len, (long long)(start + pos), mr);
			offset += len;
		}
		ret = write_batch(td, f, l, nr, nr_max);
	}
	return ret;
}

/*
 * A job that does not read needs no contents, only what fallocate= does. No byte of the file may change, also if another job writes it
 * concurrently: so it is allocated and never written. If the storage cannot do that it is as with fio's own engines: `native` passes over it,
 * `posix` says so, and with `keep` it is the job's error, found when its first I/O is done.
 */
static int extend_layout(struct thread_data *td, struct fio_file *f, struct layout *l)
{
	unsigned long long size = f->real_file_size, offset = 0;
	struct raio_event event;
	struct raio_iocb iocb;
	bool keep = false;
	long res;

	switch (td->o.fallocate_mode) {
	case FIO_FALLOCATE_NONE:
		return 0;
	case FIO_FALLOCATE_KEEP_SIZE:
		keep = true;
		break;
	case FIO_FALLOCATE_TRUNCATE:	/* no more than the last byte's block: a truncate could also make a file smaller */
		offset = size - 1;
		break;
	default:
		break;
	}

	raio_prep_allocate(&iocb, l->fd, (long long)offset, size - offset, keep);
	res = run_one(td, l->ctx, &iocb, &event);
	if (res >= 0 || td->terminate)
		return 0;
	if ((event.res2 & RAIO_RES2_CLASS) != RAIO_RES2_STORAGE)
		return layout_failed(td, f, res, raio_errmsg());
	if (keep)
		layout_failed(td, f, res, raio_errmsg());
	else if (td->o.fallocate_mode == FIO_FALLOCATE_POSIX)
		log_err("raio: %s: %s\n", f->file_name, raio_errmsg());
	return 0;
}

static int refuse_second_name(struct thread_data *td, struct fio_file *f, const char *what)
{
	log_err("raio: %s %s, and would have to be emptied, which fio's own engines avoid by removing the name. Remove it on the server.\n",
		f->file_name, what);
	td_verror(td, EMLINK, "layout");
	return -1;
}

/*
 * fio's own engines remove the name of a file that they write anew. The engine cannot; it empties the file, unless that has another
 * name too, by which its bytes are to stay. Returns a descriptor, or -1 after reporting why not.
 */
static int open_emptied(struct thread_data *td, struct fio_file *f, int session, int flags)
{
	struct stat64 st;
	int fd;

	fd = open_in(session, f->file_name, flags | O_NOFOLLOW);
	if (fd < 0 && errno == ELOOP)
		return refuse_second_name(td, f, "is a symbolic link");
	if (fd >= 0 && raio_fstat(fd, &st)) {
		raio_failed(td, f->file_name, "raio_fstat");
		return -1;
	}
	if (fd >= 0 && st.st_nlink > 1)
		return refuse_second_name(td, f, "has hard links");
	/* the end of the session closes the first one */
	if (fd >= 0 && st.st_size)
		fd = open_in(session, f->file_name, (flags & ~O_CREAT) | O_NOFOLLOW | O_TRUNC);
	if (fd < 0)
		raio_failed(td, f->file_name, "raio_open");
	return fd;
}

static int open_to_extend(struct thread_data *td, struct fio_file *f, int session, int flags)
{
	int fd = open_in(session, f->file_name, flags);

	if (fd < 0)
		raio_failed(td, f->file_name, "raio_open");
	return fd;
}

static int sync_layout(struct thread_data *td, struct fio_file *f, struct layout *l)
{
	struct raio_event event;
	struct raio_iocb iocb;
	long res;

	raio_prep_fsync(&iocb, l->fd, 0);
	res = run_one(td, l->ctx, &iocb, &event);
	if (res >= 0 || td->terminate)
		return 0;
	return layout_failed(td, f, res, raio_errmsg());
}

static int lay_out(struct thread_data *td, struct fio_file *f)
{
	bool contents = td_read(td) || (td_write(td) && td->o.overwrite && !td->o.file_append);
	/* what fio's own engines write into a new file, goes into an empty one here */
	bool anew = contents || (td_write(td) && !td->o.file_append);
	int flags = O_WRONLY | (td->o.allow_create ? O_CREAT : 0), ret = 1;
	struct layout l = { 0 };

	if (read_only) {
		log_err("raio: %s has to be written first, which --readonly forbids. Run without it once.\n",
			f->file_name);
		td_verror(td, EROFS, "layout");
		return 1;
	}

	l.session = start_session(td);
	if (l.session < 0)
		return 1;
	l.fd = anew ? open_emptied(td, f, l.session, flags) : open_to_extend(td, f, l.session, flags);
	if (l.fd >= 0) {
		if (raio_setup(l.session, LAYOUT_BYTES / 512, &l.ctx))
			raio_failed(td, f->file_name, "raio_setup");
		else
			ret = contents ? write_layout(td, f, &l) : extend_layout(td, f, &l);
	}
	if (!ret && contents && td->o.create_fsync && !td->terminate)
		ret = sync_layout(td, f, &l);
	if (!ret && !td->terminate && raio_close(l.fd))
		ret = raio_failed(td, f->file_name, "raio_close");
	end_layout(&l);
	return ret;
}

/* fio calls this for every file, once it knows which part of it the job will use. */
static int raio_fio_prepopulate(struct thread_data *td, struct fio_file *f)
{
	if (f->filetype != FIO_TYPE_FILE || f->file_offset + f->io_size <= f->real_file_size)
		return 0;

	f->real_file_size = f->file_offset + f->io_size;
	if (td->o.create_on_open)
		return 0;
	return before_fork(td, lay_out, f);
}

/* The job --------------------------------------------------------------------------------------------------- */

static void raio_fio_cleanup(struct thread_data *td)
{
	struct job *job = td->io_ops_data;
	unsigned int i;

	if (!job)
		return;
	if (job->ctx) {
		if (job->buffers)
			raio_free(job->ctx, job->buffers);
		raio_destroy(job->ctx);
	}
	if (job->session > 0)
		raio_stop(job->session);
	for (i = 0; job->requests && i < job->depth; i++)
		free(job->requests[i].failure);
	free(job->requests);
	free(job->queued);
	free(job->refused);
	free(job->events);
	free(job->done);
	free(job);
	td->io_ops_data = NULL;
}

/*
 * Whether fio, once it has begun to fill its queue, goes straight on until the queue is full and then calls
 * getevents(): only then may commit() hold back what it is given until more has come.
 */
static int fills_queue_at_once(const struct thread_data *td)
{
	const struct thread_options *o = &td->o;

	return o->iodepth_batch == 1 && !o->thinktime && !o->read_iolog_file && !o->rate[DDIR_READ] &&
	       !o->rate[DDIR_WRITE] && !o->rate[DDIR_TRIM] && !o->rate_iops[DDIR_READ] && !o->rate_iops[DDIR_WRITE] &&
	       !o->rate_iops[DDIR_TRIM];
}

/*
 * How many I/Os go together. With half of the queue, the server has one half while fio has the other; a send for fewer
 * than 4 costs more than that brings, and more than 32 bring nothing.
 */
static unsigned int batch_of(const struct thread_data *td)
{
	const struct raio_fio_options *o = td->eo;
	unsigned int half = td->o.iodepth / 2;

	if (!fills_queue_at_once(td))
		return 1;
	if (o->batch)
		return o->batch;
	return half < 4 ? 4 : half > 32 ? 32 : half;
}

/* The I/O buffers, with as much for alignment as fio may ask for. */
static int alloc_buffers(struct thread_data *td, struct job *job)
{
	unsigned long long size = (unsigned long long)td_max_bs(td) * job->depth;

	if (!td_read(td) && !td_write(td))
		return 0;
	job->buffers_bytes = size + 2 * ((unsigned long long)page_size + td->o.mem_align);
	job->buffers = raio_alloc(job->ctx, job->buffers_bytes, &job->mr);
	if (!job->buffers) {
		log_err("raio: no memory for the I/O buffers, %llu bytes. Use a smaller bs or iodepth.\n", size);
		return raio_failed(td, "I/O buffers", "raio_alloc");
	}
	return 0;
}

static int raio_fio_init(struct thread_data *td)
{
	struct raio_fio_options *o = td->eo;
	struct job *job;

	job = calloc(1, sizeof(*job));
	if (!job) {
		td_verror(td, ENOMEM, "calloc");
		return 1;
	}
	td->io_ops_data = job;
	job->depth = td->o.iodepth;
	job->batch = batch_of(td);
	/* fio sends the write of a block right behind its trim, for engines that trim while it waits: ours does not */
	if (td_trimwrite(td))
		td->o.serialize_overlap = 1;
	job->requests = calloc(job->depth, sizeof(*job->requests));
	job->queued = calloc(job->depth, sizeof(*job->queued));
	job->refused = calloc(job->depth, sizeof(*job->refused));
	job->events = calloc(job->depth, sizeof(*job->events));
	job->done = calloc(job->depth, sizeof(*job->done));
	if (!job->requests || !job->queued || !job->refused || !job->events || !job->done) {
		td_verror(td, ENOMEM, "calloc");
		return 1;
	}

	job->session = start_session(td);
	if (job->session < 0)
		return 1;
	if (raio_setup(job->session, (int)job->depth, &job->ctx))
		return raio_failed(td, o->url, "raio_setup");

	return alloc_buffers(td, job);
}

/* init() has allocated them: fio would go on with no buffer at all after an error from here. */
static int raio_fio_iomem_alloc(struct thread_data *td, size_t size)
{
	struct job *job = td->io_ops_data;

	assert(size <= job->buffers_bytes);
	td->orig_buffer = job->buffers;
	return 0;
}

/* cleanup() frees them. fio needs the hook, or it would free them itself. */
static void raio_fio_iomem_free(struct thread_data fio_unused *td)
{
}

static int raio_fio_io_u_init(struct thread_data *td, struct io_u *io_u)
{
	struct job *job = td->io_ops_data;

	/* index and engine_data share their memory */
	io_u->engine_data = &job->requests[io_u->index];
	return 0;
}

static int raio_fio_open_file(struct thread_data *td, struct fio_file *f)
{
	struct job *job = td->io_ops_data;
	int fd, flags = O_RDONLY;

	if (job->lost) {
		td_verror(td, ENOTCONN, f->file_name);
		return 1;
	}

	if ((td_write(td) || td_trim(td)) && !read_only)
		flags = O_RDWR;
	if (f->filetype == FIO_TYPE_FILE && td->o.allow_create && (flags == O_RDWR || td->o.create_on_open))
		flags |= O_CREAT;
	if (td->o.odirect)
		flags |= OS_O_DIRECT;
	flags |= (int)td->o.sync_io;

	fd = open_in(job->session, f->file_name, flags);
	if (fd < 0)
		return raio_failed(td, f->file_name, "raio_open");
	FILE_SET_ENG_DATA(f, (void *)(intptr_t)fd);
	return 0;
}

/*
 * fio has waited for the file's I/O. What was written may be lost if this fails, and fio passes over what the hook returns at the end
 * of a job: so it is the job's error. A server that is gone has closed it too: nothing to report.
 */
static int raio_fio_close_file(struct thread_data *td, struct fio_file *f)
{
	struct job *job = td->io_ops_data;
	int fd = (int)(intptr_t)FILE_ENG_DATA(f), err = 0;

	FILE_SET_ENG_DATA(f, NULL);
	if (!job->lost && raio_close(fd)) {
		err = errno;
		raio_failed(td, f->file_name, "raio_close");
	}
	return err;
}

/* Without this hook fio would unlink a local file of that name. */
static int raio_fio_unlink_file(struct thread_data fio_unused *td, struct fio_file *f)
{
	log_err("raio: %s was not removed: the engine has no such operation. Remove it on the server.\n", f->file_name);
	return EOPNOTSUPP;
}

static enum fio_q_status raio_fio_queue(struct thread_data *td, struct io_u *io_u)
{
	struct job *job = td->io_ops_data;
	struct request *request = io_u->engine_data;
	struct raio_iocb *iocb = &request->iocb;
	int fd = (int)(intptr_t)FILE_ENG_DATA(io_u->file);

	fio_ro_check(td, io_u);

	switch (io_u->ddir) {
	case DDIR_READ:
		raio_prep_pread(iocb, fd, io_u->xfer_buf, io_u->xfer_buflen, (long long)io_u->offset, job->mr);
		break;
	case DDIR_WRITE:
		raio_prep_pwrite(iocb, fd, io_u->xfer_buf, io_u->xfer_buflen, (long long)io_u->offset, job->mr);
		break;
	case DDIR_TRIM:
		raio_prep_discard(iocb, fd, (long long)io_u->offset, io_u->xfer_buflen);
		break;
	case DDIR_SYNC:
		raio_prep_fsync(iocb, fd, 0);
		break;
	case DDIR_DATASYNC:
	case DDIR_SYNC_FILE_RANGE:	/* promises less than fdatasync does */
		raio_prep_fsync(iocb, fd, 1);
		break;
	default:
		io_u->error = EINVAL;
		return FIO_Q_COMPLETED;
	}
	iocb->data = io_u;
	job->queued[job->queued_nr++] = iocb;
	return FIO_Q_QUEUED;
}

/* The first `nr` of the queue are with libraio now, or refused: their latency counts from here. */
static void leave_queue(struct thread_data *td, struct job *job, unsigned int nr)
{
	struct timespec now;
	unsigned int i;

	if (fio_fill_issue_time(td)) {
		fio_gettime(&now, NULL);
		for (i = 0; i < nr; i++) {
			struct io_u *io_u = job->queued[i]->data;

			io_u->issue_time = now;
			io_u_queued(td, io_u);
		}
		if (td->o.read_iolog_file)
			td->last_issue = now;
	}
	io_u_mark_submit(td, nr);
	job->queued_nr -= nr;
	memmove(job->queued, job->queued + nr, job->queued_nr * sizeof(*job->queued));
}

/* Takes note of why an io_u failed, and of what to do about it: many can fail before fio asks for the first. */
static void remember_failure(struct io_u *io_u, long res, const char *text, const char *advice)
{
	struct request *request = io_u->engine_data;

	io_u->error = (unsigned int)-res;
	free(request->failure);
	if (!*text)
		text = strerror(io_u->error);
	if (asprintf(&request->failure, "%s%s", text, advice) < 0)
		request->failure = NULL;
}

/* The option of the engine that would have kept a request from failing so, if there is one. */
static const char *advice_for(const struct raio_fio_options *o, const struct raio_event *event)
{
	if ((event->res2 & RAIO_RES2_CLASS) != RAIO_RES2_TRANSPORT)
		return "";
	if (!o->reconnect)
		return " With raio_reconnect=SECONDS the job waits for the server, and goes on.";
	if (-(long)event->res == ETIMEDOUT)
		return " With a longer raio_reconnect= the job waits longer for the server.";
	if (event->res2 & RAIO_RES2_UNKNOWN && !o->redo)
		return " With raio_redo=1 the job does it again.";
	return "";
}

/* Hands the queue to libraio. Never blocks. */
static void submit_queued(struct thread_data *td)
{
	struct job *job = td->io_ops_data;
	long ret;

	while (job->queued_nr) {
		ret = raio_submit(job->ctx, job->queued_nr, job->queued);
		if (!ret || ret == -EAGAIN)
			break;		/* full: what is left goes out when getevents() has made room */
		if (ret < 0) {
			struct io_u *io_u = job->queued[0]->data;

			remember_failure(io_u, ret, raio_errmsg(), "");
			job->refused[job->refused_nr++] = io_u;
			ret = 1;
		}
		leave_queue(td, job, (unsigned int)ret);
	}
}

/*
 * fio commits each io_u by itself unless a job asks for batches. One send for several costs the client and the server
 * a fraction of one send for each, so they wait for one another while fio has more to do before it waits: room in its
 * queue to fill, or completions to take. Their latency counts from the send. A depth of 1 never waits.
 */
static int raio_fio_commit(struct thread_data *td)
{
	struct job *job = td->io_ops_data;
	int fio_goes_on = td->cur_depth < job->depth || job->events_at < job->events_nr;

	if (job->queued_nr >= job->batch || !fio_goes_on)
		submit_queued(td);
	return 0;
}

static struct io_u *finish(struct thread_data *td, const struct raio_event *event)
{
	struct job *job = td->io_ops_data;
	struct io_u *io_u = event->data;
	long res = (long)event->res;

	if (res < 0) {
		remember_failure(io_u, res, raio_event_errmsg(job->ctx, event), advice_for(td->eo, event));
		if ((event->res2 & RAIO_RES2_CLASS) == RAIO_RES2_TRANSPORT)
			job->lost = true;
	} else if (io_u->ddir == DDIR_READ || io_u->ddir == DDIR_WRITE) {
		io_u->resid = io_u->xfer_buflen - (unsigned long long)res;
	}
	return io_u;
}

static int raio_fio_getevents(struct thread_data *td, unsigned int min_nr, unsigned int max_nr,
			      const struct timespec *t)
{
	struct job *job = td->io_ops_data;
	struct timespec timeout, *tp = NULL;
	unsigned int nr = 0;
	long ret;

	if (t) {
		timeout = *t;
		tp = &timeout;
	}
	max_nr = min(max_nr, job->depth);
	min_nr = min(min_nr, max_nr);

	for (;;) {
		while (nr < max_nr && job->refused_nr)
			job->done[nr++] = job->refused[--job->refused_nr];
		while (nr < max_nr && job->events_at < job->events_nr)
			job->done[nr++] = finish(td, &job->events[job->events_at++]);
		if (nr && nr >= min_nr)
			break;

		/* fio takes as few as one at a time; libraio gives all there are for the same price */
		submit_queued(td);
		if (job->refused_nr)
			continue;
		ret = raio_getevents(job->ctx, nr < min_nr ? min_nr - nr : 0, job->depth, job->events, tp);
		if (ret == -EINTR)
			continue;
		if (ret < 0) {
			job->lost = true;
			if (nr)
				break;
			errno = (int)-ret;
			raio_failed(td, "server", "raio_getevents");
			return (int)ret;
		}
		job->events_at = 0;
		job->events_nr = (unsigned int)ret;
		if (!ret && (!min_nr || t || !job->queued_nr))
			break;
	}
	return (int)nr;
}

static struct io_u *raio_fio_event(struct thread_data *td, int event)
{
	struct job *job = td->io_ops_data;

	return job->done[event];
}

/* fio frees it */
static char *raio_fio_errdetails(struct thread_data fio_unused *td, struct io_u *io_u)
{
	struct request *request = io_u->engine_data;

	return strdup(request->failure ? request->failure : strerror(io_u->error));
}

/* for fio before 3.38 */
static char *errdetails_of_io_u(struct io_u *io_u)
{
	return raio_fio_errdetails(NULL, io_u);
}

#define ERRDETAILS_TAKES_THREAD_DATA \
	__builtin_types_compatible_p(__typeof__(((struct ioengine_ops *)NULL)->errdetails), \
				     char *(*)(struct thread_data *, struct io_u *))

static struct ioengine_ops ioengine = {
	.name			= "raio",
	.version		= FIO_IOOPS_VERSION,
	/* no offload: a worker thread would need a context of its own on the job's session */
	.flags			= FIO_DISKLESSIO | FIO_NODISKUTIL | FIO_NO_OFFLOAD | FIO_ASYNCIO_SETS_ISSUE_TIME,
	.setup			= raio_fio_setup,
	.prepopulate_file	= raio_fio_prepopulate,
	.init			= raio_fio_init,
	.cleanup		= raio_fio_cleanup,
	.iomem_alloc		= raio_fio_iomem_alloc,
	.iomem_free		= raio_fio_iomem_free,
	.io_u_init		= raio_fio_io_u_init,
	.open_file		= raio_fio_open_file,
	.close_file		= raio_fio_close_file,
	.unlink_file		= raio_fio_unlink_file,
	.queue			= raio_fio_queue,
	.commit			= raio_fio_commit,
	.getevents		= raio_fio_getevents,
	.event			= raio_fio_event,
	.errdetails		= __builtin_choose_expr(ERRDETAILS_TAKES_THREAD_DATA, raio_fio_errdetails, errdetails_of_io_u),
	.options		= options,
	.option_struct_size	= sizeof(struct raio_fio_options),
};

/*
 * The engine for fio's loader, or NULL if this is not the fio that it was built for: its structures change from release
 * to release without a sign, and FIO_IOOPS_VERSION only with some of the changes.
 */
struct ioengine_ops *raio_fio_ioengine(void)
{
	if (strcmp(fio_version_string, RAIO_FIO_VERSION)) {
		log_err("raio: libraio_fio.so was built for %s, but this is %s. Rebuild it with scripts/build-fio-engine, with "
			"this fio in PATH.\n", RAIO_FIO_VERSION, fio_version_string);
		return NULL;
	}
	return &ioengine;
}
