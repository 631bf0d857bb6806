"""Question 2: an adversarial autoencoder for dimension reduction on MNIST digits.

    python q2_aae.py

An adversarial autoencoder (Makhzani et al. 2015, arXiv:1511.05644) is an autoencoder
whose codes are pushed towards a prior p(z), here the standard normal in 100 dimensions,
by a discriminator D that tries to tell codes from draws of the prior. If that works,
draws decode to digits. A training step has three stages, each with its own Adam:

(a) encoder and decoder minimise    L_recons = sum_n ||x_n - xhat_n||
(b) the discriminator minimises     L_D = -E_z[log D(z)] - E_x[log(1 - D(Enc(x)))]
(c) the encoder minimises           L_Enc = E_x[log(1 - D(Enc(x)))]

`AdversarialAutoencoder.train_step` holds them, `Recipe` most of what the assignment
leaves open.

A code has ten informative coordinates, which the encoder computes, and 90 that are
draws from the standard normal, added by a layer without weights. So this is a code of
ten numbers, filled up with noise to the hundred that the assignment asks for. Digits
vary in some ten directions, and a deterministic code of a hundred numbers can't fill a
normal in a hundred dimensions: `--control` shows that. The paper itself takes codes of
8 dimensions for MNIST, and allows an encoder that is given noise (its section 2). That
a code with more dimensions than the data needs noise in the others was found before
(Rubenstein et al. 2018, arXiv:1802.03761; Mondal et al. 2020, arXiv:1912.04564).

The assignment's figures: `measure` maps the codes of the training data by t-SNE,
`train_model` draws the three losses, and `explore_latent_space` decodes draws from the
prior, walks between codes, and codes with one coordinate moved.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import utils  # first: it chooses Keras's backend

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage
from sklearn.metrics import pairwise_distances_argmin

import metrics
import plots
import report
from files import replacing
from make_data import ensure_data
from read_MNIST_M import Split, find_file, load_digits

DATA = "data.npy"
PIXELS = 784  # 28 x 28; the assignment's 768 is a slip
CODE_DIM = 100
EPOCHS = 28
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3  # of (a), at its peak
FEW = 10_000  # training images: fewer are augmented
LEAST_STEPS = 3_000  # of training, where --epochs does not say otherwise
SAMPLES = 10_000  # draws from the prior whose quality is measured
DISCRIMINATOR_HIDDEN = (400, 400, 400)
INFORMATIVE = 10  # coordinates of a code that the encoder computes
# The losses where D = 1/2 everywhere, in nats.
EQUILIBRIUM = {"discriminator_loss": 2 * math.log(2), "encoder_loss": -math.log(2)}


class Recipe(NamedTuple):
    """Most of what the assignment leaves open. The report gives reasons."""

    informative: int | None = INFORMATIVE  # coordinates; None: all of the code's
    hidden: tuple[int, ...] = (400,) * 6  # of encoder and decoder
    decoder_skips: bool = True
    momentum: float = 0.5  # Adam's beta_1: a long memory makes adversaries circle
    weight_decay: float = 0.2  # in (a), times the rate (arXiv:1711.05101)
    discriminator_rate: float = 1e-3  # of (b), at its peak
    encoder_rate: float = 1.5e-3  # of (c), at its peak
    encoder_epsilon: float = 1e-3  # of (c)'s Adam: small gradients make small steps
    # The greatest norm of a gradient, for one long step can lose a code for good.
    clipnorm: float | None = 1024.0  # of (a), whose loss is a sum over the batch
    encoder_clipnorm: float | None = 2.0  # of (c), whose loss is a mean


DEFAULT = Recipe()
CONTROL = Recipe(
    informative=None,
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
class AppendNoise(keras.layers.Layer):
    """Appends standard normal draws to each vector, in training and afterwards."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return float32 (N, D + count) for inputs (N, D)."""
        shape = tf.shape(inputs)[0], self.count
        noise = keras.random.normal(shape, seed=self.seed_generator)
        return tf.concat([inputs, noise], axis=1)

    def get_config(self) -> dict[str, Any]:
        """Return what the layer is built from when it is loaded."""
        return super().get_config() | {"count": self.count}


def perceptron(
    x: keras.KerasTensor, widths: Sequence[int], skips: bool = False
) -> keras.KerasTensor:
    """Apply hidden layers; with skips, each from the second on adds to its input.

    Skips take hidden layers of one width.
    """
    for number, width in enumerate(widths, 1):
        layer = keras.layers.Dense(width, activation="gelu", name=f"hidden_{number}")
        x = x + layer(x) if skips and number > 1 else layer(x)
    return x


