"""Models as code beside the weights, `trust_remote_code`: one file in plain PyTorch, assembled from those of
export/pytorch that the model's mixers need. config.json holds the model's config of this project, from which it is read
back; the code is for transformers alone and is never run here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recollect.configuration import Config, UserError, from_json, to_json
from recollect.configuration.io import flatten
from recollect.export.huggingface.requirements import HuggingFaceConfig, require, require_defaults
from recollect.export.huggingface.tensors import PLAIN, TRANSPOSED, LayerTensors, Tensor
from recollect.layers.modules import LayerNorm, RMSNorm
from recollect.layers.modules.positions import Rotary
from recollect.models import FunctionalModel, LanguageModel

CLASSES = {"recollect": "RecollectForCausalLM"}
CODE = "modeling_recollect.py"
LIBRARY = Path(__file__).parents[2] / "pytorch"
MIXERS = {
    "Attention": "softmax",
    "SlidingWindow": "softmax",
    "GatedAttention": "softmax",
    "MixtureOfHeads": "softmax",
    "Landmark": "landmark",
    "DeltaNet": "delta_rules",
    "GatedDeltaNet": "delta_rules",
    "KimiDeltaAttention": "delta_rules",
    "GatedLinearAttention": "decays",
    "Retention": "decays",
    "Mamba2": "decays",
    "LinearAttention": "linear_attention",
    "ShortConvolution": "convolutions",
    "BaseConvolution": "convolutions",
    "GatedConvolution": "convolutions",
    "Hyena": "hyena",
}
"""Files of the library by class."""


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json.

    Raises:
      UserError: the library lacks a mixer of the model, or what the mixer is set to.
    """
    has_norm = isinstance(model.norm, RMSNorm | LayerNorm)
    require(has_norm, "model.norm", model.norm, "the PyTorch library has RMSNorm and LayerNorm")
    require(model.residual == "stream", "model.residual", model.residual, "the PyTorch library adds to the stream")
    for number, mixer in enumerate(model.mixers):
        name = type(mixer).__name__
        require(name in MIXERS, f"layer {number}: mixer", mixer, f"the PyTorch library has {', '.join(sorted(MIXERS))}")
        positions = getattr(mixer, "positions", None)
        plain = positions is None or (type(positions) is Rotary and positions.scaling is None)
        require(plain, f"layer {number}: positions", positions, "the PyTorch library has unscaled rotary ones")
        # A window of several blocks is not read; the word is that of SlidingWindow's in a file that Landmark's imports.
        lacks = {"window"} if name == "Landmark" else set()
        require_defaults(mixer, f"layer {number}: {name}", _HARMLESS | _strings(_files(MIXERS[name])) - lacks)
        short = name != "BaseConvolution" or getattr(mixer, "kernel", None) is not None
        require(short, f"layer {number}: kernel", None, "the PyTorch library has short convolutions")
    name = "LandmarkForCausalLM" if model.landmark_block else CLASSES["recollect"]
    return {
        "architectures": [name],
        "model_type": "recollect",
        "auto_map": {"AutoConfig": f"{_MODULE}.RecollectConfig", "AutoModelForCausalLM": f"{_MODULE}.{name}"},
        "hidden_size": model.width,
        "num_hidden_layers": len(model.mixers),
        "recollect": to_json(model),
    }


_HARMLESS = {"dropout", "chunk", "balance", "balance_weight", "filter", "maximum_length", "time"}
"""Fields of training, of backends, and of long filters, which the library lacks."""
_MODULE = CODE.removesuffix(".py")


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError where it is none."""
    import recollect.layers  # whose configs it may name

    assert recollect.layers
    model: Config = from_json(config.table("recollect"))
    if not isinstance(model, LanguageModel):
        raise UserError(f"{config.where}: recollect is a {type(model).__name__}, not a LanguageModel")
    return model


def tensors_of(model: LanguageModel, kind: str = "recollect") -> list[Tensor]:
    """Returns the table of tensors: names of this project, but for "weight" in place of a linear map's "kernel"."""
    table = LayerTensors(model, "layers.{}.")
    shapes = {name: len(leaf.shape) for name, leaf in flatten(FunctionalModel(model, 1).abstract_params()).items()}
    for name in shapes:
        if not name.startswith("stack."):
            theirs = {"embedding": "embedding.weight", "positions.table": "positions.weight"}.get(name, name)
            linear = name == "head.kernel"
            table.add("head.weight" if linear else theirs, name, TRANSPOSED if linear else PLAIN)
    for number, (place, repeat, _) in enumerate(table.places):
        for name, dimensions in shapes.items():
            if name.startswith(place + "."):
                linear = name.endswith(".kernel") and dimensions == 3
                theirs = name.removeprefix(place + ".")
                theirs = theirs.removesuffix("kernel") + "weight" if linear else theirs
                form = TRANSPOSED if linear else PLAIN
                table.tensors.append(Tensor(f"layers.{number}.{theirs}", ((name, repeat),), form))
    return table.tensors


def code_of(model: LanguageModel) -> dict[str, bytes]:
    """Returns the modelling file by its name: the library's files that the model needs, imported ones first."""
    files = [MIXERS[type(mixer).__name__] for mixer in model.mixers]
    lines = {"import torch"}
    bodies = [_body(name, lines) for name in _files(*files, *(["canon"] if model.canon else []), "model")]
    top = '"""A language model trained with Recollect, in plain PyTorch; written by its export."""\n\n'
    imports = sorted(lines, key=lambda line: (not line.startswith("import"), line))
    return {CODE: (top + "\n".join(imports) + "\n\n" + "\n\n".join(bodies)).encode("utf-8")}


_IMPORT = re.compile(r"^(?:import|from) (\w+).*\n", re.MULTILINE)


def _text(name: str) -> str:
    return (LIBRARY / f"{name}.py").read_text(encoding="utf-8")


def _files(*names: str) -> list[str]:
    """Returns the names of these files of the library and of those that they import, imported ones first."""
    ordered: list[str] = []
    for name in names:
        needed = [other for other in _IMPORT.findall(_text(name)) if (LIBRARY / f"{other}.py").exists()]
        ordered += [other for other in (*_files(*needed), name) if other not in ordered]
    return ordered


def _strings(files: list[str]) -> set[str]:
    """Returns the words in quotes of some files of the library: all fields of configs that they read are among them."""
    return {word for name in files for word in re.findall(r'"(\w+)"', _text(name))}


def _body(name: str, imports: set[str]) -> str:
    """Returns a file of the library without its imports, which are collected, its docstring as a comment."""
    docstring, _, rest = _text(name).removeprefix('"""').partition('"""\n')
    imports |= {line[0].strip() for line in _IMPORT.finditer(rest) if not (LIBRARY / f"{line[1]}.py").exists()}
    comment = "\n".join(f"# {line}".rstrip() for line in docstring.strip().splitlines())
    return comment + "\n\n\n" + _IMPORT.sub("", rest).strip() + "\n"
