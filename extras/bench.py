"""How fast both scripts train on this machine.

    python -m extras.bench                   # the training steps, and each script once
    python -m extras.bench --steps-only      # the training steps alone
    python -m extras.bench --against torch   # beside PyTorch, both on the CPU
    python -m extras.bench --json            # the same as JSON

Speeds are medians over rounds in which all contestants take turns, for a machine's
speed drifts. The rate of large matrix products, measured in the same turns, says how
fast the machine was. Each question is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import utils

import keras
import numpy as np
import tensorflow as tf

import q1_cnn_autoencoder as q1
import q2_aae as q2
from make_data import ensure_data

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

SIZE = 4096  # of the square matrices that are multiplied
IMAGES = 4096  # random ones that the steps train on
EPOCH_STEPS = 59_000 // 128  # of a default run; the learning rates depend on them
SECONDS = 3.0  # that a contestant's turn takes, about
SCRIPTS = {"q1": q1, "q2": q2}
LABELS = {
    "batch_size": ("images a step", "d"),
    "step_seconds": ("seconds a step", ".4f"),
    "images_per_second": ("images/s", ",.0f"),
    "matmul_gflops": ("matrix products, GFLOP/s", ",.0f"),
    "against_torch_eager": ("times PyTorch eager", ".2f"),
    "against_torch_compile": ("times torch.compile", ".2f"),
    "one_epoch_seconds": ("the script, one epoch (s)", ".0f"),
    "peak_memory_mib": ("its peak memory (MiB)", ",.0f"),
}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.OneLineParser(description="Measure how fast both scripts train.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    text = "train the same networks in PyTorch too, on the CPU; it must be installed"
    add("--against", choices=("torch",), help=text)
    text = "leave out the whole scripts, which take minutes"
    add("--steps-only", action="store_true", help=text)
    text = "measure this one alone (default: one after the other)"
    add("--question", choices=tuple(SCRIPTS), help=text)
    text = "turns of each contestant (default: %(default)s)"
    add("--rounds", type=utils.positive_int, default=5, metavar="N", help=text)
    options = parser.parse_args(arguments)
    if options.against and importlib.util.find_spec("torch") is None:
        raise utils.UsageError("--against torch: found no PyTorch, expected torch")
    return options


# Contestants -----------------------------------------------------------------------
# Each is a function that trains, or multiplies, a number of times.


def keras_steps(question: str) -> Callable[[int], None]:
    """Return what takes a script's training steps at its default settings.

    They are those of `model.fit`, without what it does at its beginning and end.
    """
    script, shape = SCRIPTS[question], (28, 28, 3)
    model = q1.build_autoencoder() if script is q1 else q2.AdversarialAutoencoder()
    if script is q1:
        q1.compile_autoencoder(model, q1.LEARNING_RATE, q1.EPOCHS, EPOCH_STEPS)
    else:
        model.compile(q2.LEARNING_RATE, q2.EPOCHS, EPOCH_STEPS)
        shape = (q2.PIXELS,)
    images = np.random.default_rng(0).random((IMAGES, *shape), np.float32)
    batches = iter(utils.shuffled_batches(images, script.BATCH_SIZE, seed=0))
    model.make_train_function()

    def repeat(times: int) -> None:
        for _ in range(times):
            logs = model.train_function(batches)
        keras.tree.map_structure(float, logs)  # waits for a GPU

    return repeat


def matrix_products() -> Callable[[int], None]:
    """Return what multiplies two float32 SIZE x SIZE matrices."""
    a, b = tf.random.normal((2, SIZE, SIZE))

    def repeat(times: int) -> None:
        for _ in range(times):
            float((a @ b)[0, 0])

    return repeat


# Measurement -----------------------------------------------------------------------


def seconds_each(repeat: Callable[[int], None], times: int) -> float:
    """Return how long a contestant takes for one time, over a number of times."""
    started = time.perf_counter()
    repeat(times)
    return (time.perf_counter() - started) / times


def take_turns(
    contestants: Mapping[str, Callable[[int], None]], rounds: int
) -> dict[str, float]:
    """Time contestants in turn; return each one's median seconds for one time."""
    times, seconds = {}, {name: [] for name in contestants}
    for name, repeat in contestants.items():
        repeat(2)  # compiles
        times[name] = max(4, round(SECONDS / seconds_each(repeat, 4)))
    for _ in range(rounds):
        for name, repeat in contestants.items():
            seconds[name].append(seconds_each(repeat, times[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def whole_script(question: str) -> dict[str, float | None]:
    """Run a script for one epoch; return its wall seconds and peak memory.

    Raises:
        UsageError: the script failed.
    """
    script = SCRIPTS[question]
    with contextlib.redirect_stdout(sys.stderr):
        ensure_data(script.DATA)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script.__file__, "--epochs", "1"]
        command += ["--figures", folder, "--run-dir", folder]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    if done.returncode:
        raise utils.UsageError(f"{script.__name__}: failed, expected it to end well")
    memory = None
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**20
    return {"one_epoch_seconds": seconds, "peak_memory_mib": memory}


def measure(question: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for, of one question."""
    found = {}
    if not options.steps_only:
        # First: a child's peak memory counts what its parent held when it started.
        print(f"{question}: running the script for one epoch.", file=sys.stderr)
        found = whole_script(question)
    print(f"{question}: timing the training steps.", file=sys.stderr)
    if options.against:
        tf.config.set_visible_devices([], "GPU")  # PyTorch's part is for the CPU
    contestants = {"products": matrix_products(), "keras": keras_steps(question)}
    if options.against:
        contestants |= torch_steps(question)
    seconds = take_turns(contestants, options.rounds)
    step, size = seconds["keras"], SCRIPTS[question].BATCH_SIZE
    found |= {"batch_size": size, "step_seconds": step}
    found["images_per_second"] = size / step
    found["matmul_gflops"] = 2 * SIZE**3 / seconds["products"] / 1e9
    for kind in ("eager", "compile") if options.against else ():
        other = seconds.get(kind)
        found[f"against_torch_{kind}"] = None if other is None else other / step
    return found


# PyTorch ---------------------------------------------------------------------------
# The same networks, losses and optimizers, made fast by what PyTorch offers: fused
# optimizers, all cores, for convolutions its quick layout, and `torch.compile`. Rates
# don't fall, for that takes no time.

TorchStep = Callable[["torch.Tensor"], None]  # trains on a batch
Compiled = Callable[[Callable], Callable]  # `torch.compile`, or what changes nothing


def torch_steps(question: str) -> dict[str, Callable[[int], None]]:
    """Return what takes a question's training steps, eagerly and compiled.

    PyTorch compiles by a C++ compiler. Where that fails, "compile" is left out.
    """
    import torch

    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    torch.set_num_threads(len(cores))
    build, shape = (torch_q2, (q2.PIXELS,))
    images = torch.rand(IMAGES, *shape)
    if question == "q1":
        build, images = torch_q1, torch.rand(IMAGES, 3, 28, 28)
        images = images.contiguous(memory_format=torch.channels_last)
    size = SCRIPTS[question].BATCH_SIZE

    def repeated(step: TorchStep) -> Callable[[int], None]:
        def repeat(times: int) -> None:
            for _ in range(times):
                step(images[torch.randint(len(images), (size,))])

        return repeat

    contestants = {"eager": repeated(build(lambda function: function))}
    compiled = repeated(build(torch.compile))
    try:
        compiled(1)
    except Exception as error:  # of many kinds
        text = " ".join(str(error).split())[:200]
        print(f"{question}: torch.compile failed: {text}", file=sys.stderr)
        return contestants
    return contestants | {"compile": compiled}


def torch_q1(compiled: Compiled) -> TorchStep:
    """Build question 1's training step."""
    import torch
    from torch import nn

    def leaky(layer: nn.Module) -> nn.Module:
        return nn.Sequential(layer, nn.LeakyReLU(0.2, inplace=True))

    (narrow, wide), flat = q1.WIDTHS, 49 * q1.WIDTHS[-1]
    network = nn.Sequential(
        leaky(nn.Conv2d(3, narrow, 4, 2, 1)),
        leaky(nn.Conv2d(narrow, wide, 4, 2, 1)),
        leaky(nn.Conv2d(wide, wide, 3, 1, 1)),
        nn.Flatten(),
        nn.Linear(flat, q1.CODE_DIM),
        leaky(nn.Linear(q1.CODE_DIM, flat)),
        nn.Unflatten(1, (wide, 7, 7)),
        leaky(nn.ConvTranspose2d(wide, wide, 3, 1, 1)),
        leaky(nn.ConvTranspose2d(wide, narrow, 4, 2, 1)),
        nn.ConvTranspose2d(narrow, 3, 4, 2, 1),
        nn.Sigmoid(),
    ).to(memory_format=torch.channels_last)
    weights = list(network.parameters())
    adam = torch.optim.Adam(weights, q1.LEARNING_RATE, eps=1e-7, fused=True)
    loss = compiled(lambda x: nn.functional.mse_loss(network(x), x))

    def step(x: torch.Tensor) -> None:
        adam.zero_grad()
        loss(x).backward()
        nn.utils.clip_grad_norm_(weights, q1.CLIP_NORM)
        adam.step()

    return step


def torch_q2(compiled: Compiled) -> TorchStep:
    """Build question 2's training step with its three stages."""
    import torch
    from torch.nn.functional import softplus

    recipe, dim = q2.DEFAULT, q2.CODE_DIM
    encoder = torch_perceptron(q2.PIXELS, *recipe.hidden, 2 * dim)
    decoder = torch_perceptron(
        dim, *recipe.hidden, q2.PIXELS, skips=recipe.decoder_skips
    )
    discriminator = torch_perceptron(dim, *q2.DISCRIMINATOR_HIDDEN, 1)
    bounds = q2.build_encoder().get_layer("log_variance")
    low, span = torch.tensor(bounds.offset), torch.tensor(bounds.scale)

    def encode(x: torch.Tensor) -> torch.Tensor:
        mean, share = encoder(x).chunk(2, dim=1)
        log_variance = low + span * torch.sigmoid(share)
        return mean + torch.exp(log_variance / 2) * torch.randn_like(mean)

    def loss_a(x: torch.Tensor) -> torch.Tensor:
        return (torch.sigmoid(decoder(encode(x))) - x).norm(dim=1).sum()

    def sum_and_logits(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = discriminator(z)
        return logits.sum(), logits

    def loss_b(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            codes = encode(x)
        z = torch.randn_like(codes)
        slope, logits = torch.func.grad(sum_and_logits, has_aux=True)(z)
        penalty = recipe.slope_penalty * slope.square().sum(dim=1).mean() / 2
        loss = softplus(-logits).mean() + softplus(discriminator(codes)).mean()
        return loss + penalty

    def loss_c(x: torch.Tensor) -> torch.Tensor:
        return -softplus(discriminator(encode(x))).mean()

    losses = [compiled(loss) for loss in (loss_a, loss_b, loss_c)]
    optimizers = torch_q2_optimizers(encoder, decoder, discriminator)

    def step(x: torch.Tensor) -> None:
        for stage, loss, optimizer in zip("abc", losses, optimizers, strict=True):
            discriminator.requires_grad_(stage == "b")
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    return step


def torch_q2_optimizers(
    encoder: torch.nn.Module, decoder: torch.nn.Module, discriminator: torch.nn.Module
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of the three stages."""
    import torch

    recipe, coder = q2.DEFAULT, list(encoder.parameters())
    common = {"betas": (recipe.momentum, 0.999), "fused": True}
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    decay, epsilon = recipe.weight_decay, recipe.encoder_epsilon
    both = [*coder, *decoder.parameters()]
    judge = list(discriminator.parameters())
    return [
        adamw(both, q2.LEARNING_RATE, eps=1e-7, weight_decay=decay, **common),
        adam(judge, recipe.discriminator_rate, eps=1e-7, **common),
        adam(coder, recipe.encoder_rate, eps=epsilon, **common),
    ]


def torch_perceptron(*widths: int, skips: bool = False) -> torch.nn.Module:
    """Build dense layers, with GELU after all but the last, as `q2.perceptron`."""
    from torch import nn

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = itertools.pairwise(widths)
            self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            *hidden, last = self.layers
            for number, layer in enumerate(hidden):
                y = nn.functional.gelu(layer(x))
                x = x + y if skips and number else y
            return last(x)

    return Perceptron()


# Main ------------------------------------------------------------------------------


def measure_apart(question: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure one question in a process of its own, with this command's arguments."""
    command = [sys.executable, "-m", "extras.bench", *arguments]
    command += ["--json", "--question", question]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise utils.UsageError(f"{question}: could not be measured (reason above)")
    return json.loads(done.stdout)[question]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what was measured, a column a question, as plain text."""
    lines = [f"{'':28}" + "".join(f"{question:>10}" for question in found)]
    for key, (label, form) in LABELS.items():
        values = [each.get(key) for each in found.values()]
        if any(value is not None for value in values):
            texts = ["-" if value is None else f"{value:{form}}" for value in values]
            lines.append(f"{label:28}" + "".join(f"{text:>10}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    options = parse_options()
    if options.question is None:
        found = {name: measure_apart(name, sys.argv[1:]) for name in SCRIPTS}
    else:
        found = {options.question: measure(options.question, options)}
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    utils.run_script(main)
