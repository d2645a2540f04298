// unit_conv2d_grads: dx = scale · (input gradient of dy) and dw [slots, block] += scale · Gᵀ ·
// (weight gradient of dy and x), for convolutions of the unit law; either or both.
//
// The mirror of unit_conv2d.cpp; what it does is in unit_grads.h, and lanes are pixels: of x where
// the stride is 1, so that a tap is a shift of dy and rows and taps that read a slot share its
// product; otherwise those of y, for one tap at a time, whose rows of x are gathered and whose rows
// of dx are added to. Memory, for 64 channels, units of 64 rows x 3 taps on 48 slots, images of 32
// x 32, one lane, tiles of 9 rows:
//
//   dy        [N, rows, columns]          96 KB  L2; padded by the kernel's reach; for all threads
//   x in rows [C / block, pixels, block]  74 KB  L2; for all threads
//   dx        the same                    74 KB  for each thread, as what follows
//   T         [48, pixels]                55 KB  L2
//   own       [2, pixels of y, block]     x and dx of one tap, of strided convolutions
//
// With pairs words of x, [C / block, pixels / 2, block], are there beside it for all threads (37
// KB), and T is [8, pixels] in fp32, 9 KB in L1, then words of two slots and halves, 28 KB each.
//
// Multiplications: W block pixels for each unit and gradient, 1 / laps of the dense ones.
// Additions: one for each row, tap and pixel, with a load of dy; a line of T is written once.

#include <atomic>

#include "cpu/image_tile.h"
#include "cpu/kernels.h"
#include "cpu/unit_conv2d.h"
#include "cpu/unit_grads.h"
#include "cpu/unit_lines.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int64_t kLinesBytes = 256 << 10;  // of T

class ConvSource {
 public:
  ConvSource(const LayerLaw& law, const Chosen& chosen, const UnitConv2dGradsArgs& args)
      : law_(law),
        chosen_(chosen),
        args_(args),
        g_(args.image),
        scales_(scales_of(args.scale, args.pairs)) {
    const int64_t lanes = args.lanes;
    shifts_ = g_.step[0] == 1 && g_.step[1] == 1;
    if (shifts_) {
      dy_rows_ = args.rows + g_.dilation[0] * (args.kernel[0] - 1);
      dy_columns_ = g_.width + g_.dilation[1] * (args.kernel[1] - 1);
      compact_ = g_.width * lanes % kVector == 0;
      columns_ = compact_ ? g_.width : dy_columns_;
    } else {
      dy_rows_ = g_.out_height, dy_columns_ = columns_ = g_.out_width;
      compact_ = true;
    }
    dy_plane_ = plane_of(dy_rows_ * dy_columns_ * lanes);
    t_plane_ = plane_of((shifts_ ? args.rows : dy_rows_) * columns_ * lanes);
    // Pixels of x and dx that a tile has in memory.
    pixels_ = (shifts_ ? args.rows * columns_ : g_.height * g_.width) * lanes;
  }

  SourceLayout layout() const {
    const int64_t pitch = chosen_.pitch(), in_rows = 4 * pixels_ * pitch * law_.run_blocks;
    const int64_t own = shifts_ ? 0 : 8 * dy_rows_ * dy_columns_ * args_.lanes * pitch;
    const int64_t octet = 4 * kOctet * t_plane_;
    const int64_t chunk = std::min(std::max<int64_t>(kLinesBytes / octet, 1), kMostChunk);
    return {4 * octets_for(chosen_.rows()) * kOctet * dy_plane_,
            in_rows,
            in_rows,
            own,
            t_plane_,
            chunk,
            !shifts_};
  }

  static constexpr bool kReaches = true;
  bool is_careful() const { return careful_.load(std::memory_order_relaxed); }

