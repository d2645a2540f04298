// Prints the best instruction set of this machine, for a development build.

#include <cstdio>

#include "cpu/isa.h"

int main() {
  std::printf("%s", rpg::has_avx512() ? "avx512" : rpg::has_avx2() ? "avx2" : "baseline");
}
