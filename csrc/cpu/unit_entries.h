// The entries of a unit: what its octets of rows read of its window, for kernels of the unit law.
//
//   entry = octet of the window | order in which its 8 slots are read | signs of the 8 rows
//
// The 16 round words of a unit are made once; then all of its octets are shuffled, several vectors
// of 16-bit lanes at a time, since one alone waits for each of its products. Budget for an octet,
// where vectors hold V of them: 16 rounds * 8 / V for the shuffle, 2 for its word, 1 for its signs,
// 3 for its place.

#pragma once

#include <cstdint>
#include <cstring>

#include "law/unit.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// What an octet of rows, at one tap, reads.
struct OctetEntry {
  uint16_t octet;   // of the unit's window
  uint8_t pattern;  // which row reads which of its slots: a row of kResidues
  uint8_t signs;    // bit r: row r reads the negative
};

namespace octet {

// Of the word of an octet, the bits that say how it is read: 31 to 29, 2 to 0, 5 and 4.
constexpr uint8_t pattern_of(uint32_t word) {
  return static_cast<uint8_t>(word >> 29 << 5 | (word & 7) << 2 | (word >> 4 & 3));
}
constexpr uint32_t word_of(uint32_t pattern) {
  return pattern >> 5 << 29 | (pattern >> 2 & 7) | (pattern & 3) << 4;
}

// [pattern, row] -> residue, and [pattern, residue] -> row; as 32-bit lanes of a vector.
struct Patterns {
  alignas(64) int32_t order_of[256][8];
};

constexpr Patterns make_residues() {
  Patterns out{};
  for (uint32_t i = 0; i < 256; ++i) {
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t word = word_of(i);
      out.order_of[i][r] = static_cast<int32_t>(((r ^ (word >> 29)) - word) * (word >> 3 | 1) & 7);
    }
  }
  return out;
}

constexpr Patterns make_rows() {
  Patterns out{};
  for (uint32_t i = 0; i < 256; ++i) {
    for (uint32_t c = 0; c < 8; ++c) {
      const uint32_t word = word_of(i);
      out.order_of[i][c] = static_cast<int32_t>(((c * (word >> 3 | 1) + word) & 7) ^ (word >> 29));
    }
  }
  return out;
}

constexpr Patterns kInOrder = [] {
  Patterns out{};
  for (int i = 0; i < 256; ++i) {
    for (int r = 0; r < 8; ++r) out.order_of[i][r] = r;
  }
  return out;
}();

#if defined(__AVX512BW__)
constexpr int kLanes = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef uint16_t Lanes __attribute__((vector_size(2 * kLanes)));
typedef int16_t SignedLanes __attribute__((vector_size(2 * kLanes)));
constexpr int kVectors = 4;  // shuffled together

// x [size], x[i] = shuffle(i); room for a multiple of kVectors vectors.
inline void shuffle(const UnitBand& law, const Unit& unit, uint16_t* x) {
  uint16_t offset[kShuffleRounds], factor[kShuffleRounds], summand[kShuffleRounds];
  uint32_t word[kShuffleRounds];
  for (int j = 0; j < kShuffleRounds; ++j) {
    word[j] = hash_word(unit.number, law.round_key[2 * j], law.round_key[2 * j + 1]);
  }
  for (int j = 0; j < kShuffleRounds; ++j) {
    const uint32_t low = word[j] & 0xFFFF;
    offset[j] = static_cast<uint16_t>((word[j] >> 16) * unit.size >> 16);
    factor[j] = static_cast<uint16_t>(low | 1);
    summand[j] = static_cast<uint16_t>(low << 8 | low >> 8);
  }
  const uint16_t size = static_cast<uint16_t>(unit.size);
  Lanes first;
  for (int l = 0; l < kLanes; ++l) first[l] = static_cast<uint16_t>(l);
  for (uint32_t i = 0; i < unit.size; i += kVectors * kLanes) {
    Lanes lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      lanes[v] = first + static_cast<uint16_t>(i + static_cast<uint32_t>(v * kLanes));
    }
    for (int j = 0; law.permute && j < kShuffleRounds; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const Lanes partner = offset[j] - lanes[v], wrapped = partner + size;
        const Lanes mate = partner < wrapped ? partner : wrapped;
        const Lanes larger = lanes[v] < mate ? mate : lanes[v];
        const Lanes hashed = larger * factor[j] + summand[j];
        SignedLanes swap;
        std::memcpy(&swap, &hashed, sizeof swap);
        lanes[v] = swap < 0 ? mate : lanes[v];
      }
    }
    std::memcpy(x + i, lanes, sizeof lanes);
  }
}

}  // namespace octet

