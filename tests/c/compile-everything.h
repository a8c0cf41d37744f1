/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Uses each declaration of libraio.h, at its exact type. Included by the compile-* files after libraio.h itself. */

struct every_call {
	int (*start)(const char *, const struct sockaddr *, socklen_t);
	int (*connect)(const char *, const struct raio_options *);
	int (*stop)(int);
	int (*open)(int, const char *, int);
	int (*open_mode)(int, const char *, int, mode_t);
	int (*fstat)(int, struct stat64 *);
	int (*close)(int);
	int (*stat_fd)(int, struct raio_stat *, size_t);
	ssize_t (*pread)(int, void *, size_t, long long);
	ssize_t (*pwrite)(int, const void *, size_t, long long);
	int (*fsync)(int, int);
	int (*ftruncate)(int, unsigned long long);
	int (*extents)(int, long long, unsigned long long, struct raio_extent *, int, unsigned long long *);
	long long (*copy_file_range)(int, long long, int, long long, unsigned long long);
	long long (*checksum_range)(int, long long, unsigned long long, struct raio_checksum *);
	int (*flock)(int, int);
	int (*stat_path)(int, const char *, struct raio_stat *, size_t);
	int (*lstat_path)(int, const char *, struct raio_stat *, size_t);
	ssize_t (*get)(int, const char *, void *, size_t, struct raio_stat *, size_t);
	int (*put)(int, const char *, const void *, size_t, mode_t, unsigned int);
	int (*mkdir)(int, const char *, mode_t);
	int (*rmdir)(int, const char *);
	int (*unlink)(int, const char *);
	int (*rename)(int, const char *, const char *, unsigned int);
	int (*link)(int, const char *, const char *);
	int (*symlink)(int, const char *, const char *);
	ssize_t (*readlink)(int, const char *, char *, size_t);
	int (*truncate)(int, const char *, unsigned long long);
	int (*chmod)(int, const char *, mode_t);
	int (*utimens)(int, const char *, long long, unsigned int);
	int (*statfs_path)(int, const char *, struct raio_statfs *, size_t);
	ssize_t (*getxattr)(int, const char *, const char *, void *, size_t);
	int (*setxattr)(int, const char *, const char *, const void *, size_t, unsigned int);
	ssize_t (*listxattr)(int, const char *, char *, size_t);
	int (*removexattr)(int, const char *, const char *);
	raio_dir_t (*opendir)(int, const char *);
	int (*readdir)(raio_dir_t, struct raio_dirent *, size_t);
	int (*closedir)(raio_dir_t);
	int (*setup)(int, int, raio_context_t *);
	int (*destroy)(raio_context_t);
	int (*submit)(raio_context_t, long, struct raio_iocb *[]);
	int (*getevents)(raio_context_t, long, long, struct raio_event *, struct timespec *);
	int (*release)(raio_context_t, long, struct raio_event *);
	int (*cancel)(raio_context_t, struct raio_iocb *, struct raio_event *);
	int (*poll_fd)(raio_context_t);
	int (*reg_mr)(raio_context_t, void *, size_t, raio_mr_t *);
	int (*dereg_mr)(raio_context_t, raio_mr_t);
	void *(*alloc)(raio_context_t, size_t, raio_mr_t *);
	int (*free)(raio_context_t, void *);
	int (*get_stats)(raio_context_t, struct raio_stats *, size_t);
	const char *(*errmsg)(void);
	const char *(*event_errmsg)(raio_context_t, const struct raio_event *);
	unsigned int (*crc32c)(unsigned int, const void *, size_t);
	unsigned int (*abi_version)(void);
};

static const struct every_call every_call = {
	raio_start,  raio_connect, raio_stop,    raio_open,      raio_open_mode, raio_fstat,  raio_close,
	raio_stat_fd, raio_pread, raio_pwrite,
	raio_fsync, raio_ftruncate, raio_extents, raio_copy_file_range, raio_checksum_range, raio_flock,
	raio_stat_path, raio_lstat_path, raio_get, raio_put,
	raio_mkdir, raio_rmdir, raio_unlink, raio_rename, raio_link, raio_symlink, raio_readlink,
	raio_truncate, raio_chmod, raio_utimens, raio_statfs_path, raio_getxattr, raio_setxattr,
	raio_listxattr, raio_removexattr, raio_opendir, raio_readdir, raio_closedir,
	raio_setup,  raio_destroy, raio_submit,  raio_getevents, raio_release,   raio_cancel, raio_poll_fd,
	raio_reg_mr, raio_dereg_mr, raio_alloc,  raio_free,      raio_get_stats, raio_errmsg, raio_event_errmsg, raio_crc32c, raio_abi_version,
};

