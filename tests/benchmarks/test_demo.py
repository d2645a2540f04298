"""The demo: image loaders, measurements, the published network, the command line, a tiny run."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.harness import memory
from examples.demo import data, experiment, networks, train
from examples.demo.__main__ import main as demo_main
from examples.demo.published import PublishedConv2d, share_as_published
from rpg_kernels import RPGConfig
from rpg_kernels._extras import MissingExtraError, require
from rpg_kernels.models.resnet import ResNet, is_block_convolution

CPU = torch.device("cpu")
SCHEDULE = train.Schedule(epochs=1, batch_size=16, lr=0.1)


def cifar_batch(images: int = 3) -> dict[Any, Any]:
    pixels = np.arange(images * 3072).astype(np.uint8).reshape(images, 3072)
    return {b"data": pixels, b"labels": [i % 10 for i in range(images)], b"batch_label": b"x"}


def write_cifar(folder: Path, **replaced: object) -> Path:
    folder.mkdir(parents=True)
    for name in (*data.CIFAR_TRAIN_FILES, data.CIFAR_TEST_FILE):
        batch = replaced.get(name, cifar_batch())
        content = batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content)
    return folder


def jpeg(value: int, side: int = 32, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side), value if mode == "L" else (value, 128, 255 - value)).save(
        stream, "JPEG", quality=95
    )
    return stream.getvalue()


def jpeg_arrays(images: list[bytes]) -> dict[str, np.ndarray[Any, Any]]:
    split = {
        "jpeg": np.frombuffer(b"".join(images), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, images)]),
        "labels": np.arange(len(images), dtype=np.uint8) % 2,
    }
    arrays = {
        f"{name}_{part}": value for name in ("train", "test") for part, value in split.items()
    }
    return {**arrays, "classes": np.array(["cat", "dog"])}


def write_npz(path: Path, **replaced: Any) -> Path:
    arrays = {**jpeg_arrays([jpeg(10), jpeg(200), jpeg(90)]), **replaced}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_digits_have_a_fixed_split() -> None:
    images = data.load(None)
    assert images.train_pixels.shape == (1438, 1, 8, 8)
    assert images.test_pixels.shape == (359, 1, 8, 8)
    assert images.train_pixels.dtype == torch.uint8
    assert images.train_pixels.max() == 255
    assert images.train_labels[:6].tolist() == [0, 1, 2, 3, 5, 6]
    few = data.load(None, images=20, test_images=5)
    assert torch.equal(few.train_pixels, images.train_pixels[:20])
    assert len(few.test_labels) == 5


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar_folder(tmp_path: Path, inner: str) -> None:
    write_cifar(tmp_path / "set" / inner)
    images = data.load(str(tmp_path / "set"), images=7)
    assert images.train_pixels.shape == (7, 3, 32, 32)
    assert images.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert images.train_pixels[1, 2, 31, 31] == (2 * 3072 - 1) % 256
    assert images.test_pixels.shape == (3, 3, 32, 32)


def test_cifar_pickle_of_python_2(tmp_path: Path) -> None:
    # Written by hand: the opcodes of Python 2's protocol 2, where str is bytes.
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tb"
    )
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au."
    write_cifar(tmp_path / "set", test_batch=content)
    images = data.load(str(tmp_path / "set"))
    assert images.test_labels.tolist() == [7]
    assert bytes(images.test_pixels.flatten().tolist()) == pixels


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_cifar_pickle_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write_cifar(tmp_path / "set", data_batch_1={b"data": Touch(mark)})
    with pytest.raises(ValueError, match=r"data_batch_1: .*wanted NumPy arrays"):
        data.load(str(tmp_path / "set"))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"", "cannot be read"),
        (pickle.dumps(cifar_batch(), protocol=2)[:500], "cannot be read"),
        ([1, 2], "got a list, wanted a dict"),
        ({b"labels": [1]}, "data: got NoneType, wanted a uint8 array"),
        ({**cifar_batch(), b"data": np.zeros((3, 3072))}, "got float64, wanted a uint8"),
        ({**cifar_batch(), b"data": np.zeros((3, 9), np.uint8)}, r"wanted \[images, 3072\]"),
        ({**cifar_batch(), b"labels": [1, 2]}, "labels: got 2, wanted 3"),
        (cifar_batch(0), "labels: got 0, wanted at least one"),
        ({**cifar_batch(), b"labels": [1, 2, 2**63]}, "got an int of 64 bits"),
        ({**cifar_batch(), b"labels": [1, 2, 10]}, "labels: got 1 to 10, wanted 0 to 9"),
        ({**cifar_batch(), b"labels": [1, 2, "a"]}, "wanted a list of int"),
    ],
)
def test_damaged_cifar_batches(tmp_path: Path, batch: object, message: str) -> None:
    write_cifar(tmp_path / "set", data_batch_2=batch)
    with pytest.raises(ValueError, match=r"data_batch_2: .*" + message):
        data.load(str(tmp_path / "set"))


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted data_batch_1 to data_batch_5"):
        data.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load(str(tmp_path / "nothing"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"wanted a cifar-10-batches-py folder or an \.npz"):
        data.load(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="images: got 0, wanted at least 1"):
        data.load(None, images=0)


def test_npz_of_jpegs(tmp_path: Path) -> None:
    images = data.load(str(write_npz(tmp_path / "a.npz")), test_images=2)
    assert images.train_pixels.shape == (3, 3, 32, 32)
    assert images.test_labels.tolist() == [0, 1]
    assert images.classes == ("cat", "dog")
    # JPEG is lossy, but not on a plain colour.
    assert (images.train_pixels[1, :, 5, 5].int() - torch.tensor([200, 128, 55])).abs().max() <= 3


NOT_JPEG = [jpeg(10), b"not a JPEG", jpeg(90)]
WRONG_SIZE = [jpeg(10), jpeg(10, side=31)]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels": None}, "got no train_labels"),
        ({"train_labels": np.array([0, 1, 2])}, "train_labels: got 0 to 2, wanted 0 to 1"),
        ({"train_labels": np.array([0, 1])}, "train_offsets: got 4 for 2 labels, wanted 3"),
        ({"test_labels": np.array([0.0, 1, 1])}, "test_labels: got float64"),
        ({"train_offsets": np.array([0, 5, 4, 9])}, "train_offsets: got values from 0 to 9"),
        ({"train_jpeg": np.zeros((2, 2), np.uint8)}, "train_jpeg: got uint8"),
        ({"train_jpeg": np.zeros(4, np.int32)}, "train_jpeg: got int32, wanted uint8"),
        ({"train_jpeg": np.array([{}], dtype=object)}, "cannot be used"),
        (jpeg_arrays(NOT_JPEG), "train image 1: got bytes that are no such JPEG"),
        (jpeg_arrays(WRONG_SIZE), "train image 1: .*got 31x31, wanted 32x32"),
    ],
)
def test_damaged_npz(tmp_path: Path, replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(str(write_npz(tmp_path / "a.npz", **replaced)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_file_that_is_no_npz(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: got a file that cannot be used"):
        data.load(str(path))


def test_augment_moves_each_image_by_itself() -> None:
    pixels = torch.arange(64 * 64, dtype=torch.int64).view(1, 1, 64, 64).expand(500, 2, -1, -1)
    moved = train.augment(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert torch.equal(moved[:, 0], moved[:, 1])
    # Away from the border every image is the original, flipped or not and shifted by at most 4.
    step = (moved[:, 0, 30, 31] - moved[:, 0, 30, 30]).unique()
    assert step.tolist() == [-1, 1]
    row = moved[:, 0, 30, 30] // 64
    assert row.min() == 26
    assert row.max() == 34


def test_pixels_are_normalised_and_channels_last(tmp_path: Path) -> None:
    images = data.load(None)
    values = train.Pixels(images, CPU).batch(images.train_pixels)
    assert abs(values.mean()) < 1e-5
    assert abs(values.std() - 1) < 1e-4
    coloured = data.load(str(write_npz(tmp_path / "a.npz")))
    values = train.Pixels(coloured, CPU).batch(coloured.train_pixels)
    assert values.is_contiguous(memory_format=torch.channels_last)


def small(width: int = 8) -> ResNet:
    return ResNet((1, 1), 10, "cifar", width, in_channels=1)


def test_published_network_samples_evenly_and_computes_what_it_says() -> None:
    model = share_as_published(small(), 100, is_block_convolution)
    layers = [m for m in model.modules() if isinstance(m, PublishedConv2d)]
    assert len(layers) == 5
    uses = torch.cat([layer.index.flatten() for layer in layers]).bincount(minlength=100)
    assert uses.max() - uses.min() <= 1
    assert set(torch.cat([layer.sign.flatten() for layer in layers]).tolist()) == {-1.0, 1.0}
    assert [name for name, _ in model.named_parameters() if "ring" in name] == ["ring.w"]

    layer = layers[1]
    ring = model.get_parameter("ring.w").detach().flatten()
    weight = torch.zeros_like(layer.sign)
    for position in np.ndindex(*weight.shape):
        value = ring[layer.index[position]] * layer.sign[position]
        weight[position] = value * (4608 / (weight.shape[0] * 9)) ** 0.5
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, weight, padding=1))
    with pytest.raises(ValueError, match="dof: got 0"):
        share_as_published(small(), 0, is_block_convolution)


def test_measured_bytes_of_dense_and_published_networks() -> None:
    batch = torch.randn(4, 1, 8, 8)
    dense, published = small(), share_as_published(small(), 100, is_block_convolution)
    weights = sum(m.sign.numel() for m in published.modules() if isinstance(m, PublishedConv2d))

    saved = memory.saved_by_model(dense, batch)
    assert saved.beyond_activations == 0
    assert saved.activations > 4 * 8 * 64 * 4
    kept = memory.saved_by_model(published, batch)
    assert kept.activations == saved.activations
    # int64 index and fp32 sign, and the materialised weight: 16 bytes per virtual weight.
    assert kept.tables == 12 * weights
    assert kept.weights == 4 * weights

    for model, tables in ((dense, 0), (published, 12 * weights)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(batch).sum().backward()
        optimizer.step()
        state = memory.of_model(model, optimizer)
        size = 4 * networks.trainable(model)
        assert (state.parameters, state.gradients, state.optimizer) == (size, size, size)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert state.tables == tables + sum(8 * m.num_features + 8 for m in norms)
        assert before.keys() == model.state_dict().keys()


def test_measuring_leaves_the_model_alone() -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    memory.saved_by_model(model, torch.randn(4, 1, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("width", "sound"), [(4, False), (16, True)])
def test_training_leaves_out_convolutions_that_damage_memory(width: int, sound: bool) -> None:
    used: list[bool] = []
    pixels = train.Pixels(data.load(None, 16, 4), torch.device("cpu"))
    model = ResNet((1, 1), 10, "cifar", width, 1)
    before = torch.backends.mkldnn.enabled
    train.fit(model, pixels, SCHEDULE, 0, lambda _: used.append(torch.backends.mkldnn.enabled))
    assert used
    assert set(used) == {before and sound}
    assert torch.backends.mkldnn.enabled == before


def test_plan_narrows_to_the_parameters_of_the_smallest() -> None:
    architecture = networks.ARCHITECTURES["small"]
    config = RPGConfig(dof=1)
    rows = networks.plan(architecture, 1, 10, config, [8192, 4096])
    assert [row.kind for row in rows] == ["dense", "dense", "published", "rpg", "rpg"]
    assert [row.dof for row in rows] == [None, None, 4096, 4096, 8192]
    sizes = [networks.trainable(networks.build(r, architecture, 1, 10, config)) for r in rows]
    assert 0.5 * sizes[3] < sizes[1] <= sizes[3]
    assert networks.block_weights(architecture, 32, 1, 10) == 305_152
    assert networks.block_weights(architecture, 64, 1, 10) == 1_220_608
    with pytest.raises(ValueError, match="dof: got \\[\\], wanted"):
        networks.plan(architecture, 1, 10, config, [])


def test_plan_takes_no_more_laps_than_the_compression() -> None:
    architecture = networks.ARCHITECTURES["small"]
    dofs = [4096, 600_000, 2_000_000]
    cases: list[tuple[list[int | None], list[int | None]]] = [
        ([4], [4, 2, 1]),
        ([16], [16, 2, 1]),
        ([None], [None] * 3),
        ([None, 9, 1], [None, 2, 1]),
    ]
    for laps, expected in cases:
        rows = networks.plan(architecture, 1, 10, RPGConfig(dof=1), dofs, laps)[3:]
        assert [row.laps for row in rows] == expected
        for row in rows:
            networks.build(row, architecture, 1, 10, RPGConfig(dof=1))
    # Pairs of DoF and laps stay together.
    rows = networks.plan(architecture, 1, 10, RPGConfig(dof=1), [8192, 4096], [2, 3])[3:]
    assert [(row.dof, row.laps) for row in rows] == [(4096, 3), (8192, 2)]
    with pytest.raises(ValueError, match="laps: got 2 of them, wanted 1, or 3 as of dof"):
        networks.plan(architecture, 1, 10, RPGConfig(dof=1), dofs, [2, 3])


def test_steps_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = train.Pixels(data.load(None, 64, 8), CPU)
    now, models = [0.0], [small() for _ in range(3)]
    order: list[int] = []

    def step(model: nn.Module, *_: object) -> None:
        order.append(models.index(model))
        # The machine becomes slower and slower; model i takes 1, 2, 3 times as long.
        now[0] += (1 + order[-1]) * (1 + len(order) // 3)

    monkeypatch.setattr(train, "step", step)
    monkeypatch.setattr(train, "_now", lambda device: now[0])
    seconds = train.step_seconds(models, pixels, SCHEDULE)
    assert len(order) == 3 * (train.STEP_ROUNDS + 1)
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in range(0, len(order), 3))
    middle = train.STEP_ROUNDS // 2 + 2
    assert [s / (i + 1) for i, s in enumerate(seconds)] == pytest.approx([middle] * 3, abs=1)


def test_missing_extra_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"^the plot needs no-such: pip install no-such$"):
        require("no_such_module", "no-such", "the plot")


def run(arguments: list[str]) -> int:
    return demo_main(arguments)


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--images 96 --test-images 40 --epochs 1 --batch-size 32 --dof 2048,8192 --seeds 2"
    out = tmp_path / "out"
    assert run([*arguments.split(), "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("as published", "narrowed", "DoF", "accuracy", "identical", "back end"):
        assert text in printed
    assert "DIFFER" not in printed
    with Image.open(out / "demo.png") as image:
        assert image.width > 1000
    record = json.loads((out / "demo.json").read_text())
    assert record["reloaded_outputs_identical"] is True
    assert record["data"] == {
        "name": "digits (scikit-learn)",
        "train_images": 96,
        "test_images": 40,
    }
    assert record["environment"]["torch"] == torch.__version__
    by_kind = {row["kind"]: row for row in record["networks"]}
    assert by_kind["published"]["saved_bytes_beyond_activations_per_virtual_weight"] == 16
    assert by_kind["rpg"]["saved_bytes_beyond_activations"] == 0
    assert by_kind["rpg"]["dof"] == 8192
    assert by_kind["rpg"]["virtual_weights"] == 1_220_608
    assert by_kind["rpg"]["laps"] == 4
    for row in record["networks"]:
        assert len(row["accuracy"]) == len(row["curves"]) == 2
        assert [len(curve) for curve in row["curves"]] == [1, 1]
        # 96 images in an epoch.
        assert row["images_per_second"] == pytest.approx(96 / row["seconds"])
    # Weights, gradients and momentum, the running statistics of norms, and the digits of the map.
    assert by_kind["rpg"]["state_bytes"] < 12 * by_kind["rpg"]["trainable"] + 18_000
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png", "demo.pt"]


def test_a_run_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    """With the same options; its last network is trained in any case, for the state to save."""
    arguments = "--images 32 --test-images 10 --epochs 1 --batch-size 32 --dof 2048 --seeds 1"
    path, mark = tmp_path / "demo.json", [[123.0]]

    def made() -> dict[str, Any]:
        assert run([*arguments.split(), "--out", str(tmp_path)]) == 0
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    record = made()
    wanted = [mark, *(network["curves"] for network in record["networks"][1:])]
    same = {key: record[key] for key in ("data", "schedule", "plan", "seeds")}
    assert experiment._finished(path, same) == []  # it came to its end
    del record["networks"][2:], record["total_seconds"]
    record["networks"][0]["curves"] = mark
    path.write_text(json.dumps(record))
    found = experiment._finished(path, {**same, "environment": None})
    assert [result.curves for result in found] == wanted[:2]
    for key in same:
        assert experiment._finished(path, {**same, key: None}) == []
    for broken in ("", "{", "[1]", "null"):
        (tmp_path / "broken.json").write_text(broken)
        assert experiment._finished(tmp_path / "broken.json", same) == []
    assert experiment._finished(tmp_path / "none.json", same) == []
    assert [network["curves"] for network in made()["networks"]] == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data /nowhere/at/all", "does not exist"),
        ("--granularity 3", "granularity: got 3"),
        ("--device banana", "device: got 'banana', wanted cpu"),
    ],
)
def test_bad_options_end_with_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments.split()) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_options_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["--dof", "1000,x"])
    assert "got 'x', wanted a positive whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["--laps", "ring"])
    assert "got 'ring', wanted a positive whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["--lr", "nan"])
    assert "got 'nan', wanted a positive number" in capsys.readouterr().err
