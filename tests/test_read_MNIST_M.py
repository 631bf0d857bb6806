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
import zipfile
import zlib

import numpy as np
import pytest
from conftest import save_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import read_MNIST_M
from read_MNIST_M import DataError, find_file, load_digits, load_mnist_m, read_pickle

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (n, 28, 28, 3), np.uint8) for n in (5, 2, 3)]
LABELS = [RNG.integers(0, 10, n) for n in (5, 2, 3)]
PAIRS = list(zip(IMAGES, LABELS, strict=True))


def header_saying(text):
    text = text.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def header_of(shape, descr="|u1"):
    return header_saying(repr(dict(descr=descr, fortran_order=False, shape=shape)))


def npy_of(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def objects(items):
    content = np.empty(len(items), object)
    content[:] = items
    return content


def npz_of(count=15, **others):
    """An archive like Keras's mnist.npz, `count` training images and 4 for test."""
    file = io.BytesIO()
    y = np.arange(count + 4) % 10
    x = np.repeat(np.arange(count + 4, dtype=np.uint8), 784).reshape(-1, 28, 28)
    arrays = {"x_train": x[:-4], "y_train": y[:-4], "x_test": x[-4:], "y_test": y[-4:]}
    np.savez_compressed(file, **(arrays | others))
    return file.getvalue()


def npz_declaring(size):
    """An archive whose central directory declares a size for x_train."""
    content = npz_of()
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


class Python2Pickler:
    """Writes arrays as Python 2 did, opcode by opcode: bytes as BINSTRING."""

    def __init__(self, core):
        self.core = core.encode()

    def string(self, data):
        return b"T" + struct.pack("<i", len(data)) + data

    def integers(self, values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    def array(self, shape, code, data):
        dtype = b"cnumpy\ndtype\n(" + self.string(code) + b"K\x00K\x01tR(K\x03"
        dtype += self.string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
        new = b"c" + self.core + b".multiarray\n_reconstruct\n"
        new += b"(cnumpy\nndarray\n" + self.integers([0]) + self.string(b"b") + b"tR"
        return new + b"(K\x01" + self.integers(shape) + dtype + b"\x89" + data + b"tb"

    def numeric(self, array):
        code = array.dtype.str[1:].encode()
        return self.array(array.shape, code, self.string(array.tobytes()))

    def dump(self, pairs):
        items = [b"(" + self.numeric(x) + self.numeric(y) + b"t" for x, y in pairs]
        listed = b"](" + b"".join(items) + b"e"
        return b"\x80\x02" + self.array((len(pairs),), b"O8", listed) + b"."


def assert_read_right(path):
    for split, (images, labels) in zip(load_mnist_m(path), PAIRS, strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_python_2_pickle_loads_under_either_module_name(tmp_path, core):
    path = tmp_path / "MNIST_M.npy"
    pairs = [(images, np.eye(10, dtype=np.uint8)[labels]) for images, labels in PAIRS]
    path.write_bytes(header_of((3,), "|O") + Python2Pickler(core).dump(pairs))
    assert_read_right(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_python_3_pickle_loads_as_numpy_would_load_it(tmp_path, protocol):
    path = tmp_path / "MNIST_M.npy"
    content = objects([part for pair in PAIRS for part in pair]).reshape(3, 2)
    path.write_bytes(header_of((3, 2), "|O") + pickle.dumps(content, protocol))
    assert_read_right(path)


def test_other_types_and_shapes_are_understood(tmp_path):
    path = tmp_path / "x.npy"
    for change in (
        lambda images, labels: (np.asfortranarray(images / 255), np.eye(10)[labels]),
        lambda images, labels: ((images / 255).astype(np.float16), labels * 1.0),
        lambda images, labels: (images.astype(">f4"), labels[:, None]),  # 0..255
        lambda images, labels: (images.astype(np.int64), labels.astype(np.uint8)),
        lambda images, labels: (np.moveaxis(images, -1, 1), labels),
    ):
        save_pairs(path, [change(*pair) for pair in PAIRS])
        assert_read_right(path)


def test_floats_of_nothing_but_0_and_1_are_0_to_1(tmp_path):
    np.save(tmp_path / "data.npy", np.eye(7, 784, dtype=np.float32))
    assert load_digits(tmp_path / "data.npy")[1].images.max() == 255


def save_plain(folder, labels=None, shape=(784,), count=700):
    """Write images that tell their place in the file, and their labels."""
    images = np.zeros((count, 784))
    images[:, 0], images[:, 1] = np.divmod(np.arange(count), 256)
    np.save(folder / "data.npy", images.reshape(count, *shape) / 255)
    if labels is not None:
        np.save(folder / "label.npy", labels)
    return folder / "data.npy"


def places(splits):
    return [split.images[:, :2].astype(int) @ (256, 1) for split in splits]


@pytest.mark.parametrize("shape", [(784,), (28, 28), (28, 28, 1), (1, 28, 28)])
def test_plain_array_splits_by_the_fixed_rule(tmp_path, shape):
    splits = load_digits(save_plain(tmp_path, None, shape))
    assert [split.labels for split in splits] == [None] * 3
    train, valid, test = places(splits)
    assert list(valid) == list(range(0, 700, 70))
    assert list(test) == list(range(6, 700, 7))
    assert list(train) == [i for i in range(700) if i % 70 and i % 7 != 6]


@pytest.mark.parametrize("in_order", [True, False])
def test_plain_array_with_labels_splits_each_digit_in_proportion(tmp_path, in_order):
    labels = np.repeat(np.arange(10, dtype=np.uint8), 200)
    labels = labels if in_order else RNG.permutation(labels)
    splits = load_digits(save_plain(tmp_path, labels, count=2000))
    for split, place, count in zip(splits, places(splits), (169, 3, 28), strict=True):
        assert list(np.bincount(split.labels)) == [count] * 10
        np.testing.assert_array_equal(split.labels, labels[place])
        assert (np.diff(place) > 0).all()
    assert sorted(np.concatenate(places(splits))) == list(range(2000))
    threes = places(splits)[1][splits[1].labels == 3]
    assert list(threes) == list(np.flatnonzero(labels == 3)[::70])


def test_few_images_of_each_digit_split_by_their_place(tmp_path):
    splits = load_digits(save_plain(tmp_path, np.arange(20) % 10, count=20))
    assert [list(split.labels) for split in splits[1:]] == [[0], [6, 3]]
    with pytest.raises(DataError, match="data.npy: found 6 images"):
        load_digits(save_plain(tmp_path, np.zeros(6), count=6))


def test_labels_are_read_from_a_file_of_their_own(tmp_path, tiny_data):
    labels, other = np.arange(700) % 10, tmp_path / "other.npy"
    for content in (labels[:, None], labels.astype(np.float64), np.eye(10)[labels]):
        path = save_plain(tmp_path, content)
        (tmp_path / "label.npy").rename(tmp_path / "Label.npy")
        assert [list(np.bincount(split.labels)) for split in load_digits(path)] == [
            *([59] * 10, [1] * 10, [10] * 10)
        ]
    np.save(other, (labels + 1) % 10)
    assert load_digits(path, other)[1].labels[0] == 1
    with pytest.raises(DataError, match="absent.npy: found no such file"):
        load_digits(path, tmp_path / "absent.npy")
    with pytest.raises(DataError, match="data.npy: found labels of its own"):
        load_digits(tiny_data / "data.npy", other)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (npy_of(np.arange(699) % 10), r"shape \(699,\)"),
        (npy_of(np.zeros((700, 2))), r"shape \(700, 2\)"),
        (npy_of(np.zeros((700, 10))), "not one-hot"),
        (npy_of(np.tile([2, -1] + [0] * 8, (700, 1))), "not one-hot"),
        (npy_of(np.arange(700) % 11), "values outside 0..9"),
        (npy_of(np.arange(700) / 700), "values outside 0..9"),
        (npy_of(np.full(700, np.nan)), "values outside 0..9"),
        (npy_of(objects([0] * 700)), "type object"),
        (npz_of(), "no valid .npy header"),
    ],
)
def test_wrong_labels_are_told_with_their_file(tmp_path, content, found):
    path = save_plain(tmp_path)
    (tmp_path / "label.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"label\.npy: found .*{found}.*, expected "):
        load_digits(path)


def test_file_is_found_in_any_spelling(tmp_path, monkeypatch):
    path, other = tmp_path / "MNIST_M.npy", tmp_path / "Mnist_M.npy"
    assert find_file(path) == path
    assert find_file(tmp_path / "absent" / "x") == tmp_path / "absent" / "x"
    save_pairs(other, PAIRS)
    assert find_file(path) == other
    assert_read_right(path)
    path.write_bytes(other.read_bytes())
    assert find_file(path) == find_file(tmp_path / "mnist_m.npy") == path
    path.write_bytes(other.read_bytes()[:-1] + b"x")
    os.utime(path, (0, 0))
    os.utime(other, (0, 0))
    both = "MNIST_M.npy: found Mnist_M.npy beside it.*: keep one$"
    with pytest.raises(DataError, match=both):
        find_file(path)
    path.unlink()
    os.link(other, path)  # one file under two names needs no comparison
    monkeypatch.setattr(read_MNIST_M.filecmp, "cmp", None)
    assert find_file(path) == path


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1001, [1, 1000, 4]), (1000, [900, 100, 4]), (15, [14, 1, 4]), (2, [1, 1, 4])],
)
def test_archive_of_keras_is_split(tmp_path, count, sizes):
    path = tmp_path / "mnist.npz"
    path.write_bytes(npz_of(count))
    splits = load_digits(path)
    assert [split.images.shape for split in splits] == [(n, 784) for n in sizes]
    pixels = np.concatenate([split.images[:, 0] for split in splits])
    np.testing.assert_array_equal(pixels, np.arange(count + 4).astype(np.uint8))
    labels = np.concatenate([split.labels for split in splits])
    np.testing.assert_array_equal(labels, np.arange(count + 4) % 10)


