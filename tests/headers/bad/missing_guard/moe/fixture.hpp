// A fixture that the header check must refuse: it has no guard against a second inclusion.
struct expert {};
