// Places and signs of many consecutive positions at once: what kernels of the window law read.
//
//   entry = place in the window | sign << 15        of positions p ... p + count - 1 of one cell
//
// A lap's place 8 A + c comes from octet o and residue c alone; the row r that reads it, from c and
// the octet's word. So places are made class by class: lanes are c, some laps, and some octets
// where laps are few, and keep the keys of 7 rounds of 4 instructions in registers. A stays in the
// upper bits of 16, where a product drops what is above 2^bits by itself. Several vectors go
// through the rounds together, since one alone waits for each of its products. Then each octet's 8
// places are put into the order of rows: one byte shuffle with one of 256 patterns. Budget for an
// octet, where vectors hold V of them: (7 rounds * 4 + 3) / V, 4 for the shuffle, 2 for its word, 3
// / 2 for signs.

#pragma once

#include <cstdint>
#include <cstring>

#include "law/window.h"

namespace rpg {

constexpr uint32_t kMaxTableWindow = 1 << 15;  // places of 15 bits

namespace {  // compiled once per instruction set, see law/ring.h

namespace table {

#if defined(__AVX512BW__)
constexpr uint32_t kOctets = 4;
#elif defined(__AVX2__)
constexpr uint32_t kOctets = 2;
#else
constexpr uint32_t kOctets = 1;
#endif
constexpr uint32_t kClasses = 8 * kOctets;  // lanes of a vector
constexpr uint32_t kSlice = 64;             // octets of a lap whose words are kept

typedef uint16_t Classes __attribute__((vector_size(2 * kClasses)));
typedef uint8_t OctetBytes __attribute__((vector_size(16)));

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
  OctetBytes x, order;
  std::memcpy(&x, by_class, sizeof x);
  std::memcpy(&order, bytes, sizeof order);
  x = __builtin_shuffle(x, order);
  std::memcpy(by_row, &x, sizeof x);
#else
  for (int r = 0; r < 8; ++r) by_row[r] = by_class[bytes[2 * r] / 2];
#endif
}

// The places of positions `low` to `high` - 1 of LAPS laps, counted from the beginning of the
// first, `lap`. A vector holds octets o, o + 1 ... of each lap.
template <uint32_t LAPS, uint32_t ROUNDS, bool WHOLE>
void places(const Scramble& s, uint32_t lap, uint32_t low, uint32_t high, uint16_t* out) {
  constexpr uint32_t kOctetsOfLap = kOctets / LAPS;         // octets of a lap in a vector
  constexpr uint32_t kVectors = kOctetsOfLap == 4 ? 2 : 4;  // vectors; a lap has 8 octets or more
  // Scalars that meet vectors have their type.
  const uint16_t lift = static_cast<uint16_t>(16 - s.bits), to_place = lift - 3, odd_bit = 1;
  const uint16_t shift = static_cast<uint16_t>(s.shift);
  const uint16_t upper = static_cast<uint16_t>(0xFFFFu << lift);
  uint16_t lanes[6][kClasses];
  for (uint32_t i = 0; i < kClasses; ++i) {
    const uint32_t x = 8 * lap + i % (8 * LAPS);
    const uint32_t f = hash_word(x, s.key[2], s.key[3]), g = hash_word(x, s.key[4], s.key[5]);
    lanes[0][i] = static_cast<uint16_t>(f);
    lanes[1][i] = static_cast<uint16_t>(f >> 16);
    lanes[2][i] = static_cast<uint16_t>(g);
    lanes[3][i] = static_cast<uint16_t>(g >> 16);
    lanes[4][i] = i & 7;
    lanes[5][i] = static_cast<uint16_t>(i / (8 * LAPS) << lift);
  }
  Classes half[4], residue, octet, factor[ROUNDS], summand[ROUNDS];
  std::memcpy(half, lanes, sizeof half);
  std::memcpy(&residue, lanes[4], sizeof residue);
  std::memcpy(&octet, lanes[5], sizeof octet);
  for (uint32_t r = 0; r < ROUNDS; ++r) {
    const uint16_t low_shift = 4 * r % 16, high_shift = 16 - low_shift;
    if (r == 0) {
      factor[r] = half[0];
      summand[r] = half[2];
    } else if (r < 4) {
      factor[r] = half[0] >> low_shift | half[1] << high_shift;
      summand[r] = half[2] >> low_shift | half[3] << high_shift;
    } else {
      factor[r] = half[1] >> low_shift;
      summand[r] = half[3] >> low_shift;
    }
    factor[r] |= odd_bit;
    summand[r] <<= lift;
  }
  const uint32_t octets = s.window / 8, slice = min_u32(octets, kSlice);
  const bool single = !WHOLE && high <= s.window;  // lap only: slices outside are left out
  for (uint32_t first = single ? low / 8 / slice * slice : 0;
       first < octets && !(single && 8 * first >= high); first += slice) {
    uint16_t pattern[LAPS * kSlice];  // by lap, then by octet
    // Octets of all laps have consecutive numbers where slices are whole laps.
    const uint32_t consecutive = slice == octets ? LAPS * slice : slice;
    for (uint32_t i = 0; i < LAPS * slice; i += consecutive) {
      const uint32_t x = ((lap + i / slice) << s.bits) + first;
      for (uint32_t k = 0; k < consecutive; ++k) {
        pattern[i + k] = pattern_of(hash_word(x + k, s.key[0], s.key[1]));
      }
    }
    for (uint32_t o = 0; o < slice; o += kOctetsOfLap * kVectors) {
      Classes a[kVectors];
      for (uint32_t k = 0; k < kVectors; ++k) {
        const uint16_t begin = static_cast<uint16_t>((first + o + k * kOctetsOfLap) << lift);
        a[k] = octet + begin;
      }
      for (uint32_t r = 0; r < ROUNDS; ++r) {
        for (uint32_t k = 0; k < kVectors; ++k) {
          a[k] = a[k] * factor[r] + summand[r];
          a[k] ^= (a[k] >> shift) & upper;
        }
      }
      uint16_t by_class[kVectors][kOctets][8];
      for (uint32_t k = 0; k < kVectors; ++k) {
        const Classes place = a[k] >> to_place | residue;
        std::memcpy(by_class[k], &place, sizeof place);
        for (uint32_t i = 0; i < kOctets; ++i) {
          const uint32_t l = i % LAPS, number = o + k * kOctetsOfLap + i / LAPS;
          const uint32_t position = l * s.window + 8 * (first + number);
          if (WHOLE || (position >= low && position + 8 <= high)) {
            place_octet(by_class[k][i], pattern[l * slice + number], out + (position - low));
          } else if (position + 8 > low && position < high) {
            uint16_t rows[8];
            place_octet(by_class[k][i], pattern[l * slice + number], rows);
            for (uint32_t r = 0; r < 8; ++r) {
              if (position + r >= low && position + r < high) out[position + r - low] = rows[r];
            }
          }
        }
      }
    }
  }
}

template <uint32_t LAPS, uint32_t ROUNDS>
void places_of_laps(const Scramble& s, uint32_t lap, uint32_t j, uint32_t count, uint16_t* out) {
  if (j == 0 && count == LAPS * s.window) {
    places<LAPS, ROUNDS, true>(s, lap, 0, count, out);
  } else {
    places<LAPS, ROUNDS, false>(s, lap, j, j + count, out);
  }
}

// The places of positions j, j + 1 ..., counted from the beginning of a lap.
template <uint32_t ROUNDS>
void places_of(const Scramble& s, uint32_t lap, uint32_t j, uint32_t count, uint16_t* out) {
  while (count) {
    const uint32_t left = (j + count + s.window - 1) / s.window;
    const uint32_t laps = kOctets == 4 && left > 2 ? 4 : kOctets > 1 && left > 1 ? 2 : 1;
    const uint32_t take = min_u32(laps * s.window - j, count);
    if (laps == 1) {
      places_of_laps<1, ROUNDS>(s, lap, j, take, out);
    } else if (laps == 2) {
      places_of_laps<min_u32(kOctets, 2), ROUNDS>(s, lap, j, take, out);
    } else {
      places_of_laps<kOctets, ROUNDS>(s, lap, j, take, out);
    }
    lap += laps;
    j = 0;
    out += take;
    count -= take;
  }
}

// What multiplies bit k mod 16 to bit 15: a table, since there are no 16-bit shifts by lane.
struct Powers {
  alignas(64) uint16_t power[32];
};

constexpr Powers make_powers() {
  Powers out{};
  for (int k = 0; k < 32; ++k) out.power[k] = static_cast<uint16_t>(1 << (15 - k % 16));
  return out;
}

constexpr Powers kToBit15 = make_powers();

// Puts the signs of positions p, p + 1 ... into bit 15.
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
      const uint16_t low = static_cast<uint16_t>(signs), high = static_cast<uint16_t>(signs >> 16);
      const uint32_t size = min_u32(count - done, 32);
      uint16_t* const entries = out + done;
      if (size == 32) {
#pragma omp simd
        for (int k = 0; k < 16; ++k)
          entries[k] |= static_cast<uint16_t>(low * kToBit15.power[k]) & 0x8000u;
#pragma omp simd
        for (int k = 16; k < 32; ++k) {
          entries[k] |= static_cast<uint16_t>(high * kToBit15.power[k]) & 0x8000u;
        }
      } else {
        for (uint32_t k = 0; k < size; ++k) {
          entries[k] |= static_cast<uint16_t>((signs >> k & 1) << 15);
        }
      }
    }
  }
}

}  // namespace table

// Entries of positions p ... p + count - 1, whose addresses z ... are of one cell; out [count].
// Signs are in the table only where each block has one; those of elements are not.
inline void unit_table(const WindowBand& law, uint32_t p, uint32_t z, uint32_t count,
                       uint16_t* out) {
  const Scramble& s = law.scramble;
  const uint32_t lap = law.lap + ((z + law.offset) >> (s.bits + 3));
  const uint32_t j = (z + law.offset) & (s.window - 1);
  if (!law.permute) {
    for (uint32_t k = 0; k < count; ++k) out[k] = static_cast<uint16_t>((j + k) & (s.window - 1));
  } else if (s.rounds == 7) {
    table::places_of<7>(s, lap, j, count, out);
  } else {
    table::places_of<8>(s, lap, j, count, out);
  }
  if (law.vector) table::add_signs(law, p, count, out);
}

}  // namespace
}  // namespace rpg
