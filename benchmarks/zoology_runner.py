"""Times Zoology's own training loop, in a process of its own, for benchmarks/recall_training.py.

Runs under the interpreter that has PyTorch (`--zoology-python`), imports `zoology` from the checkout it is given, and
answers requests (peer_side.py):

    {"op": "facts"}                     -> {"versions": {...}, "threads": n, "patches": [...], "stubs": [...]}
    {"op": "build", "case": {...}}      -> {"parameters": n}
    {"op": "train", "steps": n}         -> {"step_seconds": [...], "data_seconds": s, "examples": n, "loss": x}

Zoology's snapshot d88d6f5 (2026-01-11) does not train a recall task out of the box. Two faults are worked around when
it runs, by changing default arguments, never its files:
1. `TokenEmbeddings` makes its weights on device "cuda" and nothing passes another device on: the default becomes "cpu".
2. `LanguageModel.forward` returns hidden vectors by default, and the trainer takes their cross-entropy as if they were
   logits: the default becomes logits.
Packages it imports without using them here (torchvision, wandb, ...) are replaced by empty stand-ins where they are
missing.

What is timed is its Trainer on its own batches: slicing the batch, forward, backward, AdamW and loss.item(), from one
call of its logger to the next. Its data are made before training; that is timed apart, and fresh examples are made for
every call.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import sys
import time
import types

from recollect.benchmarks.peer_side import serve

NAMES = ("torchvision", "wandb", "opt_einsum", "causal_conv1d", "fla")
"""What Zoology may import at the top of modules used here, none of it called on a CPU with these mixers."""

CONVOLUTION = {"kernel_size": 3, "implicit_long_conv": True}
ATTENTION = {"num_heads": 1, "dropout": 0.0}
BASED = {
    "feature_dim": 8,
    "feature_name": "taylor_exp",
    "num_heads": 1,
    "num_key_value_heads": 1,
    "train_view": "quadratic",
}
"""Options of its mixers."""

PACKAGES = ("torch", "numpy", "pandas", "einops", "pydantic")


def set_default(function, name: str, value) -> bool:
    """Changes the default of one positional argument of `function`; False when it already is `value`.

    Raises:
      ValueError: `function` has no argument of that name with a default.
    """
    names, values = function.__code__.co_varnames[: function.__code__.co_argcount], function.__defaults__ or ()
    defaults = dict(zip(names[len(names) - len(values) :], values, strict=True))
    if name not in defaults:
        raise ValueError(
            f"{function.__qualname__} has no optional argument {name}: "
            "this is not the Zoology that the patches were written for"
        )
    function.__defaults__ = tuple((defaults | {name: value}).values())
    return defaults[name] != value


class StepClock:
    """Stands where Zoology's logger stands: notes the time at which each step is logged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.loss = float("nan")

    def log(self, metrics: dict) -> None:
        self.times.append(time.perf_counter())
        self.loss = float(metrics["train/loss"])


class Runner:
    """One model at a time of Zoology's, built and trained by its own code."""

    def __init__(self) -> None:
        # Before the stand-ins: PyTorch looks for opt_einsum itself and would take an empty module for it.
        import torch

        self.stubs = [name for name in NAMES if importlib.util.find_spec(name) is None]
        sys.modules.update({name: types.ModuleType(name) for name in self.stubs})
        if "torchvision" in self.stubs:
            # The one class that Zoology builds: an identity, as its drop rate is 0 here.
            operations = types.SimpleNamespace(StochasticDepth=torch.nn.Identity)
            sys.modules["torchvision.ops"] = sys.modules["torchvision"].ops = operations
        from zoology import model

        forward = model.LanguageModel.forward
        patches = {
            "TokenEmbeddings: default device cuda -> cpu": (model.TokenEmbeddings.__init__, "device", "cpu"),
            "LanguageModel.forward: returns hidden vectors by default -> logits": (forward, "return_embeddings", False),
        }
        self.patches = [text for text, patch in patches.items() if set_default(*patch)]
        self.threads, self.turn = torch.get_num_threads(), 0

    def facts(self) -> dict:
        return {
            "versions": {
                "python": sys.version.split()[0],
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "threads": self.threads,
            "patches": self.patches,
            "stubs": self.stubs,
        }

    def build(self, case: dict) -> dict:
        from zoology import config, model, train, utils

        utils.set_determinism(0)
        length = {"l_max": case["length"]}
        convolution = {"name": "zoology.mixers.base_conv.BaseConv", "kwargs": {**CONVOLUTION, **length}}
        second = {
            "attention": {"name": "zoology.mixers.attention.MHA", "kwargs": ATTENTION},
            "based": {"name": "zoology.mixers.based.Based", "kwargs": {**BASED, **length}},
        }[case["mixer"]]
        settings = config.ModelConfig(
            sequence_mixer=config.ModuleConfig(
                name="zoology.mixers.hybrid.Hybrid", kwargs={"configs": [convolution, second]}
            ),
            state_mixer=config.ModuleConfig(name="torch.nn.Identity"),
            d_model=case["width"],
            n_layers=2,
            vocab_size=case["vocabulary"],
            max_position_embeddings=0,
            embed_dropout=case["embedding_dropout"],
        )
        network = model.LanguageModel(settings)
        trainer = train.Trainer(
            network,
            train_dataloader=None,
            test_dataloader=None,
            max_epochs=0,
            learning_rate=case["learning_rate"],
            weight_decay=case["weight_decay"],
            device="cpu",
            logger=StepClock(),
        )
        # No epochs: its own fit() makes the loss, the optimizer and the schedule, and returns.
        trainer.fit()
        self.case, self.trainer = case, trainer
        return {"parameters": sum(parameter.numel() for parameter in network.parameters())}

    def train(self, steps: int) -> dict:
        from zoology import config
        from zoology.data import multiquery_ar, utils

        case, trainer, batch = self.case, self.trainer, self.case["batch_size"]
        segment = multiquery_ar.MQARConfig(
            vocab_size=case["vocabulary"],
            num_examples=steps * batch,
            input_seq_len=case["length"],
            num_kv_pairs=case["pairs"],
            random_non_queries=True,
        )
        self.turn += 1
        data = config.DataConfig(train_configs=[segment], test_configs=[], batch_size=batch, seed=self.turn)
        start = time.perf_counter()
        trainer.train_dataloader, _ = utils.prepare_data(data)
        data_seconds = time.perf_counter() - start
        clock = trainer.logger = StepClock()
        clock.times.append(time.perf_counter())
        trainer.train_epoch(0)
        return {
            "step_seconds": [after - before for before, after in itertools.pairwise(clock.times)],
            "data_seconds": data_seconds,
            "examples": steps * batch,
            "loss": clock.loss,
        }


def answer(runner, request: dict) -> dict:
    """Returns the runner's answer to one request.

    Its progress bar and prints go nowhere: the time to format them stays in, as in its normal use.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return getattr(runner(), request.pop("op"))(**request)


def main() -> None:
    """Answers requests until there are no more; the first one imports Zoology."""
    sys.path.insert(0, sys.argv[1])
    serve(functools.partial(answer, functools.cache(Runner)))


if __name__ == "__main__":
    main()
