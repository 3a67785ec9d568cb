"""Times one peer of kernel_peers.py (flash-linear-attention or torch) at the size of this project's first timing of the
same operation.

    python -m recollect.benchmarks.first_contact.peers NAME --gate FILE --seconds N

It compiles and tunes at once, and is timed when its turn comes. Nothing of jax is imported. Where a peer refuses its
backward pass on this machine, its forward pass counts all the same, and the refusal is recorded beside it.
"""

from recollect.benchmarks import kernel_peers
from recollect.benchmarks.first_contact import child, records

WIDE = {"b": 4, "t": 4096, "h": 64, "k": 128, "v": 128}
SIZES = {
    "causal_attention": {"b": 4, "t": 4096, "h": 16, "k": 128, "v": 128},
    "sliding_attention": {"b": 1, "t": 16384, "h": 16, "k": 128, "v": 128, "w": 512},
    "based": {"b": 8, "t": 2048, "h": 16, "k": 16, "v": 64},
    "short_conv": {"b": 16, "t": 8192, "d": 2048},
}


def main() -> None:
    options = child.arguments(kernel_peers.PEERS)
    sizes = SIZES.get(options.name, WIDE)
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
