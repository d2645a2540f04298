// Gathers of 128-byte slots from shared memory: bytes per clock and multiprocessor (128 at most).
//
// lines: 8 lanes read one slot, 16 bytes each, which fills all banks whatever the slots are.
// columns: 8 lanes read the same chunk of 8 slots, as a transposed operand does. Plain, they all
// hit the same banks. Swizzled (chunk ^= slot % 8) they depend on the slots: random ones collide by
// chance, stratified ones (slot % 8 differs in the 8 lanes) never do.
#include "common.cuh"

constexpr int THREADS = 512, UNROLL = 8, CHUNKS = 8;

enum Way { LINES, PLAIN, SWIZZLED, STRATIFIED };

// The 16-byte chunk that a thread reads in a step.
template <Way way>
__host__ __device__ inline uint32_t chunk_of(uint32_t step, uint32_t thread, uint32_t slots) {
    const uint32_t group = thread / 8, lane = thread % 8, groups = THREADS / 8;
    if (way == LINES) return place(step * groups + group, slots) * CHUNKS + lane;
    uint32_t slot = place(step * THREADS + thread, slots);
    if (way == STRATIFIED) slot = slot / 8 * 8 + (lane + step) % 8;
    const uint32_t chunk = (step + group) % CHUNKS;
    return slot * CHUNKS + (way == PLAIN ? chunk : chunk ^ slot % 8);
}

template <Way way>
__global__ void __launch_bounds__(THREADS)
    gather(uint32_t slots, int rounds,
           uint32_t* out,        // [blocks, THREADS]
           long long* clocks) {  // [blocks]
    extern __shared__ uint4 window[];  // [slots, CHUNKS]
    for (uint32_t i = threadIdx.x; i < slots * CHUNKS; i += THREADS)
        window[i] = make_uint4(place(i, 0xffffffffu), 0, 0, 0);
    // The places do not depend on the data; a few per thread are kept, so that loads are what counts.
    uint32_t at[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) at[u] = chunk_of<way>(u, threadIdx.x, slots);
    __syncthreads();
    const long long begin = clock64();
    uint32_t sum = 0;
    for (int round = 0; round < rounds; ++round) {
        uint4 values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            // Read anew in every round, though nothing changes.
            const uint32_t address =
                static_cast<uint32_t>(__cvta_generic_to_shared(window + at[u]));
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(values[u].x), "=r"(values[u].y), "=r"(values[u].z),
                           "=r"(values[u].w)
                         : "r"(address)
                         : "memory");
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum += values[u].x ^ values[u].y ^ values[u].z ^ values[u].w;
    }
    __syncthreads();
    if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

template <Way way>
void measure(const Options& options, int bytes, const char* name) {
    const uint32_t slots = bytes / 128;
    const int blocks = options.smoke ? 1 : options.multiprocessors;
    const int rounds = options.smoke ? 2 : 2000;
    CHECK(cudaFuncSetAttribute(gather<way>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    uint32_t* out;
    long long* clocks;
    CHECK(cudaMalloc(&out, sizeof(uint32_t) * THREADS * blocks));
    CHECK(cudaMalloc(&clocks, sizeof(long long) * blocks));
    median_ms(options, [&] { gather<way><<<blocks, THREADS, bytes>>>(slots, rounds, out, clocks); });

    std::vector<uint32_t> got(static_cast<size_t>(THREADS) * blocks);
    std::vector<long long> taken(blocks);
    CHECK(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(taken.data(), clocks, taken.size() * 8, cudaMemcpyDeviceToHost));
    for (uint32_t thread = 0; thread < THREADS; ++thread) {
        uint32_t once = 0;
        for (uint32_t step = 0; step < UNROLL; ++step)
            once += place(chunk_of<way>(step, thread, slots), 0xffffffffu);
        if (got[thread] != once * rounds) wrong(name);
    }
    std::sort(taken.begin(), taken.end());
    report(name, double(THREADS) * UNROLL * 16 * rounds / taken[taken.size() / 2], "B/clk/SM");
    CHECK(cudaFree(out));
    CHECK(cudaFree(clocks));
}

int main(int argc, char** argv) {
    const Options options = start(argc, argv);
    int most = 0;
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    const int small = 16 << 10, large = std::min(most, 200 << 10) / 1024 * 1024;
    measure<LINES>(options, small, "shared lines, 16 KB");
    measure<LINES>(options, large, "shared lines, whole window");
    measure<PLAIN>(options, small, "shared columns, plain");
    measure<SWIZZLED>(options, small, "shared columns, swizzled, random");
    measure<STRATIFIED>(options, small, "shared columns, swizzled, stratified");
    return 0;
}
