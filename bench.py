"""How fast both scripts train, against this machine's own ceiling.

    python bench.py                   # the training steps, and each script once whole
    python bench.py --steps-only      # the training steps alone
    python bench.py --against torch   # the same networks in PyTorch, taken in turn
    python bench.py --json            # the same as JSON

The ceiling is the rate of large matrix products, measured in the same run. It is what
the arithmetic of a step is set against; `count_flops` says what is counted. Speeds are
medians over rounds in which all contestants take their turn, for a machine's speed
drifts. Each question has a process of its own, for it shares out the cores as its
script does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA

import q1_cnn_autoencoder as q1
import q2_aae as q2

SIZE = 4096  # of the matrices whose products are the ceiling
IMAGES = 8192  # random ones that the steps train on
TRAINING_IMAGES = 59_000  # of a default run; Keras takes a divisor of its steps
SECONDS = 3.0  # that a contestant's turn takes, about
TORCH_KINDS = {
    "eager": "times PyTorch, eager",
    "compile": "times torch.compile",
    "eager_bfloat16": "the same in bfloat16",
    "compile_bfloat16": "compiled, in bfloat16",
}
SCRIPTS = {"q1": "q1_cnn_autoencoder.py", "q2": "q2_aae.py"}
FLOATS_PER_PRODUCT = 2  # a multiplication and an addition
SIDE_BY_SIDE = 2  # products of matrices


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.OneLineParser(description="Measure the speed of both scripts.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add(
        "--against",
        choices=("torch",),
        help="train the same networks in PyTorch, which must be installed",
    )
    add(
        "--steps-only",
        action="store_true",
        help="leave out the whole runs (six minutes): no stages, no peak memory",
    )
    add(
        "--question",
        choices=tuple(SCRIPTS),
        help="measure this one alone (default: one after the other)",
    )
    add(
        "--rounds",
        type=utils.positive_int,
        default=5,
        metavar="N",
        help="turns of each contestant (default: %(default)s)",
    )
    return parser.parse_args(arguments)


# Arithmetic ------------------------------------------------------------------------


def count_flops(step: Callable, *signature: tf.TensorSpec) -> int:
    """Count the arithmetic of the matrix products and convolutions in a function.

    Each multiplication and each addition counts. A product of (m, k) and (k, n) has
    2 m k n. A convolution, its gradient by the input and its gradient by the kernel
    each have 2 times the kernel's size times the pixels of the smaller image. What is
    done to each number by itself (activations, Adam) is left out: it takes time, but
    is not what the ceiling measures. Left out, too, is what TensorFlow prunes before
    it runs: gradients that nothing needs.

    Args:
        step: what `tf.function` can trace.
        signature: of its arguments, shapes complete.
    """
    graph = tf.function(step).get_concrete_function(*signature).graph
    needed = [tensor.op for tensor in graph.outputs]
    changes = ("Assign", "ResourceApply")  # of variables
    needed += [op for op in graph.get_operations() if op.type.startswith(changes)]
    seen = set()
    while needed:
        operation = needed.pop()
        if operation not in seen:
            seen.add(operation)
            needed += [tensor.op for tensor in operation.inputs]
    total = 0
    for operation in seen:
        shapes = [tuple(tensor.shape) for tensor in operation.inputs]
        if operation.type == "MatMul":
            inner = shapes[0][0 if operation.get_attr("transpose_a") else 1]
            products = inner * np.prod(operation.outputs[0].shape)
        elif operation.type == "Conv2D":
            products = np.prod(shapes[1][:3]) * np.prod(operation.outputs[0].shape)
        elif operation.type == "Conv2DBackpropInput":
            products = np.prod(shapes[1][:3]) * np.prod(shapes[2])
        elif operation.type == "Conv2DBackpropFilter":
            products = np.prod(operation.outputs[0].shape[:3]) * np.prod(shapes[2])
        else:
            continue
        total += FLOATS_PER_PRODUCT * int(products)
    return total


# Contestants -----------------------------------------------------------------------
# Each is a function that trains, or multiplies, a number of times.


def matrix_products(dtype: str) -> Callable[[int], None]:
    """Return the ceiling: two products of two SIZE x SIZE matrices, side by side."""
    a, b = (tf.cast(tf.random.normal((SIZE, SIZE)), dtype) for _ in range(2))
    products = tf.function(lambda: (a @ b, b @ a))

    def repeat(times: int) -> None:
        for _ in range(times):
            for product in products():
                product.numpy()

    return repeat


class Training(NamedTuple):
    """A contestant that trains."""

    repeat: Callable[[int], None]
    steps: int  # that it takes at a time, as Keras does
    images: int  # in a step
    flops: int  # in a step
    precision: str = "float32"  # of its products


def training(
    model: keras.Model,
    images: np.ndarray,
    batch_size: int,
    prepare: Callable,
    flops: int,
    precision: str = "float32",
) -> Training:
    """Return what takes the training steps that `RunFolder.fit` takes.

    They are `model.fit`'s own, on batches made as there, without what `fit` does once
    at its beginning and its end. Each time is `model.steps_per_execution` of them.
    """
    batches = prepare(utils.shuffled_batches(images, batch_size, seed=0))
    steps = model.steps_per_execution
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)
    iterator = iter(batches)

    def repeat(times: int) -> None:
        for _ in range(times):
            model.train_function(iterator)

    return Training(repeat, steps, batch_size, flops, precision)


def q2_step_flops(model: q2.AdversarialAutoencoder, discriminator_steps: int) -> int:
    """Count the arithmetic of a step of question 2 with so many steps of (b)."""
    signature = tf.TensorSpec((q2.BATCH_SIZE, q2.PIXELS), tf.uint8)

    def further(images: tf.Tensor) -> tf.Tensor:
        return model.discriminator_step(model.encoder(utils.unit_floats(images)))

    # `count_flops` does not look into the loop that these steps are taken in.
    return count_flops(model.train_step, signature) + (
        discriminator_steps - 1
    ) * count_flops(further, signature)


def q1_step() -> Training:
    """Build question 1's training step at its default settings."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28, 3), np.uint8)
    precision = q1.default_precision()
    autoencoder = q1.build_autoencoder(precision=precision)

    def step(batch: tf.Tensor) -> list[tf.Tensor]:
        x = utils.unit_floats(batch)
        with tf.GradientTape() as tape:
            restored = autoencoder(x, training=True)
            loss = tf.reduce_mean(q1.least_squares(x, restored))
        return tape.gradient(loss, autoencoder.trainable_variables)

    signature = tf.TensorSpec((q1.BATCH_SIZE, 28, 28, 3), tf.uint8)
    flops = count_flops(step, signature)
    epoch = TRAINING_IMAGES // q1.BATCH_SIZE
    model = q1.compile_autoencoder(autoencoder, q1.LEARNING_RATE, q1.EPOCHS, epoch)
    return training(model, images, q1.BATCH_SIZE, q1.as_pairs, flops, precision)


