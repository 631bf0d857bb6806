"""The loader: what it accepts, what it refuses, and that nothing hostile runs."""

import codecs
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import save_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from read_MNIST_M import DataError, load_digits, load_mnist_m, read_pickle

RNG = np.random.default_rng(0)
SIZES = (5, 2, 3)
IMAGES = [RNG.integers(0, 256, (n, 28, 28, 3), np.uint8) for n in SIZES]
LABELS = [RNG.integers(0, 10, n) for n in SIZES]
ONE_HOT = [np.eye(10)[labels] for labels in LABELS]


def npy_of_objects(pickled, count=3):
    """A .npy file whose object array is the given pickle."""
    file = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + pickled


class Python2Pickler:
    """Writes arrays as Python 2 did, opcode by opcode: bytes as BINSTRING."""

    def __init__(self, core):
        self.core = core.encode()

    def string(self, data):
        return b"T" + struct.pack("<i", len(data)) + data

    def integers(self, values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    def array(self, shape, code, data):
        dtype = b"cnumpy\ndtype\n(" + self.string(code) + b"K\x00K\x01tR"
        dtype += (
            b"(K\x03" + self.string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        )
        dtype += b"K\x00tb"
        new = b"c" + self.core + b".multiarray\n_reconstruct\n"
        new += b"(cnumpy\nndarray\n" + self.integers([0]) + self.string(b"b") + b"tR"
        state = b"(K\x01" + self.integers(shape) + dtype + b"I00\n" + data + b"tb"
        return new + state.replace(b"I00\n", b"\x89")

    def numeric(self, array):
        code = array.dtype.str[1:].encode()
        return self.array(array.shape, code, self.string(array.tobytes()))

    def dump(self, pairs):
        items = b"".join(
            b"(" + self.numeric(images) + self.numeric(labels) + b"t"
            for images, labels in pairs
        )
        objects = b"](" + items + b"e"
        return b"\x80\x02" + self.array((len(pairs),), b"O8", objects) + b"."


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_python_2_pickle_loads_under_either_module_name(tmp_path, core):
    path = tmp_path / "MNIST_M.npy"
    pairs = list(zip(IMAGES, [x.astype(np.uint8) for x in ONE_HOT], strict=True))
    path.write_bytes(npy_of_objects(Python2Pickler(core).dump(pairs)))
    for split, images, labels in zip(load_mnist_m(path), IMAGES, LABELS, strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_python_3_pickle_loads_as_numpy_would_load_it(tmp_path, protocol):
    content = np.empty((3, 2), object)
    for row, pair in enumerate(zip(IMAGES, LABELS, strict=True)):
        content[row, 0], content[row, 1] = pair
    path = tmp_path / "MNIST_M.npy"
    path.write_bytes(npy_of_objects(pickle.dumps(content, protocol)))
    for split, images, labels in zip(load_mnist_m(path), IMAGES, LABELS, strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_fortran_order_and_floats_are_understood(tmp_path):
    images = [np.asfortranarray(x / np.float64(255)) for x in IMAGES]
    save_pairs(tmp_path / "x.npy", list(zip(images, ONE_HOT, strict=True)))
    for split, expected in zip(load_mnist_m(tmp_path / "x.npy"), IMAGES, strict=True):
        np.testing.assert_array_equal(split.images, expected)


@pytest.mark.parametrize("shape", [(784,), (28, 28)])
def test_plain_array_splits_by_the_fixed_rule(tmp_path, shape):
    images = np.zeros((140, *shape), np.uint8)
    images[(slice(None),) + (0,) * len(shape)] = np.arange(140)
    np.save(tmp_path / "data.npy", images)
    train, valid, test = load_digits(tmp_path / "data.npy")
    assert train.labels is None
    assert list(valid.images[:, 0]) == [0, 70]
    assert list(test.images[:, 0]) == list(range(6, 140, 7))
    together = np.concatenate([split.images[:, 0] for split in (train, valid, test)])
    assert sorted(together) == list(range(140))


class _Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("in_items", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "name",
    [
        *("system", "eval", "load", "partial", "attrgetter", "frombuffer", "zeros"),
        *("getattr", "scalar", "zip bomb", "loads"),
    ],
)
def test_hostile_pickle_is_refused_before_it_runs(tmp_path, name, protocol, in_items):
    witness = tmp_path / "it_ran"
    hostile = {
        "system": _Call(os.system, f"touch {witness}"),
        "eval": _Call(eval, f"open({str(witness)!r}, 'w')"),
        "load": _Call(np.load, str(witness)),
        "partial": _Call(functools.partial, os.system, f"touch {witness}"),
        "attrgetter": _Call(operator.attrgetter, "system.__call__"),
        "frombuffer": _Call(np.frombuffer, b"1234"),
        "zeros": _Call(np.zeros, 10),
        "getattr": _Call(getattr, np.zeros, "__call__"),
        "scalar": _Call(type(np.uint8(1)), 1),
        "zip bomb": _Call(codecs.decode, zlib.compress(bytes(10**6)), "zlib"),
        "loads": _Call(pickle.loads, pickle.dumps(0)),
    }[name]
    content = np.empty(3, object)
    content[:] = [(IMAGES[0], hostile)] * 3 if in_items else [hostile] * 3
    path = tmp_path / "MNIST_M.npy"
    data = pickle.dumps(content if in_items else hostile, protocol)
    path.write_bytes(npy_of_objects(data))
    with pytest.raises(DataError, match="MNIST_M.npy: found .* expected") as error:
        load_mnist_m(path)
    assert "\n" not in str(error.value)
    assert not witness.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"(" * 20_000 + b".",
        b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02\x82\x01.",
        b"\x80\x02Pname\n.",
        b"",
        b"\x80\x02N",
    ],
    ids=["nesting", "memo", "size", "extension", "persistent id", "empty", "cut off"],
)
def test_pickle_bomb_is_refused_at_once(data):
    started = time.perf_counter()
    with pytest.raises(DataError, match="somewhere: found"):
        read_pickle(data, "somewhere")
    assert time.perf_counter() - started < 1


def test_array_that_declares_more_than_it_holds_is_refused(tmp_path):
    pickler = Python2Pickler("numpy.core")
    array = pickler.array((2**30, 2**30), b"u1", pickler.string(b"1234"))
    with pytest.raises(DataError, match="do not fill"):
        read_pickle(b"\x80\x02" + array + b".", "x")


def header_of(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def header_saying(text):
    text = text.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"not an array, just text\n" * 10, "no valid .npy header"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 90, "no valid .npy header"),
        (header_saying("(" * 9000), "no valid .npy header"),
        (header_saying("__import__('os').system('touch it_ran')"), "no valid"),
        (header_saying("{'descr': '|u1', 'shape': (7, 784)}"), "no valid"),
        (
            header_saying("{'descr': '|u1', 'fortran_order': 2, 'shape': (7, 784)}"),
            "no valid .npy header",
        ),
        (header_of((70, 784)) + bytes(1000), "1,000 bytes"),
        (header_of((10**9, 784)) + bytes(1000), "1,000 bytes"),
        (header_of((-10, 784)), "shape"),
        (header_of((70, 785)) + bytes(70 * 785), "shape"),
        (header_of((0, 784)), "no image"),
        (header_of((3, 784)) + bytes(3 * 784), "3 images"),
        (header_of((7, 784), "<f8") + b"\xff" * 7 * 784 * 8, "values nan"),
        (header_of((7, 784), "<i2") + b"\xff" * 7 * 784 * 2, "values -1"),
        (header_of((7, 784), "<U1") + bytes(7 * 784 * 4), "type <U1"),
        (header_of((7, 784), [("a", "|u1")]) + bytes(7 * 784), "type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_file_is_told_in_one_line(tmp_path, content, found):
    path = tmp_path / "data.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_digits(path)
    message = str(error.value)
    assert message.startswith(f"{path}: found ")
    assert found in message
    assert ", expected " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[0], ONE_HOT[0][:-1]),
        (IMAGES[0], ONE_HOT[0] * 2),
        (IMAGES[0], LABELS[0] + 10),
        (IMAGES[0], np.full(5, np.nan)),
        (IMAGES[0][:, :14], ONE_HOT[0]),
        (IMAGES[0][:0], ONE_HOT[0][:0]),
        (IMAGES[0] / 100.0, ONE_HOT[0]),
    ],
)
def test_wrong_pair_is_refused(tmp_path, images, labels):
    pairs = [(images, labels), (IMAGES[1], LABELS[1]), (IMAGES[2], LABELS[2])]
    save_pairs(tmp_path / "x.npy", pairs)
    with pytest.raises(DataError, match="train"):
        load_mnist_m(tmp_path / "x.npy")


