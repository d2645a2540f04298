// unit_conv2d: y = scale · conv2d(x, G ring) + bias for the unit law, whose taps have blocks of
// their own: any kernel, padding and dilation, and any stride with units of one tap. Ŵ is never in
// memory; of strided convolutions the patches of one tile are.
//
// A unit, R rows at T taps of a block of channels, reads W slots of a window, `laps` times each. So
// with x_c [block, pixels of x], for a tile of rows of the output and L images ("lanes"):
//
//   S [W, pixels]        = window [W, block] · x_c                  product.h
//   y [n, pixels of y]  += ± S [slot(n, tap), pixels + shift(tap)]  T lines for each row
//
// A tap is a shift of pixels, so a line is as long as the tile where the stride is 1. Pixels
// outside of an image are zeros of S, not products: an infinity of the bank stays out of the
// border. Strided convolutions gather the pixels that a tap reads first, and shift nothing. Lanes
// are images; with one lane a line runs over columns of one image.
//
// Memory of a thread with AVX2 (P = 16; 64 with AVX-512), for 64 channels, 4 laps, units of 64 rows
// x 3 taps on 48 slots, images of 32 x 32, one lane, tiles of 32 rows; together 1.1 MB, of which a
// unit works on S and y:
//
//   x        [block, rows, columns, L]  299 KB  a block at a time; padded by the kernel's reach
//   panels   [C / block, panels, block, P] 297 KB  once for a tile; 4 KB at a time in L1
//   S        [together W, pixels]       262 KB  room for 56 slots; a line of 4.6 KB in L1
//   y        [8 octets, pixels]         266 KB  a line at a time
//   window   [W, block]                 14 KB   copied where it is no fp32, or wraps around
//   entries  [together R T / 8]         256 B   and as many numbers, shuffled
//
// Strided convolutions have panels for each tap, of what is `gathered` [block, pixels of y] first.
// With pairs (pairs.h) panels and windows are words of two channels, [.., block / 2, P] and
// [W, block / 2]: half of these numbers. x, S and y are fp32.
//
// Multiplications: W block pixels for each unit, 1 / laps of the dense ones. Additions: R T pixels,
// each with a load of S; y is read and written once for all taps that are added together.
//
// A thread does whole tiles of images; results do not depend on the number of threads.

#include "cpu/unit_conv2d.h"

#include <vector>

#include "cpu/image_tile.h"
#include "cpu/kernels.h"
#include "cpu/line_panels.h"
#include "cpu/unit_conv2d_tile.h"

namespace rpg::RPG_ISA {

namespace {

class UnitConv2d {
 public:
  UnitConv2d(const LayerLaw& law, const UnitConv2dArgs& args)
      : law_(law),
        args_(args),
        image_(args.image),
        plan_(law),
        layout_(layout_of(law, plan_, args)),
        tile_(layout_.tile),
        ring_{args.bank_dtype, args.ring, int64_t{law.slots}, law.granularity} {}

  void run() {
    const int64_t tiles_high = (image_.out_height + args_.rows - 1) / args_.rows;
    const int64_t groups = (args_.images + args_.lanes - 1) / args_.lanes;
#pragma omp parallel num_threads(args_.threads)
    {
      // Without a stride S stays zero outside of the images, where products are not made.
      const int part = thread_number();
      const UnitConvMemory memory = memory_of(part);
      std::memset(memory.s, 0, layout_.s);
      std::memset(memory.x, 0, layout_.x);
      std::memset(memory.gathered, 0, layout_.gathered);
      Filled filled{};
#pragma omp for schedule(dynamic)
      for (int64_t tile = 0; tile < groups * tiles_high; ++tile) {
        const int64_t image = tile / tiles_high * args_.lanes;
        const int64_t out_row = tile % tiles_high * args_.rows;
        if (args_.pairs) {
          add_tile<uint32_t>(memory, image, out_row, filled);
        } else {
          add_tile<float>(memory, image, out_row, filled);
        }
      }
    }
  }

