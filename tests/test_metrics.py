"""The measures, against closed forms and naive computations."""

import utils

import keras
import numpy as np
import pytest
from conftest import tiny_digits
from scipy.stats import expon, kstest

import metrics
from read_MNIST_M import Split

RNG = np.random.default_rng(0)


def test_mean_image_mse_is_the_variance_about_it():
    train, test = RNG.random((2, 20, 784), np.float32)
    expected = np.mean((test.astype(float) - train.mean(axis=0)) ** 2)
    assert metrics.mean_image_mse(train, test) == pytest.approx(expected, rel=1e-5)


def test_pca_restores_what_lies_in_its_subspace():
    coefficients, basis = RNG.random((350, 4)), RNG.random((4, 60)) / 4
    images = (coefficients @ basis).reshape(350, 4, 5, 3).astype(np.float32)
    train, test = images[:300], images[300:]
    few, enough, everything = (
        metrics.pca_reconstruction_mse(metrics.fit_pca(train, n), test)
        for n in (2, 4, 100)
    )
    assert 1e-4 < few < metrics.mean_image_mse(train, test)
    assert max(enough, everything) < 1e-9


def test_knn_accuracy_counts_right_majorities_in_each_space():
    train = np.array([[0], [0.1], [0.2], [9], [9.1]], np.float32)
    labels, right = np.array([3, 3, 4, 5, 5]), np.array([3, 5, 4])
    test = np.array([[0.05], [9.05], [0.3]], np.float32)
    turned = [codes.reshape(-1, 1, 1, 1) for codes in (-train, test)]
    spaces = {"codes": (train, test), "images": turned}
    found = metrics.knn_accuracy(spaces, labels, right, 3)
    assert found == pytest.approx({"codes": 2 / 3, "images": 1 / 3})


def test_knn_accuracy_looks_up_the_same_few_every_time(monkeypatch):
    monkeypatch.setattr(metrics, "LOOKED_UP", 40)
    train, labels = np.arange(3, dtype=np.float32)[:, np.newaxis], np.arange(3)
    test = RNG.permutation(np.repeat(train, 100, axis=0))
    wrong = np.where(RNG.random(300) < 0.5, test[:, 0], 0).astype(int)
    spaces = {name: (train, test) for name in "ab"}
    found = metrics.knn_accuracy(spaces, labels, wrong, 1)
    assert found["a"] == found["b"]
    assert (40 * found["a"]) % 1 == pytest.approx(0, abs=1e-6)
    assert 0 < found["a"] < 1


@pytest.mark.parametrize("few", [0, 2])
def test_codes_are_compared_with_as_many_principal_components(few):
    digits, labels = tiny_digits()
    images = utils.unit_floats(digits[:400].reshape(-1, 784))
    train, test = (
        Split(images[:300], labels[:300]),
        Split(images[300:], labels[300:400]),
    )
    means = RNG.normal(size=(400, 5))
    means[:, 3] += 10 * labels[:400]  # tells the digit
    signal = np.isin(np.arange(5), [3, 4][:few])
    given = train, test, means[:300], means[300:], signal
    found = metrics.dimension_reduction(*given)
    errors = {
        str(n): metrics.pca_reconstruction_mse(
            metrics.fit_pca(train.images, n), test[0]
        )
        for n in (5, few)
        if n
    }
    assert found["pca_test_mse"] == pytest.approx(errors)
    accuracy = found["knn_accuracy"]
    expected = {"pixels", "code", "pca_code"}
    assert accuracy.keys() == expected | ({"signal", "pca_signal"} if few else set())
    assert accuracy["code"] > 0.9
    assert accuracy.get("signal", 1) > 0.9 > accuracy.get("pca_signal", 0)
    bare = metrics.dimension_reduction(Split(train[0], None), *given[1:])
    assert bare == found | {"knn_accuracy": None}
    trust = found["trustworthiness"]
    assert trust.keys() == accuracy.keys() - {"pixels"}
    assert trust["pca_code"] > trust["code"] + 0.02


def test_map_keeps_neighbours_together():
    labels = np.repeat(np.arange(3), 40)
    codes = 20 * np.eye(3, 6)[labels] + RNG.standard_normal((120, 6))
    points, trusted = metrics.tsne_map(codes.astype(np.float32), seed=0)
    assert points.shape == (120, 2)
    assert 0.9 < trusted <= 1
    found = metrics.knn_accuracy({"map": (points, points)}, labels, labels)
    assert found["map"] == 1


# Codes against the prior: `posterior` is tested with the encoder, in test_q2_aae.py.


