"""Question 2: an adversarial autoencoder for dimension reduction on MNIST digits.

    python q2_aae.py

An adversarial autoencoder (Makhzani et al. 2015, arXiv:1511.05644) is an autoencoder
whose codes are pushed towards a prior p(z), here the standard normal in 100
dimensions, by a discriminator D that tries to tell codes from draws of the prior. If
that works, any draw from the prior decodes to a digit. Each training step has three
stages:

(a) encoder and decoder minimise    L_recons = sum_n ||x_n - xhat_n||
(b) the discriminator minimises     L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))]
(c) the encoder minimises           L_Enc = E_x[log(1 - D(Enc(x)))]

Sharp reconstructions and moving losses do not show that the codes follow the prior,
so this script measures it: see `metrics.prior_match` and the Fréchet distance.

To the letter (`--literal`) the codes do not follow it. By default, then, five things
differ: the encoder draws its code from a normal with a learned variance; it starts at
a linear code whose aggregate is the prior's, with the digits in few coordinates; one
Adam weighs (a) against (c); the discriminator is kept smooth, and gets ahead of the
encoder as the encoder's rate falls; and the decoder has skips, with which it learns
faster.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import utils

import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from openTSNE import TSNE
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

import metrics as measures
from read_MNIST_M import Split, load_digits

# Hyperparameters -------------------------------------------------------------------

PIXELS = 784  # 28 x 28; the assignment's 768 is a slip
CODE_DIM = 100
HIDDEN = (400,) * 6  # hidden layers of encoder and decoder
DISCRIMINATOR_HIDDEN = (400, 400, 400)
EPOCHS = 32
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3  # of encoder and decoder; see `utils.falling_rate`
DISCRIMINATOR_LEARNING_RATE = 2e-3  # stays, so that it gets ahead of the encoder
MOMENTUM = 0.5  # Adam's beta_1: a long memory makes two adversaries circle each other
ADVERSARIAL_WEIGHT = 10 / 3  # of (c), in the norm of an image's error, a nat
DISCRIMINATOR_STEPS = 4  # of (b) for each of (a) and (c), at the end; 1 at first
GRADIENT_PENALTY = 0.1  # R1's weight (Mescheder et al. 2018, arXiv:1801.04406)
CLIP_NORM = 8.0  # of encoder and decoder's gradient, twice what is usual
WEIGHT_DECAY = 0.2  # of encoder and decoder, times the rate (arXiv:1711.05101)
START_DIMENSIONS = 10  # of the linear code that the encoder starts at
START_NOISE = 0.25  # its standard deviation there, where the prior's is 1
SIGNAL_NOISE = 0.5  # the most there
OTHER_NOISE = 0.98  # the least in the other coordinates
LOG_VARIANCES = (-12.0, 4.0)  # of q(z|x), the least and the most; see `LogVariance`
FRESH_LEARNING_RATE = 3e-4  # of the discriminator that judges the finished codes

# Of the assignment to the letter: an Adam for each stage
LITERAL_LEARNING_RATE = 1e-3  # (a)
LITERAL_ADVERSARIAL_LEARNING_RATE = 2e-4  # (b) and (c)

COMPARED = 500  # images of a kind whose nearest training image is sought
TRUSTED = 3_000  # codes on whose map the trustworthiness is measured
SAMPLES = 10_000  # draws from the prior behind the Fréchet distance and Parzen window
EQUILIBRIUM = {
    "discriminator_loss": 2 * math.log(2),
    "saturating": -math.log(2),
    "non-saturating": math.log(2),
}


class Recipe(NamedTuple):
    """What else the default run sets; the comparisons vary it."""

    hidden: tuple[int, ...] = HIDDEN
    decoder_skips: bool = True
    start_dimensions: int = START_DIMENSIONS  # 0: the encoder starts at random
    adversarial_weight: float = ADVERSARIAL_WEIGHT
    discriminator_learning_rate: float = DISCRIMINATOR_LEARNING_RATE
    discriminator_rate_decays: bool = False
    discriminator_steps: int = DISCRIMINATOR_STEPS
    momentum: float = MOMENTUM
    gradient_penalty: float = GRADIENT_PENALTY
    weight_decay: float = WEIGHT_DECAY


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.argument_parser(
        "Train an adversarial autoencoder on MNIST digits.",
        name="q2",
        data="data.npy",
        epochs=EPOCHS,
        quick_epochs=5,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        code_dim=CODE_DIM,
    )
    parser.add_argument(
        "--encoder",
        choices=("gaussian", "deterministic"),
        help="q(z|x): a point, or a normal with learned diagonal variance (paper, "
        "section 2) (default: gaussian; deterministic with --literal)",
    )
    parser.add_argument(
        "--encoder-loss",
        choices=("saturating", "non-saturating"),
        help="of stage (c), in nats: E[log(1 - D)] as in the assignment, or "
        "-E[log D] (default: non-saturating; saturating with --literal)",
    )
    parser.add_argument(
        "--literal",
        action="store_true",
        help="the assignment to the letter: its three losses, an Adam for each",
    )
    options = parser.parse_args(arguments)
    if options.literal:
        parser.set_defaults(learning_rate=LITERAL_LEARNING_RATE, name="q2_literal")
        options = parser.parse_args(arguments)
    if options.encoder is None:
        options.encoder = "deterministic" if options.literal else "gaussian"
    if options.encoder_loss is None:
        options.encoder_loss = "saturating" if options.literal else "non-saturating"
    options.recipe = {} if options.literal else Recipe()._asdict()
    return utils.complete_options(options)


# Model -----------------------------------------------------------------------------


class _Seeded:
    """Saves and restores a seed generator's state along with the weights."""

    def save_own_variables(self, store: dict[str, Any]) -> None:
        store["seed_state"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: dict[str, Any]) -> None:
        self.seed_generator.state.assign(store["seed_state"])


@keras.saving.register_keras_serializable("aae")
class GaussianSample(_Seeded, keras.layers.Layer):
    """Draws z = mean + exp(log_variance / 2) * noise (Kingma & Welling 2014, eq. 10).

    Args:
        seed: of the noise.
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Return z, float32 (N, D), from mean and log-variance, each (N, D)."""
        mean, log_variance = inputs
        noise = keras.random.normal(tf.shape(mean), seed=self.seed_generator)
        return mean + tf.exp(0.5 * log_variance) * noise

    def get_config(self) -> dict[str, Any]:
        """Return what a saved model rebuilds the layer from."""
        return super().get_config() | {"seed": self.seed}


