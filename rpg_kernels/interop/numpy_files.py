"""``.npy`` files of unknown origin, arrays of objects included."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpg_kernels import _checks
from rpg_kernels._extras import require
from rpg_kernels.interop import pickled_arrays

if TYPE_CHECKING:
    import numpy

_HEADERS = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}


def read_object_array(path: str | os.PathLike[str]) -> numpy.ndarray[Any, Any]:
    """Read a ``.npy`` file that holds numbers or, pickled, arrays of numbers.

    ``numpy.load`` runs whatever such a pickle asks for (``allow_pickle=True``) or refuses it. Here
    nothing that the file names is run or imported, and it may name only what makes arrays of
    numbers from its own bytes. Memory is bounded by the file's size plus a constant.

    Args:
        path: a file that ``numpy.save`` of NumPy 1 or 2 wrote, format version 1.0 or 2.0.

    Returns:
        A read-only array in native byte order, of a numeric dtype, or of dtype object with a
        numeric array in each element. NumPy writes the former of a list of arrays of equal shapes.

    Raises:
        ValueError: the file is damaged or holds anything else.
        OSError: it cannot be opened.
        MissingExtraError: NumPy is not installed.

    >>> import os, tempfile, numpy
    >>> from rpg_kernels.interop.numpy_files import read_object_array
    >>> layers = numpy.empty(2, dtype=object)
    >>> layers[:] = [numpy.array([5, 3, 4]), numpy.array([0, 1])]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "layers.npy")
    ...     numpy.save(path, layers)
    ...     read_object_array(path)
    array([array([5, 3, 4]), array([0, 1])], dtype=object)
    """
    name = str(path)
    reader = require("numpy.lib.format", "numpy", "a .npy file")
    data = Path(path).read_bytes()
    stream = io.BytesIO(data)
    try:
        version = reader.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = getattr(reader, _HEADERS[version])(stream)
    # A damaged header fails in whichever of Python's own parsers the damage reaches.
    except Exception as error:
        reason = pickled_arrays.shorten(str(error) or type(error).__name__)
        raise _checks.fail(
            name, f"a header that cannot be read ({reason})", "a .npy file"
        ) from error
    start = stream.tell()
    try:
        if not dtype.hasobject:
            return pickled_arrays.numeric_array(data[start:], dtype, shape, fortran)  # type: ignore[no-any-return]
        array = pickled_arrays.loads(data, start)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    got = f"a {type(array).__name__}"
    if isinstance(array, require("numpy", "numpy", "a .npy file").ndarray):
        if (array.dtype, array.shape) == (dtype, shape):
            return array  # type: ignore[no-any-return]
        got = f"{array.dtype} {list(array.shape)}"
    raise _checks.fail(name, got, f"{dtype} {list(shape)}, as its header says")
