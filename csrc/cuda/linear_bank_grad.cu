// linear_bank_grad: dw [slots, block] = scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]), for windows.
//
//   T[slot, m] += ± dy[n, m]                 for the rows n of a column that read a slot
//   dw[slot]   += Σ_m T[slot, m] x[m, column]
//
// No dense gradient, no atomics. A CTA owns kOwned slots of the ring and goes through
// the units (law/window.h) that draw from them, piece of a column by piece; in one lap of a window
// all slots differ, so a lap's terms are added together, with a barrier between laps. Its gradient
// stays in registers, kOwned / parts · 2 of a thread, and is written once. Where the ring has fewer
// owners than the device has processors, several CTAs share an owner's cells, and the last of
// them adds their sums in order.
//
// Grid: owners x copies; 256 threads: pairs of elements x parts of the slots. Shared memory: T
// (kOwned · BATCH · 4), entries of a piece: 20 KB. Instructions of a thread for a column of 1024
// rows and 16 rows of the batch, as compiled for sm_90a: 1900 for the entries, each by the law of
// its position, 1100 for T, 1750 for products without tensor cores: 18.6 for a weight. Predicted on
// an H200, 14336x4096, windows 256 x 4, batch 16: 46 us, bound by them; the dense gradient takes 32
// us to write.

#include <stdexcept>

#include "cuda/linear.h"
#include "cuda/plan.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kOwned = 256;  // slots
constexpr int kBatch = 16;   // rows of the batch at a time
constexpr int kPlanes = kBatch / 4;

struct BankGradKernelArgs {
  Layer layer;
  const void* dy;      // [batch, N]
  const void* x;       // [batch, K]
  float* dw;           // [slots, block]
  float* partial;      // [copies, slots, block]
  unsigned* counters;  // [owners]
  float scale;
  int batch;
  int owned;      // An owner has so many slots, kOwned or those of the window.
  int copies;     // So many CTAs share an owner's cells.
  int64_t cells;  // The layer has addresses in so many cells.
};

// The unit that reads a cell, or what the band has of it: positions p, p + 1 ... The address of
// position p is p + shift, as in a ColumnWindow (columns.h).
struct CellUnit {
  uint32_t p, count, shift;
};

RPG_CALLED CellUnit unit_of_cell(const WindowBand& law, int64_t cell) {
  const int64_t first = cell * law.cell - law.offset, end = first + law.cell;
  const uint32_t low = first < 0 ? 0 : static_cast<uint32_t>(first);
  const uint32_t high = end < law.positions ? static_cast<uint32_t>(end) : law.positions;
  uint32_t p[1] = {low};
  from_address(law, p);
  return {p[0], high - low, low - p[0] + law.offset};
}

RPG_FUNCTION int t_at(int plane, int slot) { return (plane * kOwned + slot) * 4; }

template <class T>
RPG_FUNCTION float element(const void* values, int64_t i) {
  return T::load(static_cast<const typename T::Bits*>(values)[i]);
}

