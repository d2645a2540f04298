"""rpg.save and rpg.load: what goes into a file comes out of it, in every kind of model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brute_force as brute
import pytest
import torch
from checkpoint_files import Net, build, digest, inputs, join, split, values
from safetensors.torch import load_file
from torch import Tensor, nn

import rpg_kernels as rpg
from rpg_kernels.interop.official import from_tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_round_trip(path: Path) -> None:
    model, other = build(0), build(1)
    assert not torch.equal(other(*inputs()), model(*inputs()))
    assert rpg.save(model, path) is None
    assert rpg.load(other, path) is other
    assert torch.equal(other(*inputs()), model(*inputs()))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    rpg.save(build(1), path)  # replaces
    assert torch.equal(rpg.load(model, path)(*inputs()), build(1)(*inputs()))


def test_the_size_is_that_of_the_bank_and_of_what_is_not_shared(path: Path) -> None:
    model = build()
    rpg.save(model, path)
    file = path.read_bytes()
    length = int.from_bytes(file[:8], "little")
    assert length % 8 == 0
    dense = sum(p.numel() for name, p in model.named_parameters() if "rpg_bank" not in name)
    assert dense == 3 * 8 * 9 + 8 + 2 * 8 + 16 + 16 + 5 * 16 + 5 + 1  # the tie once
    buffers = 4 * 8 + 4 * 8 + 8 + 3 + 4 * 6  # norm, its counter, mask, turned
    assert len(file) == 8 + length + 4 * 256 + 4 * dense + buffers
    assert length < 5000


def test_the_metadata(path: Path) -> None:
    model = build(seed=3)
    rpg.save(model, path)
    header, data = split(path.read_bytes())
    metadata = header["__metadata__"]
    assert all(type(value) is str for value in metadata.values())
    assert metadata["rpg_format"] == "1"
    assert metadata["rpg_version"] == rpg.__version__
    assert json.loads(metadata["rpg_banks"]) == {"rpg_bank": model.rpg_bank.map.record()}
    assert json.loads(metadata["rpg_layers"]) == {
        "conv": ["rpg_bank", 0, [0, 16], [0, 8]],
        "mix": ["rpg_bank", 1, [0, 16], [0, 16]],
    }
    assert json.loads(metadata["rpg_aliases"]) == {"head.weight": "embed.weight"}
    assert metadata["rpg_sha256"] == digest(header, data)
    assert not [name for name in header if "map_digits" in name or "passing" in name]


def test_the_digest_does_not_depend_on_the_order_in_the_file(path: Path) -> None:
    rpg.save(build(0), path)
    header, data = split(path.read_bytes())
    entries = [(name, e) for name, e in header.items() if name != "__metadata__"]
    turned, begin, parts = {"__metadata__": header["__metadata__"]}, 0, []
    for name, e in reversed(entries):
        part = data[slice(*e["data_offsets"])]
        turned[name] = {**e, "data_offsets": [begin, begin + len(part)]}
        begin += len(part)
        parts.append(part)
    assert digest(turned, b"".join(parts)) == header["__metadata__"]["rpg_sha256"]
    path.write_bytes(join(turned, b"".join(parts)))
    assert torch.equal(rpg.load(build(1), path).rpg_bank.weight, build(0).rpg_bank.weight)


def test_the_library_reads_it(path: Path) -> None:
    model, other = build(0), build(1)
    rpg.save(model, path)
    state = load_file(path)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["rpg_bank.map_digits", "head.weight"], [])
    assert torch.equal(other(*inputs()), model(*inputs()))


def test_equal_models_give_equal_bytes(path: Path) -> None:
    files = set()
    for _ in range(5):  # the library orders metadata by chance
        rpg.save(build(0), path)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_numpy_is_not_needed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    rpg.save(build(0), path)
    assert torch.equal(rpg.load(build(1), path)(*inputs()), build(0)(*inputs()))


def test_loading_leaves_everything_but_values_alone(path: Path) -> None:
    model, other = build(0), build(1)
    model.mix.virtual_weight.rescale(0.7)
    rpg.save(model, path)
    other.train()
    other.mix.bias.requires_grad_(False)
    bank, parameters = other.rpg_bank, list(other.parameters())
    optimiser = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
    rpg.load(other, path)
    assert other.mix.virtual_weight.bank is other.rpg_bank is bank
    assert other.mix.virtual_weight.scale == 0.7
    assert other.training
    assert [id(p) for p in other.parameters()] == [id(p) for p in parameters]
    assert [n for n, p in other.named_parameters() if not p.requires_grad] == ["mix.bias"]
    other.eval()(*inputs()).sum().backward()
    optimiser.step()
    assert not torch.equal(other.rpg_bank.weight, model.rpg_bank.weight)


@pytest.mark.parametrize("saved", brute.ALL)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_dtypes_are_cast(saved: torch.dtype, loaded: torch.dtype, path: Path) -> None:
    model, other = build(0).to(saved), build(1).to(loaded)
    rpg.save(model, path)
    rpg.load(other, path)
    for key, value in model.state_dict().items():
        got = other.state_dict()[key]
        assert got.dtype == (loaded if value.is_floating_point() else value.dtype)
        assert torch.equal(got, value.to(got.dtype)), key


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
     torch.complex64, torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32,
     torch.uint64, torch.bool],
)  # fmt: skip
def test_every_dtype_of_the_format(dtype: torch.dtype, path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    model.register_buffer("x", torch.tensor([[0, 1], [1, 3]]).to(dtype).t())
    other.register_buffer("x", torch.zeros(2, 2, dtype=dtype))
    rpg.save(model, path)
    for got in (rpg.load(other, path).x, load_file(path)["x"]):
        assert got.dtype == dtype
        assert got.tolist() == model.x.tolist()


def test_ties_and_views(path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        base = torch.randn(4, 6)
        model.a, model.b, model.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        model.a.weight = model.b.weight = nn.Parameter(base)
        model.c.weight = nn.Parameter(base.detach())  # another parameter, the same memory
        model.register_buffer("row", base.detach()[1])
        model.register_buffer("turned", base.detach().t())
        model.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
        return model

    model, other = make(), make()
    rpg.save(model, path)
    header, _ = split(path.read_bytes())
    aliases = json.loads(header["__metadata__"]["rpg_aliases"])
    assert aliases == {"b.weight": "a.weight", "c.weight": "a.weight"}
    assert header["row"]["shape"] == [6]
    assert header["turned"]["shape"] == [6, 4]
    rpg.load(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert other.a.weight is other.b.weight
    assert other.c.weight.data_ptr() == other.a.weight.data_ptr()


def test_a_model_that_is_not_tied_loads_a_tied_one_and_not_the_reverse(path: Path) -> None:
    tied, free = build(0), build(1)
    free.head.weight = nn.Parameter(torch.zeros(5, 16))
    rpg.save(tied, path)
    assert torch.equal(rpg.load(free, path)(*inputs()), tied(*inputs()))
    assert free.head.weight is not free.embed.weight
    rpg.save(free, path)  # two equal tensors
    assert torch.equal(rpg.load(build(2), path)(*inputs()), tied(*inputs()))
    with torch.no_grad():
        free.head.weight[0, 0] += 1
    rpg.save(free, path)
    before = values(tied)
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight: got two tensors"):
        rpg.load(tied, path)
    assert values(tied) == before


class Shared(nn.Module):
    """Two banks, one of them registered twice; a part of a weight."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.bank = self.again = rpg.ParameterBank(dof=256, granularity=16)
        self.other = rpg.ParameterBank(dof=128, granularity=8, reflect="element", seed=5)
        whole = self.bank.place((40, 24), scale=scale)
        self.part = rpg.nn.Linear(24, 30, virtual_weight=whole.narrow(0, 4, 30))
        self.rest = rpg.nn.Embedding(7, 24, bank=self.other, scale=scale)
        self.private = rpg.nn.Linear(30, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.private(self.part(self.rest(labels)))


def table_model() -> nn.Module:
    indices, signs = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0)), [1, -1]
    bank, (first, second) = from_tables(
        torch.randn(9), list(indices), [signs * 3, [-1] * 6], [(2, 3), (3, 2)], [0.5, 2.0]
    )
    layers = (rpg.nn.Linear(*v.shape[::-1], virtual_weight=v) for v in (second, first))
    return rpg.attach(nn.Sequential(*layers), bank)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def bank_alone() -> nn.Module:
    bank = rpg.ParameterBank(dof=100, granularity=4)
    bank.place((3, 8), scale=0.3)
    return bank


