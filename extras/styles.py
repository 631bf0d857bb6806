"""Beyond the homework: one style, ten digits.

    python -m extras.styles    # takes the options of q2_aae.py

Question 2's adversarial autoencoder, whose decoder and discriminator see the digit,
one-hot, beside the code (Makhzani et al. 2015, arXiv:1511.05644, section 4 and figure
6). The encoder sees the image alone. The three formulas stay as they are, with D(z, y)
and Dec(z, y); a draw of the prior takes a digit of the batch. So the codes of each
digit follow the prior, and what the digit doesn't tell, the style, is left to the code.
"""

from __future__ import annotations

from typing import Any

import utils

import keras
import numpy as np
import tensorflow as tf

import metrics
import plots
import q2_aae as q2
import report
from files import describe_source, training_code
from make_data import ensure_data
from read_MNIST_M import NUM_CLASSES, DataError, Split, find_file, load_digits

STYLES = 10  # drawn from the prior, in the figure
READ = 5  # test images whose style the figure shows
# A tenth number was hardly used; D has to judge each digit's codes, so it is faster.
RECIPE = q2.DEFAULT._replace(informative=9, rate_b=2e-3)


def with_digits(split: Split) -> np.ndarray:
    """Return images and one-hot digits side by side, float32 (N, 784 + 10)."""
    digits = np.eye(NUM_CLASSES, dtype=np.float32)[split.labels]
    return np.concatenate([split.images, digits], axis=1)


class StyleAutoencoder(q2.AdversarialAutoencoder):
    """An adversarial autoencoder whose decoder and discriminator see the digit.

    Its batches hold images and digits side by side, see `with_digits`.
    """

    def build_networks(self, code_dim: int) -> None:
        """Build question 2's encoder, and the others with the digit as an input."""
        self.encoder = q2.build_encoder(code_dim, self.recipe)
        code, digit = keras.Input((code_dim,)), keras.Input((NUM_CLASSES,))
        both = keras.layers.Concatenate()([code, digit])
        decoder = q2.build_decoder(code_dim + NUM_CLASSES, self.recipe)
        self.decoder = keras.Model([code, digit], decoder(both), name="decoder")
        judge = q2.build_discriminator(code_dim + NUM_CLASSES, self.recipe)
        self.discriminator = keras.Model(
            [code, digit], judge(both), name="discriminator"
        )

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take the three stages on a batch, float32 (N, 784 + 10)."""
        x, y = tf.split(data[0], [q2.PIXELS, NUM_CLASSES], axis=1)

        # (a) Encoder and decoder minimise
        #     L_recons = sum_n ||x_n - Dec(Enc(x_n), y_n)||.
        with tf.GradientTape() as tape:
            x_hat = self.decoder([self.encoder(x), y])
            loss_recons = q2.reconstruction_loss(x, x_hat)
        variables = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply(tape.gradient(loss_recons, variables), variables)

        # (b) The discriminator minimises
        #     L_D = -E_{z~p(z)}[log D(z, y)] - E_x[log(1 - D(Enc(x), y))].
        codes = self.encoder(x)
        z = self.sample_prior(tf.shape(x)[0])
        with tf.GradientTape() as tape:
            loss_d = q2.discriminator_loss(
                self.discriminator([z, y]), self.discriminator([codes, y])
            )
        variables = self.discriminator.trainable_variables
        gradients = tape.gradient(loss_d, variables)
        self.discriminator_optimizer.apply(gradients, variables)

        # (c) The encoder minimises L_Enc = E_x[log(1 - D(Enc(x), y))].
        with tf.GradientTape() as tape:
            loss_enc = q2.encoder_loss(self.discriminator([self.encoder(x), y]))
        variables = self.encoder.trainable_variables
        self.encoder_optimizer.apply(tape.gradient(loss_enc, variables), variables)

        return self.update_means(x, x_hat, loss_d, loss_enc)

    def test_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Measure the three losses on a batch, float32 (N, 784 + 10)."""
        x, y = tf.split(data[0], [q2.PIXELS, NUM_CLASSES], axis=1)
        codes, z = self.encoder(x), self.sample_prior(tf.shape(x)[0])
        code_logits = self.discriminator([codes, y])
        loss_d = q2.discriminator_loss(self.discriminator([z, y]), code_logits)
        loss_enc = q2.encoder_loss(code_logits)
        return self.update_means(x, self.decoder([codes, y]), loss_d, loss_enc)


