// Memory that callers give to kernels, and how it is divided.

#pragma once

#include <cstdint>

namespace rpg {

// Bytes of a workspace, and how many of them hold copies of activations.
struct Workspace {
  int64_t bytes;
  int64_t activations;
};

// So many bytes in whole cache lines.
inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Takes one piece after the other off a workspace.
class Carver {
 public:
  Carver(void* memory, int64_t offset) : next_(static_cast<char*>(memory) + offset) {}

  template <class T>
  void take(T*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<T*>(next_);
    next_ += bytes;
  }

 private:
  char* next_;
};

}  // namespace rpg
