"""Times a training step of every mixer that the field compares, in turns with attention's, at the setting of recall.

    python main.py bench field [--mixers mamba2 rwkv7] [--out]

The models are those of experiments/field.py: a convolution, then the mixer, width 64, batches of 64 examples of 64
tokens, AdamW, fp32, data included. A call is 20 steps in one program. Each mixer takes turns with attention, so that
whatever else the machine does meets both; "x attention" is the ratio of the two medians.
"""

import jax

from recollect.benchmarks import recall_breakdown, reporting, timing
from recollect.experiments import field
from recollect.models import count
from recollect.training import Program

OPTIONS = {
    "mixers": {"nargs": "+", "default": list(field.VARIANTS), "metavar": "NAME", "help": "of experiments/field.py"},
    "turns": reporting.number(5, "turns of which the median is taken"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; prints and keeps one row per mixer.

    Raises:
      UserError: an option that does not fit.
    """
    parser = reporting.Parser("field", __doc__, OPTIONS, "field.json")
    options = parser.parse(arguments, positive=("turns",), known={"mixers": tuple(field.VARIANTS)})
    reporting.print_device()
    print(f"{'mixer':28}{'ms per step':>12}{'attention':>11}{'x attention':>13}{'parameters':>12}{'others':>8}")
    attention, rows = recall_breakdown.whole_step(Program(field.variant("attention"))), []
    for name in options.mixers:
        program = Program(field.variant(name))
        sides = {"mixer": recall_breakdown.whole_step(program), "attention": attention}
        for call in sides.values():
            jax.block_until_ready(call())
        load = timing.OtherLoad()
        times = timing.time_in_turns(sides, turns=options.turns, warm_up=False)
        row = {
            "mixer": name,
            **{f"{side}_ms": 1e3 * seconds / recall_breakdown.STEPS for side, seconds in times.items()},
            "x_attention": times["mixer"] / times["attention"],
            "parameters": count(jax.eval_shape(program.init, 0)["params"]),
            "cores_of_others": load.cores(),
        }
        rows.append(row)
        print(
            f"{name:28}{row['mixer_ms']:12.1f}{row['attention_ms']:11.1f}{row['x_attention']:13.2f}"
            f"{row['parameters']:12,}{row['cores_of_others']:8.2f}",
            flush=True,
        )
        reporting.keep(options.out, "field.json", "field", arguments, {"rows": rows}, unfinished=name)
    reporting.keep(options.out, "field.json", "field", arguments, {"rows": rows})
    return 0
