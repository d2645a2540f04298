// The CPU kernels under GCC's sanitizers. That of threads cannot see through libgomp: its threads,
// loops and barriers are replaced here by ones that it can, under the names that GCC calls. Parts
// of dynamic loops are dealt out in turn, without a counter, so that no two of them are in order.
//
// Results of several threads are compared with those of one. With the argument "without-barriers"
// barriers do nothing, and the sanitizer must complain. Prints the number of calls that it made.

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "law/number.h"

using namespace rpg;

namespace {

bool barriers = true;

struct Team {
  int size;
  std::mutex mutex;
  std::condition_variable changed;
  int waiting = 0;
  long round = 0;
};

struct Member {
  Team* team = nullptr;
  int number = 0;
  long next = 0, end = 0, increment = 0, chunk = 0;  // of a dynamic loop
};

thread_local Member member;

bool next_chunk(long* begin, long* end) {
  if (member.next >= member.end) return false;
  *begin = member.next;
  *end = member.next + member.chunk < member.end ? member.next + member.chunk : member.end;
  member.next += member.chunk * member.team->size;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return member.number; }
int omp_get_num_threads() { return member.team ? member.team->size : 1; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  const Member outer = member;
  Team team;
  team.size = static_cast<int>(threads);
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) {
    others.emplace_back([&team, number, work, data] {
      member = {&team, number};
      work(data);
    });
  }
  member = {&team, 0};
  work(data);
  member = outer;
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  if (!barriers || !member.team) return;
  Team& team = *member.team;
  std::unique_lock<std::mutex> lock(team.mutex);
  const long round = team.round;
  if (++team.waiting == team.size) {
    team.waiting = 0;
    ++team.round;
    team.changed.notify_all();
  }
  team.changed.wait(lock, [&] { return team.round != round; });
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long increment, long chunk,
                                          long* first, long* last) {
  if (increment != 1) std::abort();
  member.next = begin + chunk * member.number;
  member.end = end;
  member.chunk = chunk;
  return next_chunk(first, last);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  return next_chunk(first, last);
}
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"