@keras.saving.register_keras_serializable("aae")
class LogVariance(keras.layers.Dense):
    """The log-variances of q(z|x), within bounds.

    All stay within `LOG_VARIANCES`: one image of large variance, once in thousands of
    steps, could otherwise throw all three networks off for good. The digits are to lie
    in the first coordinates: there the noise stays below `SIGNAL_NOISE`, smoothly, and
    in the others above `OTHER_NOISE`. A coordinate that the encoder fills with noise,
    to please the discriminator, the decoder forgets, and it would be lost for good. One
    more that it takes for the digits leaves more room between them, where draws decode
    to none.

    Args:
        units: as of `keras.layers.Dense`.
        signal_dimensions: how many the first coordinates are; with none, all are free.
    """

    MOST, LEAST = 2.0 * math.log(SIGNAL_NOISE), 2.0 * math.log(OTHER_NOISE)

    def __init__(self, units: int, signal_dimensions: int = 0, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.signal_dimensions = signal_dimensions

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Return the log-variances, float32 (N, units)."""
        free = tf.clip_by_value(super().call(inputs), *LOG_VARIANCES)
        if not self.signal_dimensions:
            return free
        first = tf.range(self.units) < self.signal_dimensions
        below = self.MOST - tf.nn.softplus(self.MOST - free)
        above = self.LEAST + tf.nn.softplus(free - self.LEAST)
        return tf.where(first, below, above)

    def start_signal(self, dimensions: int, noise: float) -> None:
        """Make the first coordinates the signal's, and set the noise that all start at.

        Args:
            dimensions: how many.
            noise: its standard deviation there, in (0, `SIGNAL_NOISE`); 1 elsewhere.
        """
        self.signal_dimensions = dimensions
        kernel, bias = self.get_weights()
        # What `call` makes the log-variance 2 log(noise) of, and 0.
        below = self.MOST - 2.0 * math.log(noise)
        bias[:dimensions] = self.MOST - math.log(math.expm1(below))
        bias[dimensions:] = self.LEAST + math.log(math.expm1(-self.LEAST))
        self.set_weights([kernel, bias])

    def get_config(self) -> dict[str, Any]:
        """Return what a saved model rebuilds the layer from."""
        return super().get_config() | {"signal_dimensions": self.signal_dimensions}


@keras.saving.register_keras_serializable("aae")
def gelu(x: tf.Tensor) -> tf.Tensor:
    """Return x P(Z <= x), Z ~ N(0, 1) (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    Keras's is the same by way of erfc, which XLA makes many more operations of.
    """
    return 0.5 * x * (1.0 + tf.math.erf(x * math.sqrt(0.5)))


def hidden_layers(
    x: keras.KerasTensor, widths: Sequence[int], skips: bool = False
) -> keras.KerasTensor:
    """Apply the hidden layers that all three networks share in kind.

    With skips, each from the second on adds to what it is given (He et al. 2016,
    arXiv:1512.03385); they must be of one width then.
    """
    for number, width in enumerate(widths, 1):
        layer = keras.layers.Dense(width, activation=gelu, name=f"hidden_{number}")
        x = x + layer(x) if skips and number > 1 else layer(x)
    return x


def build_encoder(
    code_dim: int = CODE_DIM,
    kind: str = "gaussian",
    seed: int = 0,
    hidden: Sequence[int] = HIDDEN,
) -> keras.Model:
    """Build Enc: images, float32 (N, 784) in [0, 1], to codes, float32 (N, code_dim).

    A "gaussian" encoder returns a draw from q(z|x), a "deterministic" one a point.
    """
    image = keras.Input((PIXELS,))
    x = hidden_layers(image, hidden)
    code = keras.layers.Dense(code_dim, name="mean")(x)
    if kind == "gaussian":
        # Starting at variance 1 starts the game against the discriminator at a draw.
        log_variance = LogVariance(
            code_dim, kernel_initializer="zeros", name="log_variance"
        )(x)
        code = GaussianSample(seed)([code, log_variance])
    return keras.Model(image, code, name="encoder")


def start_at_pca(
    encoder: keras.Model,
    pca: PCA,
    dimensions: int,
    noise: float = START_NOISE,
) -> None:
    """Set a Gaussian encoder's weights to a linear code whose aggregate is the prior's.

    The means of the first coordinates are the leading principal components, scaled so
    that with the noise they have variance 1; the other coordinates are noise alone. So
    over the training images the codes have the prior's mean and covariance, and the
    game against the discriminator starts near a draw with something in the codes
    already. GELU lets a perceptron be linear: gelu(y) - gelu(-y) = y. The hidden layers
    carry more components than reach the code, so that each starts with the image at
    hand and not with what random layers left of it.

    Args:
        encoder: as `build_encoder` returns it, of kind "gaussian".
        pca: of the training images, pixels in [0, 1].
        dimensions: coordinates that carry something; fewer where `pca` has no more, or
            where the code or half a hidden layer has no more room.
        noise: standard deviation in those coordinates, in (0, `SIGNAL_NOISE`).
    """
    hidden = [layer for layer in encoder.layers if layer.name.startswith("hidden")]
    mean, log_variance = (encoder.get_layer(n) for n in ("mean", "log_variance"))
    spread = pca.explained_variance_ > 1e-6 * pca.explained_variance_[0]
    carried = min(int(spread.sum()), *(layer.units // 2 for layer in hidden))
    count = min(dimensions, carried, mean.units)

    scale = np.sqrt(pca.explained_variance_[:carried])[:, np.newaxis]
    whiten = (pca.components_[:carried] / scale).T
    kernel, bias = hidden[0].get_weights()
    kernel[:, : 2 * carried] = np.concatenate([whiten, -whiten], axis=1)
    bias[: 2 * carried] = -pca.mean_ @ kernel[:, : 2 * carried]
    hidden[0].set_weights([kernel, bias])
    for layer in hidden[1:]:
        kernel, bias = layer.get_weights()
        kernel[:, : 2 * carried] = 0.0
        kernel[: 2 * carried, : 2 * carried] = np.kron(
            [[1, -1], [-1, 1]], np.eye(carried)
        )
        layer.set_weights([kernel, bias])

    kernel, bias = mean.get_weights()
    kernel[:] = 0.0
    signal = math.sqrt(1.0 - noise**2) * np.eye(carried, count)
    kernel[: 2 * carried, :count] = np.concatenate([signal, -signal])
    mean.set_weights([kernel, bias])
    log_variance.start_signal(count, noise)


def build_decoder(
    code_dim: int = CODE_DIM, hidden: Sequence[int] = HIDDEN, skips: bool = True
) -> keras.Model:
    """Build the decoder: codes (N, code_dim) to images, float32 (N, 784) in [0, 1]."""
    code = keras.Input((code_dim,))
    x = hidden_layers(code, hidden, skips)
    image = keras.layers.Dense(PIXELS, activation="sigmoid")(x)
    return keras.Model(code, image, name="decoder")


def build_discriminator(code_dim: int = CODE_DIM) -> keras.Model:
    """Build D: codes (N, code_dim) to the logit of D, float32 (N, 1)."""
    code = keras.Input((code_dim,))
    logit = keras.layers.Dense(1)(hidden_layers(code, DISCRIMINATOR_HIDDEN))
    return keras.Model(code, logit, name="discriminator")


# Losses ----------------------------------------------------------------------------
# From logits: log D = -softplus(-logit) and log(1 - D) = -softplus(logit) can't
# overflow, as the logarithm of a probability that rounds to 0 would.


def reconstruction_loss(x: tf.Tensor, restored: tf.Tensor) -> tf.Tensor:
    """Return ||x_n - xhat_n||, (N,), of the images (N, 784); L_recons is its sum.

    The norm's gradient does not exist where it is 0; here it is 0 there.
    """
    squared = tf.reduce_sum(tf.square(x - restored), axis=-1)
    return tf.sqrt(tf.maximum(squared, 1e-12))


def discriminator_loss(prior_logits: tf.Tensor, code_logits: tf.Tensor) -> tf.Tensor:
    """Return L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))] in nats."""
    return tf.reduce_mean(tf.nn.softplus(-prior_logits)) + tf.reduce_mean(
        tf.nn.softplus(code_logits)
    )


def encoder_loss(code_logits: tf.Tensor, kind: str = "saturating") -> tf.Tensor:
    """Return L_Enc in nats: E_x[log(1 - D)], or -E_x[log D] if "non-saturating"."""
    if kind == "saturating":
        return -tf.reduce_mean(tf.nn.softplus(code_logits))
    return tf.reduce_mean(tf.nn.softplus(-code_logits))


def slope_penalty(slopes: tf.Tensor) -> tf.Tensor:
    """Return R1, half the mean squared length of the logit's slopes, (N, D)."""
    return 0.5 * tf.reduce_mean(tf.reduce_sum(tf.square(slopes), axis=-1))