MODELS: list[Callable[[], nn.Module]] = [
    Shared, table_model, plain_model, bank_alone, lambda: rpg.nn.Linear(5, 7),
    lambda: build(dof=300).bfloat16(), lambda: nn.ReLU(),
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_models_of_every_kind(make: Callable[[], nn.Module], path: Path) -> None:
    model, other = make(), make()
    rpg.save(model, path)
    rpg.load(other, path)
    rpg.load(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    banks = [m for m in model.modules() if isinstance(m, rpg.ParameterBank)]
    assert sorted(json.loads(split(path.read_bytes())[0]["__metadata__"]["rpg_banks"])) == sorted(
        name for name, m in model.named_modules(remove_duplicate=False) if m in banks
    )


def test_scales_of_several_banks_and_of_parts(path: Path) -> None:
    model, other = Shared(scale=0.3), Shared(scale=2.0)
    rpg.save(model, path)
    rpg.load(other, path)
    x = torch.zeros(1), torch.tensor([1, 6])
    assert torch.equal(other(*x), model(*x))
    assert other.part.virtual_weight.scale == other.rest.virtual_weight.scale == 0.3


def wrap_inner(model: Net) -> Net:
    model.mix = torch.compile(model.mix, backend="aot_eager")  # type: ignore[assignment]
    return model


WRAPS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="aot_eager"),
    "part compiled": wrap_inner,
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda m: nn.DataParallel(torch.compile(m, backend="aot_eager")),
}


