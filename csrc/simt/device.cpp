// Fibers, barriers and warps of csrc/simt/device.h.

#include "cuda/device.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <vector>

namespace rpg::simt {

namespace {

constexpr size_t kStack = 1 << 16;
constexpr int kPoison = 0xFF;  // a NaN in every type

struct AsyncCopy {
  void* target;
  const void* source;
  bool valid;
};

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  std::vector<AsyncCopy> open;                 // not committed
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
};

using Combine = void (*)(const void* const (&args)[kWarp]);

struct Warp {
  const void* args[kWarp];
  Combine combine = nullptr;
  int arrived = 0;
};

class Cta {
 public:
  Cta(int threads, int shared, uint64_t order, const std::function<void()>& body)
      : threads_(threads), shared_(shared), body_(body), random_(order), seed_(order) {
    memory_.resize(shared + 16);
    fibers_.resize(threads);
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
    for (int i = 0; i < threads; ++i) lanes_.push_back(i);
    for (int i = 0; i < threads / kWarp; ++i) warp_order_.push_back(i);
  }

  void run(int x, int y, int z) {
    x_ = x, y_ = y, z_ = z;
    std::fill(memory_.begin(), memory_.end(), static_cast<char>(kPoison));
    warps_.assign(threads_ / kWarp, {});
    waiting_ = 0;
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      fiber.open.clear(), fiber.groups.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Cta::enter), 0);
    }
    for (int done = 0; done < threads_;) {
      shuffle();
      bool moved = false;
      for (int warp : warp_order_) moved |= run_warp(warp);
      if (error_) std::rethrow_exception(error_);
      done = static_cast<int>(std::count_if(
          fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state == State::kDone; }));
      if (!moved && done < threads_) {
        throw std::logic_error("threads of a CTA wait for each other at different places");
      }
    }
  }

  void at_barrier() {
    if (++waiting_ == live()) {
      release_barrier();
    } else {
      wait(State::kAtBarrier);
    }
  }

  void at_warp(const void* args, Combine combine) {
    Warp& warp = warps_[current_ / kWarp];
    if (warp.arrived && warp.combine != combine) {
      throw std::logic_error("lanes of a warp ask for different operations");
    }
    warp.combine = combine;
    warp.args[current_ % kWarp] = args;
    if (++warp.arrived < kWarp) return wait(State::kAtWarp);
    warp.arrived = 0;
    combine(warp.args);
    const int first = current_ / kWarp * kWarp;
    for (int i = first; i < first + kWarp; ++i) {
      if (i != current_) fibers_[i].state = State::kReady;
    }
  }

  static void enter() {
    Cta& cta = *active;
    try {
      cta.body_();
    } catch (...) {
      cta.error_ = std::current_exception();
    }
    cta.fibers_[cta.current_].state = State::kDone;
    // Threads that returned are not waited for.
    if (cta.waiting_ && cta.waiting_ == cta.live()) cta.release_barrier();
  }

  // Copies may arrive at any time from their beginning to the wait: in odd orders at once.
  bool copies_at_once() const { return seed_ % 2 == 1; }

  static thread_local Cta* active;

  int current_ = 0, number_ = 0, x_ = 0, y_ = 0, z_ = 0;
  int threads_, shared_;
  std::vector<Fiber> fibers_;
  char* memory() {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (16 - begin % 16) % 16;
  }

 private:
  int live() const {
    return static_cast<int>(std::count_if(fibers_.begin(), fibers_.end(),
                                          [](const Fiber& f) { return f.state != State::kDone; }));
  }

  void release_barrier() {
    waiting_ = 0;
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
    }
  }

  void wait(State state) {
    fibers_[current_].state = state;
    swapcontext(&fibers_[current_].context, &scheduler_);
  }

  // Every lane as far as it gets without the other warps.
  bool run_warp(int warp) {
    bool moved = false;
    for (bool moving = true; moving && !error_;) {
      moving = false;
      for (int k = 0; k < kWarp; ++k) {
        const int i = warp * kWarp + lanes_[k];
        if (fibers_[i].state != State::kReady) continue;
        current_ = i;
        swapcontext(&scheduler_, &fibers_[i].context);
        if (error_) return true;
        moving = moved = true;
      }
    }
    return moved;
  }

  // Order 0 is that of the numbers, 1 its reverse, any other is drawn.
  void shuffle() {
    lanes_.resize(kWarp);
    for (int i = 0; i < kWarp; ++i) lanes_[i] = seed_ == 1 ? kWarp - 1 - i : i;
    const int warps = threads_ / kWarp;
    for (int i = 0; i < warps; ++i) warp_order_[i] = seed_ == 1 ? warps - 1 - i : i;
    if (seed_ < 2) return;
    std::shuffle(lanes_.begin(), lanes_.end(), random_);
    std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
  }

  const std::function<void()>& body_;
  std::mt19937_64 random_;
  uint64_t seed_;
  std::vector<char> memory_;
  std::vector<Warp> warps_;
  std::vector<int> lanes_, warp_order_;
  int waiting_ = 0;
  ucontext_t scheduler_;
  std::exception_ptr error_;
};

thread_local Cta* Cta::active = nullptr;

Fiber& fiber() { return Cta::active->fibers_[Cta::active->current_]; }

void combine_nothing(const void* const (&)[kWarp]) {}

void combine_matrices(const void* const (&args)[kWarp]) {
  const auto args_of = [&](int lane) -> const MatrixArgs& {
    return *static_cast<const MatrixArgs*>(args[lane]);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const char* row = static_cast<const char*>(args_of(8 * matrix + lane / 4).row);
      std::memcpy(args_of(lane).out + matrix, row + 4 * (lane % 4), 4);
    }
  }
}

