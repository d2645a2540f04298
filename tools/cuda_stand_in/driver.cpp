// The driver's API, which Triton, torch and the stand-in's own runtime call.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include "stand_in.h"

namespace {
// Errors have the same numbers in both APIs, but for those that the driver does not know.
CUresult driver(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return CUDA_ERROR_INVALID_VALUE;
  if (error == cudaErrorInvalidDeviceFunction) return CUDA_ERROR_INVALID_HANDLE;
  return static_cast<CUresult>(error);
}

// A context is its device's number, and not null.
CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(uintptr_t{0x1000} + 16 * device);
}

Function* function_of(CUfunction handle) { return ::function_of(static_cast<const void*>(handle)); }

void* entry_point(const char* name) {
  static void* own = [] {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&cuInit), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  for (const char* version : {"_v3", "_v2", ""}) {
    if (void* found = dlsym(own, (std::string(name) + version).c_str())) return found;
  }
  note("absent", "%s", name);
  return nullptr;
}
}  // namespace

// What the generated stubs of the runtime and of the driver call.
API int cuda_stand_in_missing(const char* name) {
  Lock lock;
  if (state().missing.insert(name).second) note("missing", "%s", name);
  return cudaErrorNotSupported;
}

API CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char* text, int size, CUdevice) {
  snprintf(text, size, "%s", arch().name);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t* size, CUdevice) {
  *size = total_memory();
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  memset(uuid, 0, sizeof *uuid);
  uuid->bytes[0] = static_cast<char>(device + 1);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (device < 0 || device >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  *context = context_of(device);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = thread().has_context ? context_of(thread().device) : nullptr;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) {
  thread().has_context = context != nullptr;
  for (int device = 0; device < device_count(); ++device) {
    if (context == context_of(device)) thread().device = device;
  }
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* device) {
  if (!thread().has_context) return CUDA_ERROR_INVALID_CONTEXT;
  *device = thread().device;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize() {
  Lock lock;
  return driver(may_synchronize("cuCtxSynchronize"));
}

API CUresult cuCtxGetLimit(size_t* size, CUlimit) {
  *size = 1 << 20;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error_text(error);
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error_name(error);
  return CUDA_SUCCESS;
}

API CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t size) {
  if (!thread().has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  void* made = nullptr;
  CUresult error = driver(allocate(&made, size, false));
  *pointer = reinterpret_cast<CUdeviceptr>(made);
  return error;
}

API CUresult cuMemFree_v2(CUdeviceptr pointer) {
  return driver(release(reinterpret_cast<void*>(pointer)));
}

API CUresult cuMemGetInfo_v2(size_t* left, size_t* total) {
  Lock lock;
  *total = total_memory();
  *left = *total - state().used[thread().device];
  return CUDA_SUCCESS;
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr pointer) {
  Lock lock;
  uintptr_t start;
  const Block* block = find(reinterpret_cast<const void*>(pointer), &start);
  if (!block) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = start;
  if (size) *size = block->size;
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  Lock lock;
  uintptr_t start;
  const Block* block = find(reinterpret_cast<const void*>(pointer), &start);
  if (!block) return CUDA_ERROR_INVALID_VALUE;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(value) = context_of(block->pinned ? 0 : block->device);
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(value) = pointer; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) = block->pinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = block->device; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(value) = start; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = block->size; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  Lock lock;
  if (!thread().has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (auto error = may_synchronize("cuModuleLoadData")) return driver(error);
  Module* made = load(image);
  *module = reinterpret_cast<CUmodule>(made);
  return made ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*,
                                void**) {
  return cuModuleLoadData(module, image);
}

API CUresult cuModuleLoad(CUmodule* module, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string image(std::istreambuf_iterator<char>(file), {});
  return cuModuleLoadData(module, image.data());
}

// Not freed: a captured launch may still name its functions.
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto& all = reinterpret_cast<Module*>(module)->functions;
  auto found = all.find(name);
  if (found == all.end()) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(found->second);
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction handle) {
  Lock lock;
  Function* function = function_of(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  switch (which) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->local; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->max_threads; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->reserved; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
  Lock lock;
  Function* function = function_of(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  // Triton tries one that only later drivers know, and goes on when it is refused.
  if (which >= CU_FUNC_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  bool reserves = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return reserves ? driver(reserve(function, value)) : CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction handle, void** arguments,
                              void**) {
  Lock lock;
  if (!thread().has_context) return CUDA_ERROR_INVALID_CONTEXT;
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < how->numAttrs; ++i) {
    if (how->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    auto& size = how->attrs[i].value.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  return driver(launch(function_of(handle), dim3(how->gridDimX, how->gridDimY, how->gridDimZ),
                       dim3(how->blockDimX, how->blockDimY, how->blockDimZ), how->sharedMemBytes,
                       how->hStream, arguments, cluster));
}

API CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned dynamic,
                            CUstream stream, void** arguments, void**) {
  Lock lock;
  if (!thread().has_context) return CUDA_ERROR_INVALID_CONTEXT;
  return driver(launch(function_of(handle), dim3(grid_x, grid_y, grid_z),
                       dim3(block_x, block_y, block_z), dynamic, stream, arguments));
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int block,
                                                         size_t dynamic) {
  Lock lock;
  Function* function = function_of(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  *blocks = occupancy(function, block, dynamic);
  return CUDA_SUCCESS;
}

// The tables of NVIDIA's own runtime, which is why that runs no kernels here.
API CUresult cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_FOUND; }

API CUresult cuGetProcAddress_v2(const char* name, void** pointer, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* result) {
  *pointer = entry_point(name);
  if (result) {
    *result = *pointer ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *pointer ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** pointer, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *pointer = entry_point(name);
  if (result) {
    *result = *pointer ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
