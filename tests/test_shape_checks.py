"""Annotations of shapes are checked while tests run."""

import inspect

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from recollect.layers import mixer
from tests import shape_checks


def test_a_wrong_shape_is_an_error():
    segments = jnp.ones((2, 5), jnp.int32)
    mixer.zero_padding(jnp.ones((2, 5, 4)), mixer.Context(segments=segments))
    with pytest.raises(TypeCheckError, match="zero_padding"):
        mixer.zero_padding(jnp.ones(2), mixer.Context(segments=segments))
    assert inspect.signature(mixer.zero_padding).parameters.keys() == {"x", "context"}


def test_modules_are_checked_once_and_only_those_of_the_packages():
    with pytest.raises(AssertionError, match="imported before"):
        shape_checks.install()
    assert all(package.startswith("recollect.") for package in shape_checks.PACKAGES)
