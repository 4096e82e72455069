// A fixture that the header check must refuse: a name that others define as a macro.
#pragma once
struct range {
  int near = 0;
};
