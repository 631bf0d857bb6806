"""The measures, against closed forms and naive computations."""

import utils

import keras
import numpy as np
import pytest
from conftest import tiny_digits
from scipy.stats import chi2
from sklearn.manifold import trustworthiness

import metrics
from read_MNIST_M import Split

RNG = np.random.default_rng(0)


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


def vote_of_five(train, cells, test):
    """Return the cells that five nearest neighbours name, computed naively."""
    nearest = np.argsort(((test[:, np.newaxis] - train) ** 2).sum(axis=2))[:, :5]
    return np.array([np.bincount(votes).argmax() for votes in cells[nearest]])


def test_knn_bound_is_that_of_the_nearest_vertex_of_a_simplex():
    train, test = RNG.standard_normal((2, 1500, 10))
    # Ten vertices at equal distances, about the origin, in any orientation.
    turn, _ = np.linalg.qr(RNG.standard_normal((10, 10)))
    vertices = (np.eye(10) - 0.1) @ turn
    cells = [(codes @ vertices.T).argmax(axis=1) for codes in (train, test)]
    expected = (vote_of_five(train, cells[0], test) == cells[1]).mean()
    bound = metrics.knn_bound(1500, 1500, 10)
    assert bound == pytest.approx(expected, abs=0.05)  # 2.8 standard errors
    # Neighbours are closer in fewer dimensions.
    assert metrics.knn_bound(1500, 1500, 30) < bound
    assert metrics.knn_bound(1500, 1500, 9) is None


def test_codes_are_compared_with_as_many_principal_components():
    digits, labels = tiny_digits()
    images = utils.unit_floats(digits[:400].reshape(-1, 784))
    train, test = (
        Split(images[p], labels[:400][p]) for p in np.split(np.arange(400), [300])
    )
    codes = RNG.normal(size=(400, 3)).astype(np.float32)
    codes[:, 1] += 10 * labels[:400]  # tells the digit, but not by a linear border
    given = train, test, codes[:300], codes[300:]
    found = metrics.dimension_reduction(*given)
    pca = metrics.fit_pca(train.images, 3)
    error = metrics.pca_reconstruction_mse(pca, test.images)
    assert found["pca_test_mse"] == pytest.approx(error)
    accuracy = found["knn_accuracy"]
    assert accuracy.keys() == {"code", "pca", "pixels"}
    assert accuracy["code"] > 0.95 > accuracy["pca"] > 0.3
    assert found["logistic_accuracy"].keys() == {"code", "pca"}
    assert found["logistic_accuracy"]["code"] > 0.5
    spaces = {"code": codes[300:], "pca": pca.transform(test.images)}
    assert found["trustworthiness"] == pytest.approx(
        {name: trustworthiness(test.images, x) for name, x in spaces.items()}
    )
    bare = metrics.dimension_reduction(Split(train.images, None), *given[1:])
    labelled = "knn_accuracy", "logistic_accuracy", "knn_bound"
    assert bare == found | dict.fromkeys(labelled)
    one = metrics.logistic_accuracy(codes, labels[:400] * 0, codes, labels[:400])
    assert one == np.mean(labels[:400] == 0)  # no border to learn


def test_map_keeps_neighbours_together():
    labels = np.repeat(np.arange(3), 40)
    codes = 20 * np.eye(3, 6)[labels] + RNG.standard_normal((120, 6))
    points, trusted = metrics.tsne_map(codes.astype(np.float32), seed=0)
    assert points.shape == (120, 2)
    assert 0.9 < trusted <= 1
    assert metrics.knn_accuracy(points, labels, points, labels) == 1


# Codes against the prior


MEASURES = {"mmd", "covariance_eigenvalue_min", "covariance_eigenvalue_max"}


@pytest.mark.parametrize(("count", "dimensions"), [(150, 40), (400, 10), (300, 1)])
def test_departures_are_worse_than_true_draws_and_true_draws_are_as_bad_as_any(
    count, dimensions
):
    draws = RNG.standard_normal((count, dimensions))
    shrunken, spread = {"mmd": 0, "min": 0, "max": 1}, {"mmd": 0, "min": 1, "max": 0}
    departures = [(draws + 0.7, {"mmd": 0}), (draws / 2, shrunken), (2 * draws, spread)]
    if dimensions > 1:  # a sheet whose marginals look right
        sheet = np.repeat(draws[:, : dimensions // 2], 2, axis=1)
        departures.append((sheet, dict.fromkeys(shrunken, 0)))
    for codes, expected in departures:
        match = metrics.prior_match(codes)
        assert match.keys() == MEASURES | {"draws", "as_bad"}
        as_bad = {name[-3:]: share for name, share in match["as_bad"].items()}
        assert as_bad.items() >= expected.items()

    sets = RNG.standard_normal((40, count, dimensions))
    matches = [metrics.prior_match(each) for each in sets]
    for name in MEASURES:
        shares = [match["as_bad"][name] for match in matches]
        assert 0 <= min(shares) < 0.2 < 0.8 < max(shares) <= 1
        assert 0.3 < np.mean(shares) < 0.7
        low, high = match["draws"][name]
        assert np.mean([low <= match[name] <= high for match in matches]) > 0.9


def test_mmd_of_a_single_point_in_closed_form(few_measurements):
    squared = chi2(10)  # length of a draw in ten dimensions
    between_draws = squared.expect(lambda u: 20 / (20 + 2 * u))
    expected = 1 + between_draws - 2 * squared.expect(lambda u: 20 / (20 + u))
    match = metrics.prior_match(np.zeros((2000, 10), np.float32))
    assert expected > 0.1
    assert match["mmd"] == pytest.approx(expected, abs=0.01)


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


def test_match_is_over_all_coordinates_and_over_informative_ones(
    monkeypatch, few_measurements
):
    monkeypatch.setattr(metrics, "FRESH_LEARNING_RATE", 0.02)
    monkeypatch.setattr(metrics, "FRESH_STEPS", 40)
    monkeypatch.setattr(metrics, "FRESH_ON_DRAWS", 2)
    judges, shift = [], np.array([1.5, 1.5, 0, 0, 0])
    train, test = RNG.standard_normal((2, 1000, 5)) + shift

    def judge(dimensions):
        layers = keras.layers.Dense(32, "relu"), keras.layers.Dense(1)
        judges.append(keras.Sequential([keras.Input((dimensions,)), *layers]))
        return judges[-1]

    found = metrics.compare_with_prior(judge, train, test, 2)
    assert sorted(judge.input_shape[1] for judge in judges) == [2, 2, 2, 5]
    assert {int(judge.optimizer.iterations) for judge in judges} == {40}
    whole, informative = found["prior_match"], found["informative_match"]
    for match, codes in ((whole, test), (informative, test[:, :2])):
        assert match.items() >= metrics.prior_match(codes).items()
        assert 0.75 < match["fresh_discriminator"] < 0.95  # at best 0.86
    on_draws = found["fresh_discriminator_on_draws"]
    assert len(set(on_draws)) == 2
    assert all(0.45 < accuracy < 0.55 for accuracy in on_draws)


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
