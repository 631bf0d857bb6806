"""Question 2's losses, stages and networks, against plain computations."""

import math

import utils

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_digits
from scipy.stats import norm

import metrics
import q2_aae as q2

RNG = np.random.default_rng(0)
IMAGES = utils.unit_floats(tiny_digits()[0].reshape(-1, 784))
BATCH = tf.constant(IMAGES[:64])
SMALL = q2.DEFAULT._replace(hidden=(48, 48))


def build(**changes):
    keras.utils.set_random_seed(0)
    return q2.AdversarialAutoencoder(8, SMALL._replace(**changes))


def compiled(rates, kind=keras.optimizers.SGD, **changes):
    """Return a model whose stages have these constant rates."""
    model = build(**changes)
    model.compile(1e-3, epochs=10, steps=100)
    networks = model.encoder, model.decoder, model.discriminator
    encoder, decoder, discriminator = (each.trainable_variables for each in networks)
    optimizers = [kind(rate) for rate in rates]
    trained = encoder + decoder, discriminator, encoder
    for optimizer, variables in zip(optimizers, trained, strict=True):
        optimizer.build(variables)
    model.optimizer, model.discriminator_optimizer, model.encoder_optimizer = optimizers
    return model


def weights(model):
    return {
        name: np.concatenate([np.ravel(w) for w in getattr(model, name).get_weights()])
        for name in ("encoder", "decoder", "discriminator")
    }


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


