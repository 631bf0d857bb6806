"""Read `MNIST_M.npy` and `data.npy` into checked train, validation and test splits.

No file is trusted. `MNIST_M.npy` holds a pickled object array, and unpickling runs
whatever a hostile file asks for. So the pickle's opcodes are scanned, for some could
fill the memory; then it is read by an unpickler that builds inert stand-ins for arrays;
and numpy sees only their checked bytes.
"""

import contextlib
import io
import math
import os
import pickle
import pickletools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_CLASSES = 10
VALID_SIZE = 1_000  # of the training images, where a source has no validation images
Shapes = tuple[tuple[int, ...], ...]  # of an image; the first one is returned
MNIST_M_SHAPES = ((28, 28, 3), (3, 28, 28))
DIGIT_SHAPES = ((784,), (28, 28), (28, 28, 1), (1, 28, 28))
IMAGES = "images (whole numbers 0..255 or float 0..1), or three pairs, of the shapes"
LABELS = "labels 0..9, integers (N,) or (N, 1) or one-hot (N, 10)"
ROUNDING = 1e-3  # accepted beyond both ends of a range of floats, relative to its end
OTHER_FORMATS = {  # by the bytes that their files start with
    b"version https://git-lfs": "a git-LFS pointer (run git lfs pull)",
    b"\x80": "a bare pickle (save it by numpy.save)",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"PK": "a zip or .npz archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
}
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
NUMERIC_CODES = ["b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


class Split(NamedTuple):
    """Images and labels of one split."""

    images: np.ndarray  # uint8 0..255, (N, 28, 28, 3) for MNIST-M, (N, 784) for digits
    labels: np.ndarray | None  # int64 0..9, (N,), or None where the file has none


class DataError(ValueError):
    """A data file is not what it should be; one line: file, found, expected."""

    def __init__(self, message: str) -> None:
        # Names and content may hold line ends, terminal codes, bytes that are no UTF-8.
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def load_mnist_m(path: str | os.PathLike = "MNIST_M.npy") -> tuple[Split, Split, Split]:
    """Read the train, validation and test splits of MNIST-M (arXiv:1505.07818).

    Args:
        path: a `.npy` file with three (images, labels) pairs, train, validation and
            test, pickled by Python 2 or 3: images (N, 28, 28, 3) or (N, 3, 28, 28),
            float 0..1 or whole numbers 0..255 (or 0 and 1, for black and white);
            labels one-hot (N, 10) or integers (N,) or (N, 1). Or a plain array of
            images, without labels, which is split as `load_digits` says.

    Raises:
        DataError: the file is missing, damaged, hostile or of another shape.
    """
    path = find_file(path)
    with _refusals_told(path, f"a .npy file of {IMAGES} {MNIST_M_SHAPES}"):
        content = _read(path)
        if isinstance(content, list):
            return _check_pairs(content, MNIST_M_SHAPES)
        images = _check_images(content, MNIST_M_SHAPES, "the array", [content])
        return _split(images, None)


def load_digits(
    path: str | os.PathLike = "data.npy", labels: str | os.PathLike | None = None
) -> tuple[Split, Split, Split]:
    """Read the train, validation and test splits of MNIST's digits.

    Of a plain array, image i is for test where i mod 7 = 6, for validation where i mod
    70 = 0, else for training. With labels, i counts the images of the same digit, so
    that each split holds each digit in proportion (unless no digit has seven images).

    Args:
        path: as for `load_mnist_m`, with images (N, 784), (N, 28, 28), (N, 28, 28, 1)
            or (N, 1, 28, 28).
        labels: a `.npy` file with the labels of a plain array, shaped as in a pair;
            None for `label.npy` in the same folder, if there is one.

    Raises:
        DataError: as for `load_mnist_m`; or there are two sources of labels.
    """
    path = find_file(path)
    with _refusals_told(path, f"a .npy file of {IMAGES} {DIGIT_SHAPES}"):
        content = _read(path)
        if isinstance(content, list):
            if labels is not None:
                raise _Refused(f"labels of its own beside those of {labels}")
            return _check_pairs(content, DIGIT_SHAPES)
        images = _check_images(content, DIGIT_SHAPES, "the array", [content])
        beside = path.with_name("label.npy")
        labels_path = find_file(beside if labels is None else labels)
        if labels is None and not labels_path.exists():
            return _split(images, None)
        with _refusals_told(labels_path, f"a .npy file of {len(images)} {LABELS}"):
            digits = _read(labels_path, may_hold_pairs=False)
            digits = _check_labels(digits, len(images), "the array")
        return _split(images, digits)


def find_file(path: str | os.PathLike) -> Path:
    """Find a file whatever the case of its name: `MNIST_M.npy` as `Mnist_M.npy`.

    Returns:
        `path` if it exists, else the first file in sorted order whose name differs
        only in case; `path` if there is none.

    Raises:
        DataError: it is a folder or a device, or links to a file that is not there.
    """
    path = Path(path)
    if not os.path.lexists(path):
        # os.walk yields nothing, instead of failing, where a folder can't be listed.
        _, folders, files = next(os.walk(path.parent), ("", [], []))
        alike = sorted(n for n in folders + files if n.lower() == path.name.lower())
        if not alike:
            return path
        if len(alike) > 1:
            print(f"Of {alike}, the first is taken for {path.name!r}.")
        path = path.with_name(alike[0])
    if not os.path.isfile(path):
        found = "a folder or a device" if os.path.exists(path) else "a broken link"
        raise DataError(f"{path}: found {found}, expected a .npy file")
    return path


def read_pickle(data: bytes, source: str | os.PathLike) -> list[list[np.ndarray]]:
    """Read a pickle of three pairs of numeric arrays, which share its bytes.

    Its protocol is 2 or newer. Errors name `source` as where it comes from.

    Raises:
        DataError: it asks for anything but arrays, or is damaged.
    """
    with _refusals_told(source, "three pairs of numeric arrays"):
        _scan_pickle(data)
        unpickler = _ArrayUnpickler(io.BytesIO(data), encoding="latin-1")
        pairs = _items(unpickler.load(), 3)
        return [[_numbers(part) for part in _items(pair, 2)] for pair in pairs]


class _Refused(Exception):
    """What was found in a file that it may not hold."""


@contextlib.contextmanager
def _refusals_told(source: object, expected: str) -> Iterator[None]:
    """Raise what goes wrong with a file's content as a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # Bytes chosen by a stranger make pickle and numpy raise nearly anything.
        found = str(error) if isinstance(error, _Refused) else f"bad data ({error!r})"
        message = f"{source}: found {found[:200]}, expected {expected}"
        raise DataError(message) from error


def _read(path: Path, may_hold_pairs: bool = True) -> np.ndarray | list:
    """Read a .npy file: a plain array, or the lists of arrays that a pickle holds."""
    if not path.exists():
        raise _Refused("no such file")
    with path.open("rb") as file:
        start = file.read(512)
        if not start.startswith(b"\x93NUMPY"):
            raise _Refused(_name_format(start, path))
        end = 10 + int.from_bytes(start[8:10], "little")  # of the header
        if may_hold_pairs and b"'|O'" in start[:end]:
            file.seek(end)
            return read_pickle(file.read(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of headers by Python 2
        # Mapped, a file whose header claims more than it holds takes no memory.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise _Refused(f"an array of type {array.dtype}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise _Refused(f"more bytes than shape {array.shape} takes")
    return array


def _name_format(start: bytes, path: Path) -> str:
    """Say what a file is that is no .npy file, by its first 512 bytes."""
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic):
            return name
    if path.suffix.lower() == ".pkl":  # of Python 2, whose first bytes vary
        return OTHER_FORMATS[b"\x80"]
    if start[257:262] == b"ustar":
        return "a tar archive"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if not start:
        return "an empty file"
    is_text = min(start) >= ord("\t")  # the lowest character of a text
    return "a text file" if is_text else "no valid .npy header"


def _scan_pickle(data: bytes) -> None:
    """Refuse a pickle by its opcodes, before any of them is carried out."""
    # The limit also bounds nesting, and the memo: it is an array that the unpickler
    # makes as long as the greatest index that the file names.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in SAFE_OPCODES:
            raise _Refused(f"a pickle with {opcode.name}")
        memo_index = argument if opcode.name == "LONG_BINPUT" else 0
        if count >= MAX_OPCODES or memo_index >= MAX_OPCODES:
            raise _Refused(f"a pickle of over {MAX_OPCODES:,} parts")


class _StandIn:
    """Remembers what an array or a type would be made of, and copies none of it."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if f"{module}.{name}" not in SAFE_NAMES:
            raise _Refused(f"a pickle that calls {module[:60]}.{name[:60]}")
        return _StandIn


def _items(node: Any, count: int) -> Sequence:
    """Return the items of a list, a tuple or an object array."""
    items = _content(node)
    if not isinstance(items, (list, tuple)):
        raise _Refused(f"a {type(items).__name__} in place of {count} items")
    if len(items) != count:
        raise _Refused(f"{len(items)} items in place of {count}, or not numpy.stacked")
    return items


def _numbers(node: Any) -> np.ndarray:
    array = _content(node)
    if not isinstance(array, np.ndarray):
        raise _Refused(f"a {type(array).__name__} in place of a numeric array")
    return array


def _content(node: Any) -> Any:
    """Return what a stand-in describes: an array, or a list of its items or rows."""
    if not isinstance(node, _StandIn):
        return node
    _, shape, dtype, fortran_order, data = node.state
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise _Refused("an array of impossible shape")
    size = math.prod(shape)
    code, byte_order = dtype.arguments[0], dtype.state[1]
    if code in ("O", "O4", "O8"):
        if not isinstance(data, list) or len(data) != size:
            raise _Refused("an object array with malformed contents")
        if len(shape) != 2 or size == 0:
            return data
        return [data[i : i + shape[1]] for i in range(0, size, shape[1])]
    if code not in NUMERIC_CODES or byte_order not in ("<", ">", "=", "|"):
        raise _Refused(f"an array of type {byte_order}{code}")
    dtype = np.dtype(byte_order.replace("|", "=") + code)
    if isinstance(data, _StandIn):  # bytes as Python 3 wrote them under protocol 2
        data = data.arguments[0]
    if isinstance(data, str):  # Python 2's, or of the line above
        data = data.encode("latin-1")
    if not isinstance(data, bytes) or len(data) != size * dtype.itemsize:
        raise _Refused(f"an array whose bytes do not fill its shape {shape}")
    order = "F" if fortran_order else "C"
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _split(images: np.ndarray, labels: np.ndarray | None) -> tuple:
    """Split a plain array by each image's rank: among its digit's, or in the file."""
    if len(images) < 7:
        raise _Refused(f"{len(images)} images, too few to split (at least 7)")
    rank = np.arange(len(images))
    if labels is not None:
        for digit in range(NUM_CLASSES):
            rank[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    if rank.max() < 6:  # there would be no test image
        rank = np.arange(len(images))
    test, valid = rank % 7 == 6, rank % 70 == 0
    parts = (~test & ~valid, valid, test)
    return tuple(Split(images[p], None if labels is None else labels[p]) for p in parts)


def _check_pairs(pairs: list[list[np.ndarray]], shapes: Shapes) -> tuple:
    all_images = [images for images, _ in pairs]
    splits = []
    for name, (images, labels) in zip(("train", "valid", "test"), pairs, strict=True):
        images = _check_images(images, shapes, f"{name} images", all_images)
        splits.append(Split(images, _check_labels(labels, len(images), name)))
    return tuple(splits)


def _check_images(
    images: np.ndarray, shapes: Shapes, what: str, all_images: list[np.ndarray]
) -> np.ndarray:
    """Return images as uint8 0..255, each of the first shape."""
    if images.shape[1:] not in shapes or len(images) == 0:
        raise _Refused(f"shape {images.shape} for {what}")
    if images.dtype == bool:
        images = images.view(np.uint8)  # a damaged file's may be other bytes than 0, 1
    is_float = images.dtype.kind == "f"
    # Asked of the file's other images, too: a split may hold nothing above 1 by chance.
    alike = [other for other in all_images if (other.dtype.kind == "f") == is_float]
    greatest = np.fmax.reduce([other.max(initial=0) for other in alike])
    end = 255 if greatest > 1 + ROUNDING else 1
    low, high = images.min(), images.max()  # NaN where any value is
    if not (low >= -end * ROUNDING and high <= end * (1 + ROUNDING)):
        raise _Refused(f"{images.dtype} values {low!s}..{high!s} in {what}")
    if images.dtype != np.uint8 or end == 1:
        batches = []
        for start in range(0, len(images), 4096):
            values = np.clip(images[start : start + 4096].astype(np.float64), 0, end)
            pixels = np.rint(values * (255 / end))
            is_fraction = abs(values - pixels) > ROUNDING
            if end == 255 and is_fraction.any():
                found = values[is_fraction][0]
                raise _Refused(f"{found} in {what}, of values up to {greatest!s}")
            batches.append(pixels.astype(np.uint8))
        images = np.concatenate(batches)
    if images.shape[1:] == (3, 28, 28):
        images = np.moveaxis(images, 1, -1)
    return np.ascontiguousarray(images.reshape(len(images), *shapes[0]))


def _check_labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Return labels as int64 0..9, (count,)."""
    if labels.shape == (count, NUM_CLASSES):
        if not np.isin(labels, (0, 1)).all() or (labels.sum(axis=1) != 1).any():
            raise _Refused(f"rows that are not one-hot in labels of {what}")
        labels = labels.argmax(axis=1)
    if labels.shape not in ((count,), (count, 1)):
        raise _Refused(f"shape {labels.shape} for labels of {what}")
    if not np.isin(labels, np.arange(NUM_CLASSES)).all():
        raise _Refused(f"values outside 0..9 in labels of {what}")
    return labels.astype(np.int64).reshape(count)