class _Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("inside", ["array", "pairs", "npz"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "name",
    [
        *("system", "eval", "load", "partial", "attrgetter", "frombuffer", "zeros"),
        *("getattr", "scalar", "zip bomb", "loads"),
    ],
)
def test_hostile_pickle_is_refused_before_it_runs(tmp_path, name, protocol, inside):
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
    content = hostile if inside == "array" else objects([(IMAGES[0], hostile)] * 3)
    path = tmp_path / "MNIST_M.npy"
    path.write_bytes(header_of((3,), "|O") + pickle.dumps(content, protocol))
    if inside == "npz":
        path.write_bytes(npz_of(x_train=content))
    with pytest.raises(DataError, match="MNIST_M.npy.*: found .* expected") as error:
        load_mnist_m(path)
    assert "\n" not in str(error.value)
    assert not witness.exists()


TEXT = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"
LAUGHS = b"]q\x00" + (b"](" + b"h\x00" * 1_500 + b"eq\x00") * 5


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"(" * 20_000, id="nesting"),
        pytest.param(b"Nr" + struct.pack("<I", 2**32 - 1), id="memo"),
        pytest.param(b"\x8e" + struct.pack("<Q", 2**40), id="size"),
        pytest.param(b"\x82\x01", id="extension"),
        pytest.param(b"Pname\n", id="persistent id"),
        pytest.param(b"", id="empty"),
        pytest.param(LAUGHS, id="lists of the same lists"),
        pytest.param(TEXT + b"c_codecs\nencode\nh\x00\x85R" * 1_500, id="same text"),
    ],
)
def test_pickle_bomb_is_refused_at_once(data):
    data, started = b"\x80\x02" + data + b".", time.perf_counter()
    tracemalloc.start()
    with pytest.raises(DataError, match="somewhere: found"):
        read_pickle(data, "somewhere")
    assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + 2**22
    tracemalloc.stop()
    assert time.perf_counter() - started < 2


