// SPDX-License-Identifier: MIT
#pragma once

// The same work, compiled for several instruction sets; 0 means right.
int use_base();
int use_fma();
int use_avx2();
