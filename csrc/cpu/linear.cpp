// linear: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias, Ŵ = G ring never in memory.
//
// Strips of rows, column of blocks by column of blocks (walk.h). A piece of a column that has more
// rows than the ring has slots is factored (factor.h): S = ring · x_b once, then a sum for each
// row; otherwise each row has its own product. Sums of a strip are kept in fp32 beside the batch,
// [rows, BATCH], and written once.
//
// Per position (a row of a block, BLOCK weights): a table entry of 4 bytes, a vector of BATCH sums
// read and written, and of the ring's bytes and products what the rows of the column share.
//
// Columns are dealt to `threads` parts in order. Strips that several parts worked on are summed in
// the order of parts, so results depend on their number, in rounding, and on nothing else.

#include "cpu/linear.h"

#include <algorithm>

#include "cpu/batch.h"
#include "cpu/conv2d.h"
#include "cpu/factor.h"
#include "cpu/instance.h"
#include "cpu/walk.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int64_t kSums = 1 << 16;  // floats of a strip, of a tile of the batch

inline int64_t strip_rows(int batch_tile, int tiles) { return kSums / (batch_tile * tiles); }

// Floats of a cache line: S and the sums begin at multiples of it.
constexpr int64_t kLineFloats = 16;
constexpr int64_t kLineBytes = 4 * kLineFloats;
// Slots that S has room for beyond those of the ring. Nothing is written there; the size of the
// workspace, which callers ask for, has always had them.
constexpr int64_t kSpareSlots = 16;

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// How the workspace is divided.
struct LinearLayout {
  int64_t height;   // rows of the highest strip
  int64_t entries;  // bytes, of one part
  int64_t s, sums;  // floats of one part: S, and the sums of one strip
  int64_t x;        // floats of all parts: the tiles of the batch
  int64_t bytes_per_part() const { return entries + 4 * (s + 2 * sums); }
};

LinearLayout linear_layout(const LayerLaw& law, const std::vector<Strip>& strips,
                           const LinearArgs& args) {
  const int batch_tile = args.batch_tile, tiles = args.tiles;
  LinearLayout out{};
  for (const Strip& strip : strips) out.height = std::max(out.height, strip.height);
  out.entries = round_up(Walk::kEntries * static_cast<int64_t>(sizeof(uint32_t)), kLineBytes);
  const int64_t slots = law.slots;
  // At batch 1, S holds all negatives behind the values (add_products).
  out.s = slots < out.height ? (slots + kSpareSlots) * (batch_tile == 1 ? 2 : batch_tile) : 0;
  out.s = round_up(out.s, kLineFloats);
  out.sums = round_up(out.height * batch_tile * tiles, kLineFloats);
  // A part gathers the blocks of an image one after the other.
  out.x = (args.image ? args.threads : law.blocks) * law.granularity * batch_tile * tiles;
  return out;
}

template <int BLOCK, int BATCH>
class Linear {
 public:
  Linear(const LayerLaw& law, const LinearArgs& args)
      : law_(law),
        args_(args),
        strips_(strips_of(law, strip_rows(BATCH, args.tiles))),
        layout_(linear_layout(law, strips_, args)),
        x_(static_cast<float*>(args.workspace)) {
    for (int part = 0; part <= args.threads; ++part) {
      split_.push_back(column_split(strips_, law.blocks, part, args.threads));
    }
  }

