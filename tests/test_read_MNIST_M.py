"""The loader: what it accepts, what it refuses, and that nothing hostile runs."""

import codecs
import io
import os
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import save_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

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


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did."""

    def save_string(self, data):
        data = data.encode() if isinstance(data, str) else data
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python_2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def assert_read_right(path):
    for split, (images, labels) in zip(load_mnist_m(path), PAIRS, strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)


def test_pickle_of_any_python_loads(tmp_path):
    path = tmp_path / "MNIST_M.npy"
    flat = objects([part for pair in PAIRS for part in pair])
    for content in (objects(PAIRS), flat.reshape(3, 2)):
        pickles = [pickle.dumps(content, protocol) for protocol in (2, 3, 4)]
        for data in (python_2_pickle(content), *pickles):
            path.write_bytes(header_of(content.shape, "|O") + data)
            assert_read_right(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels: (np.asfortranarray(images / 255), np.eye(10)[labels]),
        lambda images, labels: (images / 254.9, labels * 1.0),  # a hair above 1
        lambda images, labels: (images.astype(">f4"), labels[:, None]),  # 0..255
        lambda images, labels: (np.moveaxis(images, -1, 1), labels.astype(np.uint8)),
    ],
)
def test_other_types_and_shapes_are_understood(tmp_path, change):
    save_pairs(tmp_path / "x.npy", [change(*pair) for pair in PAIRS])
    assert_read_right(tmp_path / "x.npy")


@pytest.mark.parametrize("kind", [bool, np.int8, np.float32])
def test_images_of_nothing_but_0_and_1_are_black_and_white(tmp_path, kind):
    path = tmp_path / "x.npy"
    np.save(path, np.eye(7, 784, dtype=kind))
    assert load_digits(path)[2].images.tolist() == [[0] * 6 + [255] + [0] * 777]
    save_pairs(path, [((images > 99).astype(kind), labels) for images, labels in PAIRS])
    for split, images in zip(load_mnist_m(path), IMAGES, strict=True):
        np.testing.assert_array_equal(split.images, 255 * (images > 99))
    # The range is that of the whole file: here 0..255, though one split is black.
    pairs = [((images // 2).astype(kind), labels) for images, labels in PAIRS]
    pairs[1][0][:] = 1
    if kind is not bool:
        save_pairs(path, pairs)
        assert load_mnist_m(path)[1].images.max() == 1


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


def test_plain_array_splits_by_the_fixed_rule(tmp_path):
    for shape in [(784,), (28, 28), (28, 28, 1), (1, 28, 28)]:
        splits = load_digits(save_plain(tmp_path, None, shape))
        assert [split.labels for split in splits] == [None] * 3
        train, valid, test = places(splits)
        assert list(valid) == list(range(0, 700, 70))
        assert list(test) == list(range(6, 700, 7))
        assert list(train) == [i for i in range(700) if i % 70 and i % 7 != 6]
    images = np.concatenate(IMAGES)
    np.save(tmp_path / "x.npy", images)
    _, valid, test = load_mnist_m(tmp_path / "x.npy")
    np.testing.assert_array_equal(valid.images, images[:1])
    np.testing.assert_array_equal(test.images, images[6:7])
    assert test.labels is None


def test_plain_array_with_labels_splits_each_digit_in_proportion(tmp_path):
    labels = RNG.permutation(np.repeat(np.arange(10), 200))
    splits = load_digits(save_plain(tmp_path, labels, count=2000))
    for split, place, count in zip(splits, places(splits), (169, 3, 28), strict=True):
        assert list(np.bincount(split.labels)) == [count] * 10
        np.testing.assert_array_equal(split.labels, labels[place])
    assert sorted(np.concatenate(places(splits))) == list(range(2000))
    threes = places(splits)[1][splits[1].labels == 3]
    assert list(threes) == list(np.flatnonzero(labels == 3)[::70])
    # Too few of each digit: by their place in the file.
    splits = load_digits(save_plain(tmp_path, np.arange(20) % 10, count=20))
    assert [list(split.labels) for split in splits[1:]] == [[0], [6, 3]]


def test_labels_are_read_from_a_file_of_their_own(tmp_path, tiny_data):
    labels, other = np.arange(700) % 10, tmp_path / "other.npy"
    path = save_plain(tmp_path, np.eye(10)[labels])
    (tmp_path / "label.npy").rename(tmp_path / "Label.npy")
    assert load_digits(path)[1].labels[0] == 0
    np.save(other, (labels[:, np.newaxis] + 1) % 10)
    assert load_digits(path, other)[1].labels[0] == 1
    with pytest.raises(DataError, match="data.npy: found labels of its own"):
        load_digits(tiny_data / "data.npy", other)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.arange(699) % 10, r"shape \(699,\)"),
        (np.tile([2, -1] + [0] * 8, (700, 1)), "not one-hot"),
        (np.full(700, np.nan), "values outside 0..9"),
    ],
)
def test_wrong_labels_are_told_with_their_file(tmp_path, labels, found):
    path = save_plain(tmp_path, labels)
    with pytest.raises(DataError, match=rf"label\.npy: found .*{found}.*, expected "):
        load_digits(path)


def test_file_is_found_in_any_spelling(tmp_path, capsys):
    path, first = tmp_path / "MNIST_M.npy", tmp_path / "MNIST_m.npy"
    assert find_file(path) == path
    (tmp_path / "Mnist_M.npy").touch()
    assert find_file(path) == tmp_path / "Mnist_M.npy"
    assert capsys.readouterr().out == ""
    first.touch()
    assert find_file(path) == first
    assert "the first is taken for 'MNIST_M.npy'" in capsys.readouterr().out


class _Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "hostile",
    [
        _Call(os.system, "touch it_ran"),
        _Call(eval, "open('it_ran', 'w')"),
        _Call(codecs.decode, zlib.compress(bytes(10**6)), "zlib"),
    ],
)
def test_hostile_pickle_is_refused_before_it_runs(tmp_path, monkeypatch, hostile):
    monkeypatch.chdir(tmp_path)
    content = objects([(IMAGES[0], hostile)] * 3)
    path = tmp_path / "MNIST_M.npy"
    for protocol in (2, 4):
        path.write_bytes(header_of((3,), "|O") + pickle.dumps(content, protocol))
        with pytest.raises(DataError, match="MNIST_M.npy: found a pickle that calls"):
            load_mnist_m(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def peak_memory():
    """Return a function that says how many bytes were allocated at most."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


