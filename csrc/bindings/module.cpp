// The Python module rpg_kernels.native._native. It knows nothing of torch: arguments are integers
// (addresses, sizes, a stream), which rpg_kernels/native checks and takes from tensors.

#include "bindings/module.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/bank.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rpg {
namespace {

void check_layer(int64_t rows, int64_t blocks, int granularity, int64_t slots, int reflect) {
  require(blocks >= 1 && blocks <= kMaxBand, "blocks: wanted 1 to 2^31");
  require(rows >= 1 && rows <= INT64_MAX / blocks, "rows: wanted at least 1, rows * blocks < 2^63");
  require(granularity >= 1 && granularity <= 128 && !(granularity & (granularity - 1)),
          "granularity: wanted a power of two from 1 to 128");
  require(slots >= 1 && slots <= kMaxBand, "slots: wanted 1 to 2^31");
  require(reflect >= 0 && reflect <= 2, "reflect: wanted 0 (none), 1 (vector) or 2 (element)");
}

void check_address(int64_t address, int64_t uses) {
  require(address >= 0 && address <= INT64_MAX - uses, "address: wanted 0 to 2^63 - 1");
}

LayerLaw checked_law(uint64_t seed, uint64_t layer, int64_t rows, int64_t blocks, int granularity,
                     int64_t slots, int64_t start, int reflect, bool permute) {
  check_layer(rows, blocks, granularity, slots, reflect);
  require(start >= 0 && start < slots, "start: wanted 0 to slots - 1");
  return make_layer_law(seed, layer, rows, blocks, granularity, static_cast<uint32_t>(slots),
                        static_cast<uint32_t>(start), static_cast<Reflect>(reflect), permute);
}

// Octets of `rows` rows, of which the last may have fewer.
int64_t octets_of(int64_t rows) { return (rows - 1) / kOctet + 1; }

// Whether so many groups cut the rows of a band into units that the law knows.
bool cuts(int64_t groups, int64_t rows, int64_t taps) {
  const int64_t octets = octets_of(rows);
  return groups >= 1 && groups <= octets && (octets - 1) / groups + 1 <= kMaxUnit / taps;
}

LayerLaw checked_unit_law(uint64_t seed, uint64_t layer, int64_t rows, int64_t blocks,
                          int granularity, int64_t slots, int reflect, bool permute, int64_t laps,
                          int64_t address, int64_t taps, int64_t run_blocks, int64_t groups,
                          int64_t last_groups) {
  check_layer(rows, blocks, granularity, slots, reflect);
  require(blocks <= kMaxBand / kOctet, "blocks: wanted 1 to 2^28");
  require(laps >= 1 && laps <= kMaxUnitLaps, "laps: wanted 1 to 64");
  check_address(address, octets_of(rows) * blocks);
  require(taps >= 1 && taps <= kMaxUnit, "taps: wanted 1 to 2^15");
  require(run_blocks >= 1 && run_blocks <= blocks && blocks % (taps * run_blocks) == 0,
          "run_blocks: wanted taps * run_blocks to divide blocks");
  LayerLaw law = make_unit_law(seed, layer, rows, blocks, granularity, static_cast<uint32_t>(slots),
                               static_cast<uint64_t>(address), static_cast<Reflect>(reflect),
                               permute, static_cast<uint32_t>(laps), static_cast<uint32_t>(taps),
                               static_cast<uint32_t>(run_blocks), 0, 0);
  const int64_t last_rows = rows - (bands_of(law) - 1) * law.rows_per_band;
  require(cuts(groups, law.rows_per_band, taps),
          "groups: wanted 1 to the octets of a band, each of at most 2^15 octets with its taps");
  require(cuts(last_groups, last_rows, taps),
          "last_groups: wanted 1 to the octets of the last band, as groups");
  law.groups = static_cast<uint32_t>(groups);
  law.last_groups = static_cast<uint32_t>(last_groups);
  return law;
}

// Positions outside the layer would be evaluated to slots outside the ring.
Region checked_region(const LayerLaw& law, int64_t first_row, int64_t rows, uintptr_t lookup,
                      int64_t runs, int64_t run_blocks, int64_t low, int64_t count) {
  require(runs >= 1 && run_blocks >= 1 && runs <= law.blocks / run_blocks &&
              runs * run_blocks == law.blocks,
          "runs: wanted runs * run_blocks == blocks");
  require(low >= 0 && count >= 1 && count <= run_blocks - low, "low, count: outside the run");
  require(rows >= 0 && first_row >= 0 && first_row <= law.rows, "first_row: outside the layer");
  const int64_t* numbers = address<const int64_t>(lookup);
  if (numbers) {
    for (int64_t i = 0; i < rows; ++i) {
      require(numbers[i] >= 0 && numbers[i] < law.rows - first_row, "lookup: outside the layer");
    }
  } else {
    require(rows <= law.rows - first_row, "rows: outside the layer");
  }
  return {first_row, rows, numbers, runs, run_blocks, low, count};
}

Cut checked_cut(const LayerLaw& law, int64_t count, int64_t first, int64_t length) {
  const int64_t block = law.granularity;
  require(first >= 0 && first < block, "first: wanted an element of the first block");
  require(length > (count - 1) * block - first && length <= count * block - first && length > 0,
          "length: wanted the last element in the last block");
  return {first, length};
}

Dtype checked_dtype(int dtype) {
  require(dtype >= 0 && dtype <= 3, "dtype: wanted 0 to 3");
  return static_cast<Dtype>(dtype);
}

// Called without the GIL; lists of positions are checked there too.
void check_positions(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    require(n[i] >= 0 && n[i] < law.rows, "n: outside the layer");
    require(b[i] >= 0 && b[i] < law.blocks, "b: outside the layer");
  }
}

