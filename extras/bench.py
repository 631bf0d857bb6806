"""How fast both scripts train on this machine.

    python -m extras.bench                   # the training steps, and each script once
    python -m extras.bench --steps-only      # the training steps alone
    python -m extras.bench --against torch   # beside PyTorch, both on the CPU

All contestants take turns, for a machine's speed drifts; their medians count. Large
matrix products take turns too. Each question is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import utils

import joblib
import keras
import numpy as np
import tensorflow as tf

import q1_cnn_autoencoder as q1
import q2_aae as q2

if TYPE_CHECKING:
    from torch import Tensor, nn

SIZE = 4096  # of the square matrices that are multiplied
IMAGES = 4096  # random ones that the steps train on
SCRIPTS = {"q1": q1, "q2": q2}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = utils.OneLineParser(description="Measure how fast both scripts train.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--against", choices=("torch",), help="train in PyTorch too; install it before")
    add("--steps-only", action="store_true", help="leave out the scripts (minutes)")
    add("--question", choices=tuple(SCRIPTS), help="measure it alone (default: both)")
    add("--rounds", type=utils.positive_int, default=15, help="turns (default: 15)")
    options = parser.parse_args()
    if options.against and importlib.util.find_spec("torch") is None:
        raise utils.UsageError("--against torch: found no package torch, install it")
    return options


def keras_step(question: str) -> Callable[[], Any]:
    """Return what takes a training step as `model.fit` does; it waits for a GPU."""
    if question == "q1":
        model, shape = q1.build_autoencoder(), (28, 28, 3)
        q1.compile_autoencoder(model, q1.LEARNING_RATE, q1.EPOCHS, steps=460)
    else:
        model, shape = q2.AdversarialAutoencoder(recipe=q2.DEFAULT), (q2.PIXELS,)
        model.compile(q2.LEARNING_RATE, q2.EPOCHS, steps=460)
    images = np.random.default_rng(0).random((IMAGES, *shape), np.float32)
    size = SCRIPTS[question].BATCH_SIZE
    batches = iter(utils.shuffled_batches(images, size, 0, range(1)).repeat())
    model.make_train_function()
    return lambda: keras.tree.map_structure(float, model.train_function(batches))


def take_turns(contestants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Call contestants in turn; return the median seconds of a call of each."""
    seconds = {name: [] for name in contestants}
    for _ in range(1 + rounds):  # the first compiles
        for name, call in contestants.items():
            calls, passed = timeit.Timer(call).autorange()
            seconds[name].append(passed / calls)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def whole_script(question: str) -> dict[str, float]:
    """Run a script for one epoch; return its wall seconds and peak memory."""
    path, data = SCRIPTS[question].__file__, SCRIPTS[question].DATA
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, path, "--epochs", "1", "--data", data]
        command += ["--figures", folder, "--run-dir", folder]
        started = timeit.default_timer()
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise utils.UsageError(f"{path} failed, as said above")
        found = {"one_epoch_seconds": timeit.default_timer() - started}
    try:
        import resource
    except ImportError:  # Windows
        return found
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return found | {"peak_memory_mib": peak * unit / 2**20}


def measure(question: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure what the command line asks for, of one question."""
    print(f"Measuring {question}: some minutes.", file=sys.stderr)
    # First: a child's peak memory counts what its parent held when it started.
    found = {} if options.steps_only else whole_script(question)
    others = torch_steps(question) if options.against else {}
    a, b = tf.random.normal((2, SIZE, SIZE))
    ours = {"products": lambda: float((a @ b)[0, 0]), "keras": keras_step(question)}
    seconds = take_turns(ours | others, options.rounds)
    step = found["seconds_per_step"] = seconds["keras"]
    found["images_per_second"] = SCRIPTS[question].BATCH_SIZE / step
    found["matrix_products_gflops"] = 2 * SIZE**3 / seconds["products"] / 1e9
    return found | {f"times_{name}": seconds[name] / step for name in others}


# PyTorch ---------------------------------------------------------------------------
# The same networks, losses and optimizers, as fast as PyTorch's own options make them:
# fused optimizers, all cores, convolutions with their channels last, `torch.compile`.


def torch_steps(question: str) -> dict[str, Callable[[], None]]:
    """Return what takes a training step eagerly and, where that works, compiled."""
    import torch

    tf.config.set_visible_devices([], "GPU")  # Keras has the CPU, as PyTorch here
    torch.set_num_threads(joblib.cpu_count())
    torch.set_flush_denormal(True)  # as TensorFlow does
    build = {"q1": torch_q1, "q2": torch_q2}[question]
    steps = {"torch_eager": build(lambda loss: loss)}
    compiled = build(torch.compile)
    try:
        compiled()
        steps["torch_compile"] = compiled
    except Exception as error:  # of many kinds: no C++ compiler, say
        print(f"{question}: torch.compile failed: {error!r:.200}", file=sys.stderr)
    return steps


def torch_q1(compiled: Callable) -> Callable[[], None]:
    """Return question 1's training step, its loss passed through `compiled`."""
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
    adam = torch.optim.Adam(network.parameters(), q1.LEARNING_RATE, fused=True)
    mse = compiled(lambda x: nn.functional.mse_loss(network(x), x))
    images = torch.rand(IMAGES, 28, 28, 3).permute(0, 3, 1, 2)

    def step() -> None:
        adam.zero_grad()
        mse(images[torch.randint(IMAGES, (q1.BATCH_SIZE,))]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), q1.CLIP_NORM)
        adam.step()

    return step


