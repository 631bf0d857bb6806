"""Beyond the homework: question 2's finished runs as one page to play with.

    python -m extras.explorer    # writes figures/q2_explorer.html

The page works by a double click, without a server or a network connection: the networks
travel in it, and JavaScript applies them. `explorer.html` is its template. A run of
`extras.styles` is added where there is one. Weights are rounded to 9 bits: with 8,
outputs change too much; with 10, two runs are too large. What rounding changes in the
output is measured, and too large a change is refused.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import numpy as np

import q2_aae  # it also registers the layers that the encoder holds
from files import describe_source, replacing
from read_MNIST_M import NUM_CLASSES, find_file, load_digits

TEMPLATE = Path(__file__).with_suffix(".html")
STYLES_DIR = Path("runs/styles")  # may be missing
LIMIT = 8_000_000  # bytes of the page
DIGITS = 40  # of a class whose true images travel along
AXES = 10  # that have a slider
LARGEST_WEIGHT = 255  # as a whole number: of 9 bits with the sign
CHECKED = 3_000  # codes of images, and as many draws from the prior
# How much rounding may change outputs: on average over each image or code, and at most.
PIXEL_TOLERANCES = 3 / 255, 12 / 255  # of 0..1
CODE_TOLERANCES = 0.1, 0.2  # of informative coordinates, which deviate by about 1
ACTIVATIONS = "linear", "sigmoid", "gelu"  # that the page knows; gelu in its erf form


class Run(NamedTuple):
    """The networks of a run, from the files of its folder."""

    folder: Path
    encoder: keras.Model  # images (N, 784) to the informative coordinates of codes
    decoder: keras.Model  # codes, or codes beside one-hot digits, to images
    code_dim: int


def load_run(folder: Path, data_digest: str, styles: bool = False) -> Run:
    """Load a run of question 2, or one of styles, whose decoder sees the digit.

    `data_digest` is the SHA-256 of the data file that the run must be of.

    Raises:
        UsageError: a file is missing or damaged, or the files don't belong together.
    """
    command = "python -m extras.styles" if styles else "python q2_aae.py"
    path = folder / "networks.json"
    with utils.damage_told(path, f"the record of a run on this data; run {command}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        record = {name: content[name] for name in ("data", "encoder", "decoder")}
        if record["data"] != data_digest:
            raise ValueError("the record of a run on other data")
    networks = {}
    for name in ("encoder", "decoder"):
        path = folder / f"{name}.keras"
        expected = f"the {name} of networks.json; run {command}"
        with utils.damage_told(path, expected):
            network = networks[name] = keras.saving.load_model(path)
            if utils.weights_digest(network) != record[name]:
                raise ValueError("another network")
            if not all(np.isfinite(array).all() for array in network.get_weights()):
                raise ValueError("weights that are not finite")
    encoder, decoder = networks.values()
    pixels, digits = q2_aae.PIXELS, NUM_CLASSES if styles else 0
    expected = f"networks from {pixels} pixels to a code and back; run {command}"
    with utils.damage_told(folder, expected):
        code_dim = encoder.output_shape[-1]
        if styles:  # the one inside takes code and digit side by side
            decoder = decoder.get_layer("decoder")
        shapes = [(each.input_shape, each.output_shape) for each in (encoder, decoder)]
        image, code, seen = (None, pixels), (None, code_dim), (None, code_dim + digits)
        if shapes != [(image, code), (seen, image)]:
            raise ValueError(f"an encoder and a decoder of shapes {shapes}")
        # Its weights are all of the encoder's: the layer that appends draws has none.
        informative = encoder.get_layer("informative").output
        encoder = keras.Model(encoder.inputs, informative)
    return Run(folder, encoder, decoder, code_dim)


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


def round_columns(values: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Round an array (N, D) to whole numbers times a scale for each column.

    Returns:
        The whole numbers, int16 (N, D), in ±largest, and the scales, float32 (D,).
    """
    scales = np.maximum(np.abs(values).max(axis=0) / largest, 1e-9).astype("<f4")
    return np.rint(values / scales).astype(np.int16), scales