  // Marks the lanes that tap `tap` of a column's unit reaches.
  void reach(int64_t tile, int64_t column, uint32_t tap, uint8_t* reached) const {
    const int64_t number = column / law_.run_blocks * law_.taps + tap, lanes = args_.lanes;
    if (!shifts_) {
      for_pixels(column,
                 [&](int64_t pixel, int64_t) { std::memset(reached + pixel * lanes, 1, lanes); });
      return;
    }
    const int64_t row_shift = g_.padding[0] - g_.tap_row(number);
    const int64_t right = g_.padding[1] - g_.tap_column(number);
    for (int64_t i = 0; i < rows_of(tile); ++i) {
      const int64_t row = row_of(tile) + i + row_shift;
      if (row < 0 || row >= g_.out_height) continue;
      for (int64_t j = 0; j < g_.width; ++j) {
        if (j + right < 0 || j + right >= g_.out_width) continue;
        std::memset(reached + (i * columns_ + j) * lanes, 1, lanes);
      }
    }
  }

  // Where what lane q gives to dx is added; null: to nothing.
  float* dx_row(int64_t column, int64_t q, float* dx) const {
    const int64_t pitch = chosen_.pitch();
    float* out = dx + column % law_.run_blocks * pixels_ * pitch;
    if (shifts_) return out + q * pitch;
    const int64_t tap = column / law_.run_blocks, pixel = q / args_.lanes;
    const int64_t row = pixel / g_.out_width * g_.step[0] - g_.padding[0] + g_.tap_row(tap);
    const int64_t x_column = pixel % g_.out_width * g_.step[1] - g_.padding[1] + g_.tap_column(tap);
    return out + ((row * g_.width + x_column) * args_.lanes + q % args_.lanes) * pitch;
  }

  int64_t tiles() const {
    return images_in(g_.height) * ((args_.images + args_.lanes - 1) / args_.lanes);
  }
  // Floats of a line of T.
  int64_t lanes(int64_t tile) const {
    if (!shifts_) return dy_rows_ * dy_columns_ * args_.lanes;
    return ((rows_of(tile) - 1) * columns_ + g_.width) * args_.lanes;
  }
  void pack_dy(int64_t tile, int64_t octet, float* dy) const {
    const int64_t octets = std::min<int64_t>(octets_for(chosen_.rows()) - octet, kPackedOctets);
    const int64_t floats = octets * kOctet * dy_plane_;
    float* out = dy + octet * kOctet * dy_plane_;
    std::memset(out, 0, sizeof(float) * floats);
    // The row and column of y of the tile's first.
    int64_t top = 0, left = 0;
    if (shifts_) {
      top = row_of(tile) + g_.padding[0] - g_.dilation[0] * (args_.kernel[0] - 1);
      left = g_.padding[1] - g_.dilation[1] * (args_.kernel[1] - 1);
    }
    const int64_t row = std::max<int64_t>(top, 0), end = std::min(top + dy_rows_, g_.out_height);
    const int64_t column = std::max<int64_t>(left, 0);
    const int64_t last = std::min(left + dy_columns_, g_.out_width);
    if (row >= end || column >= last) return;
    ImageView view{args_.dtype, const_cast<void*>(args_.dy), {}};
    for (int i = 0; i < 4; ++i) view.stride[i] = args_.dy_stride[i];
    const int64_t channel = octet * kOctet, lanes = args_.lanes;
    const TilePart part{image_of(tile),
                        images_of(tile),
                        args_.lanes,
                        channel,
                        std::min<int64_t>(chosen_.rows() - channel, octets * kOctet),
                        row,
                        end - row,
                        column,
                        last - column};
    load_tile(view, part, {dy_plane_, dy_columns_ * lanes, lanes},
              out + ((row - top) * dy_columns_ + column - left) * lanes);
    multiply_all(scales_.dy, floats, out);
    see(out, floats);
  }