HUGE_SHAPE = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (0x{'f' * 9000},)}}"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 55580581\n"
IN_A_ZIP = io.BytesIO()
with zipfile.ZipFile(IN_A_ZIP, "w") as archive:
    archive.writestr("arr_0.npy", npy_of(IMAGES[0]))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"not an array, just text\n" * 10, "no valid .npy header"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 90, "no valid .npy header"),
        (b"\x93NUMPY\x03\x00" + bytes(90), "no valid .npy header"),
        (header_saying("(" * 9000), "no valid .npy header"),
        (header_saying("__import__('os').system('touch it_ran')"), "no valid"),
        (header_saying("{'descr': '|u1', 'shape': (7, 784)}"), "no valid"),
        (header_saying(HUGE_SHAPE), "impossible shape"),
        (header_of((-10, 784)), "impossible shape"),
        (header_of((0, 2**39, 2**39)), "an unreadable file"),
        (header_of((70, 784)) + bytes(1000), "1,000 bytes"),
        (header_of((10**9, 784)) + bytes(1000), "1,000 bytes"),
        (header_of((70, 785)) + bytes(70 * 785), "shape (70, 785)"),
        (header_of((0, 784)), "shape (0, 784)"),
        (header_of((3, 784)) + bytes(3 * 784), "3 images"),
        (header_of((7, 784), "<f8") + b"\xff" * 7 * 784 * 8, "values nan"),
        (npy_of(np.full((7, 784), np.inf)), "values inf"),
        (npy_of(np.full((7, 784), 1.5)), "values 1.5..1.5"),
        (npy_of(np.full((7, 784), 256.0)), "values 256..256"),
        (header_of((7, 784), "<i2") + b"\xff" * 7 * 784 * 2, "values -1"),
        (header_of((7, 784), "<U1") + bytes(7 * 784 * 4), "type <U1"),
        (header_of((7, 784), [("a" * 999, "|u1")]) + bytes(7 * 784), "type [('aaa"),
        (npy_of({"images": IMAGES[0]}), "a pickled dict"),
        (npy_of(objects([{"images": IMAGES[0]}] * 3)), "a pickled dict"),
        (npy_of(objects(IMAGES)), "3 items, 0 of them pairs"),
        (npy_of(objects([IMAGES[0][0]] * 700)), "700 separate images"),
        (npy_of(objects([IMAGES[0][0]] * 700)), "stack them: numpy.stack"),
        (pickle.dumps(IMAGES), "a bare pickle, not a .npy file"),
        (pickle.dumps(IMAGES), "save it by numpy.save"),
        (LFS, "a git-LFS pointer"),
        (LFS, "run git lfs pull"),
        (IN_A_ZIP.getvalue(), "an archive of arr_0.npy, expected a .npz"),
        (npz_of()[:-30], "an unreadable file (BadZipFile"),
        (
            npz_of().replace(b"K\x01\x02", b"K\x00\x02"),
            "an unreadable file (BadZipFile",
        ),
        (npz_of(x_train=np.float64(1)), "an unreadable file"),
        (npz_of(y_train=np.arange(14)), "shape (13,) for train labels"),
        (npz_of(1), "shape (0, 28, 28) for train images"),
        (npz_declaring(3 * 2**30), "3,221,225,472 bytes"),
        (npz_declaring(10**6), "bytes of data for shape (15, 28, 28)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_file_is_told_in_one_line(tmp_path, content, found):
    path = tmp_path / "data.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="^.*data.npy.*: found .*, expected ") as error:
        load_digits(path)
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_file_that_is_called_a_pickle_is_taken_at_its_word(tmp_path):
    (tmp_path / "data.pkl").write_bytes(b"(lp0\n.")  # protocol 0 has no first bytes
    with pytest.raises(DataError, match="a bare pickle, not a .npy file"):
        load_digits(tmp_path / "data.pkl")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[0], np.eye(10)[LABELS[0]][:-1]),
        (IMAGES[0], np.eye(10)[LABELS[0]] * 2),
        (IMAGES[0], LABELS[0] + 10),
        (IMAGES[0], np.full(5, np.nan)),
        (IMAGES[0], [LABELS[0]]),
        (IMAGES[0][:, :14], LABELS[0]),
        (IMAGES[0][:0], LABELS[0][:0]),
        (IMAGES[0] / 100.0, LABELS[0]),
    ],
)
def test_wrong_pair_is_refused(tmp_path, images, labels):
    save_pairs(tmp_path / "x.npy", [(images, labels), *PAIRS[1:]])
    with pytest.raises(DataError, match="train"):
        load_mnist_m(tmp_path / "x.npy")