def test_signal_is_where_means_vary_more_than_the_noise():
    means = RNG.normal(0, [2.0, 0.1, 0.5], (500, 3))
    deviations = np.tile([0.5, 1.0, 0.4], (500, 1))
    found = metrics.signal_coordinates(means, deviations)
    assert found.tolist() == [True, False, True]


def test_prior_match_accepts_draws_from_the_prior():
    match = metrics.prior_match(RNG.standard_normal((1000, 20)))
    assert abs(match["mmd"]) < 5e-4
    assert match["mean_abs_mean"] < 0.05
    assert 0.9 < match["std_min"] <= match["std_max"] < 1.1
    assert match["covariance_eigenvalue_min"] > 0.7
    assert match["covariance_eigenvalue_max"] < 1.4
    draws = match.pop("draws")
    assert draws.keys() == match.keys()
    for key, (least, most) in draws.items():
        slack = most - least
        assert least - slack < match[key] < most + slack


def test_prior_match_sees_codes_on_a_sheet_whose_marginals_look_right():
    plane = RNG.standard_normal((1000, 2)) @ np.repeat(np.eye(2), 10, axis=1)
    match = metrics.prior_match(plane)
    draws = match["draws"]
    assert 0.9 < match["std_min"] <= match["std_max"] < 1.1
    assert match["covariance_eigenvalue_min"] < 1e-6
    assert match["covariance_eigenvalue_max"] > 5
    assert match["mmd"] > 0.01 > 10 * draws["mmd"][1]
    assert draws["covariance_eigenvalue_min"][0] > 0.5


def test_largest_distance_of_a_marginal_is_kolmogorovs_and_smirnovs():
    codes = RNG.standard_normal((300, 3)) * [1, 1.5, 1] + [0, 0, 0.2]
    expected = max(kstest(column, "norm").statistic for column in codes.T)
    assert metrics.prior_match(codes)["ks_max"] == pytest.approx(expected)


@pytest.mark.parametrize(("count", "dimensions"), [(150, 40), (300, 3), (1000, 20)])
def test_spans_of_true_draws_hold_for_any_number_and_dimension(count, dimensions):
    draws = RNG.standard_normal((count, dimensions))
    for codes, follow in ((draws, True), (draws + 0.5, False), (draws / 2, False)):
        match = metrics.prior_match(codes)
        spans = match.pop("draws")
        inside = [
            low - (high - low) / 2 <= match[key] <= high + (high - low) / 2
            for key, (low, high) in spans.items()
        ]
        assert all(inside) == follow


def test_mmd_of_a_single_point_in_closed_form(monkeypatch):
    monkeypatch.setattr(metrics, "NULL_DRAWS", 1)
    squared = expon(scale=2)  # length of a draw in two dimensions; C = 4
    between_draws = squared.expect(lambda u: 4 / (4 + 2 * u))
    expected = 1 + between_draws - 2 * squared.expect(lambda u: 4 / (4 + u))
    match = metrics.prior_match(np.zeros((2000, 2), np.float32))
    assert match["mmd"] == pytest.approx(expected, abs=0.01)


def test_covariance_eigenvalues_come_largest_first():
    codes = RNG.normal(0, [1.0, 3.0, 2.0], (400, 3)) @ RNG.standard_normal((3, 3))
    difference = codes - codes.mean(axis=0)
    expected = np.linalg.svd(difference, compute_uv=False) ** 2 / 399
    np.testing.assert_allclose(metrics.covariance_eigenvalues(codes), expected)
    one = metrics.covariance_eigenvalues(codes[:, :1])
    np.testing.assert_allclose(one, codes[:, :1].var(axis=0, ddof=1))


def test_great_arc_keeps_to_the_shell():
    start, end = RNG.standard_normal((2, 100))
    walk = metrics.great_arc(start, end, 9)
    np.testing.assert_allclose(walk[[0, -1]], [start, end])
    lengths = np.linalg.norm(walk, axis=1)
    ends = np.linalg.norm([start, end], axis=1)
    np.testing.assert_allclose(lengths, np.linspace(*ends, 9))
    units = walk / lengths[:, np.newaxis]
    turns = np.arccos(np.sum(units[1:] * units[:-1], axis=1))
    np.testing.assert_allclose(turns, turns[0])
    assert lengths[4] > 1.2 * np.linalg.norm((start + end) / 2)
    np.testing.assert_allclose(metrics.great_arc(start, start, 3), [start] * 3)
    line = metrics.great_arc(np.array([-1.0]), np.array([2.0]), 4)
    np.testing.assert_allclose(line, [[-1], [0], [1], [2]])


