// Train the PR-MoE language model on four ranks that are threads and share its experts.
// SPDX-License-Identifier: MIT
#include "parallel.hpp"

#include <cstdio>
#include <exception>
#include <vector>

int main(int argc, char** argv) try {
  using namespace pr_moe_text;
  constexpr int R = 4;
  options const o(argc, argv);
  corpus const text(o.text, S);
  std::vector<double> many[R];
  moe::thread_world(R).run(
      [&](moe::thread_communicator& all) { many[all.rank()] = losses_of(all, text, o.steps); });
  return compare(losses_of_one(text, o.steps), many[0], R) ? 0 : 1;
} catch (std::exception const& e) {
  std::fprintf(stderr, "pr_moe_text_parallel: %s\n", e.what());
  return 1;
}
