"""The choice of a back end: registry, forced back ends, environment, explain, backward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import brute_force as brute
import pytest
import torch
from recorder import MODULES, Recorder
from torch import Tensor

import rpg_kernels as rpg
from rpg_kernels import native, settings
from rpg_kernels.backends import dispatch, registry
from rpg_kernels.backends.call import OPERATORS, Call
from rpg_kernels.doctor import environment
from rpg_kernels.ops.stored import READERS


@pytest.fixture
def weight() -> rpg.VirtualWeight:
    return brute.bank_of(640, torch.float32, granularity=16).place((9, 20))


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """What a back end "recorder" is asked for, which is never taken unless it is forced."""
    recorder = Recorder()
    registry.register(recorder)
    yield recorder.seen
    registry.unregister("recorder")


def test_every_operator_has_a_reference() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rpg_kernels::")
    }
    twins = {f"{name}_stored" for name in READERS}  # which become operators of the reference too
    both = {"linear_grads", "conv2d_grads"}  # which are two of them
    assert registered == {*OPERATORS, *both, *twins}
    for name, file in OPERATORS.items():
        call = Call(name, torch.empty(0), forced="reference")
        assert dispatch.implementation(call) is getattr(MODULES[file], name)


def test_a_back_end_of_one_file_is_chosen_explained_and_forced(weight: rpg.VirtualWeight) -> None:
    """All that a new back end needs is an object and a registration."""
    recorder = Recorder(lambda call: call.op == "linear" and call.rows >= 3)
    layer = rpg.nn.Linear(20, 9, bank=weight.bank)
    few, many = torch.randn(2, 20), torch.randn(3, 20)
    before = layer(many)
    with rpg.backend("reference"):  # which the recorder runs
        wanted = layer(many)
    registry.register(recorder, before=registry.names()[0])
    try:
        assert torch.equal(layer(many), wanted)
        assert recorder.seen == ["linear"]
        layer(few)
        assert recorder.seen == ["linear"]
        assert rpg.explain(layer, many).backend == "recorder"
        assert rpg.explain(layer, many).reason == "a recorder"
        left = rpg.explain(layer, few)
        assert left.backend != "recorder"
        assert "not wanted" in left.reason.split("; ")
        with rpg.backend("recorder"):
            assert rpg.explain(layer, few).backend == "recorder"
            layer(few)
            assert recorder.seen == ["linear", "linear"]
            refused = r"backend: got 'recorder' for linear on cpu in torch.float16, which cannot "
            refused += r"run: no recorder works in float16; wanted one of: (?!.*recorder)"
            for call in (lambda x: layer(x), lambda x: rpg.explain(layer, x)):
                with pytest.raises(RuntimeError, match=refused):
                    call(few.half())
        with rpg.backend("reference"):
            layer(many)
            assert rpg.explain(layer, many).backend == "reference"
        assert recorder.seen == ["linear", "linear"]
        lines = [line for line in environment.backends() if line["dtype"] == "float32"]
        assert all("recorder" in line["reason"] for line in lines if line["device"] == "cpu")
    finally:
        registry.unregister("recorder")
    assert "recorder" not in registry.names()
    with pytest.raises(ValueError, match="name: got 'recorder', wanted one of 'auto'"):
        rpg.backend("recorder")
    assert torch.equal(layer(many), before)


def test_order_and_names_of_the_registry() -> None:
    before = registry.names()
    assert before[-1] == "reference"  # it takes everything
    for taken in (*before, "auto", ""):
        other = Recorder()
        other.name = taken
        with pytest.raises(ValueError, match=r"backend\.name: got .*, wanted a name"):
            registry.register(other)
    with pytest.raises(ValueError, match="before: got 'nobody', wanted one of"):
        registry.register(Recorder(), before="nobody")
    with pytest.raises(ValueError, match="name: got 'recorder', wanted one of"):
        registry.unregister("recorder")
    assert registry.names() == before
    registry.register(Recorder(), before="cpu")
    at = before.index("cpu")
    assert registry.names() == (*before[:at], "recorder", *before[at:])
    registry.unregister("recorder")
    assert registry.names() == before


def test_registering_leaves_calls_that_are_being_decided_alone() -> None:
    """They run on other threads; the registry was emptied once, and filled again."""
    for change in (registry.register, lambda _: registry.unregister("recorder")):
        before, asked = registry.names(), registry.backends()
        seen = [next(asked).name]
        change(Recorder())
        seen += [backend.name for backend in asked]
        assert tuple(seen) == before


def test_an_operator_that_is_forced_to_an_unknown_name(weight: rpg.VirtualWeight) -> None:
    """As an exported program may be, that was made where the back end was registered."""
    sentence = (
        "backend: got 'nobody' for unpack on cpu in torch.float32, .* no such back end; wanted"
    )
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.rpg_kernels.unpack(weight.bank.weight, None, weight.spec, "nobody")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_forced_back_end_that_cannot_run_raises(name: str, weight: rpg.VirtualWeight) -> None:
    x = torch.randn(2, 20)
    kernel = weight.bank.place((4, 3, 3, 3))
    y = rpg.functional.linear(x, weight)
    calls = {
        "linear": lambda: rpg.functional.linear(x, weight),
        "conv2d": lambda: rpg.functional.conv2d(torch.randn(1, 3, 5, 5), kernel),
        "embedding": lambda: rpg.functional.embedding(torch.tensor([1]), weight),
        "unpack": weight.unpack,
        "pack": lambda: weight.pack(torch.randn(9, 20)),
    }
    with rpg.backend(name):
        for operator, call in calls.items():
            sentence = (
                rf"backend: got '{name}' for {operator} on cpu in torch.float32, .*"
                r"wanted one of: .*reference"
            )
            with pytest.raises(RuntimeError, match=sentence):
                call()
        y.sum().backward()  # its forward ran on the reference
    calls["linear"]()  # the setting is restored


def test_backend_as_setter_and_as_context(weight: rpg.VirtualWeight) -> None:
    restore = rpg.backend("reference")
    assert settings.forced_backend() == "reference"
    with rpg.backend("auto"):
        assert settings.forced_backend() == ""
        with rpg.backend("cuda"):
            assert settings.forced_backend() == "cuda"
        assert settings.forced_backend() == ""
    assert settings.forced_backend() == "reference"
    with restore:
        pass
    assert settings.forced_backend() == ""
    with pytest.raises(RuntimeError, match="triton"), rpg.backend("triton"):
        weight.unpack()
    assert settings.forced_backend() == ""  # also after an exception


def test_the_choice_of_the_forward_is_kept_for_its_backward(
    weight: rpg.VirtualWeight, calls: list[str]
) -> None:
    x = torch.randn(2, 20, requires_grad=True)
    with rpg.backend("recorder"):
        y = rpg.functional.linear(x, weight)
    assert calls == ["linear"]
    y.sum().backward()  # outside, and on the threads of autograd
    assert sorted(calls) == ["linear", "linear_bank_grad", "linear_input_grad"]

    calls.clear()
    y = rpg.functional.linear(x, weight)
    with rpg.backend("recorder"):
        y.sum().backward()
    assert not calls


def test_the_choice_is_kept_through_double_backward_and_by_every_operator(
    weight: rpg.VirtualWeight, calls: list[str]
) -> None:
    kernel = weight.bank.place((4, 3, 3, 3))
    x, image = torch.randn(2, 20, requires_grad=True), torch.randn(1, 3, 5, 5, requires_grad=True)
    with rpg.backend("recorder"):
        results = [
            rpg.functional.linear(x, weight),
            rpg.functional.conv2d(image, kernel, padding="same"),
            rpg.functional.embedding(torch.tensor([1, 2]), weight, padding_idx=2),
            weight.unpack(),
            weight.pack(torch.randn(9, 20, requires_grad=True)),
        ]
    loss = sum((result**3).sum() for result in results)
    bank = weight.bank.weight
    first = torch.autograd.grad(loss, (bank, x, image), create_graph=True)
    assert set(calls) == set(OPERATORS)
    calls.clear()
    sum((grad**2).sum() for grad in first).backward()  # type: ignore[union-attr]
    wanted = {"linear", "linear_input_grad", "conv2d", "conv2d_bank_grad", "unpack", "pack"}
    assert wanted <= set(calls)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_forces_a_back_end_until_a_call_does() -> None:
    code = """