def q2_step() -> Training:
    """Build question 2's training step at its default settings."""
    shape = TRAINING_IMAGES, q2.PIXELS
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    options = q2.parse_options(["--data", "unread"])
    pca = PCA(q2.CODE_DIM).fit(images[:IMAGES] / 255.0)
    model = q2.build_model(options, pca, images)
    # In the middle of a run (b) takes about as many steps as on average.
    model.optimizer.iterations.assign(model.training_steps // 2)
    flops = q2_step_flops(model, int(model.discriminator_steps()))
    return training(model, images, q2.BATCH_SIZE, model.stacked, flops)


def torch_steps(question: str) -> dict[str, Callable[[int], None]]:
    """Build a question's networks, losses and optimizers in PyTorch.

    They multiply in float32, PyTorch's default. Where question 1 does in bfloat16, its
    network in PyTorch is timed under autocast to bfloat16, too.

    Returns:
        By kind, one of `TORCH_KINDS`, what trains.

    Raises:
        UsageError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise utils.UsageError(f"--against torch: {error}; install torch") from error
    from torch import nn
    from torch.nn import functional

    def batch(images: torch.Tensor, size: int) -> torch.Tensor:
        return images[torch.randint(len(images), (size,))].float() / 255

    def repeated(step: Callable, images: torch.Tensor, size: int) -> Callable:
        def repeat(times: int) -> None:
            for _ in range(times):
                step(batch(images, size))

        return repeat

    def q1_model(precision: str = "float32") -> Callable[[torch.Tensor], None]:
        (narrow, wide), leaky = q1.WIDTHS, partial(nn.LeakyReLU, 0.2)
        network = nn.Sequential(
            *(nn.Conv2d(3, narrow, 4, 2, 1), leaky()),
            *(nn.Conv2d(narrow, wide, 4, 2, 1), leaky()),
            *(nn.Conv2d(wide, wide, 3, 1, 1), leaky(), nn.Flatten()),
            nn.Linear(49 * wide, q1.CODE_DIM),
            *(
                nn.Linear(q1.CODE_DIM, 49 * wide),
                leaky(),
                nn.Unflatten(1, (wide, 7, 7)),
            ),
            *(nn.ConvTranspose2d(wide, wide, 3, 1, 1), leaky()),
            *(nn.ConvTranspose2d(wide, narrow, 4, 2, 1), leaky()),
            *(nn.ConvTranspose2d(narrow, 3, 4, 2, 1), nn.Sigmoid()),
        )
        adam = torch.optim.Adam(network.parameters(), q1.LEARNING_RATE)

        def step(x: torch.Tensor) -> None:
            adam.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
                restored = network(x)
            functional.mse_loss(restored.float(), x).backward()
            nn.utils.clip_grad_norm_(network.parameters(), q1.CLIP_NORM)
            adam.step()

        return step

    class Skip(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    def perceptron(first: int, hidden: Sequence[int]) -> nn.Sequential:
        widths = (first, *hidden)
        pairs = zip(widths, hidden, strict=False)
        layers = (layer for a, b in pairs for layer in (nn.Linear(a, b), nn.GELU()))
        return nn.Sequential(*layers)

    def q2_model() -> Callable[[torch.Tensor], None]:
        body = perceptron(q2.PIXELS, q2.HIDDEN)
        heads = nn.Linear(q2.HIDDEN[-1], 2 * q2.CODE_DIM)
        first, *others = q2.HIDDEN
        decoder = perceptron(q2.CODE_DIM, [first])
        decoder.extend(Skip(*perceptron(width, [width])) for width in others)
        decoder.extend([nn.Linear(q2.HIDDEN[-1], q2.PIXELS), nn.Sigmoid()])
        discriminator = perceptron(q2.CODE_DIM, q2.DISCRIMINATOR_HIDDEN)
        discriminator.append(nn.Linear(q2.DISCRIMINATOR_HIDDEN[-1], 1))
        both = [*body.parameters(), *heads.parameters(), *decoder.parameters()]
        betas = (q2.MOMENTUM, 0.999)
        most = q2.DISCRIMINATOR_STEPS
        steps_of_b = int(q2.steps_of_b(most, done=1, steps=2))  # halfway
        adam = torch.optim.AdamW(
            both, q2.LEARNING_RATE, betas, weight_decay=q2.WEIGHT_DECAY
        )
        other = torch.optim.Adam(
            discriminator.parameters(), q2.DISCRIMINATOR_LEARNING_RATE, betas
        )

        def encoder(x: torch.Tensor) -> torch.Tensor:
            mean, log_variance = heads(body(x)).chunk(2, dim=1)
            return mean + torch.exp(log_variance / 2) * torch.randn_like(mean)

        def step(x: torch.Tensor) -> None:
            codes = encoder(x)
            norm = (decoder(codes) - x).norm(dim=1).mean()

            fake = codes.detach()
            for number in range(steps_of_b):
                first = number == 0
                prior = torch.randn_like(codes).requires_grad_(first)
                logits = discriminator(prior)
                loss = functional.softplus(-logits).mean()
                if first:
                    slopes = torch.autograd.grad(logits.sum(), prior, create_graph=True)
                    penalty = slopes[0].square().sum(dim=1).mean() / 2
                    loss = loss + penalty * q2.GRADIENT_PENALTY * steps_of_b
                else:
                    with torch.no_grad():
                        fake = encoder(batch(images, len(x)))
                loss = loss + functional.softplus(discriminator(fake)).mean()
                other.zero_grad()
                loss.backward()
                other.step()

            for parameter in discriminator.parameters():
                parameter.requires_grad_(False)
            loss = functional.softplus(-discriminator(codes)).mean()
            adam.zero_grad()
            (norm + q2.ADVERSARIAL_WEIGHT * loss).backward()
            nn.utils.clip_grad_norm_(both, q2.CLIP_NORM)
            adam.step()
            for parameter in discriminator.parameters():
                parameter.requires_grad_(True)

        return step

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if question == "q1":
        shape = 3, 28, 28
        networks, size = {"": q1_model}, q1.BATCH_SIZE
        if q1.default_precision() == "bfloat16":
            networks["_bfloat16"] = partial(q1_model, "bfloat16")
    else:
        shape = (q2.PIXELS,)
        networks, size = {"": q2_model}, q2.BATCH_SIZE
    images = torch.randint(256, (IMAGES, *shape), dtype=torch.uint8)
    steps = {}
    for precision, build in networks.items():
        steps[f"eager{precision}"] = repeated(build(), images, size)
        compiled = repeated(torch.compile(build()), images, size)
        try:
            compiled(1)
        except Exception as error:  # its compiler fails in many ways
            print(f"torch.compile of {question}: {error!r:.200}", file=sys.stderr)
        else:
            steps[f"compile{precision}"] = compiled
    return steps


# Measurement -----------------------------------------------------------------------


def take_turns(
    contestants: Mapping[str, Callable[[int], None]], rounds: int
) -> dict[str, float]:
    """Time contestants in turn.

    Args:
        contestants: by name; each repeats what it does a number of times.
        rounds: turns of each.

    Returns:
        Seconds for one time, by name: the median over the rounds.
    """
    times, seconds = {}, {name: [] for name in contestants}
    for name, repeat in contestants.items():
        repeat(2)  # compiles
        started = time.perf_counter()
        repeat(4)
        each = (time.perf_counter() - started) / 4
        times[name] = max(4, round(SECONDS / each))
    for _ in range(rounds):
        for name, repeat in contestants.items():
            started = time.perf_counter()
            repeat(times[name])
            seconds[name].append((time.perf_counter() - started) / times[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def whole_run(question: str) -> dict[str, Any]:
    """Run a script whole, but for one epoch only; return what its metrics say.

    Returns:
        `stages` in seconds, `import` among them, and `peak_memory_mib`.

    Raises:
        UsageError: the script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, SCRIPTS[question], "--epochs", "1"),
            *("--figures", f"{folder}/figures", "--run-dir", f"{folder}/run"),
        ]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise utils.UsageError(f"{SCRIPTS[question]} failed: {done.stderr}")
        metrics = json.loads(
            Path(folder, "figures", f"{question}_metrics.json").read_text("utf-8")
        )
    stages = {"import": seconds - metrics["wall_seconds"], **metrics["stage_seconds"]}
    return {"stages": stages, "peak_memory_mib": metrics["peak_memory_mib"]}


