// Kernels with one fault each, and without it, on the SIMT shim (csrc/simt): what it makes of them.
// Argument: the name of a kernel. Prints a line for each of several orders of the threads, with
// what the kernel wrote, or ends with the error that the shim raised.

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.h"

using namespace rpg;
using namespace rpg::simt;

namespace {

constexpr int kThreads = 64, kCtas = 3;

struct Args {
  const float* input;  // [kThreads * 4], input[i] = i
  float* out;          // [kBlocks, kThreads]
  unsigned* counter;   // [1]
};

float& out(const Args& args) { return args.out[cta_x() * kThreads + thread()]; }

// A neighbour's value, of another warp, through shared memory.
template <bool BARRIER>
void exchange(Args args) {
  const Shared<float> s(0, kThreads);
  s[thread()] = static_cast<float>(thread());
  if (BARRIER) sync();
  out(args) = s[(thread() + 40) % kThreads];
}

// The same inside a warp.
template <bool BARRIER>
void exchange_in_warp(Args args) {
  const Shared<float> s(0, kThreads);
  s[thread()] = static_cast<float>(thread());
  if (BARRIER) sync_warp();
  out(args) = s[thread() ^ 7];
}

// A second value is written before all have read the first.
template <bool BARRIER>
void reuse(Args args) {
  const Shared<float> s(0, kThreads);
  s[thread()] = 1;
  sync();
  const float first = s[kThreads - 1 - thread()];
  if (BARRIER) sync();
  s[thread()] = 2;
  out(args) = first;
}

template <bool COMMIT, bool WAIT>
void copy(Args args) {
  const Shared<float> s(0, kThreads * 4);
  copy_async(s.span(4 * thread(), 4), args.input + 4 * thread(), true);
  if (COMMIT) commit_copies();
  if (WAIT) wait_copies<0>();
  sync();
  out(args) = s[4 * (kThreads - 1 - thread()) + 3];
}

// A copy to where others still read.
template <bool BARRIER>
void refill(Args args) {
  const Shared<float> s(0, kThreads * 4);
  s[4 * thread()] = -1;
  sync();
  const float first = s[4 * (kThreads - 1 - thread())];
  if (BARRIER) sync();
  copy_async(s.span(4 * thread(), 4), args.input + 4 * thread(), true);
  commit_copies();
  wait_copies<0>();
  out(args) = first;
}

// The second of two groups is waited for too late.
template <int GROUPS>
void two_copies(Args args) {
  const Shared<float> s(0, 8 * kThreads);
  for (int i = 0; i < 2; ++i) {
    const int index = 4 * (i * kThreads + thread());
    copy_async(s.span(index, 4), args.input + 4 * thread(), i == 0);
    commit_copies();
  }
  wait_copies<GROUPS>();
  out(args) = s[4 * thread()] + s[4 * (kThreads + thread())];
}

void misaligned_copy(Args args) {
  const Shared<float> s(0, kThreads * 4);
  copy_async(s.span(4 * thread(), 4), args.input + 4 * thread() + 1, true);
}

void beyond_the_end(Args args) {
  const Shared<float> s(0, kThreads);
  out(args) = s[thread() + 1];
}

void before_the_beginning(Args args) {
  const Shared<float> s(16, kThreads);
  out(args) = s[thread() - 1];
}

void wide_beyond_the_end(Args args) {
  const Shared<float> s(0, kThreads);
  std::memcpy(&out(args), s.span(kThreads - 3, 4), 4);
}

void too_large(Args args) { out(args) = Shared<float>(4096 - 64, 17)[0]; }

void uninitialised(Args args) {
  const Shared<float> s(0, kThreads + 1);
  s[thread()] = 1;
  sync();
  out(args) = s[thread() + 1];  // nobody wrote the last
}

// Half of a warp waits for the CTA, the other half for the warp.
void divergent(Args args) {
  if (thread() % 32 < 16) {
    sync();
  } else {
    sync_warp();
  }
  out(args) = 0;
}

void different_operations(Args args) {
  uint32_t fragment[4];
  const Shared<uint4> s(0, kThreads);
  if (thread() % 2) {
    sync_warp();
  } else {
    load_matrices(fragment, s.span(thread(), 1));
  }
  out(args) = 0;
}

void exchange_by_shuffle(Args args) {
  out(args) = static_cast<float>(shuffle(static_cast<uint32_t>(thread()), thread() % 32 ^ 7));
}

// Threads that have returned are waited for by nobody.
void early_return(Args args) {
  out(args) = 1;
  if (thread() >= 32) return;
  sync();
  out(args) = 2;
}

// The CTA that runs last is the one that sees it.
void last_cta(Args args) {
  const Shared<int> last(0, 1);
  if (thread() == 0) last[0] = arrive(args.counter, kCtas);
  sync();
  out(args) = last[0] ? 1 : 0;
}

// [16, 16] times [16, 8] in both types, 64 numbers of the product to a warp and pass.
template <class T>
void product(Args args, void (*multiply)(const MultiplyArgs&)) {
  const Shared<uint16_t> a(0, 256), b(512, 128);
  for (int i = thread(); i < 256; i += kThreads) a[i] = T::store(static_cast<float>(i % 13 - 6));
  for (int i = thread(); i < 128; i += kThreads) b[i] = T::store(static_cast<float>(i % 7 - 3));
  sync();
  const int lane = thread() % 32, g = lane / 4, t = lane % 4;
  uint32_t left[4], right[2];
  load_matrices(left, a.span(lane % 16 * 16 + lane / 16 * 8, 8));
  std::memcpy(&right[0], b.span(g * 16 + 2 * t, 2), 4);
  std::memcpy(&right[1], b.span(g * 16 + 2 * t + 8, 2), 4);
  float c[4] = {1, 1, 1, 1};
  multiply({c, left, right});
  float wrong = 0;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float sum = 1;
    for (int k = 0; k < 16; ++k) {
      sum += static_cast<float>((row * 16 + k) % 13 - 6) *
             static_cast<float>((column * 16 + k) % 7 - 3);
    }
    wrong += sum != c[i];
  }
  out(args) = wrong;
}
void product_bfloat16(Args args) { product<Bfloat16>(args, multiply_bfloat16); }
void product_float16(Args args) { product<Float16>(args, multiply_float16); }

