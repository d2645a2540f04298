// conv2d: y [B, N, H', W'] = scale · conv2d(x [B, C, H, W], Ŵ) + bias, Ŵ = G ring never in memory,
// and no matrix of patches either.
//
// It is `linear` over output pixels (linear.cpp): per column of blocks S = ring · x_b once,
// then an addition for each row. x_b [block, 16 pixels] is gathered from the image just before a
// column uses it, 4 KB per tile, and results go from the sums into the image. Both
// are functions of their own, so that the instances of the product do not multiply.
//
// Plan, for 16 pixels and one column of N rows and 64 elements, in vectors of 16 floats: products
// 64 min(N, slots), additions N (each two loads and a store), gathering 64 loads and stores where
// pixels lie side by side, up to three times as many where they span rows of the image, 64 loads
// and 256 shuffles where channels do, and 1024 scalar moves otherwise (strides). With N = 256 and a
// ring of 64 slots 4096 + 256 + about 128: products are what takes time, a quarter of a dense
// convolution's.

#include "cpu/conv2d.h"

#include <algorithm>

#include "cpu/batch.h"
#include "cpu/kernels.h"
#include "cpu/squares.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLanes = 16;
constexpr int kSpans = 4;  // more are gathered pixel by pixel

template <class T>
inline Floats<kLanes> load_as(const typename T::Bits* numbers) {
  float floats[kLanes];
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) floats[l] = T::load(numbers[l]);
  return load<kLanes>(floats);
}

// What the pixels of a tile read at one tap: the number of an element of x for each lane, -1
// outside of the image.
struct PixelOffsets {
  int64_t lane[kLanes];
};

// Where the kernel's first tap is for each pixel of a tile.
class Pixels {
 public:
  Pixels(const Image& g, int64_t m0, int rows) : g_(g), rows_(rows) {
    const int64_t m = g.first + m0;
    int64_t j = m % g.out_width, i = m / g.out_width % g.out_height;
    int64_t image = m / g.out_width / g.out_height;
    for (int l = 0; l < rows; ++l) {
      top_[l] = i * g.step[0] - g.padding[0];
      left_[l] = j * g.step[1] - g.padding[1];
      image_[l] = image * g.stride[0];
      if (++j < g.out_width) continue;
      j = 0;
      if (++i < g.out_height) continue;
      i = 0;
      ++image;
    }
  }

  PixelOffsets offsets(int64_t tap) const {
    const int64_t row_offset = g_.tap_row(tap);
    const int64_t column_offset = g_.tap_column(tap);
    PixelOffsets out;
    for (int l = 0; l < kLanes; ++l) out.lane[l] = -1;
    for (int l = 0; l < rows_; ++l) {
      const int64_t row = top_[l] + row_offset, column = left_[l] + column_offset;
      if (row >= 0 && row < g_.height && column >= 0 && column < g_.width) {
        out.lane[l] = image_[l] + row * g_.stride[2] + column * g_.stride[3];
      }
    }
    return out;
  }

 private:
  const Image& g_;
  int rows_;
  int64_t top_[kLanes], left_[kLanes], image_[kLanes];
};

// Pixels side by side in x: lanes first ... last - 1 read x from `offset` + first on.
struct PixelSpan {
  int first, last;
  int64_t offset;
};

// Spans of a tile, in order; more than kSpans where there are too many.
inline int spans_of(const PixelOffsets& offsets, PixelSpan (&span)[kSpans]) {
  int count = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int64_t offset = offsets.lane[l] - l;
    if (offsets.lane[l] < 0) continue;
    if (count && span[count - 1].last == l && span[count - 1].offset == offset) {
      span[count - 1].last = l + 1;
    } else {
      if (count == kSpans) return kSpans + 1;
      span[count++] = {l, l + 1, offset};
    }
  }
  return count;
}

// Channels c ... c + count - 1 at one tap, out [count, kLanes]: whole vectors of x, of which each
// span keeps its lanes. False where that would read beyond x.
template <class T>
inline bool load_spans(const Image& g, const typename T::Bits* x, const PixelOffsets& offsets,
                       int64_t c, int count, float* out) {
  using LaneBits = typename FloatsOf<kLanes>::integers;
  PixelSpan span[kSpans];
  const int spans = spans_of(offsets, span);
  if (spans > kSpans) return false;
  const int64_t step = g.stride[1];
  LaneBits mask[kSpans];
  for (int r = 0; r < spans; ++r) {
    const int64_t low = span[r].offset + c * step;
    if (low < 0 || low + (count - 1) * step + kLanes > g.extent) return false;
    for (int l = 0; l < kLanes; ++l) mask[r][l] = -(l >= span[r].first && l < span[r].last);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t channel_offset = (c + i) * step;
    LaneBits sum = {};
    for (int r = 0; r < spans; ++r) {
      const Floats<kLanes> pixels = load_as<T>(x + span[r].offset + channel_offset);
      LaneBits integers;
      std::memcpy(&integers, &pixels, sizeof integers);
      sum |= integers & mask[r];
    }
    std::memcpy(out + i * kLanes, &sum, sizeof sum);
  }
  return true;
}

