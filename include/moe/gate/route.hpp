// Route: run a gate over the logits of all tokens.
// SPDX-License-Identifier: MIT
#pragma once
// (to be written) 
