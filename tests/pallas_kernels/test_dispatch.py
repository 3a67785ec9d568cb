"""The choice of a backend: preference, refusals, named backends."""

import logging
import sys
import types

import jax
import pytest

from recollect.pallas_kernels import accelerators, dispatch
from recollect.pallas_kernels.dispatch import (
    Choice,
    Device,
    aimed_at,
    choose,
    interpreted,
    preferred_backend,
    recorded_choices,
)

H100 = "NVIDIA H100 80GB HBM3"


def fast(x):
    return "fast"


def slow(x):
    return "slow"


def even_only(x):
    return None if x % 2 == 0 else f"{x} is odd"


class _Backend:
    """A backend's module, which runs every operation by one function."""

    def __init__(self, run, refuses=None):
        self._run = run
        if refuses is not None:
            self.refuses = refuses

    def __getattr__(self, operation):
        if operation.startswith("__") or operation == "refuses":
            raise AttributeError(operation)
        return self._run


def declared(**backends):
    """A declaration of backends; their modules, (function, refuses) each, are made importable."""
    paths = {name: f"backend_of_tests_{name}_{id(functions)}" for name, functions in backends.items()}
    for name, functions in backends.items():
        sys.modules[paths[name]] = _Backend(*functions)
        _KEPT.append(functions)
    return paths


_KEPT: list = []  # so that no two have one id

BACKENDS = declared(xla=(fast, even_only), reference=(slow,))


def test_the_first_that_can_is_taken():
    assert choose("op", None, BACKENDS, 2) is fast
    assert choose("op", None, BACKENDS, 3) is slow


def test_a_named_backend_is_taken_or_says_why_not():
    assert choose("op", "reference", BACKENDS, 2) is slow
    assert choose("op", "xla", BACKENDS, 2) is fast
    with pytest.raises(ValueError, match="op: xla cannot serve this call: 3 is odd"):
        choose("op", "xla", BACKENDS, 3)
    with pytest.raises(ValueError, match="op: has no backend pallas_tpu; it has xla, reference"):
        choose("op", "pallas_tpu", BACKENDS, 2)
    with pytest.raises(ValueError, match=r"op: backend='cuda' is unknown; known are .*xla"):
        choose("op", "cuda", BACKENDS, 2)


def test_nothing_that_serves_is_an_error():
    with pytest.raises(ValueError, match="op: no backend serves"):
        choose("op", None, {"xla": BACKENDS["xla"]}, 3)


def test_refusals_see_keyword_arguments():
    backends = declared(xla=(fast, lambda x, *, mode: None if mode == "a" else "mode"), reference=(slow,))
    assert choose("op", None, backends, 1, mode="a") is fast
    assert choose("op", None, backends, 1, mode="b") is slow


def test_a_preferred_backend_comes_first_where_it_can():
    with preferred_backend("reference"):
        assert choose("op", None, BACKENDS, 2) is slow
        assert choose("op", "xla", BACKENDS, 2) is fast  # a named one stands
        assert choose("op", None, declared(xla=(fast,)), 2) is fast  # it lacks that one
        with preferred_backend("xla"):
            assert choose("op", None, BACKENDS, 2) is fast
            assert choose("op", None, BACKENDS, 3) is slow
        assert choose("op", None, BACKENDS, 2) is slow
    with pytest.raises(RuntimeError), preferred_backend("reference"):
        raise RuntimeError
    assert choose("op", None, BACKENDS, 2) is fast