/* Whether an iocb was prepared for this operation, with these arguments. */
static int is_on_path(const struct raio_iocb *iocb, int opcode, const struct raio_path_args *args)
{
	return !iocb->data && iocb->raio_fildes == 5 && iocb->raio_lio_opcode == opcode && iocb->u.c.buf == args &&
	       iocb->u.c.nbytes == sizeof(*args) && !iocb->u.c.offset && !iocb->u.c.flags &&
	       args->modified_ns == (args->flags == RAIO_SET_MTIME ? -7 : 0) && !args->reserved[0] &&
	       !args->reserved[1] && (opcode == RAIO_CMD_READDIR ? !args->path : !strcmp(args->path, "/e/p"));
}

static int prepares_paths_as_documented(void)
{
	static char buf[16];
	struct raio_path_args args;
	struct raio_statfs room;
	struct raio_copy_args copy;
	struct raio_checksum sum;
	struct raio_stat status;
	struct raio_iocb iocb;
	raio_dir_t dir;

	memset(&args, 0xff, sizeof(args));
	raio_prep_open(&iocb, 5, &args, "/e/p", 2, 0600);
	if (!is_on_path(&iocb, RAIO_CMD_OPEN, &args) || args.flags != 2 || args.mode != 0600 || args.other || args.buf)
		return 20;
	raio_prep_stat_path(&iocb, 5, &args, "/e/p", &status, RAIO_PATH_NOFOLLOW);
	if (!is_on_path(&iocb, RAIO_CMD_STAT_PATH, &args) || args.stat != &status ||
	    args.stat_size != sizeof(status) || args.flags != RAIO_PATH_NOFOLLOW || args.mode)
		return 21;
	raio_prep_get(&iocb, 5, &args, "/e/p", buf, sizeof(buf), &status, NULL);
	if (!is_on_path(&iocb, RAIO_CMD_GET, &args) || args.buf != buf || args.nbytes != 16 ||
	    args.stat != &status || args.stat_size != sizeof(status) || args.flags)
		return 22;
	raio_prep_put(&iocb, 5, &args, "/e/p", buf, sizeof(buf), 0640, RAIO_PUT_EXCL, NULL);
	if (!is_on_path(&iocb, RAIO_CMD_PUT, &args) || args.buf != buf || args.nbytes != 16 || args.stat ||
	    args.mode != 0640 || args.flags != RAIO_PUT_EXCL)
		return 23;
	raio_prep_mkdir(&iocb, 5, &args, "/e/p", 0700);
	if (!is_on_path(&iocb, RAIO_CMD_MKDIR, &args) || args.mode != 0700 || args.buf)
		return 24;
	raio_prep_rmdir(&iocb, 5, &args, "/e/p");
	if (!is_on_path(&iocb, RAIO_CMD_RMDIR, &args) || args.mode)
		return 25;
	raio_prep_unlink(&iocb, 5, &args, "/e/p");
	if (!is_on_path(&iocb, RAIO_CMD_UNLINK, &args))
		return 26;
	raio_prep_rename(&iocb, 5, &args, "/e/p", "/e/q", RAIO_RENAME_NOREPLACE);
	if (!is_on_path(&iocb, RAIO_CMD_RENAME, &args) || strcmp(args.other, "/e/q") ||
	    args.flags != RAIO_RENAME_NOREPLACE)
		return 27;
	raio_prep_link(&iocb, 5, &args, "/e/p", "/e/q");
	if (!is_on_path(&iocb, RAIO_CMD_LINK, &args) || strcmp(args.other, "/e/q") || args.flags)
		return 28;
	raio_prep_symlink(&iocb, 5, &args, "target", "/e/p");
	if (!is_on_path(&iocb, RAIO_CMD_SYMLINK, &args) || strcmp(args.other, "target"))
		return 29;
	raio_prep_readlink(&iocb, 5, &args, "/e/p", buf, sizeof(buf));
	if (!is_on_path(&iocb, RAIO_CMD_READLINK, &args) || args.buf != buf || args.nbytes != 16)
		return 30;
	raio_prep_close(&iocb, 5);
	if (iocb.raio_lio_opcode != RAIO_CMD_CLOSE || iocb.raio_fildes != 5 || iocb.u.c.buf || iocb.u.c.nbytes)
		return 31;
	raio_prep_stat_fd(&iocb, 5, &status);
	if (iocb.raio_lio_opcode != RAIO_CMD_STAT_FD || iocb.u.c.buf != &status || iocb.u.c.nbytes != sizeof(status))
		return 32;
	raio_prep_ftruncate(&iocb, 5, 1ULL << 40);
	if (iocb.raio_lio_opcode != RAIO_CMD_FTRUNCATE || iocb.u.c.nbytes != 1ULL << 40 || iocb.u.c.offset)
		return 33;
	raio_prep_truncate(&iocb, 5, &args, "/e/p", 1ULL << 40);
	if (!is_on_path(&iocb, RAIO_CMD_SET_ATTRIBUTES, &args) || args.nbytes != 1ULL << 40 ||
	    args.flags != RAIO_SET_SIZE)
		return 34;
	raio_prep_chmod(&iocb, 5, &args, "/e/p", 0640);
	if (!is_on_path(&iocb, RAIO_CMD_SET_ATTRIBUTES, &args) || args.mode != 0640 || args.flags != RAIO_SET_MODE)
		return 35;
	raio_prep_utimens(&iocb, 5, &args, "/e/p", -7, 0);
	if (!is_on_path(&iocb, RAIO_CMD_SET_ATTRIBUTES, &args) || args.flags != RAIO_SET_MTIME || args.nbytes)
		return 36;
	raio_prep_statfs_path(&iocb, 5, &args, "/e/p", &room);
	if (!is_on_path(&iocb, RAIO_CMD_STATFS, &args) || args.buf != &room || args.nbytes != sizeof(room))
		return 37;
	raio_prep_getxattr(&iocb, 5, &args, "/e/p", "user.a", buf, sizeof(buf));
	if (!is_on_path(&iocb, RAIO_CMD_GETXATTR, &args) || strcmp(args.other, "user.a") || args.buf != buf ||
	    args.nbytes != 16)
		return 38;
	raio_prep_setxattr(&iocb, 5, &args, "/e/p", "user.a", buf, sizeof(buf), RAIO_XATTR_CREATE);
	if (!is_on_path(&iocb, RAIO_CMD_SETXATTR, &args) || strcmp(args.other, "user.a") || args.buf != buf ||
	    args.nbytes != 16 || args.flags != RAIO_XATTR_CREATE)
		return 39;
	raio_prep_listxattr(&iocb, 5, &args, "/e/p", buf, sizeof(buf));
	if (!is_on_path(&iocb, RAIO_CMD_LISTXATTR, &args) || args.other || args.buf != buf || args.nbytes != 16)
		return 40;
	raio_prep_removexattr(&iocb, 5, &args, "/e/p", "user.a");
	if (!is_on_path(&iocb, RAIO_CMD_REMOVEXATTR, &args) || strcmp(args.other, "user.a") || args.buf)
		return 41;
	raio_prep_opendir(&iocb, 5, &args, "/e/p", &dir);
	if (!is_on_path(&iocb, RAIO_CMD_OPENDIR, &args) || args.buf != &dir || args.nbytes != sizeof(dir))
		return 42;
	raio_prep_readdir(&iocb, 5, &args, (raio_dir_t)(void *)buf);
	if (!is_on_path(&iocb, RAIO_CMD_READDIR, &args) || args.buf != buf || args.nbytes)
		return 43;
	memset(&copy, 0xff, sizeof(copy));
	raio_prep_copy_file_range(&iocb, &copy, 7, 8, 5, 9, 1ULL << 40);
	if (iocb.raio_lio_opcode != RAIO_CMD_COPY_FILE_RANGE || iocb.raio_fildes != 5 || iocb.u.c.buf != &copy ||
	    iocb.u.c.nbytes != 1ULL << 40 || iocb.u.c.offset != 9 || copy.fd != 7 || copy.offset != 8 ||
	    copy.reserved_0 || copy.reserved[0] || copy.reserved[1])
		return 44;
	memset(&sum, 0xff, sizeof(sum));
	raio_prep_checksum(&iocb, 5, RAIO_CHECKSUM_BLAKE3, 8, 9, &sum);
	if (iocb.raio_lio_opcode != RAIO_CMD_CHECKSUM || iocb.u.c.buf != &sum || iocb.u.c.nbytes != 9 ||
	    iocb.u.c.offset != 8 || sum.type != RAIO_CHECKSUM_BLAKE3 || sum.crc32c || sum.blake3[31])
		return 45;
	raio_prep_flock(&iocb, 5, 2);
	if (iocb.raio_lio_opcode != RAIO_CMD_FLOCK || iocb.u.c.buf || iocb.u.c.nbytes != 2 || iocb.u.c.offset)
		return 46;
	return 0;
}

