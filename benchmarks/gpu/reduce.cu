// Random additions to global memory, as a bank gradient makes them: bytes of fp32 added per second.
//
// A slot is 64 fp32 numbers, 256 bytes. Three ways to add one: 64 scalar reductions; 16 reductions
// of 16 bytes (red.global.add.v4.f32); one bulk reduction of 256 bytes from shared memory. The last
// two need sm_90. Everything adds 1, so that the result is exact and can be checked.
#include "common.cuh"

constexpr int THREADS = 256, SLOT = 64, STAGES = 4;

enum Way { SCALAR, VECTOR, BULK };

__device__ inline void add_vector(float* to, float value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(to), "f"(value) : "memory");
#endif
}

__device__ inline void add_bulk(float* to, const float* from) {
#if __CUDA_ARCH__ >= 900
    const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(from));
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(source), "n"(SLOT * 4)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(STAGES - 1) : "memory");
#endif
}

template <Way way>
__global__ void reduce(float* bank,  // [slots, SLOT]
                       uint32_t slots, int rounds) {
    __shared__ alignas(128) float ones[SLOT];
    if (threadIdx.x < SLOT) ones[threadIdx.x] = 1.0f;
    if (way == BULK) {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }
    __syncthreads();
    constexpr int lanes = way == SCALAR ? 32 : way == VECTOR ? SLOT / 4 : 1;
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
    const uint32_t adder = thread / lanes, adders = gridDim.x * THREADS / lanes;
    for (int round = 0; round < rounds; ++round) {
        float* to = bank + static_cast<uint64_t>(place(round * adders + adder, slots)) * SLOT;
        if (way == SCALAR) {
            atomicAdd(to + thread % 32, ones[threadIdx.x % 32]);
            atomicAdd(to + 32 + thread % 32, ones[threadIdx.x % 32]);
        } else if (way == VECTOR) {
            add_vector(to + thread % lanes * 4, ones[threadIdx.x % 32]);
        } else {
            add_bulk(to, ones);
        }
    }
    if (way == BULK) {
#if __CUDA_ARCH__ >= 900
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
    }
}

template <Way way>
void measure(const Options& options, size_t bank_bytes, const char* name) {
    const uint32_t slots = bank_bytes / (SLOT * 4);
    const int blocks = options.smoke ? 2 : options.multiprocessors * 8;
    const size_t lanes = way == SCALAR ? 32 : way == VECTOR ? SLOT / 4 : 1;
    const size_t adders = static_cast<size_t>(blocks) * THREADS / lanes;
    const size_t wanted = options.smoke ? 0 : size_t{1} << 30;
    const int rounds = 1 + wanted / (adders * SLOT * 4);
    float* bank;
    CHECK(cudaMalloc(&bank, slots * size_t{SLOT} * 4));
    CHECK(cudaMemset(bank, 0, slots * size_t{SLOT} * 4));
    int launches = 0;
    const float ms = median_ms(options, [&] {
        reduce<way><<<blocks, THREADS>>>(bank, slots, rounds);
        ++launches;
    });

    std::vector<float> got(slots * size_t{SLOT});
    CHECK(cudaMemcpy(got.data(), bank, got.size() * 4, cudaMemcpyDeviceToHost));
    std::vector<uint32_t> uses(slots);
    for (size_t i = 0; i < adders * rounds; ++i) ++uses[place(static_cast<uint32_t>(i), slots)];
    for (size_t i = 0; i < got.size(); ++i)
        if (got[i] != static_cast<float>(uses[i / SLOT]) * launches) wrong(name);
    report(name, double(adders) * rounds * SLOT * 4 / (ms * 1e-3) / 1e12, "TB/s");
    CHECK(cudaFree(bank));
}

int main(int argc, char** argv) {
    const Options options = start(argc, argv);
    int major = 0;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    measure<SCALAR>(options, 180'000, "scalar reductions into 180 KB");
    measure<SCALAR>(options, size_t{8} << 20, "scalar reductions into 8 MB");
    measure<SCALAR>(options, size_t{80} << 20, "scalar reductions into 80 MB");
    if (major < 9) return 0;
    measure<VECTOR>(options, 180'000, "vector reductions into 180 KB");
    measure<VECTOR>(options, size_t{8} << 20, "vector reductions into 8 MB");
    measure<VECTOR>(options, size_t{80} << 20, "vector reductions into 80 MB");
    measure<BULK>(options, 180'000, "bulk reductions into 180 KB");
    measure<BULK>(options, size_t{8} << 20, "bulk reductions into 8 MB");
    measure<BULK>(options, size_t{80} << 20, "bulk reductions into 80 MB");
    return 0;
}
