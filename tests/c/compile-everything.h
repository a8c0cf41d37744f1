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
	raio_setup,  raio_destroy, raio_submit,  raio_getevents, raio_release,   raio_cancel, raio_poll_fd,
	raio_reg_mr, raio_dereg_mr, raio_alloc,  raio_free,      raio_get_stats, raio_errmsg, raio_event_errmsg, raio_crc32c, raio_abi_version,
};

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
	return 0;
}

int main(void)
{
	return every_call.abi_version ? prepares_as_documented() : 100;
}
