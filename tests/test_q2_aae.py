"""Question 2's losses, stages and networks, against plain computations."""

import utils

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_digits

import q2_aae as q2
from metrics import fit_pca

RNG = np.random.default_rng(0)
IMAGES = tiny_digits()[0].reshape(-1, 784)


def probability(logits):
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_losses_are_the_assignments_formulas():
    prior, codes = (RNG.normal(0, 2, (50, 1)).astype(np.float32) for _ in range(2))
    d_prior, d_codes = probability(prior), probability(codes)
    l_d = -np.mean(np.log(d_prior)) - np.mean(np.log(1 - d_codes))
    assert q2.discriminator_loss(prior, codes).numpy() == pytest.approx(l_d, rel=1e-5)
    l_enc = np.mean(np.log(1 - d_codes))
    assert q2.encoder_loss(codes).numpy() == pytest.approx(l_enc, rel=1e-5)
    other = -np.mean(np.log(d_codes))
    found = q2.encoder_loss(codes, "non-saturating").numpy()
    assert found == pytest.approx(other, rel=1e-5)
    slopes = RNG.normal(size=(6, 8)).astype(np.float32)
    r1 = np.mean([sum(slope**2) for slope in slopes]) / 2
    assert q2.slope_penalty(slopes).numpy() == pytest.approx(r1, rel=1e-5)

    x, restored = (RNG.random((5, 784), np.float32) for _ in range(2))
    norms = [np.sqrt(sum((a - b) ** 2)) for a, b in zip(x, restored, strict=True)]
    found = tf.reduce_sum(q2.reconstruction_loss(x, restored)).numpy()
    assert found == pytest.approx(sum(norms), rel=1e-5)


def test_equilibrium_lines_are_the_losses_at_one_half():
    draw = tf.zeros((4, 1))
    for kind in ("saturating", "non-saturating"):
        assert q2.encoder_loss(draw, kind).numpy() == pytest.approx(
            q2.EQUILIBRIUM[kind]
        )
    found = q2.discriminator_loss(draw, draw).numpy()
    assert found == pytest.approx(q2.EQUILIBRIUM["discriminator_loss"])


def test_losses_do_not_overflow_where_probabilities_round_to_0_or_1():
    extreme = tf.constant([[-1e4], [1e4]])
    with tf.GradientTape() as tape:
        tape.watch(extreme)
        total = q2.discriminator_loss(extreme, extreme) + q2.encoder_loss(extreme)
        total += q2.encoder_loss(extreme, "non-saturating")
    assert np.isfinite(total.numpy())
    assert np.isfinite(tape.gradient(total, extreme).numpy()).all()


def test_norm_has_a_finite_gradient_at_a_perfect_reconstruction():
    x = tf.ones((1, 784))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = q2.reconstruction_loss(x, tf.ones((1, 784)))
    assert np.isfinite(tape.gradient(loss, x).numpy()).all()


