// Tiles of the convolutions of the unit law, and how the workspace of the forward is divided.

#pragma once

#include <algorithm>

#include "cpu/unit_conv2d.h"
#include "cpu/unit_lines.h"
#include "cpu/unit_window.h"
#include "cpu/workspace.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int64_t kTogetherBytes = 256 << 10;  // of S, up to which columns are added together

// Pixels of a tile, of x and of y.
struct ConvTile {
  bool shared;            // taps are shifts of S; otherwise they are gathered
  bool compact;           // lines of S are multiplied and added row by row, as columns fill vectors
  int64_t rows, columns;  // of x, with what lies outside
  int64_t pixels;         // of x, times lanes
  int64_t line;           // floats of a row of y, of those that are computed
  int64_t lines;          // that one row of Ŵ has
  int64_t x_plane, s_plane, y_plane;
};

inline ConvTile tile_of(const UnitConv2dArgs& args) {
  const Image& g = args.image;
  ConvTile out{};
  out.shared = g.step[0] == 1 && g.step[1] == 1;
  out.rows = (args.rows - 1) * g.step[0] + g.dilation[0] * (args.kernel[0] - 1) + 1;
  out.columns = (g.out_width - 1) * g.step[1] + g.dilation[1] * (args.kernel[1] - 1) + 1;
  out.pixels = out.rows * out.columns * args.lanes;
  const int64_t of_row = g.out_width * args.lanes;
  out.compact = of_row % kVector == 0 && g.width * args.lanes % kVector == 0;
  if (!out.shared) {
    out.line = args.rows * of_row, out.lines = 1;
  } else if (out.compact) {
    out.line = of_row, out.lines = args.rows;
  } else {
    // One line over all rows, with columns between them that are not written in the end.
    out.line = (args.rows - 1) * out.columns * args.lanes + of_row, out.lines = 1;
  }
  out.x_plane = plane_of(out.pixels);
  out.s_plane = out.shared ? out.x_plane : plane_of(out.line);
  out.y_plane = plane_of(out.lines * out.line);
  return out;
}

// How the workspace is divided; bytes of one thread.
struct UnitConvLayout {
  ConvTile tile;
  int64_t together;       // columns whose S are there at once
  int64_t column_panels;  // bytes of the panels of a block, or where taps are gathered of a column
  int64_t panels, x, s, y, gathered, window, entries, shuffled;
  int64_t bytes() const { return panels + x + s + y + gathered + window + entries + shuffled; }
};

inline UnitConvLayout layout_of(const LayerLaw& law, const UnitPlan& plan,
                                const UnitConv2dArgs& args) {
  UnitConvLayout out{};
  out.tile = tile_of(args);
  const int64_t slots = plan.most_window * kOctet, s = 4 * slots * out.tile.s_plane;
  out.together =
      std::max<int64_t>(1, std::min<int64_t>(kTogetherBytes / s, kMostUses / plan.band.taps));
  out.together = std::min<int64_t>(out.together, plan.band.columns);
  const int64_t size = args.pairs ? 2 : 4;  // bytes of an operand's element
  const int64_t columns = vectors(out.tile.shared ? out.tile.pixels : out.tile.line);
  out.column_panels = lines(size * law.granularity * columns);
  out.panels = out.column_panels * (out.tile.shared ? law.run_blocks : plan.band.columns);
  out.x = lines(4 * law.granularity * out.tile.x_plane);
  out.s = lines(out.together * s);
  out.y = lines(4 * group_size(plan.band, 0) * kOctet * out.tile.y_plane);
  out.gathered = out.tile.shared ? 0 : lines(4 * law.granularity * out.tile.s_plane);
  out.window = lines(size * slots * law.granularity);
  out.entries = lines(out.together * entries_room(plan.most_octets) * sizeof(OctetEntry));
  out.shuffled = lines(entries_room(plan.most_octets) * sizeof(uint16_t));
  return out;
}

}  // namespace
}  // namespace rpg