@pytest.mark.parametrize("refused", ["call at the end", "do not fill"])
def test_refusing_takes_memory_in_proportion_to_the_file(tmp_path, refused):
    pickler = Python2Pickler("numpy.core")
    pixels = pickler.string(bytes(20_000_000))
    data = pixels + b"cos\nsystem\n(K\x01tR"
    if refused == "do not fill":
        data = pickler.array((2**30, 2**30), b"u1", pixels)
    path = tmp_path / "x.npy"
    path.write_bytes(header_of((3,), "|O") + b"\x80\x02" + data + b".")
    tracemalloc.start()
    with pytest.raises(DataError, match="do not fill|calls os.system"):
        load_mnist_m(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size


def test_reader_starts_without_tensorflow():
    code = "import sys, read_MNIST_M; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Valid files of every kind that is read, small.
SMALL = [(images[:1], labels[:1]) for images, labels in PAIRS]
SAMPLES = [
    header_of((3,), "|O") + Python2Pickler("numpy.core").dump(SMALL),
    *(header_of((3,), "|O") + pickle.dumps(objects(SMALL), n) for n in (2, 4)),
    npy_of(np.concatenate(IMAGES)[:9]),
    npz_of(x_train=IMAGES[1], y_train=LABELS[1], x_test=IMAGES[2], y_test=LABELS[2]),
]
KINDS = st.sampled_from(["set", "insert", "delete", "cut", "repeat"])
EDIT = st.tuples(KINDS, st.floats(0, 1), st.binary(min_size=1, max_size=9))


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.sampled_from(SAMPLES).map(bytearray),
    edits=st.lists(EDIT, min_size=1, max_size=4),
    near=st.sampled_from(["the start", "the end", "anything"]),
)
def test_mutated_file_is_read_right_or_refused(tmp_path, content, edits, near):
    # The pixels are most of the bytes; what has structure is at both ends.
    reach = len(content) if near == "anything" else 700
    first = len(content) - reach if near == "the end" else 0
    for kind, place, new in edits:
        at = first + int(place * reach)
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
