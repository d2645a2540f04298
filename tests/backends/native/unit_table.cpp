// The window law's fast and inverse functions against slots_of and sign_words_of, which
// test_native_window.py holds against PyTorch: unit tables with any beginning and end, pieces,
// columns, addresses, scrambles. Prints what it checked; exits with 1 at the first difference.

#include "cpu/unit_table.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

using namespace rpg;

namespace {

std::mt19937_64 numbers(1);

uint64_t below(uint64_t end) { return numbers() % end; }

void require(bool holds, const char* what, const LayerLaw& law) {
  if (holds) return;
  std::printf("%s: rows %lld, blocks %lld, slots %u, window %u, laps %u, address %llu\n", what,
              static_cast<long long>(law.rows), static_cast<long long>(law.blocks), law.slots,
              law.window, law.laps, static_cast<unsigned long long>(law.address));
  std::exit(1);
}

LayerLaw draw() {
  const uint32_t window = 64u << below(below(8) ? 6 : 10), laps = 1 + below(below(8) ? 20 : 64);
  const int64_t rows = 1 + below(below(3) ? 300 : 14336), blocks = 1 + below(30);
  const uint32_t slots = below(8) ? window + below(5000) : uint32_t{1} << 31;
  const uint64_t address = below(uint64_t{1} << below(62));
  const Reflect reflect = static_cast<Reflect>(below(3));
  return make_window_law(numbers(), numbers(), rows, blocks, 64, slots, address, reflect,
                         below(7) != 0, window, laps);
}

// Some positions of a piece by the table, in a buffer of just their size.
size_t check_table(const LayerLaw& law, const WindowBand& band, const UnitPiece& piece,
                   uint32_t skip, uint32_t count) {
  const uint32_t p = piece.p + skip, z = piece.z + skip;
  const std::unique_ptr<uint16_t[]> entry(new uint16_t[count]);
  unit_table(band, p, z, count, entry.get());
  const uint32_t base = window_base(band, z);
  for (uint32_t k = 0; k < count; ++k) {
    uint32_t slot[1] = {p + k}, word[1];
    sign_words_of(band, 0, slot, word);
    slots_of(band, slot);
    const uint32_t sign = law.reflect == Reflect::kVector ? word[0] >> 31 : 0;
    require(add_mod(base, entry[k] & 0x7FFF, law.slots) == slot[0], "slot of a table", law);
    require(uint32_t{entry[k]} >> 15 == sign, "sign of a table", law);
  }
  return count;
}

void check_inverses(const LayerLaw& law, const WindowBand& band) {
  const uint32_t n = static_cast<uint32_t>(below(band.rows));
  const uint32_t b = static_cast<uint32_t>(below(band.blocks)), p = order(band, n, b);
  const ColumnPiece column = column_piece_at(band, p);
  require(p < band.positions && column.row == n && column.block == b, "column_piece_at", law);
  require(column.rows >= 1 && column.rows <= band.rows - n, "rows of a column", law);
  require(order(band, n + column.rows - 1, b) == p + column.rows - 1, "end of a column", law);
  uint32_t z[1] = {p};
  address_of(band, z);
  require(z[0] < band.positions, "address_of", law);
  const uint32_t lap[1] = {band.lap + (z[0] + band.offset) / law.window};
  const uint32_t j = (z[0] + band.offset) % law.window;
  uint32_t place[1] = {j};
  scramble(band.scramble, lap, place);
  require(place[0] < law.window, "scramble", law);
  unscramble(band.scramble, lap, place);
  require(place[0] == j, "unscramble", law);
  from_address(band, z);
  require(z[0] == p, "from_address", law);
}

}  // namespace

int main() {
  size_t entries = 0;
  for (int layer = 0; layer < 250; ++layer) {
    const LayerLaw law = draw();
    const WindowBand band = make_window_band(law, 0);
    uint32_t covered = 0;
    for (uint32_t i = 0; i < unit_pieces_of(band); ++i) {
      const UnitPiece piece = unit_piece_at(band, i);
      require(piece.p == covered, "pieces", law);
      covered += piece.count;
      const uint32_t first = piece.z + band.offset;
      require(!piece.count || first / band.cell == (first + piece.count - 1) / band.cell,
              "cell of a piece", law);
    }
    require(covered == band.positions, "pieces", law);
    for (int k = 0; k < 50; ++k) check_inverses(law, band);
    for (int k = 0; k < 4; ++k) {
      const uint32_t i =
          below(2) ? below(unit_pieces_of(band)) : below(2) * (unit_pieces_of(band) - 1);
      const UnitPiece piece = unit_piece_at(band, i);
      if (!piece.count) continue;
      const uint32_t skip = k ? below(piece.count) : 0, left = piece.count - skip;
      const uint32_t longest = left < 3000 ? left : 3000;
      entries += check_table(law, band, piece, skip, k % 2 ? 1 + below(longest) : longest);
    }
  }
  std::printf("%zu entries\n", entries);
}
