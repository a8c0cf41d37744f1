/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header after the system headers whose types it forward-declares, in C11 with the GNU extensions. */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <libraio.h>
#include "compile-everything.h"
