// Random gathers from global memory: bytes per second by size of the table and of a line.
//
// A line is read by neighbouring lanes, 16 bytes each: 8 lanes for 128 bytes (64 bf16 elements),
// 2 lanes for 32 bytes (a sector); 4 bytes are read by one lane. 8 loads per thread are independent.
// Places are computed, so nothing but the table is read; tables up to the L2's size stay in it.
#include "common.cuh"

constexpr int THREADS = 256, UNROLL = 8;

__device__ inline uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }
__device__ inline uint32_t fold(uint32_t v) { return v; }

template <typename Word, int LANES>
__global__ void gather(const Word* table,  // [lines, LANES]
                       uint32_t lines, int rounds,
                       uint32_t* out) {  // [threads]
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
    const uint32_t lane = thread % LANES, reader = thread / LANES;
    const uint32_t readers = gridDim.x * THREADS / LANES;
    uint32_t sum = 0;
    for (int round = 0; round < rounds; ++round) {
        Word values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint32_t line = place((round * UNROLL + u) * readers + reader, lines);
            values[u] = __ldg(table + static_cast<uint64_t>(line) * LANES + lane);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum ^= fold(values[u]);
    }
    out[thread] = sum;
}

// Every 32-bit word of the table is its own hash, so that each place matters.
__global__ void fill(uint32_t* words, uint32_t count) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        words[i] = place(i, 0xffffffffu);
}

template <typename Word, int LANES>
void measure(const Options& options, size_t table_bytes, const char* name) {
    constexpr int line_bytes = LANES * sizeof(Word), per_word = sizeof(Word) / 4;
    const uint32_t lines = table_bytes / line_bytes;
    const int blocks = options.smoke ? 2 : options.multiprocessors * 8;
    const size_t threads = static_cast<size_t>(blocks) * THREADS;
    const size_t wanted = options.smoke ? 0 : size_t{4} << 30;
    const int rounds = 1 + wanted / (threads * UNROLL * sizeof(Word));
    Word* table;
    uint32_t* out;
    CHECK(cudaMalloc(&table, table_bytes));
    CHECK(cudaMalloc(&out, threads * sizeof(uint32_t)));
    fill<<<256, 256>>>(reinterpret_cast<uint32_t*>(table), table_bytes / 4);
    const float ms = median_ms(
        options, [&] { gather<Word, LANES><<<blocks, THREADS>>>(table, lines, rounds, out); });

    std::vector<uint32_t> got(threads);
    CHECK(cudaMemcpy(got.data(), out, threads * sizeof(uint32_t), cudaMemcpyDeviceToHost));
    for (size_t thread = 0; thread < threads; thread += threads / 7 + 1) {
        uint32_t sum = 0;
        for (int step = 0; step < rounds * UNROLL; ++step) {
            const uint32_t line = place(
                static_cast<uint32_t>(step * (threads / LANES) + thread / LANES), lines);
            for (int w = 0; w < per_word; ++w)
                sum ^= place((line * LANES + thread % LANES) * per_word + w, 0xffffffffu);
        }
        if (sum != got[thread]) wrong(name);
    }
    report(name, double(threads) * rounds * UNROLL * sizeof(Word) / (ms * 1e-3) / 1e12, "TB/s");
    CHECK(cudaFree(table));
    CHECK(cudaFree(out));
}

int main(int argc, char** argv) {
    const Options options = start(argc, argv);
    measure<uint4, 8>(options, size_t{4} << 20, "gather 128 B from 4 MB");
    measure<uint4, 8>(options, size_t{8} << 20, "gather 128 B from 8 MB");
    measure<uint4, 8>(options, size_t{40} << 20, "gather 128 B from 40 MB");
    measure<uint4, 8>(options, size_t{80} << 20, "gather 128 B from 80 MB");
    measure<uint4, 2>(options, size_t{4} << 20, "gather 32 B from 4 MB");
    measure<uint4, 2>(options, size_t{40} << 20, "gather 32 B from 40 MB");
    measure<uint32_t, 1>(options, size_t{4} << 20, "gather 4 B from 4 MB");
    return 0;
}