def build_encoder(code_dim: int = CODE_DIM, recipe: Recipe = DEFAULT) -> keras.Model:
    """Build Enc: images, float32 (N, 784) in [0, 1], to codes, float32 (N, code_dim).

    The informative coordinates come first, from the layer `informative`.
    """
    image = keras.Input((PIXELS,))
    x = perceptron(image, recipe.hidden)
    count = code_dim if recipe.informative is None else recipe.informative
    count = min(count, code_dim)
    code = keras.layers.Dense(count, name="informative")(x)
    if count < code_dim:
        code = AppendNoise(code_dim - count)(code)
    return keras.Model(image, code, name="encoder")


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
        self.informative = self.encoder.get_layer("informative").units
        self.decoder = build_decoder(code_dim, recipe)
        self.discriminator = build_discriminator(code_dim)
        self.seed_generator = keras.random.SeedGenerator()
        names = "reconstruction_loss", "discriminator_loss", "encoder_loss", "mse"
        self.means = [keras.metrics.Mean(name) for name in names]
        self.built = True  # for its networks are

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
        rates = learning_rate, recipe.discriminator_rate, recipe.encoder_rate
        a, b, c = (utils.falling_rate(rate, epochs, steps) for rate in rates)
        momentum = recipe.momentum
        adamw = keras.optimizers.AdamW(
            a,
            recipe.weight_decay,
            beta_1=momentum,
            global_clipnorm=recipe.clipnorm,
        )
        super().compile(adamw, jit_compile=True)  # as self.optimizer
        self.discriminator_optimizer = keras.optimizers.Adam(b, beta_1=momentum)
        self.encoder_optimizer = keras.optimizers.Adam(
            c,
            beta_1=momentum,
            epsilon=recipe.encoder_epsilon,
            global_clipnorm=recipe.encoder_clipnorm,
        )
        encoder = self.encoder.trainable_variables
        # Adam's variables are made now, so that a checkpoint can be loaded into them.
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
        """Add a batch to the epoch's means; L_recons counts as a mean over images."""
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


def build_model(
    options: argparse.Namespace,
    images: np.ndarray,
    recipe: Recipe = DEFAULT,
    kind: type[AdversarialAutoencoder] = AdversarialAutoencoder,
) -> AdversarialAutoencoder:
    """Build and compile a model for training images, float32 (N, 784)."""
    keras.utils.set_random_seed(options.seed)
    model = kind(options.code_dim, recipe)
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

    train_codes: np.ndarray  # of the training images, (N, D)
    test_codes: np.ndarray  # of the test images, (M, D)
    reconstructions: np.ndarray  # the test codes decoded, (M, 784) in [0, 1]
    samples: np.ndarray  # draws from the prior, decoded, (SAMPLES, 784) in [0, 1]


def encode(
    encoder: keras.Model, decoder: keras.Model, train: Split, test: Split, seed: int
) -> Encoded:
    """Encode training and test images; decode test codes and draws from the prior."""
    test_codes = utils.predict(encoder, test.images)
    shape = SAMPLES, test_codes.shape[1]
    prior = np.random.default_rng(seed).standard_normal(shape)
    return Encoded(
        utils.predict(encoder, train.images),
        test_codes,
        utils.predict(decoder, test_codes),
        utils.predict(decoder, prior),
    )


def digit_classifier(run: utils.RunFolder, train: Split) -> keras.Model | None:
    """Return the classifier that judges all runs on this data, or None without labels.

    It is trained where it is not there yet.
    """
    if train.labels is None:
        return None
    digest = hashlib.sha256(train.images.tobytes() + train.labels.tobytes())
    path = run.options.shared_dir / f"digit_classifier-{digest.hexdigest()[:8]}.keras"
    if not path.exists():
        with replacing(path) as temporary:
            metrics.train_digit_classifier(train).save(temporary)
    with utils.damage_told(path, "a saved classifier"):
        return keras.saving.load_model(path)


def evaluate(
    encoded: Encoded,
    informative: int,
    classifier: keras.Model | None,
    train: Split,
    test: Split,
) -> dict[str, Any]:
    """Measure reconstruction, prior match, samples and neighbourhoods on test images.

    The first `informative` coordinates of a code are those that the encoder computes.
    The classifier judges samples; without one, what needs it is None.
    """
    squared = np.square(test.images - encoded.reconstructions, dtype=np.float64)
    codes = encoded.train_codes[:, :informative], encoded.test_codes[:, :informative]
    informative_match = metrics.match_prior(build_discriminator, *codes)
    match = informative_match
    if informative < encoded.test_codes.shape[1]:
        match = metrics.match_prior(
            build_discriminator, encoded.train_codes, encoded.test_codes
        )
    rng = np.random.default_rng(2)
    draws = [rng.standard_normal(part.shape) for part in codes]
    generated = {
        "samples": encoded.samples,
        "reconstructions": encoded.reconstructions,
        "pca_samples": metrics.pca_samples(train.images, informative, SAMPLES),
    }
    quality = metrics.sample_quality(classifier, train, test, generated)
    distance = None
    if quality["samples"] is not None:
        distance = quality["samples"]["frechet_distance"]
    return {
        "test_images": len(test.images),
        "test_mse": float(squared.mean()),
        "test_reconstruction_loss": float(np.sqrt(squared.sum(axis=1)).mean()),
        "informative_dimensions": informative,
        "prior_match": match,
        "informative_match": informative_match,
        # The same network, trained on draws in place of codes.
        "fresh_discriminator_on_draws": metrics.match_prior(
            build_discriminator, *draws
        )["fresh_discriminator"],
        "frechet_distance": distance,
        "sample_quality": quality,
        **metrics.dimension_reduction(train, test, *codes),
    }


