// A fixture that the header check must refuse: it compiles with a warning.
#pragma once
inline int experts(long long n) {
  return n;
}