  // x [pixels, pitch] of a block of channels.
  void pack_x(int64_t tile, int64_t block, float* x) const {
    const int64_t size = chosen_.pitch(), step = args_.lanes * size;
    const int64_t channel = chosen_.first_element(block);
    const int valid = chosen_.count(block);
    float* out = x + block * pixels_ * size;
    std::memset(out, 0, sizeof(float) * pixels_ * size);
    const Activations source{args_.dtype, args_.x};
    for_rows(tile, [&](int64_t image, int64_t lane, int64_t row, int64_t place) {
      const int64_t first =
          image * g_.stride[0] + channel * g_.stride[1] + (row_of(tile) + row) * g_.stride[2];
      float* target = out + place * step + lane * size;
      if (g_.stride[1] == 1 || g_.stride[3] != 1) {
        for (int64_t j = 0; j < g_.width; ++j, target += step) {
          const int64_t pixel = first + j * g_.stride[3];
          if (g_.stride[1] == 1) {
            read_some(source.dtype, source.element(pixel), valid, target);
            continue;
          }
          for (int e = 0; e < valid; ++e) {
            read_some(source.dtype, source.element(pixel + e * g_.stride[1]), 1, target + e);
          }
        }
        return;
      }
      // All columns of 8 channels first: rows of channels may lie in the same set of a cache.
      for (int e = 0; e < valid; e += 8) {
        for (int64_t j = 0; j < g_.width; j += 8) {
          const int count = up_to_eight(g_.width - j);
          Floats<8> square[8];
          load_square(source, first + e * g_.stride[1] + j, g_.stride[1], up_to_eight(valid - e),
                      count, square);
          transpose8(square);
          for (int i = 0; i < count; ++i) store<8>(target + (j + i) * step + e, square[i]);
        }
      }
    });
    see(out, pixels_ * size);
  }

  const float* x_of(int64_t tile, int64_t column, const float* x, float* own) const {
    const int64_t pitch = chosen_.pitch(), size = args_.lanes * pitch;
    const float* rows = x + column % law_.run_blocks * pixels_ * pitch;
    if (shifts_) return rows;
    std::memset(own, 0, sizeof(float) * lanes(tile) * pitch);
    for_pixels(column, [&](int64_t out, int64_t in) {
      std::memcpy(own + out * size, rows + in * size, sizeof(float) * size);
    });
    return own;
  }

  // As sum_octet of linear layers.
  uint32_t sum_octet(int64_t tile, int64_t column, uint32_t first, uint32_t octets_of_group,
                     const OctetEntry* entry, const uint16_t* octets, int count,
                     const int32_t (*rows)[8], const float* dy, float* t) const {
    const int64_t row_floats = dy_columns_ * args_.lanes;
    int64_t shift[kMostUses], first_row[kMostUses];
    for (int u = 0; u < count; ++u) {
      const int64_t tap = column / law_.run_blocks * law_.taps + octets[u] / octets_of_group;
      const int64_t row_shift = args_.kernel[0] - 1 - tap / g_.kernel_width;
      const int64_t right = args_.kernel[1] - 1 - tap % g_.kernel_width;
      shift[u] =
          shifts_ ? row_shift * g_.dilation[0] * row_floats + right * g_.dilation[1] * args_.lanes
                  : 0;
      first_row[u] = (first + octets[u] % octets_of_group) * int64_t{kOctet};
    }
    const int32_t* number_of = chosen_.has_rows() ? chosen_.number_of() : nullptr;
    uint32_t read = 0;
    const int64_t height = compact_ && shifts_ ? rows_of(tile) : 1;
    const int64_t line = lanes(tile) / height;
    for (int c = 0; c < 8; ++c) {
      const float* source[kMostUses];
      float sign[kMostUses];
      int uses = 0;  // of rows that are there
      for (int u = 0; u < count; ++u) {
        const OctetEntry e = entry[octets[u]];
        const int32_t row = rows[e.pattern][c];
        const int64_t number = number_of ? number_of[first_row[u] + row] : first_row[u] + row;
        source[uses] = dy + shift[u] + std::max<int64_t>(number, 0) * dy_plane_;
        sign[uses] = kSigns[e.signs >> row & 1];
        uses += number >= 0;
      }
      read |= (uses ? 1u : 0u) << c;
      float* out = t + c * t_plane_;
      add_rows(source, sign, uses, height, line, row_floats, line, false, out);
      // Between rows that are not compact lies what no pixel is.
      const int64_t gap = (columns_ - g_.width) * args_.lanes;
      for (int64_t i = 1; shifts_ && gap && i < rows_of(tile); ++i) {
        std::memset(out + i * columns_ * args_.lanes - gap, 0, sizeof(float) * gap);
      }
    }
    return read;
  }