import rpg_kernels as rpg
weight = rpg.ParameterBank(64, granularity=16).place((3, 5))
try:
    weight.unpack()
except RuntimeError as error:
    print(error)
for name in ("reference", "auto"):
    with rpg.backend(name):
        print(tuple(weight.unpack().shape))
"""
    done = run_python(code, RPG_KERNELS_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("backend: got 'triton' for unpack on cpu in torch.float32")
    assert lines[1:] == ["(3, 5)", "(3, 5)"]


def test_environment_with_an_unknown_name() -> None:
    """The package imports; what asks for a back end says what is wrong, a call wins over it."""
    code = """
import rpg_kernels as rpg
layer = rpg.nn.Linear(5, 3, bank=rpg.ParameterBank(64, granularity=16))
x = rpg.ParameterBank(10, granularity=1).weight.view(2, 5)
for call in (lambda: layer(x), lambda: rpg.explain(layer, x), layer.virtual_weight.unpack):
    try:
        call()
    except ValueError as error:
        print(error)
with rpg.backend("auto"):
    print(tuple(layer(x).shape))
"""
    done = run_python(code, RPG_KERNELS_BACKEND="cudnn")
    assert done.returncode == 0, done.stderr
    wanted = ", ".join(("auto", *registry.names()))
    sentence = f"RPG_KERNELS_BACKEND: got 'cudnn', wanted one of {wanted}"
    assert done.stdout.splitlines() == [sentence] * 3 + ["(2, 3)"]


@pytest.mark.parametrize(
    ("value", "name"), [("reference", "reference"), ("auto", "auto"), ("", "")]
)
def test_environment_that_changes_nothing(
    value: str, name: str, monkeypatch: pytest.MonkeyPatch, weight: rpg.VirtualWeight
) -> None:
    monkeypatch.setattr(settings, "_ENVIRONMENT", value)
    assert settings.forced_backend() == ("" if name == "auto" else name)
    weight.unpack()


def test_explain(weight: rpg.VirtualWeight) -> None:
    bank = weight.bank
    layers = {
        "linear": (rpg.nn.Linear(32, 9, bank=bank), torch.randn(2, 32)),
        "conv2d": (rpg.nn.Conv2d(3, 4, 3, bank=bank), torch.randn(1, 3, 5, 5)),
        "embedding": (rpg.nn.Embedding(9, 20, bank=bank), torch.tensor([1])),
    }
    for operator, (layer, x) in layers.items():
        with rpg.scratch_limit(12345):
            e = rpg.explain(layer, x)
        assert (e.op, e.backend, e.device, e.dtype) == (
            operator,
            "cpu" if operator != "conv2d" and native.available() else "reference",
            "cpu",
            "torch.float32",
        )
        assert e.scratch_limit == 12345
        assert e.reason
        for part in (e.op, e.backend, e.reason, e.dtype, "12345"):
            assert part in str(e)
        with rpg.backend("triton"), pytest.raises(RuntimeError, match="backend: got 'triton'"):
            rpg.explain(layer, x)
        with rpg.backend("reference"):
            assert rpg.explain(layer, x).backend == "reference"


def test_explain_knows_autocast_and_low_precision() -> None:
    bank = brute.bank_of(640, torch.float32, granularity=16)
    layer, lookup = rpg.nn.Linear(20, 9, bank=bank), rpg.nn.Embedding(9, 20, bank=bank)
    x = torch.randn(2, 20)
    assert rpg.explain(layer, x.half()).dtype == "torch.float16"
    with torch.autocast("cpu", torch.bfloat16):
        assert rpg.explain(layer, x).dtype == "torch.bfloat16"
        assert rpg.explain(lookup, torch.tensor([1])).dtype == "torch.float32"


def test_explain_says_what_a_forced_back_end_would_do(
    weight: rpg.VirtualWeight, calls: list[str]
) -> None:
    layer = rpg.nn.Linear(20, 9, bank=weight.bank)
    with rpg.backend("recorder"):
        e = rpg.explain(layer, torch.randn(2, 20))
    assert (e.backend, e.reason) == ("recorder", "a recorder")
    assert not calls


@pytest.mark.parametrize("module", [torch.nn.Linear(3, 4), torch.nn.Sequential(), None, 3])
def test_explain_of_something_else(module: object) -> None:
    with pytest.raises(TypeError, match=r"module: got \w+, wanted an rpg layer"):
        rpg.explain(module, torch.randn(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operator", "x"),
    [
        ("linear", torch.randn(())),
        ("linear", torch.randn(2, 19)),
        ("linear", torch.ones(2, 20, dtype=torch.int64)),
        ("linear", torch.randn(2, 20, device="meta")),
        ("conv2d", torch.randn(5)),
        ("conv2d", torch.randn(3, 5)),
        ("conv2d", torch.randn(2, 3, 1, 5, 5)),
        ("conv2d", torch.randn(1, 4, 5, 5)),
        ("conv2d", torch.randn(1, 3, 2, 2)),
        ("conv2d", torch.randn(1, 3, 5, 5, dtype=torch.float64)),
        ("embedding", torch.randn(2)),
    ],
)
def test_explain_refuses_what_the_layer_refuses(
    operator: str, x: Tensor, weight: rpg.VirtualWeight
) -> None:
    """In the same words; a convolution once raised an IndexError."""
    layer = {
        "linear": rpg.nn.Linear(20, 9, bank=weight.bank),
        "conv2d": rpg.nn.Conv2d(3, 4, 3, bank=weight.bank),
        "embedding": rpg.nn.Embedding(9, 20, bank=weight.bank),
    }[operator]
    with pytest.raises((TypeError, ValueError), match=r"got .*, wanted ") as said:
        layer(x)
    with pytest.raises(said.type) as explained:
        rpg.explain(layer, x)
    assert str(explained.value) == str(said.value)
    assert explained.value.__context__ is None


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_explain_takes_what_the_layer_takes(
    padding: int | str, mode: str, monkeypatch: pytest.MonkeyPatch, weight: rpg.VirtualWeight
) -> None:
    """Unbatched images, every padding; what it says is what runs, and it runs nothing."""
    layer = rpg.nn.Conv2d(3, 4, (2, 3), padding=padding, padding_mode=mode, bank=weight.bank)
    asked: list[Call] = []
    real = dispatch.implementation

    def implementation(call: Call) -> Callable[..., Tensor]:
        asked.append(call)
        return real(call)

    monkeypatch.setattr(dispatch, "implementation", implementation)
    for x in (torch.randn(2, 3, 6, 7), torch.randn(3, 6, 7), torch.randn(0, 3, 6, 7)):
        explained = rpg.explain(layer, x)
        assert not asked
        layer(x)
        assert [call.op for call in asked] == [explained.op]
        assert dispatch.choose(asked.pop()).name == explained.backend
        with rpg.backend("reference"):
            assert rpg.explain(layer, x).backend == "reference"


def test_a_forced_cpu_back_end_refuses_in_explain_too(weight: rpg.VirtualWeight) -> None:
    table = brute.table_bank(20, 77, torch.float32).place((7, 11))
    lookup = rpg.nn.Embedding(7, 11, virtual_weight=table)
    grouped = rpg.nn.Conv2d(128, 64, 1, groups=2, bank=rpg.ParameterBank(64 * 512))
    for layer, x in ((lookup, torch.tensor([1])), (grouped, torch.randn(1, 128, 2, 2))):
        with rpg.backend("cpu"):
            with pytest.raises(RuntimeError, match="backend: got 'cpu'") as said:
                layer(x)
            with pytest.raises(RuntimeError) as explained:
                rpg.explain(layer, x)
        assert str(explained.value) == str(said.value)