@pytest.mark.parametrize("saved", WRAPS)
@pytest.mark.parametrize("loaded", WRAPS)
def test_wrappers_do_not_show(saved: str, loaded: str, path: Path) -> None:
    model, other = WRAPS[saved](build(0)), WRAPS[loaded](build(1))
    rpg.save(model, path)
    assert rpg.load(other, path) is other
    assert list(split(path.read_bytes())[0])[1] == "norm.num_batches_tracked"
    theirs, ours = model.state_dict().values(), other.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_into_meta(path: Path) -> None:
    model = build(0)
    model.mix.virtual_weight.rescale(0.7)
    rpg.save(model.bfloat16(), path)
    far = build(1, device="meta")
    far.gain.requires_grad_(False)
    with torch.device("meta"):
        rpg.load(far, path)
    assert far.rpg_bank.weight.dtype == torch.float32
    assert far.head.weight is far.embed.weight
    assert far.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert [n for n, p in far.named_parameters() if not p.requires_grad] == ["gain"]
    assert [n for n, b in far.named_buffers() if b.is_meta] == ["passing"]
    assert torch.equal(far(*inputs()), model.float()(*inputs()))


def test_into_a_model_partly_on_meta(path: Path) -> None:
    rpg.save(build(0), path)
    model = build(1)
    model.mix.to("meta")
    model.stem.to("meta")
    kept = {name: p for name, p in model.named_parameters() if not p.is_meta}
    rpg.load(model, path)
    assert torch.equal(model(*inputs()), build(0)(*inputs()))
    assert all(model.get_parameter(name) is p for name, p in kept.items())


def test_a_table_and_a_recurrent_layer_into_meta(path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"table": table_model(), "rnn": nn.LSTM(3, 2)})

    torch.manual_seed(0)
    model, far = make(), make().to("meta")
    rpg.save(model, path)
    rpg.load(far, path)
    x = torch.randn(4, 1, 3)
    assert torch.equal(far["rnn"](x)[0], model["rnn"](x)[0])  # it keeps a list of its weights
    y = torch.randn(3, 2)
    assert torch.equal(far["table"](y), model["table"](y))


@pytest.mark.parametrize(
    ("held", "given"),
    [(torch.uint8, torch.float32), (torch.int32, torch.int64), (torch.float32, torch.int64)],
)
def test_a_dtype_that_copying_would_not_keep_is_refused(
    held: torch.dtype, given: torch.dtype, tmp_path: Path
) -> None:
    first, second = nn.Module(), nn.Module()
    first.register_buffer("counts", torch.tensor([1, 300, 2]).to(given))
    second.register_buffer("counts", torch.zeros(3, dtype=held))
    rpg.save(first, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"counts: got {given}, wanted {held}"):
        rpg.load(second, tmp_path / "a.safetensors")
    assert not second.counts.any()


def test_a_tensor_that_cannot_be_copied_into_is_refused_before_any_other_changes(
    tmp_path: Path,
) -> None:
    def build(value: float, second: torch.Tensor) -> nn.Module:
        model = nn.Module()
        model.register_buffer("a", torch.full((2,), value))
        model.register_buffer("b", second)
        return model

    rpg.save(build(1.0, torch.ones(4, 3)), tmp_path / "a.safetensors")
    with torch.inference_mode():
        inference = torch.ones(4, 3)
    for second in (torch.ones(1, 3).expand(4, 3), inference):
        model = build(0.0, second)
        with pytest.raises(ValueError, match=r"b: got an (expanded|inference) tensor"):
            rpg.load(model, tmp_path / "a.safetensors")
        assert not model.a.any()
