// Chooses the instruction set whose kernels run. This file is compiled once.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace rpg {

namespace {

struct Choice {
  Kernels kernels;
  bool usable;
};

#define RPG_KERNELS(ISA)             \
  {#ISA,                             \
   ISA::slots,                       \
   ISA::sign_words,                  \
   ISA::permutation,                 \
   ISA::unpack,                      \
   ISA::pack,                        \
   ISA::bandwidth,                   \
   ISA::linear,                      \
   ISA::linear_workspace,            \
   ISA::conv2d,                      \
   ISA::conv2d_workspace,            \
   ISA::unit_linear,                 \
   ISA::unit_linear_few,             \
   ISA::unit_linear_grads,           \
   ISA::tile_linear,                 \
   ISA::tile_linear_grads,           \
   ISA::unit_conv2d,                 \
   ISA::unit_conv2d_workspace,       \
   ISA::unit_conv2d_grads,           \
   ISA::unit_conv2d_grads_workspace, \
   ISA::unit_linear_workspace,       \
   ISA::unit_linear_few_workspace,   \
   ISA::unit_linear_grads_workspace, \
   ISA::tile_linear_workspace,       \
   ISA::tile_linear_grads_workspace, \
   ISA::unit_linear_int8,            \
   ISA::unit_linear_int8_few,        \
   ISA::unit_linear_int8_workspace,  \
   ISA::unit_linear_int8_few_workspace}

const Choice kChoices[] = {
#if defined(RPG_HAVE_AVX512)
    {RPG_KERNELS(avx512), has_avx512()},
#endif
#if defined(RPG_HAVE_AVX2)
    {RPG_KERNELS(avx2), has_avx2()},
#endif
#if defined(RPG_HAVE_BASELINE)
    {RPG_KERNELS(baseline), true},
#endif
};

}  // namespace

int compiled_isas(const char* (&names)[3]) {
  int count = 0;
  for (const Choice& choice : kChoices) names[count++] = choice.kernels.isa;
  return count;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wanted = std::getenv("RPG_KERNELS_ISA");
    for (const Choice& choice : kChoices) {
      if (choice.usable && (!wanted || !std::strcmp(wanted, choice.kernels.isa))) {
        return choice.kernels;
      }
    }
    std::string able;
    for (const Choice& choice : kChoices) {
      if (choice.usable) able += std::string(able.empty() ? "" : ", ") + choice.kernels.isa;
    }
    if (able.empty()) throw std::runtime_error("it was compiled for another processor");
    throw std::runtime_error(std::string("RPG_KERNELS_ISA: got ") + wanted + ", wanted " + able);
  }();
  return chosen;
}

bool multiplies_pairs() {
#if defined(RPG_HAVE_AVX512)
  return !std::strcmp(kernels().isa, "avx512") && has_avx512_bf16();
#else
  return false;
#endif
}

Int8Products best_int8_products() {
#if defined(RPG_HAVE_AVX512)
  static const Int8Products best = [] {
    if (std::strcmp(kernels().isa, "avx512") || !has_avx512_vnni()) return Int8Products::kPlain;
    return has_amx_int8() ? Int8Products::kTiles : Int8Products::kDots;
  }();
  return best;
#else
  return Int8Products::kPlain;
#endif
}

}  // namespace rpg