  template <class Element>
  void add_dx(int64_t tile, int64_t column, const FactorOf<Element>& t, const Element* window,
              int steps, float* dx, float* own) const {
    const int64_t block = column % law_.run_blocks;
    const int pitch = chosen_.pitch(), padded = chosen_.padded(block);
    const int rows = static_cast<int>(lanes(tile));
    float* out = dx + block * pixels_ * pitch;
    if (shifts_) return multiply<true>(rows, padded, t, window, padded, steps, out, pitch);
    float* products = own + lanes(tile) * pitch;
    multiply<false>(rows, padded, t, window, padded, steps, products, padded);
    for_pixels(column, [&](int64_t pixel, int64_t in) {
      for (int64_t lane = 0; lane < args_.lanes; ++lane) {
        const float* added = products + (pixel * args_.lanes + lane) * padded;
        float* target = out + (in * args_.lanes + lane) * pitch;
        for (int64_t i = 0; i < padded; i += kVector) {
          store<kVector>(target + i, load<kVector>(target + i) + load<kVector>(added + i));
        }
      }
    });
  }

  void write_dx(int64_t tile, int64_t block, const std::vector<float*>& parts) const {
    const int64_t size = chosen_.pitch(), step = args_.lanes * size, area = g_.height * g_.width;
    const int64_t channel = chosen_.first_element(block);
    const int valid = chosen_.count(block);
    ImageView view{args_.dtype, args_.dx, {g_.channels * area, area, g_.width, 1}};
    if (g_.channels_last)
      view = {args_.dtype, args_.dx, {g_.channels * area, 1, g_.width * g_.channels, g_.channels}};
    const auto sum_at = [&](int64_t offset) {
      Floats<8> sum = load<8>(parts[0] + offset);
      for (size_t part = 1; part < parts.size(); ++part) sum += load<8>(parts[part] + offset);
      return sum * splat<8>(scales_.sums);
    };
    for_rows(tile, [&](int64_t image, int64_t lane, int64_t row, int64_t place) {
      const int64_t offset = block * pixels_ * size + place * step + lane * size;
      if (g_.channels_last) {
        void* target = view.element(view.index(image, channel, row_of(tile) + row, 0));
        const int64_t bytes = g_.channels * element_bytes(args_.dtype);
        for (int64_t j = 0; j < g_.width; ++j, target = static_cast<char*>(target) + bytes) {
          alignas(64) float values[128];
          for (int e = 0; e < valid; e += 8) store<8>(values + e, sum_at(offset + j * step + e));
          write_some(args_.dtype, values, valid, target);
        }
        return;
      }
      for (int e = 0; e < valid; e += 8) {  // as in pack_x
        for (int64_t j = 0; j < g_.width; j += 8) {
          const int count = up_to_eight(g_.width - j), channels = up_to_eight(valid - e);
          Floats<8> square[8] = {};
          for (int i = 0; i < count; ++i) square[i] = sum_at(offset + (j + i) * step + e);
          transpose8(square);
          for (int i = 0; i < channels; ++i) {
            void* target = view.element(view.index(image, channel + e + i, row_of(tile) + row, j));
            if (count == 8) {
              store_eight(view.dtype, square[i], target);
              continue;
            }
            alignas(32) float values[8];
            store<8>(values, square[i]);
            write_some(view.dtype, values, count, target);
          }
        }
      }
    });
  }

