// The methods of LayerLaw that run linear layers and convolutions on CPUs; one file, since the
// headers take most of the time to compile it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/bank.h"
#include "bindings/module.h"
#include "bindings/selection.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rpg {
namespace {

Dtype checked_dtype(int dtype) {
  require(dtype >= 1 && dtype <= 3, "dtype: wanted 1 (float32), 2 (bfloat16) or 3 (float16)");
  return static_cast<Dtype>(dtype);
}

// Of products: they are of fp32, or of less.
Bank product_bank(const LayerLaw& law, const GivenBank& given) {
  const Bank bank = checked_bank(law, given);
  require(bank.dtype != Dtype::kFloat64, "bank: wanted no float64");
  return bank;
}

// Of a gradient: none where only dw is wanted, which no bank has whose values are stored otherwise.
Bank gradient_bank(const LayerLaw& law, const GivenBank& given, bool dx, bool dw) {
  const Bank bank = product_bank(law, given);
  require(!dx || bank.data || bank.places, "bank: wanted for dx");
  require(!dw || bank.plain(), "bank: wanted plain values for dw");
  return bank;
}

void check_product(const LayerLaw& law, int64_t batch, int threads, int batch_tile, int tiles) {
  const int block = law.granularity;
  require(!law.taps, "law: wanted 1, not the unit law");
  require(block == 32 || block == 64, "granularity: wanted blocks of 32 or 64 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(batch >= 1 && batch <= INT64_MAX / 8 / law.rows / block, "batch: out of range");
  require(threads >= 1, "threads: wanted at least 1");
  require(batch_tile == 1 || batch_tile == 4 || batch_tile == 8 || batch_tile == 16,
          "batch_tile: wanted 1, 4, 8 or 16");
  require(tiles >= 1 && tiles <= 64, "tiles: wanted 1 to 64");
}

void check(const LayerLaw& law, int64_t batch, int64_t columns, int threads, int batch_tile,
           int tiles) {
  check_product(law, batch, threads, batch_tile, tiles);
  require(columns >= 1 && (columns - 1) / law.granularity + 1 == law.blocks, "columns: another K");
}

// (bytes in all, of them copies of activations).
using WorkspaceBytes = std::pair<int64_t, int64_t>;

WorkspaceBytes linear_workspace(const LayerLaw& law, int64_t columns, int threads, int batch_tile,
                                int tiles) {
  check(law, 1, columns, threads, batch_tile, tiles);
  LinearArgs args{};
  args.threads = threads, args.batch_tile = batch_tile, args.tiles = tiles;
  const Workspace size = kernels().linear_workspace(law, args);
  return {size.bytes, size.activations};
}

void linear(const LayerLaw& law, const GivenBank& bank, uintptr_t x, int x_dtype, uintptr_t bias,
            uintptr_t y, int64_t batch, int64_t columns, double scale, int threads, int batch_tile,
            int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear(law, {product_bank(law, bank), checked_dtype(x_dtype), address<const void>(x),
                         address<const float>(bias), address<void>(y), batch, columns, scale,
                         threads, batch_tile, tiles, address<void>(workspace), nullptr});
}

// Of kernels that multiply pairs: activations in bfloat16, and a bank that is or is rounded to it.
void check_pairs(bool pairs, Dtype dtype, Dtype bank_dtype) {
  require(!pairs || (dtype == Dtype::kBfloat16 && bank_dtype != Dtype::kFloat16),
          "pairs: wanted activations in bfloat16, and a bank in bfloat16 or float32");
}

constexpr int kVector = 16;  // elements that the vectors of every instruction set divide

using Int64Pair = std::array<int64_t, 2>;
using Int64Four = std::array<int64_t, 4>;

constexpr int64_t kMostPixels = 1 << 24;           // of a tile, times lanes
constexpr int64_t kMaxPadding = int64_t{1} << 60;  // so that sums with it fit int64

int64_t product(int64_t a, int64_t b) {
  int64_t out;
  require(!__builtin_mul_overflow(a, b, &out), "size: a product beyond 2^63");
  return out;
}

Image checked_image(const LayerLaw& law, const Int64Four& size, const Int64Four& stride,
                    const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                    const Int64Pair& padding, const Int64Pair& dilation, bool channels_last) {
  Image image{};
  require(size[0] >= 1 && size[1] >= 1 && size[2] >= 0 && size[3] >= 0,
          "size: wanted images and channels");
  image.extent = size[2] && size[3] ? 1 : 0;
  for (int d = 0; d < 4; ++d) {
    require(stride[d] >= 0, "stride: wanted at least 0");
    require(size[d] < kMaxPadding, "size: wanted less than 2^60");
    image.stride[d] = stride[d];
    if (!image.extent) continue;
    const int64_t reach = product(size[d] - 1, stride[d]);
    require(reach <= INT64_MAX - image.extent, "stride: wanted a tensor within 2^63 elements");
    image.extent += reach;
  }
  image.channels = size[1], image.height = size[2], image.width = size[3];
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    require(kernel[d] >= 1 && kernel[d] <= INT32_MAX, "kernel: wanted 1 to 2^31 - 1");
    require(step[d] >= 1, "step: wanted at least 1");
    require(padding[d] >= 0 && padding[d] < kMaxPadding, "padding: wanted 0 to 2^60 - 1");
    const int64_t padded = size[2 + d] + 2 * padding[d];
    require(padded >= 1 && dilation[d] >= 1 &&
                (kernel[d] == 1 || dilation[d] <= (padded - 1) / (kernel[d] - 1)),
            "dilation: the kernel is larger than the padded image");
    out[d] = (padded - 1 - (kernel[d] == 1 ? 0 : dilation[d] * (kernel[d] - 1))) / step[d] + 1;
    image.step[d] = step[d], image.padding[d] = padding[d], image.dilation[d] = dilation[d];
  }
  image.out_height = out[0], image.out_width = out[1];
  image.channels_last = channels_last;
  image.kernel_width = kernel[1];
  image.by_tap = by_tap;
  const int64_t taps = kernel[0] * kernel[1], runs = by_tap ? taps : 1;
  image.run = by_tap ? image.channels : product(image.channels, taps);
  image.run_blocks = law.blocks / runs;
  require(image.run_blocks * runs == law.blocks &&
              (image.run - 1) / law.granularity + 1 == image.run_blocks,
          "kernel: another weight");
  return image;
}

// (bytes of one part, of them copies of activations).
WorkspaceBytes conv2d_workspace(const LayerLaw& law, int threads, int batch_tile, int tiles) {
  check_product(law, 1, threads, batch_tile, tiles);
  Conv2dArgs args{};
  args.linear.threads = threads, args.linear.batch_tile = batch_tile, args.linear.tiles = tiles;
  const Workspace size = kernels().conv2d_workspace(law, args);
  return {size.bytes, size.activations};
}

void conv2d(const LayerLaw& law, const GivenBank& bank, uintptr_t x, int x_dtype,
            const Int64Four& size, const Int64Four& stride, uintptr_t bias, uintptr_t y,
            bool channels_last, const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
            const Int64Pair& padding, const Int64Pair& dilation, double scale, int parts,
            int threads, int batch_tile, int tiles, uintptr_t workspace_address) {
  require(parts >= 1, "parts: wanted at least 1");
  Conv2dArgs args{};
  args.image =
      checked_image(law, size, stride, kernel, by_tap, step, padding, dilation, channels_last);
  args.parts = parts;
  args.part_bytes = (conv2d_workspace(law, threads, batch_tile, tiles).first + 63) / 64 * 64;
  LinearArgs& linear = args.linear;
  linear.batch = size[0] * args.image.out_height * args.image.out_width;
  check_product(law, linear.batch, threads, batch_tile, tiles);
  linear.bank = product_bank(law, bank);
  linear.x_dtype = checked_dtype(x_dtype), linear.x = address<const void>(x);
  linear.bias = address<const float>(bias), linear.y = address<void>(y);
  linear.scale = scale, linear.threads = threads;
  linear.batch_tile = batch_tile, linear.tiles = tiles;
  linear.workspace = address<void>(workspace_address);
  kernels().conv2d(law, args);
}

Image unit_image(const LayerLaw& law, Int64Four size, const Int64Four& stride, bool channels_last,
                 const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                 const Int64Pair& padding, const Int64Pair& dilation, int threads, int lanes,
                 const SelectionLists* selection) {
  require(law.taps >= 1 && law.taps <= kMaxUnitLaps && bands_of(law) == 1,
          "law: wanted the unit law with up to 64 taps, in one band");
  require(size[2] >= 1 && size[3] >= 1, "size: wanted pixels");
  require(law.granularity >= kVector && law.granularity <= 128,
          "granularity: wanted blocks of 16 to 128 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(by_tap, "by_tap: wanted a kernel whose taps have blocks of their own");
  require(law.taps == 1 || (step[0] == 1 && step[1] == 1), "law: strides want units of one tap");
  require(threads >= 1, "threads: wanted at least 1");
  require(lanes == 1 || (lanes >= 8 && lanes <= 64 && lanes % 8 == 0),
          "lanes: wanted 1, or a multiple of 8 up to 64");
  const int64_t channels = size[1];
  if (selection) {
    require(channels == selection->columns(), "size: wanted the selection's channels");
    size[1] = selection->all_columns();
  }
  Image image =
      checked_image(law, size, stride, kernel, by_tap, step, padding, dilation, channels_last);
  require(law.run_blocks == image.run_blocks, "law: that of another kernel");
  image.channels = channels;
  return image;
}

// Pixels of a tile, times lanes.
void check_pixels(int64_t rows, int64_t columns, int lanes) {
  require(rows >= 1 && columns >= 1 && rows <= kMostPixels / lanes / columns,
          "rows: wanted tiles of at most 2^24 pixels");
}

UnitConv2dArgs unit_conv2d_args(const LayerLaw& law, const Int64Four& size, const Int64Four& stride,
                                bool channels_last, const Int64Pair& kernel, bool by_tap,
                                const Int64Pair& step, const Int64Pair& padding,
                                const Int64Pair& dilation, int threads, int lanes, int64_t rows,
                                bool pairs, const SelectionLists* selection) {
  UnitConv2dArgs args{};
  args.pairs = pairs;
  args.image = unit_image(law, size, stride, channels_last, kernel, by_tap, step, padding, dilation,
                          threads, lanes, selection);
  if (selection) args.selection = selection->checked(law.rows, args.image.run);
  const Image& g = args.image;
  require(rows >= 1 && rows <= g.out_height, "rows: wanted 1 to the height of the output");
  // At least what a phase of a tile has (cpu/unit_conv2d_tile.h).
  check_pixels(rows + g.dilation[0] * (kernel[0] - 1),
               g.out_width + g.dilation[1] * (kernel[1] - 1) / g.step[1], lanes);
  args.images = size[0], args.kernel[0] = kernel[0], args.kernel[1] = kernel[1];
  args.threads = threads, args.lanes = lanes, args.rows = rows;
  return args;
}

UnitConv2dGradsArgs unit_conv2d_grads_args(const LayerLaw& law, const Int64Four& size,
                                           const Int64Four& stride, bool channels_last,
                                           const Int64Pair& kernel, bool by_tap,
                                           const Int64Pair& step, const Int64Pair& padding,
                                           const Int64Pair& dilation, int threads, int lanes,
                                           int64_t rows, bool dx, bool dw, bool pairs,
                                           const SelectionLists* selection) {
  UnitConv2dGradsArgs args{};
  args.pairs = pairs;
  args.image = unit_image(law, size, stride, channels_last, kernel, by_tap, step, padding, dilation,
                          threads, lanes, selection);
  if (selection) args.selection = selection->checked(law.rows, args.image.run);
  const Image& g = args.image;
  require(rows >= 1 && rows <= g.height, "rows: wanted 1 to the height of x");
  check_pixels(rows + g.dilation[0] * (kernel[0] - 1), g.width + g.dilation[1] * (kernel[1] - 1),
               lanes);
  check_pixels(g.step[0] > 1 || g.step[1] > 1 ? g.out_height : 1, g.out_width, lanes);
  args.images = size[0], args.kernel[0] = kernel[0], args.kernel[1] = kernel[1];
  args.threads = threads, args.lanes = lanes, args.rows = rows;
  // Only whether they are there counts for the size of the workspace.
  args.dx = dx ? &args : nullptr, args.dw = dw ? reinterpret_cast<float*>(&args) : nullptr;
  return args;
}

WorkspaceBytes unit_conv2d_grads_workspace(const LayerLaw& law, const Int64Four& size,
                                           const Int64Pair& kernel, bool by_tap,
                                           const Int64Pair& step, const Int64Pair& padding,
                                           const Int64Pair& dilation, int threads, int lanes,
                                           int64_t rows, bool dx, bool dw, bool pairs,
                                           const SelectionLists* selection) {
  const UnitConv2dGradsArgs args =
      unit_conv2d_grads_args(law, size, {1, 1, 1, 1}, false, kernel, by_tap, step, padding,
                             dilation, threads, lanes, rows, dx, dw, pairs, selection);
  const Workspace bytes = kernels().unit_conv2d_grads_workspace(law, args);
  return {bytes.bytes, bytes.activations};
}

void unit_conv2d_grads(const LayerLaw& law, const GivenBank& bank, uintptr_t dy,
                       const Int64Four& dy_stride, uintptr_t x, int dtype, const Int64Four& size,
                       const Int64Four& stride, uintptr_t dx, bool channels_last, uintptr_t dw,
                       const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                       const Int64Pair& padding, const Int64Pair& dilation, double scale,
                       int threads, int lanes, int64_t rows, uintptr_t workspace_address,
                       bool pairs, const SelectionLists* selection) {
  UnitConv2dGradsArgs args =
      unit_conv2d_grads_args(law, size, stride, channels_last, kernel, by_tap, step, padding,
                             dilation, threads, lanes, rows, dx, dw, pairs, selection);
  require(!dw || x, "x: wanted for dw");
  args.bank = gradient_bank(law, bank, dx, dw);
  args.dtype = checked_dtype(dtype), args.dy = address<const void>(dy);
  for (int d = 0; d < 4; ++d) args.dy_stride[d] = dy_stride[d];
  args.x = address<const void>(x);
  args.dx = address<void>(dx), args.dw = address<float>(dw);
  args.scale = scale, args.workspace = address<void>(workspace_address);
  check_pairs(pairs, args.dtype, dx ? args.bank.dtype : args.dtype);
  kernels().unit_conv2d_grads(law, args);
}

WorkspaceBytes unit_conv2d_workspace(const LayerLaw& law, const Int64Four& size,
                                     const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                                     const Int64Pair& padding, const Int64Pair& dilation,
                                     int threads, int lanes, int64_t rows, bool pairs,
                                     const SelectionLists* selection) {
  const UnitConv2dArgs args =
      unit_conv2d_args(law, size, {1, 1, 1, 1}, false, kernel, by_tap, step, padding, dilation,
                       threads, lanes, rows, pairs, selection);
  const Workspace bytes = kernels().unit_conv2d_workspace(law, args);
  return {bytes.bytes, bytes.activations};
}

void unit_conv2d(const LayerLaw& law, const GivenBank& bank, uintptr_t x, int dtype,
                 const Int64Four& size, const Int64Four& stride, uintptr_t bias, uintptr_t y,
                 bool channels_last, const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                 const Int64Pair& padding, const Int64Pair& dilation, double scale, int threads,
                 int lanes, int64_t rows, uintptr_t workspace_address, bool pairs,
                 const SelectionLists* selection) {
  UnitConv2dArgs args = unit_conv2d_args(law, size, stride, channels_last, kernel, by_tap, step,
                                         padding, dilation, threads, lanes, rows, pairs, selection);
  args.bank = product_bank(law, bank);
  args.dtype = checked_dtype(dtype), args.x = address<const void>(x);
  args.bias = address<const float>(bias), args.y = address<void>(y);
  args.scale = scale, args.workspace = address<void>(workspace_address);
  check_pairs(pairs, args.dtype, args.bank.dtype);
  kernels().unit_conv2d(law, args);
}

// Of kernels that take the batch in lanes.
void check_lanes(const LayerLaw& law, int64_t batch, int64_t columns, int threads) {
  const int block = law.granularity;
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(batch >= 1 && batch <= INT64_MAX / 8 / law.rows / block, "batch: out of range");
  require(columns >= 1 && (columns - 1) / block + 1 == law.blocks, "columns: another K");
  require(threads >= 1, "threads: wanted at least 1");
}

constexpr int kFewLanes = 4;  // lanes up to which the bank is read as it is stored
constexpr int kMostUnitLanes = 64, kMostTileLanes = 512;

void check_units(const LayerLaw& law, int lanes) {
  const int block = law.granularity;
  require(law.taps == 1 && bands_of(law) == 1 && law.run_blocks == law.blocks,
          "law: wanted units of one tap of a matrix, in one band");
  require(block >= 16 && block <= 128, "granularity: wanted blocks of 16 to 128 elements");
  require(lanes >= 1 && lanes <= kMostUnitLanes && !(lanes & (lanes - 1)),
          "lanes: wanted a power of two up to 64");
}

void check_tiles(const LayerLaw& law, int lanes) {
  require(law.granularity >= kVector && law.granularity <= 128,
          "granularity: wanted blocks of 16 to 128 elements");
  require(lanes >= kVector && lanes <= kMostTileLanes && lanes % kVector == 0,
          "lanes: wanted a multiple of 16 up to 512");
}

using RunLinear = void (*)(const LayerLaw&, const LanesLinearArgs&);
using RunLinearGrads = void (*)(const LayerLaw&, const LanesLinearGradsArgs&);
using SizeLinear = Workspace (*)(const LayerLaw&, const LanesLinearArgs&);
using SizeLinearGrads = Workspace (*)(const LayerLaw&, const LanesLinearGradsArgs&);

// The kernels of a family, whose calls look alike.
struct UnitFamily {
  static constexpr bool kSelects = true;  // reads parts of a weight
  static RunLinear run(int lanes) {
    return lanes > kFewLanes ? kernels().unit_linear : kernels().unit_linear_few;
  }
  static SizeLinear size(int lanes) {
    return lanes > kFewLanes ? kernels().unit_linear_workspace
                             : kernels().unit_linear_few_workspace;
  }
  static RunLinearGrads run_grads() { return kernels().unit_linear_grads; }
  static SizeLinearGrads size_grads() { return kernels().unit_linear_grads_workspace; }
  static void check(const LayerLaw& law, int64_t batch, int lanes, bool pairs) {
    check_units(law, lanes);
    require(!pairs || lanes > kFewLanes, "pairs: wanted 16 lanes or more");
    require(lanes > kFewLanes ? lanes >= kVector : batch <= lanes && law.granularity % 32 == 0,
            "lanes: wanted 16 to 64, or up to 4 for no larger a batch and blocks of 32 or more");
  }
  static void check_grads(const LayerLaw& law, int lanes, bool) {
    check_units(law, lanes);
    require(lanes >= kVector, "lanes: wanted 16 to 64");
  }
};

struct TileFamily {
  static constexpr bool kSelects = false;
  static RunLinear run(int) { return kernels().tile_linear; }
  static SizeLinear size(int) { return kernels().tile_linear_workspace; }
  static RunLinearGrads run_grads() { return kernels().tile_linear_grads; }
  static SizeLinearGrads size_grads() { return kernels().tile_linear_grads_workspace; }
  static void check(const LayerLaw& law, int64_t, int lanes, bool pairs) {
    check_grads(law, lanes, pairs);
  }
  static void check_grads(const LayerLaw& law, int lanes, bool pairs) {
    check_tiles(law, lanes);
    require(!pairs, "pairs: wanted none, of units alone");
  }
};

template <class Family>
Selection selection_of(const LayerLaw& law, int64_t columns, const SelectionLists* selection) {
  if (!selection) return {};
  require(Family::kSelects, "selection: wanted none, of units alone");
  return selection->checked(law.rows, columns);
}

template <class Family>
LanesLinearArgs lanes_args(const LayerLaw& law, int64_t batch, int64_t columns, int threads,
                           int lanes, bool pairs, const SelectionLists* selection) {
  check_lanes(law, batch, columns, threads);
  Family::check(law, batch, lanes, pairs);
  LanesLinearArgs args{};
  args.selection = selection_of<Family>(law, columns, selection);
  args.pairs = pairs;
  args.batch = batch, args.columns = columns, args.threads = threads, args.lanes = lanes;
  return args;
}

template <class Family>
WorkspaceBytes lanes_linear_workspace(const LayerLaw& law, int64_t batch, int64_t columns,
                                      int threads, int lanes, bool pairs,
                                      const SelectionLists* selection) {
  const Workspace size = Family::size(lanes)(
      law, lanes_args<Family>(law, batch, columns, threads, lanes, pairs, selection));
  return {size.bytes, size.activations};
}

template <class Family>
void lanes_linear(const LayerLaw& law, const GivenBank& bank, uintptr_t x, int x_dtype,
                  uintptr_t bias, uintptr_t y, int64_t batch, int64_t columns, double scale,
                  int threads, int lanes, uintptr_t workspace, bool pairs,
                  const SelectionLists* selection) {
  LanesLinearArgs args = lanes_args<Family>(law, batch, columns, threads, lanes, pairs, selection);
  args.bank = product_bank(law, bank);
  args.x_dtype = checked_dtype(x_dtype), args.x = address<const void>(x);
  args.bias = address<const float>(bias), args.y = address<void>(y);
  args.scale = scale, args.workspace = address<void>(workspace);
  check_pairs(pairs, args.x_dtype, args.bank.dtype);
  Family::run(lanes)(law, args);
}

template <class Family>
LanesLinearGradsArgs lanes_grads_args(const LayerLaw& law, int64_t batch, int64_t columns,
                                      int threads, int lanes, bool dx, bool dw, bool pairs,
                                      const SelectionLists* selection) {
  check_lanes(law, batch, columns, threads);
  Family::check_grads(law, lanes, pairs);
  LanesLinearGradsArgs args{};
  args.selection = selection_of<Family>(law, columns, selection);
  args.pairs = pairs;
  args.batch = batch, args.columns = columns, args.threads = threads, args.lanes = lanes;
  // Only whether they are there counts for the size of the workspace.
  args.dx = dx ? &args : nullptr, args.dw = dw ? reinterpret_cast<float*>(&args) : nullptr;
  return args;
}

template <class Family>
WorkspaceBytes lanes_linear_grads_workspace(const LayerLaw& law, int64_t batch, int64_t columns,
                                            int threads, int lanes, bool dx, bool dw, bool pairs,
                                            const SelectionLists* selection) {
  const Workspace size = Family::size_grads()(
      law, lanes_grads_args<Family>(law, batch, columns, threads, lanes, dx, dw, pairs, selection));
  return {size.bytes, size.activations};
}

template <class Family>
void lanes_linear_grads(const LayerLaw& law, const GivenBank& bank, uintptr_t dy, uintptr_t x,
                        int dtype, uintptr_t dx, uintptr_t dw, int64_t batch, int64_t columns,
                        double scale, int threads, int lanes, uintptr_t workspace, bool pairs,
                        const SelectionLists* selection) {
  LanesLinearGradsArgs args =
      lanes_grads_args<Family>(law, batch, columns, threads, lanes, dx, dw, pairs, selection);
  require(!dw || x, "x: wanted for dw");
  args.bank = gradient_bank(law, bank, dx, dw);
  args.dtype = checked_dtype(dtype), args.dy = address<const void>(dy);
  args.x = address<const void>(x), args.dx = address<void>(dx), args.dw = address<float>(dw);
  args.scale = scale, args.workspace = address<void>(workspace);
  check_pairs(pairs, args.dtype, dx ? args.bank.dtype : args.dtype);
  Family::run_grads()(law, args);
}

template <class Family>
void bind_family(py::class_<LayerLaw>& law, const std::string& name) {
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto selection = py::arg("selection") = py::none();
  const auto define = [&](const char* rest, auto function, auto... arguments) {
    law.def((name + rest).c_str(), function, Release(), arguments...);
  };
  define("_workspace", &lanes_linear_workspace<Family>, py::arg("batch"), py::arg("columns"),
         py::arg("threads"), py::arg("lanes"), py::arg("pairs") = false, selection);
  define("", &lanes_linear<Family>, py::arg("bank"), py::arg("x"), py::arg("x_dtype"),
         py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("columns"), py::arg("scale"),
         py::arg("threads"), py::arg("lanes"), py::arg("workspace"), py::arg("pairs") = false,
         selection);
  define("_grads_workspace", &lanes_linear_grads_workspace<Family>, py::arg("batch"),
         py::arg("columns"), py::arg("threads"), py::arg("lanes"), py::arg("dx"), py::arg("dw"),
         py::arg("pairs") = false, selection);
  define("_grads", &lanes_linear_grads<Family>, py::arg("bank"), py::arg("dy"), py::arg("x"),
         py::arg("dtype"), py::arg("dx"), py::arg("dw"), py::arg("batch"), py::arg("columns"),
         py::arg("scale"), py::arg("threads"), py::arg("lanes"), py::arg("workspace"),
         py::arg("pairs") = false, selection);
}

}  // namespace

void bind_linear(py::module_& m, py::class_<LayerLaw>& law) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<SelectionLists>(m, "Selection")
      .def(py::init<SelectionLists::List, SelectionLists::List, const Int64Pair&>(),
           py::arg("rows"), py::arg("columns"), py::arg("shape"));
  const auto selection = py::arg("selection") = py::none();
  law.def("linear_workspace", &linear_workspace, Release(), py::arg("columns"), py::arg("threads"),
          py::arg("batch_tile"), py::arg("tiles"));
  law.def("linear", &linear, Release(), py::arg("bank"), py::arg("x"), py::arg("x_dtype"),
          py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("columns"), py::arg("scale"),
          py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
  bind_family<UnitFamily>(law, "unit_linear");
  bind_family<TileFamily>(law, "tile_linear");
  law.def("unit_conv2d_workspace", &unit_conv2d_workspace, Release(), py::arg("size"),
          py::arg("kernel"), py::arg("by_tap"), py::arg("step"), py::arg("padding"),
          py::arg("dilation"), py::arg("threads"), py::arg("lanes"), py::arg("rows"),
          py::arg("pairs") = false, selection);
  law.def("unit_conv2d", &unit_conv2d, Release(), py::arg("bank"), py::arg("x"), py::arg("dtype"),
          py::arg("size"), py::arg("stride"), py::arg("bias"), py::arg("y"),
          py::arg("channels_last"), py::arg("kernel"), py::arg("by_tap"), py::arg("step"),
          py::arg("padding"), py::arg("dilation"), py::arg("scale"), py::arg("threads"),
          py::arg("lanes"), py::arg("rows"), py::arg("workspace"), py::arg("pairs") = false,
          selection);
  law.def("unit_conv2d_grads_workspace", &unit_conv2d_grads_workspace, Release(), py::arg("size"),
          py::arg("kernel"), py::arg("by_tap"), py::arg("step"), py::arg("padding"),
          py::arg("dilation"), py::arg("threads"), py::arg("lanes"), py::arg("rows"), py::arg("dx"),
          py::arg("dw"), py::arg("pairs") = false, selection);
  law.def("unit_conv2d_grads", &unit_conv2d_grads, Release(), py::arg("bank"), py::arg("dy"),
          py::arg("dy_stride"), py::arg("x"), py::arg("dtype"), py::arg("size"), py::arg("stride"),
          py::arg("dx"), py::arg("channels_last"), py::arg("dw"), py::arg("kernel"),
          py::arg("by_tap"), py::arg("step"), py::arg("padding"), py::arg("dilation"),
          py::arg("scale"), py::arg("threads"), py::arg("lanes"), py::arg("rows"),
          py::arg("workspace"), py::arg("pairs") = false, selection);
  law.def("conv2d_workspace", &conv2d_workspace, Release(), py::arg("threads"),
          py::arg("batch_tile"), py::arg("tiles"));
  law.def("conv2d", &conv2d, Release(), py::arg("bank"), py::arg("x"), py::arg("x_dtype"),
          py::arg("size"), py::arg("stride"), py::arg("bias"), py::arg("y"),
          py::arg("channels_last"), py::arg("kernel"), py::arg("by_tap"), py::arg("step"),
          py::arg("padding"), py::arg("dilation"), py::arg("scale"), py::arg("parts"),
          py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
}

}  // namespace rpg
