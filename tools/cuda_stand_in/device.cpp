// The pretended device, what is said about it, and its memory.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "stand_in.h"

namespace {
const Arch kArchs[] = {{8, 0, 108, 166912, 167936, 2048, 32, 40 << 20, "A100 (stand-in)"},
                       {8, 6, 84, 101376, 102400, 1536, 16, 6 << 20, "RTX 3090 (stand-in)"},
                       {8, 9, 128, 101376, 102400, 1536, 24, 72 << 20, "RTX 4090 (stand-in)"},
                       {9, 0, 132, 232448, 233472, 2048, 32, 60 << 20, "H200 (stand-in)"},
                       {10, 0, 148, 232448, 233472, 2048, 32, 126 << 20, "B200 (stand-in)"},
                       {12, 0, 170, 101376, 102400, 1536, 24, 96 << 20, "RTX 5090 (stand-in)"}};

const struct {
  int code;
  const char *name, *text;
} kErrors[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {201, "cudaErrorDeviceUninitialized", "invalid device context"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {904, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {906, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"}};

const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}

// Addresses of device memory are never used twice, so a stale pointer is known as one.
constexpr size_t kArena = size_t{1} << 43, kPage = size_t{1} << 21;
uintptr_t arena_begin = 0, arena_next = 0;

bool in_arena(const void* pointer) {
  auto at = reinterpret_cast<uintptr_t>(pointer);
  return arena_begin && at >= arena_begin && at < arena_begin + kArena;
}

void* map_pages(uintptr_t at, size_t size, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  return mmap(reinterpret_cast<void*>(at), size, protection, flags, -1, 0);
}

size_t whole_pages(size_t size) { return (size + kPage - 1) / kPage * kPage; }

bool within(const void* pointer, size_t size) {
  if (!in_arena(pointer) || !size) return true;
  uintptr_t start;
  const Block* block = find(pointer, &start);
  return block && reinterpret_cast<uintptr_t>(pointer) + size <= start + block->size;
}
}  // namespace

State& state() {
  static auto* only = new State;
  return *only;
}

Thread& thread() {
  thread_local Thread own;
  return own;
}

const Arch& arch() {
  static const Arch* chosen = [] {
    std::string asked = setting("CUDA_STAND_IN_CAPABILITY", "9.0");
    for (auto& one : kArchs) {
      if (asked == std::to_string(one.major) + "." + std::to_string(one.minor)) return &one;
    }
    fprintf(stderr, "cuda_stand_in: unknown capability %s\n", asked.c_str());
    abort();
  }();
  return *chosen;
}

int device_count() {
  static int count = atoi(setting("CUDA_STAND_IN_DEVICES", "1"));
  return count;
}

size_t total_memory() {
  static size_t size = strtoull(setting("CUDA_STAND_IN_MEMORY", "150754820096"), nullptr, 0);
  return size;
}

int attribute(int which) {
  const Arch& device = arch();
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return device.major == 9 ? 6144 : 384;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return device.multiprocessors;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return device.l2;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return device.threads_per_multiprocessor;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return device.major;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return device.minor;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return device.shared_per_multiprocessor;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return device.shared_per_block;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return device.blocks_per_multiprocessor;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return device.major >= 9;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    default: return 0;
  }
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) thread().last_error = error;
  return error;
}

void note(const char* kind, const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  static const char* path = setting("CUDA_STAND_IN_LOG", "");
  static FILE* log = *path ? fopen(path, "a") : nullptr;
  if (log) {
    fprintf(log, "%s: %s\n", kind, text);
    fflush(log);
  }
  // The log alone has the launches, of which there are thousands, and what torch can do without.
  if (strcmp(kind, "launch") && strcmp(kind, "absent"))
    fprintf(stderr, "cuda_stand_in: %s: %s\n", kind, text);
}

const char* error_name(int code) {
  for (auto& error : kErrors) {
    if (error.code == code) return error.name;
  }
  return "an error that the stand-in has no name for";
}

const char* error_text(int code) {
  for (auto& error : kErrors) {
    if (error.code == code) return error.text;
  }
  return "an error that the stand-in has no text for";
}

const Block* find(const void* pointer, uintptr_t* start) {
  auto at = reinterpret_cast<uintptr_t>(pointer);
  auto next = state().blocks.upper_bound(at);
  if (next == state().blocks.begin()) return nullptr;
  --next;
  if (at >= next->first + next->second.size) return nullptr;
  if (start) *start = next->first;
  return &next->second;
}

cudaError_t allocate(void** pointer, size_t size, bool pinned) {
  Lock lock;
  if (auto error = may_synchronize("an allocation")) return remember(error);
  *pointer = nullptr;
  if (!size) return cudaSuccess;
  if (!arena_begin) {
    void* all = map_pages(0, kArena, PROT_NONE);
    if (all == MAP_FAILED) return remember(cudaErrorMemoryAllocation);
    arena_begin = arena_next = whole_pages(reinterpret_cast<uintptr_t>(all));
  }
  size_t& used = state().used[thread().device];
  size_t left = total_memory() - used;
  if (size > kArena || (!pinned && size > left) ||
      arena_next + whole_pages(size) > arena_begin + kArena - kPage) {
    return remember(cudaErrorMemoryAllocation);
  }
  void* made = map_pages(arena_next, whole_pages(size), PROT_READ | PROT_WRITE);
  if (made == MAP_FAILED) return remember(cudaErrorMemoryAllocation);
  state().blocks[arena_next] = {size, pinned ? -1 : thread().device, pinned};
  arena_next += whole_pages(size);
  if (!pinned) used += size;
  thread().has_context = true;
  *pointer = made;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  Lock lock;
  if (!pointer) return cudaSuccess;
  if (auto error = may_synchronize("a free")) return remember(error);
  auto found = state().blocks.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == state().blocks.end()) {
    note("violation", "free of memory that is not allocated");
    return remember(cudaErrorInvalidValue);
  }
  const Block& block = found->second;
  if (!block.pinned) state().used[block.device] -= block.size;
  map_pages(found->first, whole_pages(block.size), PROT_NONE);
  state().blocks.erase(found);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  if (!within(to, size) || !within(from, size)) {
    note("violation", "copy of %zu bytes beyond an allocation", size);
    return cudaErrorInvalidValue;
  }
  return enqueue(stream, "a copy", [=] { memmove(to, from, size); });
}

cudaError_t fill(void* to, int value, size_t size, cudaStream_t stream) {
  if (!within(to, size)) {
    note("violation", "fill of %zu bytes beyond an allocation", size);
    return cudaErrorInvalidValue;
  }
  return enqueue(stream, "a fill", [=] {
    // Zeros over whole pages cost no memory, however large the tensor.
    auto first = whole_pages(reinterpret_cast<uintptr_t>(to));
    auto end = (reinterpret_cast<uintptr_t>(to) + size) / kPage * kPage;
    if (value == 0 && in_arena(to) && first < end) {
      madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
      memset(to, 0, first - reinterpret_cast<uintptr_t>(to));
      memset(reinterpret_cast<void*>(end), 0, reinterpret_cast<uintptr_t>(to) + size - end);
    } else {
      memset(to, value, size);
    }
  });
}
