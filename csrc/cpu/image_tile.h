// Tiles of images in the layout that products want: fp32, [channel, row, column, lane], where lanes
// are images, or the columns themselves where there is one lane.

#pragma once

#include "cpu/conv2d.h"
#include "cpu/lanes.h"
#include "cpu/squares.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// A tensor [images, channels, height, width] in any strides, which are in elements.
struct ImageView {
  Dtype dtype;
  void* data;
  int64_t stride[4];
  const void* element(int64_t i) const {
    return static_cast<const char*>(data) + i * element_bytes(dtype);
  }
  void* element(int64_t i) { return static_cast<char*>(data) + i * element_bytes(dtype); }
  int64_t index(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    return image * stride[0] + channel * stride[1] + row * stride[2] + column * stride[3];
  }
};

// Which part of a view is meant: `lanes` of `images` images from `image` on (1: a single image).
struct TilePart {
  int64_t image, images;
  int lanes;
  int64_t channel, channels;
  int64_t row, rows;
  int64_t column, columns;
};

// How a tile lies in memory, in floats.
struct TileLayoutOf {
  int64_t channel, row, column;
};

// Calls visit(v, elements) for `kSide` places of a row of a tile at a time, from number v on, in
// order of columns and of lanes; `elements` are those of the view that they begin with, -1 where
// there is none.
template <class Visit>
inline void for_places(const ImageView& view, const TilePart& part, int64_t row,
                       const Visit& visit) {
  const int64_t count = part.columns * part.lanes;
  int64_t column = view.index(part.image, part.channel, part.row + row, part.column);
  int lane = 0;
  for (int64_t v = 0; v < count; v += kSide) {
    int64_t elements[kSide];
    for (int i = 0; i < kSide; ++i) {
      const bool exists = v + i < count && lane < part.images;
      elements[i] = exists ? column + lane * view.stride[0] : -1;
      if (++lane == part.lanes) lane = 0, column += view.stride[3];
    }
    visit(v, elements);
  }
}

// Squares of `kSide` places and as many words, of rows of a view whose channels lie side by side:
// calls visit(row, v, channel, square) with lines of words, of which the first is of `channel`.
template <class T, class Visit>
inline void load_squares(const ImageView& view, const TilePart& part, const Visit& visit) {
  constexpr int64_t kChannels = kSide * kChannelsOf<T>, kSize = sizeof(typename T::Bits);
  // A square's lines are far apart, and the processor does not see that the next ones follow.
  const int64_t ahead = std::max(kSide / part.lanes, 1) * view.stride[3];
  for (int64_t row = 0; row < part.rows; ++row) {
    for_places(view, part, row, [&](int64_t v, const int64_t (&elements)[kSide]) {
      for (int64_t channel = 0; channel < part.channels; channel += kChannels) {
        Words square[kSide];
        const int64_t bytes = (part.channels - channel) * kSize;
        for (int i = 0; i < kSide; ++i) {
          square[i] = Words{};
          if (elements[i] < 0) continue;
          square[i] = load_part(view.element(elements[i] + channel), bytes);
          __builtin_prefetch(view.element(elements[i] + channel + ahead));
        }
        transpose(square);
        visit(row, v, channel, square);
      }
    });
  }
}

// tile = a part of such a view.
template <class T>
inline void load_channels(const ImageView& view, const TilePart& part, const TileLayoutOf& layout,
                          float* tile) {
  constexpr int kOfWord = kChannelsOf<T>;
  load_squares<T>(view, part, [&](int64_t row, int64_t v, int64_t channel, const Words* square) {
    float* out = tile + channel * layout.channel + row * layout.row + v;
    const int64_t left = part.channels - channel;
    for (int j = 0; j < kSide && j * kOfWord < left; ++j) {
      Floats<kSide> floats[2];
      split<T>(square[j], floats);
      for (int i = 0; i < kOfWord && j * kOfWord + i < left; ++i, out += layout.channel) {
        store<kSide>(out, floats[i]);
      }
    }
  });
}