void slots(const LayerLaw& law, uintptr_t n, uintptr_t b, int64_t count, uintptr_t out,
           int threads) {
  check_positions(law, address<const int64_t>(n), address<const int64_t>(b), count);
  kernels().slots(law, address<const int64_t>(n), address<const int64_t>(b), count,
                  address<int64_t>(out), threads);
}

void sign_words(const LayerLaw& law, uintptr_t n, uintptr_t b, int64_t count, uintptr_t out,
                int threads) {
  check_positions(law, address<const int64_t>(n), address<const int64_t>(b), count);
  kernels().sign_words(law, address<const int64_t>(n), address<const int64_t>(b), count,
                       address<int64_t>(out), threads);
}

void permutation(const LayerLaw& law, int64_t band, bool inverse, uintptr_t q, int64_t count,
                 uintptr_t out, int threads) {
  require(band >= 0 && band < bands_of(law), "band: outside the layer");
  const int64_t rows = law.rows - band * law.rows_per_band;
  int64_t size = (rows < law.rows_per_band ? rows : law.rows_per_band) * law.blocks;
  if (law.taps) size = law.blocks / law.taps;
  const int64_t* positions = address<const int64_t>(q);
  for (int64_t i = 0; i < count; ++i) {
    require(positions[i] >= 0 && positions[i] < size, "q: outside the band");
  }
  kernels().permutation(law, band, inverse, positions, count, address<int64_t>(out), threads);
}

void unpack(const LayerLaw& law, const GivenBank& given, uintptr_t out, int dtype, double scale,
            int64_t first_row, int64_t rows, uintptr_t lookup, int64_t runs, int64_t run_blocks,
            int64_t low, int64_t count, int64_t first, int64_t length, int threads) {
  const Region region = checked_region(law, first_row, rows, lookup, runs, run_blocks, low, count);
  const Bank bank = checked_bank(law, given);
  const Dtype of_out = checked_dtype(dtype);
  require(bank.dtype == of_out || bank.dtype == Dtype::kInt8, "bank: wanted int8, or out's dtype");
  if (!rows) return;
  kernels().unpack(law, {region, checked_cut(law, count, first, length), of_out, bank,
                         address<void>(out), scale, threads});
}

void pack(const LayerLaw& law, uintptr_t dense, uintptr_t grad, int dtype, double scale,
          int64_t first_row, int64_t rows, uintptr_t lookup, int64_t runs, int64_t run_blocks,
          int64_t low, int64_t count, int64_t first, int64_t length, int threads,
          uintptr_t workspace, int64_t workspace_entries) {
  const Region region = checked_region(law, first_row, rows, lookup, runs, run_blocks, low, count);
  if (!rows) return;
  kernels().pack(law, {region, checked_cut(law, count, first, length), checked_dtype(dtype),
                       address<const void>(dense), address<void>(grad), scale, threads,
                       address<uint32_t>(workspace), workspace_entries});
}