def test_equilibrium_lines_are_the_losses_at_one_half():
    logits = tf.zeros((4, 1))
    assert {
        "discriminator_loss": q2.discriminator_loss(logits, logits).numpy(),
        "encoder_loss": q2.encoder_loss(logits).numpy(),
    } == pytest.approx(q2.EQUILIBRIUM)


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
    model, other = (compiled(rates, gaussian=False) for _ in range(2))
    found = model.train_step((BATCH, BATCH))

    encoder, decoder, judge = other.encoder, other.decoder, other.discriminator
    z = other.sample_prior(64)

    def descend(rate, loss, *networks):
        variables = [v for network in networks for v in network.trainable_variables]
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(rate * gradient)
        return value.numpy()

    def stage_a():
        return tf.reduce_sum(tf.norm(BATCH - decoder(encoder(BATCH)), axis=1))

    def stage_b():
        on_prior, on_codes = tf.sigmoid(judge(z)), tf.sigmoid(judge(encoder(BATCH)))
        return -tf.reduce_mean(tf.math.log(on_prior) + tf.math.log(1 - on_codes))

    def stage_c():
        return tf.reduce_mean(tf.math.log(1 - tf.sigmoid(judge(encoder(BATCH)))))

    mse = np.mean(np.square(BATCH - decoder(encoder(BATCH))))
    expected = {
        "reconstruction_loss": descend(rates[0], stage_a, encoder, decoder) / 64,
        "discriminator_loss": descend(rates[1], stage_b, judge),
        "encoder_loss": descend(rates[2], stage_c, encoder),
        "mse": mse,
    }
    assert {k: v.numpy() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    for name, values in weights(other).items():
        np.testing.assert_allclose(weights(model)[name], values, rtol=1e-3, atol=1e-5)


def test_stages_learn_what_they_minimise():
    model = compiled((0.0, 0.0, 0.0), keras.optimizers.Adam)
    step = tf.function(model.train_step)
    z = tf.constant(RNG.standard_normal((500, 8)).astype(np.float32))

    def learn(stage, rate):
        stage.learning_rate = rate
        for _ in range(40):
            step((BATCH, BATCH))
        stage.learning_rate = 0.0

    def logits():
        return model.discriminator(model.encoder(BATCH)).numpy()

    # The others at rest, the encoder's codes pass the discriminator for draws.
    before = logits().mean()
    learn(model.encoder_optimizer, 2e-3)
    assert logits().mean() > before + 0.1

    before = q2.reconstruction_loss(BATCH, model(BATCH)).numpy()
    learn(model.optimizer, 1e-3)
    assert q2.reconstruction_loss(BATCH, model(BATCH)).numpy() < 0.8 * before

    learn(model.discriminator_optimizer, 2e-3)
    assert (model.discriminator(z).numpy() > 0).mean() + (logits() < 0).mean() > 1.7


def test_fit_computes_what_the_plain_step_computes(monkeypatch):
    noise = tf.constant(RNG.standard_normal((64, 8)).astype(np.float32))
    # Compiled, TensorFlow has other random numbers.
    monkeypatch.setattr(keras.random, "normal", lambda shape, seed: noise)
    monkeypatch.setattr(q2, "DISCRIMINATOR_HIDDEN", (40,))  # compiles sooner
    images, found = IMAGES[:256], []
    plain, fast = (compiled([1e-3] * 3, keras.optimizers.Adam) for _ in range(2))
    for batch in np.split(images, 4):
        losses = plain.train_step((tf.constant(batch),) * 2)
    assert fast.jit_compile
    fitted = fast.fit(images, images, 64, shuffle=False, verbose=0).history
    assert {k: v.numpy() for k, v in losses.items()} == pytest.approx(
        {name: value for name, (value,) in fitted.items()}, rel=1e-3
    )
    for model in (plain, fast):
        found.append([np.abs(values).sum() for values in weights(model).values()])
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_validation_reports_what_training_reports():
    models = [compiled((0.0, 0.0, 0.0), gaussian=False) for _ in range(2)]
    trained = models[0].train_step((BATCH, BATCH))
    tested = models[1].test_step((BATCH, BATCH))
    assert {k: v.numpy() for k, v in trained.items()} == pytest.approx(
        {k: v.numpy() for k, v in tested.items()}, rel=1e-5
    )


@pytest.mark.parametrize("recipe", [q2.DEFAULT, q2.CONTROL])
def test_each_stage_has_an_adam_of_the_recipe(recipe):
    model = build(**recipe._replace(hidden=(48,))._asdict())
    model.compile(5e-3, epochs=10, steps=100)
    stages = model.optimizer, model.discriminator_optimizer, model.encoder_optimizer
    a, b, c = stages
    assert all(isinstance(stage, keras.optimizers.Adam) for stage in stages)
    assert [stage.beta_1 for stage in stages] == [recipe.momentum] * 3
    assert a.weight_decay == recipe.weight_decay
    assert not b.weight_decay
    assert not c.weight_decay
    assert c.epsilon == recipe.encoder_epsilon
    clips = recipe.clipnorm, None, recipe.encoder_clipnorm
    assert tuple(stage.global_clipnorm for stage in stages) == clips
    # An epoch up, four and a half of nine epochs down, and all of them.
    for done, share in ((100, 1), (550, 0.5), (1000, 0)):
        for stage in stages:
            stage.iterations.assign(done)
        rates = [float(stage.learning_rate) for stage in stages]
        highest = 5e-3, recipe.discriminator_rate, recipe.encoder_rate
        expected = [rate * share for rate in highest]
        assert rates == pytest.approx(expected, rel=1e-3, abs=1e-9)


# Networks


def push_noise(encoder, bias):
    """Give the layer that q(z|x)'s noise comes from this bias, far from its start."""
    layers = [layer for layer in encoder.layers if hasattr(layer, "activation")]
    (layer,) = (e for e in layers if e.activation is keras.activations.sigmoid)
    kernel, _ = layer.get_weights()
    layer.set_weights([kernel, np.full(layer.units, bias)])


def test_noise_keeps_to_its_bounds_and_after_loading_too(tmp_path):
    encoder = q2.build_encoder(8, SMALL._replace(signal_dimensions=3))
    for bias in (-50, 50):
        push_noise(encoder, bias)
        encoder.save(tmp_path / "encoder.keras")
        encoder = keras.saving.load_model(tmp_path / "encoder.keras")
        means, deviations = metrics.posterior(encoder, IMAGES[:5])
        expected = [q2.SIGNAL_NOISE[bias > 0]] * 3 + [q2.OTHER_NOISE[bias > 0]] * 5
        np.testing.assert_allclose(deviations, [expected] * 5, rtol=1e-3)
        assert np.isfinite(utils.predict(encoder, IMAGES[:5])).all()


def test_codes_have_the_posteriors_noise_anew_each_time_or_none():
    encoder = q2.build_encoder(8, SMALL._replace(signal_dimensions=3))
    means, deviations = metrics.posterior(encoder, IMAGES[:1])
    start = math.sqrt(math.prod(q2.SIGNAL_NOISE))
    np.testing.assert_allclose(deviations[0], [start] * 3 + [1] * 5, rtol=1e-3)
    many = np.repeat(IMAGES[:1], 4000, axis=0)
    codes = utils.predict(encoder, many)
    np.testing.assert_allclose(codes.mean(axis=0), means[0], atol=0.06)
    np.testing.assert_allclose(codes.std(axis=0), deviations[0], rtol=0.05)
    assert np.isclose(codes, utils.predict(encoder, many)).mean() < 0.01

    point = q2.build_encoder(8, SMALL._replace(gaussian=False))
    means, deviations = metrics.posterior(point, IMAGES[:5])
    np.testing.assert_allclose(utils.predict(point, IMAGES[:5]), means, atol=1e-6)
    np.testing.assert_array_equal(deviations, 0)


def test_prior_draws_are_standard_normal_and_not_the_encoders_noise():
    model = build()
    draws = model.sample_prior(20_000).numpy()
    assert draws.shape == (20_000, 8)
    assert draws.dtype == np.float32
    assert np.abs(draws.mean(axis=0)).max() < 0.04
    np.testing.assert_allclose(np.cov(draws, rowvar=False), np.eye(8), atol=0.05)

    model, x = build(), tf.constant(IMAGES[:1000])
    means, deviations = metrics.posterior(model.encoder, IMAGES[:1000])
    noise = (model.encoder(x) - means) / deviations
    draws = model.sample_prior(1000)
    assert abs(np.corrcoef(np.ravel(noise), np.ravel(draws))[0, 1]) < 0.06


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


@pytest.mark.parametrize("recipe", [q2.DEFAULT, q2.CONTROL])
def test_networks_are_perceptrons_that_keep_their_contract_when_saved(tmp_path, recipe):
    x, z = IMAGES[:3], RNG.standard_normal((3, 100)).astype(np.float32)
    for name, network, given, shape, hidden in (
        ("encoder", q2.build_encoder(recipe=recipe), x, (3, 100), recipe.hidden),
        ("decoder", q2.build_decoder(recipe=recipe), z, (3, 784), recipe.hidden),
        ("judge", q2.build_discriminator(), z, (3, 1), q2.DISCRIMINATOR_HIDDEN),
    ):
        widths = [w.shape[1] for w in network.weights if w.path.endswith("kernel")]
        assert tuple(widths[: len(hidden)]) == hidden
        network.save(tmp_path / f"{name}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras")
        found = loaded(given).numpy()
        assert found.shape == shape
        assert found.dtype == np.float32
        if name == "encoder":
            kept, before = (metrics.posterior(e, given) for e in (loaded, network))
            np.testing.assert_allclose(kept, before, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(found, network(given), rtol=1e-5, atol=1e-6)
        assert name != "decoder" or 0 <= found.min() <= found.max() <= 1


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
