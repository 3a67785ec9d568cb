"""300 damaged or hostile folders, drawn from seeds: each is refused in one line, nothing in it runs, no memory is lost.

The first few run in `make test`; every seed damages an export of one kind in one way, with numbers of its own.
"""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.tokenizers import ByteTokenizer
from recollect.export import export_safetensors, load_safetensors
from recollect.export.huggingface import Facts, export_huggingface, import_huggingface
from recollect.layers import Attention, GatedAttention, GatedDeltaNet, Mamba2
from recollect.layers.modules import RMSNorm, Rotary, SwiGLU
from recollect.models import LanguageModel, repeat
from tests.export.huggingface.cases import parameters

SEEDS, QUICK = 300, 20
LARGEST = 300 * 2**20
"""Bytes that reading a folder of a few kilobytes may ask for."""

SMALL = {"width": 8, "mlp": SwiGLU(hidden=8)}
GATED = GatedAttention(heads=2, positions=Rotary(fraction=0.5), query_key_norm=True)
MODELS = {
    "llama": LanguageModel(stages=repeat(Attention(heads=2, positions=Rotary()), depth=1), **SMALL),
    "qwen3_5_text": LanguageModel(
        stages=repeat(GatedDeltaNet(heads=2, kernel=2, norm_epsilon=1e-6), GATED, depth=2), **SMALL
    ),
    "mamba2": LanguageModel(width=8, stages=repeat(Mamba2(heads=2, key_dim=4), depth=1), norm=RMSNorm(epsilon=1e-5)),
    "own": LanguageModel(stages=repeat(Attention(heads=2), depth=1), **SMALL),
}


class Bomb:
    """What a pickle would do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def truncated(rng, folder, marker):
    path = folder / rng.choice(["model.safetensors", "config.json"])
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(0, len(data) - 1))])


def flipped_length(rng, folder, marker):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(rng.integers(0, 8))] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(data)


def wrong_dtype(rng, folder, marker):
    header, body = header_of(folder / "model.safetensors")
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    header[name]["dtype"] = str(rng.choice(["I32", "U8", "BOOL", "F8_E4M3", "I64", "F99", "", "O", "F16"]))
    write_header(folder / "model.safetensors", header, body)


def huge_shape(rng, folder, marker):
    header, body = header_of(folder / "model.safetensors")
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    shape = [int(2 ** rng.integers(30, 63)) for _ in header[name]["shape"]]
    start = header[name]["data_offsets"][0]
    end = start + 4 * int(np.prod([size % 2**31 for size in shape], dtype=object)) if rng.random() < 0.5 else 2**62
    header[name] |= {"shape": shape} | ({"data_offsets": [start, end]} if rng.random() < 0.7 else {})
    write_header(folder / "model.safetensors", header, body)


def overlapping(rng, folder, marker):
    header, body = header_of(folder / "model.safetensors")
    names = sorted(set(header) - {"__metadata__"})
    one, two = rng.choice(names, 2, replace=False)
    header[one]["data_offsets"] = [n + int(rng.choice([-4, 0, 4])) for n in header[two]["data_offsets"]]
    header[two]["data_offsets"] = [-8, 2**63]
    write_header(folder / "model.safetensors", header, body)


def pickled(rng, folder, marker):
    bomb = pickle.dumps(Bomb(marker), protocol=int(rng.integers(0, 6)))
    names = ["model.safetensors", "pytorch_model.bin", "config.json"]
    name = rng.choice(names + ["tokenizer.json"] * (folder / "tokenizer.json").exists())
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bomb)


TRICKS = ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "a/../../b", "\0", ".", "..", "", "__class__", "a" * 4000]
TRICKS += ["stack..stages", "\n\nerror: all is well", "$(touch marker)", "{0.__class__}", "%s%s%s%n", "\u202egnp.exe"]


def tricky_name(rng, folder, marker):
    trick = str(rng.choice(TRICKS))
    if rng.random() < 0.5 and not (folder / "manifest.json").exists():
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"weight_map": {"model.norm.weight": trick, trick: "model-1.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return
    header, body = header_of(folder / "model.safetensors")
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    header = {(trick if key == name else key): value for key, value in header.items()}
    write_header(folder / "model.safetensors", header, body)


def unknown_class(rng, folder, marker):
    name = rng.choice(["os.system", "os:system", "builtins.eval", "subprocess.Popen", "Attention2", "__import__('os')"])
    change(folder, ["model_type", "class"], str(name))


def code_of_its_own(rng, folder, marker):
    (folder / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    name = str(rng.choice(["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"]))
    change(folder, ["auto_map"], {name: str(rng.choice(["modeling_evil.Model", "evil/repo--modeling_evil.Model"]))})


VALUES = [
    0,
    -1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    -0.5,
    True,
    None,
    "",
    "x",
    [],
    {},
    [[[]]],
    "9",
]


def strange_number(rng, folder, marker):
    """Changes a number that sizes depend on, wherever it stands."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    places = []

    def walk(value):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                walk(inner)
            elif type(inner) is int and inner > 1:
                places.append((value, key))

    walk(fields)
    where, key = places[int(rng.integers(len(places)))]
    where[key] = VALUES[int(rng.integers(len(VALUES)))]
    path.write_text(json.dumps(fields))


