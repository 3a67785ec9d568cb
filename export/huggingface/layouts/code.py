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
from recollect.layers.modules.positions import Rotary
from recollect.models import FunctionalModel, LanguageModel

CLASSES = {"recollect": "RecollectForCausalLM"}
CODE = "modeling_recollect.py"
LIBRARY = Path(__file__).parents[2] / "pytorch"
MIXERS = {
    "softmax": ("Attention", "SlidingWindow", "GatedAttention", "MixtureOfHeads"),
    "recurrence": ("DeltaNet", "GatedDeltaNet", "KimiDeltaAttention", "GatedLinearAttention", "Retention", "Mamba2"),
    "linear_attention": ("LinearAttention",),
    "convolutions": ("ShortConvolution", "BaseConvolution", "GatedConvolution"),
}
"""Classes of the library by file."""


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json.

    Raises:
      UserError: the library lacks a mixer of the model, or what the mixer is set to.
    """
    known = {name for names in MIXERS.values() for name in names}
    library = "".join((LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in MIXERS)
    known_fields = {*re.findall(r'"(\w+)"', library), *_HARMLESS}
    require(model.canon is None, "model.canon", model.canon, "the PyTorch library has none")
    require(model.residual == "stream", "model.residual", model.residual, "the PyTorch library adds to the stream")
    for number, mixer in enumerate(model.mixers):
        name = type(mixer).__name__
        require(name in known, f"layer {number}: mixer", mixer, f"the PyTorch library has {', '.join(sorted(known))}")
        positions = getattr(mixer, "positions", None)
        plain = positions is None or (type(positions) is Rotary and positions.scaling is None)
        require(plain, f"layer {number}: positions", positions, "the PyTorch library has unscaled rotary ones")
        require_defaults(mixer, f"layer {number}: {name}", known_fields)
        short = name != "BaseConvolution" or getattr(mixer, "kernel", None) is not None
        require(short, f"layer {number}: kernel", None, "the PyTorch library has short convolutions")
    return {
        "architectures": ["RecollectForCausalLM"],
        "model_type": "recollect",
        "auto_map": {"AutoConfig": f"{_MODULE}.RecollectConfig", "AutoModelForCausalLM": f"{_MODULE}.{_CLASS}"},
        "hidden_size": model.width,
        "num_hidden_layers": len(model.mixers),
        "recollect": to_json(model),
    }


_HARMLESS = {"dropout", "chunk", "balance", "balance_weight", "filter", "maximum_length", "time"}
"""Fields of training, of backends, and of long filters, which the library lacks."""
_MODULE, _CLASS = CODE.removesuffix(".py"), CLASSES["recollect"]


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
    """Returns the modelling file by name: the parts, the files of the mixers, the model."""
    used = {type(mixer).__name__ for mixer in model.mixers}
    files = [name for name, classes in MIXERS.items() if used & set(classes)]
    if "linear_attention" in files and "recurrence" not in files:
        files.insert(files.index("linear_attention"), "recurrence")
    bodies, lines = [], {"import dataclasses", "import torch"}
    for name in ("parts", *files):
        bodies.append(_body(name, lines))
    bodies.append(_body("model", lines))
    top = '"""A language model trained with Recollect, in plain PyTorch; written by its export."""\n\n'
    imports = sorted(lines, key=lambda line: (not line.startswith("import"), line))
    return {CODE: (top + "\n".join(imports) + "\n\n" + "\n\n".join(bodies)).encode("utf-8")}


def _body(name: str, imports: set[str]) -> str:
    """Returns a file of the library without its imports, which are collected, its docstring as a comment."""
    text = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
    docstring, _, rest = text.removeprefix('"""').partition('"""\n')
    own = "|".join(("parts", *MIXERS))
    lines = []
    for line in rest.splitlines():
        if re.match(r"(import|from) ", line):
            if not re.match(rf"from ({own}) ", line):
                imports.add(line)
        else:
            lines.append(line)
    comment = "\n".join(f"# {line}".rstrip() for line in docstring.strip().splitlines())
    return comment + "\n\n\n" + "\n".join(lines).strip() + "\n"
