// A fixture that the header check must refuse: it uses what it does not include.
#pragma once
inline std::vector<int> experts() {
  return {0};
}
