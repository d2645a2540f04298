// The methods of LayerLaw that run linear layers and convolutions on CPUs; one file, since the
// headers take most of the time to compile it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/module.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rpg {
namespace {

Dtype checked_dtype(int dtype) {
  require(dtype >= 1 && dtype <= 3, "dtype: wanted 1 (float32), 2 (bfloat16) or 3 (float16)");
  return static_cast<Dtype>(dtype);
}

void check_product(const LayerLaw& law, int64_t batch, int threads, int batch_tile, int tiles) {
  const int block = law.granularity;
  require(!law.taps, "law: wanted 1 or 2, not the unit law");
  require(block == 32 || block == 64, "granularity: wanted blocks of 32 or 64 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(law.window <= 1u << 15, "window: wanted at most 2^15 blocks");
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

template <class Args, Workspace (*Kernels::*WORKSPACE_SIZE)(const LayerLaw&, const Args&)>
WorkspaceBytes workspace(const LayerLaw& law, int64_t columns, int threads, int batch_tile,
                         int tiles) {
  check(law, 1, columns, threads, batch_tile, tiles);
  Args args{};
  args.threads = threads, args.batch_tile = batch_tile, args.tiles = tiles;
  const Workspace size = (kernels().*WORKSPACE_SIZE)(law, args);
  return {size.bytes, size.activations};
}

void linear(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t x, int x_dtype,
            uintptr_t bias, uintptr_t y, int64_t batch, int64_t columns, double scale, int threads,
            int batch_tile, int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear(
      law, {checked_dtype(bank_dtype), address<const void>(ring), checked_dtype(x_dtype),
            address<const void>(x), address<const float>(bias), address<void>(y), batch, columns,
            scale, threads, batch_tile, tiles, address<void>(workspace), nullptr});
}

void linear_input_grad(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t dy,
                       int dy_dtype, uintptr_t dx, int64_t batch, int64_t columns, double scale,
                       int threads, int batch_tile, int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear_input_grad(
      law, {checked_dtype(bank_dtype), address<const void>(ring), checked_dtype(dy_dtype),
            address<const void>(dy), address<void>(dx), batch, columns, scale, threads, batch_tile,
            tiles, address<void>(workspace)});
}

void linear_bank_grad(const LayerLaw& law, uintptr_t dy, uintptr_t x, int dtype, uintptr_t dw,
                      int64_t batch, int64_t columns, double scale, int threads, int batch_tile,
                      int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear_bank_grad(law, {checked_dtype(dtype), address<const void>(dy),
                                   address<const void>(x), address<float>(dw), batch, columns,
                                   scale, threads, batch_tile, tiles, address<void>(workspace)});
}

using Int64Pair = std::array<int64_t, 2>;
using Int64Four = std::array<int64_t, 4>;

constexpr int64_t kMaxPadding = int64_t{1} << 60;  // so that sums with it fit int64

// Sizes are those of tensors, which exist, so that their products fit int64.
Image checked_image(const LayerLaw& law, const Int64Four& size, const Int64Four& stride,
                    const Int64Pair& kernel, bool by_tap, const Int64Pair& step,
                    const Int64Pair& padding, const Int64Pair& dilation, bool channels_last) {
  Image image{};
  require(size[0] >= 1 && size[1] >= 1 && size[2] >= 0 && size[3] >= 0,
          "size: wanted images and channels");
  image.extent = size[2] && size[3] ? 1 : 0;
  for (int d = 0; d < 4; ++d) {
    require(stride[d] >= 0, "stride: wanted at least 0");
    image.stride[d] = stride[d];
    if (image.extent) image.extent += (size[d] - 1) * stride[d];
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
  image.run = by_tap ? image.channels : image.channels * taps;
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

void conv2d(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t x, int x_dtype,
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
  linear.bank_dtype = checked_dtype(bank_dtype), linear.ring = address<const void>(ring);
  linear.x_dtype = checked_dtype(x_dtype), linear.x = address<const void>(x);
  linear.bias = address<const float>(bias), linear.y = address<void>(y);
  linear.scale = scale, linear.threads = threads;
  linear.batch_tile = batch_tile, linear.tiles = tiles;
  linear.workspace = address<void>(workspace_address);
  kernels().conv2d(law, args);
}

// Of the unit law: one tap, one band, blocks that vectors divide.
void check_units(const LayerLaw& law, int64_t batch, int64_t columns, int threads, int lanes) {
  const int block = law.granularity;
  require(law.taps == 1 && bands_of(law) == 1, "law: wanted units of one tap, in one band");
  require(block >= 16 && block <= 128, "granularity: wanted blocks of 16 to 128 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(batch >= 1 && batch <= INT64_MAX / 8 / law.rows / block, "batch: out of range");
  require(columns >= 1 && (columns - 1) / block + 1 == law.blocks, "columns: another K");
  require(threads >= 1, "threads: wanted at least 1");
  require(lanes >= 1 && lanes <= 64 && !(lanes & (lanes - 1)), "lanes: wanted a power of two");
}

constexpr int kFewLanes = 4;  // lanes up to which the bank is read as it is stored
constexpr int kVector = 16;   // lanes that every instruction set's vectors divide

UnitLinearArgs unit_args(const LayerLaw& law, int64_t batch, int64_t columns, int threads,
                         int lanes) {
  check_units(law, batch, columns, threads, lanes);
  require(lanes > kFewLanes ? lanes >= kVector : batch <= lanes && law.granularity % 32 == 0,
          "lanes: wanted 16 to 64, or up to 4 for no larger a batch and blocks of 32 or more");
  UnitLinearArgs args{};
  args.batch = batch, args.columns = columns, args.threads = threads, args.lanes = lanes;
  return args;
}

WorkspaceBytes unit_linear_workspace(const LayerLaw& law, int64_t batch, int64_t columns,
                                     int threads, int lanes) {
  const UnitLinearArgs args = unit_args(law, batch, columns, threads, lanes);
  const Workspace size = lanes > kFewLanes ? kernels().unit_linear_workspace(law, args)
                                           : kernels().unit_linear_few_workspace(law, args);
  return {size.bytes, size.activations};
}

void unit_linear(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t x, int x_dtype,
                 uintptr_t bias, uintptr_t y, int64_t batch, int64_t columns, double scale,
                 int threads, int lanes, uintptr_t workspace) {
  UnitLinearArgs args = unit_args(law, batch, columns, threads, lanes);
  args.bank_dtype = checked_dtype(bank_dtype), args.ring = address<const void>(ring);
  args.x_dtype = checked_dtype(x_dtype), args.x = address<const void>(x);
  args.bias = address<const float>(bias), args.y = address<void>(y);
  args.scale = scale, args.workspace = address<void>(workspace);
  (lanes > kFewLanes ? kernels().unit_linear : kernels().unit_linear_few)(law, args);
}

UnitLinearGradsArgs unit_grads_args(const LayerLaw& law, int64_t batch, int64_t columns,
                                    int threads, int lanes, bool dx, bool dw) {
  check_units(law, batch, columns, threads, lanes);
  require(lanes >= kVector, "lanes: wanted 16 to 64");
  UnitLinearGradsArgs args{};
  args.batch = batch, args.columns = columns, args.threads = threads, args.lanes = lanes;
  // Only whether they are there counts for the size of the workspace.
  args.dx = dx ? &args : nullptr, args.dw = dw ? reinterpret_cast<float*>(&args) : nullptr;
  return args;
}

WorkspaceBytes unit_linear_grads_workspace(const LayerLaw& law, int64_t batch, int64_t columns,
                                           int threads, int lanes, bool dx, bool dw) {
  const UnitLinearGradsArgs args = unit_grads_args(law, batch, columns, threads, lanes, dx, dw);
  const Workspace size = kernels().unit_linear_grads_workspace(law, args);
  return {size.bytes, size.activations};
}

void unit_linear_grads(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t dy,
                       uintptr_t x, int dtype, uintptr_t dx, uintptr_t dw, int64_t batch,
                       int64_t columns, double scale, int threads, int lanes, uintptr_t workspace) {
  UnitLinearGradsArgs args = unit_grads_args(law, batch, columns, threads, lanes, dx, dw);
  require(!dx || ring, "ring: wanted for dx");
  require(!dw || x, "x: wanted for dw");
  args.bank_dtype = checked_dtype(bank_dtype), args.ring = address<const void>(ring);
  args.dtype = checked_dtype(dtype), args.dy = address<const void>(dy);
  args.x = address<const void>(x), args.dx = address<void>(dx), args.dw = address<float>(dw);
  args.scale = scale, args.workspace = address<void>(workspace);
  kernels().unit_linear_grads(law, args);
}

}  // namespace

void bind_linear(py::class_<LayerLaw>& law) {
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto sizes = [&](const char* name, auto function) {
    law.def(name, function, Release(), py::arg("columns"), py::arg("threads"),
            py::arg("batch_tile"), py::arg("tiles"));
  };
  sizes("linear_workspace", &workspace<LinearArgs, &Kernels::linear_workspace>);
  sizes("linear_input_grad_workspace",
        &workspace<LinearInputGradArgs, &Kernels::linear_input_grad_workspace>);
  sizes("linear_bank_grad_workspace",
        &workspace<LinearBankGradArgs, &Kernels::linear_bank_grad_workspace>);
  law.def("linear", &linear, Release(), py::arg("ring"), py::arg("bank_dtype"), py::arg("x"),
          py::arg("x_dtype"), py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("columns"),
          py::arg("scale"), py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"),
          py::arg("workspace"));
  law.def("linear_input_grad", &linear_input_grad, Release(), py::arg("ring"),
          py::arg("bank_dtype"), py::arg("dy"), py::arg("dy_dtype"), py::arg("dx"),
          py::arg("batch"), py::arg("columns"), py::arg("scale"), py::arg("threads"),
          py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
  law.def("linear_bank_grad", &linear_bank_grad, Release(), py::arg("dy"), py::arg("x"),
          py::arg("dtype"), py::arg("dw"), py::arg("batch"), py::arg("columns"), py::arg("scale"),
          py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
  law.def("unit_linear_workspace", &unit_linear_workspace, Release(), py::arg("batch"),
          py::arg("columns"), py::arg("threads"), py::arg("lanes"));
  law.def("unit_linear", &unit_linear, Release(), py::arg("ring"), py::arg("bank_dtype"),
          py::arg("x"), py::arg("x_dtype"), py::arg("bias"), py::arg("y"), py::arg("batch"),
          py::arg("columns"), py::arg("scale"), py::arg("threads"), py::arg("lanes"),
          py::arg("workspace"));
  law.def("unit_linear_grads_workspace", &unit_linear_grads_workspace, Release(), py::arg("batch"),
          py::arg("columns"), py::arg("threads"), py::arg("lanes"), py::arg("dx"), py::arg("dw"));
  law.def("unit_linear_grads", &unit_linear_grads, Release(), py::arg("ring"),
          py::arg("bank_dtype"), py::arg("dy"), py::arg("x"), py::arg("dtype"), py::arg("dx"),
          py::arg("dw"), py::arg("batch"), py::arg("columns"), py::arg("scale"), py::arg("threads"),
          py::arg("lanes"), py::arg("workspace"));
  law.def("conv2d_workspace", &conv2d_workspace, Release(), py::arg("threads"),
          py::arg("batch_tile"), py::arg("tiles"));
  law.def("conv2d", &conv2d, Release(), py::arg("ring"), py::arg("bank_dtype"), py::arg("x"),
          py::arg("x_dtype"), py::arg("size"), py::arg("stride"), py::arg("bias"), py::arg("y"),
          py::arg("channels_last"), py::arg("kernel"), py::arg("by_tap"), py::arg("step"),
          py::arg("padding"), py::arg("dilation"), py::arg("scale"), py::arg("parts"),
          py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
}

}  // namespace rpg