 private:
  struct UnitConvMemory {
    char* panels;  // of floats or of words of pairs, as what follows
    void* window;
    float *x, *s, *y, *gathered;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  UnitConvMemory memory_of(int part) const {
    Carver carver(args_.workspace, part * layout_.bytes());
    UnitConvMemory out{};
    carver.take(out.panels, layout_.panels);
    carver.take(out.x, layout_.x);
    carver.take(out.s, layout_.s);
    carver.take(out.y, layout_.y);
    carver.take(out.gathered, layout_.gathered);
    carver.take(out.window, layout_.window);
    carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  // The part of a tile of x that lies inside of the images: its first row and rows, its first
  // column and columns, counted from the corner of the tile.
  struct Inside {
    int64_t row, rows, column, columns;
    bool operator==(const Inside& o) const {
      return row == o.row && rows == o.rows && column == o.column && columns == o.columns;
    }
  };

  // Which part of x, and without a stride of S, a thread's tiles have written; the rest is zero.
  struct Filled {
    Inside in;
    int64_t images;
  };

  Inside inside_of(int64_t out_row) const {
    Inside in{};
    const int64_t top = out_row * image_.step[0] - image_.padding[0];
    in.row = std::min(std::max<int64_t>(-top, 0), tile_.rows);
    in.rows = std::max<int64_t>(std::min(image_.height - top, tile_.rows) - in.row, 0);
    in.column = std::min(image_.padding[1], tile_.columns);
    in.columns = std::min(image_.width, tile_.columns - in.column);
    return in;
  }

  template <class Element>
  void add_tile(const UnitConvMemory& memory, int64_t image, int64_t out_row,
                Filled& filled) const {
    const Inside in = inside_of(out_row);
    const int64_t images = std::min<int64_t>(args_.images - image, args_.lanes);
    if (!(in == filled.in) || images != filled.images) {
      // What an earlier tile had elsewhere.
      std::memset(memory.x, 0, layout_.x);
      std::memset(memory.s, 0, layout_.s);
      filled = {in, images};
    }
    for (int64_t block = 0; block < int64_t{law_.run_blocks}; ++block) {
      load_x(memory, block, image, images, out_row, in);
      fill_block<Element>(memory, block, in);
    }
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      for (int64_t first = 0; first < plan_.band.columns; first += layout_.together) {
        const int64_t count = std::min<int64_t>(plan_.band.columns - first, layout_.together);
        for (int64_t k = 0; k < count; ++k) {
          multiply_unit<Element>(memory, group, first + k, k, in);
        }
        add_lines(memory, group, first, static_cast<int>(count));
      }
      write(memory, group, image, images, out_row);
    }
  }

  int valid_of(int64_t block) const {
    return static_cast<int>(
        std::min<int64_t>(image_.run - block * law_.granularity, law_.granularity));
  }

  // x [block, rows, columns, L] of a block of channels.
  void load_x(const UnitConvMemory& memory, int64_t block, int64_t image, int64_t images,
              int64_t out_row, const Inside& in) const {
    ImageView x{args_.dtype, const_cast<void*>(args_.x), {}};
    for (int i = 0; i < 4; ++i) x.stride[i] = image_.stride[i];
    const int64_t lanes = args_.lanes, row = tile_.columns * lanes;
    if (!in.rows) return;
    const TilePart part{image,           images,
                        args_.lanes,     block * law_.granularity,
                        valid_of(block), out_row * image_.step[0] - image_.padding[0] + in.row,
                        in.rows,         0,
                        in.columns};
    load_tile(x, part, {tile_.x_plane, row, lanes}, memory.x + in.row * row + in.column * lanes);
  }

  // Where panels of a block of channels begin, or where taps are gathered those of a column.
  template <class Element>
  Element* panels_of(const UnitConvMemory& memory, int64_t number) const {
    return reinterpret_cast<Element*>(memory.panels + number * layout_.column_panels);
  }

  // Panels of what units multiply of a block of channels, which is loaded.
  template <class Element>
  void fill_block(const UnitConvMemory& memory, int64_t block, const Inside& in) const {
    const int valid = valid_of(block);
    if (!tile_.shared) {
      for (int64_t column = block; column < plan_.band.columns; column += law_.run_blocks) {
        gather(memory, column, valid);
        fill_panels(memory.gathered, tile_.s_plane, valid, vectors(tile_.line),
                    panels_of<Element>(memory, column));
      }
      return;
    }
    Element* panels = panels_of<Element>(memory, block);
    const int64_t row = tile_.columns * args_.lanes, width = in.columns * args_.lanes;
    const float* x = memory.x + in.row * row + in.column * args_.lanes;
    if (tile_.compact) {
      for (int64_t i = 0; i < in.rows; ++i) {
        panels = fill_panels(x + i * row, tile_.x_plane, valid, width, panels);
      }
    } else if (in.rows) {
      fill_panels(x, tile_.x_plane, valid, vectors((in.rows - 1) * row + width), panels);
    }
  }

