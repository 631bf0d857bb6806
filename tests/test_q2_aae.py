"""Question 2's losses, stages and networks, against plain computations."""

import utils

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import descend, tiny_digits
from scipy.stats import kstest, norm

import metrics
import plots
import q2_aae as q2
from read_MNIST_M import Split

RNG = np.random.default_rng(0)
IMAGES = utils.unit_floats(tiny_digits()[0].reshape(-1, 784))
BATCH = tf.constant(IMAGES[:64])
SMALL = q2.DEFAULT._replace(hidden=(48, 48), discriminator_hidden=(40,), informative=3)
POINT = {"informative": None}  # no noise in the codes
SCHEDULE = utils.Schedule(epochs=10, steps=100, batch_size=64)


def build(**changes):
    keras.utils.set_random_seed(0)
    return q2.AdversarialAutoencoder(8, SMALL._replace(**changes))


def descending(rates):
    """Return a model whose stages take plain gradient steps."""
    model = build()
    model.compile(1e-3, SCHEDULE)
    a, b, c = (keras.optimizers.SGD(rate) for rate in rates)
    model.optimizer, model.discriminator_optimizer, model.encoder_optimizer = a, b, c
    return model


# Losses


def probability(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_losses_are_the_assignments_formulas():
    prior, codes = (RNG.normal(0, 2, (50, 1)).astype(np.float32) for _ in range(2))
    d_prior, d_codes = probability(prior), probability(codes)
    l_d = -np.mean(np.log(d_prior)) - np.mean(np.log(1 - d_codes))
    assert q2.discriminator_loss(prior, codes).numpy() == pytest.approx(l_d, rel=1e-5)
    l_enc = np.mean(np.log(1 - d_codes))
    assert q2.encoder_loss(codes).numpy() == pytest.approx(l_enc, rel=1e-5)

    x, restored = (RNG.random((5, 784), np.float32) for _ in range(2))
    norms = [np.sqrt(sum((a - b) ** 2)) for a, b in zip(x, restored, strict=True)]
    found = q2.reconstruction_loss(x, restored).numpy()
    assert found == pytest.approx(sum(norms), rel=1e-5)

    zeros = tf.zeros((4, 1))
    at_half = (
        q2.discriminator_loss(zeros, zeros).numpy(),
        q2.encoder_loss(zeros).numpy(),
    )
    expected = [q2.EQUILIBRIUM[name] for name in ("discriminator_loss", "encoder_loss")]
    assert at_half == pytest.approx(expected)


def test_losses_have_slopes_where_probabilities_round_to_0_or_1_and_norms_to_0():
    extreme, x = tf.constant([[-1e4], [1e4]]), tf.ones((1, 784))
    with tf.GradientTape() as tape:
        tape.watch([extreme, x])
        total = q2.discriminator_loss(extreme, extreme) + q2.encoder_loss(extreme)
        total += q2.reconstruction_loss(x, tf.ones((1, 784)))
    assert np.isfinite(total.numpy())
    for gradient in tape.gradient(total, [extreme, x]):
        assert np.isfinite(gradient.numpy()).all()


# Training


def test_step_takes_the_stages_of_the_assignment_in_turn():
    rates = 0.01, 0.3, 1.0
    model, other = (descending(rates) for _ in range(2))
    found = model.train_step((BATCH, BATCH))

    encoder, decoder, judge = other.encoder, other.decoder, other.discriminator
    z = other.sample_prior(64)

    def stage_a():
        difference = BATCH - decoder(encoder(BATCH))
        expected["mse"] = np.mean(np.square(difference))
        return tf.reduce_sum(tf.norm(difference, axis=1))

    def stage_b():
        on_prior, on_codes = tf.sigmoid(judge(z)), tf.sigmoid(judge(encoder(BATCH)))
        return -tf.reduce_mean(tf.math.log(on_prior) + tf.math.log(1 - on_codes))

    def stage_c():
        return tf.reduce_mean(tf.math.log(1 - tf.sigmoid(judge(encoder(BATCH)))))

    expected = {}
    sum_of_norms = descend(rates[0], stage_a, encoder, decoder)
    expected["reconstruction_loss"] = sum_of_norms / 64
    expected["discriminator_loss"] = descend(rates[1], stage_b, judge)
    expected["encoder_loss"] = descend(rates[2], stage_c, encoder)
    assert {k: v.numpy() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    for name in ("encoder", "decoder", "discriminator"):
        pairs = zip(*(getattr(m, name).weights for m in (model, other)), strict=True)
        for one, two in pairs:
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_epochs_means_are_over_images_and_start_anew(monkeypatch):
    monkeypatch.setattr(keras.random, "normal", lambda shape, seed: tf.zeros(shape))
    model, images = build(**POINT), IMAGES[:100]
    model.compile(1e-3, SCHEDULE)
    assert model.jit_compile
    for _ in range(2):  # in batches of 64 and of 36 images
        found = model.evaluate(images, images, 64, verbose=0, return_dict=True)
    difference = images - model(images).numpy()
    on_prior = probability(model.discriminator(np.zeros((1, 8))).numpy())
    on_codes = probability(model.discriminator(model.encoder(images)).numpy())
    encoder_loss = np.log(1 - on_codes).mean()
    assert found == pytest.approx(
        {
            "reconstruction_loss": np.linalg.norm(difference, axis=1).mean(),
            "discriminator_loss": -np.log(on_prior).mean() - encoder_loss,
            "encoder_loss": encoder_loss,
            "mse": np.square(difference).mean(),
        },
        rel=1e-4,
    )


def test_each_stage_has_an_adam_of_the_recipe():
    recipe = q2.DEFAULT
    model = build(**recipe._replace(hidden=(48,))._asdict())
    model.compile(5e-3, SCHEDULE)
    stages = a, b, c = model.optimizers
    assert a is model.optimizer
    assert b is model.discriminator_optimizer
    assert c is model.encoder_optimizer
    encoder = model.encoder.trainable_variables
    trained = encoder + model.decoder.weights, model.discriminator.weights, encoder
    for stage, variables in zip(stages, trained, strict=True):
        assert isinstance(stage, keras.optimizers.Adam)
        assert len(stage.variables) == 1 + 2 * len(variables)  # before any step
    assert [stage.beta_1 for stage in stages] == [recipe.beta_1] * 3
    assert a.weight_decay == recipe.weight_decay
    assert not b.weight_decay
    assert not c.weight_decay
    assert c.epsilon == recipe.epsilon_c
    # An epoch up, four and a half of nine epochs down, and all of them.
    for done, share in ((100, 1), (550, 0.5), (1000, 0)):
        for stage in stages:
            stage.iterations.assign(done)
        rates = [float(stage.learning_rate) for stage in stages]
        expected = [rate * share for rate in (5e-3, recipe.rate_b, recipe.rate_c)]
        assert rates == pytest.approx(expected, rel=1e-3, abs=1e-9)


# Networks


def test_first_coordinates_are_computed_and_the_others_drawn_after_loading_too(
    tmp_path,
):
    encoder = q2.build_encoder(8, SMALL)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    computed = keras.Model(encoder.inputs, encoder.get_layer("informative").output)
    many = np.repeat(IMAGES[:40], 100, axis=0)
    for network in (encoder, loaded):
        codes, again = utils.predict(network, many), utils.predict(network, many)
        np.testing.assert_allclose(codes[:, :3], computed(many), rtol=1e-4, atol=1e-5)
        noise = codes[:, 3:]
        assert np.abs(noise.mean(axis=0)).max() < 0.07
        np.testing.assert_allclose(np.cov(noise, rowvar=False), np.eye(5), atol=0.1)
        assert kstest(noise.ravel(), "norm").statistic < 0.012
        assert np.isclose(noise, again[:, 3:]).mean() < 0.01


@pytest.mark.parametrize(
    ("code_dim", "informative", "expected"), [(8, 3, 3), (8, None, 8), (2, 3, 2)]
)
def test_control_and_small_codes_have_no_noise(code_dim, informative, expected):
    recipe = SMALL._replace(informative=informative)
    model = q2.AdversarialAutoencoder(code_dim, recipe)
    assert model.informative == expected
    codes, again = (model.encoder(IMAGES[:9]).numpy() for _ in range(2))
    assert codes.shape == (9, code_dim)
    assert codes[:, :expected].std(axis=0).min() > 0
    assert (codes == again).all(axis=0).sum() == expected
    assert model(IMAGES[:9]).shape == (9, 784)


def test_true_draws_are_standard_normal_and_not_the_encoders_noise():
    draws = build().sample_prior(20_000).numpy()
    assert draws.shape == (20_000, 8)
    assert np.abs(draws.mean(axis=0)).max() < 0.04
    np.testing.assert_allclose(np.cov(draws, rowvar=False), np.eye(8), atol=0.05)

    model = build(informative=1)
    noise = np.ravel(model.encoder(tf.constant(IMAGES[:1000]))[:, 1:])
    draws = np.ravel(model.sample_prior(875))
    assert abs(np.corrcoef(noise, draws)[0, 1]) < 0.06


@pytest.mark.parametrize("skips", [False, True])
def test_skips_add_each_hidden_layer_to_what_it_is_given(skips):
    z = RNG.standard_normal((5, 8)).astype(np.float32)
    recipe = q2.DEFAULT._replace(hidden=(6, 6, 6), decoder_skips=skips)
    decoder = q2.build_decoder(8, recipe)
    decoder.set_weights([RNG.normal(0, 0.5, w.shape) for w in decoder.get_weights()])
    arrays = decoder.get_weights()
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))
    x = z
    for number, (kernel, bias) in enumerate(layers[:-1]):
        y = x @ kernel + bias
        x = y * norm.cdf(y) + (x if skips and number else 0)
    expected = probability(x @ layers[-1][0] + layers[-1][1])
    np.testing.assert_allclose(decoder(z), expected, rtol=1e-3)


