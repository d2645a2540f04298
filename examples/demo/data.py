"""Images for the demo: scikit-learn's digits, CIFAR-10's folder, or JPEGs in an ``.npz`` file.

Nothing read here can run code: the CIFAR-10 pickles go through an unpickler that knows NumPy arrays
and plain values only, and ``.npz`` files are opened with ``allow_pickle=False``.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg_kernels._extras import require
from rpg_kernels.interop import pickled_arrays

CIFAR_SIDE = 32
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR_TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST_FILE = "test_batch"


@dataclass(frozen=True)
class Images:
    """A labelled image set: pixels ``uint8 [B, C, H, W]``, labels ``int64 [B]``."""

    name: str
    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def channels(self) -> int:
        return self.train_pixels.shape[1]


def load(path: str | None, images: int | None = None, test_images: int | None = None) -> Images:
    """Load the digits (``path`` is None), a CIFAR-10 folder or an ``.npz`` of JPEGs.

    Args:
        path: ``cifar-10-batches-py``, the folder that holds it, or a file ending in ``.npz``.
        images: keep the first so many training images; None keeps all.
        test_images: the same for the test set.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or a file of the set is missing.
        ValueError: a file is not what it should be, or a count is not positive.
    """
    for name, count in (("images", images), ("test_images", test_images)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: got {count}, wanted at least 1")
    if path is None:
        return _digits(images, test_images)
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"data: got {path!r}, which does not exist; wanted a cifar-10-batches-py folder "
            "or an .npz file"
        )
    if place.is_dir():
        return _cifar_folder(place, images, test_images)
    if place.suffix == ".npz":
        return _jpeg_file(place, images, test_images)
    raise ValueError(
        f"data: got the file {path!r}, wanted a cifar-10-batches-py folder or an .npz file"
    )


def _digits(images: int | None, test_images: int | None) -> Images:
    """1797 digits of 8x8; every fifth image is for testing, so the split never changes."""
    datasets = require("sklearn.datasets", "scikit-learn", "the digits")
    bunch = datasets.load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    for_test = torch.arange(len(labels)) % 5 == 4
    return Images(
        "digits (scikit-learn)",
        pixels[~for_test][:images],
        labels[~for_test][:images],
        pixels[for_test][:test_images],
        labels[for_test][:test_images],
        tuple(str(name) for name in bunch.target_names),
    )


def _cifar_folder(folder: Path, images: int | None, test_images: int | None) -> Images:
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    names = (*CIFAR_TRAIN_FILES, CIFAR_TEST_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data: got the folder {str(folder)!r} without {', '.join(missing)}; "
            "wanted data_batch_1 to data_batch_5 and test_batch"
        )
    pixels, labels = _cifar_batches((folder / name for name in CIFAR_TRAIN_FILES), images)
    test_pixels, test_labels = _cifar_batches([folder / CIFAR_TEST_FILE], test_images)
    return Images("CIFAR-10", pixels, labels, test_pixels, test_labels, CIFAR_CLASSES)


def _cifar_batches(files: Iterable[Path], limit: int | None) -> tuple[Tensor, Tensor]:
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for file in files:
        batch_pixels, batch_labels = _cifar_batch(file)
        pixels.append(batch_pixels)
        labels.append(batch_labels)
        count += len(batch_labels)
        if limit is not None and count >= limit:
            break
    return torch.cat(pixels)[:limit], torch.cat(labels)[:limit]


def _cifar_batch(file: Path) -> tuple[Tensor, Tensor]:
    numpy = require("numpy", "numpy", "CIFAR-10")
    try:
        batch = pickled_arrays.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: got a file that cannot be read ({error})") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{file}: got a {type(batch).__name__}, wanted a dict")
    # Files written by Python 3 have text keys.
    pixels = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    width = 3 * CIFAR_SIDE * CIFAR_SIDE
    if not isinstance(pixels, numpy.ndarray) or pixels.dtype != numpy.uint8:
        got = getattr(pixels, "dtype", type(pixels).__name__)
        raise ValueError(f"{file}: data: got {got}, wanted a uint8 array")
    if pixels.ndim != 2 or pixels.shape[1] != width:
        raise ValueError(f"{file}: data: got shape {pixels.shape}, wanted [images, {width}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{file}: labels: got {type(labels).__name__}, wanted a list of int")
    if len(labels) != len(pixels) or not labels:
        wanted = len(pixels) or "at least one"
        raise ValueError(f"{file}: labels: got {len(labels)}, wanted {wanted}")
    target = torch.tensor(labels, dtype=torch.int64)
    _check_labels(target, len(CIFAR_CLASSES), f"{file}: labels")
    images = torch.from_numpy(pixels.copy())  # what is read from a pickle is read-only
    return images.view(-1, 3, CIFAR_SIDE, CIFAR_SIDE), target


def _jpeg_file(file: Path, images: int | None, test_images: int | None) -> Images:
    numpy = require("numpy", "numpy", "an .npz file")
    keys = [f"{split}_{part}" for split in ("train", "test") for part in _JPEG_PARTS]
    try:
        with numpy.load(file, allow_pickle=False) as archive:
            missing = [key for key in (*keys, "classes") if key not in archive.files]
            if missing:
                raise ValueError(f"got no {', '.join(missing)}")
            arrays = {key: archive[key] for key in (*keys, "classes")}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{file}: got a file that cannot be used ({error})") from error
    classes = tuple(str(name) for name in arrays["classes"].reshape(-1))
    pixels, labels = _jpeg_split(file, "train", arrays, len(classes), images)
    test_pixels, test_labels = _jpeg_split(file, "test", arrays, len(classes), test_images)
    return Images("CIFAR-10 (JPEG)", pixels, labels, test_pixels, test_labels, classes)


_JPEG_PARTS = ("jpeg", "offsets", "labels")


def _jpeg_split(
    file: Path, split: str, arrays: dict[str, Any], classes: int, limit: int | None
) -> tuple[Tensor, Tensor]:
    jpeg, offsets, labels = (arrays[f"{split}_{part}"] for part in _JPEG_PARTS)
    where = f"{file}: {split}"
    for part, array in zip(_JPEG_PARTS, (jpeg, offsets, labels), strict=True):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{where}_{part}: got {got}, wanted a 1-D integer array")
    if jpeg.dtype.itemsize != 1:
        raise ValueError(f"{where}_jpeg: got {jpeg.dtype}, wanted uint8")
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise ValueError(
            f"{where}_offsets: got {len(offsets)} for {len(labels)} labels, "
            f"wanted {len(labels) + 1} and at least one label"
        )
    steps = offsets[1:].astype("int64") - offsets[:-1].astype("int64")
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or (steps <= 0).any():
        raise ValueError(
            f"{where}_offsets: got values from {offsets[0]} to {offsets[-1]} with a smallest step "
            f"of {steps.min()}, wanted increasing values from 0 to {len(jpeg)}"
        )
    target = torch.from_numpy(labels[:limit].astype("int64"))
    _check_labels(target, classes, f"{where}_labels")
    pixels = torch.empty((len(target), 3, CIFAR_SIDE, CIFAR_SIDE), dtype=torch.uint8)
    for i in range(len(target)):
        pixels[i] = _decode(jpeg[offsets[i] : offsets[i + 1]].tobytes(), f"{where} image {i}")
    return pixels, target


def _decode(data: bytes, where: str) -> Tensor:
    """One JPEG as ``uint8 [3, 32, 32]``; the size is checked before any pixel is decoded."""
    numpy = require("numpy", "numpy", "an .npz file")
    image_module = require("PIL.Image", "pillow", "an .npz of JPEGs")
    side = CIFAR_SIDE
    try:
        with image_module.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (side, side):
                raise ValueError(f"got {image.size[0]}x{image.size[1]}, wanted {side}x{side}")
            array = numpy.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: got bytes that are no such JPEG ({error})") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _check_labels(labels: Tensor, classes: int, where: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{where}: got {low} to {high}, wanted 0 to {classes - 1}")
