// bandwidth: words [threads, count], each row read, or read and written, `passes` times by a
// thread of its own. Nothing is computed but an exclusive or, so that only memory takes time.

#include "cpu/kernels.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLanes = 32;  // uint64, four cache lines: enough loads in flight

uint64_t read(const uint64_t* words, int64_t count) {
  uint64_t sum[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sum[j] ^= words[i + j];
  }
  uint64_t parity = 0;
  for (uint64_t part : sum) parity ^= part;
  return parity;
}

uint64_t update(uint64_t* words, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) words[i + j] ^= 1;
  }
  return words[0];
}

}  // namespace

uint64_t bandwidth(uint64_t* words, int64_t count, bool write, int64_t passes, int threads) {
  count = count / kLanes * kLanes;
  uint64_t parity = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : parity)
  for (int part = 0; part < threads; ++part) {
    uint64_t* row = words + part * count;
    for (int64_t pass = 0; pass < passes; ++pass) {
      parity ^= write ? update(row, count) : read(row, count);
      asm volatile("" : : "r"(row) : "memory");  // the next pass reads memory again
    }
  }
  return parity;
}

}  // namespace rpg::RPG_ISA
