"""Beyond the homework: question 2's finished runs as one page to play with.

    python -m extras.explorer    # writes figures/q2_explorer.html

The page works by a double click, without a server or a network connection: the networks
travel in it, and JavaScript applies them. `explorer.html` is its template. Weights are
rounded to 8 bits; in the first and the last layer, which the output depends on most, to
16 bits. What this changes in the output is measured, and too large a change is refused.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from pathlib import Path
from typing import Any

import utils

import keras
import numpy as np

import q2_aae  # it also registers the layers that the encoder holds
from files import describe_source, replacing
from read_MNIST_M import find_file, load_digits

TEMPLATE = Path(__file__).with_suffix(".html")
CONTROL_DIR = Path("runs/q2_control")  # may be missing
LIMIT = 8_000_000  # bytes of the page
DIGITS = 40  # of a class whose true images travel along
AXES = 10  # that have a slider
CHECKED = 3_000  # codes of images, and as many draws from the prior
# How much rounding may change outputs: on average over each image or code, and at most.
PIXEL_TOLERANCES = 3 / 255, 12 / 255  # of 0..1
CODE_TOLERANCES = 0.1, 0.2  # of informative coordinates, which deviate by about 1
ACTIVATIONS = "linear", "sigmoid", "gelu"  # that the page knows; gelu in its erf form
Run = dict[str, keras.Model]  # "encoder" and "decoder"


def load_run(folder: Path, data_digest: str, command: str) -> Run:
    """Load a run's decoder, and its encoder up to the informative coordinates.

    `data_digest` is the SHA-256 of the data file that the run must be of; `command`
    trains such a run.

    Raises:
        UsageError: a file is missing or damaged, or the files don't belong together.
    """
    path = folder / "networks.json"
    with utils.damage_told(path, f"the record of a run on this data; run {command}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        record = {name: content[name] for name in ("data", "encoder", "decoder")}
        if record["data"] != data_digest:
            raise ValueError("the record of a run on other data")
    run = {}
    for name in ("encoder", "decoder"):
        path = folder / f"{name}.keras"
        expected = f"the {name} of networks.json; run {command}"
        with utils.damage_told(path, expected):
            run[name] = keras.saving.load_model(path)
            if utils.weights_digest(run[name]) != record[name]:
                raise ValueError("another network")
            if not all(np.isfinite(array).all() for array in run[name].get_weights()):
                raise ValueError("weights that are not finite")
    pixels, encoder = q2_aae.PIXELS, run["encoder"]
    expected = f"networks from {pixels} pixels to a code and back; run {command}"
    with utils.damage_told(folder, expected):
        shapes = [model.input_shape + model.output_shape for model in run.values()]
        code_dim = encoder.output_shape[-1]
        if shapes != [(None, pixels, None, code_dim), (None, code_dim, None, pixels)]:
            raise ValueError(f"an encoder and a decoder of shapes {shapes}")
        # Its weights are all of the encoder's: the layer that appends draws has none.
        informative = encoder.get_layer("informative").output
        run["encoder"] = keras.Model(encoder.inputs, informative)
    return run


def load_map(folder: Path, count: int, encoder: keras.Model) -> np.ndarray:
    """Load the t-SNE map of an encoder's `count` codes.

    Returns:
        The points, float64 (count, 2), scaled to 0..1 along the longer side.
    """
    path = folder / "tsne.npz"
    expected = f"this encoder's map of {count} codes; run python q2_aae.py to its end"
    with utils.damage_told(path, expected), np.load(path) as file:
        if str(file["encoder"]) != utils.weights_digest(encoder):
            raise ValueError("a map of another encoder's codes")
        points = file["points"].astype(np.float64)
        if points.shape != (count, 2):
            raise ValueError(f"points of shape {points.shape}")
        if not np.isfinite(points).all() or not np.ptp(points):
            raise ValueError("points that are not finite, or all the same")
        return (points - points.min(axis=0)) / np.ptp(points, axis=0).max()


def round_columns(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round an array (N, D) to whole numbers times a scale for each column.

    Returns:
        The whole numbers, intBITS (N, D), and the scales, float32 (D,).
    """
    largest = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(values).max(axis=0) / largest, 1e-9).astype("<f4")
    return np.rint(values / scales).astype(f"<i{bits // 8}"), scales


