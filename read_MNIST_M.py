"""Read `MNIST_M.npy` and `data.npy` into checked train, validation and test splits.

Both files come from strangers. The course's `MNIST_M.npy` holds a pickled object array,
and unpickling runs whatever a hostile file asks for. So numpy is given no pickle: it is
scanned for the few opcodes that arrays need, then read by an unpickler that builds
inert stand-ins, and numpy sees only their checked bytes.
"""

from __future__ import annotations

import filecmp
import functools
import io
import math
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

NUM_CLASSES = 10
VALID_SIZE = 1_000  # of the training images, where a source has no validation images
Shapes = tuple[tuple[int, ...], ...]  # of an image; the first one is returned
MNIST_M_SHAPES = ((28, 28, 3), (3, 28, 28))
DIGIT_SHAPES = ((784,), (28, 28), (28, 28, 1), (1, 28, 28))
PAIRS = "three (images, labels) pairs: train, valid, test"
NPZ_MEMBERS = ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy")
MAX_ARRAY = 2**29  # bytes of an array in a .npz file; MNIST's, as float64, take 2**28.5

MAX_OPCODES = 10_000  # a file of three pairs takes about a hundred
SAFE_OPCODES = frozenset(
    {"PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE"}
    | {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
    | {"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
    | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
    | {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}
)
SAFE_NAMES = frozenset(
    {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
    | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
)
NUMERIC_CODES = {"b1"} | {kind + size for kind in "uif" for size in "1248"}


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
            test, pickled by Python 2 or 3: images (N, 28, 28, 3) or (N, 3, 28, 28),
            whole numbers 0..255 of any type or float 0..1; labels one-hot (N, 10) or
            integers (N,) or (N, 1). Or a plain array of images, without labels, which
            is split as `load_digits` says.

    Returns:
        Train, validation and test splits, images uint8 (N, 28, 28, 3).

    Raises:
        DataError: the file is missing, damaged, hostile or of another shape.
    """
    path, content = _read(path, MNIST_M_SHAPES)
    if isinstance(content, list):
        return _check_pairs(content, MNIST_M_SHAPES, path)
    return _split(_check_images(content, MNIST_M_SHAPES, path, "the array"), None, path)


def load_digits(
    path: str | os.PathLike = "data.npy", labels: str | os.PathLike | None = None
) -> tuple[Split, Split, Split]:
    """Read MNIST digits.

    Args:
        path: a `.npy` file with three (images, labels) pairs as for `load_mnist_m`,
            images (N, 784), (N, 28, 28), (N, 28, 28, 1) or (N, 1, 28, 28); or a plain
            array of such images; or Keras's `mnist.npz`, whose last 1,000 training
            images (the last tenth of 1,000 or fewer) are for validation.
        labels: a `.npy` file with the labels of a plain array, shaped as in a pair;
            None for `label.npy` in the same folder, if there is one.

    Returns:
        Train, validation and test splits, images uint8 (N, 784). Of a plain array,
        image i is for test where i mod 7 = 6, for validation where i mod 70 = 0, else
        for training. With labels, i counts the images of the same digit, so that each
        split holds each digit in proportion (unless no digit has seven images).

    Raises:
        DataError: a file is missing, damaged, hostile or of another shape, or `labels`
            is given for a file that has its own.
    """
    path, content = _read(path, DIGIT_SHAPES)
    if isinstance(content, list):
        if labels is not None:
            raise _wrong(path, "labels of its own", f"none besides {labels}")
        return _check_pairs(content, DIGIT_SHAPES, path)
    images = _check_images(content, DIGIT_SHAPES, path, "the array")
    if labels is None:
        labels = find_file(path.with_name("label.npy"))
        if not labels.exists():
            return _split(images, None, path)
    labels_path, numbers = _read(labels, None)
    what = f"the labels of {path.name}"
    return _split(images, _check_labels(numbers, len(images), labels_path, what), path)


def find_file(path: str | os.PathLike) -> Path:
    """Find a file whatever the case of its name: `MNIST_M.npy` as `Mnist_M.npy`.

    Returns:
        The file of exactly this name if there is one, else one in the same folder
        whose name differs only in case; `path` itself where there is none.

    Raises:
        DataError: there are several, and their bytes differ.
    """
    path = Path(path)
    # os.walk tells nothing of a folder that it may not list, instead of failing.
    _, _, names = next(os.walk(path.parent), ("", [], []))
    names.sort(key=lambda name: (name != path.name, name))
    alike = [path.with_name(n) for n in names if n.lower() == path.name.lower()]
    files = [file for file in alike if file.is_file()]
    for other in files[1:]:
        is_itself = os.path.samefile(files[0], other)
        if not is_itself and not filecmp.cmp(files[0], other, shallow=False):
            found = f"{other.name} beside it, whose content differs"
            raise _wrong(files[0], found, "one of the two: keep one")
    return files[0] if files else path


def read_pickle(data: bytes, source: str | os.PathLike) -> Any:
    """Read a pickle that holds nothing but numeric arrays, tuples and lists.

    Args:
        data: the pickle, protocol 2 or newer, from Python 2 or 3.
        source: the name of where it came from, for error messages.

    Returns:
        What the pickle holds: numeric arrays, which share its bytes, in lists, which
        stand for tuples and object arrays, too.

    Raises:
        DataError: it asks for anything but array constructors, or is damaged.
    """
    try:
        _scan_pickle(data)
        return _resolve(_ArrayUnpickler(data).load(), iter(range(MAX_OPCODES)))
    except Exception as error:
        # Bytes chosen by a stranger make the unpickler raise nearly anything.
        damage = f"a damaged pickle ({type(error).__name__}: {error})"
        found = str(error) if isinstance(error, _Refused) else damage
    raise _wrong(source, found, "nothing but numeric arrays in tuples or lists")


def _wrong(source: object, found: str, expected: str) -> DataError:
    # A stranger's bytes may hold line ends, codes for the terminal, and no end.
    found = "".join(c if c.isprintable() else " " for c in found[:200])
    return DataError(f"{source}: found {found}, expected {expected}")


# Pickles ---------------------------------------------------------------------------


class _Refused(Exception):
    """What was found in a pickle that it may not hold."""


class _StandIn:
    """Remembers what an array or a type would be made of, and copies none of it."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        # How Python 3 wrote bytes under protocol 2. A file may ask for one many times.
        self.encode = functools.cache(lambda text: text.encode("latin-1"))

    def find_class(self, module: str, name: str) -> Callable:
        if f"{module}.{name}" not in SAFE_NAMES:
            raise _Refused(f"a pickle that calls {module[:60]}.{name[:60]}")
        return _StandIn if module != "_codecs" else lambda text, *_: self.encode(text)


def _scan_pickle(data: bytes) -> None:
    """Refuse a pickle by its opcodes, before any of them is carried out.

    The limit on opcodes also bounds nesting and the memo, whose array the C unpickler
    would otherwise grow to any index that the file names.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in SAFE_OPCODES:
            kind = {"EMPTY_DICT": "a pickled dict"}
            raise _Refused(kind.get(opcode.name, f"pickle opcode {opcode.name}"))
        in_memo = argument if opcode.name in ("BINPUT", "LONG_BINPUT") else 0
        if max(count, in_memo) >= MAX_OPCODES:
            raise _Refused(f"a pickle of over {MAX_OPCODES:,} parts")


def _resolve(node: Any, budget: Iterator[int], depth: int = 0) -> np.ndarray | list:
    """Return the array or lists of arrays that stand-ins, tuples and lists describe."""
    # Lists that hold each other many times over are small in the file, not in memory.
    if depth > 6 or next(budget, None) is None:
        raise _Refused("deeply nested data")
    if isinstance(node, _StandIn):
        _, shape, dtype, fortran_order, data = node.state
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise _Refused("an array of impossible shape")
        size, code, order = math.prod(shape), dtype.arguments[0], dtype.state[1]
        if isinstance(code, bytes):  # Python 2's text
            code, order = code[:3].decode("ascii"), order[:3].decode("ascii")
        if code not in ("O", "O4", "O8"):
            if code not in NUMERIC_CODES or order not in ("<", ">", "=", "|"):
                raise _Refused(f"an array of type {order}{code}")
            dtype = np.dtype(order.replace("|", "=") + code)
            if not isinstance(data, bytes) or len(data) != size * dtype.itemsize:
                raise _Refused(f"an array whose bytes do not fill its shape {shape}")
            return np.frombuffer(data, dtype).reshape(shape, order="CF"[fortran_order])
        if not isinstance(data, list) or len(data) != size:
            raise _Refused("an object array with malformed contents")
        node, width = data, shape[1] if len(shape) == 2 else 0
        if width:
            node = [data[i : i + width] for i in range(0, size, width)]
    if isinstance(node, (list, tuple)):
        return [_resolve(item, budget, depth + 1) for item in node]
    raise _Refused(f"a {type(node).__name__} where an array should be")


# Files -----------------------------------------------------------------------------


def _read(path: str | os.PathLike, shapes: Shapes | None) -> tuple[Path, Any]:
    """Find and read a file of images or, where `shapes` is None, of labels."""
    path = find_file(path)
    kind = f"images of one of the shapes {shapes}" if shapes else "labels"
    expected = f"a .npy file of N {kind}"
    try:
        if not path.is_file():
            found = "something that is not a file" if path.exists() else "no such file"
            raise _wrong(path, found, expected)
        with path.open("rb") as file:
            start = file.peek(30)
            if start.startswith(b"version https://git-lfs"):
                raise _wrong(path, "a git-LFS pointer", f"{expected}: run git lfs pull")
            if start.startswith(b"\x80") or path.suffix.lower() == ".pkl":
                remedy = f"{expected}: save it by numpy.save"
                raise _wrong(path, "a bare pickle, not a .npy file", remedy)
            if start.startswith(b"PK") and shapes:
                return path, _read_npz(file, path)
            size = os.fstat(file.fileno()).st_size
            return path, _read_npy(file, size, path, expected, bool(shapes))
    except DataError:
        raise
    except Exception as error:  # damaged archives make zipfile raise nearly anything
        found = f"an unreadable file ({type(error).__name__}: {error})"
        raise _wrong(path, found, expected) from None


def _read_npy(
    file: IO[bytes], size: int, source: Path, expected: str, may_hold_objects: bool
) -> np.ndarray | list:
    """Read a .npy file of `size` bytes: an array, or what a pickled array holds."""
    if size == 0:
        raise _wrong(source, "an empty file", expected)
    npy = np.lib.format
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 2's headers parse with a warning
            shape, fortran_order, dtype = readers[npy.read_magic(file)](file)
    except Exception:  # so does numpy's parser
        raise _wrong(source, "no valid .npy header", expected) from None
    if len(shape) > 8 or not all(0 <= n < 2**40 for n in shape):
        raise _wrong(source, "an array of impossible shape", expected)
    if dtype.kind == "O" and may_hold_objects:
        if shape not in ((), (3,), (3, 2)):
            found = f"{shape[0]} separate images or pairs"
            raise _wrong(source, found, f"{PAIRS}; or stack them: numpy.stack")
        return read_pickle(file.read(), source)
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise _wrong(source, f"an array of type {dtype}", expected)
    needed, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    data = file.read(needed) if left == needed else b""
    if len(data) != needed:
        found = f"{left:,} bytes of data for shape {shape} of type {dtype}"
        raise _wrong(source, found, f"{needed:,} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="CF"[fortran_order])


def _read_npz(file: IO[bytes], path: Path) -> list:
    """Read the arrays of Keras's mnist.npz into three (images, labels) pairs."""
    expected = f"a .npz file with {', '.join(NPZ_MEMBERS)}, or a .npy file"
    arrays = []
    with zipfile.ZipFile(file) as archive:
        if not set(NPZ_MEMBERS) <= set(archive.namelist()):
            found = f"an archive of {', '.join(archive.namelist()[:9]) or 'nothing'}"
            raise _wrong(path, found, expected)
        for name in NPZ_MEMBERS:
            size = archive.getinfo(name).file_size
            if size > MAX_ARRAY:
                raise _wrong(path / name, f"{size:,} bytes", f"at most {MAX_ARRAY:,}")
            with archive.open(name) as member:
                arrays.append(_read_npy(member, size, path / name, expected, False))
    images, labels, *test = arrays
    valid = VALID_SIZE if len(images) > VALID_SIZE else max(1, len(images) // 10)
    train = [images[:-valid], labels[:-valid]]
    return [train, [images[-valid:], labels[-valid:]], test]


def _split(images: np.ndarray, labels: np.ndarray | None, path: Path) -> tuple:
    """Split a plain array by each image's rank: among its digit's, or in the file."""
    if len(images) < 7:
        raise _wrong(path, f"{len(images)} images", "at least 7 to split")
    rank = np.arange(len(images))
    for digit in range(0 if labels is None else NUM_CLASSES):
        rank[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    if rank.max() < 6:  # there would be no test image
        rank = np.arange(len(images))
    test, valid = rank % 7 == 6, rank % 70 == 0
    parts = (~test & ~valid, valid, test)
    return tuple(Split(images[p], None if labels is None else labels[p]) for p in parts)


def _check_pairs(content: list, shapes: Shapes, path: Path) -> tuple:
    pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2]
    if len(content) != 3 or len(pairs) != 3:
        raise _wrong(path, f"{len(content)} items, {len(pairs)} of them pairs", PAIRS)
    splits = []
    for name, (images, labels) in zip(("train", "valid", "test"), pairs, strict=True):
        if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
            raise _wrong(path, f"a list as {name} images or labels", "numeric arrays")
        images = _check_images(images, shapes, path, f"{name} images")
        labels = _check_labels(labels, len(images), path, f"{name} labels")
        splits.append(Split(images, labels))
    return tuple(splits)


def _check_images(
    images: np.ndarray, shapes: Shapes, path: Path, what: str
) -> np.ndarray:
    """Return images as uint8 0..255, each of the first shape."""
    if images.shape[1:] not in shapes or len(images) == 0:
        found = f"shape {images.shape} for {what}"
        raise _wrong(path, found, f"N > 0 images of one of the shapes {shapes}")
    batches = [images[i : i + 4096] for i in range(0, len(images), 4096)]
    low, high = images.min().item(), images.max().item()  # NaN where any value is
    is_whole = images.dtype.kind in "ui" or (
        high > 1 and all(np.array_equal(batch, np.rint(batch)) for batch in batches)
    )
    if images.dtype.kind == "b" or not (low >= 0 and high <= (255 if is_whole else 1)):
        found = f"{images.dtype} values {low:g}..{high:g} in {what}"
        raise _wrong(path, found, "whole numbers 0..255 or float 0..1")
    if images.dtype != np.uint8:
        scale = images.dtype.type(1 if is_whole else 255)
        batches = [np.rint(batch * scale).astype(np.uint8) for batch in batches]
        images = np.concatenate(batches)
    if images.shape[1:] == (3, 28, 28):
        images = np.moveaxis(images, 1, -1)
    return np.ascontiguousarray(images.reshape(len(images), *shapes[0]))


def _check_labels(labels: np.ndarray, count: int, path: Path, what: str) -> np.ndarray:
    """Return labels as int64 0..9, (count,)."""
    expected = f"({count}, 10) one-hot or integers 0..9, ({count},) or ({count}, 1)"
    if labels.shape == (count, NUM_CLASSES):
        if not np.isin(labels, (0, 1)).all() or (labels.sum(axis=1) != 1).any():
            raise _wrong(path, f"rows that are not one-hot in {what}", expected)
        labels = labels.argmax(axis=1)
    if labels.shape not in ((count,), (count, 1)):
        raise _wrong(path, f"shape {labels.shape} for {what}", expected)
    if not np.isin(labels, np.arange(NUM_CLASSES)).all():
        raise _wrong(path, f"values outside 0..9 in {what}", expected)
    return labels.astype(np.int64).reshape(count)
