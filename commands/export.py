"""Writes a run's newest checkpoint for other programs: safetensors, a Hugging Face folder, StableHLO or GGUF. Overrides
of the model convert it: its parameters go into other mixers."""

from __future__ import annotations

import argparse
from typing import Any

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration.base import UserError
from recollect.configuration.user_paths import path

FORMATS = ("safetensors", "huggingface", "stablehlo", "gguf")
FORMATS_OF: dict[str, tuple[str, ...]] = {
    "code": ("huggingface",),
    "license": ("huggingface", "gguf"),
    "max_length": ("stablehlo",),
    "shard_bytes": ("huggingface",),
}
"""Options that some formats alone have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("run", type=path, help="a run's folder (RUN:500: its step 500), or an export")
    parser.add_argument("out", type=path, help="a new folder, or with --overwrite an export")
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is in OUT")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--license", metavar="NAME", help="huggingface, gguf: of the model card")
    parser.add_argument("--shard-bytes", type=int, metavar="N", help="huggingface: split weights above this size")
    parser.add_argument("--code", action="store_true", help="huggingface: as code beside the weights")
    parser.add_argument("--max-length", type=int, metavar="N", help="stablehlo: tokens that a state has room for")
    text = "train the feature maps of a converted model so many steps, to mix as its attention did"
    parser.add_argument("--transfer", type=int, default=0, metavar="STEPS", help=text)
    add_overrides(parser, "model.stages.0.pattern.1=Landmark, which converts the model")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.training.checkpoint.exported import write_safetensors
    from recollect.training.checkpoint.load import open_run
    from recollect.training.checkpoint.named_run import run_at
    from recollect.training.run_folder import read_result
    from recollect.training.user_code import recorded_files

    for name, formats in FORMATS_OF.items():
        if getattr(options, name) not in (None, False) and options.format not in formats:
            only, flag = " or ".join(formats), name.replace("_", "-")
            raise UserError(f"--{flag}: for --format {only}, not {options.format}")
    load_files(options, options.run)
    run = open_run(options.run)
    folder, step = run_at(options.run)
    converts = bool(options.overrides or options.transfer)
    if converts:
        run = _converted(run, options)
    if options.format in ("huggingface", "gguf"):
        names = write_layout(run, options, {} if step or converts else read_result(folder) or {})
    elif options.format == "stablehlo":
        names = write_stablehlo(run, options)
    else:
        names = write_safetensors(run, options.out, recorded_files(folder), options.overwrite)
    print("exported: " + ", ".join(str(options.out / name) for name in names))
    return 0


def _converted(run: Any, options: argparse.Namespace) -> Any:
    """Returns an opened run in the model that the overrides describe."""
    from recollect.configuration import apply_overrides
    from recollect.training.converted_run import converted_run

    experiment = apply_overrides(run.experiment, options.overrides, print)
    run, losses = converted_run(run, experiment, options.transfer)
    if losses:
        print(f"attention transfer: loss {losses[0]:.3g} at first, {losses[-1]:.3g} after {len(losses):,} steps")
    return run


def write_layout(run: Any, options: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """Writes an opened run, with numbers of its `result`, as a folder that transformers loads, or as a GGUF file;
    returns the names of its files."""
    from recollect.configuration import to_json
    from recollect.export.huggingface import Facts, export_huggingface
    from recollect.export.huggingface.folder import SHARD_BYTES
    from recollect.models.adaptation import merged

    shard_bytes = SHARD_BYTES if options.shard_bytes is None else options.shard_bytes
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: a file holds at least one byte")
    experiment, tokenizer = run.experiment, run.data.tokenizer
    params, model = merged(run.params, experiment.model, run.vocabulary)
    length = getattr(experiment.data, "length", 2048)
    facts = Facts(
        name=experiment.name,
        step=run.step,
        batch_tokens=experiment.run.batch_size * length,
        source=run.data.source,
        digest=run.data.digest,
        **measured(result, run),
        config=to_json(experiment),
        license=options.license or "unknown",
    )
    tokens = {"tokenizer": tokenizer, "maximum_length": length, "overwrite": options.overwrite}
    if options.format == "gguf":
        from recollect.export.gguf_format import export_gguf

        return export_gguf(params, model, options.out, facts=facts, **tokens)
    return export_huggingface(
        params, model, options.out, facts=facts, shard_bytes=shard_bytes, as_code=options.code, **tokens
    )


METRICS = ("accuracy", "exact", "bits_per_byte", "bits_per_token", "loss")


def measured(result: dict[str, Any], run: Any) -> dict[str, Any]:
    """Returns the fields of `Facts` about what result.json holds of an opened run: metrics, and intervals of those that
    it has enough of for one. Nothing where what it holds was measured at another step."""
    from recollect.evaluation import share_interval

    if result.get("steps") != run.step or result.get("status") == "preempted":
        return {}
    results = {name: result[name] for name in METRICS if isinstance(result.get(name), float)}
    if "intervals" in result:  # text
        on = f"{result['targets']:,} tokens of {result['documents']:,} held-out documents"
        return {"results": results, "intervals": result["intervals"], "measured_on": on}
    data = run.experiment.data
    if not data.made_on_device:
        return {"results": results}
    weights = [part.weight for part in data.evaluation_slices() if part.weight]
    # With unequal weights the mean varies at most as if there were so few slices of the largest.
    examples = data.evaluation_examples * sum(weights) / max(weights)
    intervals = {name: share_interval(results[name], examples) for name in ("accuracy", "exact") if name in results}
    on = f"{data.evaluation_examples:,} examples of each of {len(weights)} slices; intervals are over examples"
    return {"results": results, "intervals": intervals, "measured_on": on}


def write_stablehlo(run: Any, options: argparse.Namespace) -> list[str]:
    """Writes an opened run as programs that jax runs without this project; returns the names of its files."""
    from recollect.export.stablehlo import export_stablehlo
    from recollect.models import FunctionalModel
    from recollect.models.adaptation import merged

    params, config = merged(run.params, run.experiment.model, run.vocabulary)
    length = getattr(run.experiment.data, "length", 2048) if options.max_length is None else options.max_length
    model = FunctionalModel(config, run.vocabulary)
    return export_stablehlo(params, model, options.out, maximum_length=length, overwrite=options.overwrite)