def pack_network(
    path: Path, model: keras.Model, inputs: np.ndarray, tolerances: tuple[float, float]
) -> tuple[dict[str, Any], bytes]:
    """Round a file's network, and measure what this changes for inputs (N, I).

    Returns:
        A description for JavaScript, in which value 0 is the input, and step i makes
        value i + 1 from the values that `from` names; and the weights' bytes.

    Raises:
        UsageError: the page can't apply the network, or rounding changes it too much.
    """
    dense = [each for each in model.layers if isinstance(each, keras.layers.Dense)]
    rounded = keras.models.clone_model(model)
    steps, data, numbers = [], b"", {id(model.inputs[0]): 0}
    for layer in model.operations[1:]:  # the first is the input
        kind, activation = type(layer).__name__, "linear"
        sources = [numbers[id(each)] for each in keras.tree.flatten(layer.input)]
        step = {"op": kind.lower(), "from": sources, "units": layer.output.shape[-1]}
        if layer in dense:
            activation = layer.activation.__name__
            bits = 16 if layer in (dense[0], dense[-1]) else 8
            step |= {"activation": activation, "bits": bits}
            kernel, bias = layer.get_weights()
            whole, scales = round_columns(kernel, bits)
            rounded.get_layer(layer.name).set_weights([whole * scales, bias])
            data += bias.astype("<f4").tobytes() + scales.tobytes() + whole.tobytes()
        if kind not in ("Dense", "Add") or activation not in ACTIVATIONS:
            found = f"{path}: found a layer of kind {kind}, {activation}"
            raise utils.UsageError(f"{found}, expected what the page can apply")
        steps.append(step)
        numbers[id(layer.output)] = len(steps)

    exact = predict_finite(path, model, inputs)
    difference = np.abs(utils.predict(rounded, inputs) - exact)
    changes = float(difference.mean(axis=1).max()), float(difference.max())
    if changes[0] > tolerances[0] or changes[1] > tolerances[1]:
        raise utils.UsageError(
            f"{path}: found that rounding changes an output by {changes[0]:.3f} on "
            f"average and {changes[1]:.3f} at most, expected {tolerances[0]:.3f} and "
            f"{tolerances[1]:.3f} at most"
        )
    described = {"inputs": inputs.shape[1], "steps": steps, "checked": len(inputs)}
    return described | {"mean_change": changes[0], "largest_change": changes[1]}, data


def predict_finite(path: Path, model: keras.Model, inputs: np.ndarray) -> np.ndarray:
    """Return what the model of a file makes of inputs, if all of it is finite."""
    outputs = utils.predict(model, inputs)
    if not np.isfinite(outputs).all():
        found = f"{path}: found outputs that are not finite"
        raise utils.UsageError(f"{found}, expected finite ones")
    return outputs


def rank_axes(run: Run) -> list[dict[str, float]]:
    """Rank informative coordinates by how much the image changes from -1 to +1.

    `change` is the mean squared change of a pixel, in 0..1, about random codes.
    """
    count, code_dim = run["encoder"].output_shape[-1], run["decoder"].input_shape[-1]
    codes = np.random.default_rng(0).standard_normal((32, code_dim))
    moved = np.tile(codes, (count, 2, 1, 1))
    for axis in range(count):
        moved[axis, 0, :, axis] = -1
        moved[axis, 1, :, axis] = 1
    images = utils.predict(run["decoder"], moved.reshape(-1, code_dim))
    low, high = images.reshape(count, 2, -1).transpose(1, 0, 2)
    changes = np.square(high - low).mean(axis=1)
    first = np.argsort(changes)[::-1][:AXES].tolist()
    return [{"coordinate": axis, "change": float(changes[axis])} for axis in first]


