// unit_conv2d: y = scale · conv2d(x, G ring) + bias for the unit law, whose taps have blocks of
// their own: any kernel, padding and dilation, and any stride with units of one tap. Neither Ŵ nor
// patches of x are ever in memory.
//
// A unit, R rows at T taps of a block of channels, reads W slots of a window, `laps` times each. So
// with x_c [block, pixels of x], for a tile of rows of the output and L images ("lanes"):
//
//   S [W, pixels]        = window [W, block] · x_c                  product.h
//   y [n, pixels of y]  += ± S [slot(n, tap), pixels + shift(tap)]  T lines for each row
//
// A tap is a shift of pixels, so a line is as long as the tile. Of strided convolutions it is one
// among the pixels of its *phase* (unit_conv2d_tile.h): with a stride of 2 those of odd or even
// rows and columns. A pixel of x is in one phase, so it is loaded once for all taps. Pixels outside
// of an image are zeros of S, not products: an infinity of the bank stays out of the border. Lanes
// are images; with one lane a line runs over columns of one image.
//
// Memory of a thread with AVX2 (P = 16; 64 with AVX-512), for 64 channels, 4 laps, units of 64 rows
// x 3 taps on 48 slots, images of 32 x 32, one lane, tiles of 32 rows; together 1.1 MB, of which a
// unit works on S and y:
//
//   x        [block, rows, columns, L]  299 KB  a block at a time, what is inside of the images
//   panels   [C / block, phases, panels, block, P] 297 KB  once for a tile; 4 KB at a time in L1
//   products [W, pixels]                        where rows of x do not fill panels: S before zeros
//                                               are put between rows
//   S        [together W, pixels]       262 KB  room for 56 slots; a line of 4.6 KB in L1
//   y        [8 octets, pixels]         266 KB  a line at a time
//   window   [W, block]                 14 KB   copied where it is no fp32, or wraps around
//   entries  [together R T / 8]         256 B   and as many numbers, shuffled
//
// With pairs (pairs.h) panels and windows are words of two channels, [.., block / 2, P] and
// [W, block / 2]: half of these numbers; so is x where channels lie side by side. S and y are fp32.
//
// Multiplications: W block pixels for each unit, 1 / laps of the dense ones. Additions: R T pixels,
// each with a load of S; y is read and written once for all taps that are added together.
//
// Slots that the bank does not have are left out of the window, and their lines of S are zeros.
//
// A thread does whole tiles of images; results do not depend on the number of threads.
//
// With a selection (chosen.h) a block has its chosen channels alone, windows are squeezed to them,
// and y has the chosen rows alone: multiplications shrink with the channels, additions with the
// rows.

