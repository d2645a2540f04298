// linear_input_grad: dx [batch, K] = scale · dy [batch, N] · (G ring), Ŵ = G ring never in memory.
//
// The adjoint of linear.cu, and cut in the same way: tiles of rows x splits of the columns x tiles
// of the batch, 256 threads, from column to column by columns.h. For each column of blocks the rows
// of dy are brought to the stored blocks that their rows of the tile read, and each block is
// multiplied once:
//
//   dx[m, column] = Σ_place (Σ ± dy[row, m], rows that read the place) block(place)
//
// input_grad_mma.h does so for 16-bit numbers on tensor cores, input_grad_fma.h for fp32. Sums of
// tiles go through the workspace; the last CTA of a split adds them in order.
//
// Shared memory, and where it is for windows of 256 slots of 64 and 4 laps, in bfloat16 at batch 16
// and in fp32 at batch 8:
//
//   bfloat16          | fp32              | what                | layout
//   from     | bytes  | from    | bytes   |                     |
//   ---------|--------|---------|---------|---------------------|------------------------------
//          0 | 98,304 |       0 | 196,608 | blocks of 3 stages  | as of linear.cu
//     98,304 |  2,560 | 196,608 |   2,560 | units of columns    | as of linear.cu
//    100,864 | 32,768 |       - |       - | P                   | [8 rows of dy][lap][slot][8]
//    133,632 | 32,768 |       - |       - | dy of the tile      | [8 rows of dy][row][8]
//          - |      - | 199,168 |   8,192 | T                   | [4 rows of dy][slot][4]
//    166,400 |  4,096 | 207,360 |   4,096 | entries             | [row]
//    170,496 |  1,024 |       - |       - | flags of places     | [slot], in windows
//    171,520 |  8,704 | 211,456 |  17,408 | sums of parts       | [part, m, 68], [m][2][272]
//    180,224 |     16 | 228,864 |      16 | is this CTA last?   |
//
// Budget at batches up to 16 in 16 bits: 3.5 lane-instructions for a weight; docs/cuda.md has what
// it takes.

#include "cuda/input_grad_fma.h"
#include "cuda/input_grad_mma.h"

