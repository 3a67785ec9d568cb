"""Times one peer of kernel_peers.py (flash-linear-attention or torch) at the size of this project's first timing of the
same operation.

    python -m recollect.benchmarks.first_contact.peers NAME --gate FILE --seconds N

It compiles and tunes at once, and is timed when its turn comes. Nothing of jax is imported. Where a peer refuses its
backward pass on this machine, its forward pass counts all the same, and the refusal is recorded beside it.
"""

from recollect.benchmarks import kernel_peers, kernel_shapes
from recollect.benchmarks.first_contact import child, records

SIZES = {
    "causal_attention": {**kernel_shapes.HEADS, **kernel_shapes.D128},
    "sliding_attention": {**kernel_shapes.LONG_HEADS, **kernel_shapes.D128, "w": 512},
    "based": kernel_shapes.TAYLOR,
    "short_conv": kernel_shapes.SHORT_LONG,
}


def main() -> None:
    options = child.arguments(kernel_peers.PEERS)
    sizes = SIZES.get(options.name, kernel_shapes.WIDE)
    case, what = (
        {"peer": options.name, "sizes": sizes},
        " ".join([options.name, *(f"{x}{n}" for x, n in sizes.items())]),
    )
    if records.rehearsing():
        # What needs a GPU is left out; what is rehearsed is that a peer which cannot run takes nothing with it.
        return records.write("failed", what=what, error="rehearsal: torch and a GPU are not here")
    case = {"peer": options.name, "sizes": sizes}
    with child.recording_failure(what):
        kernel_peers.measure(case)
        records.write("ready")
        child.wait(options.gate, options.seconds)
        child.launching(what)
        records.write("peer", what=what, sizes=sizes, **kernel_peers.measure(case))
    records.write("done")


if __name__ == "__main__":
    main()