def draw_reconstructions(
    prefix: str, encoded: Encoded, train: Split, test: Split, chosen: np.ndarray
) -> None:
    """Draw chosen test images restored, and samples above nearest training images."""
    both = test.images, encoded.reconstructions
    rows = [images[half] for half in np.split(chosen, 2) for images in both]
    path = f"{prefix}_reconstructions.png"
    title = "Random test digits and their reconstructions"
    plots.image_grid(path, rows, title, ("input", "output") * 2)

    samples = encoded.samples[:10]
    nearest = pairwise_distances_argmin(samples, train.images)
    rows = [samples, train.images[nearest]]
    path = f"{prefix}_nearest.png"
    title = "Decoded draws from the prior above the training images nearest to them"
    plots.image_grid(path, rows, title, ("sample", "nearest"))


def explore_latent_space(
    prefix: str,
    decoder: keras.Model,
    encoded: Encoded,
    informative: int,
    chosen: np.ndarray,
) -> None:
    """Decode draws from the prior, walks between codes, and codes moved on an axis."""
    rows = np.split(encoded.samples[:100], 5)
    title = "Codes drawn from the prior, decoded"
    plots.image_grid(f"{prefix}_samples.png", rows, title)

    codes, steps = encoded.test_codes[chosen], 12
    walks = [metrics.great_arc(*ends, steps) for ends in codes[:8].reshape(4, 2, -1)]
    rows = [utils.predict(decoder, walk) for walk in walks]
    title = "Walks between codes of test digits, decoded"
    plots.image_grid(f"{prefix}_latent_walk.png", rows, title)

    rows = []
    for coordinate in range(min(informative, 10)):
        moved = np.repeat(codes[:1], steps, axis=0)
        moved[:, coordinate] = np.linspace(-2.5, 2.5, steps)
        rows.append(utils.predict(decoder, moved))
    title = "A test digit's code, one coordinate moved from -2.5 to 2.5, decoded"
    labels = [f"z{number}" for number in range(1, len(rows) + 1)]
    plots.image_grid(f"{prefix}_coordinates.png", rows, title, labels)


def draw_prior_match(path: str, codes: np.ndarray) -> None:
    """Draw the informative coordinates of test codes, (M, D), against the prior."""
    draws = np.random.default_rng(0).standard_normal(codes.shape)
    spectra = {
        "codes": metrics.covariance_eigenvalues(codes),
        f"{len(draws):,} prior draws": metrics.covariance_eigenvalues(draws),
    }
    plots.q2_prior_match(path, codes, spectra)


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
    recipe = CONTROL if options.control else DEFAULT
    model = build_model(options, train.images, recipe)
    path = options.figures / f"{options.name}_losses.png"
    networks = model.encoder, model.decoder, model.discriminator
    run.fit(
        model,
        {network.name: network for network in networks},
        train.images,
        valid.images,
        lambda history: plots.q2_losses(path, history, EQUILIBRIUM),
        augment if len(train.images) < FEW else None,
    )
    return model


def measure(
    run: utils.RunFolder, model: AdversarialAutoencoder, splits: Sequence[Split]
) -> dict[str, Any]:
    """Measure a trained model and draw what it makes; return the metrics."""
    options, (train, _, test) = run.options, splits
    print("Measuring: some minutes.", flush=True)
    encoded = encode(model.encoder, model.decoder, train, test, options.seed)
    classifier, informative = digit_classifier(run, train), model.informative
    found = evaluate(encoded, informative, classifier, train, test)
    prefix = f"{options.figures / options.name}"
    chosen = np.random.default_rng(options.seed).permutation(len(test.images))[:20]
    draw_reconstructions(prefix, encoded, train, test, chosen)
    explore_latent_space(prefix, model.decoder, encoded, informative, chosen)
    codes = encoded.test_codes[:, :informative]
    draw_prior_match(f"{prefix}_prior_match.png", codes)
    print("Mapping the codes by t-SNE: some minutes.", flush=True)
    points, trust = metrics.tsne_map(encoded.train_codes[:, :informative], options.seed)
    plots.q2_tsne(f"{prefix}_tsne.png", points, train.labels)
    with replacing(run.path / "tsne.npz") as temporary:  # for extras/explorer.py
        np.savez(
            temporary,
            points=points.astype(np.float32),
            encoder=utils.weights_digest(model.encoder),
        )
    return {
        **found,
        "loss_discriminator": float(run.history["discriminator_loss"][-1]),
        "loss_encoder": float(run.history["encoder_loss"][-1]),
        "code_dim": options.code_dim,
        "tsne_trustworthiness": trust,
        "recipe": model.recipe._asdict(),
    }


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