// Does the same where the channels of a pixel lie side by side, 16 of them at a time; returns how
// many it did.
template <class T>
inline int load_lines(const typename T::Bits* x, const PixelOffsets& offsets, int64_t c, int count,
                      float* out) {
  int done = 0;
  for (; done + 16 <= count; done += 16) {
    Floats<16> line[16];
    for (int l = 0; l < 16; ++l) {
      line[l] = offsets.lane[l] < 0 ? Floats<16>{} : load_as<T>(x + offsets.lane[l] + c + done);
    }
    transpose16(line);
    std::memcpy(out + done * 16, line, sizeof line);
  }
  return done;
}

template <class T>
void load_block_of(const Image& g, const typename T::Bits* x, int64_t m0, int rows, int lanes,
                   int64_t block, int size, float* out) {
  const Pixels pixels(g, m0, rows);
  const bool by_row = lanes <= 4;
  const int64_t first = block % g.run_blocks * size;
  const int valid = static_cast<int>(std::min<int64_t>(size, g.run - first));
  int64_t tap = g.by_tap ? block / g.run_blocks : first / g.channels;
  int64_t c = g.by_tap ? first : first % g.channels;
  for (int e = 0; e < valid; ++tap, c = 0) {
    const int count = static_cast<int>(std::min<int64_t>(valid - e, g.channels - c));
    const PixelOffsets offsets = pixels.offsets(tap);
    float* const target = out + (by_row ? e : e * lanes);
    e += count;
    if (lanes == kLanes && load_spans<T>(g, x, offsets, c, count, target)) continue;
    const int64_t lane_step = by_row ? size : 1, element_step = by_row ? 1 : lanes;
    const bool lines = lanes == 16 && g.stride[1] == 1;
    const int done = lines ? load_lines<T>(x, offsets, c, count, target) : 0;
    for (int l = 0; l < lanes; ++l) {
      float* const of_lane = target + l * lane_step;
      if (offsets.lane[l] < 0) {
        for (int i = done; i < count; ++i) of_lane[i * element_step] = 0.f;
        continue;
      }
      const typename T::Bits* const source = x + offsets.lane[l] + c * g.stride[1];
      for (int i = done; i < count; ++i) {
        of_lane[i * element_step] = T::load(source[i * g.stride[1]]);
      }
    }
  }
  for (int l = 0; l < lanes; ++l) {
    for (int e = valid; e < size; ++e) out[by_row ? l * size + e : e * lanes + l] = 0.f;
  }
}

inline Floats<kLanes> total(const LinearArgs& args, const PixelSums& sums, int64_t m, int64_t n) {
  const int64_t offset = m * sums.height + n * kLanes;
  Floats<kLanes> sum = load<kLanes>(sums.sum[0] + offset);
  for (int i = 1; i < sums.count; ++i) sum += load<kLanes>(sums.sum[i] + offset);
  sum *= splat<kLanes>(static_cast<float>(args.scale));
  return args.bias ? sum + splat<kLanes>(args.bias[sums.n0 + n]) : sum;
}

// Channels-last: 16 channels of a tile's pixels at a time.
template <class T>
void store_lines(const Image& g, const LinearArgs& args, const PixelSums& sums) {
  typename T::Bits* const y = static_cast<typename T::Bits*>(args.y);
  for (int64_t m = 0; m < sums.rows; m += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, sums.rows - m));
    for (int64_t n = sums.begin; n < sums.end; n += 16) {
      const int size = static_cast<int>(std::min<int64_t>(16, sums.end - n));
      Floats<16> line[16] = {};
      for (int k = 0; k < size; ++k) line[k] = total(args, sums, m, n + k);
      transpose16(line);
      for (int l = 0; l < count; ++l) {
        typename T::Bits* const target =
            y + (g.first + sums.m0 + m + l) * sums.out_channels + sums.n0 + n;
        if (size == 16) {
#pragma omp simd
          for (int k = 0; k < 16; ++k) target[k] = T::store(line[l][k]);
        } else {
          for (int k = 0; k < size; ++k) target[k] = T::store(line[l][k]);
        }
      }
    }
  }
}