def test_the_choice_is_logged_once(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            choose("logged_op", None, BACKENDS, 2)
    assert [record.getMessage() for record in caplog.records] == ["logged_op runs on xla"]


KERNELS = declared(pallas_gpu=(lambda x: "gpu", even_only), pallas_tpu=(lambda x: "tpu",), xla=(fast,))


def test_kernels_are_chosen_for_the_device_that_is_traced_for():
    assert dispatch.device() == Device("cpu", "cpu")
    assert choose("op", None, KERNELS, 2) is fast
    with aimed_at("gpu", H100):
        assert dispatch.device() == Device("gpu", H100)
        assert choose("op", None, KERNELS, 2)(2) == "gpu"
        assert choose("op", None, KERNELS, 3) is fast  # the kernel refuses
        with aimed_at("tpu", "TPU v5 lite"):
            assert choose("op", None, KERNELS, 2)(2) == "tpu"
        with pytest.raises(ValueError, match="op: pallas_gpu cannot serve this call: 3 is odd"):
            choose("op", "pallas_gpu", KERNELS, 3)
        with pytest.raises(ValueError, match="op: pallas_tpu cannot serve this call: it runs on TPUs; this is gpu"):
            choose("op", "pallas_tpu", KERNELS, 3)
    assert dispatch.device() == Device("cpu", "cpu")


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090"])
def test_gpu_kernels_are_for_hopper(kind):
    with aimed_at("gpu", kind):
        assert choose("op", None, KERNELS, 2) is fast
        with pytest.raises(ValueError, match=f"it runs on NVIDIA Hopper GPUs; this is {kind}"):
            choose("op", "pallas_gpu", KERNELS, 2)


@pytest.mark.parametrize("kind", [H100, "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_kinds_of_hopper(kind):
    assert accelerators.is_hopper(kind)


def test_named_kernels_on_a_cpu_say_where_they_run():
    with pytest.raises(ValueError, match="op: pallas_tpu cannot serve this call: it runs on TPUs; this is cpu"):
        choose("op", "pallas_tpu", KERNELS, 2)
    with pytest.raises(
        ValueError,
        match=r"op: pallas_gpu cannot serve this call: "
        "(Mosaic GPU kernels run from jax 0.11|it runs on NVIDIA Hopper GPUs; this is cpu)",
    ):
        choose("op", "pallas_gpu", KERNELS, 2)


def test_an_old_jax_runs_no_gpu_kernel_but_compiles_them_ahead(monkeypatch):
    monkeypatch.setattr(jax.version, "__version_info__", (0, 10, 2))
    for context in (interpreted(), interpreted("races")):
        with context, pytest.raises(ValueError, match=r"Mosaic GPU kernels run from jax 0\.11 on"):
            choose("op", "pallas_gpu", KERNELS, 2)
    with aimed_at("gpu", H100):
        assert choose("op", "pallas_gpu", KERNELS, 2)(2) == "gpu"
    monkeypatch.setattr(jax.version, "__version_info__", (0, 11, 0))
    with interpreted():
        assert choose("op", "pallas_gpu", KERNELS, 2)(2) == "gpu"


def test_interpreted_kernels_are_chosen_anywhere():
    assert dispatch.interpretation() is None
    with interpreted():
        assert dispatch.interpretation() == "values"
        assert choose("op", "pallas_tpu", KERNELS, 2)(2) == "tpu"
        with interpreted("races"):
            assert dispatch.interpretation() == "races"
        with pytest.raises(ValueError, match=r"3 is odd|jax 0\.11"):
            choose("op", "pallas_gpu", KERNELS, 3)
    assert dispatch.interpretation() is None


LIBRARIES = declared(cudnn=(lambda x: "cudnn", even_only), splash=(lambda x: "splash",), xla=(fast,))


def test_libraries_run_on_their_devices(monkeypatch):
    assert choose("op", None, LIBRARIES, 2) is fast
    for name, reason in (("cudnn", "it runs on NVIDIA GPUs; this is cpu"), ("splash", "it runs on TPUs; this is cpu")):
        with pytest.raises(ValueError, match=f"op: {name} cannot serve this call: {reason}"):
            choose("op", name, LIBRARIES, 2)
    with aimed_at("tpu", "TPU v5 lite"):
        assert choose("op", None, LIBRARIES, 2)(2) == "splash"
    for here, taken in ((True, "cudnn"), (False, "fast")):
        monkeypatch.setattr(accelerators, "has_cudnn", lambda here=here: here)
        with aimed_at("gpu", "NVIDIA A100-SXM4-40GB"):
            assert choose("op", None, LIBRARIES, 2)(2) == taken
    with pytest.raises(ValueError, match="jax finds no cuDNN"), aimed_at("gpu", H100):
        choose("op", "cudnn", LIBRARIES, 2)


def test_of_libraries_only_splash_is_simulated():
    with interpreted():
        assert choose("op", None, LIBRARIES, 2)(2) == "splash"
        with pytest.raises(ValueError, match="cuDNN is no kernel that could be simulated"):
            choose("op", "cudnn", LIBRARIES, 2)


@pytest.mark.parametrize(
    ("capability", "serves"),
    [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True), ("gfx942", False), (None, False)],
)
def test_cudnn_is_for_gpus_from_ampere_on(monkeypatch, capability, serves):
    """On the device itself, which says what it can do."""
    found = types.SimpleNamespace(
        device_kind="a GPU", **({} if capability is None else {"compute_capability": capability})
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [found])
    monkeypatch.setattr(accelerators, "has_cudnn", lambda: True)
    reason = dispatch.kernels_run_here("cudnn")
    assert reason is None if serves else reason == "it runs on NVIDIA GPUs from Ampere on; this is a GPU"


def test_cudnn_is_not_found_where_jax_has_none(monkeypatch):
    from jax._src import lib

    monkeypatch.setattr(lib, "cuda_versions", None)
    assert not accelerators.has_cudnn()
    monkeypatch.setattr(lib, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    assert accelerators.has_cudnn()


def test_choices_are_recorded_with_what_was_passed_over():
    with recorded_choices() as choices:
        choose("one", None, KERNELS, 2)
        with aimed_at("tpu", "TPU v6 lite"):
            choose("two", None, KERNELS, 2)
            choose("two", "xla", KERNELS, 2)
        with recorded_choices() as inner:
            choose("three", None, BACKENDS, 3)
    choose("four", None, BACKENDS, 2)
    assert [choice.operation for choice in choices] == ["one", "two", "two"]
    assert choices[0].backend == "xla" and [backend for backend, _ in choices[0].passed_over] == [
        "pallas_gpu",
        "pallas_tpu",
    ]
    assert dict(choices[0].passed_over)["pallas_tpu"] == "it runs on TPUs; this is cpu"
    assert choices[1].backend == "pallas_tpu" and choices[2] == Choice("two", "xla")
    assert inner == [Choice("three", "reference", (("xla", "3 is odd"),))]


def test_a_jitted_function_is_traced_again_for_another_device():
    seen = []

    @jax.jit
    def run(x):
        seen.append((dispatch.device().platform, dispatch.interpretation()))
        return x

    for _ in range(2):
        run.trace(1.0)
        with dispatch.aimed_at("tpu", "TPU v6 lite"):
            run.trace(1.0)
        with dispatch.interpreted():
            run.trace(1.0)
    assert seen == [("cpu", None), ("tpu", None), ("cpu", "values")]


def test_a_module_is_imported_only_when_it_can_serve():
    missing = {"pallas_gpu": "no_such_module", "pallas_tpu": "no_such_module", "xla": BACKENDS["reference"]}
    assert choose("op", None, missing, 2) is slow
    with aimed_at("tpu", "TPU v5 lite"), pytest.raises(ModuleNotFoundError):
        choose("op", None, missing, 2)
