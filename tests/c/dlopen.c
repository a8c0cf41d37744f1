/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A program that finds the library at run time: every symbol of the header is there, nothing else with our prefix is
 * missing, and the library can be closed again and opened once more. Takes no server, so HOST PORT are not used.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <libraio.h>

static const char *const symbols[] = {
	"raio_start",	  "raio_connect", "raio_stop",	 "raio_open",	   "raio_open_mode", "raio_fstat",  "raio_close",
	"raio_stat_fd",	  "raio_pread",	  "raio_pwrite",  "raio_prep_pread", "raio_prep_pwrite", "raio_prep_preadv", "raio_prep_pwritev",
	"raio_prep_fsync", "raio_prep_discard", "raio_prep_write_zeroes", "raio_prep_allocate", "raio_set_eventfd",
	"raio_set_crc",	  "raio_set_timeout",
	"raio_fsync", "raio_ftruncate", "raio_extents", "raio_stat_path", "raio_lstat_path", "raio_get",
	"raio_put", "raio_mkdir", "raio_rmdir", "raio_unlink", "raio_rename", "raio_link", "raio_symlink",
	"raio_readlink", "raio_truncate", "raio_chmod", "raio_utimens", "raio_statfs_path",
	"raio_getxattr", "raio_setxattr", "raio_listxattr", "raio_removexattr", "raio_opendir",
	"raio_readdir", "raio_closedir", "raio_prep_close", "raio_prep_stat_fd", "raio_prep_ftruncate",
	"raio_prep_open", "raio_prep_stat_path", "raio_prep_get", "raio_prep_put", "raio_prep_mkdir",
	"raio_prep_rmdir", "raio_prep_unlink", "raio_prep_rename", "raio_prep_link", "raio_prep_symlink",
	"raio_prep_readlink", "raio_copy_file_range", "raio_checksum_range", "raio_flock",
	"raio_prep_copy_file_range", "raio_prep_checksum", "raio_prep_flock",
	"raio_setup",	  "raio_destroy", "raio_submit", "raio_getevents", "raio_release",   "raio_cancel", "raio_poll_fd",
	"raio_reg_mr",	  "raio_dereg_mr", "raio_alloc", "raio_free",	   "raio_get_stats", "raio_errmsg", "raio_event_errmsg", "raio_crc32c", "raio_abi_version",
};

static int open_and_close(void)
{
	void *library = dlopen("libraio.so.0", RTLD_NOW | RTLD_LOCAL);
	unsigned int (*abi_version)(void);
	const char *(*errmsg)(void);
	int (*stop)(int);
	int failed = 0;
	size_t i;

	if (!library) {
		printf("dlopen: %s\n", dlerror());
		return 1;
	}
	for (i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
		if (!dlsym(library, symbols[i])) {
			printf("%s is not in the library\n", symbols[i]);
			failed++;
		}
	}
	if (failed)
		return failed;
	/* The way POSIX has it for a function pointer from dlsym(). */
	*(void **)&abi_version = dlsym(library, "raio_abi_version");
	*(void **)&errmsg = dlsym(library, "raio_errmsg");
	*(void **)&stop = dlsym(library, "raio_stop");
	if (abi_version() >> 16 != RAIO_ABI_MAJOR || abi_version() < RAIO_ABI_VERSION) {
		printf("raio_abi_version() is %#x, this program was built for %#x\n", abi_version(), RAIO_ABI_VERSION);
		failed++;
	}
	if (!errmsg() || stop(-1) != -1 || !errmsg()[0]) {
		printf("raio_stop(-1) or raio_errmsg() do not do what the header says\n");
		failed++;
	}
	if (dlclose(library)) {
		printf("dlclose: %s\n", dlerror());
		failed++;
	}
	return failed;
}

int main(void)
{
	int failed = open_and_close();

	failed += open_and_close();
	printf("dlopen: %d symbols twice, %d failed\n", (int)(sizeof(symbols) / sizeof(symbols[0])), failed);
	return failed ? 1 : 0;
}
