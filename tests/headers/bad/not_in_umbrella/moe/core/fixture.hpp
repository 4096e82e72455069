// What the umbrella lacks.
#pragma once