#include "cpu/unit_conv2d.h"

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
        chosen_(law, plan_, args.selection, args.image.run),
        layout_(layout_of(law, plan_, chosen_, args)),
        tile_(layout_.tile),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {}

  void run() {
    const int64_t tiles_high = (image_.out_height + args_.rows - 1) / args_.rows;
    const int64_t groups = (args_.images + args_.lanes - 1) / args_.lanes;
#pragma omp parallel num_threads(args_.threads)
    {
      const UnitConvMemory memory = memory_of(thread_number());
      Inside filled[kMostUses];
      for (Inside& in : filled) in = {{-1, 0}, {-1, 0}};
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
    float *x, *products, *s, *y;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  UnitConvMemory memory_of(int part) const {
    Carver carver(args_.workspace, part * layout_.bytes());
    UnitConvMemory out{};
    carver.take(out.panels, layout_.panels);
    carver.take(out.x, layout_.x);
    carver.take(out.products, layout_.products);
    carver.take(out.s, layout_.s);
    carver.take(out.y, layout_.y);
    carver.take(out.window, layout_.window);
    carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  // The part of a phase of x that lies inside of the images, counted from the corner of the tile.
  struct Inside {
    Span rows, columns;
    bool operator==(const Inside& o) const { return rows == o.rows && columns == o.columns; }
  };

  // Of phase `number` of those of a block, for a tile from a row of y on.
  Inside inside_of(int64_t number, int64_t out_row) const {
    const int64_t top = out_row * image_.step[0] - image_.padding[0];
    const int64_t high = number / tile_.wide.count(), wide = number % tile_.wide.count();
    Inside in{inside(tile_.high, high, top, args_.rows, image_.height),
              inside(tile_.wide, wide, -image_.padding[1], image_.out_width, image_.width)};
    if (!in.columns.count) in.rows.count = 0;
    return in;
  }

  int64_t phase_of(int64_t tap) const {
    return tile_.high.phase_of(tap / image_.kernel_width) * tile_.wide.count() +
           tile_.wide.phase_of(tap % image_.kernel_width);
  }

  int64_t pixels_of(const Inside& in) const {
    return in.rows.count * in.columns.count * args_.lanes;
  }

  // `filled`: of each S, outside of which part it is zero.
  template <class Element>
  void add_tile(const UnitConvMemory& memory, int64_t image, int64_t out_row,
                Inside* filled) const {
    const int64_t images = std::min<int64_t>(args_.images - image, args_.lanes);
    for (int64_t block = 0; block < int64_t{law_.run_blocks}; ++block) {
      for (int64_t phase = 0; phase < tile_.phases(); ++phase) {
        const Inside in = inside_of(phase, out_row);
        load_panels(memory, block, in, view_of(phase, out_row, in),
                    part_of(block, image, images, in), panels_of<Element>(memory, block, phase));
      }
    }
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      if (!chosen_.rows_of(plan_, group)) continue;
      for (int64_t first = 0; first < chosen_.columns(); first += layout_.together) {
        const int64_t count = std::min(chosen_.columns() - first, layout_.together);
        for (int64_t k = 0; k < count; ++k) {
          const uint32_t column = chosen_.column(first + k);
          multiply_unit<Element>(memory, group, column, k, out_row, filled[k]);
          if (ring_.places) spread_unit(memory, group, column, k);
        }
        add_lines(memory, group, first, static_cast<int>(count));
      }
      write(memory, group, image, images, out_row);
    }
  }

  // x from the first pixel inside of a phase on, from which on rows and columns are a stride apart.
  ImageView view_of(int64_t phase, int64_t out_row, const Inside& in) const {
    ImageView x{args_.dtype, const_cast<void*>(args_.x), {}};
    for (int i = 0; i < 4; ++i) x.stride[i] = image_.stride[i];
    if (!in.rows.count) return x;
    const int64_t high = phase / tile_.wide.count(), wide = phase % tile_.wide.count();
    const int64_t x_row =
        (out_row + in.rows.first) * image_.step[0] - image_.padding[0] + high * image_.dilation[0];
    const int64_t x_column =
        in.columns.first * image_.step[1] - image_.padding[1] + wide * image_.dilation[1];
    x.data = x.element(x.index(0, 0, x_row, x_column));
    x.stride[2] *= image_.step[0], x.stride[3] *= image_.step[1];
    return x;
  }

  TilePart part_of(int64_t block, int64_t image, int64_t images, const Inside& in) const {
    return {image,
            images,
            args_.lanes,
            chosen_.first_element(block),
            chosen_.count(block),
            0,
            in.rows.count,
            0,
            in.columns.count};
  }

  // Panels of a phase of a block of channels, by way of x [block, rows, columns, L] as far as it is
  // inside: in fp32, or in words of pairs [block / 2, ...] where channels lie side by side.
  template <class Element>
  void load_panels(const UnitConvMemory& memory, int64_t block, const Inside& in,
                   const ImageView& x, const TilePart& part, Element* panels) const {
    if (!in.rows.count || !chosen_.count(block)) return;
    const int64_t lanes = args_.lanes, columns = vectors(pixels_of(in)), plane = tile_.plane;
    const TileLayoutOf layout{plane, in.columns.count * lanes, lanes};
    const int valid = chosen_.count(block);
    if (args_.pairs && channels_side_by_side(x)) {
      load_pairs(x, part, layout, reinterpret_cast<uint32_t*>(memory.x));
      fill_panels(memory.x, plane, steps_of(valid, panels), columns, tile_.panel,
                  reinterpret_cast<float*>(panels));
      return;
    }
    load_tile(x, part, layout, memory.x);
    fill_panels(memory.x, plane, valid, columns, tile_.panel, panels);
  }

  // Where panels of a phase of a block of channels begin.
  template <class Element>
  Element* panels_of(const UnitConvMemory& memory, int64_t block, int64_t phase) const {
    return reinterpret_cast<Element*>(memory.panels +
                                      (block * tile_.phases() + phase) * layout_.phase_panels);
  }

  // S of a unit of column `column`, and its entries, as number `k` of those that are added
  // together: zeros where pixels are outside of the images.
  template <class Element>
  void multiply_unit(const UnitConvMemory& memory, uint32_t group, uint32_t column, int64_t k,
                     int64_t out_row, Inside& filled) const {
    const PlannedUnit& planned = plan_.unit_of(group, column);
    unit_entries(plan_.band, planned.unit, planned.window,
                 memory.entries + k * entries_room(plan_.most_octets), memory.shuffled);
    const int64_t block = column % law_.run_blocks;
    const int64_t phase = phase_of(column / law_.run_blocks * plan_.band.taps);
    const int64_t of_window = planned.window.octets * int64_t{kOctet};
    const int slots = static_cast<int>(present_slots(ring_, planned.window.base, of_window));
    const int valid = chosen_.count(block);
    const int64_t room = plan_.most_window * kOctet * tile_.plane;
    float* s = memory.s + k * room;
    const Inside in = inside_of(phase, out_row);
    if (!(in == filled)) {
      std::memset(s, 0, sizeof(float) * room);
      filled = in;
    }
    const Element* panels = panels_of<Element>(memory, block, phase);
    const auto window = chosen_window(ring_, chosen_, block, planned.window.base, of_window, slots,
                                      static_cast<Element*>(memory.window));
    const int64_t row = tile_.columns * args_.lanes, width = in.columns.count * args_.lanes;
    s += in.rows.first * row + in.columns.first * args_.lanes;
    if (!tile_.direct) {
      const int64_t floats = vectors(pixels_of(in));
      multiply_lines(slots, floats, window, panels, tile_.panel, valid, memory.products,
                     tile_.plane);
      copy_lines(memory.products, slots, tile_.plane, in.rows.count, width, row, s);
      return;
    }
    for (int64_t i = 0; i < in.rows.count; ++i) {
      panels = multiply_lines(slots, width, window, panels, tile_.panel, valid, s + i * row,
                              tile_.plane);
    }
  }

  // Lines of S of the slots that the bank has, to where those of all slots are.
  void spread_unit(const UnitConvMemory& memory, uint32_t group, int64_t column, int64_t k) const {
    const UnitWindow& window = plan_.unit_of(group, static_cast<uint32_t>(column)).window;
    const int64_t slots = window.octets * int64_t{kOctet}, plane = tile_.plane;
    spread_lines(ring_, window.base, slots, present_slots(ring_, window.base, slots), plane, plane,
                 memory.s + k * plan_.most_window * kOctet * plane);
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
      const int64_t tap = chosen_.column(first + k) / law_.run_blocks * taps + u % taps;
      const int64_t shift = tile_.high.shift(tap / image_.kernel_width) * row +
                            tile_.wide.shift(tap % image_.kernel_width) * args_.lanes;
      base[u] = memory.s + k * plan_.most_window * kOctet * tile_.plane + shift;
      entry[u] = memory.entries + k * room + u % taps * octets;
    }
    const int64_t first_octet_of = first_octet(plan_.band, group),
                  rows = chosen_.rows_of(plan_, group);
    const int64_t begin = chosen_.first_row(first_octet_of);
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t number = chosen_.row(begin + n), o = number / kOctet - first_octet_of;
      const int r = static_cast<int>(number % kOctet);
      const float* line[kMostUses];
      float sign[kMostUses];
      for (int u = 0; u < uses; ++u) {
        const OctetEntry e = entry[u][o];
        const int64_t slot = kOctet * int64_t{e.octet} + residues[e.pattern][r];
        line[u] = base[u] + slot * tile_.plane;
        sign[u] = kSigns[e.signs >> r & 1];
      }
      add_rows(line, sign, uses, tile_.lines, tile_.line, row, tile_.line, first > 0,
               memory.y + n * tile_.y_plane);
    }
  }

  void write(const UnitConvMemory& memory, uint32_t group, int64_t image, int64_t images,
             int64_t out_row) const {
    const int64_t channel = chosen_.first_row(first_octet(plan_.band, group));
    const int64_t channels = chosen_.rows_of(plan_, group), all_rows = chosen_.rows();
    const int64_t area = image_.out_height * image_.out_width, lanes = args_.lanes;
    ImageView y{args_.dtype, args_.y, {all_rows * area, area, image_.out_width, 1}};
    if (image_.channels_last)
      y = {args_.dtype, args_.y, {all_rows * area, 1, image_.out_width * all_rows, all_rows}};
    const TilePart part{image,
                        images,
                        args_.lanes,
                        channel,
                        channels,
                        out_row,
                        std::min(image_.out_height - out_row, args_.rows),
                        0,
                        image_.out_width};
    const int64_t row = (tile_.compact ? image_.out_width : tile_.columns) * lanes;
    store_tile(memory.y, {tile_.y_plane, row, lanes}, part, y, static_cast<float>(args_.scale),
               args_.bias ? args_.bias + channel : nullptr);
  }

  const LayerLaw& law_;
  const UnitConv2dArgs& args_;
  const Image& image_;
  UnitPlan plan_;
  Chosen chosen_;
  UnitConvLayout layout_;
  ConvTile tile_;
  Ring ring_;
};

}  // namespace

Workspace unit_conv2d_workspace(const LayerLaw& law, const UnitConv2dArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.image.run);
  const UnitConvLayout layout = layout_of(law, plan, chosen, args);
  return {args.threads * layout.bytes() + plan.bytes() + chosen.bytes(),
          args.threads * (layout.panels + layout.x)};
}

void unit_conv2d(const LayerLaw& law, const UnitConv2dArgs& args) { UnitConv2d(law, args).run(); }

}  // namespace rpg::RPG_ISA