TEXT = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", "over 10,000 parts"),
        (b"]q\x00" + (b"](" + b"h\x00" * 1_500 + b"eq\x00") * 5 + b".", "1500 items"),
        (b"](" + TEXT + b"c_codecs\nencode\nh\x00\x85R" * 1_500 + b"e.", "1501 items"),
    ],
    ids=["memo", "nested", "repeated"],
)
def test_pickle_bomb_is_refused_in_little_memory(peak_memory, data, found):
    with pytest.raises(DataError, match=f"^somewhere: found .*{found}"):
        read_pickle(data, "somewhere")
    assert peak_memory() < 10 * len(data) + 2**22


FULL = pickle.dumps(objects([(np.zeros((2, 3), np.uint8),) * 2] * 3), 2)
DIGITS = np.ones((5, 784), np.uint8)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (header_saying("__import__('os').system('touch it_ran')"), "bad data"),
        (header_of((10**9, 784)) + bytes(1000), "greater than file size"),
        (header_of((7, 784)) + bytes(7 * 784 + 1), "more bytes than shape"),
        (header_of((3, 784)) + bytes(3 * 784), "3 images"),
        (npy_of(np.full((7, 784), np.nan)), "values nan"),
        (npy_of(np.full((7, 784), 1.5)), "1.5 in the array"),
        (npy_of(objects(IMAGES)), "a ndarray in place of 2 items"),
        (npy_of(objects([(DIGITS, LABELS[1])] * 3)), "shape (2,) for labels of train"),
        (header_of((3,), "|O") + FULL.replace(b"K\x02K", b"K\xffK"), "not fill"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "a zip or .npz archive"),
        (b"\n<!doctype HTML><title>Sign in</title>", "an HTML page"),
        ("label,pixel0\nsé,0\n".encode("latin-1"), "a text file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_file_is_told_in_one_line(tmp_path, content, found):
    path = tmp_path / os.fsdecode(b"donn\xe9es\n.npy")  # no UTF-8, and a line end
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"donn\?es\?.npy: found ") as error:
        load_digits(path)
    assert found in str(error.value)
    assert ", expected " in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


# Valid files of every kind that is read, small.
SMALL = objects([(images[:1], labels[:1]) for images, labels in PAIRS])
SAMPLES = [
    header_of((3,), "|O") + python_2_pickle(SMALL),
    header_of((3,), "|O") + pickle.dumps(SMALL, 4),
    npy_of(np.concatenate(IMAGES)[:9]),
]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    sample=st.sampled_from(SAMPLES),
    place=st.integers(-700, 700),  # between the two ends are pixels alone
    removed=st.integers(0, 9),
    new=st.binary(max_size=9),
)
def test_damaged_file_is_read_right_or_refused(
    tmp_path_factory, sample, place, removed, new
):
    content, at = bytearray(sample), place % len(sample)
    content[at : at + removed] = new
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(content)
    try:
        splits = load_mnist_m(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    for images, labels in splits:
        assert (images.dtype, images.shape[1:]) == (np.uint8, (28, 28, 3))
        assert labels is None or set(labels) <= set(range(10))