def collect(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what the page holds: plain data, and bytes by name."""
    images, labels = load_digits(options.data, options.labels)[0]
    if labels is None:
        expected = "labels (--labels names their file)"
        raise utils.UsageError(f"{options.data}: found no labels, expected {expected}")
    digest, command = describe_source(options.data)["sha256"], "python q2_aae.py"
    folders = {"main": options.run_dir, "control": options.control_dir or CONTROL_DIR}
    runs = {"main": load_run(folders["main"], digest, command)}
    if options.control_dir or CONTROL_DIR.exists():
        runs["control"] = load_run(folders["control"], digest, f"{command} --control")
    points = load_map(options.run_dir, len(images), runs["main"]["encoder"])

    numbers = [np.flatnonzero(labels == digit)[:DIGITS] for digit in range(10)]
    numbers = np.concatenate(numbers)
    meta = {"count": len(images), "digits": numbers.tolist()}
    blobs = {"digits": images[numbers].tobytes()}
    images, rng = utils.unit_floats(images), np.random.default_rng(0)
    for name, run in runs.items():
        path = folders[name] / "encoder.keras"
        codes = predict_finite(path, run["encoder"], images)
        meta[name] = {"informative": codes.shape[1]}
        if name == "main":
            whole, scales = round_columns(codes, 8)
            blobs["map"] = np.rint(points * 65535).T.astype("<u2").tobytes()
            blobs["map"] += labels.astype(np.uint8).tobytes()
            blobs["map"] += scales.tobytes() + whole.tobytes()
            packed = pack_network(path, run["encoder"], images, CODE_TOLERANCES)
            meta[name]["encoder"], blobs["main-encoder"] = packed
        else:  # its encoder stays behind; some codes travel
            whole, scales = round_columns(codes[numbers], 8)
            blobs["control-codes"] = scales.tobytes() + whole.tobytes()
        some = codes[rng.permutation(len(codes))[:CHECKED]]
        shape = len(some) + CHECKED, run["decoder"].input_shape[-1]
        checked = rng.standard_normal(shape).astype(np.float32)
        checked[: len(some), : some.shape[1]] = some  # the rest are draws
        path = folders[name] / "decoder.keras"
        packed = pack_network(path, run["decoder"], checked, PIXEL_TOLERANCES)
        meta[name]["decoder"], blobs[f"{name}-decoder"] = packed
        meta[name]["axes"] = rank_axes(run)
    return meta, blobs


def write_page(meta: dict[str, Any], blobs: dict[str, bytes]) -> bytes:
    """Return the page: the template with the data in it."""
    tags = []
    for name, data in {"meta": json.dumps(meta).encode(), **blobs}.items():
        text = base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")
        tags.append(f'<script type="text/plain" id="blob-{name}">{text}</script>')
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("<!-- DATA -->", "\n".join(tags)).encode()


def given_path(text: str) -> Path:
    """Read a path from the command line."""
    if not text:
        raise argparse.ArgumentTypeError("found an empty path")
    return Path(text)


def main() -> None:
    """Write the page."""
    parser = utils.OneLineParser(description="Write question 2's runs as a page.")
    common = {"type": given_path, "metavar": "PATH", "help": "default: %(default)s"}
    parser.add_argument("--run-dir", default=Path("runs/q2"), **common)
    text = f"default: {CONTROL_DIR} if it exists"
    parser.add_argument("--control-dir", **common | {"help": text})
    parser.add_argument("--data", default=Path("data.npy"), **common)
    text = "labels of a data file without (default: label.npy beside it, if there)"
    parser.add_argument("--labels", **common | {"help": text})
    output = Path("figures/q2_explorer.html")
    parser.add_argument("--output", default=output, **common)
    options = parser.parse_args()
    options.data = find_file(options.data)
    print("Reading the runs and rounding their networks: a minute.", flush=True)
    page = write_page(*collect(options))
    if len(page) > LIMIT:
        raise utils.UsageError(
            f"{options.output}: found a page of {len(page)} bytes, expected {LIMIT}"
        )
    with replacing(options.output) as temporary:
        temporary.write_bytes(page)
    print(f"{options.output}: {len(page) / 1e6:.2f} MB.")


if __name__ == "__main__":
    utils.run_script(main)
