// A fixture that the header check must refuse: the umbrella lacks a header.
#pragma once
