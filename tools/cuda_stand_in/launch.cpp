// Kernels: what a cubin says of them, and which launches are possible.
#include <elf.h>

#include <algorithm>
#include <cstring>

#include "stand_in.h"

namespace {
constexpr int kOptInShared = 49152;  // what a kernel may have without asking

// What each section .nv.info holds, as far as it is read here.
enum Info : uint8_t {
  kMaxThreads = 0x05,
  kRequiredThreads = 0x10,
  kFrameSize = 0x11,
  kParameter = 0x17,
  kRegisters = 0x2f,
  kWithSize = 0x04,  // the format of an entry that is followed by that many bytes
};

// From 9.0 on a cubin's section of shared memory begins with the 1 KB that the driver keeps.
int own_shared(size_t size) {
  return static_cast<int>(arch().major >= 9 && size >= 1024 ? size - 1024 : size);
}

struct Cubin {
  const char* base;
  const Elf64_Ehdr* header() const { return reinterpret_cast<const Elf64_Ehdr*>(base); }
  const Elf64_Shdr& section(int i) const {
    return reinterpret_cast<const Elf64_Shdr*>(base + header()->e_shoff)[i];
  }
  const char* data(int i) const { return base + section(i).sh_offset; }
  std::string name(int i) const { return data(header()->e_shstrndx) + section(i).sh_name; }
};

Function* named(const Module& module, const std::string& section, const char* prefix) {
  if (section.rfind(prefix, 0) != 0) return nullptr;
  auto found = module.functions.find(section.substr(strlen(prefix)));
  return found == module.functions.end() ? nullptr : found->second;
}

void read_own(Function& function, uint8_t which, const uint32_t* words) {
  int threads = static_cast<int>(words[0]);
  if (which == kMaxThreads || which == kRequiredThreads) {
    for (int i : {1, 2}) threads *= std::max<int>(words[i], 1);
    function.max_threads = threads;
    if (which == kRequiredThreads) function.required_threads = threads;
  } else if (which == kParameter) {
    size_t ordinal = words[1] & 0xffff;
    if (function.parameter_sizes.size() <= ordinal) function.parameter_sizes.resize(ordinal + 1);
    function.parameter_sizes[ordinal] = static_cast<int>(words[2] >> 18);
  }
}

std::string pointer_fault(const void* argument) {
  uintptr_t value;
  memcpy(&value, argument, sizeof value);
  // Whole numbers are small; what lies as high as the addresses of a process is taken as a pointer.
  if (value < (uintptr_t{1} << 40) || value >= (uintptr_t{1} << 47)) return "";
  auto* pointer = reinterpret_cast<const void*>(value);
  // A tensor without elements may point just behind a block.
  const Block* block = find(pointer);
  if (!block) block = find(reinterpret_cast<const void*>(value - 1));
  if (!block) return "points to no memory of the device";
  return !block->pinned && block->device != thread().device ? "points to another device" : "";
}
}  // namespace

Function* function_of(const void* handle) {
  auto found = state().by_host.find(handle);
  if (found != state().by_host.end()) return found->second;
  if (!state().functions.count(handle)) return nullptr;
  return static_cast<Function*>(const_cast<void*>(handle));
}

Module* load(const void* image) {
  Cubin cubin{static_cast<const char*>(image)};
  if (memcmp(image, ELFMAG, SELFMAG) != 0) {
    note("violation", "a module that is not a cubin");
    return nullptr;
  }
  int wanted = arch().major * 10 + arch().minor;
  int low = cubin.header()->e_flags & 0xff, high = (cubin.header()->e_flags >> 8) & 0xff;
  if (low != wanted && high != wanted) {
    note("violation", "a cubin of architecture %d or %d on %d", low, high, wanted);
    return nullptr;
  }
  auto* module = new Module{thread().device, {}};
  const Elf64_Sym* symbols = nullptr;
  const char* strings = nullptr;
  size_t symbol_count = 0;
  int sections = cubin.header()->e_shnum;
  for (int i = 0; i < sections; ++i) {
    const Elf64_Shdr& section = cubin.section(i);
    if (section.sh_type == SHT_SYMTAB) {
      symbols = reinterpret_cast<const Elf64_Sym*>(cubin.data(i));
      symbol_count = section.sh_size / sizeof *symbols;
      strings = cubin.data(static_cast<int>(section.sh_link));
    }
    std::string name = cubin.name(i);
    if (name.rfind(".text.", 0) == 0) {
      auto* function = new Function;
      function->name = name.substr(6);
      function->device = module->device;
      module->functions[function->name] = function;
      state().functions.insert(function);
    }
  }
  for (int i = 0; i < sections; ++i) {
    std::string name = cubin.name(i);
    size_t size = cubin.section(i).sh_size;
    if (Function* function = named(*module, name, ".nv.shared."))
      function->shared = own_shared(size);
    Function* own = named(*module, name, ".nv.info.");
    if (!own && name != ".nv.info") continue;
    const char* at = cubin.data(i);
    for (const char* end = at + size; at + 4 <= end;) {
      auto format = static_cast<uint8_t>(at[0]), which = static_cast<uint8_t>(at[1]);
      uint16_t length;
      memcpy(&length, at + 2, sizeof length);
      at += 4;
      if (format != kWithSize) continue;
      uint32_t words[3] = {};
      memcpy(words, at, std::min<size_t>(length, sizeof words));
      at += length;
      if (own) {
        read_own(*own, which, words);
      } else if ((which == kRegisters || which == kFrameSize) && words[0] < symbol_count) {
        Function* function = named(*module, strings + symbols[words[0]].st_name, "");
        if (function) (which == kRegisters ? function->registers : function->local) = words[1];
      }
    }
  }
  return module;
}

