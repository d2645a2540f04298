"""rpg.save as a writer of files: whole or not at all, where open() would, and what it refuses."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import build, inputs
from torch import Tensor, nn

import rpg_kernels as rpg


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_is_written_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rpg.save(build(0), path)
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(descriptor: int, error: BaseException = error) -> None:
            assert len(list(path.parent.iterdir())) == 2
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)) as caught:
            rpg.save(build(1), path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        if isinstance(error, OSError):
            assert "cannot be written (No space left on device)" in str(caught.value)


def test_a_file_that_outgrows_its_place(path: Path) -> None:
    """What the library says of the system's error becomes that error."""
    rpg.save(nn.Linear(2, 2), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            rpg.save(nn.Linear(64, 64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_the_file_reaches_the_disk_before_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a)))
    rpg.save(build(), path)
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(umask: int, path: Path) -> None:
    old = os.umask(umask)
    try:
        rpg.save(build(), path)
        (path.parent / "plain").write_bytes(b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    link = path.parent / "link"
    link.symlink_to(path)
    for given in ("model.safetensors", os.fsencode(path), str(link), path):
        rpg.save(build(0), given)
        assert torch.equal(rpg.load(build(1), given)(*inputs()), build(0)(*inputs()))
    assert link.is_symlink()
    path.unlink()
    for call in (rpg.save, rpg.load):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            call(build(), path.parent / "nowhere" / "x")
        with pytest.raises(OSError, match=str(path.parent)):
            call(build(), path.parent)
        with pytest.raises(TypeError):
            call(build(), 3)  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"model: got a dict, wanted an nn\.Module"):
            call({}, path)  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match=str(path)):
        rpg.load(build(), path)
    os.mkfifo(path)
    with pytest.raises(OSError, match="which is not a file"):
        rpg.save(build(), path)
    assert path.is_fifo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(path: Path) -> None:
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written"):
        rpg.save(build(), path)
    path.parent.chmod(0o700)


class WithDict(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


class WithTensor(nn.Module):
    state = torch.zeros(0)

    def get_extra_state(self) -> Tensor:
        return self.state

    def set_extra_state(self, state: Tensor) -> None:
        self.state = state


def test_the_extra_state_of_another_module(path: Path) -> None:
    model, other = nn.ModuleDict({"a": WithTensor()}), nn.ModuleDict({"a": WithTensor()})
    model["a"].state = torch.arange(5)
    rpg.save(model, path)
    assert rpg.load(other, path)["a"].state.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"a\._extra_state: got a dict in the state dict of a,"):
        rpg.save(nn.ModuleDict({"a": WithDict(2, 2)}), path)


def holding(name: str, tensor: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer(name, tensor)
    return model


def wrapped_tensor() -> nn.Module:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    return holding("x", two_tensor.TwoTensor(torch.ones(2), torch.ones(2)))


BAD: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.LazyLinear(3), "weight: got an uninitialised tensor"),
    (lambda: holding("x", torch.eye(2).to_sparse()), "x: got torch.sparse_coo"),
    (lambda: holding("x", torch.zeros(2, dtype=torch.complex128)), "x: got .*complex128"),
    (lambda: holding("__metadata__", torch.zeros(2)), "model: got .*__metadata__"),
    (wrapped_tensor, "x: got a TwoTensor, wanted a plain tensor"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_models_that_no_file_can_hold(
    make: Callable[[], nn.Module], message: str, path: Path
) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        rpg.save(model, path)
    assert not path.exists()
    rpg.save(build(), path)
    with pytest.raises(ValueError, match=message):
        rpg.load(model, path)


def test_a_model_on_meta_is_not_saved(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model: got tensors on meta: gain, .* and \d+ more, want"
    ):
        rpg.save(build(device="meta"), path)
    assert not path.exists()


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = nn.Linear(2, 2)
    rpg.save(model, path)
    path.chmod(0o600)
    rpg.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o600
