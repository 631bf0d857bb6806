"""Question 2: an adversarial autoencoder for dimension reduction on MNIST digits.

    python q2_aae.py

An adversarial autoencoder (Makhzani et al. 2015, arXiv:1511.05644) is an autoencoder
whose codes are pushed towards a prior p(z), here the standard normal in 100 dimensions,
by a discriminator D that tries to tell codes from draws of the prior. If that works,
draws decode to digits. A training step has three stages, each with its own Adam:

(a) encoder and decoder minimise    L_recons = sum_n ||x_n - xhat_n||
(b) the discriminator minimises     L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))]
(c) the encoder minimises           L_Enc = E_x[log(1 - D(Enc(x)))]

`AdversarialAutoencoder.train_step` holds them, `Recipe` what the assignment leaves
open. By default Enc(x) is a draw from a normal q(z|x), whose noise is small in eight of
the 100 coordinates, which carry the image, and near the prior's in the others; the
encoder starts at principal components; (a) has weight decay, and long gradients are
clipped. `--control` has none of this.

The assignment's figures: `measure` maps the codes of the training data by t-SNE,
`train_model` draws the three losses, and `draw` explores the latent space.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import utils  # first: it chooses Keras's backend

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage

import metrics
import plots
import report
from make_data import ensure_data
from read_MNIST_M import Split, find_file, load_digits

DATA = "data.npy"
PIXELS = 784  # 28 x 28; the assignment's 768 is a slip
CODE_DIM = 100
CARRIED = 100  # principal components in the encoder's hidden layers at the start
EPOCHS = 28
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3  # of (a), at its peak
FEW = 10_000  # training images: fewer are augmented, and have a recipe of their own
LEAST_STEPS = 3_000  # of training, where --epochs does not say otherwise
SAMPLES = 10_000  # draws from the prior whose quality is measured
DISCRIMINATOR_HIDDEN = (400, 400, 400)
# Standard deviations of q(z|x), in coordinates that carry the image and in the others.
START_NOISE = 0.25  # in the former, before training
SIGNAL_NOISE_MAX, OTHER_NOISE_MIN = 0.5, 0.98
# The losses where D = 1/2 everywhere, in nats.
EQUILIBRIUM = {"discriminator_loss": 2 * math.log(2), "encoder_loss": -math.log(2)}


class Recipe(NamedTuple):
    """What the assignment leaves open. The report gives a reason for each choice."""

    gaussian: bool = True  # q(z|x) is a normal with learned variances, or a point
    signal_dimensions: int = 8  # may carry the image; 0: all, and a random start
    hidden: tuple[int, ...] = (400,) * 6  # of encoder and decoder
    decoder_skips: bool = True
    momentum: float = 0.5  # Adam's beta_1: a long memory makes adversaries circle
    weight_decay: float = 0.2  # in (a), times the rate (arXiv:1711.05101)
    discriminator_rate: float = 5e-4  # of (b); stays while those of (a) and (c) fall
    encoder_rate: float = 1.5e-3  # of (c), at its peak
    encoder_epsilon: float = 1e-3  # of (c)'s Adam: its steps shrink with the gradient
    # Longer gradients are clipped, for one long step can lose a code for good.
    clipnorm: float | None = 1024.0  # of (a), a sum over the batch
    encoder_clipnorm: float | None = 2.0  # of (c), a mean


DEFAULT = Recipe()
# With few images, a slower discriminator or fewer coordinates went wrong.
SMALL_DATA = DEFAULT._replace(signal_dimensions=10, discriminator_rate=1e-3)
CONTROL = Recipe(
    gaussian=False,
    signal_dimensions=0,
    decoder_skips=False,
    momentum=0.9,
    weight_decay=0.0,
    discriminator_rate=2e-4,
    encoder_rate=2e-4,
    encoder_epsilon=1e-7,
    clipnorm=None,
    encoder_clipnorm=None,
)

# Networks --------------------------------------------------------------------------


@keras.saving.register_keras_serializable("aae")
class Sampling(keras.layers.Layer):
    """Draws mean + exp(log_variance / 2) * noise, and not in training alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Return z, float32 (N, D) (Kingma & Welling 2014, eq. 10)."""
        mean, log_variance = inputs
        noise = keras.random.normal(tf.shape(mean), seed=self.seed_generator)
        return mean + tf.exp(0.5 * log_variance) * noise


def perceptron(
    x: keras.KerasTensor, widths: Sequence[int], skips: bool = False
) -> keras.KerasTensor:
    """Apply hidden layers; with skips, each from the second on adds to its input."""
    for number, width in enumerate(widths, 1):
        layer = keras.layers.Dense(width, activation="gelu", name=f"hidden_{number}")
        x = x + layer(x) if skips and number > 1 else layer(x)
    return x


def build_encoder(code_dim: int = CODE_DIM, recipe: Recipe = DEFAULT) -> keras.Model:
    """Build Enc: images, float32 (N, 784) in [0, 1], to codes, float32 (N, code_dim).

    A Gaussian encoder returns a draw from q(z|x), else a point. Its noise has bounds:
    the first coordinates are for the image and never drown in it, the others are noise.
    """
    image = keras.Input((PIXELS,))
    x = perceptron(image, recipe.hidden)
    mean = keras.layers.Dense(code_dim, name="mean")(x)
    if not recipe.gaussian:
        return keras.Model(image, mean, name="encoder")
    signal = np.arange(code_dim) < recipe.signal_dimensions
    least = 2 * math.log(OTHER_NOISE_MIN) if signal.any() else -12.0
    low = np.where(signal, -12.0, least)
    high = np.where(signal, 2 * math.log(SIGNAL_NOISE_MAX), 4.0)
    start = np.where(signal, 2 * math.log(START_NOISE), 0.0)
    # log-variance = low + (high - low) * sigmoid(Dense(x)); its bias makes it `start`.
    share = (start - low) / (high - low)
    between = keras.layers.Dense(
        code_dim,
        activation="sigmoid",
        kernel_initializer="zeros",
        bias_initializer=keras.initializers.Constant(np.log(share / (1 - share))),
    )(x)
    log_variance = keras.layers.Rescaling(
        (high - low).tolist(), low.tolist(), name="log_variance"
    )(between)
    return keras.Model(image, Sampling()([mean, log_variance]), name="encoder")


def build_decoder(code_dim: int = CODE_DIM, recipe: Recipe = DEFAULT) -> keras.Model:
    """Build the decoder: codes (N, code_dim) to images, float32 (N, 784) in [0, 1]."""
    code = keras.Input((code_dim,))
    x = perceptron(code, recipe.hidden, recipe.decoder_skips)
    image = keras.layers.Dense(PIXELS, activation="sigmoid")(x)
    return keras.Model(code, image, name="decoder")


def build_discriminator(code_dim: int = CODE_DIM) -> keras.Model:
    """Build D: codes (N, code_dim) to the logit of D, float32 (N, 1)."""
    code = keras.Input((code_dim,))
    logit = keras.layers.Dense(1)(perceptron(code, DISCRIMINATOR_HIDDEN))
    return keras.Model(code, logit, name="discriminator")


# Losses ----------------------------------------------------------------------------
# From logits: log D = -softplus(-logit) and log(1 - D) = -softplus(logit) can't
# overflow, as the logarithm of a probability that rounds to 0 would.


def reconstruction_loss(x: tf.Tensor, x_hat: tf.Tensor) -> tf.Tensor:
    """Return L_recons = sum_n ||x_n - xhat_n|| of images (N, 784).

    The norm is clamped so that its gradient at a perfect reconstruction is 0.
    """
    squared = tf.reduce_sum(tf.square(x - x_hat), axis=-1)
    return tf.reduce_sum(tf.sqrt(tf.maximum(squared, 1e-12)))


def discriminator_loss(prior_logits: tf.Tensor, code_logits: tf.Tensor) -> tf.Tensor:
    """Return L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))] in nats."""
    return tf.reduce_mean(tf.nn.softplus(-prior_logits)) + tf.reduce_mean(
        tf.nn.softplus(code_logits)
    )


def encoder_loss(code_logits: tf.Tensor) -> tf.Tensor:
    """Return L_Enc = E_x[log(1 - D(Enc(x)))] in nats."""
    return -tf.reduce_mean(tf.nn.softplus(code_logits))


# Model -----------------------------------------------------------------------------


class AdversarialAutoencoder(keras.Model):
    """An encoder, a decoder and a discriminator, trained in three stages a step."""

    def __init__(self, code_dim: int = CODE_DIM, recipe: Recipe = DEFAULT) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = build_encoder(code_dim, recipe)
        self.decoder = build_decoder(code_dim, recipe)
        self.discriminator = build_discriminator(code_dim)
        self.seed_generator = keras.random.SeedGenerator()
        names = "reconstruction_loss", "discriminator_loss", "encoder_loss", "mse"
        self.means = [keras.metrics.Mean(name) for name in names]
        self.built = True  # its networks are

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take the three stages on a batch x, float32 (N, 784) in [0, 1]."""
        x, _ = data

        # (a) Encoder and decoder minimise L_recons = sum_n ||x_n - xhat_n||.
        with tf.GradientTape() as tape:
            x_hat = self(x)
            loss_recons = reconstruction_loss(x, x_hat)
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss_recons, variables), variables)

        # (b) The discriminator minimises
        #     L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))].
        codes = self.encoder(x)
        z = self.sample_prior(tf.shape(x)[0])
        with tf.GradientTape() as tape:
            loss_d = discriminator_loss(
                self.discriminator(z), self.discriminator(codes)
            )
        variables = self.discriminator.trainable_variables
        gradients = tape.gradient(loss_d, variables)
        self.discriminator_optimizer.apply(gradients, variables)

        # (c) The encoder minimises L_Enc = E_x[log(1 - D(Enc(x)))].
        with tf.GradientTape() as tape:
            loss_enc = encoder_loss(self.discriminator(self.encoder(x)))
        variables = self.encoder.trainable_variables
        self.encoder_optimizer.apply(tape.gradient(loss_enc, variables), variables)

        return self.update_means(x, x_hat, loss_d, loss_enc)

    def compile(self, learning_rate: float, epochs: int, steps: int) -> None:
        """Give each stage its Adam; `learning_rate` is that of (a), at its highest."""
        recipe = self.recipe
        rate_a = utils.falling_rate(learning_rate, epochs, steps)
        rate_b = recipe.discriminator_rate
        rate_c = utils.falling_rate(recipe.encoder_rate, epochs, steps)
        momentum = recipe.momentum
        adamw = keras.optimizers.AdamW(
            rate_a,
            recipe.weight_decay,
            beta_1=momentum,
            global_clipnorm=recipe.clipnorm,
        )
        adam_b = keras.optimizers.Adam(rate_b, beta_1=momentum)
        adam_c = keras.optimizers.Adam(
            rate_c,
            beta_1=momentum,
            epsilon=recipe.encoder_epsilon,
            global_clipnorm=recipe.encoder_clipnorm,
        )
        super().compile(adamw, jit_compile=True)  # (a): self.optimizer
        self.discriminator_optimizer = adam_b
        self.encoder_optimizer = adam_c
        encoder = self.encoder.trainable_variables
        # Now, so that a checkpoint can be loaded into them.
        self.optimizer.build(encoder + self.decoder.trainable_variables)
        self.discriminator_optimizer.build(self.discriminator.trainable_variables)
        self.encoder_optimizer.build(encoder)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the reconstructions, float32 (N, 784), of images in [0, 1]."""
        return self.decoder(self.encoder(x))

    def sample_prior(self, count: tf.Tensor | int) -> tf.Tensor:
        """Draw z ~ p(z), the standard normal, float32 (count, code_dim)."""
        shape = count, self.decoder.input_shape[-1]
        return keras.random.normal(shape, seed=self.seed_generator)

    def test_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Measure the three losses on a batch x, float32 (N, 784) in [0, 1]."""
        x, _ = data
        codes = self.encoder(x)
        z_logits = self.discriminator(self.sample_prior(tf.shape(x)[0]))
        code_logits = self.discriminator(codes)
        loss_d = discriminator_loss(z_logits, code_logits)
        loss_enc = encoder_loss(code_logits)
        return self.update_means(x, self.decoder(codes), loss_d, loss_enc)

    def update_means(
        self, x: tf.Tensor, x_hat: tf.Tensor, loss_d: tf.Tensor, loss_enc: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Add a batch to the epoch's means (of L_recons: a mean over images)."""
        count = tf.cast(tf.shape(x)[0], tf.float32)
        norm = reconstruction_loss(x, x_hat) / count
        mse = tf.reduce_mean(tf.square(x - x_hat))
        for mean, value in zip(self.means, (norm, loss_d, loss_enc, mse), strict=True):
            mean.update_state(value, sample_weight=count)
        return {mean.name: mean.result() for mean in self.means}

    @property
    def metrics(self) -> list[keras.Metric]:
        """What an epoch's log shows, reset when the next begins."""
        return self.means


def start_at_principal_components(
    encoder: keras.Model, images: np.ndarray, dimensions: int
) -> None:
    """Set a Gaussian encoder to a linear code that has the prior's mean and covariance.

    The means of the first coordinates are the leading principal components of the
    images, float32 (N, 784), scaled so that with the noise they have variance 1; the
    other coordinates are noise alone. So the game against the discriminator starts near
    a draw with something in the codes. GELU lets a perceptron be linear: gelu(y) -
    gelu(-y) = y. The hidden layers carry more components than reach the code, so that
    each starts with the image at hand and not with what random layers left of it.
    """
    pca = metrics.fit_pca(images, CARRIED)
    hidden = [layer for layer in encoder.layers if layer.name.startswith("hidden")]
    mean = encoder.get_layer("mean")
    spread = pca.explained_variance_ > 1e-6 * pca.explained_variance_[0]
    carried = min(int(spread.sum()), *(layer.units // 2 for layer in hidden))
    both = 2 * carried  # units y and -y: the next layer gets gelu(y) - gelu(-y) = y

    scale = np.sqrt(pca.explained_variance_[:carried])[:, np.newaxis]
    whiten = (pca.components_[:carried] / scale).T
    kernel, bias = hidden[0].get_weights()
    kernel[:, :both] = np.concatenate([whiten, -whiten], axis=1)
    bias[:both] = -pca.mean_ @ kernel[:, :both]
    hidden[0].set_weights([kernel, bias])
    for layer in hidden[1:]:
        kernel, bias = layer.get_weights()
        kernel[:, :both] = 0.0
        kernel[:both, :both] = np.kron([[1, -1], [-1, 1]], np.eye(carried))
        layer.set_weights([kernel, bias])

    kernel, bias = mean.get_weights()
    kernel[:] = 0.0
    count = min(dimensions, carried, mean.units)
    signal = math.sqrt(1.0 - START_NOISE**2) * np.eye(carried, count)
    kernel[:both, :count] = np.concatenate([signal, -signal])
    mean.set_weights([kernel, bias])


def build_model(
    options: argparse.Namespace,
    images: np.ndarray,
    recipe: Recipe = DEFAULT,
    kind: type[AdversarialAutoencoder] = AdversarialAutoencoder,
) -> AdversarialAutoencoder:
    """Build, start and compile a model for training images, float32 (N, 784)."""
    keras.utils.set_random_seed(options.seed)
    model = kind(options.code_dim, recipe)
    if recipe.gaussian and recipe.signal_dimensions:
        start_at_principal_components(model.encoder, images, recipe.signal_dimensions)
    steps = len(images) // options.batch_size
    model.compile(options.learning_rate, options.epochs, steps)
    return model


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn, shear, scale and move digits (N, 784) a little, each in its own way."""
    changed, centre = np.empty_like(images), np.full(2, 13.5)
    for number, image in enumerate(images.reshape(-1, 28, 28)):
        turn, shear, *scale = rng.uniform(-1, 1, 4) * (math.pi / 18, 0.1, 0.1, 0.1)
        rotation = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        matrix = rotation @ np.array([[1, shear], [0, 1]]) * np.exp(scale)
        offset = centre - matrix @ centre + rng.uniform(-1.5, 1.5, 2)
        moved = ndimage.affine_transform(image, matrix, offset, order=1)
        changed[number] = moved.ravel()
    return changed


# Measures and figures --------------------------------------------------------------


class Encoded(NamedTuple):
    """What trained networks make of images and of the prior, all float32."""

    train_posterior: tuple[np.ndarray, np.ndarray]  # mean, deviation of q(z|x), (N, D)
    test_posterior: tuple[np.ndarray, np.ndarray]  # the same, (M, D) each
    codes: np.ndarray  # draws from q(z|x) of the test images, (M, D)
    reconstructions: np.ndarray  # those decoded, (M, 784) in [0, 1]
    samples: np.ndarray  # draws from the prior, decoded, (SAMPLES, 784) in [0, 1]

    @property
    def signal(self) -> np.ndarray:
        """The coordinates that carry more signal than noise, bool (D,)."""
        return metrics.signal_coordinates(*self.test_posterior)


def encode(
    encoder: keras.Model, decoder: keras.Model, train: Split, test: Split, seed: int
) -> Encoded:
    """Encode training and test images; decode test codes and draws from the prior."""
    codes = utils.predict(encoder, test.images)
    prior = np.random.default_rng(seed).standard_normal((SAMPLES, codes.shape[1]))
    return Encoded(
        metrics.posterior(encoder, train.images),
        metrics.posterior(encoder, test.images),
        codes,
        utils.predict(decoder, codes),
        utils.predict(decoder, prior),
    )


def digit_classifier(run: utils.RunFolder, train: Split) -> keras.Model | None:
    """Return the classifier that judges all runs on this data, or None without labels.

    It is trained where it is not there yet.
    """
    if train.labels is None:
        return None
    digest = run.source["sha256"][:8]
    name = f"digit_classifier-{digest}-{len(train.labels)}.keras"
    path = run.options.shared_dir / name
    if not path.exists():
        with utils.replacing(path) as temporary:
            metrics.train_digit_classifier(train).save(temporary)
    with utils.damage_told(path, "a saved classifier"):
        return keras.saving.load_model(path)


def evaluate(
    encoded: Encoded, classifier: keras.Model | None, splits: Sequence[Split]
) -> dict[str, Any]:
    """Measure reconstruction, prior match, samples and neighbourhoods on test images.

    The classifier judges samples; without one what takes labels is None.
    """
    train, _, test = splits
    codes, samples = encoded.codes, encoded.samples
    squared = np.square(test.images - encoded.reconstructions, dtype=np.float64)
    (train_means, _), signal = encoded.train_posterior, encoded.signal
    means, deviations = encoded.test_posterior
    noise = np.median(deviations[:, signal], axis=0)
    match = metrics.match_prior(
        build_discriminator, encoded.train_posterior, codes, signal
    )
    generated = {
        "samples": samples,
        "reconstructions": encoded.reconstructions,
        "pca_samples": metrics.pca_samples(train.images, max(1, len(noise)), SAMPLES),
    }
    quality = metrics.sample_quality(classifier, train, test, generated)
    sampled, known = quality["samples"], quality["training_images"]
    return {
        "test_images": len(codes),
        "test_mse": float(squared.mean()),
        "test_reconstruction_loss": float(np.sqrt(squared.sum(axis=1)).mean()),
        "signal_dimensions": int(signal.sum()),
        "signal_noise": noise.tolist(),
        "prior_match": match["all"],
        "signal_match": match["signal"],
        "fresh_discriminator_accuracy": match["all"]["fresh_discriminator"],
        "frechet_distance": sampled and sampled["frechet_distance"],
        "frechet_distance_floor": known and known["frechet_distance"],
        "sample_quality": quality,
        **metrics.dimension_reduction(train, test, train_means, means, signal),
    }


def match_at_start(
    model: AdversarialAutoencoder,
    options: argparse.Namespace,
    encoded: Encoded,
    splits: Sequence[Split],
) -> dict[str, Any]:
    """Measure the untrained encoder's prior match over the trained one's coordinates.

    A measure that it passes as well says nothing of training.
    """
    train, _, test = splits
    start = build_model(options, train.images, model.recipe).encoder
    posterior = metrics.posterior(start, train.images)
    codes = utils.predict(start, test.images)
    return metrics.match_prior(build_discriminator, posterior, codes, encoded.signal)


def draw(
    prefix: Path,
    decoder: keras.Model,
    encoded: Encoded,
    train: Split,
    test: Split,
    seed: int,
) -> None:
    """Draw reconstructions, samples, walks in the latent space, and the prior match."""

    def grid(
        name: str, rows: Sequence[np.ndarray], title: str, labels: Sequence[str] = ()
    ) -> None:
        path, images = Path(f"{prefix}_{name}.png"), np.concatenate(rows)
        plots.image_grid(path, images, title, labels, columns=len(rows[0]))

    chosen = np.random.default_rng(seed).permutation(len(test.images))[:20]
    both = test.images, encoded.reconstructions
    rows = [images[half] for half in np.split(chosen, 2) for images in both]
    title = "Random test digits and their reconstructions"
    grid("reconstructions", rows, title, ("input", "output") * 2)

    samples = encoded.samples
    grid("samples", np.split(samples[:100], 5), "Codes drawn from the prior, decoded")
    nearest, _ = metrics.nearest(train.images, samples[:10])
    title = "Decoded draws from the prior above the training images nearest to them"
    rows = [samples[:10], train.images[nearest]]
    grid("nearest", rows, title, ("sample", "nearest"))

    codes, steps = encoded.codes, 12
    ends = codes[chosen[:8]].reshape(4, 2, -1)
    rows = [utils.predict(decoder, metrics.great_arc(*pair, steps)) for pair in ends]
    grid("latent_walk", rows, "Walks between codes of test digits, decoded")
    if not encoded.signal.any():
        return
    signal, rows = np.flatnonzero(encoded.signal)[:10], []
    for coordinate in signal:
        moved = np.repeat(codes[chosen[:1]], steps, axis=0)
        moved[:, coordinate] = np.linspace(-2.5, 2.5, steps)
        rows.append(utils.predict(decoder, moved))
    title = "A test digit's code, one coordinate moved from -2.5 to 2.5, decoded"
    grid("coordinates", rows, title, [f"z{number + 1}" for number in signal])
    codes = codes[:, encoded.signal]
    draws = np.random.default_rng(0).standard_normal(codes.shape)
    spectra = {
        "codes": metrics.covariance_eigenvalues(codes),
        f"{len(draws):,} prior draws": metrics.covariance_eigenvalues(draws),
    }
    plots.q2_prior_match(Path(f"{prefix}_prior_match.png"), codes, spectra)


# Main ------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = utils.argument_parser(
        "Train an adversarial autoencoder on MNIST digits.",
        data=DATA,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        code_dim=CODE_DIM,
    )
    text = "labels of a data file without (default: label.npy beside it, if there)"
    parser.add_argument("--labels", metavar="PATH", help=text)
    text = "the same formulas on a plain, deterministic encoder, as a baseline"
    parser.add_argument("--control", action="store_true", help=text)
    options = parser.parse_args(arguments)
    return utils.complete_options(options, "q2_control" if options.control else "q2")


def train_model(
    run: utils.RunFolder, train: Split, valid: Split
) -> AdversarialAutoencoder:
    """Build and train a model; draw its losses."""
    options = run.options
    few = len(train.images) < FEW
    recipe = CONTROL if options.control else SMALL_DATA if few else DEFAULT
    model = build_model(options, train.images, recipe)
    path = options.figures / f"{options.name}_losses.png"
    draw_losses = functools.partial(plots.q2_losses, path, equilibrium=EQUILIBRIUM)
    networks = {"encoder": model.encoder, "decoder": model.decoder}
    networks["discriminator"] = model.discriminator
    change = augment if few else None
    run.fit(model, networks, train.images, valid.images, draw_losses, change)
    return model


def measure(
    run: utils.RunFolder, model: AdversarialAutoencoder, splits: Sequence[Split]
) -> dict[str, Any]:
    """Measure a trained model and draw what it makes; return the metrics."""
    options, (train_split, _, test) = run.options, splits
    print("Measuring: some minutes.", flush=True)
    encoded = encode(model.encoder, model.decoder, train_split, test, options.seed)
    found = evaluate(encoded, digit_classifier(run, train_split), splits)
    found["start_match"] = match_at_start(model, options, encoded, splits)
    run.lap("metrics")
    prefix = options.figures / options.name
    draw(prefix, model.decoder, encoded, train_split, test, options.seed)
    print("Mapping the codes by t-SNE: some minutes.", flush=True)
    points, trust = metrics.tsne_map(encoded.train_posterior[0], options.seed)
    with utils.replacing(run.path / "tsne.npz") as temporary:
        np.savez(temporary, points=points.astype(np.float32))
    plots.q2_tsne(Path(f"{prefix}_tsne.png"), points, train_split.labels)
    run.lap("figures")
    for name in ("discriminator", "encoder"):
        found[f"loss_{name}"] = float(run.history[f"{name}_loss"][-1])
    found |= {"code_dim": options.code_dim, "tsne_trustworthiness": trust}
    return found | {"recipe": model.recipe._asdict()}


def main() -> None:
    """Answer question 2."""
    options = parse_options()
    options.data = find_file(options.data or ensure_data(DATA))
    splits = utils.prepare_splits(load_digits(options.data, options.labels), options)
    if options.default_epochs:
        steps = len(splits[0].images) // options.batch_size
        options.epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps))
    with utils.RunFolder(options) as run:
        model = train_model(run, *splits[:2])
        found = measure(run, model, splits)
        run.write_metrics(found)
    if options.updates_report:
        report.update()
    print(f"Test MSE {found['test_mse']:.4f}; figures and metrics: {options.figures}.")


if __name__ == "__main__":
    utils.run_script(main)