int occupancy(const Function* function, int block, size_t dynamic) {
  const Arch& device = arch();
  int threads = std::max(block, 1);
  size_t shared = dynamic + function->shared + 1024;
  int blocks =
      std::min(device.blocks_per_multiprocessor, device.threads_per_multiprocessor / threads);
  blocks = std::min(blocks, static_cast<int>(device.shared_per_multiprocessor / shared));
  if (function->registers) blocks = std::min(blocks, 65536 / (function->registers * threads));
  return blocks;
}

cudaError_t reserve(Function* function, int size) {
  if (size < 0 || size + function->shared > arch().shared_per_block) {
    note("violation", "%s reserves %d bytes of shared memory, the device has %d",
         function->name.c_str(), size, arch().shared_per_block);
    return cudaErrorInvalidValue;
  }
  function->reserved = size;
  return cudaSuccess;
}

cudaError_t launch(Function* function, dim3 grid, dim3 block, size_t dynamic, cudaStream_t stream,
                   void** arguments, dim3 cluster) {
  Lock lock;
  if (!function) {
    note("violation", "launch of an unknown function");
    return cudaErrorInvalidDeviceFunction;
  }
  const Arch& device = arch();
  std::string faults;
  cudaError_t first = cudaSuccess;
  auto check = [&](bool bad, const std::string& fault, cudaError_t error) {
    if (!bad) return;
    faults += "; " + fault;
    if (!first) first = error;
  };
  size_t threads = size_t{block.x} * block.y * block.z;
  check(!grid.x || !grid.y || !grid.z, "an empty grid", cudaErrorInvalidConfiguration);
  check(grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535, "a grid too large",
        cudaErrorInvalidConfiguration);
  check(!threads || threads > 1024 || block.z > 64, "an impossible block",
        cudaErrorInvalidConfiguration);
  check(threads > static_cast<size_t>(function->max_threads),
        "more threads than the kernel was compiled for", cudaErrorLaunchOutOfResources);
  check(function->required_threads && threads != static_cast<size_t>(function->required_threads),
        "not the number of threads that the kernel requires", cudaErrorInvalidConfiguration);
  // Registers are given out in eights, to whole warps.
  size_t registers = (threads + 31) / 32 * 32 * ((function->registers + 7) / 8 * 8);
  check(registers > 65536, "more registers than there are", cudaErrorLaunchOutOfResources);
  size_t allowed = function->reserved >= 0 ? function->reserved : kOptInShared - function->shared;
  check(dynamic > allowed,
        "shared memory of " + std::to_string(dynamic) + " bytes where " + std::to_string(allowed) +
            " are reserved",
        cudaErrorInvalidValue);
  check(dynamic + function->shared > static_cast<size_t>(device.shared_per_block),
        "more shared memory than the device has", cudaErrorInvalidValue);
  size_t blocks = size_t{cluster.x} * cluster.y * cluster.z;
  check(blocks > 1 && (device.major < 9 || blocks > 16 || grid.x % cluster.x),
        "an impossible cluster", cudaErrorInvalidConfiguration);
  Stream* own = stream_of(stream);
  check(own && state().streams.count(own) && own->device != thread().device,
        "a stream of another device", cudaErrorInvalidResourceHandle);
  check(function->device >= 0 && function->device != thread().device,
        "a kernel that was loaded for another device", cudaErrorInvalidResourceHandle);
  for (size_t i = 0; arguments && i < function->parameter_sizes.size(); ++i) {
    if (function->parameter_sizes[i] != sizeof(void*)) continue;
    // No error: a GPU, too, would only say so later, or not at all.
    std::string fault = pointer_fault(arguments[i]);
    check(!fault.empty(), "parameter " + std::to_string(i) + " " + fault, cudaSuccess);
  }
  note("launch", "grid %u %u %u, block %u %u %u, shared %d + %zu, registers %d, device %d%s, %s%s",
       grid.x, grid.y, grid.z, block.x, block.y, block.z, function->shared, dynamic,
       function->registers, thread().device, capture_of(stream) ? ", captured" : "",
       function->name.c_str(), faults.c_str());
  if (!faults.empty()) note("violation", "launch of %s%s", function->name.c_str(), faults.c_str());
  return first ? first : enqueue(stream, function->name.c_str(), [] {});
}
