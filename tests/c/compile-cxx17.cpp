/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The header in C++17: it brings its own extern "C". */
#include <libraio.h>
#include "compile-everything.h"