// Contiguous: pixels of a channel side by side.
template <class T>
void store_planes(const Image& g, const LinearArgs& args, const PixelSums& sums) {
  typename T::Bits* const y = static_cast<typename T::Bits*>(args.y);
  const int64_t plane = g.out_height * g.out_width;
  for (int64_t n = sums.begin; n < sums.end; ++n) {
    const int64_t first = g.first + sums.m0;
    int64_t image = first / plane, pixel = first % plane;
    for (int64_t m = 0; m < sums.rows; m += kLanes) {
      float value[kLanes];
      store<kLanes>(value, total(args, sums, m, n));
      typename T::Bits* target = y + (image * sums.out_channels + sums.n0 + n) * plane + pixel;
      if (m + kLanes <= sums.rows && pixel + kLanes <= plane) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) target[l] = T::store(value[l]);
        pixel += kLanes;
      } else {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, sums.rows - m));
        for (int l = 0; l < count; ++l, ++pixel) {
          if (pixel == plane) {
            pixel = 0;
            ++image;
            target = y + (image * sums.out_channels + sums.n0 + n) * plane - l;
          }
          target[l] = T::store(value[l]);
        }
      }
      if (pixel == plane) pixel = 0, ++image;
    }
  }
}

template <class T>
void store_tiles(const Image& g, const LinearArgs& args, const PixelSums& sums) {
  return g.channels_last ? store_lines<T>(g, args, sums) : store_planes<T>(g, args, sums);
}

// Stores tiles of fewer pixels than a vector has lanes.
void store_each(const Image& g, const LinearArgs& args, const PixelSums& sums) {
  const int64_t plane = g.out_height * g.out_width;
  for (int64_t m = 0; m < sums.rows; ++m) {
    const int64_t pixel = g.first + sums.m0 + m;
    const int64_t offset = m / sums.lanes * sums.height * sums.lanes + m % sums.lanes;
    for (int64_t n = sums.begin; n < sums.end; ++n) {
      float sum = 0;
      for (int i = 0; i < sums.count; ++i) sum += sums.sum[i][offset + n * sums.lanes];
      sum *= static_cast<float>(args.scale);
      const int64_t channel = sums.n0 + n;
      if (args.bias) sum += args.bias[channel];
      const int64_t index =
          g.channels_last ? pixel * sums.out_channels + channel
                          : (pixel / plane * sums.out_channels + channel) * plane + pixel % plane;
      set_element(args.x_dtype, args.y, index, sum);
    }
  }
}

}  // namespace

void load_patches(const Image& g, Dtype dtype, const void* x, int64_t m0, int rows, int lanes,
                  int64_t block, int size, float* out) {
  const uint16_t* const half = static_cast<const uint16_t*>(x);
  switch (dtype) {
    case Dtype::kBfloat16:
      return load_block_of<Bfloat16>(g, half, m0, rows, lanes, block, size, out);
    case Dtype::kFloat16: return load_block_of<Float16>(g, half, m0, rows, lanes, block, size, out);
    default:
      return load_block_of<Float32>(g, static_cast<const uint32_t*>(x), m0, rows, lanes, block,
                                    size, out);
  }
}

void store_pixels(const Image& g, const LinearArgs& args, const PixelSums& sums) {
  if (sums.lanes != kLanes) return store_each(g, args, sums);
  switch (args.x_dtype) {
    case Dtype::kBfloat16: return store_tiles<Bfloat16>(g, args, sums);
    case Dtype::kFloat16: return store_tiles<Float16>(g, args, sums);
    default: return store_tiles<Float32>(g, args, sums);
  }
}

void conv2d(const LayerLaw& law, const Conv2dArgs& args) {
  const int64_t pixels = args.linear.batch, tile = args.linear.batch_tile;
  const int64_t tiles = (pixels + tile - 1) / tile;
#pragma omp parallel for schedule(static) num_threads(args.parts)
  for (int part = 0; part < args.parts; ++part) {
    const int64_t begin = tiles * part / args.parts * tile;
    const int64_t end = std::min(tiles * (part + 1) / args.parts * tile, pixels);
    if (begin >= end) continue;
    Image image = args.image;
    image.first = begin;
    LinearArgs linear_args = args.linear;
    linear_args.batch = end - begin;
    linear_args.workspace = static_cast<char*>(args.linear.workspace) + part * args.part_bytes;
    linear_args.image = &image;
    linear(law, linear_args);
  }
}

Workspace conv2d_workspace(const LayerLaw& law, const Conv2dArgs& args) {
  LinearArgs linear_args = args.linear;
  linear_args.image = &args.image;
  return linear_workspace(law, linear_args);
}

}  // namespace rpg::RPG_ISA
