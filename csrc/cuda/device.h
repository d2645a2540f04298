// What kernels ask of the GPU, in few words: csrc/simt/device.h says the same on a CPU, so that
// tests run a kernel's own source. Nothing else in a kernel knows which of the two it is.

#pragma once

#include <cstdint>

#include "law/number.h"

namespace rpg {

constexpr int kWarp = 32;

// How many CTAs a launch has, in three directions.
struct Grid {
  int x, y, z;
};

// N numbers that are read and written at once, at an address that is a multiple of their size.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

// c [16, 8] += a [16, 16] b [16, 8], fragments of mma.m16n8k16.
struct MultiplyArgs {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// 16-bit numbers are multiplied by tensor cores, fp32 by fused multiply-add.
template <class T>
constexpr bool kTensorCores = sizeof(typename T::Bits) == 2;

}  // namespace rpg

#if defined(RPG_SIMT)
#include "simt/device.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define RPG_DEVICE cuda
#define RPG_FUNCTION static __device__ __forceinline__
// A function that is not inlined, where that would only make code larger.
#define RPG_CALLED static __device__ __noinline__
#define RPG_ARGS const __grid_constant__
#define RPG_KERNEL(THREADS, CTAS) static __global__ void __launch_bounds__(THREADS, CTAS)
#define RPG_UNROLL _Pragma("unroll")
#define RPG_LOOP _Pragma("unroll 1")

namespace rpg::cuda {

template <class V>
RPG_FUNCTION V load(const void* source) {
  return *static_cast<const V*>(source);
}
template <class V>
RPG_FUNCTION void store(void* target, const V& value) {
  *static_cast<V*>(target) = value;
}

RPG_FUNCTION int thread() { return static_cast<int>(threadIdx.x); }
RPG_FUNCTION int cta_x() { return static_cast<int>(blockIdx.x); }
RPG_FUNCTION int cta_y() { return static_cast<int>(blockIdx.y); }
RPG_FUNCTION int cta_z() { return static_cast<int>(blockIdx.z); }
RPG_FUNCTION void sync() { __syncthreads(); }
RPG_FUNCTION void sync_warp() { __syncwarp(); }

extern __shared__ uint4 dynamic_shared[];

// An array in the CTA's shared memory; it begins at a multiple of 16 bytes.
template <class T>
class Shared {
 public:
  __device__ __forceinline__ Shared() {}
  __device__ __forceinline__ Shared(int offset, int)
      : data_(reinterpret_cast<T*>(reinterpret_cast<char*>(dynamic_shared) + offset)) {}
  __device__ __forceinline__ T& operator[](int i) const { return data_[i]; }
  // Returns the address of `count` elements from i on, for one access.
  __device__ __forceinline__ T* span(int i, int) const { return data_ + i; }
  // Returns the array that begins with element i.
  __device__ __forceinline__ Shared tail(int i) const { return Shared(data_ + i); }

 private:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
  T* data_;
};

RPG_FUNCTION uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Begins to copy 16 bytes from global to shared memory, or zeros unless `valid`; both addresses are
// multiples of 16.
RPG_FUNCTION void copy_async(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
// Begins to copy the 16 bytes that lie OFFSET bytes behind both addresses.
template <int OFFSET>
RPG_FUNCTION void copy_async(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(shared_address(target)),
               "l"(source), "n"(OFFSET)
               : "memory");
}
RPG_FUNCTION void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
RPG_FUNCTION void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// These are ldmatrix.x4: lane l gives row l % 8 of matrix l / 8. It gets elements 2 (l % 4) and the
// next of row l / 4 of each matrix, or by load_transposed of column l / 4.
#define RPG_LOAD_MATRICES(NAME, KIND)                                            \
  RPG_FUNCTION void NAME(uint32_t (&out)[4], const void* row) {                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND " {%0, %1, %2, %3}, [%4];" \
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])        \
                 : "r"(shared_address(row))                                      \
                 : "memory");                                                    \
  }
RPG_LOAD_MATRICES(load_matrices, ".shared.b16")
RPG_LOAD_MATRICES(load_transposed, ".trans.shared.b16")

#define RPG_MULTIPLY(NUMBER, TYPE)                                                                \
  RPG_FUNCTION void multiply(NUMBER, const MultiplyArgs& m) {                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(m.c[0]), "+f"(m.c[1]), "+f"(m.c[2]), "+f"(m.c[3])                         \
                 : "r"(m.a[0]), "r"(m.a[1]), "r"(m.a[2]), "r"(m.a[3]), "r"(m.b[0]), "r"(m.b[1])); \
  }
RPG_MULTIPLY(Bfloat16, "bf16")
RPG_MULTIPLY(Float16, "f16")

// Returns what lane `lane` of the warp gives; all lanes take part.
RPG_FUNCTION uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// Counts to `parts`: true for the last, and the count is 0 again. What this thread's CTA wrote
// before a barrier is visible to the last.
RPG_FUNCTION bool arrive(unsigned* counter, unsigned parts) {
  __threadfence();
  const bool last = atomicInc(counter, parts - 1) == parts - 1;
  __threadfence();
  return last;
}

// Returns x, which the compiler is to keep in a register instead of finding it again at each use.
RPG_FUNCTION int kept(int x) {
  asm("" : "+r"(x));
  return x;
}
RPG_FUNCTION int64_t kept(int64_t x) {
  asm("" : "+l"(x));
  return x;
}
template <class T>
RPG_FUNCTION T* kept(T* x) {
  asm("" : "+l"(x));
  return x;
}

RPG_FUNCTION float fused(float a, float b, float c) { return fmaf(a, b, c); }

static inline void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch is not blamed
  throw std::runtime_error(std::string("CUDA could not ") + action + ": " +
                           cudaGetErrorString(status));
}

// Throws where there is no GPU.
static inline void find_device() {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "find a device");
}

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, void* stream,
            const Args& args) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "reserve shared memory for a kernel");
  }
  void* list[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z),
                         dim3(threads), list, shared_bytes, static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

}  // namespace rpg::cuda

#endif
