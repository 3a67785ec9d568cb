"""The choice of an implementation: preference, refusals, named backends."""

import logging

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import always, choose, preferred_backend


def fast(x):
    return "fast"


def slow(x):
    return "slow"


def even_only(x):
    return None if x % 2 == 0 else f"{x} is odd"


FORMS = {"pallas_gpu": (fast, even_only), "reference": (slow, always)}


def test_the_first_that_can_is_taken():
    assert choose("op", None, FORMS, 2) is fast
    assert choose("op", None, FORMS, 3) is slow


def test_a_named_backend_is_taken_or_says_why_not():
    assert choose("op", "reference", FORMS, 2) is slow
    assert choose("op", "pallas_gpu", FORMS, 2) is fast
    with pytest.raises(ValueError, match="op: pallas_gpu cannot serve this call: 3 is odd"):
        choose("op", "pallas_gpu", FORMS, 3)
    with pytest.raises(ValueError, match="op: has no xla form; it has pallas_gpu, reference"):
        choose("op", "xla", FORMS, 2)
    with pytest.raises(ValueError, match=r"op: backend='cuda' is unknown; known are .*xla"):
        choose("op", "cuda", FORMS, 2)


def test_nothing_that_serves_is_an_error():
    with pytest.raises(ValueError, match="op: no implementation serves"):
        choose("op", None, {"pallas_gpu": FORMS["pallas_gpu"]}, 3)


def test_refusals_see_keyword_arguments():
    forms = {"xla": (fast, lambda x, *, mode: None if mode == "a" else "mode"), "reference": (slow, always)}
    assert choose("op", None, forms, 1, mode="a") is fast
    assert choose("op", None, forms, 1, mode="b") is slow


def test_a_preferred_backend_comes_first_where_it_can():
    with preferred_backend("reference"):
        assert choose("op", None, FORMS, 2) is slow
        assert choose("op", "pallas_gpu", FORMS, 2) is fast  # a named one stands
        assert choose("op", None, {"xla": (fast, always)}, 2) is fast  # no such form here
        with preferred_backend("pallas_gpu"):
            assert choose("op", None, FORMS, 2) is fast
            assert choose("op", None, FORMS, 3) is slow
        assert choose("op", None, FORMS, 2) is slow
    with pytest.raises(RuntimeError), preferred_backend("reference"):
        raise RuntimeError
    assert choose("op", None, FORMS, 2) is fast


def test_the_choice_is_logged_once(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            choose("logged_op", None, FORMS, 2)
    assert [record.getMessage() for record in caplog.records] == ["logged_op runs on pallas_gpu"]
