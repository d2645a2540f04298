// What stands before libcudart: devices, memory, kernels of libraries; and before cuBLAS, whose
// products are left out. Streams and graphs are in streams.cpp.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "stand_in.h"

namespace {
struct Configuration {
  dim3 grid, block;
  size_t dynamic;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // of launches by <<<>>>
}  // namespace

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count ? cudaSuccess : remember(cudaErrorNoDevice);
}

API cudaError_t cudaGetDevice(int* device) {
  *device = thread().device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
  thread().device = device;
  thread().has_context = true;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

API cudaError_t cudaGetLastError() { return std::exchange(thread().last_error, cudaSuccess); }

API cudaError_t cudaPeekAtLastError() { return thread().last_error; }
API const char* cudaGetErrorName(cudaError_t error) { return error_name(error); }
API const char* cudaGetErrorString(cudaError_t error) { return error_text(error); }

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* all, int device) {
  if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
  memset(all, 0, sizeof *all);
  snprintf(all->name, sizeof all->name, "%s", arch().name);
  all->uuid.bytes[0] = static_cast<char>(device + 1);
  all->totalGlobalMem = total_memory();
  all->major = arch().major;
  all->minor = arch().minor;
  all->multiProcessorCount = arch().multiprocessors;
  all->warpSize = 32;
  all->maxThreadsPerBlock = 1024;
  all->maxThreadsDim[0] = all->maxThreadsDim[1] = 1024;
  all->maxThreadsDim[2] = 64;
  all->maxGridSize[0] = 2147483647;
  all->maxGridSize[1] = all->maxGridSize[2] = 65535;
  all->maxThreadsPerMultiProcessor = arch().threads_per_multiprocessor;
  all->maxBlocksPerMultiProcessor = arch().blocks_per_multiprocessor;
  all->regsPerBlock = all->regsPerMultiprocessor = 65536;
  all->sharedMemPerBlock = 49152;
  all->sharedMemPerBlockOptin = arch().shared_per_block;
  all->sharedMemPerMultiprocessor = arch().shared_per_multiprocessor;
  all->reservedSharedMemPerBlock = 1024;
  all->totalConstMem = 65536;
  all->l2CacheSize = arch().l2;
  all->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  all->memPitch = 2147483647;
  all->textureAlignment = 512;
  all->pciBusID = device + 1;
  all->asyncEngineCount = 3;
  all->canMapHostMemory = all->concurrentKernels = all->unifiedAddressing = 1;
  all->managedMemory = all->cooperativeLaunch = all->streamPrioritiesSupported = 1;
  all->clusterLaunch = arch().major >= 9;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}

API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  return remember(may_synchronize("cudaDeviceSynchronize"));
}

API cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(pointer, size, false); }

API cudaError_t cudaFree(void* pointer) {
  thread().has_context = true;
  return release(pointer);
}

API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return allocate(pointer, size, true);
}

API cudaError_t cudaMallocHost(void** pointer, size_t size) {
  return allocate(pointer, size, true);
}
API cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  Lock lock;
  state().blocks[reinterpret_cast<uintptr_t>(pointer)] = {size, -1, true};
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock;
  state().blocks.erase(reinterpret_cast<uintptr_t>(pointer));
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  Lock lock;
  *total = total_memory();
  *left = *total - state().used[thread().device];
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* all, const void* pointer) {
  Lock lock;
  memset(all, 0, sizeof *all);
  const Block* block = find(pointer);
  all->device = -2;
  if (!block) return cudaSuccess;  // cudaMemoryTypeUnregistered is 0
  all->type = block->pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  all->device = block->pinned ? thread().device : block->device;
  all->devicePointer = const_cast<void*>(pointer);
  if (block->pinned) all->hostPointer = all->devicePointer;
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  Lock lock;
  if (auto error = may_synchronize("cudaMemcpy")) return remember(error);
  return remember(copy(to, from, size, nullptr));
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                cudaStream_t stream) {
  Lock lock;
  return remember(copy(to, from, size, stream));
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                    cudaStream_t stream) {
  Lock lock;
  return remember(copy(to, from, size, stream));
}

API cudaError_t cudaMemset(void* to, int value, size_t size) {
  Lock lock;
  return remember(fill(to, value, size, nullptr));
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  Lock lock;
  return remember(fill(to, value, size, stream));
}

API cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  Lock lock;
  auto found = state().variables.find(symbol);
  if (found == state().variables.end()) return remember(cudaErrorInvalidSymbol);
  *pointer = found->second.data();
  return cudaSuccess;
}

API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t at,
                                   cudaMemcpyKind) {
  Lock lock;
  auto found = state().variables.find(symbol);
  if (found == state().variables.end()) return remember(cudaErrorInvalidSymbol);
  if (at + size > found->second.size()) return remember(cudaErrorInvalidValue);
  memcpy(found->second.data() + at, from, size);
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  Lock lock;
  Function* function = function_of(kernel);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  bool reserves = which == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return reserves ? remember(reserve(function, value)) : cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* all, const void* kernel) {
  Lock lock;
  Function* function = function_of(kernel);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  memset(all, 0, sizeof *all);
  all->maxThreadsPerBlock = function->max_threads;
  all->numRegs = function->registers ? function->registers : 32;
  all->sharedSizeBytes = function->shared;
  all->maxDynamicSharedSizeBytes = function->reserved >= 0 ? function->reserved : 49152;
  all->binaryVersion = all->ptxVersion = arch().major * 10 + arch().minor;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                       const void* kernel,
                                                                       int block, size_t dynamic,
                                                                       unsigned) {
  Lock lock;
  Function* function = function_of(kernel);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  *blocks = occupancy(function, block, dynamic);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                              int block, size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, block, dynamic, 0);
}

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                 size_t dynamic, cudaStream_t stream) {
  Lock lock;
  return remember(launch(function_of(kernel), grid, block, dynamic, stream, arguments));
}

API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block,
                                            void** arguments, size_t dynamic, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, dynamic, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel,
                                    void** arguments) {
  return cudaLaunchKernel(kernel, how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes,
                          how->stream);
}

// What nvcc makes of <<<>>>, and of a library's kernels and variables when it is loaded.
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                   size_t dynamic, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, dynamic, stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  Lock lock;
  Function* function = function_of(host);
  if (!function) return remember(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(function);
  return cudaSuccess;
}

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic,
                                         cudaStream_t stream) {
  configurations.push_back({grid, block, dynamic, stream});
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic,
                                           cudaStream_t* stream) {
  const Configuration& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *dynamic = last.dynamic;
  *stream = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}

API void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }

API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int limit,
                                uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock;
  auto* function = new Function;
  function->name = name;
  if (limit > 0) function->max_threads = limit;
  state().by_host[host] = function;
  state().functions.insert(function);
}

API void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t size, int, int) {
  Lock lock;
  state().variables[host].resize(size);
}

// Calls of cuBLAS whose results are looked at. The others are stubs that report success.
API int cublasCreate_v2(void** handle) {
  *handle = new int(1);
  return 0;
}

API int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}

API int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}

API size_t cublasLtGetVersion() { return 130101; }

API int cublasLtMatmulDescCreate(void** made, int, int) {
  *made = calloc(1, 512);
  return 0;
}

API int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) {
  *made = calloc(1, 512);
  return 0;
}

API int cublasLtMatmulPreferenceCreate(void** made) {
  *made = calloc(1, 512);
  return 0;
}

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int asked,
                                       void* results, int* found) {
  memset(results, 0, 96);  // the size of one cublasLtMatmulHeuristicResult_t
  *found = asked > 0;
  return 0;
}