const std::map<std::string, void (*)(Args)> kKernels = {
    {"exchange", exchange<true>},
    {"exchange without barrier", exchange<false>},
    {"exchange in warp", exchange_in_warp<true>},
    {"exchange in warp without barrier", exchange_in_warp<false>},
    {"exchange by shuffle", exchange_by_shuffle},
    {"reuse", reuse<true>},
    {"reuse without barrier", reuse<false>},
    {"copy", copy<true, true>},
    {"copy without wait", copy<true, false>},
    {"copy without commit", copy<false, true>},
    {"refill", refill<true>},
    {"refill without barrier", refill<false>},
    {"two copies", two_copies<0>},
    {"two copies, one waited for", two_copies<1>},
    {"misaligned copy", misaligned_copy},
    {"beyond the end", beyond_the_end},
    {"before the beginning", before_the_beginning},
    {"wide beyond the end", wide_beyond_the_end},
    {"too large", too_large},
    {"uninitialised", uninitialised},
    {"divergent", divergent},
    {"different operations", different_operations},
    {"early return", early_return},
    {"last CTA", last_cta},
    {"product bfloat16", product_bfloat16},
    {"product float16", product_float16},
};

}  // namespace

int main(int count, char** names) {
  if (count != 2 || !kKernels.count(names[1])) return 2;
  std::vector<float> input(kThreads * 4), written(kCtas * kThreads);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i);
  unsigned counter = 0;
  for (uintptr_t order = 0; order < 6; ++order) {
    written.assign(written.size(), -1);
    try {
      launch(kKernels.at(names[1]), {kCtas, 1, 1}, kThreads, 4096, reinterpret_cast<void*>(order),
             Args{input.data(), written.data(), &counter});
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
    for (float value : written) std::printf("%g ", static_cast<double>(value));
    std::printf("\n");
  }
  return counter ? 3 : 0;
}
