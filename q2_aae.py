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
leaves open. By default Enc(x) is a draw from a normal q(z|x) (the paper's section 2).
Its noise may be small in ten of the 100 coordinates, which carry the image, and is
near the prior's in the others; (a) has weight decay, and long gradients are clipped.
`--control` has a plain, deterministic encoder, and Adam's usual constants.

The assignment's figures: `measure` maps the mean codes of the training data by t-SNE,
`train_model` draws the three losses, and `explore_latent_space` does what it says.
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
# Least and greatest standard deviation of q(z|x).
SIGNAL_NOISE = 0.0025, 0.5  # in coordinates that carry the image
OTHER_NOISE = 0.98, 1.02  # in the others
ANY_NOISE = 0.0025, 8.0  # in all of them, where none are for the image alone
# The losses where D = 1/2 everywhere, in nats.
EQUILIBRIUM = {"discriminator_loss": 2 * math.log(2), "encoder_loss": -math.log(2)}


class Recipe(NamedTuple):
    """Most of what the assignment leaves open. The report gives reasons."""

    gaussian: bool = True  # q(z|x) is a normal with learned variances, or a point
    signal_dimensions: int = 10  # may carry the image; 0: all
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
    gaussian=False,
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
    """Draws mean + exp(log_variance / 2) * noise, in training and afterwards."""

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
    """Apply hidden layers; with skips, each from the second on adds to its input.

    Skips take hidden layers of one width.
    """
    for number, width in enumerate(widths, 1):
        layer = keras.layers.Dense(width, activation="gelu", name=f"hidden_{number}")
        x = x + layer(x) if skips and number > 1 else layer(x)
    return x


def build_encoder(code_dim: int = CODE_DIM, recipe: Recipe = DEFAULT) -> keras.Model:
    """Build Enc: images, float32 (N, 784) in [0, 1], to codes, float32 (N, code_dim).

    A Gaussian encoder returns a draw from q(z|x), else a point. Only the first
    coordinates may have little noise. In the others the noise alone is about as wide as
    the prior, so the discriminator leaves the means no room.
    """
    image = keras.Input((PIXELS,))
    x = perceptron(image, recipe.hidden)
    mean = keras.layers.Dense(code_dim, name="mean")(x)
    if not recipe.gaussian:
        return keras.Model(image, mean, name="encoder")
    signal = np.arange(code_dim)[:, np.newaxis] < recipe.signal_dimensions
    other = OTHER_NOISE if recipe.signal_dimensions else ANY_NOISE
    low, high = 2 * np.log(np.where(signal, SIGNAL_NOISE, other)).T  # of log-variance
    # low + (high - low) * sigmoid(Dense(x)), at first in the middle.
    between = keras.layers.Dense(
        code_dim, activation="sigmoid", kernel_initializer="zeros"
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
    digest = hashlib.sha256(train.images.tobytes() + train.labels.tobytes())
    path = run.options.shared_dir / f"digit_classifier-{digest.hexdigest()[:8]}.keras"
    if not path.exists():
        with utils.replacing(path) as temporary:
            metrics.train_digit_classifier(train).save(temporary)
    with utils.damage_told(path, "a saved classifier"):
        return keras.saving.load_model(path)


def evaluate(
    encoded: Encoded, classifier: keras.Model | None, splits: Sequence[Split]
) -> dict[str, Any]:
    """Measure reconstruction, prior match, samples and neighbourhoods on test images.

    The classifier judges samples; without one, what needs it is None.
    """
    train, _, test = splits
    codes, signal = encoded.codes, encoded.signal
    squared = np.square(test.images - encoded.reconstructions, dtype=np.float64)
    train_means, _ = encoded.train_posterior
    means, deviations = encoded.test_posterior
    noise = np.median(deviations[:, signal], axis=0)
    match = metrics.match_prior(
        build_discriminator, encoded.train_posterior, codes, signal
    )
    generated = {
        "samples": encoded.samples,
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
    prefix: str, decoder: keras.Model, encoded: Encoded, chosen: np.ndarray
) -> None:
    """Decode draws from the prior, walks between codes, and codes moved on an axis."""
    rows = np.split(encoded.samples[:100], 5)
    title = "Codes drawn from the prior, decoded"
    plots.image_grid(f"{prefix}_samples.png", rows, title)

    codes, steps = encoded.codes[chosen], 12
    walks = [metrics.great_arc(*ends, steps) for ends in codes[:8].reshape(4, 2, -1)]
    rows = [utils.predict(decoder, walk) for walk in walks]
    title = "Walks between codes of test digits, decoded"
    plots.image_grid(f"{prefix}_latent_walk.png", rows, title)

    signal, rows = np.flatnonzero(encoded.signal)[:10], []
    for coordinate in signal:
        moved = np.repeat(codes[:1], steps, axis=0)
        moved[:, coordinate] = np.linspace(-2.5, 2.5, steps)
        rows.append(utils.predict(decoder, moved))
    if rows:
        title = "A test digit's code, one coordinate moved from -2.5 to 2.5, decoded"
        labels = [f"z{number + 1}" for number in signal]
        plots.image_grid(f"{prefix}_coordinates.png", rows, title, labels)


def draw_prior_match(path: str, encoded: Encoded) -> None:
    """Draw codes beside draws from the prior, over the coordinates with signal."""
    if encoded.signal.any():
        codes = encoded.codes[:, encoded.signal]
        draws = np.random.default_rng(0).standard_normal(codes.shape)
        pair = {"codes": codes, f"{len(draws):,} prior draws": draws}
        spectra = {k: metrics.covariance_eigenvalues(v) for k, v in pair.items()}
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
    found = evaluate(encoded, digit_classifier(run, train), splits)
    # A measure that the untrained encoder passes as well says nothing of training.
    keras.utils.set_random_seed(options.seed)  # so its weights are those of the start
    start = build_encoder(options.code_dim, model.recipe)
    posterior = metrics.posterior(start, train.images)
    codes = utils.predict(start, test.images)
    found["start_match"] = metrics.match_prior(
        build_discriminator, posterior, codes, encoded.signal
    )
    prefix = f"{options.figures / options.name}"
    chosen = np.random.default_rng(options.seed).permutation(len(test.images))[:20]
    draw_reconstructions(prefix, encoded, train, test, chosen)
    explore_latent_space(prefix, model.decoder, encoded, chosen)
    draw_prior_match(f"{prefix}_prior_match.png", encoded)
    print("Mapping the codes by t-SNE: some minutes.", flush=True)
    points, trust = metrics.tsne_map(encoded.train_posterior[0], options.seed)
    plots.q2_tsne(f"{prefix}_tsne.png", points, train.labels)
    with utils.replacing(run.path / "tsne.npz") as temporary:  # for extras/explorer.py
        np.savez(temporary, points=points.astype(np.float32))
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