// Adds what a piece of a column contributes: rows `row` ... of column `block`, entries in `entry`.
template <class T, int BLOCK>
RPG_FUNCTION void add_piece(const BankGradKernelArgs& args, int row, int rows, int block, int laps,
                            int owned, const Shared<uint32_t>& entry, const Shared<float>& t,
                            const Shared<int>& read,
                            float (&dw)[kOwned * BLOCK / 2 / kThreads][2]) {
  constexpr int kPairs = BLOCK / 2, kParts = kThreads / kPairs;
  const int pair = thread() % kPairs, part = thread() / kPairs;
  const int column = block * BLOCK + 2 * pair;
  RPG_LOOP
  for (int m0 = 0; m0 < args.batch; m0 += kBatch) {
    RPG_LOOP
    for (int i = thread(); i < kOwned * kBatch; i += kThreads) t[i] = 0.f;
    RPG_LOOP
    for (int i = thread(); i < kOwned; i += kThreads) read[i] = 0;
    float x[kBatch][2];
    RPG_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      const int64_t index = int64_t{m0 + m} * args.layer.columns + column;
      const bool valid = m0 + m < args.batch;
      x[m][0] = valid && column < args.layer.columns ? element<T>(args.x, index) : 0.f;
      x[m][1] = valid && column + 1 < args.layer.columns ? element<T>(args.x, index + 1) : 0.f;
    }
    sync();
    RPG_LOOP
    for (int lap = 0; lap < laps; ++lap) {
      RPG_LOOP
      for (int i = thread(); i < rows; i += kThreads) {
        const int slot = place_of(entry[i]);
        if (slot >= owned || lap_of(entry[i]) != lap) continue;
        read[slot] = 1;
        const float sign = sign_of(entry[i]);
        RPG_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) {
          float* const target = t.span(t_at(plane, slot), 4);
          auto v = load<Vector<float, 4>>(target);
          RPG_UNROLL
          for (int k = 0; k < 4; ++k) {
            const int m = m0 + 4 * plane + k;
            if (m >= args.batch) continue;
            v.value[k] = fused(sign, element<T>(args.dy, int64_t{m} * args.layer.rows + row + i),
                               v.value[k]);
          }
          store(target, v);
        }
      }
      sync();
    }
    if (column < args.layer.columns) {
      RPG_UNROLL
      for (int j = 0; j < kOwned / kParts; ++j) {
        const int slot = part + j * kParts;
        // 0 times an infinity of x need not be 0.
        if (slot >= owned || !read[slot]) continue;
        RPG_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) {
          const auto v = load<Vector<float, 4>>(t.span(t_at(plane, slot), 4));
          RPG_UNROLL
          for (int k = 0; k < 4; ++k) {
            dw[j][0] = fused(v.value[k], x[4 * plane + k][0], dw[j][0]);
            dw[j][1] = fused(v.value[k], x[4 * plane + k][1], dw[j][1]);
          }
        }
      }
    }
    sync();
  }
}

template <class T, int BLOCK>
RPG_KERNEL(kThreads, 1)
linear_bank_grad_kernel(RPG_ARGS BankGradKernelArgs args) {
  constexpr int kPairs = BLOCK / 2, kParts = kThreads / kPairs;
  const WindowBand& law = args.layer.law;
  const uint32_t slots = law.by_slots.divisor, window = law.scramble.window;
  const uint32_t log = law.scramble.bits + 3;
  const uint32_t begin = static_cast<uint32_t>(cta_x()) * args.owned;
  const int owned = static_cast<int>(min_u32(args.owned, slots - begin));
  const Shared<float> t(0, kOwned * kBatch);
  const Shared<uint32_t> entry(4 * kOwned * kBatch, kMaxRows);
  const Shared<int> read(4 * (kOwned * kBatch + kMaxRows), kOwned);
  const Shared<int> last(4 * (kOwned * kBatch + kMaxRows + kOwned), 1);

  // Cell k reads unwrapped slots base + k window ...; this owner's come back every pass.
  const int64_t passes = (law.base + args.cells * window + slots - 1) / slots;
  const int64_t low = passes * cta_y() / args.copies;
  const int64_t high = passes * (cta_y() + 1) / args.copies;
  float dw[kOwned / kParts][2] = {};
  for (int64_t pass = low; pass < high; ++pass) {
    const int64_t unwrapped = begin + pass * slots - law.base;  // may be negative
    int64_t k = unwrapped < 0 ? 0 : unwrapped / window;
    for (; k < args.cells && k * window < unwrapped + owned; ++k) {
      const CellUnit unit = unit_of_cell(law, k);
      const uint32_t offset = static_cast<uint32_t>(k * window - unwrapped);
      for (uint32_t done = 0; done < unit.count;) {
        const ColumnPiece column = column_piece_at(law, unit.p + done);
        uint32_t rows = min_u32(column.rows, unit.count - done);
        rows = min_u32(rows, kMaxRows);
        const uint32_t first_lap = (unit.p + done + unit.shift) >> log;
        RPG_LOOP
        for (uint32_t i = thread(); i < rows; i += kThreads) {
          const uint32_t p = unit.p + done + i, address = p + unit.shift;
          uint32_t j[1] = {address & (window - 1)};
          const uint32_t lap[1] = {law.lap + (address >> log)};
          if (law.permute) scramble(law.scramble, lap, j);
          // Only this pass counts: the window may reach the owner's slots of the next one too.
          const uint32_t place = min_u32(offset + j[0], kPlaceMask);
          entry[i] = place | ((address >> log) - first_lap) << 24 | block_sign(args.layer, p);
        }
        const uint32_t last_lap = (unit.p + done + rows - 1 + unit.shift) >> log;
        add_piece<T, BLOCK>(args, column.row, rows, column.block, last_lap - first_lap + 1, owned,
                            entry, t, read, dw);
        done += rows;
      }
    }
  }

  const int pair = thread() % kPairs, part = thread() / kPairs;
  float* const sums = args.copies == 1 ? args.dw : args.partial + int64_t{cta_y()} * slots * BLOCK;
  const float scale = args.copies == 1 ? args.scale : 1.f;
  RPG_UNROLL
  for (int j = 0; j < kOwned / kParts; ++j) {
    const int slot = part + j * kParts;
    if (slot >= owned) continue;
    float* const target = sums + (int64_t{begin} + slot) * BLOCK + 2 * pair;
    target[0] = dw[j][0] * scale;
    target[1] = dw[j][1] * scale;
  }
  if (args.copies == 1) return;
  sync();
  if (thread() == 0) last[0] = arrive(args.counters + cta_x(), args.copies);
  sync();
  if (!last[0]) return;
  RPG_LOOP
  for (int i = thread(); i < owned * BLOCK; i += kThreads) {
    const int64_t index = int64_t{begin} * BLOCK + i;
    float sum = 0;
    for (int copy = 0; copy < args.copies; ++copy) {
      sum += args.partial[int64_t{copy} * slots * BLOCK + index];
    }
    args.dw[index] = sum * args.scale;
  }
}