// words [ceil(channels / 2), ...] of pairs, `layout` as that of a tile: a part of a view in
// bfloat16 whose channels lie side by side.
inline void load_pairs(const ImageView& view, const TilePart& part, const TileLayoutOf& layout,
                       uint32_t* words) {
  load_squares<Bfloat16>(
      view, part, [&](int64_t row, int64_t v, int64_t channel, const Words* square) {
        uint32_t* out = words + channel / 2 * layout.channel + row * layout.row + v;
        for (int j = 0; j < kSide && 2 * j < part.channels - channel; ++j, out += layout.channel) {
          std::memcpy(out, &square[j], sizeof square[j]);
        }
      });
}

// A part of a view whose channels lie side by side = scale · tile + bias [channels] or null.
template <class T>
inline void store_channels(const float* tile, const TileLayoutOf& layout, const TilePart& part,
                           ImageView& view, float scale, const float* bias) {
  constexpr int kOfWord = kChannelsOf<T>;
  constexpr int64_t kSize = sizeof(typename T::Bits);
  const Floats<kSide> scales = splat<kSide>(scale);
  for (int64_t row = 0; row < part.rows; ++row) {
    for_places(view, part, row, [&](int64_t v, const int64_t (&elements)[kSide]) {
      for (int64_t channel = 0; channel < part.channels; channel += kSide * kOfWord) {
        const int64_t left = part.channels - channel;
        const float* in = tile + channel * layout.channel + row * layout.row + v;
        Words square[kSide];
        for (int j = 0; j < kSide; ++j) {
          Floats<kSide> floats[2] = {};
          for (int i = 0; i < kOfWord && j * kOfWord + i < left; ++i, in += layout.channel) {
            const int64_t number = channel + j * kOfWord + i;
            floats[i] = load<kSide>(in) * scales + splat<kSide>(bias ? bias[number] : 0.f);
          }
          square[j] = join_as<T>(floats);
        }
        transpose(square);
        for (int i = 0; i < kSide; ++i) {
          if (elements[i] < 0) continue;
          store_part(square[i], left * kSize, view.element(elements[i] + channel));
        }
      }
    });
  }
}

// Squares of 8 columns of a row and 8 lanes, where columns lie side by side in the view and lanes
// in the tile: calls visit(column, lane, channel, view element, tile offset) for their corners.
template <class Visit>
inline void for_squares(const ImageView& view, const TilePart& part, const TileLayoutOf& layout,
                        const Visit& visit) {
  for (int64_t row = 0; row < part.rows; ++row) {
    for (int64_t channel = 0; channel < part.channels; ++channel) {
      for (int64_t u = 0; u < part.columns; u += 8) {
        for (int64_t v = 0; v < part.images; v += 8) {
          visit(u, v, channel,
                view.index(part.image + v, part.channel + channel, part.row + row, part.column + u),
                channel * layout.channel + row * layout.row + u * layout.column + v);
        }
      }
    }
  }
}

inline int up_to_eight(int64_t count) { return static_cast<int>(std::min<int64_t>(count, 8)); }

// tile = a part of a view, where neither its columns nor its channels are contiguous: `picked`
// columns are read with what lies between them, and picked out. Nothing else is written.
inline void load_apart(const ImageView& view, const TilePart& part, const TileLayoutOf& layout,
                       float* tile) {
  constexpr int64_t kRead = 256;
  float values[kRead];
  const int64_t step = view.stride[3], picked = (kRead - 1) / std::max<int64_t>(step, 1) + 1;
  for (int64_t channel = 0; channel < part.channels; ++channel) {
    for (int64_t row = 0; row < part.rows; ++row) {
      for (int64_t lane = 0; lane < part.images; ++lane) {
        const int64_t first =
            view.index(part.image + lane, part.channel + channel, part.row + row, part.column);
        float* out = tile + channel * layout.channel + row * layout.row + lane;
        for (int64_t j = 0; j < part.columns; j += picked) {
          const int64_t count = std::min(picked, part.columns - j);
          read_some(view.dtype, view.element(first + j * step),
                    static_cast<int>((count - 1) * step + 1), values);
          for (int64_t i = 0; i < count; ++i) out[(j + i) * layout.column] = values[i * step];
        }
      }
    }
  }
}

