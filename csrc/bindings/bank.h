// Banks as Python gives them.

#pragma once

#include <tuple>

#include "bindings/module.h"
#include "cpu/stored.h"

namespace rpg {

// (data, dtype, scales, places, rows, slots, granularity): addresses, 0 for what is not there, and
// sizes of the bank, which are read where scales or places are there.
using GivenBank = std::tuple<uintptr_t, int, uintptr_t, uintptr_t, int64_t, int64_t, int>;

// What a layer reads. Its kernels leave out places that are no row of data, so that these need not
// be looked at here.
inline Bank checked_bank(const LayerLaw& law, const GivenBank& given) {
  const auto [data, dtype, scales, places, rows, slots, granularity] = given;
  require(dtype >= 0 && dtype <= 4,
          "bank: wanted dtype 0 (float64), 1 (float32), 2 (bfloat16), 3 (float16) or 4 (int8)");
  Bank bank = plain_bank(static_cast<Dtype>(dtype), address<const void>(data));
  // No rows have no address.
  require(bank.dtype == Dtype::kInt8 ? scales || (places && !rows) : !scales,
          "bank: wanted scales for int8 alone");
  if (!scales && !places) return bank;
  require(
      granularity >= law.granularity && granularity <= 128 && !(granularity & (granularity - 1)),
      "bank: wanted slots of a power of two elements, up to 128, as long as blocks or longer");
  const int64_t blocks = granularity / law.granularity;
  require(slots >= 1 && slots <= int64_t{law.slots} && slots * blocks == int64_t{law.slots},
          "bank: wanted as many elements as the layer's ring has");
  require(rows >= 0 && rows <= UINT32_MAX && (places || rows == slots),
          "bank: wanted rows for all slots, or places");
  bank.scales = address<const float>(scales), bank.places = address<const int32_t>(places);
  bank.rows = static_cast<uint32_t>(rows);
  while (granularity >> bank.shift > law.granularity) ++bank.shift;
  return bank;
}

}  // namespace rpg
