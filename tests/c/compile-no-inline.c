/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The functions that set up an iocb, as the library exports them, do what the inline ones do. */
#define _GNU_SOURCE
#define RAIO_NO_INLINE
#include <string.h>
#include <sys/uio.h>
#include <libraio.h>
#include "compile-everything.h"
