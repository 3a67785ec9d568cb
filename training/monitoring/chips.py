"""Peaks of accelerators from their makers' data sheets: dense bf16 products, memory, and links to neighbours.

Easy to get wrong: NVIDIA's sheets give products with 2:4 sparsity, twice what dense ones reach; and the PCIe and NVL
variants of a GPU are slower than the SXM one of the same name.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax counts them.

    Attributes:
      name: as people call it.
      flops: dense bf16 floating-point operations per second.
      bandwidth: bytes per second between the chip and its memory.
      memory: bytes a program may use.
      link: bytes per second that leave the chip for others in its slice or node, all links together, one way; 0 where
        it has none.
      clock: cycles per second of a TPU, from `flops` and its matrix units (4 of 128 x 128 in v5e, 8 in v5p, 4 of 256 x
        256 in v6e); else 0.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float = 0.0
    clock: float = 0.0


# By the start of jax's device kind; the longest that fits counts.
_CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 1555e9, 40 * 10**9, 300e9),
    "NVIDIA A100-PCIE-40GB": Chip("A100 PCIe 40GB", 312e12, 1555e9, 40 * 10**9),
    "NVIDIA A100": Chip("A100 80GB", 312e12, 2039e9, 80 * 10**9, 300e9),
    "NVIDIA L4": Chip("L4", 121e12, 300e9, 24 * 10**9),
    "NVIDIA L40S": Chip("L40S", 362e12, 864e9, 48 * 10**9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 2000e9, 80 * 10**9),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 3900e9, 94 * 10**9),
    "NVIDIA H100": Chip("H100", 989e12, 3350e9, 84_978_434_048, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 4800e9, 141 * 10**9, 450e9),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 4800e9, 141 * 10**9),
    "NVIDIA GH200": Chip("GH200", 989e12, 4000e9, 96 * 10**9, 450e9),
    "NVIDIA B200": Chip("B200", 2250e12, 8000e9, 180 * 10**9, 900e9),
    "NVIDIA GB200": Chip("GB200", 2500e12, 8000e9, 186 * 10**9, 900e9),
    "TPU v4": Chip("TPU v4", 275e12, 1228e9, 32 * GIB, 300e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 819e9, 16 * GIB, 200e9, 1.5e9),
    "TPU v5e": Chip("TPU v5e", 197e12, 819e9, 16 * GIB, 200e9, 1.5e9),
    "TPU v5": Chip("TPU v5p", 459e12, 2765e9, 95 * GIB, 600e9, 1.75e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 1640e9, 32 * GIB, 400e9, 1.75e9),
    "TPU v6e": Chip("TPU v6e", 918e12, 1640e9, 32 * GIB, 400e9, 1.75e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a jax device kind ("NVIDIA H100 80GB HBM3", "TPU v5 lite"), None for unlisted ones."""
    fitting = [kind for kind in _CHIPS if device_kind.startswith(kind)]
    return _CHIPS[max(fitting, key=len)] if fitting else None
