// The first two steps of docs/ladder.md: y [N] = scale · Ŵ x of one row x [K] in bf16, blocks
// of 64. No layer runs them; they show what the steps after them, which are linear.cu, are for.
//
// Step 1: a thread takes a row, and reads each weight by itself. Neighbouring threads read
// different blocks, so of every 32 bytes that arrive 2 are used at a time; the rest is read again
// from the first-level cache, if it is still there.
// Step 2: a warp takes a row. Lane l finds the slot of block l of 32, all read the blocks one after
// the other, 128 bytes in one access: x and the ring from the caches, 2 elements a lane.
//
// Instructions for a weight: see docs/ladder.md, where the machine code is counted.

#include "cuda/columns.h"
#include "cuda/ladder.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kBlock = 64;

struct LadderKernelArgs {
  Layer layer;
  const uint16_t* ring;  // [slots, 64]
  const uint16_t* x;     // [K]
  uint16_t* y;           // [N]
  float scale;
};

RPG_KERNEL(kThreads, 1)
ladder_thread_kernel(RPG_ARGS LadderKernelArgs args) {
  const Layer& layer = args.layer;
  const int n = cta_x() * kThreads + thread();
  if (n >= layer.rows) return;
  float sum = 0;
  RPG_LOOP
  for (int b = 0; b < layer.blocks; ++b) {
    const uint32_t p = position(layer, n, b);
    const float sign = sign_of(block_sign(layer, p));
    const uint16_t* const stored = args.ring + int64_t{ring_slot(layer, p)} * kBlock;
    RPG_LOOP
    for (int e = 0; e < kBlock && b * kBlock + e < layer.columns; ++e) {
      const float weight = sign * Bfloat16::load(stored[e]);
      sum = fused(weight, Bfloat16::load(args.x[b * kBlock + e]), sum);
    }
  }
  args.y[n] = Bfloat16::store(sum * args.scale);
}

RPG_KERNEL(kThreads, 1)
ladder_warp_kernel(RPG_ARGS LadderKernelArgs args) {
  const Layer& layer = args.layer;
  const int n = cta_x() * kWarps + thread() / kWarp, lane = thread() % kWarp;
  if (n >= layer.rows) return;
  float sum = 0;
  RPG_LOOP
  for (int first = 0; first < layer.blocks; first += kWarp) {
    const int b = first + lane < layer.blocks ? first + lane : layer.blocks - 1;
    const uint32_t p = position(layer, n, b);
    const uint32_t own_entry = ring_slot(layer, p) | block_sign(layer, p);
    const int count = layer.blocks - first < kWarp ? layer.blocks - first : kWarp;
    RPG_LOOP
    for (int k = 0; k < count; ++k) {
      const uint32_t entry = shuffle(own_entry, k);
      const int column = (first + k) * kBlock + 2 * lane;
      const auto w =
          load<Vector<uint16_t, 2>>(args.ring + int64_t{entry & 0x7FFFFFFFu} * kBlock + 2 * lane);
      float part = 0;
      if (column < layer.columns)
        part = Bfloat16::load(w.value[0]) * Bfloat16::load(args.x[column]);
      if (column + 1 < layer.columns) {
        part = fused(Bfloat16::load(w.value[1]), Bfloat16::load(args.x[column + 1]), part);
      }
      sum = fused(sign_of(entry), part, sum);
    }
  }
  RPG_UNROLL
  for (int lane_bit = kWarp / 2; lane_bit; lane_bit /= 2) {
    sum += as_float(shuffle(as_bits(sum), lane ^ lane_bit));
  }
  if (lane == 0) args.y[n] = Bfloat16::store(sum * args.scale);
}

}  // namespace

void ladder_linear(const LayerLaw& law, int step, const LadderArgs& args) {
  LadderKernelArgs kernel_args{};
  kernel_args.layer = layer_of(law, args.columns);
  kernel_args.ring = static_cast<const uint16_t*>(args.ring);
  kernel_args.x = static_cast<const uint16_t*>(args.x);
  kernel_args.y = static_cast<uint16_t*>(args.y);
  kernel_args.scale = static_cast<float>(args.scale);
  const int rows = step == 1 ? kThreads : kWarps;  // of a CTA
  launch(step == 1 ? ladder_thread_kernel : ladder_warp_kernel,
         {(kernel_args.layer.rows + rows - 1) / rows, 1, 1}, kThreads, 0, args.stream, kernel_args);
}

}  // namespace rpg::RPG_DEVICE
