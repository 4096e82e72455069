// What the documents of the controls quote.
// SPDX-License-Identifier: MIT
#include <vector>

int main() {
  // [sizes]
  int tokens[] = {1, 2};
  // [loop]
  for (int t : tokens) {
    if (t == 3) return 1;
  }
  // [/loop]
  // [/sizes]
}