  Factor read_window(const UnitWindow& window, int slots, int, float* buffer) const {
    return {window_rows(ring_, window.base, slots, buffer), law_.granularity, 1};
  }
  PairFactor read_window(const UnitWindow& window, int slots, int valid, uint32_t* buffer) const {
    return window_pairs(ring_, window.base, slots, valid, buffer);
  }

  // S of a unit of column `column`, and its entries, as number `k` of those that are added
  // together: zeros where pixels are outside of the images.
  template <class Element>
  void multiply_unit(const UnitConvMemory& memory, uint32_t group, int64_t column, int64_t k,
                     const Inside& in) const {
    const PlannedUnit& planned = plan_.unit_of(group, static_cast<uint32_t>(column));
    unit_entries(plan_.band, planned.unit, planned.window,
                 memory.entries + k * entries_room(plan_.most_octets), memory.shuffled);
    const int slots = static_cast<int>(planned.window.octets * kOctet);
    const int valid = valid_of(column % law_.run_blocks);
    float* s = memory.s + k * plan_.most_window * kOctet * tile_.s_plane;
    const Element* panels =
        panels_of<Element>(memory, tile_.shared ? column % law_.run_blocks : column);
    const auto window =
        read_window(planned.window, slots, valid, static_cast<Element*>(memory.window));
    if (!tile_.shared) {
      multiply_lines(slots, vectors(tile_.line), window, panels, valid, s, tile_.s_plane);
      clear_outside(s, slots, column, in);
      return;
    }
    const int64_t row = tile_.columns * args_.lanes, left = in.column * args_.lanes;
    const int64_t width = in.columns * args_.lanes;
    if (tile_.compact) {
      for (int64_t i = in.row; i < in.row + in.rows; ++i) {
        panels =
            multiply_lines(slots, width, window, panels, valid, s + i * row + left, tile_.s_plane);
      }
    } else if (in.rows) {
      const int64_t first = in.row * row + left, size = (in.rows - 1) * row + width;
      multiply_lines(slots, vectors(size), window, panels, valid, s + first, tile_.s_plane);
      for (int64_t w = 0; w < slots; ++w) {
        float* line = s + w * tile_.s_plane + first;
        for (int64_t i = 1; i < in.rows; ++i) {
          std::memset(line + i * row - (row - width), 0, sizeof(float) * (row - width));
        }
        std::memset(line + size, 0, sizeof(float) * (vectors(size) - size));
      }
    }
  }

  // gathered [block, pixels of y]: what the elements of a loaded block read at a tap.
  void gather(const UnitConvMemory& memory, int64_t column, int valid) const {
    const int64_t lanes = args_.lanes, row = tile_.columns * lanes;
    const int64_t tap = column / law_.run_blocks;
    const int64_t offset = image_.tap_row(tap) * row + image_.tap_column(tap) * lanes;
    for (int e = 0; e < valid; ++e) {
      const float* plane = memory.x + e * tile_.x_plane + offset;
      float* out = memory.gathered + e * tile_.s_plane;
      for (int64_t i = 0; i < args_.rows; ++i) {
        const float* source = plane + i * image_.step[0] * row;
        if (image_.step[1] == 1) {
          std::memcpy(out, source, sizeof(float) * image_.out_width * lanes);
          out += image_.out_width * lanes;
          continue;
        }
        for (int64_t j = 0; j < image_.out_width; ++j, out += lanes) {
          std::memcpy(out, source + j * image_.step[1] * lanes, sizeof(float) * lanes);
        }
      }
    }
  }

  // Zeros of S where a tap reads padding: it is no product.
  void clear_outside(float* s, int slots, int64_t column, const Inside& in) const {
    const int64_t tap = column / law_.run_blocks, lanes = args_.lanes;
    const int64_t row_shift = image_.tap_row(tap);
    const int64_t right = image_.tap_column(tap);
    struct Span {
      int64_t first, size;
    };
    std::vector<Span> outside;
    for (int64_t i = 0; i < args_.rows; ++i) {
      const int64_t row = i * image_.step[0] + row_shift, first = i * image_.out_width;
      if (row < in.row || row >= in.row + in.rows) {
        outside.push_back({first * lanes, image_.out_width * lanes});
        continue;
      }
      for (int64_t j = 0; j < image_.out_width; ++j) {
        const int64_t place = j * image_.step[1] + right;
        if (place < in.column || place >= in.column + in.columns) {
          outside.push_back({(first + j) * lanes, lanes});
        }
      }
    }
    for (int w = 0; w < slots; ++w) {
      for (const Span& span : outside) {
        std::memset(s + w * tile_.s_plane + span.first, 0, sizeof(float) * span.size);
      }
    }
  }

