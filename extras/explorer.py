"""Beyond the homework: question 2's finished runs as one page to play with.

    python -m extras.explorer    # writes figures/q2_explorer.html

The page works by a double click, without a server or a network: the networks travel in
it, and JavaScript applies them. `explorer.html` is its template. Weights are rounded,
finely where the output feels it, until no output differs by more than a tolerance.
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
from scipy.special import expit, ndtr

import metrics
import q2_aae  # noqa: F401  registers what the models hold
from files import replacing
from read_MNIST_M import find_file, load_digits

TEMPLATE = Path(__file__).with_suffix(".html")
LIMIT = 6_000_000  # bytes of the page
MAP_BYTES = 1_000_000  # of the map, uncompressed: fewer points where codes are long
DIGITS = 40  # of a class whose true images travel along
AXES = 10  # that have a slider
CHECKED = 3_000  # codes or images on which a rounded network is compared
PIXEL_TOLERANCE = 1.5 / 255  # of a decoded pixel: the page promises 2 / 255
CODE_TOLERANCE = 0.1  # of the mean and log-variance of q(z|x); the prior deviates by 1
FIRST_STEP = 2e-3  # of a weight, to measure what rounding each layer does
KINDS = "Dense", "Add", "Rescaling"
ACTIVATIONS = {
    "linear": lambda x: x,
    "sigmoid": expit,
    "gelu": lambda x: x * ndtr(x),  # in the erf form
}
Weights = dict[int, tuple[np.ndarray, np.ndarray]]  # kernel (I, O), bias (O,)


class Network:
    """A Keras model of Dense, Add and Rescaling as steps that JavaScript can apply.

    Value 0 is the input; step i makes value i + 1 from the values that `from` names.
    `outputs` are the numbers of values, by name; `weights` are kernel and bias, by i.
    """

    def __init__(self, model: keras.Model, outputs: dict[str, Any]) -> None:
        self.model = keras.Model(model.inputs, list(outputs.values()))
        self.inputs = self.model.inputs[0].shape[-1]
        self.steps, self.weights = [], {}
        numbers = {id(self.model.inputs[0]): 0}
        for layer in self.model.operations[1:]:  # the first is the input
            kind, sources = type(layer).__name__, keras.tree.flatten(layer.input)
            step = {"op": kind.lower(), "from": [numbers[id(s)] for s in sources]}
            step["units"] = layer.output.shape[-1]
            if kind == "Dense":
                step["activation"] = layer.activation.__name__
                step["inputs"] = sources[0].shape[-1]
                self.weights[len(self.steps)] = tuple(layer.get_weights())
            elif kind == "Rescaling":
                step["scale"] = np.ravel(layer.scale).tolist()
                step["offset"] = np.ravel(layer.offset).tolist()
            if kind not in KINDS or step.get("activation", "gelu") not in ACTIVATIONS:
                found = f"{layer.name}: found {kind} {step.get('activation', '')}"
                raise utils.UsageError(f"{found}, expected what the page can apply")
            self.steps.append(step)
            numbers[id(layer.output)] = len(self.steps)
        self.outputs = {name: numbers[id(tensor)] for name, tensor in outputs.items()}

    def apply(self, x: np.ndarray, weights: Weights) -> list[np.ndarray]:
        """Return all values, float32 (N, ...), of inputs (N, I), as JavaScript does."""
        values = [x.astype(np.float32)]
        for i, step in enumerate(self.steps):
            first, *others = (values[source] for source in step["from"])
            if step["op"] == "dense":
                kernel, bias = weights[i]
                value = ACTIVATIONS[step["activation"]](first @ kernel + bias)
            elif step["op"] == "add":
                value = sum(others, first)
            else:
                value = first * np.float32(step["scale"]) + np.float32(step["offset"])
            values.append(value)
        return values

    def predict(self, x: np.ndarray, weights: Weights | None = None) -> np.ndarray:
        """Return the outputs side by side, float32 (N, ...), of inputs (N, I)."""
        values = self.apply(x, weights or self.weights)
        return np.concatenate([values[i] for i in self.outputs.values()], axis=1)

    def compress(self, x: np.ndarray, tolerance: float) -> tuple[dict[str, Any], bytes]:
        """Round the weights until no output differs by more than a tolerance.

        The rounding is fitted to every second input x, float32 (N, I), and compared on
        the others. The bits are fewest where each layer's squared share in the
        difference is in proportion to its number of weights.

        Returns:
            A description for JavaScript, with the `difference`; the weights' bytes.
        """
        values, checked = self.apply(x[::2], self.weights), x[1::2]
        factors = {
            i: error_factor(values[self.steps[i]["from"][0]]) for i in self.weights
        }
        exact = utils.predict(self.model, checked)
        exact = np.concatenate(keras.tree.flatten(exact), axis=1)

        def rounded(steps: dict[int, float]) -> tuple[dict, float]:
            whole, weights = {}, dict(self.weights)
            for i, step in steps.items():
                whole[i] = round_weights(*self.weights[i], factors[i], step)
                kernel, bias = whole[i]
                weights[i] = np.float32(kernel * step), np.float32(bias)
            outputs = self.predict(checked, weights)
            return whole, float(np.abs(outputs - exact).max())

        roots = {i: np.sqrt(kernel.size) for i, (kernel, _) in self.weights.items()}
        if not np.isfinite(exact).all():
            raise utils.UsageError("a network's outputs: found no finite numbers")
        slopes = {i: rounded({i: FIRST_STEP})[1] / FIRST_STEP for i in roots}
        aim, difference = tolerance, np.inf
        while difference > tolerance:
            scale = aim / np.linalg.norm(list(roots.values()))
            steps = {i: float(scale * roots[i] / (slopes[i] + 1e-6)) for i in roots}
            whole, difference = rounded(steps)
            aim *= 0.9
        data = b""
        for i, (kernel, bias) in whole.items():
            self.steps[i]["scale"] = steps[i]
            # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...; all low bytes come first.
            coded = np.where(kernel < 0, -2 * kernel - 1, 2 * kernel).astype("<u4")
            planes = coded.view(np.uint8).reshape(-1, 4).T[:3]
            data += bias.astype("<f4").tobytes() + planes.tobytes()
        described = {"inputs": self.inputs, "steps": self.steps}
        return described | {"outputs": self.outputs, "difference": difference}, data


def error_factor(x: np.ndarray) -> np.ndarray:
    """Return what `round_weights` spreads errors by, for a layer's inputs (N, I).

    It is the upper Cholesky factor of the inverse of their second moments and the
    bias's, float64 (I + 1, I + 1).
    """
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    moments = x.T @ x / len(x)
    moments += 1e-4 * np.trace(moments) / len(moments) * np.eye(len(moments))
    return np.linalg.cholesky(np.linalg.inv(moments)).T


def round_weights(
    kernel: np.ndarray, bias: np.ndarray, factor: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Round a kernel (I, O) to multiples of a step, row by row (arXiv:2210.17323).

    Inputs are correlated, so later rows and the bias can undo a row's rounding in part.

    Returns:
        The multiples, whole numbers, float64 (I, O), and the new bias, float64 (O,).
    """
    rows, whole = np.vstack([kernel, bias]).astype(np.float64), np.empty(kernel.shape)
    for i in range(len(kernel)):
        whole[i] = np.rint(rows[i] / step)
        error = (rows[i] - whole[i] * step) / factor[i, i]
        rows[i + 1 :] -= np.outer(factor[i, i + 1 :], error)
    return whole, rows[-1]


