"""The measures, against closed forms and naive computations."""

import math

import numpy as np
import pytest
from conftest import tiny_digits
from scipy.stats import multivariate_normal

import metrics

RNG = np.random.default_rng(0)


def test_psnr_of_a_known_error():
    assert metrics.psnr_db(0.01) == pytest.approx(20.0)


def test_pca_restores_what_lies_in_its_subspace():
    basis = RNG.random((4, 60))
    low_rank = lambda n: (RNG.random((n, 4)) @ basis * 60).astype(np.uint8)  # noqa: E731
    train, test = low_rank(300), low_rank(50)
    few, enough, everything = (
        metrics.pca_reconstruction_mse(metrics.fit_pca(train, n), test)
        for n in (2, 4, 60)
    )
    assert few > 50 * enough
    assert enough < 1e-4  # truncation to whole grey levels is left over
    assert everything < 1e-8
    mean = train.mean(axis=0) / 255
    assert few < np.square(test / 255 - mean).mean()


def test_knn_accuracy_counts_right_majorities():
    train = np.array([[0], [0.1], [0.2], [9], [9.1]], np.float32)
    labels = np.array([3, 3, 4, 5, 5])
    test = np.array([[0.05], [9.05], [0.3]], np.float32)
    found = metrics.knn_accuracy(train, labels, test, np.array([3, 5, 4]), 3)
    assert found == pytest.approx(2 / 3)


def test_knn_accuracy_looks_up_the_same_few_every_time(monkeypatch):
    monkeypatch.setattr(metrics, "LOOKED_UP", 40)
    train, labels = np.arange(3, dtype=np.float32)[:, np.newaxis], np.arange(3)
    test = RNG.permutation(np.repeat(train, 100, axis=0))
    wrong = np.where(RNG.random(300) < 0.5, test[:, 0], 0).astype(int)
    found = [metrics.knn_accuracy(train, labels, test, wrong, 1) for _ in range(2)]
    assert found[0] == found[1]
    assert (40 * found[0]) % 1 == pytest.approx(0, abs=1e-6)
    assert 0 < found[0] < 1


def test_prior_match_accepts_draws_from_the_prior():
    match = metrics.prior_match(RNG.standard_normal((5000, 20)), RNG)
    assert abs(match["mmd"]) < 1e-4
    assert match["mean_abs_mean"] < 0.03
    assert 0.95 < match["std_min"] <= match["std_max"] < 1.05
    assert match["covariance_eigenvalue_min"] > 0.8
    assert match["covariance_eigenvalue_max"] < 1.2


def test_prior_match_sees_codes_on_a_sheet_whose_marginals_look_right():
    plane = RNG.standard_normal((5000, 2)) @ np.repeat(np.eye(2), 10, axis=1)
    match = metrics.prior_match(plane, RNG)
    assert 0.9 < match["std_min"] <= match["std_max"] < 1.1
    assert match["covariance_eigenvalue_min"] < 1e-6
    assert match["covariance_eigenvalue_max"] > 5
    assert match["mmd"] > 1e-2


def test_mmd_is_the_unbiased_double_sum():
    a, b = RNG.standard_normal((7, 3)), RNG.standard_normal((7, 3)) + 1

    def kernel(x, y):
        return 6 / (6 + np.sum((x - y) ** 2))

    def mean(x, y, skip_same):
        pairs = [
            kernel(p, q)
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (skip_same and i == j)
        ]
        return np.mean(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert metrics._mmd_squared(a, b) == pytest.approx(expected)


def test_frechet_distance_of_normals_in_closed_form():
    a = RNG.standard_normal((200_000, 3))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # Shift by (1, 2, 2) and scale by 3: 9 + 3 (3 - 1)^2.
    b = 3 * RNG.standard_normal((200_000, 3)) + np.array([1, 2, 2])
    assert metrics.frechet_distance(a, b) == pytest.approx(21, rel=0.02)


def test_frechet_distance_of_correlated_normals():
    a = RNG.standard_normal((100_000, 2)) * [2, 1]
    b = RNG.standard_normal((100_000, 2)) * [1, 2]
    # Covariances commute: sum over axes of (sigma_a - sigma_b)^2.
    assert metrics.frechet_distance(a, b) == pytest.approx(2, rel=0.03)


def test_parzen_window_is_the_mixture_of_normals_at_its_samples():
    samples, valid, test = (RNG.random((n, 5)) for n in (40, 30, 20))
    found = metrics.parzen_log_likelihood(samples, valid, test)

    def log_likelihoods(images, sigma):
        return np.array(
            [
                math.log(
                    np.mean(
                        [
                            multivariate_normal.pdf(image, centre, sigma**2)
                            for centre in samples
                        ]
                    )
                )
                for image in images
            ]
        )

    on_valid = [log_likelihoods(valid, s).mean() for s in metrics.PARZEN_SIGMAS]
    sigma = metrics.PARZEN_SIGMAS[np.argmax(on_valid)]
    assert found["parzen_sigma"] == pytest.approx(sigma)
    on_test = log_likelihoods(test, sigma)
    assert found["parzen_log_likelihood"] == pytest.approx(on_test.mean())
    error = on_test.std() / math.sqrt(20)
    assert found["parzen_standard_error"] == pytest.approx(error)


def test_classifier_features_tell_digits_from_noise():
    images, labels = tiny_digits()
    images = images.reshape(-1, 784)
    classifier = metrics.train_digit_classifier(images[:1200], labels[:1200], 12)
    x = images[1200:] / np.float32(255)
    accuracy = (classifier.predict(x, verbose=0).argmax(1) == labels[1200:]).mean()
    assert accuracy > 0.8
    real, test, noise = metrics.digit_features(
        classifier,
        images[:597] / np.float32(255),
        x,
        RNG.random((597, 784), np.float32),
    )
    assert real.shape == (597, 64)
    floor = metrics.frechet_distance(real, test)
    assert metrics.frechet_distance(noise, test) > 5 * floor


def test_nearest_finds_the_training_image_and_its_distance():
    train = RNG.integers(0, 256, (50, 784), np.uint8)
    images = train[[7, 3]] / 255
    images[1, 0] += 0.5
    indices, distances = metrics.nearest(train, images)
    np.testing.assert_array_equal(indices, [7, 3])
    np.testing.assert_allclose(distances, [0, 0.5], atol=1e-2)


def test_mean_image_mse_is_the_variance_about_it():
    train, test = RNG.integers(0, 256, (2, 20, 784), np.uint8)
    expected = np.mean((test / 255 - train.mean(axis=0) / 255) ** 2)
    assert metrics.mean_image_mse(train, test) == pytest.approx(expected)