  void run() {
    const int64_t step = int64_t{BATCH} * args_.tiles;
    for (int64_t m0 = 0; m0 < args_.batch; m0 += step) {
      const int64_t rows = std::min(step, args_.batch - m0);
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (args_.image ? 0 : law_.blocks); ++block) {
          x_of(rows).load(args_.x_dtype, args_.x, args_.columns, m0, block);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) work(part, m0, rows);
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) {
          for (const Strip& strip : strips_) join(strip, part, m0, rows);
        }
      }
    }
  }

 private:
  using XTiles = BatchTiles<BLOCK, BATCH, by_row(BATCH)>;
  XTiles x_of(int64_t rows) const { return {x_, law_.blocks, rows}; }
  char* part_memory(int part) const {
    return reinterpret_cast<char*>(x_ + layout_.x) + part * layout_.bytes_per_part();
  }
  // Sums of the strip in whose middle a part begins, or of a later one.
  float* sums(int part, bool later) const {
    return reinterpret_cast<float*>(part_memory(part) + layout_.entries) + layout_.s +
           later * layout_.sums;
  }
  int64_t end_of(const Strip& strip) const { return strip.first + strip.height * law_.blocks; }

  void work(int part, int64_t m0, int64_t rows) const {
    uint32_t* entry = reinterpret_cast<uint32_t*>(part_memory(part));
    float* s = reinterpret_cast<float*>(part_memory(part) + layout_.entries);
    const int64_t begin = split_[part], end = split_[part + 1];
    const Image* const image = args_.image;
    const XTiles x_tiles =
        image ? XTiles{x_ + part * BLOCK * BATCH * args_.tiles, 1, rows} : x_of(rows);
    int64_t gathered = -1;  // the block of the image that x_tiles hold
    Walk walk(law_);
    for (const Strip& strip : strips_) {
      const int64_t low = std::max(begin, strip.first), high = std::min(end, end_of(strip));
      if (low >= high) continue;
      float* sums_of_strip = sums(part, begin <= strip.first);
      std::memset(sums_of_strip, 0, sizeof(float) * layout_.sums);
      const int64_t first = (low - strip.first) / strip.height;
      const int64_t last = (high - strip.first) / strip.height;
      walk.walk(strip, first, last, entry, [&](const Piece& piece) {
        const int64_t left = image ? image->run - piece.block % image->run_blocks * BLOCK
                                   : args_.columns - piece.block * BLOCK;
        const RingBlocks<BLOCK> ring(args_.bank, static_cast<int>(left < BLOCK ? left : BLOCK));
        if (image && piece.block != gathered) {
          gathered = piece.block;
          for (int tile = 0; tile < x_tiles.count(); ++tile) {
            load_patches(*image, args_.x_dtype, args_.x, m0 + tile * BATCH, x_tiles.rows_of(tile),
                         BATCH, gathered, BLOCK, x_tiles.block_of(tile, 0));
          }
        }
        for (int tile = 0; tile < x_tiles.count(); ++tile) {
          float* y = sums_of_strip + (tile * layout_.height + piece.row) * BATCH;
          add(piece, ring, x_tiles.block_of(tile, image ? 0 : piece.block), s, y);
        }
      });
      if (low == strip.first && high == end_of(strip)) {
        write(strip, &sums_of_strip, 1, 0, strip.height, m0, rows);
      }
    }
  }

  void add(const Piece& piece, const RingBlocks<BLOCK>& ring, const float* x, float* s,
           float* y) const {
    if (law_.slots >= static_cast<uint32_t>(piece.count)) {
      direct_products<BLOCK, BATCH>(piece.entry, piece.count, ring, x, y);
      return;
    }
    const int slots = static_cast<int>(law_.slots);
    slot_products<BLOCK, BATCH>(ring, slots, x, s);
    if (BATCH == 1) {
      for (int w = 0; w < slots; ++w) s[slots + w] = -s[w];
    }
    add_products<BATCH>(piece.entry, piece.count, s, slots, y);
  }

  // Rows [begin, end) of a strip, from the sums of several parts.
  void write(const Strip& strip, float* const* sum, int count, int64_t begin, int64_t end,
             int64_t m0, int64_t rows) const {
    if (args_.image) {
      return store_pixels(
          *args_.image, args_,
          {sum, count, layout_.height, BATCH, m0, rows, strip.row, begin, end, law_.rows});
    }
    const float scale = static_cast<float>(args_.scale);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t offset = m / BATCH * layout_.height * BATCH + m % BATCH;
      for (int64_t n = begin; n < end; ++n) {
        float total = 0;
        for (int i = 0; i < count; ++i) total += sum[i][offset + n * BATCH];
        total *= scale;
        if (args_.bias) total += args_.bias[strip.row + n];
        set_element(args_.x_dtype, args_.y, (m0 + m) * law_.rows + strip.row + n, total);
      }
    }
  }

  // This part's share of a strip that several parts worked on.
  void join(const Strip& strip, int part, int64_t m0, int64_t rows) const {
    std::vector<float*> partial;
    for (int peer = 0; peer < args_.threads; ++peer) {
      const int64_t begin = split_[peer], end = split_[peer + 1];
      if (begin < end && begin < end_of(strip) && strip.first < end) {
        if (begin <= strip.first && end_of(strip) <= end) return;
        partial.push_back(sums(peer, begin <= strip.first));
      }
    }
    write(strip, partial.data(), static_cast<int>(partial.size()),
          strip.height * part / args_.threads, strip.height * (part + 1) / args_.threads, m0, rows);
  }

  const LayerLaw& law_;
  const LinearArgs& args_;
  std::vector<Strip> strips_;
  LinearLayout layout_;
  std::vector<int64_t> split_;  // positions at which parts begin
  float* x_;                    // [tiles, blocks, BLOCK · BATCH]
};

}  // namespace

Workspace linear_workspace(const LayerLaw& law, const LinearArgs& args) {
  const auto strips = strips_of(law, strip_rows(args.batch_tile, args.tiles));
  const LinearLayout layout = linear_layout(law, strips, args);
  const int64_t activations = 4 * layout.x;
  return {activations + args.threads * layout.bytes_per_part(), activations};
}

void linear(const LayerLaw& law, const LinearArgs& args) { run_instance<Linear>(law, args); }

}  // namespace rpg::RPG_ISA
