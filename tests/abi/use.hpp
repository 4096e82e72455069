// SPDX-License-Identifier: MIT
#pragma once

// The same work, compiled for two instruction sets; 0 means right.
int use_base();
int use_avx2();