void combine_transposed(const void* const (&args)[kWarp]) {
  const auto args_of = [&](int lane) -> const MatrixArgs& {
    return *static_cast<const MatrixArgs*>(args[lane]);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      char* const out = reinterpret_cast<char*>(args_of(lane).out + matrix);
      for (int half = 0; half < 2; ++half) {
        const void* row = args_of(8 * matrix + 2 * (lane % 4) + half).row;
        std::memcpy(out + 2 * half, static_cast<const char*>(row) + 2 * (lane / 4), 2);
      }
    }
  }
}

struct ShuffleArgs {
  uint32_t value;
  int lane;
  uint32_t* out;
};

void combine_shuffle(const void* const (&args)[kWarp]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const ShuffleArgs& own = *static_cast<const ShuffleArgs*>(args[lane]);
    *own.out = static_cast<const ShuffleArgs*>(args[own.lane % kWarp])->value;
  }
}

// c [16, 8] += a [16, 16] b [16, 8]; fragments as PTX describes them for mma.m16n8k16.
template <class T>
void combine_multiply(const void* const (&args)[kWarp]) {
  const auto args_of = [&](int lane) -> const MultiplyArgs& {
    return *static_cast<const MultiplyArgs*>(args[lane]);
  };
  const auto half = [](uint32_t pair, int k) {
    return T::load(static_cast<uint16_t>(pair >> 16 * (k % 2)));
  };
  float a[16][16], b[16][8];
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < 16; ++k) {
      a[r][k] = half(args_of(r % 8 * 4 + k % 8 / 2).a[r / 8 + 2 * (k / 8)], k);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) b[k][n] = half(args_of(4 * n + k % 8 / 2).b[k / 8], k);
  }
  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < 8; ++n) {
      float& c = args_of(r % 8 * 4 + n / 2).c[r / 8 * 2 + n % 2];
      for (int k = 0; k < 16; ++k) c += a[r][k] * b[k][n];
    }
  }
}

void finish(const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.target, copy.source, 16);
  } else {
    std::memset(copy.target, 0, 16);
  }
}

}  // namespace

int thread() { return Cta::active->current_; }
int cta_x() { return Cta::active->x_; }
int cta_y() { return Cta::active->y_; }
int cta_z() { return Cta::active->z_; }
void sync() { Cta::active->at_barrier(); }
void sync_warp() { Cta::active->at_warp(nullptr, combine_nothing); }
char* shared_memory() { return Cta::active->memory(); }
int shared_bytes() { return Cta::active->shared_; }

thread_local std::vector<Access>* accesses = nullptr;

void write_down(const void* address, int bytes, const Site& site) {
  if (!Cta::active) return;
  Cta& cta = *Cta::active;
  const ptrdiff_t offset = static_cast<const char*>(address) - cta.memory();
  if (offset < 0 || offset >= cta.shared_) return;  // not in shared memory
  accesses->push_back({site, cta.number_, cta.current_, static_cast<int>(offset), bytes});
}

void copy_async(void* target, const void* source, bool valid, Site site) {
  note(target, 16, site);
  if (reinterpret_cast<uintptr_t>(target) % 16 ||
      (valid && reinterpret_cast<uintptr_t>(source) % 16)) {
    throw std::logic_error("an asynchronous copy is not aligned to 16 bytes");
  }
  const AsyncCopy copy{target, source, valid};
  if (Cta::active->copies_at_once()) return finish(copy);
  fiber().open.push_back(copy);
}

void commit_copies() {
  fiber().groups.push_back(std::move(fiber().open));
  fiber().open.clear();
}

void wait_copies_but(int groups) {
  auto& committed = fiber().groups;
  while (static_cast<int>(committed.size()) > groups) {
    for (const AsyncCopy& copy : committed.front()) finish(copy);
    committed.erase(committed.begin());
  }
}

void load_matrices(const MatrixArgs& args) { Cta::active->at_warp(&args, combine_matrices); }
void load_transposed(const MatrixArgs& args) { Cta::active->at_warp(&args, combine_transposed); }
void multiply_bfloat16(const MultiplyArgs& args) {
  Cta::active->at_warp(&args, combine_multiply<Bfloat16>);
}
void multiply_float16(const MultiplyArgs& args) {
  Cta::active->at_warp(&args, combine_multiply<Float16>);
}

uint32_t shuffle(uint32_t value, int lane) {
  uint32_t out = 0;
  const ShuffleArgs args{value, lane, &out};
  Cta::active->at_warp(&args, combine_shuffle);
  return out;
}

bool arrive(unsigned* counter, unsigned parts) {
  const bool last = *counter + 1 >= parts;
  *counter = last ? 0 : *counter + 1;
  return last;
}

void launch(Grid grid, int threads, int shared_bytes, uint64_t order,
            const std::function<void()>& body) {
  if (threads % kWarp) throw std::logic_error("a CTA has whole warps");
  Cta cta(threads, shared_bytes, order, body);
  std::vector<int> ctas(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < ctas.size(); ++i) ctas[i] = static_cast<int>(i);
  std::mt19937_64 random(order);
  if (order == 1) std::reverse(ctas.begin(), ctas.end());
  if (order > 1) std::shuffle(ctas.begin(), ctas.end(), random);
  Cta* const outer = Cta::active;
  Cta::active = &cta;
  try {
    for (int i : ctas) {
      cta.number_ = i;
      cta.run(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    }
  } catch (...) {
    Cta::active = outer;
    throw;
  }
  Cta::active = outer;
}

}  // namespace rpg::simt