/* The inline functions fill in an iocb as documented. Returns the number of the first that does not, or 0. */
static int prepares_as_documented(void)
{
	static char buf[16];
	struct raio_iocb iocb;
	struct iovec *iov = NULL;

	memset(&iocb, 0xff, sizeof(iocb));
	raio_prep_pread(&iocb, 3, buf, sizeof(buf), 1LL << 40, NULL);
	if (iocb.data || iocb.key || iocb.raio_fildes != 3 || iocb.raio_lio_opcode != RAIO_CMD_PREAD || iocb.pad ||
	    iocb.u.c.buf != buf || iocb.u.c.nbytes != 16 || iocb.u.c.offset != 1LL << 40 || iocb.u.c.mr ||
	    iocb.u.c.flags || iocb.u.c.resfd)
		return 1;
	raio_set_eventfd(&iocb, 7);
	if (iocb.u.c.flags != RAIO_IOCB_EVENTFD || iocb.u.c.resfd != 7)
		return 2;
	raio_prep_pwrite(&iocb, 4, buf, sizeof(buf), 5, NULL);
	if (iocb.raio_lio_opcode != RAIO_CMD_PWRITE || iocb.raio_fildes != 4 || iocb.u.c.flags || iocb.u.c.resfd ||
	    iocb.u.c.buf != buf || iocb.u.c.nbytes != 16 || iocb.u.c.offset != 5)
		return 3;
	raio_prep_preadv(&iocb, 4, iov, 2, 6, NULL);
	if (iocb.raio_lio_opcode != RAIO_CMD_PREADV || iocb.u.c.nbytes != 2 || iocb.u.c.offset != 6)
		return 4;
	raio_prep_pwritev(&iocb, 4, iov, 3, 6, NULL);
	if (iocb.raio_lio_opcode != RAIO_CMD_PWRITEV || iocb.u.c.nbytes != 3)
		return 5;
	raio_prep_fsync(&iocb, 4, 0);
	if (iocb.raio_lio_opcode != RAIO_CMD_FSYNC || iocb.u.c.flags)
		return 6;
	raio_prep_fsync(&iocb, 4, 1);
	if (iocb.raio_lio_opcode != RAIO_CMD_FSYNC || iocb.u.c.flags != RAIO_IOCB_DATASYNC)
		return 7;
	raio_prep_discard(&iocb, 4, 8, 1ULL << 41);
	if (iocb.raio_lio_opcode != RAIO_CMD_DISCARD || iocb.u.c.offset != 8 || iocb.u.c.nbytes != 1ULL << 41)
		return 8;
	raio_prep_write_zeroes(&iocb, 4, 9, 10);
	if (iocb.raio_lio_opcode != RAIO_CMD_WRITE_ZEROES || iocb.u.c.offset != 9 || iocb.u.c.nbytes != 10)
		return 9;
	raio_prep_allocate(&iocb, 4, 9, 10, 0);
	if (iocb.raio_lio_opcode != RAIO_CMD_ALLOCATE || iocb.u.c.offset != 9 || iocb.u.c.nbytes != 10 || iocb.u.c.flags)
		return 10;
	raio_prep_allocate(&iocb, 4, 9, 10, 1);
	if (iocb.u.c.flags != RAIO_IOCB_KEEP_SIZE)
		return 11;
	raio_set_crc(&iocb, 5);
	raio_set_timeout(&iocb, 1000);
	if (iocb.u.c.flags != (RAIO_IOCB_KEEP_SIZE | RAIO_IOCB_CRC | RAIO_IOCB_TIMEOUT_MS(1000)) || iocb.crc != 5)
		return 12;
	raio_set_timeout(&iocb, ~0u);
	if (iocb.u.c.flags != (RAIO_IOCB_KEEP_SIZE | RAIO_IOCB_CRC | RAIO_IOCB_TIMEOUT_MS(RAIO_IOCB_TIMEOUT_MAX)))
		return 13;
	raio_set_timeout(&iocb, 0);
	if (iocb.u.c.flags != (RAIO_IOCB_KEEP_SIZE | RAIO_IOCB_CRC))
		return 14;
	return prepares_paths_as_documented();
}

int main(void)
{
	return every_call.abi_version ? prepares_as_documented() : 100;
}