def steps_of_b(most: int, done: tf.Tensor | int, steps: int) -> tf.Tensor:
    """Return how many steps (b) takes, int32, when so many training steps are done.

    Args:
        most: at the end; 1 at first, and one more at a time, evenly.
        done: training steps, int32.
        steps: training steps of the whole run.
    """
    return tf.minimum(1 + most * done // steps, most)


class OneLaunch(keras.Model):
    """A model whose `steps_per_execution` training steps are one program of XLA's.

    Keras launches a program a step, which takes a millisecond or two: all variables are
    handed in and out. `fit` takes the batches of a launch stacked, as `stacked` returns
    them.
    """

    def compile(
        self, optimizer: keras.optimizers.Optimizer, steps: int, **kwargs: Any
    ) -> None:
        """Compile as `keras.Model` does, for epochs of so many training steps."""
        super().compile(
            optimizer,
            jit_compile=True,  # XLA, which Keras does not choose by itself here
            steps_per_execution=utils.steps_per_execution(steps),
            **kwargs,
        )

    def stacked(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Stack the batches that a launch takes, along a new first axis."""
        return batches.batch(self.steps_per_execution, drop_remainder=True).prefetch(1)

    def make_train_function(self, force: bool = False) -> None:
        """Make what `fit` calls, as `keras.Model` does."""
        if self.train_function is not None and not force:
            return
        steps = self.steps_per_execution

        @tf.function(autograph=False, jit_compile=True)
        def take(batches: Any) -> dict[str, tf.Tensor]:
            def one(number: tf.Tensor) -> tf.Tensor:
                self.train_step(tf.nest.map_structure(lambda x: x[number], batches))
                return number + 1

            tf.while_loop(lambda number: number < steps, one, [0])
            return self.get_metrics_result()

        def train_function(iterator: Any) -> dict[str, tf.Tensor]:
            return take(next(iterator))

        self.train_function = train_function


class AdversarialAutoencoder(_Seeded, OneLaunch):
    """An encoder, a decoder and a discriminator, trained in three stages a step.

    Stages (a) and (c) pull the encoder in two directions. One Adam for their weighted
    sum keeps the balance that the weight asks for; an Adam for each, as in
    `LiteralAdversarialAutoencoder`, gives both the same step, however small one's
    gradient has become.

    Args:
        encoder: as `build_encoder` returns it.
        decoder: as `build_decoder` returns it.
        discriminator: as `build_discriminator` returns it.
        images: uint8 (N, 784), for the further steps of (b).
        encoder_loss_kind: "saturating" or "non-saturating", for stage (c).
        seed: of the prior's draws.
        recipe: rates and weights.
    """

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        discriminator: keras.Model,
        images: np.ndarray,
        encoder_loss_kind: str = "non-saturating",
        seed: int = 0,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.encoder = encoder
        self.decoder = decoder
        self.discriminator = discriminator
        self.images = tf.constant(images)
        self.encoder_loss_kind = encoder_loss_kind
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.trackers = {
            name: keras.metrics.Mean(name)
            for name in (
                "reconstruction_loss",
                "discriminator_loss",
                "encoder_loss",
                "mse",
            )
        }
        self.built = True

    def compile(self, learning_rate: float, epochs: int, steps: int) -> None:
        """Give the autoencoder and the discriminator their Adams.

        Args:
            learning_rate: of encoder and decoder, as in `utils.falling_rate`.
            epochs: of the whole run.
            steps: training steps in an epoch.
        """
        recipe = self.recipe
        discriminator_rate = recipe.discriminator_learning_rate
        if recipe.discriminator_rate_decays:
            discriminator_rate = utils.falling_rate(discriminator_rate, epochs, steps)
        rate = utils.falling_rate(learning_rate, epochs, steps)
        super().compile(
            utils.FusedAdam(
                rate, recipe.momentum, decay=recipe.weight_decay, clip=CLIP_NORM
            ),
            steps,
        )
        self.discriminator_optimizer = utils.FusedAdam(
            discriminator_rate, recipe.momentum
        )
        self.optimizer.build(self.autoencoder_variables)
        self.discriminator_optimizer.build(self.discriminator.trainable_variables)
        self.training_steps = epochs * steps

    @property
    def autoencoder_variables(self) -> list[keras.Variable]:
        """What stage (a) trains."""
        return self.encoder.trainable_variables + self.decoder.trainable_variables

    @property
    def metrics(self) -> list[keras.Metric]:
        """What an epoch's log shows, reset when the next begins."""
        return list(self.trackers.values())

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the reconstructions, float32 (N, 784), of images in [0, 1]."""
        return self.decoder(self.encoder(x, training=training), training=training)

    def draw_prior(self, count: int) -> tf.Tensor:
        """Draw z ~ p(z), the standard normal, float32 (count, code_dim)."""
        shape = (count, self.decoder.input_shape[-1])
        return keras.random.normal(shape, seed=self.seed_generator)

    def train_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Take the three stages on a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)
        with tf.GradientTape() as tape:
            codes = self.encoder(x, training=True)

            # (a) Encoder and decoder minimise L_recons, here as a mean over the batch.
            restored = self.decoder(codes, training=True)
            loss_a = tf.reduce_mean(reconstruction_loss(x, restored))

            # (b) The discriminator minimises L_D, and its slope where the prior is.
            with tape.stop_recording():
                loss_d = self.train_discriminator(codes)

            # (c) The encoder minimises L_Enc under the discriminator so improved.
            logits = self.discriminator(codes, training=True)
            loss_enc = encoder_loss(logits, self.encoder_loss_kind)

            loss = loss_a + self.recipe.adversarial_weight * loss_enc
        variables = self.autoencoder_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.track(x, restored, loss_d, loss_enc)

    def draw_images(self, count: int) -> tf.Tensor:
        """Draw training images, uint8 (count, 784), with replacement."""
        index = keras.random.randint(
            (count,), 0, len(self.images), seed=self.seed_generator
        )
        return tf.gather(self.images, index)

    def discriminator_steps(self) -> tf.Tensor:
        """Return how many steps (b) takes now, int32, from 1 to the recipe's number."""
        done = tf.cast(self.optimizer.iterations, tf.int32)
        return steps_of_b(self.recipe.discriminator_steps, done, self.training_steps)

    def train_discriminator(self, codes: tf.Tensor) -> tf.Tensor:
        """Take the steps down L_D; return the last's.

        From the second step on they have images of their own: on the same ones again,
        the discriminator would learn them by heart. The first step takes R1 for all of
        them ("lazily": Karras et al. 2020, arXiv:1912.04958, appendix B): its second
        derivatives cost as much as the rest.

        Args:
            codes: float32 (N, D), for the first step.
        """
        count = codes.shape[0]
        steps = self.discriminator_steps()
        penalty = self.recipe.gradient_penalty * tf.cast(steps, tf.float32)

        def further(step: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x = utils.unit_floats(self.draw_images(count))
            return step + 1, self.discriminator_step(self.encoder(x, training=True))

        loss_d = self.discriminator_step(codes, penalty)
        return tf.while_loop(lambda step, _: step < steps, further, (1, loss_d))[1]

    def discriminator_step(
        self, codes: tf.Tensor, penalty: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Take a step down L_D on codes (N, D) and as many draws; return L_D.

        Args:
            codes: float32 (N, D).
            penalty: weight of R1, if the step takes it.
        """
        prior = self.draw_prior(codes.shape[0])
        with tf.GradientTape() as tape:
            with tf.GradientTape() as slope_tape:
                slope_tape.watch(prior)
                prior_logits = self.discriminator(prior, training=True)
            code_logits = self.discriminator(codes, training=True)
            loss_d = objective = discriminator_loss(prior_logits, code_logits)
            if penalty is not None:
                slopes = slope_tape.gradient(prior_logits, prior)
                objective += penalty * slope_penalty(slopes)
        variables = self.discriminator.trainable_variables
        gradients = tape.gradient(objective, variables)
        self.discriminator_optimizer.apply(gradients, variables)
        return loss_d

    def track(
        self, x: tf.Tensor, restored: tf.Tensor, loss_d: tf.Tensor, loss_enc: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Add a training step's losses to the epoch's means; return those."""
        self.trackers["reconstruction_loss"].update_state(
            reconstruction_loss(x, restored)
        )
        self.trackers["discriminator_loss"].update_state(loss_d)
        self.trackers["encoder_loss"].update_state(loss_enc)
        self.trackers["mse"].update_state(tf.square(x - restored))
        return {name: tracker.result() for name, tracker in self.trackers.items()}

    def test_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Measure the reconstruction of a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)
        restored = self(x)
        self.trackers["reconstruction_loss"].update_state(
            reconstruction_loss(x, restored)
        )
        self.trackers["mse"].update_state(tf.square(x - restored))
        return {
            name: self.trackers[name].result()
            for name in ("reconstruction_loss", "mse")
        }


class LiteralAdversarialAutoencoder(AdversarialAutoencoder):
    """The assignment to the letter: exactly its three losses, an Adam for each."""

    def compile(
        self, learning_rate: float, adversarial_learning_rate: float, steps: int
    ) -> None:
        """Give each stage its Adam: (a) the first rate, (b) and (c) the second.

        Args:
            learning_rate: of (a).
            adversarial_learning_rate: of (b) and of (c).
            steps: training steps in an epoch.
        """
        OneLaunch.compile(self, utils.FusedAdam(learning_rate), steps)
        self.discriminator_optimizer = utils.FusedAdam(adversarial_learning_rate)
        self.encoder_optimizer = utils.FusedAdam(adversarial_learning_rate)
        self.optimizer.build(self.autoencoder_variables)
        self.discriminator_optimizer.build(self.discriminator.trainable_variables)
        self.encoder_optimizer.build(self.encoder.trainable_variables)

    def train_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Take the three stages on a batch of uint8 images (N, 784)."""
        x = utils.unit_floats(images)

        # (a) Encoder and decoder minimise L_recons = sum_n ||x_n - xhat_n||.
        with tf.GradientTape() as tape:
            restored = self(x, training=True)
            loss = tf.reduce_sum(reconstruction_loss(x, restored))
        variables = self.autoencoder_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)

        # (b) The discriminator minimises
        #     L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))].
        prior = self.draw_prior(images.shape[0])
        codes = self.encoder(x, training=True)
        with tf.GradientTape() as tape:
            loss_d = discriminator_loss(
                self.discriminator(prior, training=True),
                self.discriminator(codes, training=True),
            )
        variables = self.discriminator.trainable_variables
        self.discriminator_optimizer.apply(tape.gradient(loss_d, variables), variables)

        # (c) The encoder minimises L_Enc = E_x[log(1 - D(Enc(x)))].
        with tf.GradientTape() as tape:
            codes = self.encoder(x, training=True)
            loss_enc = encoder_loss(
                self.discriminator(codes, training=True), self.encoder_loss_kind
            )
        variables = self.encoder.trainable_variables
        self.encoder_optimizer.apply(tape.gradient(loss_enc, variables), variables)
        return self.track(x, restored, loss_d, loss_enc)


def build_model(
    options: argparse.Namespace,
    pca: PCA,
    images: np.ndarray,
    recipe: Recipe | None = None,
) -> AdversarialAutoencoder:
    """Build and compile the model that the command line asks for.

    Args:
        options: the completed command line.
        pca: of the training images, where the encoder may start.
        images: uint8 (N, 784), training images.
        recipe: by default the default run's, to the letter without skips.
    """
    recipe = recipe or Recipe(decoder_skips=not options.literal)
    steps = utils.steps_per_epoch(images, options.batch_size)
    networks = (
        build_encoder(options.code_dim, options.encoder, options.seed, recipe.hidden),
        build_decoder(options.code_dim, recipe.hidden, recipe.decoder_skips),
        build_discriminator(options.code_dim),
        images,
    )
    if options.literal:
        model = LiteralAdversarialAutoencoder(
            *networks, options.encoder_loss, options.seed
        )
        rates = options.learning_rate, LITERAL_ADVERSARIAL_LEARNING_RATE
        model.compile(*rates, steps)
        return model
    if options.encoder == "gaussian" and recipe.start_dimensions:
        start_at_pca(networks[0], pca, recipe.start_dimensions)
    model = AdversarialAutoencoder(
        *networks, options.encoder_loss, options.seed, recipe
    )
    model.compile(options.learning_rate, options.epochs, steps)
    return model


def train(
    model: keras.Model,
    train_split: Split,
    valid: Split,
    options: argparse.Namespace,
    folder: utils.RunFolder,
    draw: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Train a compiled model as its `train_step` says; return the history.

    Whichever of encoder, decoder and discriminator it has are saved in the folder.
    See `utils.RunFolder.fit`.
    """
    names = ("encoder", "decoder", "discriminator")
    validation = tf.data.Dataset.from_tensor_slices(valid.images).batch(500)
    # XLA works on the step as a whole: TensorFlow's own passes before only take time.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        return folder.fit(
            model,
            getattr(model, "images", train_split.images),  # it may hold them
            options,
            model.stacked,
            validation,
            draw,
            **{name: getattr(model, name) for name in names if hasattr(model, name)},
        )
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


# Evaluation ------------------------------------------------------------------------


def decode(decoder: keras.Model, codes: np.ndarray) -> np.ndarray:
    """Return the images, float32 (N, 784) in [0, 1], of codes (N, D)."""
    return decoder.predict(codes.astype(np.float32), batch_size=500, verbose=0)


def draw_samples(
    decoder: keras.Model, code_dim: int, seed: int, count: int = SAMPLES
) -> np.ndarray:
    """Decode draws from the prior to images, float32 (count, 784) in [0, 1]."""
    prior = np.random.default_rng(seed).standard_normal((count, code_dim))
    return decode(decoder, prior)


def evaluate(
    model: AdversarialAutoencoder,
    valid: Split,
    test: Split,
    test_codes: np.ndarray,
    samples: np.ndarray,
    classifier: keras.Model | None,
) -> dict[str, Any]:
    """Measure reconstruction, prior match and samples on the test images.

    Args:
        model: trained.
        valid: chooses the Parzen window's bandwidth.
        test: what is measured on.
        test_codes: float32 (N, D), the test images' codes.
        samples: float32 (S, 784) in [0, 1], decoded draws from the prior.
        classifier: of `metrics.train_digit_classifier`, or None without labels; then
            the Fréchet distance is None, too.
    """
    x = measures.as_unit_floats(test.images)
    squared = np.square(x - decode(model.decoder, test_codes), dtype=np.float64)
    return {
        "test_mse": float(squared.mean()),
        "test_reconstruction_loss": float(np.sqrt(squared.sum(axis=1)).mean()),
        "prior_match": measures.prior_match(test_codes, np.random.default_rng(0)),
        "frechet_distance": None
        if classifier is None
        else measures.frechet_distance(
            *measures.digit_features(classifier, samples, x)
        ),
        **measures.parzen_log_likelihood(
            samples, measures.as_unit_floats(valid.images), x
        ),
    }


def describe_classifier(
    classifier: keras.Model | None, train: Split, test: Split
) -> dict[str, float | None]:
    """Measure the Fréchet distance's floor and its classifier's accuracy, if any."""
    if classifier is None:
        return {"frechet_distance_floor": None}
    x = measures.as_unit_floats(test.images)
    real = measures.as_unit_floats(train.images[: len(x)])
    features = measures.digit_features(classifier, real, x)
    logits = classifier.layers[-1](features[1])
    found = tf.argmax(logits, axis=1).numpy()
    return {
        "frechet_distance_floor": measures.frechet_distance(*features),
        "classifier_test_accuracy": float((found == test.labels).mean()),
    }


def compare_with_training(
    model: AdversarialAutoencoder,
    train: Split,
    test: Split,
    means: np.ndarray,
    samples: np.ndarray,
) -> tuple[np.ndarray, dict[str, float]]:
    """Measure whether samples repeat training images.

    Args:
        model: trained.
        train: the images that are sought through.
        test: the images to compare with.
        means: float32 (N, D), the test images' codes without the encoder's noise.
        samples: float32 (S, 784) in [0, 1], decoded draws from the prior.

    Returns:
        The index of the training image nearest to each of the first `COMPARED`
        samples, int64, and median distances to the nearest one by what was looked up:
        `samples`, `test_images` and `test_reconstructions`.
    """
    sought = {
        "samples": samples[:COMPARED],
        "test_images": measures.as_unit_floats(test.images[:COMPARED]),
        "test_reconstructions": decode(model.decoder, means[:COMPARED]),
    }
    indices, distances = measures.nearest(
        train.images, np.concatenate([*sought.values()])
    )
    ends = np.cumsum([len(images) for images in sought.values()])[:-1]
    medians = {
        name: float(np.median(each))
        for name, each in zip(sought, np.split(distances, ends), strict=True)
    }
    return indices[: ends[0]], medians


def describe_codes(
    train: Split,
    test: Split,
    posteriors: Sequence[tuple[np.ndarray, np.ndarray]],
    pca: PCA,
) -> dict[str, Any]:
    """Measure what the codes know.

    Args:
        train: the images whose neighbourhoods are told by their labels.
        test: the images that are looked up.
        posteriors: of the training and the test images, as `posterior` returns them.
        pca: of the training images, with as many components as the code.

    Returns:
        `signal_dimensions`, the coordinates whose mean varies more over the test
        images than the noise on it, and `knn_accuracy` by the codes' means, None
        without labels.
    """
    means = [mean for mean, _ in posteriors]
    signal, noise = means[1].var(axis=0), np.square(posteriors[1][1]).mean(axis=0)
    accuracy = None
    if train.labels is not None:
        pixels = [measures.as_unit_floats(split.images) for split in (train, test)]
        accuracy = {
            name: measures.knn_accuracy(codes[0], train.labels, codes[1], test.labels)
            for name, codes in (
                ("code", means),
                ("pca_code", [pca.transform(images) for images in pixels]),
                ("pixels", pixels),
            )
        }
    return {
        "signal_dimensions": int((signal > noise).sum()),
        "knn_accuracy": accuracy,
    }


def posterior(encoder: keras.Model, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return mean and standard deviation of q(z|x), float32 (N, D) each.

    Args:
        encoder: as `build_encoder` returns it; a deterministic one deviates by 0.
        images: uint8 (N, 784).
    """
    outputs = {
        layer.name: layer.output
        for layer in encoder.layers
        if layer.name in ("mean", "log_variance")
    }
    found = utils.predict(keras.Model(encoder.inputs, outputs), images)
    mean = found["mean"]
    if "log_variance" not in found:
        return mean, np.zeros_like(mean)
    return mean, np.exp(found["log_variance"] / 2)


class Pair(OneLaunch):
    """A discriminator that takes draws and codes apart, which XLA does side by side.

    Args:
        discriminator: as `build_discriminator` returns it.
    """

    def __init__(self, discriminator: keras.Model) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.built = True

    def call(
        self, sides: tuple[tf.Tensor, tf.Tensor], training: bool = False
    ) -> list[tf.Tensor]:
        """Return the logits of draws and of codes, (N, 1) each."""
        return [self.discriminator(side, training=training) for side in sides]

    @contextlib.contextmanager
    def fitted_beside(self, batches: tf.data.Dataset, steps: int) -> Iterator[None]:
        """Take the steps in a thread while the block runs; fitted when it has ended.

        A block that fails, or is interrupted, ends the fitting, too.
        """
        failed = threading.Event()

        def look(*_: Any, **__: Any) -> None:
            self.stop_training = failed.is_set()

        with ThreadPoolExecutor(1) as thread:
            fitting = thread.submit(
                self.fit,
                self.stacked(batches),
                steps_per_epoch=steps,
                callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=look)],
                shuffle=False,
                verbose=0,
            )
            try:
                yield
                fitting.result()
            except BaseException:
                failed.set()
                raise


@contextlib.contextmanager
def fresh_discriminator(
    means: np.ndarray, deviations: np.ndarray, steps: int
) -> Iterator[keras.Model]:
    """Train a new discriminator against a frozen encoder while the block runs.

    It has the assignment's loss alone, a constant rate and no penalty.

    Args:
        means: float32 (N, D), of q(z|x) for the training images, that it learns from.
        deviations: float32 (N, D), standard deviations of the same.
        steps: of training.

    Yields:
        The discriminator, trained when the block has ended.
    """
    keras.utils.set_random_seed(0)
    pair = Pair(build_discriminator(means.shape[1]))
    pair.compile(
        utils.FusedAdam(FRESH_LEARNING_RATE),
        steps,
        loss=[keras.losses.BinaryCrossentropy(from_logits=True)] * 2,
    )
    size = min(BATCH_SIZE, len(means))
    labels = tf.ones((size, 1)), tf.zeros((size, 1))
    tables = tf.constant(means), tf.constant(deviations)

    def draws_and_codes(index: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], ...]:
        mean, deviation = (tf.gather(table, index) for table in tables)
        draws, noise = (tf.random.normal(mean.shape) for _ in range(2))
        return (draws, mean + deviation * noise), labels

    batches = utils.shuffled_batches(np.arange(len(means)), size, seed=0)
    with pair.fitted_beside(batches.map(draws_and_codes), steps):
        yield pair.discriminator


def discriminator_accuracy(discriminator: keras.Model, codes: np.ndarray) -> float:
    """Return how often a discriminator tells codes from as many draws, in [0, 1].

    Where a fresh one gets no further than 0.5, L_D was near equilibrium because the
    codes follow the prior, and not because the discriminator lost track.

    Args:
        discriminator: as `build_discriminator` returns it.
        codes: float32 (N, D).
    """
    draws = np.random.default_rng(1).standard_normal(codes.shape)
    taken_for_codes, taken_for_draws = (
        (discriminator.predict(z.astype(np.float32), batch_size=500, verbose=0) < 0)
        for z in (codes, draws)
    )
    return float(taken_for_codes.mean() + 1 - taken_for_draws.mean()) / 2


def embed(codes: np.ndarray, seed: int) -> np.ndarray:
    """Map codes (N, D) to the plane, (N, 2), by t-SNE.

    Van der Maaten & Hinton 2008; scikit-learn's takes too long for 59,000 codes, so
    this is openTSNE's (Poličar et al. 2024), which from 10,000 codes on interpolates
    the forces on a grid (Linderman et al. 2019, arXiv:1712.09005).
    """
    perplexity = min(30, max(1, (len(codes) - 1) // 3))
    tsne = TSNE(
        perplexity=perplexity,
        initialization="pca",
        neighbors="exact",  # sooner found than the approximate ones
        n_interpolation_points=2,  # in two thirds of the time of 3
        n_jobs=-1,
        random_state=seed,
    )
    return np.asarray(tsne.fit(codes))


# Figures ---------------------------------------------------------------------------


def draw_losses(
    path: Path, history: Mapping[str, np.ndarray], encoder_loss_kind: str
) -> None:
    """Draw the three losses over training, with their values at equilibrium."""
    panels = (
        ("reconstruction_loss", "(a) $L_{recons}$, mean of $\\|x-\\hat{x}\\|$", None),
        ("discriminator_loss", "(b) $L_D$ (nats)", EQUILIBRIUM["discriminator_loss"]),
        ("encoder_loss", "(c) $L_{Enc}$ (nats)", EQUILIBRIUM[encoder_loss_kind]),
    )
    with utils.figure(path, 1, 3, (9, 3.2)) as (figure, row):
        last = history["discriminator_loss"][-1]
        figure.suptitle(
            f"$L_D$ ends at {last:.2f}; a discriminator that can't tell codes from the "
            f"prior has {EQUILIBRIUM['discriminator_loss']:.2f}",
            fontsize=11,
        )
        for axes, (name, label, equilibrium) in zip(row, panels, strict=True):
            axes.plot(history["epoch"], history[name], "o-", ms=3, label="train")
            if f"val_{name}" in history:
                axes.plot(
                    history["epoch"],
                    history[f"val_{name}"],
                    "s--",
                    ms=3,
                    label="validation",
                )
                axes.legend()
            if equilibrium is not None:
                axes.axhline(equilibrium, color="black", ls=":", label="$D = 1/2$")
                axes.legend()
            axes.set(xlabel="epoch", title=label)
            axes.xaxis.get_major_locator().set_params(integer=True)


def draw_tsne(path: Path, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw the t-SNE map of the training codes, coloured by digit.

    Args:
        path: of the PNG.
        points: float (N, 2).
        labels: int64 (N,), or None for one colour.
    """
    with utils.figure(path, size=(7, 7)) as (_, axes):
        axes.set_title(f"t-SNE of the codes of all {len(points):,} training digits")
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
        colours = utils.INK if labels is None else labels
        order = np.random.default_rng(0).permutation(len(points))
        axes.scatter(
            *points[order].T,
            c=colours if labels is None else labels[order],
            s=max(0.6, min(20.0, 20_000 / len(points))),
            cmap="tab10",
            vmin=-0.5,
            vmax=9.5,
            linewidths=0,
            rasterized=True,
        )
        for digit in [] if labels is None else np.unique(labels):
            # At its fullest place: the median of one in pieces lies among others.
            counts, *edges = np.histogram2d(*points[labels == digit].T, bins=15)
            fullest = np.unravel_index(counts.argmax(), counts.shape)
            axes.text(
                *(
                    side[i : i + 2].mean()
                    for side, i in zip(edges, fullest, strict=True)
                ),
                str(digit),
                ha="center",
                va="center",
                fontsize=14,
                fontweight="bold",
                bbox={
                    "boxstyle": "circle",
                    "fc": "white",
                    "ec": "black",
                    "alpha": 0.85,
                },
            )


def draw_prior_match(
    path: Path, codes: np.ndarray, control: np.ndarray | None = None
) -> None:
    """Draw the aggregated posterior against the prior.

    Args:
        path: of the PNG.
        codes: float (N, D), the test images' codes.
        control: float (M, D), codes of another encoder, in a second colour.
    """
    count, dimensions = codes.shape
    prior = np.random.default_rng(0).standard_normal(codes.shape)
    eigenvalues = {
        label: np.linalg.eigvalsh(np.cov(values, rowvar=False))[::-1]
        for label, values in (
            ("codes", codes),
            ("control", control),
            (f"{count:,} prior draws", prior),
        )
        if values is not None
    }
    with utils.figure(path, 1, 3, (9, 3.2)) as (figure, row):
        figure.suptitle(
            f"Codes of {count:,} test digits against the prior: covariance eigenvalues "
            f"{eigenvalues['codes'][-1]:.2g} .. {eigenvalues['codes'][0]:.2g} where "
            "the prior has 1",
            fontsize=11,
        )
        marginals, spectrum, norms = row
        limit = float(max(4.0, np.quantile(np.abs(codes), 0.999)))
        grid = np.linspace(-limit, limit, 121)
        squared = np.square(codes, dtype=np.float64).sum(axis=1)
        high = max(
            float(np.quantile(squared, 0.99)),
            float(scipy.stats.chi2.ppf(0.9999, dimensions)),
        )
        lengths = np.linspace(0, high, 100)
        drawn = {"bins": grid, "density": True}
        marginals.hist(codes.ravel(), color=utils.PALE, label="codes", **drawn)
        drawn_lengths = drawn | {"bins": lengths}
        norms.hist(squared, color=utils.PALE, label="codes", **drawn_lengths)
        if control is not None:
            step = {"histtype": "step", "color": utils.ACCENT, "label": "control"}
            marginals.hist(control.ravel(), **step, **drawn)
            squared = np.square(control, dtype=np.float64).sum(axis=1)
            norms.hist(squared, **step, **drawn_lengths)

        density = scipy.stats.norm.pdf(grid)
        marginals.plot(grid, density, "--", color=utils.INK, label="prior")
        marginals.set(title="all coordinates", xlabel="$z_i$", ylabel="density")

        colours = {"codes": utils.PALE, "control": utils.ACCENT}
        for label, values in eigenvalues.items():
            spectrum.plot(
                np.arange(1, dimensions + 1),
                np.maximum(values, 1e-8),
                "-" if label in colours else "--",
                color=colours.get(label, utils.INK),
                label=label,
            )
        spectrum.set(yscale="log", title="covariance spectrum", xlabel="rank")
        spectrum.set_ylabel("eigenvalue")

        grid = np.linspace(0, high, 600)
        density = scipy.stats.chi2.pdf(grid, dimensions)
        label = f"$\\chi^2({dimensions})$"
        norms.plot(grid, density, "--", color=utils.INK, label=label)
        norms.set(title="squared length", xlabel="$\\|z\\|^2$", ylabel="density")
        for axes in row:
            axes.legend(loc="lower left" if axes is spectrum else "best")


def great_arc(start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """Walk from one code to another along a great arc (Shoemake 1985).

    A straight line would cut through the middle of the shell of radius sqrt(D) where
    the prior has its mass.

    Args:
        start: float (D,).
        end: float (D,).
        steps: codes on the walk, both ends included.

    Returns:
        Codes (steps, D), their direction turning evenly, their length changing evenly.
    """
    lengths = np.linalg.norm(start), np.linalg.norm(end)
    first, last = start / lengths[0], end / lengths[1]
    t = np.linspace(0.0, 1.0, steps)[:, np.newaxis]
    angle = math.acos(float(np.clip(first @ last, -1.0, 1.0)))
    if math.sin(angle) < 1e-6:
        return (1 - t) * start + t * end
    direction = np.sin((1 - t) * angle) * first + np.sin(t * angle) * last
    return direction / math.sin(angle) * ((1 - t) * lengths[0] + t * lengths[1])


def draw_images(
    prefix: str,
    model: AdversarialAutoencoder,
    test: Split,
    test_codes: np.ndarray,
    means: np.ndarray,
    samples: np.ndarray,
    seed: int,
) -> None:
    """Draw reconstructions, decoded prior draws and walks.

    The walks lead from test digit to test digit, and along the axes in which the codes
    of the test digits have most of their signal.

    Args:
        prefix: of the PNGs' paths.
        model: trained.
        test: its images are drawn at random.
        test_codes: float32 (N, D), their codes.
        means: float32 (N, D), the codes without the encoder's noise.
        samples: float32 (S, 784) in [0, 1], decoded draws from the prior.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(test.images))[:20]
    pairs = len(chosen) // 2
    restored = decode(model.decoder, test_codes[chosen]).reshape(-1, 28, 28)
    originals = test.images[chosen].reshape(-1, 28, 28) / 255
    shown = [originals[:pairs], restored[:pairs], originals[pairs:], restored[pairs:]]
    utils.image_grid(
        Path(prefix + "reconstructions.png"),
        np.concatenate(shown[: 4 if len(chosen) == 2 * pairs else 2]),
        "Random test digits and their reconstructions",
        ("input", "output") * 2,
        columns=pairs,
    )
    utils.image_grid(
        Path(prefix + "samples.png"),
        samples[:100].reshape(-1, 28, 28),
        "Codes drawn from the prior, decoded",
        columns=20,
    )
    steps = 12
    walks = [
        great_arc(test_codes[a], test_codes[b], steps)
        for a, b in zip(chosen[:8:2], chosen[1:8:2], strict=True)
    ]
    utils.image_grid(
        Path(prefix + "latent_walk.png"),
        decode(model.decoder, np.concatenate(walks)).reshape(-1, 28, 28),
        "Walks between the codes of test digits, along great arcs, decoded",
        columns=steps,
    )
    axes = PCA(min(5, *test_codes.shape)).fit(means)
    spread = np.linspace(-2.5, 2.5, steps)[:, np.newaxis]
    start = test_codes[chosen[0]]
    walks = [
        start - (start @ axis) * axis + (axes.mean_ @ axis + spread * std) * axis
        for axis, std in zip(
            axes.components_, np.sqrt(axes.explained_variance_), strict=True
        )
    ]
    utils.image_grid(
        Path(prefix + "principal_axes.png"),
        decode(model.decoder, np.concatenate(walks)).reshape(-1, 28, 28),
        "A test digit's code, moved along the leading principal axes of the codes, "
        "decoded",
        [str(rank) for rank in range(1, len(walks) + 1)],
        columns=steps,
    )


def draw_nearest(path: Path, samples: np.ndarray, neighbours: np.ndarray) -> None:
    """Draw decoded prior draws above the training images nearest to them.

    Args:
        path: of the PNG.
        samples: float (S, 784) in [0, 1].
        neighbours: uint8 (S, 784), those training images.
    """
    utils.image_grid(
        path,
        np.concatenate([samples, neighbours / 255]).reshape(-1, 28, 28),
        "Decoded draws from the prior above the training images nearest to them",
        ("sample", "nearest"),
        columns=len(samples),
    )


# Report ----------------------------------------------------------------------------


def report_blocks(name: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the report's block of a run, "q2" or "q2_literal", in Markdown."""
    match = metrics["prior_match"]
    balance = EQUILIBRIUM["discriminator_loss"]
    floor = metrics["frechet_distance_floor"]

    def distance(value: float | None) -> str:
        return "not measured (no labels)" if value is None else f"{value:.1f}"

    def span(key: str) -> str:
        return f"{match[f'{key}_min']:.2g} .. {match[f'{key}_max']:.2g}"

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    eigenvalues = span("covariance_eigenvalue")
    loss_kind, nearest = metrics["encoder_loss_kind"], metrics["nearest_training_image"]
    rows = [
        ("test MSE (pixels in 0..1)", f"{metrics['test_mse']:.5f}", "0"),
        (
            "test reconstruction loss, mean of the norm",
            f"{metrics['test_reconstruction_loss']:.3f}",
            "0",
        ),
        (
            "L_D, last epoch (nats)",
            f"{metrics['loss_discriminator']:.3f}",
            f"{balance:.3f}",
        ),
        (
            f"L_Enc, last epoch, {loss_kind} (nats)",
            f"{metrics['loss_encoder']:.3f}",
            f"{EQUILIBRIUM[loss_kind]:.3f}",
        ),
        (
            "accuracy of a fresh discriminator",
            percent(metrics["fresh_discriminator_accuracy"]),
            "50 %",
        ),
        ("covariance eigenvalues of the codes", eigenvalues, "1"),
        ("standard deviations of the coordinates", span("std"), "1"),
        ("mean absolute mean of the coordinates", f"{match['mean_abs_mean']:.3f}", "0"),
        ("MMD² to the prior, times 10⁴", f"{match['mmd'] * 1e4:.1f}", "0"),
        (
            "coordinates with more signal than noise",
            str(metrics["signal_dimensions"]),
            "",
        ),
        (
            "Fréchet distance of samples",
            distance(metrics["frechet_distance"]),
            f"{distance(floor)} (training images)",
        ),
        (
            f"Parzen log-likelihood, σ = {metrics['parzen_sigma']:.3f} (nats)",
            f"{metrics['parzen_log_likelihood']:.0f} "
            f"± {metrics['parzen_standard_error']:.1f}",
            "",
        ),
        (
            "distance of samples to the nearest training image, median",
            f"{nearest['samples']:.2f}",
            f"{nearest['test_images']:.2f} (test images), "
            f"{nearest['test_reconstructions']:.2f} (their reconstructions)",
        ),
        (
            f"trustworthiness of the t-SNE map, {TRUSTED:,} codes",
            f"{metrics['tsne_trustworthiness']:.3f}",
            "1",
        ),
    ]
    if metrics["knn_accuracy"] is not None:
        accuracy = {key: percent(x) for key, x in metrics["knn_accuracy"].items()}
        row = "digit from 5 nearest neighbours in the codes"
        others = f"{accuracy['pixels']} (pixels), {accuracy['pca_code']} (PCA)"
        rows.append((row, accuracy["code"], others))
    table = utils.markdown_table(("measure", "this run", "to compare"), rows)
    low = match["covariance_eigenvalue_min"] < 0.7
    high = match["covariance_eigenvalue_max"] > 1.3
    gap = metrics["loss_discriminator"] - balance
    verdict = [
        "The codes do **not** follow the prior: their covariance has eigenvalues "
        f"{eigenvalues}."
        if low or high
        else f"The covariance of the codes is close to the prior's ({eigenvalues}).",
        f"L_D ends {abs(gap):.2f} nats {'below' if gap < 0 else 'above'} equilibrium.",
    ]
    if floor is not None:
        verdict.append(
            "Decoded draws from the prior lie "
            f"{metrics['frechet_distance'] / floor:.0f} times as far from the test "
            "digits as the training digits do (Fréchet distance)."
        )
    network = (
        f"This run: {metrics['encoder']} encoder, {loss_kind} encoder loss, "
        f"{metrics['code_dim']}-dimensional code."
    )
    parts = (network, table, " ".join(verdict), utils.provenance(metrics))
    return {name: "\n\n".join(parts)}


def main() -> None:
    """Answer question 2."""
    watch = utils.Stopwatch()
    options = parse_options()
    splits = utils.limit_splits(load_digits(options.data), options.quick)
    train_split, valid, test = splits
    folder = utils.RunFolder(options)
    keras.utils.set_random_seed(options.seed)
    watch.lap("data")
    pca = measures.fit_pca(train_split.images, options.code_dim)
    model = build_model(options, pca, train_split.images)

    prefix = f"{options.figures / options.name}_"

    def draw_history(history: Mapping[str, np.ndarray]) -> None:
        draw_losses(Path(prefix + "losses.png"), history, options.encoder_loss)

    history = train(model, train_split, valid, options, folder, draw_history)
    watch.lap("training")
    watch.seconds["first step"] = folder.first_step_seconds

    test_codes = utils.predict(model.encoder, test.images)
    posteriors = [
        posterior(model.encoder, split.images) for split in (train_split, test)
    ]
    means = [mean for mean, _ in posteriors]
    steps = int(model.optimizer.iterations.numpy())
    with fresh_discriminator(*posteriors[0], steps) as judge:
        samples = draw_samples(model.decoder, options.code_dim, options.seed)
        classifier = None
        if train_split.labels is not None:
            classifier = measures.train_digit_classifier(
                train_split.images, train_split.labels
            )
        nearest, distances = compare_with_training(
            model, train_split, test, means[1], samples
        )
        metrics = {
            **evaluate(model, valid, test, test_codes, samples, classifier),
            **describe_classifier(classifier, train_split, test),
            **describe_codes(train_split, test, posteriors, pca),
            "nearest_training_image": distances,
            "loss_discriminator": float(history["discriminator_loss"][-1]),
            "loss_encoder": float(history["encoder_loss"][-1]),
            "literal": options.literal,
            "encoder": options.encoder,
            "encoder_loss_kind": options.encoder_loss,
            "code_dim": options.code_dim,
            "training_seconds": float(history["seconds"].sum()),
        }
        watch.lap("metrics")
        draw_history(history)
        draw_prior_match(Path(prefix + "prior_match.png"), test_codes)
        draw_images(prefix, model, test, test_codes, means[1], samples, options.seed)
        neighbours = train_split.images[nearest[:10]]
        draw_nearest(Path(prefix + "nearest.png"), samples[:10], neighbours)
        watch.lap("figures")
        points = embed(means[0], options.seed)
        metrics["tsne_trustworthiness"] = float(
            trustworthiness(means[0][:TRUSTED], points[:TRUSTED])
        )
        draw_tsne(Path(prefix + "tsne.png"), points, train_split.labels)
        watch.lap("t-SNE")
    metrics["fresh_discriminator_accuracy"] = discriminator_accuracy(judge, test_codes)
    watch.lap("metrics")

    metrics = utils.write_metrics(options, metrics, watch)
    if options.updates_report:
        utils.update_report(report_blocks(options.name, metrics))
    print(
        f"Test MSE {metrics['test_mse']:.4f}, L_D {metrics['loss_discriminator']:.3f}, "
        f"Fréchet distance {metrics['frechet_distance']}."
    )
    print(f"Figures and metrics are in {options.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