namespace rpg::RPG_DEVICE {

namespace {

// Writes the element of dx whose sum is `sum`.
template <class T>
RPG_FUNCTION void write(const CudaLinearInputGradArgs& call, int64_t index, float sum) {
  static_cast<typename T::Bits*>(call.dx)[index] = T::store(sum * static_cast<float>(call.scale));
}

// What this thread writes of each block: elements e ... e + count - 1 of rows m, m + step ... of
// the batch. Four at once where they are sums of a tile and their addresses allow for it.
struct Output {
  int count, e, m, step;
  int64_t index;  // Where row m of block 0 is, in dx or in this tile's sums.
};

RPG_FUNCTION Output output_of(const InputGradKernelArgs& args, int m0, bool fours) {
  const int count = fours && args.plan.tiles > 1 && args.layer.columns % 4 == 0 ? 4 : 1;
  const int threads_across = args.layer.block / count;  // a power of two
  const int e = (thread() & (threads_across - 1)) * count, m = thread() / threads_across;
  const int64_t tile = args.plan.tiles == 1 ? 0 : int64_t{cta_x()} * args.call.batch;
  return {count, kept(e), kept(m), kThreads / threads_across,
          kept((tile + m0 + m) * args.layer.columns + e)};
}

// Writes column b of this tile's sums, or of dx where there is one tile, from the sums of parts.
template <class T, int BATCH>
RPG_FUNCTION void write_column(const InputGradKernelArgs& args, const Output& out, int b, int batch,
                               const Share& share, const Shared<float>& sums) {
  const int block = args.layer.block, columns = args.layer.columns;
  if (b * block + out.e >= columns) return;
  int64_t index = out.index + b * block;
  if constexpr (kTensorCores<T>) {
    if (out.count == 4) {
      RPG_LOOP
      for (int m = out.m; m < batch; m += out.step, index += int64_t{out.step} * columns) {
        store(args.call.workspace + index, mma_total<BATCH, 4>(share.parts, m, out.e, sums));
      }
      return;
    }
  }
  RPG_LOOP
  for (int m = out.m; m < batch; m += out.step, index += int64_t{out.step} * columns) {
    float total;
    if constexpr (kTensorCores<T>) {
      total = mma_total<BATCH, 1>(share.parts, m, out.e, sums).value[0];
    } else {
      total = fma_total(block, m, out.e, sums);
    }
    if (args.plan.tiles == 1) {
      write<T>(args.call, index, total);
    } else {
      args.call.workspace[index] = total;
    }
  }
}

template <class T, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_input_grad_kernel(RPG_ARGS InputGradKernelArgs args) {
  const Layer& layer = args.layer;
  const InputGradLayout& layout = args.layout;
  const int m0 = cta_z() * BATCH, tiles = args.plan.tiles;
  const int left = static_cast<int>(args.call.batch) - m0, batch = left < BATCH ? left : BATCH;
  Columns columns = columns_of(layer, args.plan, layout.stages, args.call.ring);
  const Shared<float> sums(layout.sums, (layout.last - layout.sums) / 4);
  const Share share = share_of<BATCH>(args);
  const Output out = output_of(args, m0, kTensorCores<T>);
  const auto no_more = [](int, int) {};  // copies than those of blocks

  const auto dy = [&] {
    if constexpr (kTensorCores<T>) {
      const InputGradMma memory = mma_shared<BATCH>(args);
      load_dy<T, BATCH>(args, columns, m0, memory);
      return memory;
    } else {
      return fma_shared<BATCH>(args, columns, m0);
    }
  }();
  start(columns, no_more);
  RPG_LOOP
  for (int b = columns.first; b < columns.end; ++b) {
    const Stage stage = next_stage<T>(columns, b, no_more);
    write_entries<false>(columns, b, stage, dy.entry);
    if constexpr (kTensorCores<T>) {
      put_rows<BATCH>(args, columns, stage, dy);
      input_grad_products<T, BATCH>(args, columns, share, stage, dy, sums);
    } else {
      sum_terms<BATCH>(args, columns, stage, dy);
      input_grad_products<BATCH>(args, columns, stage, dy, sums);
    }
    sync();
    look_ahead(columns, b, stage);
    write_column<T, BATCH>(args, out, b, batch, share, sums);
  }
  if (tiles == 1) return;
  unsigned* const counter = args.call.counters + cta_z() * args.plan.splits + cta_y();
  if (!is_last(Shared<int>(layout.last, 1), counter, tiles)) return;
  const int low = columns.first * layer.block, end = columns.end * layer.block;
  const int width = (end < layer.columns ? end : layer.columns) - low;
  RPG_LOOP
  for (int i = thread(); i < width * batch; i += kThreads) {
    const int m = i / width, column = low + i - m * width;
    const int64_t index = int64_t{m0 + m} * layer.columns + column;
    write<T>(args.call, index,
             sum_of(args.call.workspace + index, tiles, args.call.batch * layer.columns));
  }
}

InputGradLayout layout_of(const Layer& layer, const Tiling& tiling, int size, int batch_tile) {
  const auto layout = size == 4 ? fma_layout : mma_layout;
  return layout(layer, tiling, layer.block * size, batch_tile);
}

template <class T, int BATCH>
void run(const Layer& layer, const Plan& plan, const CudaLinearInputGradArgs& args) {
  const InputGradLayout layout = layout_of(layer, plan, sizeof(typename T::Bits), BATCH);
  launch(linear_input_grad_kernel<T, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles}, kThreads,
         plan.shared_bytes, args.stream, InputGradKernelArgs{layer, plan, layout, args});
}

template <class T>
void run_batch(const Layer& layer, const Plan& plan, const CudaLinearInputGradArgs& args) {
  switch (plan.batch_tile) {
    case 1: return run<T, 1>(layer, plan, args);
    case 8: return run<T, 8>(layer, plan, args);
    default: return run<T, 16>(layer, plan, args);
  }
}

}  // namespace

Plan plan_linear_input_grad(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t columns,
                            const Device& device) {
  const int size = element_bytes(dtype);
  const Layer layer = layer_of(law, columns);
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    return layout_of(layer, tiling, size, batch_tile).bytes;
  };
  Plan out = plan_tiles(law, layer.block * size, batch, 16, device, bytes);
  if (out.tiles > 1) {
    out.workspace = int64_t{out.tiles} * batch * columns;
    out.counters = out.splits * out.batch_tiles;
  }
  return out;
}

void linear_input_grad(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  const Layer layer = layer_of(law, args.columns);
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_batch<Bfloat16>(layer, plan, args);
    case Dtype::kFloat16: return run_batch<Float16>(layer, plan, args);
    default: return run_batch<Float32>(layer, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