inline bool channels_side_by_side(const ImageView& view) { return view.stride[1] == 1; }

// tile = a part of a view. Where lanes or columns end within a vector, zeros may be written behind
// them before the next row, or with several lanes the next column, is.
inline void load_tile(const ImageView& view, const TilePart& part, const TileLayoutOf& layout,
                      float* tile) {
  if (part.lanes == 1 && view.stride[3] == 1) {
    for (int64_t channel = 0; channel < part.channels; ++channel) {
      for (int64_t row = 0; row < part.rows; ++row) {
        const int64_t view_index =
            view.index(part.image, part.channel + channel, part.row + row, part.column);
        read_some(view.dtype, view.element(view_index), static_cast<int>(part.columns),
                  tile + channel * layout.channel + row * layout.row);
      }
    }
    return;
  }
  if (channels_side_by_side(view)) {
    switch (view.dtype) {
      case Dtype::kBfloat16: return load_channels<Bfloat16>(view, part, layout, tile);
      case Dtype::kFloat16: return load_channels<Float16>(view, part, layout, tile);
      default: return load_channels<Float32>(view, part, layout, tile);
    }
  }
  if (view.stride[3] != 1) return load_apart(view, part, layout, tile);
  for_squares(view, part, layout,
              [&](int64_t u, int64_t v, int64_t, int64_t view_index, int64_t tile_index) {
                const int columns = up_to_eight(part.columns - u);
                Floats<8> square[8];
                load_square({view.dtype, view.data}, view_index, view.stride[0],
                            up_to_eight(part.images - v), columns, square);
                transpose8(square);
                for (int j = 0; j < columns; ++j) {
                  store<8>(tile + tile_index + j * layout.column, square[j]);
                }
              });
}

// A part of a view, channels-last or contiguous, = scale · tile + bias [channels] or null.
inline void store_tile(const float* tile, const TileLayoutOf& layout, const TilePart& part,
                       ImageView& view, float scale, const float* bias) {
  if (channels_side_by_side(view)) {
    switch (view.dtype) {
      case Dtype::kBfloat16: return store_channels<Bfloat16>(tile, layout, part, view, scale, bias);
      case Dtype::kFloat16: return store_channels<Float16>(tile, layout, part, view, scale, bias);
      default: return store_channels<Float32>(tile, layout, part, view, scale, bias);
    }
  }
  const Floats<8> scales = splat<8>(scale);
  if (part.lanes == 1) {
    for (int64_t channel = 0; channel < part.channels; ++channel) {
      const Floats<8> added = splat<8>(bias ? bias[channel] : 0.f);
      for (int64_t row = 0; row < part.rows; ++row) {
        const float* source = tile + channel * layout.channel + row * layout.row;
        const int64_t view_index =
            view.index(part.image, part.channel + channel, part.row + row, part.column);
        int64_t i = 0;
        for (; i + 8 <= part.columns; i += 8) {
          store_eight(view.dtype, load<8>(source + i) * scales + added,
                      view.element(view_index + i));
        }
        if (i == part.columns) continue;
        alignas(32) float values[8];
        store<8>(values, load<8>(source + i) * scales + added);
        write_some(view.dtype, values, static_cast<int>(part.columns - i),
                   view.element(view_index + i));
      }
    }
    return;
  }
  for_squares(view, part, layout,
              [&](int64_t u, int64_t v, int64_t channel, int64_t view_index, int64_t tile_index) {
                const int columns = up_to_eight(part.columns - u);
                const Floats<8> added = splat<8>(bias ? bias[channel] : 0.f);
                Floats<8> square[8] = {};
                for (int j = 0; j < columns; ++j) {
                  square[j] = load<8>(tile + tile_index + j * layout.column) * scales + added;
                }
                transpose8(square);
                for (int i = 0; i < up_to_eight(part.images - v); ++i) {
                  void* target = view.element(view_index + i * view.stride[0]);
                  if (columns == 8) {
                    store_eight(view.dtype, square[i], target);
                    continue;
                  }
                  alignas(32) float values[8];
                  store<8>(values, square[i]);
                  write_some(view.dtype, values, columns, target);
                }
              });
}

}  // namespace
}  // namespace rpg
