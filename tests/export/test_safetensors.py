import hashlib
import json
import os
import pickle

import chz
import ml_dtypes
import numpy as np
import pytest

import recollect.export.safetensors_format as module
from recollect.configuration import Config, UserError, to_json
from recollect.export import export_safetensors, load_safetensors, read_manifest


@chz.chz(typecheck=True)
class ToyExported(Config):
    width: int = 8
    rates: tuple[float, ...] = (0.5, 0.25)

    @chz.validate
    def _positive(self) -> None:
        if self.width < 1:
            raise UserError(f"width={self.width}: must be at least 1")


CONFIG = ToyExported(width=3)


def _params():
    generator = np.random.default_rng(0)
    bits = np.arange(2**16, dtype=np.uint16)
    return {
        # every bit pattern there is, NaNs with payloads among them
        "embedding": bits.view(ml_dtypes.bfloat16).reshape(256, 256),
        "stack": {
            "stages": {
                "0": {"weight": generator.integers(0, 2**32, (5, 7), dtype=np.uint32).view(np.float32)},
                "1": {"scale": np.float32(0.1)},
            }
        },
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "steps": np.array([2**40], np.int64),
    }


@pytest.fixture
def folder(tmp_path):
    export_safetensors(_params(), CONFIG, tmp_path / "out", extra={"step": 7})
    return tmp_path / "out"


def _leaves(params, prefix=""):
    for name, value in params.items():
        yield from (
            _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, np.asarray(value))]
        )


def _resign(folder):
    """Makes the manifest fit the weights file, as someone who changes it on purpose would."""
    data = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip_is_bit_exact(folder):
    params, config = load_safetensors(folder)
    assert config == CONFIG
    there, here = dict(_leaves(_params())), dict(_leaves(params))
    assert there.keys() == here.keys()
    for name, array in there.items():
        assert (here[name].dtype, here[name].shape) == (array.dtype, array.shape), name
        assert here[name].tobytes() == array.tobytes(), name


def test_jax_arrays_round_trip(tmp_path):
    import jax.numpy as jnp

    value = jnp.linspace(-3, 3, 11).astype(jnp.bfloat16)
    export_safetensors({"a": {"b": value}}, CONFIG, tmp_path / "out")
    params, _ = load_safetensors(tmp_path / "out")
    assert params["a"]["b"].dtype == value.dtype and params["a"]["b"].tobytes() == np.asarray(value).tobytes()


def test_files_are_what_other_programs_expect(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["embedding"]["dtype"] == "BF16" and header["stack.stages.0.weight"]["shape"] == [5, 7]
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(to_json(CONFIG)))
    manifest = read_manifest(folder)
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest() and manifest["extra"] == {"step": 7}
    assert manifest["parameters"] == 65536 + 35 + 1 + 6 + 0 + 2 + 1
    assert manifest["arrays"]["transposed"] == {"shape": [3, 2], "dtype": "float32"}


def test_a_folder_that_is_not_empty_is_kept(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"out is not empty"):
        export_safetensors({"a": np.ones(2)}, CONFIG, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    export_safetensors({"a": np.ones(2)}, CONFIG, folder, overwrite=True)
    assert list(load_safetensors(folder)[0]) == ["a"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no export wrote \(notes.txt\)"):
        export_safetensors({"b": np.ones(2)}, CONFIG, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "out").mkdir()
    for where in (tmp_path / "out", tmp_path / "a" / "b"):
        export_safetensors({"a": np.ones(2)}, CONFIG, where)
        assert load_safetensors(where)[1] == CONFIG


def test_a_write_that_fails_leaves_the_old_export_and_no_rest(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = os.rename

    def fail(source, target):
        if ".new-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left"):
        export_safetensors({"a": np.ones(2)}, CONFIG, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_safetensors({"a": np.ones(2)}, CONFIG, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        export_safetensors({"a": np.ones(2)}, CONFIG, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "no arrays"),
        ({"a": {}}, "no arrays at a"),
        ({"a.b": np.ones(2)}, "'a.b' under the root"),
        ({"a": {3: np.ones(2)}}, "3 under a"),
        ({"__metadata__": np.ones(2)}, "__metadata__"),
        ({"a": np.array(["x"])}, "a has dtype <U1"),
        ({"a": np.array([None])}, "a has dtype object"),
    ],
)
def test_arrays_that_cannot_be_stored(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        export_safetensors(params, CONFIG, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_extra_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="extra"):
        export_safetensors({"a": np.ones(2)}, CONFIG, tmp_path / "out", extra={"x": object()})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"there is no .*{name}"):
        load_safetensors(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        load_safetensors(tmp_path / "nowhere")


def test_one_flipped_bit_is_noticed(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors does not match its digest"):
        load_safetensors(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(
        UserError,
        match=rf"model.safetensors has {len(data) - 5:,} bytes where manifest.json says {len(data):,}: it was cut off",
    ):
        load_safetensors(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-5], lambda data: b"", lambda data: b"\xff" * 8 + data, lambda data: pickle.dumps(print)],
)
def test_a_bad_weights_file_with_a_fitting_digest_is_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    _resign(folder)
    with pytest.raises(UserError, match=r"model.safetensors is not a safetensors file"):
        load_safetensors(folder)


def test_weights_of_another_model_are_noticed(folder):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    _resign(folder)
    with pytest.raises(UserError, match=r"model.safetensors: a is .* where manifest.json says nothing"):
        load_safetensors(folder)


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a")])
def test_an_array_inside_an_array_is_refused(folder, names):
    with pytest.raises(UserError, match=r"lies inside another array|holds other arrays"):
        module._nest({name: np.ones(1) for name in names}, folder)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 100_000, "\udcff"])
def test_broken_json_is_named(folder, name, text):
    (folder / name).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=name):
        load_safetensors(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", 2), ("sha256", None), ("bytes", "3"), ("arrays", []), ("extra", 1), ("parameters", None)],
)
def test_a_manifest_of_another_kind_is_refused(folder, field, value):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"manifest.json.*{field}"):
        load_safetensors(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "os:system"}, "names code by module, which is refused"),
        ({"class": "builtins.eval"}, "no config class"),
        ({"class": "ToyExporte"}, "did you mean ToyExported"),
        ({"class": ["ToyExported"]}, "not a name"),
        ({"width": 0}, "width=0: must be at least 1"),
        ({"width": "wide"}, "width"),
        ({"width": {"class": "os:system", "command": "touch /tmp/x"}}, "names code by module"),
        ({"depth": 3}, "no field 'depth'"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_a_hostile_or_foreign_config_is_refused(folder, changes, message, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a file's words were run"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"config.json: .*{message}"):
        load_safetensors(folder)


def test_loading_imports_nothing_that_the_config_names(folder, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "config.json"
    for name in ("hostile_module:Config", "hostile_module.Config", "hostile_module"):
        path.write_text(json.dumps({"schema_version": 1, "class": name}))
        with pytest.raises(UserError, match=r"config.json"):
            load_safetensors(folder)
