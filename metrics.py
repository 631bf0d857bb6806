"""What the report measures: baselines, how codes match the prior, sample quality.

Images are float32 in [0, 1], (N, 784) or (N, 28, 28, 3); codes are float32 (N, D).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import scipy.linalg
import scipy.special
from openTSNE import TSNE
from scipy.spatial import geometric_slerp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import trustworthiness
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from read_MNIST_M import NUM_CLASSES, Split

TRUSTED = 3_000  # codes or images on which trustworthiness is measured
CLEAR = 0.9  # the classifier's confidence from which on an image is clearly a digit
NULL_SETS = 199  # sets of true draws that codes are compared with
MMD_SIZE = 2_000  # codes, and draws, that an MMD compares
MMD_SCALE = 20.0  # of its kernel: twice the number of informative coordinates
FRESH_STEPS = 100  # at least, of the discriminator that judges finished codes
FRESH_EPOCHS = 4  # at least
FRESH_BATCH_SIZE = 512
FRESH_ON_DRAWS = 3  # discriminators that are judged on true draws in place of codes
FRESH_LEARNING_RATE = 2e-3  # at first; then it falls to 0

# Reconstruction ----------------------------------------------------------------------


def mean_image_mse(train_images: np.ndarray, images: np.ndarray) -> float:
    """Return the mean squared error of guessing the mean training image."""
    return float(np.square(images - train_images.mean(axis=0)).mean())


def fit_pca(train_images: np.ndarray, n_components: int) -> PCA:
    """Fit the best linear autoencoder with a code of the same size to (N, ...) images.

    At most min(N, number of pixels) components are used.
    """
    flat = train_images.reshape(len(train_images), -1)
    pca = PCA(min(n_components, *flat.shape), svd_solver="covariance_eigh")
    return pca.fit(flat)


def pca_reconstruction_mse(pca: PCA, images: np.ndarray) -> float:
    """Return the mean squared error of what PCA makes of images, float32 (M, ...)."""
    flat = images.reshape(len(images), -1)
    restored = pca.inverse_transform(pca.transform(flat))
    return float(np.mean(np.square(restored - flat), dtype=np.float64))


# Neighbours --------------------------------------------------------------------------


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = 5,
) -> float:
    """Return how often the nearest training codes' majority names the right digit.

    Args:
        train: codes or images, float32 (N, ...), among which neighbours are found.
        train_labels: their digits, (N,).
        test: codes or images, float32 (M, ...), whose digits are named.
        test_labels: their digits, (M,).
        neighbours: how many vote; all, if there are fewer.
    """
    vote = KNeighborsClassifier(min(neighbours, len(train)), algorithm="brute")
    vote.fit(train.reshape(len(train), -1), train_labels)
    return float(vote.score(test.reshape(len(test), -1), test_labels))


def logistic_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Return how often a logistic regression on codes (N, D) names the right digit."""
    if len(np.unique(train_labels)) == 1:  # nothing to tell apart
        return float(np.mean(test_labels == train_labels[0]))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def knn_bound(train_count: int, test_count: int, dimensions: int) -> float | None:
    """Return the highest 5-NN accuracy of codes that follow the prior exactly.

    If the codes of ten equally frequent digits follow the normal and each code belongs
    to one digit, the digits divide the space into ten cells of probability 1/10, and
    neighbours err near the borders. In nine dimensions or more, the division with the
    least border gives each point to the nearest of ten vertices of a regular simplex
    (Milman & Neeman 2018, arXiv:1805.10961). In ten dimensions the unit vectors are
    such vertices, so the cell is the number of the largest coordinate. That the least
    border makes the fewest errors is plausible, but not proved.

    Returns:
        The accuracy among as many true draws as there are codes, or None for fewer
        than ten dimensions.
    """
    if dimensions < NUM_CLASSES:
        return None
    rng = np.random.default_rng(0)
    train = rng.standard_normal((train_count, dimensions), np.float32)
    test = rng.standard_normal((test_count, dimensions), np.float32)
    cells = [draws[:, :NUM_CLASSES].argmax(axis=1) for draws in (train, test)]
    return knn_accuracy(train, cells[0], test, cells[1])