def pack_network(
    path: Path, model: keras.Model, inputs: np.ndarray, tolerances: tuple[float, float]
) -> tuple[np.ndarray, dict[str, Any], bytes]:
    """Round a file's network, and measure what this changes for inputs (N, I).

    Returns:
        The exact outputs; a description for JavaScript, in which value 0 is the input,
        and step i makes value i + 1 from the values that `from` names; and the bytes
        of the weights.

    Raises:
        UsageError: the page can't apply the network, or rounding changes it too much.
    """
    rounded = keras.models.clone_model(model)
    steps, data, numbers = [], b"", {id(model.inputs[0]): 0}
    for layer in model.operations[1:]:  # the first is the input
        kind, activation = type(layer).__name__, "linear"
        sources = [numbers[id(each)] for each in keras.tree.flatten(layer.input)]
        step = {"op": kind.lower(), "from": sources, "units": layer.output.shape[-1]}
        if kind == "Dense":
            activation = step["activation"] = layer.activation.__name__
            kernel, bias = layer.get_weights()
            whole, scales = round_columns(kernel, LARGEST_WEIGHT)
            rounded.get_layer(layer.name).set_weights([whole * scales, bias])
            data += bias.astype("<f4").tobytes() + scales.tobytes()
            # Without the last bit, numbers fit into bytes, which gzip packs well.
            data += np.stack([whole >> 1, whole & 1]).astype(np.int8).tobytes()
        if kind not in ("Dense", "Add") or activation not in ACTIVATIONS:
            found = f"{path}: found a layer of kind {kind}, {activation}"
            raise utils.UsageError(f"{found}, expected what the page can apply")
        steps.append(step)
        numbers[id(layer.output)] = len(steps)

    exact = utils.predict(model, inputs)
    if not np.isfinite(exact).all():
        found = f"{path}: found outputs that are not finite"
        raise utils.UsageError(f"{found}, expected finite ones")
    difference = np.abs(utils.predict(rounded, inputs) - exact)
    changes = float(difference.mean(axis=1).max()), float(difference.max())
    if changes[0] > tolerances[0] or changes[1] > tolerances[1]:
        raise utils.UsageError(
            f"{path}: found that rounding changes an output by {changes[0]:.3f} on "
            f"average and {changes[1]:.3f} at most, expected {tolerances[0]:.3f} and "
            f"{tolerances[1]:.3f} at most"
        )
    described = {"inputs": inputs.shape[1], "steps": steps, "checked": len(inputs)}
    described |= {"mean_change": changes[0], "largest_change": changes[1]}
    return exact, described, data


def rank_axes(run: Run, inputs: np.ndarray) -> list[dict[str, float]]:
    """Rank informative coordinates by how much the image changes from -1 to +1.

    `change` is the mean squared change of a pixel, in 0..1, about the decoder's inputs.
    """
    count = run.encoder.output_shape[-1]
    moved = np.tile(inputs, (count, 2, 1, 1))
    for axis in range(count):
        moved[axis, 0, :, axis] = -1
        moved[axis, 1, :, axis] = 1
    images = utils.predict(run.decoder, moved.reshape(-1, inputs.shape[1]))
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
    digest = describe_source(options.data)["sha256"]
    runs = {"main": load_run(options.run_dir, digest)}
    if options.styles_dir or STYLES_DIR.exists():
        folder = options.styles_dir or STYLES_DIR
        runs["styles"] = load_run(folder, digest, styles=True)
    points = load_map(options.run_dir, len(images), runs["main"].encoder)

    numbers = [np.flatnonzero(labels == digit)[:DIGITS] for digit in range(10)]
    numbers = np.concatenate(numbers)
    meta = {"count": len(images), "digits": numbers.tolist()}
    blobs = {"digits": images[numbers].tobytes()}
    images, rng = utils.unit_floats(images), np.random.default_rng(0)
    for name, run in runs.items():
        path = run.folder / "encoder.keras"
        codes, encoder, data = pack_network(path, run.encoder, images, CODE_TOLERANCES)
        blobs[f"{name}-encoder"] = data
        if name == "main":
            whole, scales = round_columns(codes, 127)
            blobs["map"] = np.rint(points * 65535).T.astype("<u2").tobytes()
            blobs["map"] += labels.astype(np.uint8).tobytes()
            blobs["map"] += scales.tobytes() + whole.astype(np.int8).tobytes()
        some = codes[rng.permutation(len(codes))[:CHECKED]]
        shape = len(some) + CHECKED, run.decoder.input_shape[-1]
        inputs = rng.standard_normal(shape, np.float32)
        inputs[: len(some), : some.shape[1]] = some  # the rest are draws
        one_hot = np.eye(shape[1] - run.code_dim)  # empty where it sees no digit
        inputs[:, run.code_dim :] = np.resize(one_hot, (shape[0], len(one_hot)))
        path = run.folder / "decoder.keras"
        _, decoder, data = pack_network(path, run.decoder, inputs, PIXEL_TOLERANCES)
        blobs[f"{name}-decoder"] = data
        meta[name] = {"informative": codes.shape[1], "code_dim": run.code_dim}
        meta[name] |= {"encoder": encoder, "decoder": decoder}
        meta[name]["axes"] = rank_axes(run, inputs[-32:])
    return meta, blobs


def write_page(meta: dict[str, Any], blobs: dict[str, bytes]) -> bytes:
    """Return the page: the template with the data in it."""
    tags = []
    for name, data in {"meta": json.dumps(meta).encode(), **blobs}.items():
        text = base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")
        tags.append(f'<script type="text/plain" id="blob-{name}">{text}</script>')
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("<!-- DATA -->", "\n".join(tags)).encode()


def main() -> None:
    """Write the page."""
    parser = utils.OneLineParser(description="Write question 2's runs as a page.")
    common = {
        "type": utils.path_name,
        "metavar": "PATH",
        "help": "default: %(default)s",
    }
    parser.add_argument("--run-dir", default=Path("runs/q2"), **common)
    text = f"default: {STYLES_DIR} if it exists"
    parser.add_argument("--styles-dir", **common | {"help": text})
    parser.add_argument("--data", default=Path("data.npy"), **common)
    text = "labels of a data file without (default: label.npy beside it, if there)"
    parser.add_argument("--labels", **common | {"help": text})
    output = Path("figures/q2_explorer.html")
    parser.add_argument("--output", default=output, **common)
    options = parser.parse_args()
    options.data = find_file(options.data)
    print("Reading the runs and rounding their networks: a minute or two.", flush=True)
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