def test_splits_of_one_image_are_read(tmp_path):
    one = (IMAGES[0][:1], ONE_HOT[0][:1])
    save_pairs(tmp_path / "x.npy", [one] * 3)
    assert [split.images.shape for split in load_mnist_m(tmp_path / "x.npy")] == [
        (1, 28, 28, 3)
    ] * 3


@pytest.mark.parametrize("refused", ["call at the end", "huge shape"])
def test_refusing_takes_memory_in_proportion_to_the_file(tmp_path, refused):
    pickler = Python2Pickler("numpy.core")
    pixels = pickler.string(bytes(20_000_000))
    if refused == "huge shape":
        data = pickler.array((2**30, 2**30), b"u1", pixels)
    else:
        data = pixels + b"cos\nsystem\n(K\x01tR"
    path = tmp_path / "x.npy"
    path.write_bytes(npy_of_objects(b"\x80\x02" + data + b"."))
    tracemalloc.start()
    with pytest.raises(DataError):
        load_mnist_m(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size


def test_truncated_pickle_is_refused(tmp_path, tiny_data):
    content = (tiny_data / "data.npy").read_bytes()
    path = tmp_path / "data.npy"
    for size in (len(content) // 2, len(content) - 1, 200):
        path.write_bytes(content[:size])
        with pytest.raises(DataError):
            load_digits(path)


def test_readers_start_without_tensorflow():
    code = "import sys, make_data, read_MNIST_M; print('tensorflow' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def samples():
    """Valid files of every kind that is read, small: their bytes."""
    pairs = [(x[:2], y[:2]) for x, y in zip(IMAGES, LABELS, strict=True)]
    content = np.empty(3, object)
    content[:] = pairs
    plain = io.BytesIO()
    np.save(plain, np.concatenate([x[:3] for x in IMAGES]))
    return [
        npy_of_objects(Python2Pickler("numpy.core").dump(pairs)),
        *(npy_of_objects(pickle.dumps(content, protocol)) for protocol in (2, 4)),
        plain.getvalue(),
    ]


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(which=st.integers(0, 3), edits=EDITS, near_the_structure=st.booleans())
def test_mutated_file_is_read_right_or_refused(
    tmp_path, which, edits, near_the_structure
):
    content = bytearray(samples()[which])
    # The pixels are most of the bytes; what has structure is at both ends.
    reach = min(len(content), 700 if near_the_structure else len(content))
    for kind, place, new in edits:
        at = int(place * reach)
        if kind == "set":
            content[at : at + len(new)] = new
        elif kind == "insert":
            content[at:at] = new
        elif kind == "delete":
            del content[at : at + len(new)]
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = content[at : at + 50]
    path = tmp_path / "mutated.npy"
    path.write_bytes(content)
    try:
        splits = load_mnist_m(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    for images, labels in splits:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (28, 28, 3)
        assert len(images) > 0
        assert labels is None or (labels.shape == images.shape[:1])
        assert labels is None or set(labels.tolist()) <= set(range(10))
