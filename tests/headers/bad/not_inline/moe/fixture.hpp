// A fixture that the header check must refuse: two objects define the same function.
#pragma once
int experts() {
  return 1;
}
