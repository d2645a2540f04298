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

void compare(const FloatVector& got, const FloatVector& wanted, bool same, const char* message) {
  for (size_t i = 0; i < got.size(); ++i) {
    const float far = got[i] - wanted[i];
    require(same ? far == 0 : far < 1e-3f && far > -1e-3f, message);
  }
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
  LinearArgs forward{fp32,    ring.data(), fp32,    x.data(),   bias.data(), y.data(), batch,
                     columns, kScale,      threads, batch_tile, tiles,       nullptr,  nullptr};
  forward.workspace = workspaces.get(baseline::linear_workspace(law, forward));
  baseline::linear(law, forward);
  return y;
}

// Forward and gradients by the kernels that gather tiles; the gradients together, or dx before dw.
Results tiled_layer(const LayerLaw& law, int threads, int64_t batch, int lanes, bool together) {
  const int64_t columns = (law.blocks - 1) * law.granularity + 4;
  const FloatVector ring = numbers(int64_t{law.slots} * law.granularity, 1);
  const FloatVector x = numbers(batch * columns, 2), dy = numbers(batch * law.rows, 3);
  const FloatVector bias = numbers(law.rows, 4);
  Results out{FloatVector(dy.size()), FloatVector(x.size()), FloatVector(ring.size())};
  Workspaces workspaces;
  const Dtype fp32 = Dtype::kFloat32;
  LanesLinearArgs forward{fp32,  ring.data(), fp32,   x.data(), bias.data(), out.y.data(),
                          batch, columns,     kScale, threads,  lanes,       nullptr};
  forward.workspace = workspaces.get(baseline::tile_linear_workspace(law, forward));
  baseline::tile_linear(law, forward);
  LanesLinearGradsArgs both{};
  both.bank_dtype = both.dtype = fp32, both.ring = ring.data();
  both.dy = dy.data(), both.x = x.data();
  both.batch = batch, both.columns = columns, both.scale = kScale;
  both.threads = threads, both.lanes = lanes;
  for (int pass = together ? 2 : 0; pass < (together ? 3 : 2); ++pass) {
    LanesLinearGradsArgs grads = both;
    grads.dx = pass == 1 ? nullptr : out.dx.data();
    grads.dw = pass == 0 ? nullptr : out.dw.data();
    grads.workspace = workspaces.get(baseline::tile_linear_grads_workspace(law, grads));
    baseline::tile_linear_grads(law, grads);
  }
  return out;
}

int compare_tiled(const LayerLaw& law) {
  int calls = 0;
  for (int64_t batch : {3, 33}) {  // with 16 lanes once, and three times
    const Results one = tiled_layer(law, 1, batch, 16, true);
    for (int threads : {2, 3, 4}) {
      for (bool together : {true, false}) {
        const Results many = tiled_layer(law, threads, batch, 16, together);
        if (barriers) {
          compare(many.y, one.y, true, "tile_linear");
          compare(many.dx, one.dx, true, "tile_linear_grads, dx");
          compare(many.dw, one.dw, false, "tile_linear_grads, dw");
        }
        calls += together ? 2 : 3;
      }
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
  linear.bank_dtype = linear.x_dtype = Dtype::kFloat32;
  linear.ring = ring.data(), linear.x = x.data(), linear.bias = bias.data(), linear.y = y.data();
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
  baseline::unpack(law, {region, cut, Dtype::kFloat32, ring.data(), out.y.data(), kScale, threads});
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
  for (int64_t rows : {70, 1100}) {
    for (int windows : {0, 1, 4}) {  // laps; 0: law 1
      for (Reflect reflect : {Reflect::kVector, Reflect::kElement}) {
        const int block = rows == 70 ? 64 : 32;
        const uint32_t slots = 64 * 4 + 11;
        const LayerLaw law =
            windows
                ? make_window_law(5, 1, rows, 4, block, slots, 64 * 9, reflect, true, 64, windows)
                : make_layer_law(5, 1, rows, 4, block, slots, 17, reflect, true);
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
        calls += compare_tiled(law);
        // Several tiles side by side, of which threads take turns, and the last is narrow.
        if (!windows)
          calls += compare_tiled(make_layer_law(5, 1, rows, 19, block, slots, 17, reflect, true));
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
