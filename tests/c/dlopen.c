/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A program that finds the library at run time: every function of the header is there, and the library can be closed
 * again and opened once more. Takes no server, so HOST PORT are not used.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <libraio.h>

/* What the header declares: the Makefile reads it. */
static const char *const symbols[] = {
#include "symbols.h"
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
	/* As many as there were when this was written: some may come, and none goes. */
	if (sizeof(symbols) / sizeof(symbols[0]) < 92) {
		printf("The Makefile has not found all functions of the header\n");
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