template <class T, int BLOCK>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  BankGradKernelArgs kernel_args{};
  kernel_args.layer = layer_of(law, args.columns);
  kernel_args.dy = args.dy, kernel_args.x = args.x, kernel_args.dw = args.dw;
  kernel_args.partial = args.workspace, kernel_args.counters = args.counters;
  kernel_args.scale = static_cast<float>(args.scale);
  kernel_args.batch = static_cast<int>(args.batch);
  kernel_args.owned = plan.places, kernel_args.copies = plan.splits;
  kernel_args.cells = cells_of(kernel_args.layer.law);
  launch(linear_bank_grad_kernel<T, BLOCK>, {plan.tiles, plan.splits, 1}, kThreads,
         plan.shared_bytes, args.stream, kernel_args);
}

template <class T>
void run_block(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  law.granularity == 32 ? run<T, 32>(law, plan, args) : run<T, 64>(law, plan, args);
}

}  // namespace

Plan plan_linear_bank_grad(const LayerLaw& law, Dtype, int64_t batch, int64_t,
                           const Device& device) {
  if (!law.window || law.reflect == Reflect::kElement) {
    throw std::invalid_argument("law: wanted windows, and signs of blocks");
  }
  Plan out{};
  out.places = static_cast<int>(min_u32(law.window, kOwned));
  out.tiles = static_cast<int>((law.slots - 1) / out.places + 1);
  const WindowBand band = make_window_band(law, 0);
  const int64_t passes = (band.base + cells_of(band) * law.window - 1) / law.slots + 1;
  const int64_t copies = passes < device.sms / out.tiles ? passes : device.sms / out.tiles;
  out.splits = copies < 1 ? 1 : static_cast<int>(copies);
  out.batch_tile = kBatch;
  out.batch_tiles = static_cast<int>((batch + kBatch - 1) / kBatch);
  out.shared_bytes = 4 * (kOwned * kBatch + kMaxRows + kOwned) + kAlign;
  if (out.splits > 1) {
    out.workspace = int64_t{out.splits} * law.slots * law.granularity;
    out.counters = out.tiles;
  }
  return out;
}

void linear_bank_grad(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_block<Bfloat16>(law, plan, args);
    case Dtype::kFloat16: return run_block<Float16>(law, plan, args);
    default: return run_block<Float32>(law, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