  // y of a group (+)= what the units of `count` columns add.
  void add_lines(const UnitConvMemory& memory, uint32_t group, int64_t first, int count) const {
    const int64_t octets = group_size(plan_.band, group), room = entries_room(plan_.most_octets);
    const int64_t row = tile_.columns * args_.lanes;
    const int taps = static_cast<int>(plan_.band.taps), uses = count * taps;
    const int32_t (*residues)[8] = residues_of(plan_.band);
    const float* base[kMostUses];  // slots of a unit's S, shifted by a tap
    const OctetEntry* entry[kMostUses];
    for (int u = 0; u < uses; ++u) {
      const int64_t k = u / taps;
      const int64_t tap = (first + k) / law_.run_blocks * taps + u % taps;
      const int64_t shift =
          tile_.shared ? image_.tap_row(tap) * row + image_.tap_column(tap) * args_.lanes : 0;
      base[u] = memory.s + k * plan_.most_window * kOctet * tile_.s_plane + shift;
      entry[u] = memory.entries + k * room + u % taps * octets;
    }
    for (int64_t o = 0; o < octets; ++o) {
      for (int r = 0; r < 8; ++r) {
        const float* line[kMostUses];
        float sign[kMostUses];
        for (int u = 0; u < uses; ++u) {
          const OctetEntry e = entry[u][o];
          const int64_t slot = kOctet * int64_t{e.octet} + residues[e.pattern][r];
          line[u] = base[u] + slot * tile_.s_plane;
          sign[u] = kSigns[e.signs >> r & 1];
        }
        float* y = memory.y + (o * kOctet + r) * tile_.y_plane;
        for (int64_t i = 0; i < tile_.lines; ++i, y += tile_.line) {
          add_to_line(line, i * row, sign, uses, tile_.line, first > 0, y);
        }
      }
    }
  }

  void write(const UnitConvMemory& memory, uint32_t group, int64_t image, int64_t images,
             int64_t out_row) const {
    const int64_t channel = int64_t{first_octet(plan_.band, group)} * kOctet;
    const int64_t channels =
        std::min<int64_t>(law_.rows - channel, group_size(plan_.band, group) * kOctet);
    const int64_t area = image_.out_height * image_.out_width, lanes = args_.lanes;
    ImageView y{args_.dtype, args_.y, {law_.rows * area, area, image_.out_width, 1}};
    if (image_.channels_last)
      y = {args_.dtype, args_.y, {law_.rows * area, 1, image_.out_width * law_.rows, law_.rows}};
    const TilePart part{image,
                        images,
                        args_.lanes,
                        channel,
                        channels,
                        out_row,
                        std::min(image_.out_height - out_row, args_.rows),
                        0,
                        image_.out_width};
    const bool wide = tile_.shared && !tile_.compact;
    const int64_t row = (wide ? tile_.columns : image_.out_width) * lanes;
    store_tile(memory.y, {tile_.y_plane, row, lanes}, part, y, static_cast<float>(args_.scale),
               args_.bias ? args_.bias + channel : nullptr);
  }

  const LayerLaw& law_;
  const UnitConv2dArgs& args_;
  const Image& image_;
  UnitPlan plan_;
  UnitConvLayout layout_;
  ConvTile tile_;
  Ring ring_;
};

}  // namespace

Workspace unit_conv2d_workspace(const LayerLaw& law, const UnitConv2dArgs& args) {
  const UnitPlan plan(law);
  const UnitConvLayout layout = layout_of(law, plan, args);
  return {args.threads * layout.bytes() + plan.bytes(),
          args.threads * (layout.panels + layout.x + layout.gathered)};
}

void unit_conv2d(const LayerLaw& law, const UnitConv2dArgs& args) { UnitConv2d(law, args).run(); }

}  // namespace rpg::RPG_ISA