def rank_axes(decoder: Network) -> list[dict[str, float]]:
    """Rank coordinates by the `change` of the image as they go from -1 to +1.

    It is the mean squared change of a pixel, in 0..1, about random codes.
    """
    codes = np.random.default_rng(0).standard_normal((32, decoder.inputs))
    changes = []
    for axis in range(decoder.inputs):
        ends = np.concatenate([codes, codes])
        ends[:, axis] = np.repeat([-1.0, 1.0], len(codes))
        low, high = np.split(decoder.predict(ends), 2)
        changes.append(float(np.square(high - low).mean()))
    first = np.argsort(changes)[::-1][:AXES].tolist()
    return [{"coordinate": axis, "change": changes[axis]} for axis in first]


def to_bytes(codes: np.ndarray) -> tuple[dict[str, list[float]], bytes]:
    """Round codes (N, D) to int8 bytes, (D, N); `centres` and `scales` restore them."""
    low, high = codes.min(axis=0), codes.max(axis=0)
    centres, scales = (low + high) / 2, np.maximum(high - low, 1e-6) / 254
    packed = np.rint((codes - centres) / scales).astype(np.int8)
    return {"centres": centres.tolist(), "scales": scales.tolist()}, packed.T.tobytes()


def load_run(path: Path) -> dict[str, Network]:
    """Load a run's decoder, and its encoder with outputs mean and log_variance."""
    networks = {}
    for name in ("encoder", "decoder"):
        file = path / f"{name}.keras"
        with utils.damage_told(file, "a model; run python q2_aae.py first"):
            model = keras.saving.load_model(file)
        heads = [n for n in model.layers if n.name in ("mean", "log_variance")]
        outputs = {layer.name: layer.output for layer in heads}
        networks[name] = Network(model, outputs or {"image": model.output})
    return networks