def measure(question: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for, of one question."""
    script = {"q1": q1_step, "q2": q2_step}[question]()
    contestants = {kind: matrix_products(kind) for kind in ("float32", "bfloat16")}
    contestants["ours"] = script.repeat
    others = torch_steps(question) if options.against else {}
    seconds = take_turns(contestants | others, options.rounds)

    rates = {
        kind: SIDE_BY_SIDE * FLOATS_PER_PRODUCT * SIZE**3 / seconds[kind] / 1e9
        for kind in ("float32", "bfloat16")
    }
    step_seconds = seconds["ours"] / script.steps
    gflops = script.flops / step_seconds / 1e9
    found = {
        "matmul_gflops": rates["float32"],
        "bfloat16_matmul_gflops": rates["bfloat16"],
        "batch_size": script.images,
        "precision": script.precision,
        "images_per_second": script.images / step_seconds,
        "gflop_per_step": script.flops / 1e9,
        "gflops": gflops,
        "fraction_of_matmul_rate": gflops / rates["float32"],
        "peak_memory_mib": None,
        "stages": None,
    }
    for kind in TORCH_KINDS if options.against else ():
        other = seconds.get(kind)
        found[f"against_torch_{kind}"] = None if other is None else other / step_seconds
    if not options.steps_only:
        found |= whole_run(question)
    return found


def measure_apart(question: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure one question in a process of its own.

    Args:
        question: which one.
        arguments: of this command.

    Raises:
        UsageError: that process failed.
    """
    command = [sys.executable, __file__, *arguments, "--json", "--question", question]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise utils.UsageError(f"{question} could not be measured")
    return json.loads(done.stdout)[question]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was measured, by question, as plain text."""
    labels = {
        "matmul_gflops": (f"{SIZE} x {SIZE} products, GFLOP/s", ".0f"),
        "bfloat16_matmul_gflops": ("the same in bfloat16", ".0f"),
        "batch_size": ("images in a step", ".0f"),
        "precision": ("multiplies in", ""),
        "images_per_second": ("images/s", ",.0f"),
        "gflop_per_step": ("GFLOP a step", ".2f"),
        "gflops": ("GFLOP/s", ".0f"),
        "fraction_of_matmul_rate": ("of the float32 products'", ".0%"),
        **{
            f"against_torch_{kind}": (label, ".2f")
            for kind, label in TORCH_KINDS.items()
        },
        "peak_memory_mib": ("peak memory (MiB)", ",.0f"),
    }

    def line(label: str, values: Sequence[Any], form: str) -> str:
        texts = ["-" if value is None else f"{value:{form}}" for value in values]
        return f"{label:32}" + "".join(f"{text:>10}" for text in texts)

    lines = [line("", list(found), "")]
    for key, (label, form) in labels.items():
        values = [each.get(key) for each in found.values()]
        if any(value is not None for value in values):
            lines.append(line(label, values, form))
    stages = [each["stages"] for each in found.values() if each["stages"]]
    if stages:
        lines += ["", "Seconds of a whole run of one epoch:"]
        for stage in dict.fromkeys(name for each in stages for name in each):
            values = [each.get(stage) for each in stages]
            lines.append(line(stage, values, ".1f"))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    options = parse_options()
    if options.question is None:
        found = {name: measure_apart(name, sys.argv[1:]) for name in SCRIPTS}
    else:
        if options.question == "q1":
            q1.share_cores()
        found = {options.question: measure(options.question, options)}
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    utils.run_script(main)
