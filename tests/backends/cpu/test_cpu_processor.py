"""What torch's dense products are taken to have of a processor, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rpg_kernels import native
from rpg_kernels.backends.call import Call
from rpg_kernels.backends.cpu import processor, rules
from rpg_kernels.backends.cpu.tiles import TILES
from rpg_kernels.backends.cpu.units import ROUNDED_READS, UNITS, reads
from rpg_kernels.law.generator import Generator
from rpg_kernels.law.placement import Placement

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PROBES = ("_is_amx_tile_supported", "_is_amx_fp16_supported", "_is_avx512_bf16_supported")
ONEDNN = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
BF16_EMULATED = {"_is_mkldnn_bf16_supported"}
AVX512_BF16 = {*BF16_EMULATED, "_is_avx512_bf16_supported"}
AVX512_FP16 = {*AVX512_BF16, "_is_mkldnn_fp16_supported"}
AMX = {*AVX512_FP16, "_is_amx_tile_supported"}
AMX_FP16 = {*AMX, "_is_amx_fp16_supported"}
# What a processor has, its kind, and the gains of bfloat16 and of float16.
PROCESSORS = {
    "nothing": (set(), "x86_64", 1, 1),
    "AVX-512 that emulates bfloat16": (BF16_EMULATED, "x86_64", 1, 1),
    "AVX512-BF16": (AVX512_BF16, "x86_64", 2, 1),
    "AVX512-FP16": (AVX512_FP16, "x86_64", 2, 2),
    "AVX512-FP16 on Windows": (AVX512_FP16, "AMD64", 2, 2),
    "AMX": (AMX, "x86_64", 16, 2),
    "AMX-FP16": (AMX_FP16, "x86_64", 16, 16),
    "Arm": (set(), "aarch64", 1, 1),
    "Arm with bfloat16": (BF16_EMULATED, "aarch64", 4, 1),
    "Arm with both": (set(ONEDNN), "arm64", 4, 4),
}


class Machine:
    """Sets what a processor has, for as long as a test lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.patch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def be(self, has: set[str], kind: str = "x86_64") -> None:
        processor.dense_gain.cache_clear()
        self.patch.setattr(processor.platform, "machine", lambda: kind)
        for module, probes in ((torch.cpu, PROBES), (torch.ops.mkldnn, ONEDNN)):
            for probe in probes:
                found = probe in has
                self.patch.setattr(module, probe, lambda found=found: found, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    processor.dense_gain.cache_clear()


@pytest.mark.parametrize("name", PROCESSORS)
def test_gains(name: str, machine: Machine) -> None:
    has, kind, bfloat16, float16 = PROCESSORS[name]
    machine.be(has, kind)
    assert [processor.dense_gain(dtype) for dtype in (F32, BF16, F16)] == [1, bfloat16, float16]
    machine.be(AMX_FP16)
    processor.dense_gain(BF16)  # which asks once
    machine.patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert processor.dense_gain(BF16) == 16


def test_torch_without_probes_or_without_onednn(machine: Machine) -> None:
    machine.be(AVX512_FP16)
    machine.patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.dense_gain(BF16) == processor.dense_gain(F16) == 1
    machine.be(BF16_EMULATED)
    machine.patch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for probe in PROBES:
        machine.patch.delattr(torch.cpu, probe)
    assert processor.dense_gain(BF16) == 1


def test_what_this_processor_has() -> None:
    processor.dense_gain.cache_clear()
    assert processor.dense_gain(F32) == 1
    for dtype in (BF16, F16):
        assert processor.dense_gain(dtype) in (1, 2, 4, 16)
    if native.multiplies_pairs():
        assert native.build_info()["isa"] == "avx512"
        assert torch.cpu._is_avx512_bf16_supported()


def weight(laps: int | None) -> str:
    """Of 4096 rows, of which as many share a product as there are laps."""
    return Placement(Generator(1024, 64, "vector", laps=laps), 0, 0, (4096, 64), 1.0).to_json()


@pytest.mark.parametrize("name", PROCESSORS)
def test_kernels_are_taken_where_dense_products_are_slower(name: str, machine: Machine) -> None:
    has, kind, *gains = PROCESSORS[name]
    machine.be(has, kind)
    machine.patch.setattr(native, "multiplies_pairs", lambda: False)
    for dtype, gain in ((F32, 1), *zip((BF16, F16), gains, strict=True)):
        for op in ("linear", "linear_input_grad", "linear_bank_grad"):
            for batch in (1, 32, 33, 5000):
                few = batch <= 32
                assert TILES.faster(op, dtype, batch, weight(None)) == (few or gain == 1)
                for laps in (1, 2, 4, 16, 64):
                    shared = reads(weight(laps))
                    assert shared == laps
                    wanted = few or laps >= 1.5 * gain
                    assert UNITS.faster(op, dtype, batch, weight(laps)) == wanted


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_dispatch_follows(machine: Machine) -> None:
    for has, gain in ((set(), 1), (AVX512_BF16, 2), (AMX, 16), (set(), 1)):
        machine.be(has)
        machine.patch.setattr(native, "multiplies_pairs", lambda: True)
        machine.patch.setattr(native, "threads", lambda: 1)
        for op in ("linear_input_grad", "linear_bank_grad"):
            assert rules.faster(op, BF16, 100, weight(None)) == (gain == 1)
            assert rules.faster(op, BF16, 100, weight(1)) == (gain == 1)
            assert rules.faster(op, BF16, 100, weight(4))
            assert rules.faster(op, BF16, 1000, weight(4)) == (gain <= 2 or "input" in op)
            assert rules.faster(op, F32, 100, weight(None))
            assert rules.faster(op, F32, 100, weight(4))


@pytest.mark.parametrize("name", ["AVX512-BF16", "AVX512-FP16 on Windows", "AMX", "nothing"])
def test_pairs_move_the_rule_where_dense_products_are_dot_products(
    name: str, machine: Machine
) -> None:
    has, kind, gain, _ = PROCESSORS[name]
    machine.be(has, kind)
    for multiplies in (True, False):
        machine.patch.setattr(native, "multiplies_pairs", lambda multiplies=multiplies: multiplies)
        for laps in (1, 2, 3, 4, 16, 64):
            spec = weight(laps)
            shared = reads(spec)
            alone, moved = shared >= 1.5 * gain, shared >= 2
            # Of activations in bfloat16, and backward of sums of at least 3 rows.
            wanted = moved if multiplies and gain >= 2 else alone
            for bank_dtype in (BF16, F32, None):
                assert UNITS.faster("linear", BF16, 33, spec, bank_dtype) == wanted
                grad = UNITS.faster("linear_input_grad", BF16, 33, spec, bank_dtype)
                rounds = shared >= ROUNDED_READS or name == "AMX"
                assert grad == (wanted if rounds else alone)
            assert UNITS.faster("linear", BF16, 33, spec, F16) == alone
            assert UNITS.faster("linear", BF16, 32, spec, BF16)
            assert UNITS.faster("linear", F32, 33, spec, F32) == (shared >= 1.5)


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "native")
def test_dispatch_knows_the_dtype_of_the_bank(machine: Machine) -> None:
    machine.be(AVX512_BF16)
    machine.patch.setattr(native, "multiplies_pairs", lambda: True)
    image = Placement(Generator(1024, 64, "vector", laps=2), 0, 0, (4096, 64, 1, 1), 1.0).to_json()
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    for bank_dtype in (BF16, F32, F16):
        bank, wanted = torch.empty(1024, 64, dtype=bank_dtype), bank_dtype != F16
        call = Call("linear", torch.empty(100, 64, dtype=BF16), weight(2), bank)
        assert rules.Cpu().preferred(call) == wanted
        x = torch.empty(2, 64, 9, 9, dtype=BF16)
        assert rules.Cpu().preferred(Call("conv2d", x, image, bank, geometry)) == wanted
        dy = torch.empty(2, 4096, 9, 9, dtype=BF16)
        call = Call("conv2d_input_grad", dy, image, bank, geometry)
        assert not rules.Cpu().preferred(call)