def nested_json(rng, folder, marker):
    depth = int(rng.choice([10, 1000, 100_000]))
    name = rng.choice(["config.json", "manifest.json" if (folder / "manifest.json").exists() else "config.json"])
    (folder / name).write_text('{"a":' * depth + "1" + "}" * depth if rng.random() < 0.5 else "[" * depth)


def flipped_bits(rng, folder, marker):
    path = rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, min(len(data), 4096), 5):
        data[int(at)] ^= 1 << int(rng.integers(0, 8))
    path.write_bytes(data)


def links_and_folders(rng, folder, marker):
    path = folder / rng.choice(["model.safetensors", "config.json"])
    path.unlink()
    kind = rng.integers(3)
    if kind == 0:
        path.mkdir()
    else:
        path.symlink_to("/etc/passwd" if kind == 1 else path)


MUST_FAIL = [truncated, huge_shape, overlapping, code_of_its_own, unknown_class, nested_json, links_and_folders]
MUST_FAIL += [flipped_length, wrong_dtype, pickled, tricky_name]
MAY_PASS = [strange_number, flipped_bits]
"""A sign, a digit of a name of the run, a bit of a weight can be what a sound file has."""
KINDS = MUST_FAIL + MAY_PASS


def change(folder, names, value):
    """Sets the first of these fields that config.json has; the first of all where it has none."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    name = next((name for name in names if name in fields), names[0])
    path.write_text(json.dumps(fields | {name: value}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    for name, model in MODELS.items():
        if name == "own":
            export_safetensors(parameters(model), model, root / name, extra={})
        else:
            export_huggingface(parameters(model), model, root / name, facts=Facts(name), tokenizer=ByteTokenizer())
    return root


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.more] * (seed >= QUICK)) for seed in range(SEEDS)]
)
def test_a_hostile_folder_is_refused_in_one_line(folders, tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    damage = KINDS[seed % len(KINDS)]
    name = list(MODELS)[seed // len(KINDS) % len(MODELS)]
    folder, marker = tmp_path / "folder", tmp_path / "ran"
    shutil.copytree(folders / name, folder)
    damage(rng, folder, marker)
    monkeypatch.setattr(os, "system", lambda command: marker.touch())
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        (load_safetensors if name == "own" else import_huggingface)(folder)
        refused = ""
    except UserError as error:
        refused = str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST / 1024
    assert not marker.exists(), "something in the folder ran"
    assert refused or damage in MAY_PASS
    assert "\n" not in refused and len(refused) < 1000, refused