def test_match_is_over_all_coordinates_and_over_those_with_signal(monkeypatch):
    monkeypatch.setattr(metrics, "FRESH_LEARNING_RATE", 0.01)
    keras.utils.set_random_seed(0)
    signal, sizes = np.array([False, True, False, False, True]), []
    deviations = np.where(signal, 0.1, 1.0) * np.ones((1000, 5))
    train, test = 3.0 * signal * RNG.standard_normal((2, 1000, 5))
    codes = (test + deviations * RNG.standard_normal((1000, 5))).astype(np.float32)

    def judge(dimensions):
        sizes.append(dimensions)
        layers = keras.layers.Dense(32, "relu"), keras.layers.Dense(1)
        return keras.Sequential([keras.Input((dimensions,)), *layers])

    found = metrics.match_prior(judge, (train, deviations), codes, signal)
    assert sizes == [5, 2]
    assert found["all"]["std_min"] < 1.2
    assert found["signal"]["std_min"] > 2
    assert 0.7 < found["signal"]["fresh_discriminator"] <= 1

    noise = 0.0 * train, np.ones_like(train)
    draws = RNG.standard_normal((1000, 5)).astype(np.float32)
    found = metrics.match_prior(judge, noise, draws, np.zeros(5, bool))
    assert found["signal"] is None
    assert 0.45 < found["all"]["fresh_discriminator"] < 0.55
    # Whatever ran before, a loaded classifier or one that is trained.
    assert metrics.match_prior(judge, noise, draws, np.zeros(5, bool)) == found


def test_frechet_distance_of_normals_in_closed_form():
    a = RNG.standard_normal((200_000, 3))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # Shift by (1, 2, 2) and scale by 3: 9 + 3 (3 - 1)^2.
    b = 3 * RNG.standard_normal((200_000, 3)) + np.array([1, 2, 2])
    assert metrics.frechet_distance(a, b) == pytest.approx(21, rel=0.02)
    # Where covariances commute: sum over axes of (sigma_a - sigma_b)^2.
    c, d = a[:, :2] * [2, 1], a[::-1, :2] * [1, 2]
    assert metrics.frechet_distance(c, d) == pytest.approx(2, rel=0.03)


def test_coverage_counts_points_within_a_known_points_third_neighbour():
    known = np.array([[0.0], [1], [2], [3], [50], [60], [70], [80]])
    points = np.array([[4.5], [-3.1], [49], [30], [6.5]])
    # The third neighbour of 0 and of 3 is 3 away, that of 50 and of 80 is 30 away.
    assert metrics.coverage(points, known) == pytest.approx(3 / 5)
    found = metrics.coverage(RNG.normal(size=(3000, 2)), RNG.normal(size=(3000, 2)))
    assert 0.97 < found <= 1


def test_sample_quality_tells_digits_from_noise():
    digits, labels = tiny_digits()
    images = utils.unit_floats(digits.reshape(-1, 784))
    train, test = (Split(images[s::3], labels[s::3]) for s in (0, 1))
    train = Split(np.tile(train.images, (2, 1)), np.tile(train.labels, 2))
    generated = {
        "noise": RNG.random(test.images.shape, np.float32),
        "same": test.images,
        "ones": test.images[test.labels == 1],
    }
    classifier = metrics.train_digit_classifier(train)
    found = metrics.sample_quality(classifier, train, test, generated)
    assert found["test_images"]["accuracy"] > 0.5
    for quality in found.values():
        assert sum(quality["digits"]) == pytest.approx(1)
    assert found["ones"]["digits"][1] > 0.5 > found["same"]["digits"][1]
    assert found["same"]["clear"] == found["test_images"]["clear"] > 0
    assert found["same"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert found["same"]["precision"] == found["same"]["recall"] == 1
    assert found["noise"]["precision"] < 0.1
    assert found["ones"]["precision"] == 1 > 0.5 > found["ones"]["recall"]
    floor = found["training_images"]["frechet_distance"]
    assert 0 < 5 * floor < found["noise"]["frechet_distance"]
    bare = metrics.sample_quality(None, Split(images, None), test, generated)
    assert bare == dict.fromkeys(found)


def test_pca_samples_have_the_images_covariance():
    images = (0.5 + 0.05 * RNG.normal(size=(500, 3)) @ RNG.random((3, 784)) / 3).astype(
        np.float32
    )
    samples = metrics.pca_samples(images, 3, 4000)
    assert samples.dtype == np.float32
    before, after = (np.cov(x[:, :40], rowvar=False) for x in (images, samples))
    np.testing.assert_allclose(after, before, atol=0.1 * before.max())
    np.testing.assert_allclose(samples.mean(axis=0), images.mean(axis=0), atol=0.01)
