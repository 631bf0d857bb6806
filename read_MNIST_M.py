"""Read `MNIST_M.npy` and `data.npy` into checked train, validation and test splits.

Both files come from strangers. The course's `MNIST_M.npy` holds a pickled object
array, and unpickling runs whatever a hostile file asks for, so nothing here calls
`numpy.load(allow_pickle=True)`: the pickle is first scanned for the few opcodes that
arrays need, then read by an unpickler that builds inert stand-ins, and numpy sees
only their checked bytes.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_CLASSES = 10
MNIST_M_SHAPES = ((28, 28, 3),)
DIGIT_SHAPES = ((784,), (28, 28))

# A file of three (images, labels) pairs takes about a hundred opcodes.
MAX_OPCODES = 10_000
SAFE_OPCODES = frozenset(
    {"PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE"}
    | {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
    | {"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
    | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
    | {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}
)
NUMERIC_CODES = frozenset(
    {"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"}
)
BYTE_ORDERS = ("<", ">", "=", "|")
MEMO_OPCODES = frozenset({"BINPUT", "LONG_BINPUT"})


class Split(NamedTuple):
    """Images and labels of one split.

    Attributes:
        images: uint8 in 0..255, (N, 28, 28, 3) for MNIST-M, (N, 784) for digits.
        labels: int64 in 0..9, (N,), or None where the file has none.
    """

    images: np.ndarray
    labels: np.ndarray | None


class DataError(ValueError):
    """A data file is not what it should be; one line: file, found, expected."""


def load_mnist_m(path: str | os.PathLike = "MNIST_M.npy") -> tuple[Split, Split, Split]:
    """Read MNIST-M (Ganin et al. 2016, arXiv:1505.07818).

    Args:
        path: a `.npy` file with three (images, labels) pairs, train, validation and
            test, pickled by Python 2 or 3: images (N, 28, 28, 3), uint8 0..255 or
            float 0..1; labels one-hot (N, 10) or integers (N,). Or a plain numeric
            array of such images, which is split as `load_digits` says.

    Returns:
        Train, validation and test splits, images uint8 (N, 28, 28, 3).

    Raises:
        DataError: the file is missing, damaged, hostile or of another shape.
    """
    return _load_splits(Path(path), MNIST_M_SHAPES)


def load_digits(path: str | os.PathLike = "data.npy") -> tuple[Split, Split, Split]:
    """Read MNIST digits.

    Args:
        path: a `.npy` file with three (images, labels) pairs as for `load_mnist_m`,
            images (N, 784) or (N, 28, 28); or a plain numeric array of one of those
            shapes, uint8 0..255 or float 0..1. A plain array has no labels, and image
            i of it is a test image where i mod 7 = 6, a validation image where
            i mod 70 = 0 and a training image elsewhere, so that MNIST's 70,000 fall
            into 59,000, 1,000 and 10,000 and a file sorted by digit splits evenly.

    Returns:
        Train, validation and test splits, images uint8 (N, 784).

    Raises:
        DataError: the file is missing, damaged, hostile or of another shape.
    """
    return _load_splits(Path(path), DIGIT_SHAPES)


def read_pickle(data: bytes | mmap.mmap, source: str | os.PathLike) -> Any:
    """Read a pickle that holds nothing but numeric arrays, tuples and lists.

    Args:
        data: the pickle, protocol 2 or newer, from Python 2 or 3.
        source: the name of where it came from, for error messages.

    Returns:
        The tree of tuples and lists that the pickle holds, its numeric arrays as
        numpy arrays that share the pickle's bytes, object arrays as lists.

    Raises:
        DataError: it asks for anything but array constructors, or is damaged.
    """
    try:
        _scan_pickle(data)
        unpickler = _ArrayUnpickler(io.BytesIO(data), encoding="bytes")
        return _resolve(unpickler.load())
    except _Refused as error:
        found = str(error)
    except Exception as error:
        # Bytes chosen by a stranger make the unpickler raise nearly anything.
        text = " ".join(str(error).split())[:120]
        found = f"a damaged pickle ({type(error).__name__}{': ' * bool(text)}{text})"
    raise _wrong(source, found, "a pickle of numeric arrays only")


def _wrong(source: object, found: str, expected: str) -> DataError:
    return DataError(f"{source}: found {found}, expected {expected}")


# Pickles ---------------------------------------------------------------------------


class _Refused(Exception):
    """What was found in a pickle that it may not hold."""


def _scan_pickle(data: bytes | mmap.mmap) -> None:
    """Refuse a pickle by its opcodes, before any of them is carried out.

    The limit on opcodes also bounds nesting and the memo, whose array the C unpickler
    would otherwise grow to any index that the file names.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in SAFE_OPCODES:
            raise _Refused(f"pickle opcode {opcode.name}")
        if opcode.name == "GLOBAL":
            _constructor(*argument.split(" ", 1))
        in_memo = argument if opcode.name in MEMO_OPCODES else 0
        if max(count, in_memo) >= MAX_OPCODES:
            raise _Refused(f"over {MAX_OPCODES} pickle opcodes or memo entries")


