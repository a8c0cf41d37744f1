/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header needs nothing before it, in strict C99, and may be included twice. */
#include <libraio.h>
#include <libraio.h>
#include "compile-everything.h"