constexpr octet::Patterns kResidues = octet::make_residues(), kRows = octet::make_rows();

// Which table `pattern` is a row of, where rows look for slots and slots for rows.
inline const int32_t (*residues_of(const UnitBand& law))[8] {
  return law.permute ? kResidues.order_of : octet::kInOrder.order_of;
}
inline const int32_t (*rows_of(const UnitBand& law))[8] {
  return law.permute ? kRows.order_of : octet::kInOrder.order_of;
}

constexpr int kEntries = 64;  // made together

// Room that entries of a unit of `size` octets take: whole steps, of the shuffle and of entries.
inline int64_t entries_room(int64_t size) {
  constexpr int64_t kShuffled = octet::kVectors * octet::kLanes;
  constexpr int64_t kStep = kShuffled < kEntries ? kEntries : kShuffled;
  static_assert(kStep % kShuffled == 0 && kStep % kEntries == 0, "steps that do not fit");
  return (size + kStep - 1) / kStep * kStep;
}

// The entries of a unit; `entry` and `shuffled` [entries_room(unit.size)]. Octet i of the unit is
// number shuffled[i] of those that read the window, in order of its octets, from its first octet's
// use `used` on.
inline void unit_entries(const UnitBand& law, const Unit& unit, const UnitWindow& window,
                         OctetEntry* entry, uint16_t* shuffled) {
  octet::shuffle(law, unit, shuffled);
  // (n + 1/2) / laps is at least 1 / 128 from the next integer, and n / laps * 2^-23 is less than
  // that: the float is rounded down to the quotient.
  static_assert(kMaxUnit <= 1 << 15 && kMaxUnitLaps <= 64, "quotients that floats do not hold");
  const float by_laps = 1.f / static_cast<float>(law.by_laps.divisor);
  const uint32_t k0 = law.octet_key[0], k1 = law.octet_key[1], size = unit.size, q = unit.q;
  const uint32_t s0 = law.sign_key[0], s1 = law.sign_key[1], used = window.used;
  constexpr uint32_t kStep = kEntries;
  for (uint32_t i = 0; i < size; i += kStep) {
    uint32_t word[kStep], sign[kStep / 4 + 1] = {};
    int32_t place[kStep];
    uint16_t number[kStep];  // a copy, which nothing else may change
    std::memcpy(number, shuffled + i, sizeof number);
    for (uint32_t k = 0; k < kStep; ++k) place[k] = number[k] + static_cast<int32_t>(used);
    for (uint32_t k = 0; k < kStep; ++k) {
      place[k] = static_cast<int32_t>((static_cast<float>(place[k]) + 0.5f) * by_laps);
    }
    for (uint32_t k = 0; k < kStep; ++k) word[k] = hash_word(q + i + k, k0, k1);
    if (law.vector) {
      for (uint32_t k = 0; k <= kStep / 4; ++k) sign[k] = hash_word((q + i) / 4 + k, s0, s1);
    }
    uint8_t signs[sizeof sign];
    std::memcpy(signs, sign, sizeof sign);  // octet q has byte q mod 4 of word q / 4
    const uint8_t* first = signs + (q + i) % 4;
    for (uint32_t k = 0; k < kStep; ++k) {
      word[k] = static_cast<uint32_t>(place[k]) | uint32_t{octet::pattern_of(word[k])} << 16 |
                uint32_t{first[k]} << 24;
    }
    static_assert(sizeof(OctetEntry) == sizeof word[0] && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
                  "entries are written as words");
    std::memcpy(entry + i, word, sizeof word);
  }
}

}  // namespace
}  // namespace rpg
