// Tiles of the convolutions of the unit law, and how the workspace of the forward is divided.

#pragma once

#include <algorithm>
#include <numeric>

#include "cpu/chosen.h"
#include "cpu/unit_conv2d.h"
#include "cpu/unit_lines.h"
#include "cpu/unit_window.h"
#include "cpu/workspace.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int64_t kTogetherBytes = 256 << 10;  // of S, up to which columns are added together

// One direction of a convolution, of rows or of columns, cut into phases: the taps that read pixels
// a whole number of strides apart. Pixel i of phase p is that of x at `origin(p)` + i · step, from
// the first output of a tile on, and tap k reads it for output i - shift(k). A stride of 1 has one
// phase.
struct Phases {
  int64_t step, dilation, kernel;
  int64_t period;  // taps k and k + period are of one phase

  int64_t count() const { return std::min(kernel, period); }
  int64_t phase_of(int64_t tap) const { return tap % period; }
  int64_t shift(int64_t tap) const { return dilation * (tap - phase_of(tap)) / step; }
  // The largest shift of a phase.
  int64_t reach(int64_t phase) const {
    return shift(phase + (kernel - 1 - phase) / period * period);
  }
};

inline Phases phases_of(const UnitConv2dArgs& args, int d) {
  const int64_t step = args.image.step[d], dilation = args.image.dilation[d];
  return {step, dilation, args.kernel[d], step / std::gcd(step, dilation)};
}

// Those pixels of a phase that lie inside of an image: the first one, and how many.
struct Span {
  int64_t first, count;
  bool operator==(const Span& o) const { return first == o.first && count == o.count; }
};

// For `outputs` of them from one on whose first tap reads place `origin` of an image.
inline Span inside(const Phases& phases, int64_t phase, int64_t origin, int64_t outputs,
                   int64_t size) {
  const int64_t step = phases.step, begin = origin + phases.dilation * phase;
  const int64_t pixels = outputs + phases.reach(phase);
  const int64_t first = std::min(begin < 0 ? (-begin + step - 1) / step : 0, pixels);
  const int64_t end = begin < size ? std::min((size - begin + step - 1) / step, pixels) : 0;
  return {first, std::max<int64_t>(end - first, 0)};
}

// Pixels of a tile, of x and of y.
struct ConvTile {
  Phases high, wide;
  bool compact;            // y has no gaps between rows, as they fill vectors
  bool direct;             // rows of x fill panels, so that products are made where S wants them
  int panel;               // columns of a panel
  int64_t rows, columns;   // of a phase of x, with what lies outside: those of S
  int64_t pixels;          // of it, times lanes
  int64_t line;            // floats of a row of y, of those that are computed
  int64_t lines;           // that one row of Ŵ has
  int64_t plane, y_plane;  // of x and S, and of y

  int64_t phases() const { return high.count() * wide.count(); }
};

inline ConvTile tile_of(const UnitConv2dArgs& args) {
  const Image& g = args.image;
  ConvTile out{};
  out.high = phases_of(args, 0), out.wide = phases_of(args, 1);
  out.rows = args.rows + out.high.reach(0);
  out.columns = g.out_width + out.wide.reach(0);
  out.pixels = out.rows * out.columns * args.lanes;
  const int64_t of_row = g.out_width * args.lanes;
  out.compact = of_row % kVector == 0;
  // Two vectors are as fast as a whole panel: sums of more rows fill the registers.
  for (out.panel = kPanel; out.panel >= 2 * kVector; out.panel /= 2) {
    out.direct = true;
    for (int64_t phase = 0; phase < out.wide.count(); ++phase) {
      const Span span = inside(out.wide, phase, -g.padding[1], g.out_width, g.width);
      out.direct = out.direct && span.count * args.lanes % out.panel == 0;
    }
    if (out.direct) break;
  }
  if (!out.direct) out.panel = kPanel;
  if (out.compact) {
    out.line = of_row, out.lines = args.rows;
  } else {
    // One line over all rows, with columns between them that are not written in the end.
    out.line = (args.rows - 1) * out.columns * args.lanes + of_row, out.lines = 1;
  }
  out.plane = plane_of(out.pixels);
  out.y_plane = plane_of(out.lines * out.line);
  return out;
}

// How the workspace is divided; bytes of one thread.
struct UnitConvLayout {
  ConvTile tile;
  int64_t together;      // columns whose S are there at once
  int64_t phase_panels;  // bytes of the panels of a phase of a block
  int64_t panels, x, products, s, y, window, entries, shuffled;
  int64_t bytes() const { return panels + x + products + s + y + window + entries + shuffled; }
};

inline UnitConvLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const Chosen& chosen,
                                const UnitConv2dArgs& args) {
  UnitConvLayout out{};
  out.tile = tile_of(args);
  const int64_t slots = plan.most_window * kOctet, s = 4 * slots * out.tile.plane;
  out.together =
      std::max<int64_t>(1, std::min<int64_t>(kTogetherBytes / s, kMostUses / plan.band.taps));
  out.together = std::min(out.together, chosen.columns());
  const int64_t size = args.pairs ? 2 : 4;  // bytes of an operand's element
  out.phase_panels = lines(size * chosen.pitch() * vectors(out.tile.pixels));
  out.panels = out.phase_panels * out.tile.phases() * law.run_blocks;
  out.x = lines(4 * chosen.pitch() * out.tile.plane);
  out.products = out.tile.direct ? 0 : lines(s);
  out.s = lines(out.together * s);
  out.y = lines(4 * chosen.most_rows() * out.tile.y_plane);
  out.window = lines(size * slots * law.granularity);
  out.entries = lines(out.together * entries_room(plan.most_octets) * sizeof(OctetEntry));
  out.shuffled = lines(entries_room(plan.most_octets) * sizeof(uint16_t));
  return out;
}

}  // namespace
}  // namespace rpg