def dimension_reduction(
    train: Split, test: Split, train_codes: np.ndarray, test_codes: np.ndarray
) -> dict[str, Any]:
    """Compare codes with as many principal components.

    Args:
        train: images (N, 784), that PCA is fitted on, and labels if there are any.
        test: images (M, 784) and labels.
        train_codes: float32 (N, D), informative coordinates.
        test_codes: float32 (M, D).

    Returns:
        `pca_test_mse` of D components; `trustworthiness` of the codes' and the
        components' neighbourhoods against the images (Venna & Kaski 2001), in [0, 1],
        on `TRUSTED` random test images; `knn_accuracy`, `logistic_accuracy`, and
        `knn_bound` (see there), None without labels.
    """
    pca = fit_pca(train.images, train_codes.shape[1])
    spaces = {
        "code": (train_codes, test_codes),
        "pca": (pca.transform(train.images), pca.transform(test.images)),
    }
    some = np.random.default_rng(0).permutation(len(test.images))[:TRUSTED]
    found: dict[str, Any] = {
        "pca_test_mse": pca_reconstruction_mse(pca, test.images),
        "trustworthiness": {
            name: float(trustworthiness(test.images[some], codes[some]))
            for name, (_, codes) in spaces.items()
        },
        "knn_accuracy": None,
        "logistic_accuracy": None,
        "knn_bound": None,
    }
    if train.labels is not None:
        found["logistic_accuracy"] = {
            name: logistic_accuracy(known, train.labels, asked, test.labels)
            for name, (known, asked) in spaces.items()
        }
        spaces["pixels"] = train.images, test.images
        found["knn_accuracy"] = {
            name: knn_accuracy(known, train.labels, asked, test.labels)
            for name, (known, asked) in spaces.items()
        }
        sizes = len(train_codes), *test_codes.shape
        found["knn_bound"] = knn_bound(*sizes)
    return found