namespace {

using FloatVector = std::vector<float>;

FloatVector numbers(int64_t count, uint32_t seed) {
  FloatVector out(static_cast<size_t>(count));
  for (float& value : out) {
    seed = seed * 1664525 + 1013904223;
    value = static_cast<float>(seed >> 8) / (1 << 23) - 1;
  }
  return out;
}

void require(bool holds, const char* message) {
  if (holds) return;
  std::printf("%s\n", message);
  std::exit(1);
}

void compare(const FloatVector& got, const FloatVector& wanted, bool same, const char* message,
             float unit = 1e-3f) {
  for (size_t i = 0; i < got.size(); ++i) {
    const float far = got[i] - wanted[i];
    require(same ? far == 0 : far < unit && far > -unit, message);
  }
}

constexpr float kHalfUnit = 0.06f;  // by which results in bfloat16 may be apart

// The numbers as bfloat16, in the first half of the memory; and back.
FloatVector as_halves(FloatVector values) {
  std::vector<uint16_t> halves;
  for (float value : values) halves.push_back(Bfloat16::store(value));
  std::memcpy(values.data(), halves.data(), 2 * halves.size());
  return values;
}

void read_halves(FloatVector& values) {
  std::vector<uint16_t> halves(values.size());
  std::memcpy(halves.data(), values.data(), 2 * halves.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = Bfloat16::load(halves[i]);
}

class Workspaces {
 public:
  void* get(const Workspace& workspace) {
    memory_ = FloatVector(static_cast<size_t>(workspace.bytes / 4 + 32), 0.f);
    const uintptr_t address = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64;
    return reinterpret_cast<void*>(address);
  }

 private:
  FloatVector memory_;
};

struct Results {
  FloatVector y, dx, dw;
};

constexpr double kScale = 0.5;

// The forward of a layer whose last block has four columns, by the kernel of factors.
FloatVector linear_layer(const LayerLaw& law, int threads, int64_t batch, int batch_tile,
                         int tiles) {
  const int64_t columns = (law.blocks - 1) * law.granularity + 4;
  const FloatVector ring = numbers(int64_t{law.slots} * law.granularity, 1);
  const FloatVector x = numbers(batch * columns, 2), bias = numbers(law.rows, 4);
  FloatVector y(static_cast<size_t>(batch * law.rows));
  Workspaces workspaces;
  const Dtype fp32 = Dtype::kFloat32;
  LinearArgs forward{plain_bank(fp32, ring.data()),
                     fp32,
                     x.data(),
                     bias.data(),
                     y.data(),
                     batch,
                     columns,
                     kScale,
                     threads,
                     batch_tile,
                     tiles,
                     nullptr,
                     nullptr};
  forward.workspace = workspaces.get(baseline::linear_workspace(law, forward));
  baseline::linear(law, forward);
  return y;
}

// A weight, or of `part` every second row of it and two of three columns.
struct Part {
  std::vector<int32_t> rows, columns;
  int64_t row_count, column_count;
  Selection selection{};

  Part(bool part, int64_t all_rows, int64_t all_columns)
      : row_count(all_rows), column_count(all_columns) {
    if (!part) return;
    for (int32_t i = 1; i < all_rows; i += 2) rows.push_back(i);
    for (int32_t i = 0; i < all_columns; ++i) {
      if (i % 3) columns.push_back(i);
    }
    row_count = static_cast<int64_t>(rows.size());
    column_count = static_cast<int64_t>(columns.size());
    selection = {rows.data(), row_count, columns.data(), column_count};
  }
};

// Kernels that take rows of the batch as lanes.
struct LanesFamily {
  const char* name;
  Workspace (*size)(const LayerLaw&, const LanesLinearArgs&);
  void (*run)(const LayerLaw&, const LanesLinearArgs&);
  Workspace (*grads_size)(const LayerLaw&, const LanesLinearGradsArgs&);
  void (*run_grads)(const LayerLaw&, const LanesLinearGradsArgs&);
  bool same;  // y and dx do not depend on the number of threads
};

const LanesFamily kTiles{"tile_linear",
                         baseline::tile_linear_workspace,
                         baseline::tile_linear,
                         baseline::tile_linear_grads_workspace,
                         baseline::tile_linear_grads,
                         true};
const LanesFamily kUnits{"unit_linear",
                         baseline::unit_linear_workspace,
                         baseline::unit_linear,
                         baseline::unit_linear_grads_workspace,
                         baseline::unit_linear_grads,
                         false};

// Forward and gradients; the gradients together, or dx before dw.
Results lanes_layer(const LanesFamily& family, const LayerLaw& law, int threads, int64_t batch,
                    int lanes, bool together, bool pairs, bool chosen) {
  const int64_t columns = (law.blocks - 1) * law.granularity + (pairs ? 5 : 4);
  const auto stored = [pairs](FloatVector values) { return pairs ? as_halves(values) : values; };
  const FloatVector ring = stored(numbers(int64_t{law.slots} * law.granularity, 1));
  const Part part(chosen, law.rows, columns);
  const FloatVector x = stored(numbers(batch * part.column_count, 2));
  const FloatVector dy = stored(numbers(batch * part.row_count, 3));
  const FloatVector bias = numbers(law.rows, 4);
  Results out{FloatVector(dy.size()), FloatVector(x.size()), FloatVector(ring.size())};
  Workspaces workspaces;
  const Dtype dtype = pairs ? Dtype::kBfloat16 : Dtype::kFloat32;
  LanesLinearArgs forward{plain_bank(dtype, ring.data()),
                          dtype,
                          x.data(),
                          bias.data(),
                          out.y.data(),
                          batch,
                          columns,
                          kScale,
                          threads,
                          lanes,
                          nullptr,
                          pairs,
                          part.selection};
  forward.workspace = workspaces.get(family.size(law, forward));
  family.run(law, forward);
  LanesLinearGradsArgs both{};
  both.bank = plain_bank(dtype, ring.data()), both.dtype = dtype, both.pairs = pairs;
  both.dy = dy.data(), both.x = x.data();
  both.batch = batch, both.columns = columns, both.scale = kScale;
  both.threads = threads, both.lanes = lanes, both.selection = part.selection;
  for (int pass = together ? 2 : 0; pass < (together ? 3 : 2); ++pass) {
    LanesLinearGradsArgs grads = both;
    grads.dx = pass == 1 ? nullptr : out.dx.data();
    grads.dw = pass == 0 ? nullptr : out.dw.data();
    grads.workspace = workspaces.get(family.grads_size(law, grads));
    family.run_grads(law, grads);
  }
  if (pairs) read_halves(out.y), read_halves(out.dx);
  return out;
}

int compare_lanes(const LanesFamily& family, const LayerLaw& law, bool pairs = false,
                  bool part = false) {
  const float unit = pairs ? kHalfUnit : 1e-3f;
  int calls = 0;
  for (int64_t batch : {3, 33}) {  // with 16 lanes once, and three times
    const Results one = lanes_layer(family, law, 1, batch, 16, true, pairs, part);
    for (int threads : {2, 3, 4}) {
      for (bool together : {true, false}) {
        const Results many = lanes_layer(family, law, threads, batch, 16, together, pairs, part);
        if (barriers) {
          compare(many.y, one.y, family.same, family.name, unit);
          compare(many.dx, one.dx, family.same, family.name, unit);
          compare(many.dw, one.dw, false, family.name);
        }
        calls += together ? 2 : 3;
      }
    }
  }
  return calls;
}

// A kernel of 3 x 3 taps over images of the unit law, whose last block of channels has four;
// forward and gradients, which are made together, or dx before dw.
Results unit_convolution(const LayerLaw& law, int64_t step, int threads, int lanes, int64_t rows,
                         bool together, bool pairs, bool chosen) {
  const int64_t images = 3, height = 6, width = 5;
  const int64_t all_channels = law.granularity + (pairs ? 5 : 4);
  const Part part(chosen, law.rows, all_channels);
  const int64_t channels = part.column_count, rows_of_weight = part.row_count;
  const int64_t out_height = (height - 1) / step + 1, out_width = (width - 1) / step + 1;
  const int64_t pixels = out_height * out_width;
  const auto stored = [pairs](FloatVector values) { return pairs ? as_halves(values) : values; };
  const FloatVector ring = stored(numbers(int64_t{law.slots} * law.granularity, 1));
  const FloatVector x = stored(numbers(images * channels * height * width, 2));
  const FloatVector dy = stored(numbers(images * rows_of_weight * pixels, 3));
  const FloatVector bias = numbers(law.rows, 4);
  Results out{FloatVector(dy.size()), FloatVector(x.size()), FloatVector(ring.size())};
  Image image{};
  image.channels = channels, image.height = height, image.width = width;
  image.stride[0] = channels * height * width, image.stride[1] = height * width;
  image.stride[2] = width, image.stride[3] = 1;
  image.extent = static_cast<int64_t>(x.size());
  image.out_height = out_height, image.out_width = out_width;
  image.kernel_width = 3;
  for (int d = 0; d < 2; ++d) {
    image.step[d] = step, image.padding[d] = image.dilation[d] = 1;
  }
  image.by_tap = true;
  image.run = all_channels, image.run_blocks = 2;
  Workspaces workspaces;
  UnitConv2dArgs forward{};
  forward.dtype = pairs ? Dtype::kBfloat16 : Dtype::kFloat32;
  forward.bank = plain_bank(forward.dtype, ring.data());
  forward.selection = part.selection;
  forward.pairs = pairs;
  forward.x = x.data(), forward.bias = bias.data();
  forward.y = out.y.data(), forward.image = image, forward.images = images;
  forward.kernel[0] = forward.kernel[1] = 3;
  forward.scale = kScale, forward.threads = threads;
  forward.lanes = lanes, forward.rows = rows;
  forward.workspace = workspaces.get(baseline::unit_conv2d_workspace(law, forward));
  baseline::unit_conv2d(law, forward);
  UnitConv2dGradsArgs both{};
  both.selection = part.selection;
  both.bank = forward.bank, both.dtype = forward.dtype, both.pairs = pairs;
  both.dy = dy.data(), both.x = x.data();
  both.dy_stride[0] = rows_of_weight * pixels, both.dy_stride[1] = pixels;
  both.dy_stride[2] = out_width, both.dy_stride[3] = 1;
  both.image = image, both.images = images;
  both.kernel[0] = both.kernel[1] = 3;
  both.scale = kScale, both.threads = threads;
  both.lanes = lanes, both.rows = step > 1 ? height : rows;
  for (int pass = together ? 2 : 0; pass < (together ? 3 : 2); ++pass) {
    UnitConv2dGradsArgs grads = both;
    grads.dx = pass == 1 ? nullptr : out.dx.data();
    grads.dw = pass == 0 ? nullptr : out.dw.data();
    grads.workspace = workspaces.get(baseline::unit_conv2d_grads_workspace(law, grads));
    baseline::unit_conv2d_grads(law, grads);
  }
  if (pairs) read_halves(out.y), read_halves(out.dx);
  return out;
}

int compare_unit_convolutions(const LayerLaw& law, int64_t step, bool pairs, bool part) {
  int calls = 0;
  for (int lanes : {1, 8}) {
    const int64_t rows = lanes == 1 ? 2 : 4;
    const Results one = unit_convolution(law, step, 1, lanes, rows, true, pairs, part);
    for (int threads : {2, 3, 4}) {
      const bool together = threads != 3;
      const Results many = unit_convolution(law, step, threads, lanes, rows, together, pairs, part);
      if (barriers) {
        compare(many.y, one.y, true, "unit_conv2d");
        compare(many.dx, one.dx, false, "unit_conv2d_grads, dx", pairs ? kHalfUnit : 1e-3f);
        compare(many.dw, one.dw, false, "unit_conv2d_grads, dw");
      }
      calls += together ? 2 : 3;
    }
  }
  return calls;
}

// A kernel of two taps over three images, of whose channels the last block has four.
FloatVector convolution(const LayerLaw& law, int parts, int threads, int batch_tile) {
  const int64_t images = 3, height = 5, width = 4, channels = law.granularity + 4;
  const int64_t pixels = images * (height - 1) * width;
  const FloatVector ring = numbers(int64_t{law.slots} * law.granularity, 1);
  const FloatVector x = numbers(images * channels * height * width, 2), bias = numbers(law.rows, 4);
  FloatVector y(static_cast<size_t>(pixels * law.rows));
  Conv2dArgs args{};
  Image& image = args.image;
  image.channels = channels, image.height = height, image.width = width;
  image.stride[0] = channels * height * width, image.stride[1] = height * width;
  image.stride[2] = width, image.stride[3] = 1;
  image.extent = static_cast<int64_t>(x.size());
  image.out_height = height - 1, image.out_width = width;
  image.kernel_width = 1;
  for (int d = 0; d < 2; ++d) image.step[d] = image.dilation[d] = 1;
  image.by_tap = true;
  image.run = channels, image.run_blocks = 2;
  LinearArgs& linear = args.linear;
  linear.x_dtype = Dtype::kFloat32, linear.bank = plain_bank(linear.x_dtype, ring.data());
  linear.x = x.data(), linear.bias = bias.data(), linear.y = y.data();
  linear.batch = pixels, linear.scale = kScale, linear.threads = threads;
  linear.batch_tile = batch_tile, linear.tiles = 1;
  args.parts = parts;
  Workspace total = baseline::conv2d_workspace(law, args);
  args.part_bytes = (total.bytes + 63) / 64 * 64;
  total.bytes = args.part_bytes * parts;
  Workspaces workspaces;
  linear.workspace = workspaces.get(total);
  baseline::conv2d(law, args);
  return y;
}

// Rows looked up, of whose first and last block a part is cut off, and the adjoint.
Results lookup(const LayerLaw& law, int threads) {
  const int64_t rows = 600, first = 3, length = law.blocks * law.granularity - 5;
  std::vector<int64_t> numbers_of_rows;
  for (int64_t i = 0; i < rows; ++i) numbers_of_rows.push_back(i * 7919 % law.rows);
  const Region region{0, rows, numbers_of_rows.data(), 1, law.blocks, 0, law.blocks};
  const FloatVector ring = numbers(int64_t{law.slots} * law.granularity, 1);
  const FloatVector dy = numbers(rows * length, 3);
  Results out{FloatVector(dy.size()), {}, FloatVector(ring.size())};
  const Cut cut{first, length};
  baseline::unpack(law, {region, cut, Dtype::kFloat32, plain_bank(Dtype::kFloat32, ring.data()),
                         out.y.data(), kScale, threads});
  std::vector<uint32_t> workspace(3 * 64 * 5);
  baseline::pack(law, {region, cut, Dtype::kFloat32, dy.data(), out.dw.data(), kScale, threads,
                       workspace.data(), static_cast<int64_t>(workspace.size())});
  return out;
}

}  // namespace

int main(int argc, char**) {
  barriers = argc == 1;
  int calls = 0;
  for (Reflect reflect : {Reflect::kVector, Reflect::kElement}) {
    const LayerLaw law = make_unit_law(5, 1, 1100, 6, 32, 123, 40, reflect, true, 4, 2, 3, 7, 7);
    const Results alone = lookup(law, 1);
    for (int threads : {2, 4}) {
      const Results several = lookup(law, threads);
      if (barriers) {
        compare(several.y, alone.y, true, "unpack, units");
        compare(several.dw, alone.dw, true, "pack, units");
      }
      calls += 2;
    }
  }
  // Rows that are no whole octets, in one group and in three; a ring that ends inside of an octet.
  const Reflect signs = Reflect::kVector;
  for (uint32_t groups : {1, 3}) {
    const LayerLaw linear =
        make_unit_law(5, 1, 100, 3, 16, 123, 40, signs, true, 4, 1, 3, groups, groups);
    const LayerLaw shifted =
        make_unit_law(5, 1, 28, 18, 16, 123, 40, signs, true, 4, 3, 2, groups, groups);
    const LayerLaw gathered =
        make_unit_law(5, 1, 28, 18, 16, 123, 40, signs, true, 4, 1, 2, groups, groups);
    for (bool part : {false, true}) {
      for (bool pairs : {false, true}) {
        calls += compare_lanes(kUnits, linear, pairs, part);
        calls += compare_unit_convolutions(shifted, 1, pairs, part);
        calls += compare_unit_convolutions(gathered, 2, pairs, part);
      }
    }
  }
  for (int64_t rows : {70, 1100}) {
    for (uint32_t slots : {267, 64, 0}) {  // of law 1, with fewer and with more rows; 0: law 3
      for (Reflect reflect : {Reflect::kVector, Reflect::kElement}) {
        const int block = rows == 70 ? 64 : 32;
        const LayerLaw law =
            slots ? make_layer_law(5, 1, rows, 4, block, slots, 17, reflect, true)
                  : make_unit_law(5, 1, rows, 4, block, 267, 40, reflect, true, 4, 1, 4, 2, 2);
        const Results alone = lookup(law, 1);
        for (int threads : {2, 4}) {
          const Results several = lookup(law, threads);
          if (barriers) {
            compare(several.y, alone.y, true, "unpack");
            compare(several.dw, alone.dw, true, "pack");
          }
          calls += 2;
        }
        if (reflect == Reflect::kElement) continue;
        calls += compare_lanes(kTiles, law);
        // Several tiles side by side, of which threads take turns, and the last is narrow.
        if (!slots) continue;
        calls +=
            compare_lanes(kTiles, make_layer_law(5, 1, rows, 19, block, slots, 17, reflect, true));
        for (int batch_tile : {1, 4, 16}) {
          const int64_t batch = batch_tile + 2;
          const FloatVector one = linear_layer(law, 1, batch, batch_tile, 1);
          for (int threads : {2, 3, 4}) {
            const FloatVector many = linear_layer(law, threads, batch, batch_tile, 1);
            if (barriers) compare(many, one, false, "linear");
            ++calls;
            const FloatVector pixels = convolution(law, 1, 1, batch_tile);
            const FloatVector dealt = convolution(law, threads, 1, batch_tile);
            const FloatVector shared = convolution(law, 2, threads, batch_tile);
            if (barriers) {
              compare(dealt, pixels, true, "conv2d");
              compare(shared, pixels, false, "conv2d, columns dealt");
            }
            calls += 2;
          }
        }
      }
    }
  }
  std::printf("%d calls\n", calls);
}