class _Dtype:
    """Stand-in for `numpy.dtype`: remembers a type code and a byte order."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else order

    @property
    def is_object(self) -> bool:
        return self.code in ("O", "O4", "O8")

    def resolve(self) -> np.dtype:
        if self.code not in NUMERIC_CODES or self.order not in BYTE_ORDERS:
            raise _Refused(f"an array of type {self.order}{self.code!r}")
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """Stand-in for `numpy.ndarray`: remembers shape, type and bytes, allocates none."""

    def __init__(self, *_: object) -> None:
        self.state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def resolve(self) -> np.ndarray | list:
        if self.state is None:
            raise _Refused("an array without contents")
        _, shape, dtype, fortran_order, data = self.state
        if not isinstance(dtype, _Dtype) or not all(
            type(n) is int and n >= 0 for n in shape
        ):
            raise _Refused("an array with a malformed header")
        size = math.prod(shape)
        if dtype.is_object:
            if not isinstance(data, list) or len(data) != size or len(shape) > 2:
                raise _Refused("an object array with malformed contents")
            width = shape[1] if len(shape) == 2 else 1
            rows = [data[i : i + width] for i in range(0, size, width)] if size else []
            return rows if len(shape) == 2 else data
        resolved = dtype.resolve()
        if not isinstance(data, bytes) or len(data) != size * resolved.itemsize:
            raise _Refused(
                f"an array of shape {shape} whose bytes do not fill that shape"
            )
        order = "F" if fortran_order else "C"
        return np.frombuffer(data, resolved).reshape(shape, order=order)


def _encode_latin1(text: str, *_: object) -> bytes:
    """Undo what Python 3 does to bytes under pickle protocol 2."""
    return text.encode("latin-1")


def _constructor(module: str, name: str) -> Callable:
    parts = module.split(".")
    if parts[:1] == ["numpy"]:
        # numpy 2 renamed `numpy.core` to `numpy._core`.
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }
    else:
        known = {("_codecs", "encode"): _encode_latin1}
    if (module, name) not in known:
        raise _Refused(f"a pickle that calls {module[:60]}.{name[:60]}")
    return known[module, name]


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        return _constructor(module, name)


def _resolve(node: Any, depth: int = 0) -> Any:
    if depth > 6:
        raise _Refused("deeply nested data")
    if isinstance(node, _Array):
        node = node.resolve()
    if isinstance(node, (list, tuple)):
        return [_resolve(item, depth + 1) for item in node]
    if isinstance(node, np.ndarray):
        return node
    raise _Refused(f"a {type(node).__name__} where an array should be")


# Files -----------------------------------------------------------------------------


def _load_splits(
    path: Path, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Split, Split, Split]:
    wanted = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
    expected = f"a .npy file of images {wanted}"
    content = _read_npy(path, expected)
    if isinstance(content, np.ndarray):
        images = _check_images(content, shapes, path, "the array")
        if len(images) < 7:
            raise _wrong(path, f"{len(images)} images", "at least 7 to split")
        index = np.arange(len(images))
        test, valid = index % 7 == 6, index % 70 == 0
        parts = (~test & ~valid, valid, test)
        train, valid, test = (Split(images[part], None) for part in parts)
        return train, valid, test
    if len(content) != 3 or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in content
    ):
        found = f"{len(content)} items"
        raise _wrong(path, found, "three (images, labels) pairs: train, valid, test")
    splits = []
    for name, (images, labels) in zip(("train", "valid", "test"), content, strict=True):
        if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
            raise _wrong(path, f"a list as {name} images or labels", "numeric arrays")
        images = _check_images(images, shapes, path, f"{name} images")
        labels = _check_labels(labels, len(images), path, f"{name} labels")
        splits.append(Split(images, labels))
    return tuple(splits)


def _read_npy(path: Path, expected: str) -> np.ndarray | list:
    try:
        if not path.is_file():
            found = "something that is not a file" if path.exists() else "no such file"
            raise _wrong(path, found, expected)
        size = path.stat().st_size
        if size == 0:
            raise _wrong(path, "an empty file", expected)
        with path.open("rb") as file:
            shape, fortran_order, dtype = _read_header(file, path, expected)
            if dtype.hasobject and dtype.kind == "O":
                start = file.tell()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return read_pickle(data[start:], path)
            if dtype.kind not in "buif" or dtype.itemsize > 8:
                raise _wrong(path, f"an array of type {dtype}", expected)
            if any(n < 0 for n in shape):
                raise _wrong(path, f"an array of shape {shape}", expected)
            needed = math.prod(shape) * dtype.itemsize
            if size - file.tell() != needed:
                found = f"{size - file.tell():,} bytes of data"
                raise _wrong(
                    path, found, f"{needed:,} for shape {shape} of type {dtype}"
                )
            data = np.fromfile(file, dtype)
            return data.reshape(shape, order="F" if fortran_order else "C")
    except OSError as error:
        raise _wrong(path, error.strerror or str(error), expected) from None


def _read_header(
    file: io.BufferedReader, path: Path, expected: str
) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 2's headers parse with a warning
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise _wrong(path, f".npy format version {version}", expected)
            return readers[version](file)
    except (DataError, OSError):
        raise
    except Exception:
        raise _wrong(path, "no valid .npy header", expected) from None


def _check_images(
    images: np.ndarray,
    shapes: tuple[tuple[int, ...], ...],
    path: Path,
    what: str,
) -> np.ndarray:
    wanted = " or ".join(str(shape) for shape in shapes)
    if images.shape[1:] not in shapes:
        found = f"shape {images.shape} for {what}"
        raise _wrong(path, found, f"N images of shape {wanted}")
    if len(images) == 0:
        raise _wrong(path, f"no image in {what}", "at least one")
    if images.dtype.kind == "f":
        # min and max are NaN where any value is.
        low, high = float(images.min()), float(images.max())
        if not (low >= 0.0 and high <= 1.0):
            found = f"values {low:g}..{high:g} in {what}"
            raise _wrong(path, found, "float 0..1, finite")
        images = np.concatenate(
            [
                np.rint(images[i : i + 4096] * images.dtype.type(255)).astype(np.uint8)
                for i in range(0, len(images), 4096)
            ]
        )
    elif images.dtype != np.uint8:
        low, high = int(images.min()), int(images.max())
        if images.dtype.kind not in "ui" or low < 0 or high > 255:
            found = f"{images.dtype} values {low}..{high} in {what}"
            raise _wrong(path, found, "uint8 0..255 or float 0..1")
        images = images.astype(np.uint8)
    return np.ascontiguousarray(images.reshape(len(images), *shapes[0]))


def _check_labels(labels: np.ndarray, count: int, path: Path, what: str) -> np.ndarray:
    expected = f"({count}, {NUM_CLASSES}) one-hot or ({count},) integers 0..9"
    if labels.shape not in ((count,), (count, NUM_CLASSES)):
        raise _wrong(path, f"shape {labels.shape} for {what}", expected)
    if labels.ndim == 2:
        is_one_hot = ((labels == 0) | (labels == 1)).all() and (
            np.count_nonzero(labels, axis=1) == 1
        ).all()
        if not is_one_hot:
            raise _wrong(path, f"rows that are not one-hot in {what}", expected)
        return labels.argmax(axis=1).astype(np.int64)
    if not np.isin(labels, np.arange(NUM_CLASSES)).all():
        raise _wrong(path, f"values outside 0..9 in {what}", expected)
    return labels.astype(np.int64)