 private:
  // From then on products are made one by one: something is not finite.
  void see(const float* values, int64_t count) const {
    if (!all_below(kInfinite, values, count)) careful_.store(true, std::memory_order_relaxed);
  }

  int64_t images_in(int64_t height) const {  // tiles of an image
    return shifts_ ? (height + args_.rows - 1) / args_.rows : 1;
  }
  int64_t image_of(int64_t tile) const { return tile / images_in(g_.height) * args_.lanes; }
  int64_t images_of(int64_t tile) const {
    return std::min<int64_t>(args_.images - image_of(tile), args_.lanes);
  }
  // The first row of x of a tile, and how many it has.
  int64_t row_of(int64_t tile) const {
    return shifts_ ? tile % images_in(g_.height) * args_.rows : 0;
  }
  int64_t rows_of(int64_t tile) const {
    return shifts_ ? std::min(g_.height - row_of(tile), args_.rows) : g_.height;
  }

  // Calls visit(image, lane, row of the tile, number of the row's first pixel) for rows of x.
  template <class Visit>
  void for_rows(int64_t tile, const Visit& visit) const {
    const int64_t columns = shifts_ ? columns_ : g_.width;
    for (int64_t lane = 0; lane < images_of(tile); ++lane) {
      for (int64_t row = 0; row < rows_of(tile); ++row) {
        visit(image_of(tile) + lane, lane, row, row * columns);
      }
    }
  }

  // Calls visit(pixel of y, pixel of x) for those that a tap connects.
  template <class Visit>
  void for_pixels(int64_t column, const Visit& visit) const {
    const int64_t tap = column / law_.run_blocks;
    const int64_t row_shift = g_.tap_row(tap) - g_.padding[0];
    const int64_t right = g_.tap_column(tap) - g_.padding[1];
    for (int64_t i = 0; i < g_.out_height; ++i) {
      const int64_t row = i * g_.step[0] + row_shift;
      if (row < 0 || row >= g_.height) continue;
      for (int64_t j = 0; j < g_.out_width; ++j) {
        const int64_t x_column = j * g_.step[1] + right;
        if (x_column >= 0 && x_column < g_.width)
          visit(i * g_.out_width + j, row * g_.width + x_column);
      }
    }
  }

  const LayerLaw& law_;
  const Chosen& chosen_;
  const UnitConv2dGradsArgs& args_;
  const Image& g_;
  Scales scales_;
  mutable std::atomic<bool> careful_{false};
  bool shifts_;      // taps are shifts of dy
  bool compact_;     // rows of T follow each other without a gap
  int64_t columns_;  // of T, with what lies between rows
  int64_t dy_rows_, dy_columns_, dy_plane_, t_plane_, pixels_;
};

UnitGradsArgs grads_args(const UnitConv2dGradsArgs& args) {
  const float scale = scales_of(args.scale, args.pairs).sums;
  return {args.bank, args.dx != nullptr, args.dw, scale, args.threads, args.workspace, args.pairs};
}

}  // namespace

Workspace unit_conv2d_grads_workspace(const LayerLaw& law, const UnitConv2dGradsArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.image.run);
  const SourceLayout source = ConvSource(law, chosen, args).layout();
  const UnitGradsLayout layout = unit_grads_layout(law, plan, chosen, grads_args(args), source);
  return {layout.shared() + args.threads * layout.of_thread() + plan.bytes() + chosen.bytes(),
          layout.shared() + args.threads * layout.dx};
}

void unit_conv2d_grads(const LayerLaw& law, const UnitConv2dGradsArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.image.run);
  const ConvSource source(law, chosen, args);
  const UnitGradsArgs of_layer = grads_args(args);
  UnitGrads<ConvSource>(law, plan, chosen, of_layer, source).run();
}

}  // namespace rpg::RPG_ISA
