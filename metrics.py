"""What the report measures: baselines, how codes match the prior, sample quality."""

from __future__ import annotations

import functools
import math

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.utils import gen_batches

# The Parzen window's bandwidths that are tried, in units of a pixel's range.
PARZEN_SIGMAS = np.geomspace(0.08, 0.4, 15)
LOOKED_UP = 2_500  # test codes whose neighbours are sought: all 10,000 take long


def psnr_db(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [0, 1]."""
    return -10.0 * math.log10(max(mse, np.finfo(np.float64).tiny))


def mean_image_mse(train_images: np.ndarray, images: np.ndarray) -> float:
    """Measure the reconstruction that knows nothing: the mean training image.

    Args:
        train_images: uint8 (N, ...), 0..255.
        images: uint8 (M, ...), to reconstruct.

    Returns:
        Mean squared error over pixels and images, pixels in [0, 1].
    """
    return float(np.square((images - train_images.mean(axis=0)) / 255).mean())


def fit_pca(train_images: np.ndarray, n_components: int) -> PCA:
    """Fit the best linear autoencoder with a code of the same size.

    Args:
        train_images: uint8 (N, ...), 0..255.
        n_components: the code's dimensions; at most min(N, number of pixels) of them
            are used.

    Returns:
        scikit-learn's PCA of the flattened images, pixels in [0, 1].
    """
    flat = as_unit_floats(train_images)
    pca = PCA(min(n_components, *flat.shape), svd_solver="covariance_eigh")
    return pca.fit(flat)


def pca_reconstruction_mse(pca: PCA, images: np.ndarray) -> float:
    """Measure what PCA makes of images.

    Args:
        pca: as `fit_pca` returns it.
        images: uint8 (M, ...) to reconstruct.

    Returns:
        Mean squared error over pixels and images, pixels in [0, 1].
    """
    flat = as_unit_floats(images)
    restored = pca.inverse_transform(pca.transform(flat))
    return float(np.mean(np.square(restored - flat), dtype=np.float64))


def knn_accuracy(
    train_codes: np.ndarray,
    train_labels: np.ndarray,
    test_codes: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = 5,
) -> float:
    """Return how often the nearest training codes' majority names the right digit.

    Args:
        train_codes: float32 (N, D).
        train_labels: int64 (N,).
        test_codes: float32 (M, D), of which `LOOKED_UP` are chosen at random, always
            the same.
        test_labels: int64 (M,).
        neighbours: how many training codes vote, by Euclidean distance.
    """
    chosen = np.random.default_rng(0).permutation(len(test_codes))[:LOOKED_UP]
    classifier = KNeighborsClassifier(
        min(neighbours, len(train_codes)), algorithm="brute"
    )
    classifier.fit(train_codes, train_labels)
    return float(classifier.score(test_codes[chosen], test_labels[chosen]))


def nearest(
    train_images: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the training image nearest to each image.

    Args:
        train_images: uint8 (N, D), 0..255.
        images: float (M, D) in [0, 1].

    Returns:
        Its index, int64 (M,), and its Euclidean distance, float (M,), pixels in [0, 1].
    """
    search = NearestNeighbors(n_neighbors=1, algorithm="brute")
    search.fit(as_unit_floats(train_images))
    distances, indices = search.kneighbors(images.astype(np.float32))
    return indices[:, 0], distances[:, 0]


def prior_match(
    codes: np.ndarray, rng: np.random.Generator, mmd_size: int = 2_000
) -> dict[str, float]:
    """Compare codes (the aggregated posterior) with the standard normal prior.

    Args:
        codes: float (N, D).
        rng: chooses the codes for the MMD, and draws the prior's side of it.
        mmd_size: how many codes and prior draws the MMD compares.

    Returns:
        `mmd`: squared maximum mean discrepancy, unbiased, inverse multiquadratic
        kernel C / (C + ||a - b||^2) with C = 2 D (Tolstikhin et al. 2018,
        arXiv:1711.01558), 0 on average for codes drawn from the prior.
        `mean_abs_mean`, `std_min`, `std_max`: over the D coordinates.
        `covariance_eigenvalue_min`, `covariance_eigenvalue_max`: 1 under the prior,
        but for the spread of N samples.
    """
    codes = codes.astype(np.float64)
    # At random: the first half of MNIST's test images is the neater one.
    chosen = codes[rng.permutation(len(codes))[:mmd_size]]
    prior = rng.standard_normal(chosen.shape)
    std = codes.std(axis=0)
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(np.cov(codes, rowvar=False)))
    return {
        "mmd": _mmd_squared(chosen, prior),
        "mean_abs_mean": float(np.abs(codes.mean(axis=0)).mean()),
        "std_min": float(std.min()),
        "std_max": float(std.max()),
        "covariance_eigenvalue_min": float(eigenvalues[0]),
        "covariance_eigenvalue_max": float(eigenvalues[-1]),
    }


def _mmd_squared(a: np.ndarray, b: np.ndarray) -> float:
    scale = 2.0 * a.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return scale / (scale + euclidean_distances(x, y, squared=True))

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b))
    return float(within - 2.0 * kernel(a, b).mean())