def test_gelu_and_its_slope_are_keras_s():
    x = tf.linspace(-6.0, 6.0, 1001)
    found = []
    for function in (q2.gelu, lambda x: keras.activations.gelu(x, approximate=False)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        found += [y.numpy(), tape.gradient(y, x).numpy()]
    np.testing.assert_allclose(found[:2], found[2:], atol=2e-6)


def networks(kind):
    keras.utils.set_random_seed(0)
    hidden = q2.HIDDEN[:2]  # is tried sooner
    encoder = q2.build_encoder(8, kind, hidden=hidden)
    return encoder, q2.build_decoder(8, hidden), q2.build_discriminator(8)


def build_literal(rates=(1e-3, 1e-3)):
    parts = *networks("deterministic"), IMAGES
    model = q2.LiteralAdversarialAutoencoder(*parts, "saturating")
    model.compile(*rates, steps=100)
    return model


def build(kind="gaussian", learning_rate=1e-3, **recipe):
    recipe = q2.Recipe(**recipe)
    model = q2.AdversarialAutoencoder(*networks(kind), IMAGES, recipe=recipe)
    model.compile(learning_rate, epochs=10, steps=100)
    return model


@pytest.mark.parametrize(
    ("rates", "moving"),
    [
        ((1e-3, 0.0), {"encoder", "decoder"}),
        ((0.0, 1e-3), {"encoder", "discriminator"}),
    ],
)
def test_each_stage_trains_its_own_networks(rates, moving):
    model = build_literal(rates=rates)
    networks = {
        name: getattr(model, name) for name in ("encoder", "decoder", "discriminator")
    }
    before = {name: network.get_weights() for name, network in networks.items()}
    model.train_step(tf.constant(RNG.integers(0, 256, (16, 784), np.uint8)))
    for name, network in networks.items():
        moved = any(
            not np.array_equal(a, b)
            for a, b in zip(before[name], network.get_weights(), strict=True)
        )
        assert moved == (name in moving), name


@pytest.fixture(
    params=[lambda: build("deterministic", discriminator_steps=2), build_literal]
)
def build_without_chance(request):
    prior = tf.constant(RNG.normal(size=(64, 8)).astype(np.float32))

    def build_one():
        model = request.param()
        model.training_steps = 4  # so that (b) comes to its second step
        model.draw_prior = lambda _: prior  # XLA has random numbers of its own
        model.draw_images = lambda count: tf.constant(IMAGES[-count:])
        return model

    return build_one


def sums(model):
    return [np.abs(values).sum() for values in model.get_weights()]


def test_compiled_step_computes_what_the_plain_step_computes(build_without_chance):
    batches = np.split(IMAGES[:256], 4)
    seen = {}
    for compiled in (False, True):
        model = build_without_chance()
        assert model.jit_compile
        step = tf.function(model.train_step, jit_compile=compiled)
        losses = [step(tf.constant(batch)) for batch in batches]
        seen[compiled] = [list(each.values()) for each in losses]
        seen[compiled].append(sums(model))
    for plain, fast in zip(seen[False], seen[True], strict=True):
        np.testing.assert_allclose(plain, fast, rtol=1e-3)


def test_steps_in_one_launch_are_steps_one_by_one(build_without_chance):
    batches = tf.data.Dataset.from_tensor_slices(np.stack(np.split(IMAGES[:256], 4)))
    found = []
    for steps in (1, 4):
        model = build_without_chance()
        model.steps_per_execution = steps
        model.make_train_function()
        iterator = iter(model.stacked(batches))
        for _ in range(4 // steps):
            losses = model.train_function(iterator)
        assert losses.keys() == model.trackers.keys()
        assert int(model.optimizer.iterations) == 4
        found.append([*losses.values(), *sums(model)])
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_stages_learn_what_they_minimise():
    images = tf.constant(IMAGES[:64])
    x = utils.unit_floats(images)

    model = build_literal(rates=(1e-3, 0.0))
    norm = tf.reduce_mean(q2.reconstruction_loss(x, model(x))).numpy()
    for _ in range(10):
        model.train_step(images)
    after = tf.reduce_mean(q2.reconstruction_loss(x, model(x))).numpy()
    assert after < 0.9 * norm

    # With the encoder at rest, the discriminator learns to tell its codes apart.
    model = build_literal(rates=(0.0, 1e-3))
    model.encoder_optimizer.learning_rate = 0.0
    for _ in range(40):
        model.train_step(images)
    prior, codes = model.draw_prior(64), model.encoder(x)
    l_d = q2.discriminator_loss(model.discriminator(prior), model.discriminator(codes))
    assert l_d.numpy() < 0.7

    # With the discriminator at rest, the encoder learns to be taken for the prior.
    before = tf.reduce_mean(model.discriminator(model.encoder(x))).numpy()
    model.encoder_optimizer.learning_rate = 1e-3
    model.discriminator_optimizer.learning_rate = 0.0
    for _ in range(20):
        model.train_step(images)
    after = tf.reduce_mean(model.discriminator(model.encoder(x))).numpy()
    assert after > before + 1


def test_encoder_and_decoder_follow_the_weighted_sum_of_two_stages():
    images = tf.constant(RNG.integers(0, 256, (16, 784), np.uint8))
    x = utils.unit_floats(images)
    model = build("deterministic", learning_rate=0.0)
    model.train_step(images)  # moves the discriminator alone
    variables = model.autoencoder_variables
    with tf.GradientTape() as tape:
        codes = model.encoder(x)
        error = tf.reduce_mean(tf.norm(x - model.decoder(codes), axis=1))
        logits = model.discriminator(codes)
        loss = error - q2.ADVERSARIAL_WEIGHT * tf.reduce_mean(
            tf.math.log_sigmoid(logits)
        )
    expected = tape.gradient(loss, variables)

    found = []
    model.optimizer.apply = lambda gradients, _: found.extend(gradients)
    model.train_discriminator = lambda _: 0.0
    model.train_step(images)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_discriminator_takes_more_steps_as_training_goes_on():
    model = build("deterministic", learning_rate=0.0, discriminator_steps=3)
    step = tf.function(model.train_step)
    drawn, images = [], model.draw_images
    model.draw_images = lambda count: drawn.append(count) or images(count)
    taken = []
    for done in (0, 333, 334, 667, 999, 2000):
        model.optimizer.iterations.assign(done)
        before = int(model.discriminator_optimizer.iterations.numpy())
        step(tf.constant(IMAGES[:16]))
        taken.append(int(model.discriminator_optimizer.iterations.numpy()) - before)
    assert taken == [1, 1, 2, 3, 3, 3]
    assert drawn == [16]  # traced once, for as many images as the batch has


def test_images_are_drawn_from_all_of_the_training_images():
    model = build()
    drawn = model.draw_images(20 * len(IMAGES)).numpy()
    assert drawn.dtype == np.uint8
    assert len(np.unique(drawn, axis=0)) == len(np.unique(IMAGES, axis=0))


def test_discriminator_learns_against_its_slope():
    images = tf.constant(RNG.integers(0, 256, (64, 784), np.uint8))
    slopes = {}
    for weight in (0.0, 10.0):
        recipe = {"gradient_penalty": weight, "discriminator_steps": 1}
        model = build("deterministic", learning_rate=0.0, **recipe)
        step = tf.function(model.train_step)
        for _ in range(40):
            found = step(images)
        with tf.GradientTape() as tape:
            prior = model.draw_prior(500)
            tape.watch(prior)
            logits = model.discriminator(prior)
        slopes[weight] = q2.slope_penalty(tape.gradient(logits, prior)).numpy()
        if not weight:
            assert found["discriminator_loss"] < 1.0
    assert slopes[10.0] < 0.2 * slopes[0.0]


def test_encoder_starts_at_a_linear_code_that_follows_the_prior():
    encoder = q2.build_encoder(30)
    pca = fit_pca(IMAGES, 30)
    q2.start_at_pca(encoder, pca, dimensions=12, noise=0.4)
    means, deviations = q2.posterior(encoder, IMAGES)
    scores = pca.transform(IMAGES / 255) / np.sqrt(pca.explained_variance_)
    np.testing.assert_allclose(means[:, :12], 0.84**0.5 * scores[:, :12], atol=1e-3)
    np.testing.assert_array_equal(means[:, 12:], 0)
    np.testing.assert_allclose(deviations[:, :12], 0.4, rtol=1e-5)
    np.testing.assert_allclose(deviations[:, 12:], 1, rtol=1e-5)
    covariance = np.cov(utils.predict(encoder, IMAGES), rowvar=False)
    np.testing.assert_allclose(covariance, np.eye(30), atol=0.15)


def test_signal_and_noise_keep_to_their_coordinates(tmp_path):
    encoder = q2.build_encoder(8)
    q2.start_at_pca(encoder, fit_pca(IMAGES, 8), dimensions=3)
    for asked in (-3.0, 3.0):
        layer = encoder.get_layer("log_variance")
        kernel, bias = layer.get_weights()
        layer.set_weights([kernel, 0 * bias + asked])
        encoder.save(tmp_path / "encoder.keras")
        encoder = keras.saving.load_model(tmp_path / "encoder.keras")
        _, deviations = q2.posterior(encoder, IMAGES[:5])
        first, others = deviations[:, :3], deviations[:, 3:]
        assert first.max() <= q2.SIGNAL_NOISE < q2.OTHER_NOISE <= others.min()
        # Where the bound is far they are what is asked for.
        free = others if asked > 0 else first
        np.testing.assert_allclose(free, np.exp(asked / 2), rtol=0.15)
        layer = encoder.get_layer("log_variance")
        with tf.GradientTape() as tape:
            log_variances = layer(tf.zeros((1, q2.HIDDEN[-1])))
        way_back = tape.gradient(log_variances, layer.bias)
        assert (way_back.numpy() > 1e-3).all()


def test_the_discriminators_rate_stays_unless_it_is_to_decay():
    found = {}
    for decays in (False, True):
        model = build(discriminator_rate_decays=decays)
        model.compile(1e-3, epochs=3, steps=2)
        for optimizer in (model.optimizer, model.discriminator_optimizer):
            optimizer.iterations.assign(4)  # an epoch up, and half of two epochs down
        assert model.optimizer.learning_rate.numpy() == pytest.approx(5e-4)
        found[decays] = model.discriminator_optimizer.learning_rate.numpy()
    rate = q2.DISCRIMINATOR_LEARNING_RATE
    assert found == {False: pytest.approx(rate), True: pytest.approx(rate / 2)}


def test_encoder_starts_finite_where_images_have_few_dimensions():
    base = RNG.integers(0, 100, (3, 784))
    images = (RNG.random((200, 3)) @ base).astype(np.uint8)
    images[:, 300:] = 7
    encoder = q2.build_encoder(30)
    q2.start_at_pca(encoder, fit_pca(images, 30), 12)
    codes = utils.predict(encoder, images)
    assert np.isfinite(codes).all()
    assert 0.8 < codes.std(axis=0).min() <= codes.std(axis=0).max() < 1.2


def test_posterior_has_the_noise_that_codes_have():
    images = RNG.integers(0, 256, (2, 784), np.uint8)
    encoder = q2.build_encoder(8)
    kernel, bias = encoder.get_layer("log_variance").get_weights()
    encoder.get_layer("log_variance").set_weights([kernel, bias + 2 * np.log(0.3)])
    means, deviations = q2.posterior(encoder, images)
    np.testing.assert_allclose(deviations, 0.3, rtol=1e-5)
    codes = utils.predict(encoder, np.repeat(images[:1], 4000, axis=0))
    np.testing.assert_allclose(codes.mean(axis=0), means[0], atol=0.03)
    np.testing.assert_allclose(codes.std(axis=0), 0.3, atol=0.02)
    point = q2.build_encoder(8, "deterministic")
    means, deviations = q2.posterior(point, images)
    np.testing.assert_allclose(means, utils.predict(point, images), atol=1e-6)
    np.testing.assert_array_equal(deviations, 0)


def fresh_accuracy(means, deviations, codes, steps):
    with q2.fresh_discriminator(means, deviations, steps) as judge:
        pass
    return q2.discriminator_accuracy(judge, codes)


def test_fresh_discriminator_tells_codes_off_the_prior_from_codes_on_it():
    means, deviations = np.zeros((512, 8), np.float32), np.ones((512, 8), np.float32)
    on = RNG.standard_normal((2000, 8)).astype(np.float32)
    accuracy = fresh_accuracy(means, deviations, on, 30)
    assert accuracy == pytest.approx(0.5, abs=0.04)
    assert fresh_accuracy(means + 3, deviations, on + 3, 60) > 0.95
    assert fresh_accuracy(means, 0.3 * deviations, 0.3 * on, 60) > 0.9


def test_what_fails_beside_a_fresh_discriminator_ends_its_training(monkeypatch):
    pairs = []

    class Kept(q2.Pair):
        def __init__(self, discriminator):
            super().__init__(discriminator)
            pairs.append(self)

    monkeypatch.setattr(q2, "Pair", Kept)
    ones, steps = np.ones((512, 8), np.float32), 32_000
    with (
        pytest.raises(KeyboardInterrupt),
        q2.fresh_discriminator(ones, ones, steps),
    ):
        raise KeyboardInterrupt
    assert pairs[0].optimizer.iterations.numpy() < steps / 2


def test_gaussian_encoder_starts_at_variance_one_and_draws_anew():
    encoder = q2.build_encoder(8, "gaussian")
    x = np.repeat(RNG.random((1, 784), np.float32), 4000, axis=0)
    codes = encoder(x).numpy()
    assert 0.9 < codes.std(axis=0).min() <= codes.std(axis=0).max() < 1.1
    assert not np.array_equal(codes, encoder(x).numpy())
    point = q2.build_encoder(8, "deterministic")
    np.testing.assert_array_equal(point(x), point(x))


def test_prior_draws_are_standard_normal():
    draws = build_literal().draw_prior(20_000).numpy()
    assert draws.shape == (20_000, 8)
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01


def test_skips_add_each_hidden_layer_to_what_it_is_given():
    z = RNG.standard_normal((5, 8)).astype(np.float32)
    first, *others, last = range(4)
    for skips in (False, True):
        decoder = q2.build_decoder(8, (6, 6, 6), skips)
        kernels = [layer.kernel.numpy() for layer in decoder.layers[1:]]
        x = tf.nn.gelu(z @ kernels[first]).numpy()
        for number in others:
            x = tf.nn.gelu(x @ kernels[number]).numpy() + (x if skips else 0)
        expected = tf.sigmoid(x @ kernels[last])
        np.testing.assert_allclose(decoder(z), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "deterministic"])
def test_networks_are_perceptrons_that_keep_their_contract_when_saved(tmp_path, kind):
    x = RNG.random((3, 784), np.float32)
    z = RNG.standard_normal((3, 100)).astype(np.float32)
    for name, network, given, shape in (
        ("encoder", q2.build_encoder(kind=kind), x, (3, 100)),
        ("decoder", q2.build_decoder(), z, (3, 784)),
        ("discriminator", q2.build_discriminator(), z, (3, 1)),
    ):
        widths = [w.shape[1] for w in network.weights if w.path.endswith("kernel")]
        expected = q2.DISCRIMINATOR_HIDDEN if name == "discriminator" else q2.HIDDEN
        assert tuple(widths[: len(expected)]) == expected
        network.save(tmp_path / f"{name}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras")
        found = loaded(given).numpy()
        assert found.shape == shape
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, network(given), rtol=1e-5, atol=1e-6)


def test_great_arc_keeps_to_the_shell():
    start, end = RNG.standard_normal((2, 100))
    walk = q2.great_arc(start, end, 9)
    np.testing.assert_allclose(walk[[0, -1]], [start, end])
    lengths = np.linalg.norm(walk, axis=1)
    ends = np.linalg.norm([start, end], axis=1)
    np.testing.assert_allclose(lengths, np.linspace(*ends, 9))
    straight = np.linalg.norm((start + end) / 2)
    assert lengths[4] > 1.2 * straight
    units = walk / lengths[:, np.newaxis]
    turns = np.arccos(np.sum(units[1:] * units[:-1], axis=1))
    np.testing.assert_allclose(turns, turns[0])
    np.testing.assert_allclose(q2.great_arc(start, start, 3), [start] * 3)
