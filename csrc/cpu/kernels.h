// The CPU kernels. Their source files are compiled once per instruction set, each into its own
// namespace; choose_isa.cpp, which is compiled once, picks the best that the machine has.

#pragma once

#include <cstdint>

#include "cpu/conv2d.h"
#include "cpu/int8_linear.h"
#include "cpu/lanes_linear.h"
#include "cpu/linear.h"
#include "cpu/unit_conv2d.h"
#include "cpu/unpack.h"
#include "law/layer.h"

namespace rpg {

struct Kernels {
  const char* isa;
  void (*slots)(const LayerLaw&, const int64_t* n, const int64_t* b, int64_t count, int64_t* out,
                int threads);
  void (*sign_words)(const LayerLaw&, const int64_t* n, const int64_t* b, int64_t count,
                     int64_t* out, int threads);
  void (*permutation)(const LayerLaw&, int64_t band, bool inverse, const int64_t* q, int64_t count,
                      int64_t* out, int threads);
  void (*unpack)(const LayerLaw&, const UnpackArgs&);
  void (*pack)(const LayerLaw&, const PackArgs&);
  uint64_t (*bandwidth)(uint64_t* words, int64_t count, bool write, int64_t passes, int threads);
  void (*linear)(const LayerLaw&, const LinearArgs&);
  Workspace (*linear_workspace)(const LayerLaw&, const LinearArgs&);
  void (*conv2d)(const LayerLaw&, const Conv2dArgs&);
  Workspace (*conv2d_workspace)(const LayerLaw&, const Conv2dArgs&);  // of one part
  void (*unit_linear)(const LayerLaw&, const LanesLinearArgs&);
  void (*unit_linear_few)(const LayerLaw&, const LanesLinearArgs&);
  void (*unit_linear_grads)(const LayerLaw&, const LanesLinearGradsArgs&);
  void (*tile_linear)(const LayerLaw&, const LanesLinearArgs&);
  void (*tile_linear_grads)(const LayerLaw&, const LanesLinearGradsArgs&);
  void (*unit_conv2d)(const LayerLaw&, const UnitConv2dArgs&);
  Workspace (*unit_conv2d_workspace)(const LayerLaw&, const UnitConv2dArgs&);
  void (*unit_conv2d_grads)(const LayerLaw&, const UnitConv2dGradsArgs&);
  Workspace (*unit_conv2d_grads_workspace)(const LayerLaw&, const UnitConv2dGradsArgs&);
  Workspace (*unit_linear_workspace)(const LayerLaw&, const LanesLinearArgs&);
  Workspace (*unit_linear_few_workspace)(const LayerLaw&, const LanesLinearArgs&);
  Workspace (*unit_linear_grads_workspace)(const LayerLaw&, const LanesLinearGradsArgs&);
  Workspace (*tile_linear_workspace)(const LayerLaw&, const LanesLinearArgs&);
  Workspace (*tile_linear_grads_workspace)(const LayerLaw&, const LanesLinearGradsArgs&);
  void (*unit_linear_int8)(const LayerLaw&, const Int8LinearArgs&);
  void (*unit_linear_int8_few)(const LayerLaw&, const Int8LinearArgs&);
  Workspace (*unit_linear_int8_workspace)(const LayerLaw&, const Int8LinearArgs&);
  Workspace (*unit_linear_int8_few_workspace)(const LayerLaw&, const Int8LinearArgs&);
};

#define RPG_DECLARE_KERNELS(ISA)                                                            \
  namespace ISA {                                                                           \
  void slots(const LayerLaw&, const int64_t*, const int64_t*, int64_t, int64_t*, int);      \
  void sign_words(const LayerLaw&, const int64_t*, const int64_t*, int64_t, int64_t*, int); \
  void permutation(const LayerLaw&, int64_t, bool, const int64_t*, int64_t, int64_t*, int); \
  void unpack(const LayerLaw&, const UnpackArgs&);                                          \
  void pack(const LayerLaw&, const PackArgs&);                                              \
  uint64_t bandwidth(uint64_t*, int64_t, bool, int64_t, int);                               \
  void linear(const LayerLaw&, const LinearArgs&);                                          \
  Workspace linear_workspace(const LayerLaw&, const LinearArgs&);                           \
  void conv2d(const LayerLaw&, const Conv2dArgs&);                                          \
  Workspace conv2d_workspace(const LayerLaw&, const Conv2dArgs&);                           \
  void unit_linear(const LayerLaw&, const LanesLinearArgs&);                                \
  void unit_linear_few(const LayerLaw&, const LanesLinearArgs&);                            \
  void unit_linear_grads(const LayerLaw&, const LanesLinearGradsArgs&);                     \
  void tile_linear(const LayerLaw&, const LanesLinearArgs&);                                \
  void tile_linear_grads(const LayerLaw&, const LanesLinearGradsArgs&);                     \
  void unit_conv2d(const LayerLaw&, const UnitConv2dArgs&);                                 \
  Workspace unit_conv2d_workspace(const LayerLaw&, const UnitConv2dArgs&);                  \
  void unit_conv2d_grads(const LayerLaw&, const UnitConv2dGradsArgs&);                      \
  Workspace unit_conv2d_grads_workspace(const LayerLaw&, const UnitConv2dGradsArgs&);       \
  Workspace unit_linear_workspace(const LayerLaw&, const LanesLinearArgs&);                 \
  Workspace unit_linear_few_workspace(const LayerLaw&, const LanesLinearArgs&);             \
  Workspace unit_linear_grads_workspace(const LayerLaw&, const LanesLinearGradsArgs&);      \
  Workspace tile_linear_workspace(const LayerLaw&, const LanesLinearArgs&);                 \
  Workspace tile_linear_grads_workspace(const LayerLaw&, const LanesLinearGradsArgs&);      \
  void unit_linear_int8(const LayerLaw&, const Int8LinearArgs&);                            \
  void unit_linear_int8_few(const LayerLaw&, const Int8LinearArgs&);                        \
  Workspace unit_linear_int8_workspace(const LayerLaw&, const Int8LinearArgs&);             \
  Workspace unit_linear_int8_few_workspace(const LayerLaw&, const Int8LinearArgs&);         \
  }

RPG_DECLARE_KERNELS(baseline)
RPG_DECLARE_KERNELS(avx2)
RPG_DECLARE_KERNELS(avx512)

// The instruction sets compiled in, best first, and the one in use: the first that the machine has.
int compiled_isas(const char* (&names)[3]);
const Kernels& kernels();
// Whether these have an instruction of the machine for pairs (pairs.h).
bool multiplies_pairs();
// The fastest way of these to multiply int8 on the machine; it has those before it, too.
Int8Products best_int8_products();

}  // namespace rpg
