"""Question 2's losses, stages and networks, against plain computations."""

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
STAGES = "optimizer", "discriminator_optimizer", "encoder_optimizer"
NETWORKS = "encoder", "decoder", "discriminator"


def build(recipe=q2.DEFAULT, seed=0, **changes):
    keras.utils.set_random_seed(seed)
    recipe = recipe._replace(hidden=(48, 48), **changes)
    model = q2.AdversarialAutoencoder(8, recipe, seed)
    model.compile(1e-3, epochs=10, steps=100)
    return model


def set_rates(model, rates, kind=keras.optimizers.SGD):
    for name, rate in zip(STAGES, rates, strict=True):
        variables = getattr(model, name)._trainable_variables
        optimizer = kind(rate)
        optimizer.build(variables)
        setattr(model, name, optimizer)
