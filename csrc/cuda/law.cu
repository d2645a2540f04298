// slot(n, b) and sign words of a list of positions: how a device shows that it evaluates the law as
// everybody else does.
//
// One position per thread, CTAs of 256 threads, no shared memory. Per position: 16 bytes read,
// 8 + 8 words written; 8 instructions per Feistel round and about 30 more, with windows three words
// and 7 or 8 rounds of 5 besides. The band's law travels as a kernel argument, 468 bytes of
// constant memory, with windows 580.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/law.h"

namespace rpg::cuda {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ uint32_t position(const BandLaw&, int64_t n, int64_t b, int64_t blocks) {
  return static_cast<uint32_t>(n * blocks + b);
}

__device__ __forceinline__ uint32_t position(const WindowBand& law, int64_t n, int64_t b, int64_t) {
  return order(law, static_cast<uint32_t>(n), static_cast<uint32_t>(b));
}

template <class Band>
__global__ void law_kernel(const Band law,       // of the band that all positions lie in
                           int64_t first_row,    // of the band
                           int64_t blocks,       // per row
                           const int64_t* n,     // [count]
                           const int64_t* b,     // [count]
                           int64_t count,        //
                           int64_t* slots,       // [count]
                           int64_t* words,       // [count, words_per_block]
                           int words_per_block)  //
{
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  uint32_t q[1] = {position(law, n[i] - first_row, b[i], blocks)};
  for (int w = 0; w < words_per_block; ++w) {
    uint32_t word[1];
    sign_words_of(law, w, q, word);
    words[i * words_per_block + w] = word[0];
  }
  slots_of(law, q);
  slots[i] = q[0];
}

void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA could not ") + action + ": " +
                           cudaGetErrorString(status));
}

}  // namespace

void law(const LayerLaw& law, int64_t band, const int64_t* n, const int64_t* b, int64_t count,
         int64_t* slots, int64_t* words, void* stream) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "find a device");
  if (count < 1) return;
  const int64_t grid = (count + kThreads - 1) / kThreads;
  if (grid > INT32_MAX) throw std::runtime_error("count: wanted at most 2^31 CTAs of 256");
  const int64_t first_row = band * law.rows_per_band;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (law.window) {
    law_kernel<<<static_cast<unsigned>(grid), kThreads, 0, cuda_stream>>>(
        make_window_band(law, band), first_row, law.blocks, n, b, count, slots, words,
        words_of(law));
  } else {
    law_kernel<<<static_cast<unsigned>(grid), kThreads, 0, cuda_stream>>>(
        make_band_law(law, band), first_row, law.blocks, n, b, count, slots, words, words_of(law));
  }
  check(cudaGetLastError(), "launch the law's kernel");
}

}  // namespace rpg::cuda
