// Slots and signs of whole runs of positions at once: what kernels of the window law read.
//
//   entry = place in the window | sign << 15        of positions p ... p + count - 1 of one cell
//
// A lap's place 8 A + c comes from octet o and residue c alone; the row r that reads it, from c and
// the octet's word. So places are made class by class: a lane is (lap, c), and an iteration makes
// octet o of kLaps laps, with the keys of 7 rounds of 4 instructions in registers. A stays in the
// upper bits of 16, where a product drops what is above 2^bits by itself. Then each octet's 8
// places are put into the order of rows: one byte shuffle with one of 256 patterns. Budget for 8
// positions of a lap: (7 rounds * 4 + 3) / kLaps, 4 for the shuffle, 2 for the octet's word, 1 for
// signs.

#pragma once

#include <cstdint>
#include <cstring>

#include "../window_law.h"

namespace rpg {

constexpr uint32_t kMaxTableWindow = 1 << 15;  // places of 15 bits

namespace {  // compiled once per instruction set, see law.h

#if defined(__AVX512BW__)
constexpr int kLaps = 4;
#elif defined(__AVX2__)
constexpr int kLaps = 2;
#else
constexpr int kLaps = 1;
#endif
constexpr int kClasses = 8 * kLaps;  // lanes
constexpr uint32_t kChunk = 64;      // octets of a lap whose words are kept

typedef uint16_t Classes __attribute__((vector_size(2 * kClasses)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

// For each pattern that an octet's word chooses, the bytes of 8 places in the order of rows.
struct RowPatterns {
  alignas(16) uint8_t byte[256][16];
};

constexpr RowPatterns make_row_patterns() {
  RowPatterns out{};
  for (uint32_t i = 0; i < 256; ++i) {
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t c = ((r ^ i >> 5) - (i >> 2)) * (2 * i | 1) & 7;
      out.byte[i][2 * r] = static_cast<uint8_t>(2 * c);
      out.byte[i][2 * r + 1] = static_cast<uint8_t>(2 * c + 1);
    }
  }
  return out;
}

constexpr RowPatterns kRowPatterns = make_row_patterns();

// 16 times the number of the pattern: bits 31 to 29, 2 to 0, 5 and 4 of the word.
inline uint16_t pattern_of(uint32_t h) {
  return static_cast<uint16_t>((h >> 29) << 9 | (h & 7) << 6 | (h & 48));
}

inline void place_octet(const uint16_t* by_class, uint32_t pattern, uint16_t* by_row) {
  const uint8_t* bytes = kRowPatterns.byte[0] + pattern;
#if !defined(__clang__) && (defined(__SSSE3__) || defined(__ARM_NEON))
  Bytes x, order;
  std::memcpy(&x, by_class, sizeof x);
  std::memcpy(&order, bytes, sizeof order);
  x = __builtin_shuffle(x, order);
  std::memcpy(by_row, &x, sizeof x);
#else
  for (int r = 0; r < 8; ++r) by_row[r] = by_class[bytes[2 * r] / 2];
#endif
}

// Of kLaps laps from `lap`: positions `low` to `high` - 1, counted from the first one's beginning.
template <int ROUNDS, bool WHOLE>
void places(const Scramble& s, uint32_t lap, uint32_t low, uint32_t high, uint16_t* out) {
  const int up = 16 - static_cast<int>(s.bits), shift = static_cast<int>(s.shift);
  const uint16_t upper = static_cast<uint16_t>(0xFFFFu << up);
  uint16_t keys[4][kClasses], residues[kClasses];
  for (int i = 0; i < kClasses; ++i) {
    const uint32_t x = 8 * lap + static_cast<uint32_t>(i);
    const uint32_t f = hash_word(x, s.key[2], s.key[3]), g = hash_word(x, s.key[4], s.key[5]);
    keys[0][i] = static_cast<uint16_t>(f);
    keys[1][i] = static_cast<uint16_t>(f >> 16);
    keys[2][i] = static_cast<uint16_t>(g);
    keys[3][i] = static_cast<uint16_t>(g >> 16);
    residues[i] = i & 7;
  }
  Classes half[4], residue;
  std::memcpy(half, keys, sizeof half);
  std::memcpy(&residue, residues, sizeof residue);
  Classes factor[ROUNDS], summand[ROUNDS];
  for (int r = 0; r < ROUNDS; ++r) {
    if (r == 0) {
      factor[r] = half[0] | 1;
      summand[r] = half[2] << up;
    } else if (r < 4) {
      factor[r] = half[0] >> 4 * r | half[1] << (16 - 4 * r) | 1;
      summand[r] = (half[2] >> 4 * r | half[3] << (16 - 4 * r)) << up;
    } else {
      factor[r] = half[1] >> (4 * r - 16) | 1;
      summand[r] = (half[3] >> (4 * r - 16)) << up;
    }
  }
  const uint32_t octets = s.window / 8, chunk = min_u32(octets, kChunk);
  for (uint32_t first = 0; first < octets; first += chunk) {
    uint16_t pattern[kLaps][kChunk];
    for (uint32_t l = 0; l < kLaps; ++l) {
      for (uint32_t o = 0; o < chunk; ++o) {
        const uint32_t x = ((lap + l) << s.bits) + first + o;
        pattern[l][o] = pattern_of(hash_word(x, s.key[0], s.key[1]));
      }
    }
    for (uint32_t o = 0; o < chunk; ++o) {
      Classes a = Classes{} + static_cast<uint16_t>((first + o) << up);
      for (int r = 0; r < ROUNDS; ++r) {
        a = a * factor[r] + summand[r];
        a ^= (a >> shift) & upper;
      }
      a = a >> (up - 3) | residue;
      uint16_t by_class[kClasses];
      std::memcpy(by_class, &a, sizeof a);
      for (uint32_t l = 0; l < kLaps; ++l) {
        const uint32_t at = l * s.window + 8 * (first + o);
        if (WHOLE || (at >= low && at + 8 <= high)) {
          place_octet(by_class + 8 * l, pattern[l][o], out + (at - low));
        } else if (at + 8 > low && at < high) {
          uint16_t rows[8];
          place_octet(by_class + 8 * l, pattern[l][o], rows);
          for (uint32_t r = 0; r < 8; ++r) {
            if (at + r >= low && at + r < high) out[at + r - low] = rows[r];
          }
        }
      }
    }
  }
}

template <int ROUNDS>
void places_of(const Scramble& s, uint32_t lap, uint32_t j, uint32_t count, uint16_t* out) {
  const uint32_t group = kLaps * s.window;
  while (count) {
    const uint32_t take = min_u32(group - j, count);
    if (take == group) {
      places<ROUNDS, true>(s, lap, 0, group, out);
    } else {
      places<ROUNDS, false>(s, lap, j, j + take, out);
    }
    lap += kLaps;
    j = 0;
    out += take;
    count -= take;
  }
}

// Signs of positions p, p + 1 ... into bit 15. A product moves a bit there.
inline void add_signs(const WindowBand& law, uint32_t p, uint32_t count, uint16_t* out) {
  constexpr uint32_t kWords = 16;
  for (uint32_t done = 0; done < count;) {
    uint32_t word[kWords + 1];
    for (uint32_t i = 0; i <= kWords; ++i) {
      word[i] = hash_word((p + done) / 32 + i, law.sign_key[0], law.sign_key[1]);
    }
    for (uint32_t i = 0; i < kWords && done < count; ++i, done += 32) {
      const uint64_t two = uint64_t{word[i + 1]} << 32 | word[i];
      const uint32_t signs = static_cast<uint32_t>(two >> (p & 31));
      const uint32_t size = min_u32(count - done, 32);
      uint16_t* const to = out + done;
      if (size == 32) {
        for (int k = 0; k < 32; ++k) {
          const uint32_t half = k < 16 ? signs : signs >> 16;
          to[k] |= static_cast<uint16_t>(half << (15 - k % 16)) & 0x8000u;
        }
      } else {
        for (uint32_t k = 0; k < size; ++k) {
          to[k] |= static_cast<uint16_t>((signs >> k & 1) << 15);
        }
      }
    }
  }
}

// Entries of positions p ... p + count - 1, whose addresses z ... are of one cell; out [count].
// Signs only with one for a block; elements' signs are not in the table.
inline void unit_table(const WindowBand& law, uint32_t p, uint32_t z, uint32_t count,
                       uint16_t* out) {
  const Scramble& s = law.scramble;
  const uint32_t lap = law.lap + ((z + law.offset) >> (s.bits + 3));
  const uint32_t j = (z + law.offset) & (s.window - 1);
  if (!law.permute) {
    for (uint32_t k = 0; k < count; ++k) out[k] = static_cast<uint16_t>((j + k) & (s.window - 1));
  } else if (s.rounds == 7) {
    places_of<7>(s, lap, j, count, out);
  } else {
    places_of<8>(s, lap, j, count, out);
  }
  if (law.vector) add_signs(law, p, count, out);
}

}  // namespace
}  // namespace rpg