def torch_q2(compiled: Callable) -> Callable[[], None]:
    """Return question 2's training step, its losses passed through `compiled`."""
    from torch import nn, optim, rand, randint

    def dense(*widths: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    recipe, dim = q2.DEFAULT, q2.CODE_DIM
    encoder = dense(q2.PIXELS, *recipe.hidden, 2 * dim)
    decoder = dense(dim, *recipe.hidden, q2.PIXELS)
    judge = dense(dim, *q2.DISCRIMINATOR_HIDDEN, 1)
    losses = [compiled(loss) for loss in torch_q2_losses((encoder, decoder, judge))]
    coder, both = encoder.parameters(), nn.ModuleList([encoder, decoder]).parameters()
    common = {"betas": (recipe.momentum, 0.999), "fused": True}
    decay, epsilon = recipe.weight_decay, recipe.encoder_epsilon
    optimizers = (
        optim.AdamW(both, q2.LEARNING_RATE, weight_decay=decay, **common),
        optim.Adam(judge.parameters(), recipe.discriminator_rate, **common),
        optim.Adam(coder, recipe.encoder_rate, eps=epsilon, **common),
    )
    clips = recipe.clipnorm, None, recipe.encoder_clipnorm
    images = rand(IMAGES, q2.PIXELS)

    def step() -> None:
        x = images[randint(IMAGES, (q2.BATCH_SIZE,))]
        stages = zip("abc", losses, optimizers, clips, strict=True)
        for stage, loss, optimizer, clip in stages:
            judge.requires_grad_(stage == "b")
            optimizer.zero_grad()
            loss(x).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            optimizer.step()

    return step


def torch_q2_losses(networks: Sequence[nn.ModuleList]) -> list[Callable]:
    """Return the losses of a batch in the stages (a), (b) and (c)."""
    import torch
    from torch.nn.functional import gelu, softplus

    encoder, decoder, judge = networks
    bounds = q2.build_encoder(recipe=q2.DEFAULT).get_layer("log_variance")
    least, span = torch.tensor(bounds.offset), torch.tensor(bounds.scale)

    def perceptron(layers: nn.ModuleList, x: Tensor, skips: bool = False) -> Tensor:
        *hidden, last = layers
        for number, layer in enumerate(hidden):
            x = x + gelu(layer(x)) if skips and number else gelu(layer(x))
        return last(x)

    def encode(x: Tensor) -> Tensor:
        mean, share = perceptron(encoder, x).chunk(2, dim=1)
        log_variance = least + span * torch.sigmoid(share)
        return mean + torch.exp(log_variance / 2) * torch.randn_like(mean)

    def reconstruction_loss(x: Tensor) -> Tensor:
        logits = perceptron(decoder, encode(x), q2.DEFAULT.decoder_skips)
        return (torch.sigmoid(logits) - x).norm(dim=1).sum()

    def discriminator_loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            codes = encode(x)
        on_prior = perceptron(judge, torch.randn_like(codes))
        return softplus(-on_prior).mean() + softplus(perceptron(judge, codes)).mean()

    def encoder_loss(x: Tensor) -> Tensor:
        return -softplus(perceptron(judge, encode(x))).mean()

    return [reconstruction_loss, discriminator_loss, encoder_loss]


# Main ------------------------------------------------------------------------------


def main() -> None:
    """Measure and print."""
    options, found = parse_options(), {}
    if options.question:
        found[options.question] = measure(options.question, options)
    else:
        for question in SCRIPTS:
            command = [sys.executable, "-m", "extras.bench", *sys.argv[1:], "--json"]
            command += ["--question", question]
            done = subprocess.run(command, stdout=subprocess.PIPE)
            if done.returncode:
                sys.exit(done.returncode)  # it has said why
            found |= json.loads(done.stdout)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for question, values in found.items():
        for name, value in values.items():
            print(f"{question}  {name.replace('_', ' '):24}{value:12,.5g}")


if __name__ == "__main__":
    utils.run_script(main)
