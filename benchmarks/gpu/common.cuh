// What the microbenchmarks share: error checks, a hash, event timing, one JSON object per line.
//
// Each program runs with no arguments to measure, or with --smoke for a few iterations (under
// compute-sanitizer). It checks what it computed, and exits with 1 when that is wrong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(call)                                                                       \
    do {                                                                                  \
        cudaError_t status_ = (call);                                                     \
        if (status_ != cudaSuccess) {                                                     \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,                       \
                         cudaGetErrorString(status_));                                    \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

// A place in [0, count) for the i-th access; two multiplications, no table.
__host__ __device__ inline uint32_t place(uint32_t i, uint32_t count) {
    uint32_t h = i * 0x9e3779b1u;
    h ^= h >> 15;
    h *= 0x85ebca77u;
    h ^= h >> 13;
    return static_cast<uint32_t>((static_cast<uint64_t>(h) * count) >> 32);
}

struct Options {
    bool smoke;
    int multiprocessors;
};

inline Options start(int argc, char** argv) {
    const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    return {smoke, properties.multiProcessorCount};
}

// Median milliseconds of a launch: two to warm up, then nine (one of each for a smoke run).
template <typename Launch>
float median_ms(const Options& options, Launch launch) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> samples;
    const int warm_up = options.smoke ? 1 : 2, runs = options.smoke ? 1 : 9;
    for (int i = 0; i < warm_up + runs; ++i) {
        CHECK(cudaEventRecord(begin));
        launch();
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= warm_up) samples.push_back(ms);
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
}

inline void report(const char* name, double value, const char* unit) {
    std::printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"}\n", name, value, unit);
    std::fflush(stdout);
}

inline void wrong(const char* name) {
    std::fprintf(stderr, "%s: wrong result\n", name);
    std::exit(1);
}