def tsne_map(codes: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Map codes (N, D) to the plane by t-SNE (van der Maaten & Hinton 2008).

    scikit-learn's takes too long for 59,000 codes, so this is openTSNE's (Poličar et
    al. 2024), which interpolates the forces on a grid (Linderman et al. 2019,
    arXiv:1712.09005).

    Returns:
        The map, float (N, 2), and its trustworthiness in [0, 1] (Venna & Kaski 2001),
        measured on `TRUSTED` codes.
    """
    tsne = TSNE(
        perplexity=min(30, max(1, (len(codes) - 1) // 3)),
        initialization="pca" if codes.shape[1] > 1 else "random",
        neighbors="exact",  # faster here than approximate ones
        n_interpolation_points=2,  # in two thirds of the time of 3
        n_jobs=-1,
        random_state=seed,
        verbose=True,
    )
    points = np.asarray(tsne.fit(codes))
    some = np.random.default_rng(seed).permutation(len(codes))[:TRUSTED]
    trusted = trustworthiness(codes[some], points[some])
    return points, float(trusted)


# Codes against the prior -------------------------------------------------------------


def prior_match(codes: np.ndarray) -> dict[str, Any]:
    """Compare codes (N, D), the aggregate posterior, with the standard normal prior.

    Returns:
        `mmd`: squared maximum mean discrepancy, unbiased, inverse multiquadratic
        kernel C / (C + ||a - b||^2) with C = 20 (Tolstikhin et al. 2018,
        arXiv:1711.01558), 0 on average for codes drawn from the prior.
        `covariance_eigenvalue_min`, `covariance_eigenvalue_max`: all eigenvalues are 1
        under the prior.
        `draws`: the least and the largest value of each of these over `NULL_SETS` sets
        of N true draws. `as_bad`: the share of these sets that are no better than the
        codes: a smallest eigenvalue as small or smaller, other measures as large or
        larger.
    """
    found = _against_prior(codes.astype(np.float64), np.random.default_rng(0))
    draws = _true_draws(*codes.shape)
    as_bad = {}
    for name, value in found.items():
        is_bad = draws[name] >= value
        if name == "covariance_eigenvalue_min":
            is_bad = draws[name] <= value
        as_bad[name] = float(is_bad.mean())
    spans = {name: [each.min(), each.max()] for name, each in draws.items()}
    return {**found, "draws": spans, "as_bad": as_bad}


@functools.cache
def _true_draws(count: int, dimensions: int) -> dict[str, np.ndarray]:
    """Return each measure of `NULL_SETS` sets of true draws, float (NULL_SETS,)."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(NULL_SETS):
        draws = rng.standard_normal((count, dimensions))
        rows.append(_against_prior(draws, rng))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _against_prior(codes: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    # At random: the first half of MNIST's test images is the neater one.
    chosen = codes[rng.permutation(len(codes))[:MMD_SIZE]]
    eigenvalues = covariance_eigenvalues(codes)
    return {
        "mmd": _mmd_squared(chosen, rng.standard_normal(chosen.shape)),
        "covariance_eigenvalue_min": float(eigenvalues[-1]),
        "covariance_eigenvalue_max": float(eigenvalues[0]),
    }


def covariance_eigenvalues(codes: np.ndarray) -> np.ndarray:
    """Return the covariance's eigenvalues, float (D,), the largest first."""
    return np.linalg.eigvalsh(np.atleast_2d(np.cov(codes, rowvar=False)))[::-1]


def great_arc(start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """Walk from one code, (D,), to another along a great arc (Shoemake 1985).

    A straight line would cut through the middle of the shell of radius sqrt(D) where
    the prior has its mass.

    Returns:
        Codes (steps, D), their direction turning evenly, their length changing evenly.
    """
    start, end = start.astype(np.float64), end.astype(np.float64)
    t = np.linspace(0.0, 1.0, steps)
    if len(start) == 1:  # no arc
        return np.linspace(start, end, steps)
    first, last = np.linalg.norm(start), np.linalg.norm(end)
    directions = geometric_slerp(start / first, end / last, t)
    return directions * ((1 - t) * first + t * last)[:, np.newaxis]


def _mmd_squared(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return MMD_SCALE / (MMD_SCALE + euclidean_distances(x, y, squared=True))

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b))
    return float(within - 2.0 * kernel(a, b).mean())


def fresh_discriminator_accuracy(
    discriminator: keras.Model,
    train_codes: np.ndarray,
    test_codes: np.ndarray,
    digits: tuple[np.ndarray, np.ndarray] | None = None,
) -> float:
    """Train a new discriminator on finished codes; judge it on test codes.

    Where it gets no further than 0.5, L_D was near equilibrium because the codes follow
    the prior, and not because the adversary lost track.

    Args:
        discriminator: untrained; maps codes (N, D) to logits (N, 1).
        train_codes: of the training images, float32 (N, D).
        test_codes: of the test images, float32 (M, D).
        digits: of training and test images, one-hot (N, 10) and (M, 10), if the
            discriminator sees them beside a code or draw, as (N, D + 10).

    Returns:
        How often it tells test codes from as many draws of the prior, in [0, 1].
    """
    rng = np.random.default_rng(1)
    train_digits, test_digits = digits or (None, None)

    def draws_and(
        codes: np.ndarray, digits: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        both = np.concatenate([rng.standard_normal(codes.shape), codes])
        if digits is not None:
            both = np.concatenate([both, np.tile(digits, (2, 1))], axis=1)
        is_draw = np.repeat([1.0, 0.0], len(codes))[:, np.newaxis]
        return both.astype(np.float32), is_draw.astype(np.float32)

    steps = math.ceil(2 * len(train_codes) / FRESH_BATCH_SIZE)  # in an epoch
    epochs = max(FRESH_EPOCHS, FRESH_STEPS // steps)
    rate = keras.optimizers.schedules.CosineDecay(FRESH_LEARNING_RATE, epochs * steps)
    discriminator.compile(
        keras.optimizers.Adam(rate),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
        jit_compile=False,  # compiling takes as long as it saves
    )
    for _ in range(epochs):
        learned = draws_and(train_codes, train_digits)
        discriminator.fit(*learned, batch_size=FRESH_BATCH_SIZE, verbose=0)
    judged = draws_and(test_codes, test_digits)
    return float(discriminator.evaluate(*judged, verbose=0)[1])


def compare_with_prior(
    build_discriminator: Callable[[int], keras.Model],
    train_codes: np.ndarray,
    test_codes: np.ndarray,
    informative: int,
) -> dict[str, Any]:
    """Compare codes with the prior, over all coordinates and over the first ones.

    Args:
        build_discriminator: makes a fresh discriminator for a number of dimensions.
        train_codes: codes that fresh discriminators learn from, float32 (N, D).
        test_codes: codes that are measured, float32 (M, D).
        informative: how many coordinates, the first ones, the encoder computes.

    Returns:
        `prior_match` and `informative_match`: what `prior_match` returns, over all
        coordinates and over the informative ones, and `fresh_discriminator`, the
        accuracy of one. `fresh_discriminator_on_draws`: the accuracies of
        `FRESH_ON_DRAWS` discriminators that were trained and judged on draws of the
        prior in place of informative coordinates, to tell chance from a departure.
    """

    def accuracy(train: np.ndarray, test: np.ndarray, seed: int = 0) -> float:
        keras.utils.set_random_seed(seed)
        discriminator = build_discriminator(test.shape[1])
        return fresh_discriminator_accuracy(discriminator, train, test)

    def match(count: int) -> dict[str, Any]:
        train, test = train_codes[:, :count], test_codes[:, :count]
        return prior_match(test) | {"fresh_discriminator": accuracy(train, test)}

    on_draws = []
    for seed in range(FRESH_ON_DRAWS):
        rng = np.random.default_rng([2, seed])
        train = rng.standard_normal((len(train_codes), informative))
        test = rng.standard_normal((len(test_codes), informative))
        on_draws.append(accuracy(train, test, seed))
    matches = {"informative_match": match(informative)}
    matches["prior_match"] = matches["informative_match"]
    if informative < test_codes.shape[1]:
        matches["prior_match"] = match(test_codes.shape[1])
    return {**matches, "fresh_discriminator_on_draws": on_draws}


# Samples -----------------------------------------------------------------------------


def train_digit_classifier(train: Split) -> keras.Model:
    """Train the digit classifier in whose features generated images are measured.

    No autoencoder sees it. Measures under another one are not comparable. It maps
    images (N, 784) to logits (N, 10); its layer `features` gives the 64 numbers before
    them.
    """
    keras.utils.set_random_seed(0)
    layers = keras.layers
    strided = {"strides": 2, "padding": "same", "activation": "relu"}
    classifier = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(32, 5, **strided),
            layers.Conv2D(64, 3, **strided),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(64, activation="relu", name="features"),
            layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # XLA's convolutions are slow.
    classifier.compile("adam", loss, jit_compile=False)
    classifier.fit(train.images, train.labels, batch_size=128, epochs=3, verbose=0)
    return classifier


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between normal fits to features (N, D) and (M, D).

    ||mu_a - mu_b||^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017,
    arXiv:1706.08500), here not square-rooted, as is the custom.
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


def coverage(points: np.ndarray, known: np.ndarray) -> float:
    """Return which share of features (N, D) lies in the manifold of others, (M, D).

    The manifold is all that is no further from a known point than its third nearest
    neighbour (Kynkäänniemi et al. 2019, arXiv:1904.06991). Of generated images among
    true ones this is precision, of true ones among generated ones it is recall.
    """
    search = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(known)
    radii = search.kneighbors()[0][:, -1]
    parts = pairwise_distances_chunked(points, known)
    inside = [(distances <= radii).any(axis=1) for distances in parts]
    return float(np.concatenate(inside).mean())


def sample_quality(
    classifier: keras.Model | None,
    train: Split,
    test: Split,
    generated: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any] | None]:
    """Measure generated images, (N, 784) each, against the test images (M, 784).

    All is measured in the classifier's features. Beside the generated images stand as
    many training images as there are test images, `training_images`.

    Returns:
        By name, None without a classifier: `frechet_distance`; `precision` and `recall`
        (see `coverage`); `digits`, the share of each digit; `clear`, the share that
        the classifier is sure of (`CLEAR`). Of the test images the last two, and the
        classifier's `accuracy`.
    """
    # At random: a file may be sorted by digit.
    some = np.random.default_rng(0).permutation(len(train.images))[: len(test.images)]
    images = {"test_images": test.images, **generated}
    images["training_images"] = train.images[some]
    if classifier is None:
        return dict.fromkeys(images)
    outputs = [classifier.get_layer(name).output for name in ("features", "logits")]
    network = keras.Model(classifier.inputs, outputs)
    quality = {}
    for name, pixels in images.items():
        features, logits = network.predict(pixels, batch_size=500, verbose=0)
        features, digits = features.astype(np.float64), logits.argmax(axis=1)
        shares = np.bincount(digits, minlength=10) / len(digits)
        confidence = scipy.special.softmax(logits, axis=1).max(axis=1)
        clear = float((confidence >= CLEAR).mean())
        quality[name] = {"digits": shares.tolist(), "clear": clear}
        if name == "test_images":
            true = features
            quality[name]["accuracy"] = float((digits == test.labels).mean())
        else:
            quality[name] |= {
                "frechet_distance": frechet_distance(features, true),
                "precision": coverage(features, true),
                "recall": coverage(true, features),
            }
    return quality