py::dict build_info() {
  py::dict info;
  info["version"] = RPG_VERSION;
  info["law"] = kUnitLawVersion;
  info["compiler"] = RPG_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  const char* names[3];
  py::list isas;
  for (int i = 0, count = compiled_isas(names); i < count; ++i) isas.append(names[i]);
  info["isas"] = isas;
  info["isa"] = kernels().isa;
  info["pairs"] = multiplies_pairs();
  info["int8_products"] = static_cast<int>(best_int8_products());
  info["cuda"] = RPG_CUDA_VERSION;
  info["cuda_architectures"] = RPG_CUDA_ARCHITECTURES;
#if defined(RPG_HAVE_SIMT)
  info["simt"] = true;
#else
  info["simt"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The packing law, unpack and pack in C++ and CUDA; use them through rpg_kernels.";
  m.def("build_info", &build_info, "What was compiled, and which instruction set is in use.");

  py::class_<LayerLaw> law(m, "LayerLaw", "The packing law of one layer.");
  law.def(py::init(&checked_law), py::arg("seed"), py::arg("layer"), py::arg("rows"),
          py::arg("blocks"), py::arg("granularity"), py::arg("slots"), py::arg("start"),
          py::arg("reflect"), py::arg("permute"))
      .def(py::init(&checked_unit_law), py::arg("seed"), py::arg("layer"), py::arg("rows"),
           py::arg("blocks"), py::arg("granularity"), py::arg("slots"), py::arg("reflect"),
           py::arg("permute"), py::arg("laps"), py::arg("address"), py::arg("taps"),
           py::arg("run_blocks"), py::arg("groups"), py::arg("last_groups"))
      .def("slots", &slots, py::call_guard<py::gil_scoped_release>(), py::arg("n"), py::arg("b"),
           py::arg("count"), py::arg("out"), py::arg("threads"))
      .def("sign_words", &sign_words, py::call_guard<py::gil_scoped_release>(), py::arg("n"),
           py::arg("b"), py::arg("count"), py::arg("out"), py::arg("threads"))
      .def("permutation", &permutation, py::call_guard<py::gil_scoped_release>(), py::arg("band"),
           py::arg("inverse"), py::arg("q"), py::arg("count"), py::arg("out"), py::arg("threads"))
      .def("unpack", &unpack, py::call_guard<py::gil_scoped_release>(), py::arg("bank"),
           py::arg("out"), py::arg("dtype"), py::arg("scale"), py::arg("first_row"),
           py::arg("rows"), py::arg("lookup"), py::arg("runs"), py::arg("run_blocks"),
           py::arg("low"), py::arg("count"), py::arg("first"), py::arg("length"),
           py::arg("threads"))
      .def("pack", &pack, py::call_guard<py::gil_scoped_release>(), py::arg("dense"),
           py::arg("grad"), py::arg("dtype"), py::arg("scale"), py::arg("first_row"),
           py::arg("rows"), py::arg("lookup"), py::arg("runs"), py::arg("run_blocks"),
           py::arg("low"), py::arg("count"), py::arg("first"), py::arg("length"),
           py::arg("threads"), py::arg("workspace"), py::arg("workspace_entries"));
  bind_linear(m, law);
  bind_int8(law);
  bind_cuda(m);
#if defined(RPG_HAVE_SIMT)
  bind_development(m);
#endif

  m.def(
      "bandwidth",
      [](uintptr_t words, int64_t count, bool write, int64_t passes, int threads) {
        require(count >= 32 && passes >= 0 && threads >= 1, "bandwidth: wanted 32 words or more");
        return kernels().bandwidth(address<uint64_t>(words), count, write, passes, threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("words"), py::arg("count"),
      py::arg("write"), py::arg("passes"), py::arg("threads"),
      "Reads `passes` times, or reads and writes, a buffer of [threads, count] 64-bit words, each "
      "row by a thread of its own.");
}

}  // namespace rpg
