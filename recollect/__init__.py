"""Recollect: efficient attention architectures in JAX.

The folders of the checkout, as one package: `from recollect.layers import SlidingWindow`.
"""

__version__ = "0.1.0"