def collect(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what the page holds: plain data, and bytes by name."""
    images, labels = load_digits(options.data)[0]
    if labels is None:
        raise utils.UsageError(f"{options.data}: found no labels, expected labels")
    path = options.run_dir / "tsne.npz"
    expected = f"a map of {len(images)} points; run python q2_aae.py first"
    with utils.damage_told(path, expected), np.load(path) as file:
        points = file["points"].reshape(len(images), 2)
    runs = {"main": load_run(options.run_dir)}
    if options.control_dir.exists():
        runs["control"] = load_run(options.control_dir)

    images, rng = utils.unit_floats(images), np.random.default_rng(0)
    codes, deviations = metrics.posterior(runs["main"]["encoder"].model, images)
    signal = metrics.signal_coordinates(codes, deviations)
    count = MAP_BYTES // (5 + np.count_nonzero(signal))
    kept = np.sort(rng.permutation(len(images))[:count])
    images, labels, codes, points = (a[kept] for a in (images, labels, codes, points))
    numbers = [np.flatnonzero(labels == digit)[:DIGITS] for digit in range(10)]
    numbers = np.concatenate(numbers)
    packed, planes = to_bytes(codes[:, signal])
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0).max() * 65535
    head = np.rint(points).T.astype("<u2").tobytes() + labels.astype(np.uint8).tobytes()
    blobs = {"map": head + planes}
    blobs["digits"] = np.rint(images[numbers] * 255).astype(np.uint8).tobytes()
    packed |= {"count": len(kept), "signal": np.flatnonzero(signal).tolist()}
    packed["fill"] = codes.mean(axis=0).tolist()
    meta = {"map": packed, "digits": {"points": numbers.tolist()}, "checked": CHECKED}

    some = images[rng.permutation(len(images))[: 2 * CHECKED]]
    for name, run in runs.items():
        meta[name] = {"axes": rank_axes(run["decoder"])}
        codes = metrics.posterior(run["encoder"].model, some)[0]
        codes[len(codes) // 2 :] = rng.standard_normal(codes[len(codes) // 2 :].shape)
        if name == "control":  # its encoder stays behind; some codes travel
            known = metrics.posterior(run["encoder"].model, images[numbers])[0]
            meta[name]["codes"], planes = to_bytes(known)
            blobs["digits"] += planes
        else:
            found = run["encoder"].compress(some, CODE_TOLERANCE)
            meta[name]["encoder"], blobs[f"{name}-encoder"] = found
        found = run["decoder"].compress(codes, PIXEL_TOLERANCE)
        meta[name]["decoder"], blobs[f"{name}-decoder"] = found
    return meta, blobs


def write_page(meta: dict[str, Any], blobs: dict[str, bytes]) -> bytes:
    """Return the page: the template with the data in it."""
    text = json.dumps(meta, separators=(",", ":")).replace("<", "\\u003c")
    tags = [f'<script type="application/json" id="meta">{text}</script>']
    for name, data in blobs.items():
        text = base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")
        tags.append(f'<script type="text/plain" id="blob-{name}">{text}</script>')
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("<!-- DATA -->", "\n".join(tags)).encode()


def main() -> None:
    """Write the page."""
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    common = {"type": Path, "metavar": "PATH", "help": "default: %(default)s"}
    parser.add_argument("--run-dir", default="runs/q2", **common)
    parser.add_argument("--control-dir", default="runs/q2_control", **common)
    parser.add_argument("--data", default="data.npy", **common)
    parser.add_argument("--output", default="figures/q2_explorer.html", **common)
    options = parser.parse_args()
    options.data = find_file(options.data)
    print("Reading the runs and rounding their networks: a minute or two.", flush=True)
    page = write_page(*collect(options))
    if len(page) > LIMIT:
        raise utils.UsageError(f"page: found {len(page)} bytes, expected {LIMIT}")
    with replacing(options.output) as temporary:
        temporary.write_bytes(page)
    print(f"{options.output}: {len(page) / 1e6:.2f} MB.")


if __name__ == "__main__":
    utils.run_script(main)