def test_augmentation_keeps_a_digits_place_and_is_its_own_for_each():
    square = np.zeros((28, 28), np.float32)
    square[9:19, 11:17] = 1
    images = np.tile(square.ravel(), (200, 1))
    changed, again = (q2.augment(images, np.random.default_rng(0)) for _ in range(2))
    np.testing.assert_array_equal(changed, again)
    assert changed.shape == images.shape
    assert changed.dtype == np.float32
    assert 0 <= changed.min() <= changed.max() <= 1.001
    assert len(np.unique(changed, axis=0)) == 200
    assert 0.7 < changed.sum(axis=1).min() / 60 < changed.sum(axis=1).max() / 60 < 1.4
    places = changed @ np.mgrid[:28, :28].reshape(2, 784).T
    moves = places / changed.sum(axis=1, keepdims=True) - 13.5
    assert 1.3 < np.abs(moves).max() < 1.75  # 1.5, and more where it grows
    np.testing.assert_allclose(moves.mean(axis=0), 0, atol=0.2)


# Measures


def test_classifier_is_trained_once_for_each_data(tmp_path, monkeypatch):
    def train(split):
        return keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])

    monkeypatch.setattr(metrics, "train_digit_classifier", train)
    given = Split(IMAGES[:9], np.arange(9))
    first, again, other = (
        q2.digit_classifier(tmp_path, split).get_weights()[0]
        for split in (given, given, given._replace(labels=np.zeros(9, int)))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_noise_is_what_differs_from_pass_to_pass(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "q2_prior_match", lambda *given: drawn.extend(given))
    encoder, test = q2.build_encoder(8, SMALL), Split(IMAGES[:300], None)
    codes = utils.predict(encoder, test.images)
    q2.draw_prior_match("x.png", encoder, codes, 3, test)
    *_, noise, spectra = drawn
    np.testing.assert_allclose(noise, [0] * 3 + [1] * 5, atol=0.06)
    own, of_draws = spectra.values()
    np.testing.assert_allclose(own, metrics.covariance_eigenvalues(codes[:, :3]))
    np.testing.assert_allclose(of_draws, [1, 1, 1], atol=0.3)


def test_errors_are_the_test_images_and_what_takes_labels_is_none_without(
    monkeypatch, few_measurements
):
    monkeypatch.setattr(metrics, "compare_with_prior", lambda *given: {})
    train, test = Split(IMAGES[:80], None), Split(IMAGES[80:120], None)
    model = build()
    encoded = q2.encode(model.encoder, model.decoder, train, test, seed=0)
    found = q2.evaluate(encoded, 3, None, train, test)
    errors = test.images - encoded.reconstructions
    assert found["test_mse"] == pytest.approx(np.mean(errors**2), rel=1e-4)
    norms = np.linalg.norm(errors, axis=1)
    assert found["test_reconstruction_loss"] == pytest.approx(norms.mean(), rel=1e-4)
    for key in ("frechet_distance", "knn_accuracy", "logistic_accuracy", "knn_bound"):
        assert found[key] is None
    assert set(found["sample_quality"].values()) == {None}