def measure(
    run: utils.RunFolder, model: StyleAutoencoder, train: Split, test: Split
) -> dict[str, Any]:
    """Measure a trained model on test images; draw its styles."""
    informative = model.informative
    train_codes = utils.predict(model.encoder, train.images)
    test_codes = utils.predict(model.encoder, test.images)
    one_hot = np.eye(NUM_CLASSES, dtype=np.float32)
    digits = one_hot[train.labels], one_hot[test.labels]
    decoder = model.decoder
    reconstructions = utils.predict(decoder, [test_codes, digits[1]])

    rng = np.random.default_rng(run.settings.seed)
    prior = rng.standard_normal((q2.SAMPLES, test_codes.shape[1]))
    asked = np.arange(q2.SAMPLES) % NUM_CLASSES
    samples = utils.predict(decoder, [prior, one_hot[asked]])
    classifier = q2.digit_classifier(run.path.parent, train)
    named = utils.predict(classifier, samples).argmax(axis=1)
    quality = metrics.sample_quality(
        classifier,
        train,
        test,
        {"samples": samples, "reconstructions": reconstructions},
    )

    codes = train_codes[:, :informative], test_codes[:, :informative]
    labelled = codes[0], train.labels, codes[1], test.labels
    keras.utils.set_random_seed(0)
    judge = q2.build_discriminator(informative + NUM_CLASSES)
    draw_styles(run, model, test, test_codes)
    return {
        "test_images": len(test.images),
        "test_mse": float(np.square(test.images - reconstructions).mean()),
        "code_dim": test_codes.shape[1],
        "informative_dimensions": informative,
        "frechet_distance": quality["samples"]["frechet_distance"],
        "sample_quality": quality,
        "obedience": float((named == asked).mean()),
        "knn_accuracy": {"code": metrics.knn_accuracy(*labelled)},
        "logistic_accuracy": {"code": metrics.logistic_accuracy(*labelled)},
        "fresh_discriminator": metrics.fresh_discriminator_accuracy(
            judge, *codes, digits
        ),
        "prior_match": metrics.prior_match(test_codes),
        "informative_match": metrics.prior_match(codes[1]),
        "recipe": model.recipe._asdict(),
    }


def draw_styles(
    run: utils.RunFolder, model: StyleAutoencoder, test: Split, codes: np.ndarray
) -> None:
    """Draw ten digits in styles from the prior, and in those of test images."""
    rng = np.random.default_rng(run.settings.seed)
    drawn = rng.standard_normal((STYLES, codes.shape[1]))
    chosen = rng.permutation(len(codes))[:READ]
    blank = np.ones((STYLES, q2.PIXELS), np.float32)
    digits = np.eye(NUM_CLASSES)
    rows = []
    for image, code in zip(
        [*blank, *test.images[chosen]], [*drawn, *codes[chosen]], strict=True
    ):
        style = np.repeat(code[np.newaxis], NUM_CLASSES, axis=0)
        rows.append([image, *utils.predict(model.decoder, [style, digits])])
    title = f"{STYLES} styles from the prior; below, the style of {READ} test images"
    plots.image_grid(run.figures / f"{run.settings.name}.png", rows, title)


def main() -> None:
    """Train and measure."""
    parser = q2.option_parser("Train an autoencoder of styles on MNIST digits.")
    settings = utils.settings_from(parser.parse_args(), "styles")
    plots.check()
    data = find_file(settings.data or ensure_data(q2.DATA))
    splits = load_digits(data, settings.labels)
    if splits[0].labels is None:
        raise DataError(f"{data}: found no labels, expected labels (--labels)")
    train, valid, test = utils.prepare_splits(splits, data, settings.quick)
    count = len(train.images)
    schedule = utils.training_schedule(settings, count, q2.EPOCHS, q2.LEAST_STEPS)
    run = utils.RunFolder(settings, describe_source(data), schedule)
    with run.in_use():
        model = q2.build_model(settings, schedule, RECIPE, StyleAutoencoder)
        history = q2.train_model(run, model, with_digits(train), with_digits(valid))
        print("Measuring: a minute or two.", flush=True)
        measures = measure(run, model, train, test)
        measures["loss_discriminator"] = float(history["discriminator_loss"][-1])
        measures["loss_encoder"] = float(history["encoder_loss"][-1])
        measures["code"] = training_code(q2.__file__)
        run.write_metrics(measures, history)
    if settings.updates_report:
        report.update()
    print(f"{measures['obedience']:.1%} of the samples are the digit asked for.")


if __name__ == "__main__":
    utils.run_script(main)