def train_digit_classifier(
    images: np.ndarray, labels: np.ndarray, epochs: int = 3, seed: int = 0
) -> keras.Model:
    """Train the digit classifier whose features the Fréchet distance compares.

    No autoencoder sees it. Distances under another classifier are not comparable.

    Args:
        images: uint8 (N, 784), 0..255.
        labels: int64 (N,), 0..9.
        epochs: passes over the images.
        seed: of its weights and of the order of the images.

    Returns:
        A model from float32 images (N, 784) in [0, 1] to logits (N, 10), whose layer
        `features` gives the 64 numbers before the logits.
    """
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((784,))
    x = keras.layers.Reshape((28, 28, 1))(inputs)
    x = keras.layers.Conv2D(32, 5, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(64, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.3)(x)
    x = keras.layers.Dense(64, activation="relu", name="features")(x)
    classifier = keras.Model(inputs, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(
        "adam",
        loss,
        jit_compile=False,  # XLA's convolutions are slow
        steps_per_execution=32,
    )
    pixels, digits, size = tf.constant(images), tf.constant(labels), 128

    def order(_: tf.Tensor) -> tf.Tensor:
        return tf.random.shuffle(tf.range(len(images), dtype=tf.int64))

    def pick(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.cast(tf.gather(pixels, index), tf.float32) / 255.0
        return x, tf.gather(digits, index)

    options = tf.data.Options()
    options.autotune.enabled = False  # takes as long as the training
    batches = tf.data.Dataset.range(1).map(order).rebatch(size).map(pick).prefetch(2)
    count = tf.data.experimental.assert_cardinality(-(-len(images) // size))
    classifier.fit(
        batches.apply(count).with_options(options),
        epochs=epochs,
        shuffle=False,  # done
        verbose=0,
    )
    return classifier


@functools.cache
def _up_to_features(classifier: keras.Model) -> keras.Model:
    return keras.Model(classifier.inputs, classifier.get_layer("features").output)


def digit_features(classifier: keras.Model, *images: np.ndarray) -> list[np.ndarray]:
    """Return the classifier's features, float64 (N, 64) each, of images in [0, 1]."""
    network = _up_to_features(classifier)
    return [
        network.predict(each, batch_size=500, verbose=0).astype(np.float64)
        for each in images
    ]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between normal fits to two sets of features.

    ||mu_a - mu_b||^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017,
    arXiv:1706.08500), here not square-rooted, as is the custom.

    Args:
        a: float (N, D).
        b: float (M, D).
    """
    difference = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # A B is similar to a positive semidefinite matrix, so the trace of its root is
    # the sum of its eigenvalues' roots; rounding leaves tiny negative ones.
    eigenvalues = scipy.linalg.eigvals(cov_a @ cov_b).real
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    return float(
        difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root
    )


def parzen_log_likelihood(
    samples: np.ndarray, valid_images: np.ndarray, test_images: np.ndarray
) -> dict[str, float]:
    """Estimate the test images' log-likelihood under a Gaussian window on samples.

    Goodfellow et al. 2014 (arXiv:1406.2661); misleading past the point that training
    images reach (Theis et al. 2016, arXiv:1511.01844).

    Args:
        samples: float (S, D) in [0, 1], drawn from the model; all three of one dtype,
            which it computes in.
        valid_images: float (N, D), that the bandwidth is chosen on.
        test_images: float (M, D).

    Returns:
        `parzen_log_likelihood` in nats, mean over test images,
        `parzen_standard_error` of that mean, and `parzen_sigma`, the bandwidth.
    """
    count, dimensions = samples.shape
    centres = tf.constant(samples)
    lengths = tf.reduce_sum(tf.square(centres), axis=1)

    def window(images: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        x = tf.constant(images)
        own = tf.reduce_sum(tf.square(x), axis=1, keepdims=True)
        squared = own + lengths - 2.0 * tf.matmul(x, centres, transpose_b=True)
        scales = -0.5 / sigmas**2
        return np.stack(
            [tf.reduce_logsumexp(squared * scale, axis=1) for scale in scales], axis=1
        )

    def log_likelihoods(images: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
        batches = gen_batches(len(images), 200)
        windows = [window(images[batch], sigmas) for batch in batches]
        scale = np.log(sigmas * math.sqrt(2.0 * math.pi))
        return np.concatenate(windows) - math.log(count) - dimensions * scale

    on_valid = log_likelihoods(valid_images, PARZEN_SIGMAS).mean(axis=0)
    sigma = PARZEN_SIGMAS[on_valid.argmax()]
    on_test = log_likelihoods(test_images, np.array([sigma]))[:, 0]
    return {
        "parzen_log_likelihood": float(on_test.mean()),
        "parzen_standard_error": float(on_test.std() / math.sqrt(len(on_test))),
        "parzen_sigma": float(sigma),
    }


def as_unit_floats(images: np.ndarray) -> np.ndarray:
    """Flatten uint8 images (N, ...) and scale them to [0, 1], float32 (N, D)."""
    flat = images.reshape(len(images), -1)
    return np.divide(flat, np.float32(255), dtype=np.float32)
