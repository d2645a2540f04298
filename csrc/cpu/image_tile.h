// Tiles of images in the layout that products want: fp32, [channel, row, column, lane], where lanes
// are images, or the columns themselves where there is one lane.

#pragma once

#include "cpu/conv2d.h"
#include "cpu/lanes.h"

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

// Squares of 8 x 8 are transposed between u, the dimension that is contiguous in the view, and v,
// the one that is contiguous in the tile: images, or columns where there is one lane.
struct Squares {
  bool u_is_channel;
  int64_t u_count, v_count;
  int64_t u_tile, u_view, v_view;  // strides
};

inline Squares squares_of(const ImageView& view, const TilePart& part, const TileLayoutOf& tile) {
  Squares out{};
  out.u_is_channel = view.stride[3] != 1 || part.columns == 1;
  out.u_count = out.u_is_channel ? part.channels : part.columns;
  out.u_tile = out.u_is_channel ? tile.channel : tile.column;
  out.u_view = out.u_is_channel ? view.stride[1] : view.stride[3];
  out.v_count = part.lanes == 1 ? part.columns : part.images;
  out.v_view = part.lanes == 1 ? view.stride[3] : view.stride[0];
  return out;
}

// Calls visit(u, v, view element, tile offset) for the corners of all squares.
template <class Visit>
inline void for_squares(const ImageView& view, const TilePart& part, const TileLayoutOf& tile,
                        const Squares& squares, const Visit& visit) {
  const int64_t outer_count = part.lanes == 1        ? 1
                              : squares.u_is_channel ? part.columns
                                                     : part.channels;
  for (int64_t row = 0; row < part.rows; ++row) {
    for (int64_t outer = 0; outer < outer_count; ++outer) {
      const int64_t channel = squares.u_is_channel ? 0 : outer;
      const int64_t column = squares.u_is_channel ? outer : 0;
      const int64_t view_index =
          view.index(part.image, part.channel + channel, part.row + row, part.column + column);
      const int64_t tile_index = channel * tile.channel + row * tile.row + column * tile.column;
      for (int64_t u = 0; u < squares.u_count; u += 8) {
        for (int64_t v = 0; v < squares.v_count; v += 8) {
          visit(u, v, view_index + u * squares.u_view + v * squares.v_view,
                tile_index + u * squares.u_tile + v);
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

// tile = a part of a view. Where lanes or columns end within 8, zeros may be written behind them,
// of a single lane before the next row is.
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
  const Squares squares = squares_of(view, part, layout);
  if (squares.u_view != 1) return load_apart(view, part, layout, tile);
  for_squares(view, part, layout, squares,
              [&](int64_t u, int64_t v, int64_t view_index, int64_t tile_index) {
                const int rows = up_to_eight(squares.v_count - v),
                          columns = up_to_eight(squares.u_count - u);
                Floats<8> square[8];
                load_square({view.dtype, view.data}, view_index, squares.v_view, rows, columns,
                            square);
                transpose8(square);
                for (int j = 0; j < columns; ++j)
                  store<8>(tile + tile_index + j * squares.u_tile, square[j]);
              });
}

// A part of a view = scale · tile + bias [channels] or null.
inline void store_tile(const float* tile, const TileLayoutOf& layout, const TilePart& part,
                       ImageView& view, float scale, const float* bias) {
  const Floats<8> scales = splat<8>(scale);
  if (part.lanes == 1 && view.stride[3] == 1) {
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
  const Squares squares = squares_of(view, part, layout);
  for_squares(
      view, part, layout, squares,
      [&](int64_t u, int64_t v, int64_t view_index, int64_t tile_index) {
        const int rows = up_to_eight(squares.v_count - v),
                  columns = up_to_eight(squares.u_count - u);
        Floats<8> square[8];
        for (int j = 0; j < 8; ++j) {
          square[j] = load<8>(tile + tile_index + (j < columns ? j : 0) * squares.u_tile) * scales;
          if (!bias) continue;
          const int64_t channel = squares.u_is_channel ? u + j : tile_index / layout.channel;
          if (j < columns) square[j] += splat<8>(bias[channel]);
        }
        transpose8(square);
        for (int i = 0; i < rows; ++i) {
          if (squares.u_view == 1 && columns == 8) {
            store_eight(view.dtype, square[i], view.element(view_index + i * squares.v_view));
            continue;
          }
          alignas(32) float values[8];
          store<8>(values, square[i]);
          for (int j = 0; j < columns; ++j) {
            write_some(view.dtype, values + j, 1,
                       view.element(view_index + i * squares.v_view + j * squares.u_view));
          }
        }
      });
}

}  // namespace
}  // namespace rpg
