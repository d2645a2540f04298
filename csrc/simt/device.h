// What kernels ask of a GPU, on the CPU: the same words as csrc/cuda/device.h, so that a kernel's
// own source can be compiled by the host compiler and run in tests.
//
// A block's threads are fibers, run one at a time, in an order drawn from the launch's seed, each
// until it waits: at a barrier of the block, or for the other lanes of its warp. Shared memory is
// filled with NaNs before every block and checked at every index; asynchronous copies arrive when
// they are waited for, not before, in odd orders at once. So a missing barrier or wait, an index
// out of range and a read of what nobody wrote all change results, or stop the launch with an
// exception (tests/backends/cuda/simt_device.cpp has such kernels). On request, accesses to shared memory are
// written down, so that tests can count conflicts between banks.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "accesses.h"

#define RPG_DEVICE simt
#define RPG_FUNCTION static inline
#define RPG_CALLED [[maybe_unused]] static
#define RPG_ARGS const
#define RPG_KERNEL(THREADS, BLOCKS) static void
#define RPG_UNROLL
#define RPG_LOOP

namespace rpg::simt {

constexpr int kWarp = 32;

struct uint4 {
  uint32_t x, y, z, w;
};

struct Grid {
  int x, y, z;
};

// An index, and where it is used.
struct Index {
  int i;
  Site site;
  Index(int index, Site at = {}) : i(index), site(at) {}
};

// N numbers that are read and written at once, at an address that is a multiple of their size.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T of[N];
};
template <class V>
RPG_FUNCTION V load(const void* from, Site site = {}) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(V)) {
    throw std::logic_error("a load is not aligned to its " + std::to_string(alignof(V)) + " bytes");
  }
  V value;
  note(from, sizeof value, site);
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
RPG_FUNCTION void store(void* to, const V& value, Site site = {}) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(V)) {
    throw std::logic_error("a store is not aligned to its " + std::to_string(alignof(V)) +
                           " bytes");
  }
  note(to, sizeof value, site);
  std::memcpy(to, &value, sizeof value);
}

// The thread that runs now.
int thread();
int block_x();
int block_y();
int block_z();

void sync();
void sync_warp();

char* shared_memory();
int shared_bytes();

// Part of the block's shared memory; begins at a multiple of 16 bytes.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(int offset, int size)
      : data_(reinterpret_cast<T*>(shared_memory() + offset)), size_(size) {
    if (offset % 16 || offset + size * int64_t{sizeof(T)} > shared_bytes()) {
      throw std::out_of_range("shared memory: an array of " + std::to_string(size) +
                              " elements at byte " + std::to_string(offset) + " does not fit");
    }
  }
  T& operator[](Index at) const {
    check(at.i);
    note(data_ + at.i, sizeof(T), at.site);
    return data_[at.i];
  }
  // `count` elements from i on, as one access.
  T* at(int i, int count) const {
    if (count > 0) check(i), check(i + count - 1);
    return data_ + i;
  }
  // What begins with element i.
  Shared from(int i) const {
    Shared out(*this);
    check(i);
    out.data_ += i, out.size_ -= i;
    return out;
  }
  // What begins after so many bytes, of whole elements.
  Shared behind(int bytes) const { return from(bytes / static_cast<int>(sizeof(T))); }

 private:
  void check(int i) const {
    if (i >= 0 && i < size_) return;
    throw std::out_of_range("shared memory: index " + std::to_string(i) + " of " +
                            std::to_string(size_));
  }

  T* data_ = nullptr;
  int size_ = 0;
};

// 16 bytes from global to shared memory, zeros unless `valid`; both addresses aligned.
void copy_async(void* to, const void* from, bool valid, Site site = {});
// The same of 16 bytes AT bytes behind both addresses.
template <int AT>
inline void copy_async(void* to, const void* from, Site site = {}) {
  copy_async(static_cast<char*>(to) + AT, static_cast<const char*>(from) + AT, true, site);
}
void commit_copies();
void wait_copies_but(int groups);
template <int GROUPS>
inline void wait_copies() {
  wait_copies_but(GROUPS);
}

struct MatrixArgs {
  uint32_t* to;      // [4]
  const void* from;  // 16 bytes
};
struct MultiplyArgs {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
void load_matrices(const MatrixArgs& args);
void load_transposed(const MatrixArgs& args);
void multiply_bfloat16(const MultiplyArgs& args);
void multiply_float16(const MultiplyArgs& args);

// ldmatrix.x4: lane l gives row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the next of
// row l / 4 of each.
inline void load_matrices(uint32_t (&to)[4], const void* row, Site site = {}) {
  note(row, 16, site);
  load_matrices({to, row});
}

// The same of the matrices transposed: elements 2 (l % 4) and the next of column l / 4.
inline void load_transposed(uint32_t (&to)[4], const void* row, Site site = {}) {
  note(row, 16, site);
  load_transposed({to, row});
}

// What lane `from` of the warp gives; all lanes take part.
uint32_t shuffle(uint32_t value, int from);

// Counts to `parts`: true for the last, and the count is 0 again.
bool arrive(unsigned* counter, unsigned parts);

// x, which a GPU's compiler is to keep in a register instead of finding it again at each use.
template <class T>
inline T kept(T x) {
  return x;
}

inline uint32_t reversed(uint32_t bits) {
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) out |= (bits >> i & 1) << (31 - i);
  return out;
}
// Byte i of x in both halves.
inline uint32_t byte_twice(uint32_t x, int i) { return (x >> 8 * i & 255) * 0x10001; }

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Runs `body` once for each thread of each block.
void launch(Grid grid, int threads, int shared_bytes, uint64_t order,
            const std::function<void()>& body);

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, void* stream,
            const Args& args) {
  launch(grid, threads, shared_bytes, reinterpret_cast<uintptr_t>(stream), [&] { kernel(args); });
}

}  // namespace rpg::simt
