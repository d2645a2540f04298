// What kernels ask of a GPU, on the CPU: the same words as csrc/cuda/device.h, so that a kernel's
// own source can be compiled by the host compiler and run in tests. That file includes this one.
//
// A CTA's threads are fibers, run one at a time, in an order drawn from the launch's seed, each
// until it waits: at a barrier of the CTA, or for the other lanes of its warp. Shared memory is
// filled with NaNs before every CTA and checked at every index; asynchronous copies arrive when
// they are waited for, not before, in odd orders at once. So a missing barrier or wait, an index
// out of range and a read of what nobody wrote all change results, or stop the launch with an
// exception (tests/backends/cuda/simt_device.cpp has such kernels). On request, accesses to shared
// memory are written down, so that tests can count conflicts between banks.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "simt/accesses.h"

#define RPG_DEVICE simt
#define RPG_FUNCTION static inline
#define RPG_CALLED [[maybe_unused]] static
#define RPG_ARGS const
#define RPG_KERNEL(THREADS, CTAS) static void
#define RPG_UNROLL
#define RPG_LOOP

namespace rpg::simt {

struct uint4 {
  uint32_t x, y, z, w;
};

// An index, and where it is used.
struct Index {
  int i;
  Site site;
  Index(int index, Site use = {}) : i(index), site(use) {}
};

template <class V>
RPG_FUNCTION V load(const void* source, Site site = {}) {
  if (reinterpret_cast<uintptr_t>(source) % alignof(V)) {
    throw std::logic_error("a load is not aligned to its " + std::to_string(alignof(V)) + " bytes");
  }
  V value;
  note(source, sizeof value, site);
  std::memcpy(&value, source, sizeof value);
  return value;
}
template <class V>
RPG_FUNCTION void store(void* target, const V& value, Site site = {}) {
  if (reinterpret_cast<uintptr_t>(target) % alignof(V)) {
    throw std::logic_error("a store is not aligned to its " + std::to_string(alignof(V)) +
                           " bytes");
  }
  note(target, sizeof value, site);
  std::memcpy(target, &value, sizeof value);
}

// The number of the thread that runs now, and of its CTA.
int thread();
int cta_x();
int cta_y();
int cta_z();

void sync();
void sync_warp();

char* shared_memory();
int shared_bytes();

// An array in the CTA's shared memory; it begins at a multiple of 16 bytes.
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
  T& operator[](Index index) const {
    check(index.i);
    note(data_ + index.i, sizeof(T), index.site);
    return data_[index.i];
  }
  // Returns the address of `count` elements from i on, for one access.
  T* span(int i, int count) const {
    if (count > 0) check(i), check(i + count - 1);
    return data_ + i;
  }
  // Returns the array that begins with element i.
  Shared tail(int i) const {
    Shared out(*this);
    check(i);
    out.data_ += i, out.size_ -= i;
    return out;
  }

 private:
  void check(int i) const {
    if (i >= 0 && i < size_) return;
    throw std::out_of_range("shared memory: index " + std::to_string(i) + " of " +
                            std::to_string(size_));
  }

  T* data_ = nullptr;
  int size_ = 0;
};

// Begins to copy 16 bytes from global to shared memory, or zeros unless `valid`; both addresses are
// multiples of 16.
void copy_async(void* target, const void* source, bool valid, Site site = {});
// Begins to copy the 16 bytes that lie OFFSET bytes behind both addresses.
template <int OFFSET>
inline void copy_async(void* target, const void* source, Site site = {}) {
  copy_async(static_cast<char*>(target) + OFFSET, static_cast<const char*>(source) + OFFSET, true,
             site);
}
void commit_copies();
void wait_copies_but(int groups);
template <int GROUPS>
inline void wait_copies() {
  wait_copies_but(GROUPS);
}

struct MatrixArgs {
  uint32_t* out;    // [4]
  const void* row;  // 16 bytes
};
void load_matrices(const MatrixArgs& args);
void load_transposed(const MatrixArgs& args);
void multiply_bfloat16(const MultiplyArgs& args);
void multiply_float16(const MultiplyArgs& args);
RPG_FUNCTION void multiply(Bfloat16, const MultiplyArgs& args) { multiply_bfloat16(args); }
RPG_FUNCTION void multiply(Float16, const MultiplyArgs& args) { multiply_float16(args); }

// This is ldmatrix.x4: lane l gives row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the
// next of row l / 4 of each.
inline void load_matrices(uint32_t (&out)[4], const void* row, Site site = {}) {
  note(row, 16, site);
  load_matrices({out, row});
}

// Transposes the matrices: a lane gets elements 2 (l % 4) and the next of column l / 4 of each.
inline void load_transposed(uint32_t (&out)[4], const void* row, Site site = {}) {
  note(row, 16, site);
  load_transposed({out, row});
}

// Returns what lane `lane` of the warp gives; all lanes take part.
uint32_t shuffle(uint32_t value, int lane);

// Counts to `parts`: true for the last, and the count is 0 again.
bool arrive(unsigned* counter, unsigned parts);

// Returns x, which a GPU's compiler is to keep in a register instead of finding it again at each
// use.
template <class T>
inline T kept(T x) {
  return x;
}

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// There is always this one.
inline void find_device() {}

// Runs `body` once for each thread of each CTA.
void launch(Grid grid, int threads, int shared_bytes, uint64_t order,
            const std::function<void()>& body);

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, void* stream,
            const Args& args) {
  launch(grid, threads, shared_bytes, reinterpret_cast<uintptr_t>(stream), [&] { kernel(args); });
}

}  // namespace rpg::simt
