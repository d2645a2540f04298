// What the parts of the stand-in share. It is a libcuda.so.1, and when it is preloaded it also
// stands before libcudart and cuBLAS. Device memory is host memory, launches are checked and
// written down, nothing is computed.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// The headers rename some entry points; these are the names that libraries ask for.
#undef cudaStreamGetCaptureInfo

// An entry point of one of CUDA's libraries. Everything else is hidden.
#define API extern "C" __attribute__((visibility("default")))

struct Arch {
  int major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor;
  int threads_per_multiprocessor, blocks_per_multiprocessor, l2;
  const char* name;
};

struct Block {
  size_t size;
  int device;
  bool pinned;
};

struct Stream;

struct Graph {
  std::vector<std::function<void()>> nodes;
};

struct Capture {
  cudaStreamCaptureMode mode;
  unsigned long long id;
  Graph* graph;
  Stream* origin;
  pid_t thread;
  std::set<Stream*> streams;
  bool broken = false;
};

struct Stream {
  int device;
  unsigned flags;
  int priority;
  Capture* capture = nullptr;
  long version = 0, joined = 0;  // work that was captured, and how much of it others wait for
};

struct Event {
  unsigned flags;
  int device;
  bool recorded = false;
  double time = 0;
  Capture* capture = nullptr;
  Stream* from = nullptr;
  long version = 0;
};

// A kernel, as far as its cubin or its registration tells.
struct Function {
  std::string name;
  int device = -1;  // of the module it was loaded from; -1: it is in a library, for every device
  int registers = 0, shared = 0, local = 0, max_threads = 1024, required_threads = 0;
  int reserved = -1;                 // dynamic shared memory; -1: not asked for
  std::vector<int> parameter_sizes;  // in bytes
};

struct Module {
  int device;
  std::map<std::string, Function*> functions;
};

struct State {
  std::recursive_mutex mutex;
  std::map<uintptr_t, Block> blocks;
  std::map<int, size_t> used;  // device -> bytes
  std::set<Stream*> streams;
  std::set<Capture*> captures;
  std::unordered_map<const void*, Function*> by_host;  // the address of a kernel's host function
  std::set<const void*> functions;
  std::map<const void*, std::vector<char>> variables;
  std::set<std::string> missing;
};

struct Thread {
  int device = 0;
  bool has_context = false;
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};

// Never destroyed, since libraries call until the process is gone.
State& state();
Thread& thread();

struct Lock {
  Lock() { state().mutex.lock(); }
  ~Lock() { state().mutex.unlock(); }
};

// device.cpp: the pretended device, what is said about it, memory, functions.
const Arch& arch();
int device_count();
size_t total_memory();
int attribute(int which);
cudaError_t remember(cudaError_t error);  // for cudaGetLastError
__attribute__((format(printf, 2, 3))) void note(const char* kind, const char* format, ...);
const Block* find(const void* pointer, uintptr_t* start = nullptr);
cudaError_t allocate(void** pointer, size_t size, bool pinned);
cudaError_t release(void* pointer);
cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream);
cudaError_t fill(void* to, int value, size_t size, cudaStream_t stream);
const char* error_name(int code);
const char* error_text(int code);

// launch.cpp
Function* function_of(const void* handle);
Module* load(const void* image);
int occupancy(const Function* function, int block, size_t dynamic);
cudaError_t reserve(Function* function, int size);
cudaError_t launch(Function* function, dim3 grid, dim3 block, size_t dynamic, cudaStream_t stream,
                   void** arguments, dim3 cluster = dim3(1, 1, 1));

// streams.cpp
Stream* stream_of(cudaStream_t stream);  // null for the default streams
Capture* capture_of(cudaStream_t stream);
cudaError_t may_synchronize(const char* what);  // not while something is captured
cudaError_t enqueue(cudaStream_t stream, const char* what, std::function<void()> run);
