"""The bench's count of arithmetic, and its turns."""

import time

import utils

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.decomposition import PCA

import bench
import q1_cnn_autoencoder as q1
import q2_aae as q2


def profiled_flops(step, *signature):
    """What TensorFlow's own profiler counts, element-wise operations included."""
    graph = tf.function(step).get_concrete_function(*signature).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


def test_count_is_the_arithmetic_of_a_perceptrons_step():
    network = keras.Sequential([keras.Input((50,))])
    network.add(keras.layers.Dense(30))
    network.add(keras.layers.Dense(20))

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(network(x)))
        return tape.gradient(loss, network.trainable_variables)

    # Forward; by the kernels; by what is put in, but for the images themselves.
    products = 2 * (50 * 30 + 30 * 20) + 30 * 20
    found = bench.count_flops(step, tf.TensorSpec((8, 50), tf.float32))
    assert found == 2 * 8 * products


def test_count_is_the_arithmetic_of_the_three_stages():
    options = q2.parse_options(["--data", "unread"])
    images = np.eye(784, dtype=np.uint8)[:200]
    model = q2.build_model(options, PCA(100).fit(images), images)
    size = q2.BATCH_SIZE
    found = bench.q2_step_flops(model, 5)

    def products(first, *widths):
        return sum(a * b for a, b in zip((first, *widths), widths, strict=False))

    encoder = products(784, *q2.HIDDEN, 200)
    decoder = products(100, *q2.HIDDEN, 784)
    judge = products(100, *q2.DISCRIMINATOR_HIDDEN, 1)
    both = 3 * (encoder + decoder) - 784 * q2.HIDDEN[0]
    # Draws: forward, slopes, and the gradients of both; codes: forward and by kernels,
    # and again forward and by the codes for stage (c). In four further steps of (b),
    # images are encoded; draws and codes: forward and by kernels.
    further = 4 * (encoder + 2 * 3 * judge)
    expected = 2 * size * (both + (1 + 1 + 2 + 2 + 2 + 3) * judge + further)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("question", ["q1", "q2"])
def test_count_agrees_with_the_profilers(question):
    if question == "q1":
        network = q1.build_autoencoder()
        shape = (8, 28, 28, 3)
    else:
        network = keras.Sequential([q2.build_encoder(), q2.build_decoder()])
        shape = (64, q2.PIXELS)

    def step(batch):
        x = utils.unit_floats(batch)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x - network(x, training=True)))
        return tape.gradient(loss, network.trainable_variables)

    signature = tf.TensorSpec(shape, tf.uint8)
    found = bench.count_flops(step, signature)
    assert found == pytest.approx(profiled_flops(step, signature), rel=0.05)


def test_contestants_are_timed_for_one_time_each():
    contestants = {
        "slow": lambda times: time.sleep(0.02 * times),
        "fast": lambda times: time.sleep(0.005 * times),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SECONDS", 0.1)
        found = bench.take_turns(contestants, 3)
    assert found["slow"] == pytest.approx(0.02, rel=0.3)
    assert found["fast"] == pytest.approx(0.005, rel=0.3)


def test_what_is_measured_is_told_for_both_questions(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.1)
    monkeypatch.setattr(bench, "SIZE", 256)
    monkeypatch.setattr(bench, "IMAGES", 512)
    monkeypatch.setattr(bench, "TRAINING_IMAGES", 512)
    options = bench.parse_options(["--steps-only", "--rounds", "1"])
    found = {name: bench.measure(name, options) for name in bench.SCRIPTS}
    assert list(found) == ["q1", "q2"]
    for each in found.values():
        speed = each["images_per_second"]
        assert speed > 0
        arithmetic = each["gflop_per_step"] / each["batch_size"]
        assert each["gflops"] == pytest.approx(arithmetic * speed)
        ratio = each["gflops"] / each["matmul_gflops"]
        assert each["fraction_of_matmul_rate"] == pytest.approx(ratio)
    assert f"{found['q2']['images_per_second']:,.0f}" in bench.table(found)
    assert f"{found['q2']['gflop_per_step']:.2f}" in bench.table({"q2": found["q2"]})


def test_a_question_that_cannot_be_measured_is_told():
    with pytest.raises(utils.UsageError, match="q1 could not be measured"):
        bench.measure_apart("q1", ["--rounds", "none"])
