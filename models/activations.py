"""The output of each part of a model, one after another."""

import dataclasses
from collections.abc import Iterator

from jaxtyping import Array, Float, Int

from recollect.layers.convolved import streaming
from recollect.layers.first_values import holding
from recollect.layers.mixer import Context
from recollect.layers.modules.dropout import layer_keys
from recollect.layers.recurrent import Stream
from recollect.models.language_model import LanguageModelModule
from recollect.models.other_blocks import NormalisedBlock


def activations(
    model: LanguageModelModule, tokens: Int[Array, "b t"], context: Context = Context()
) -> Iterator[tuple[str, Float[Array, "b t d"]]]:
    """Yields the output of each part, in the order of `model.hidden`, which takes the same arguments: ("embedding", x),
    ("layer 0 Attention mixer", ...), ("layer 0 Attention mlp", ...), ..., ("final norm", ...). A mixer's and an MLP's
    is what they add to the stream."""
    x, context, layout = model.enter(tokens, context)
    yield "embedding", x
    keys = None if context.key is None else layer_keys(context.key, 0, 1, len(model.config.mixers))[0]
    values = None
    for index, (config, block) in enumerate(zip(model.config.mixers, model.stack.layers(), strict=True)):
        context = dataclasses.replace(context, key=None if keys is None else keys[index])
        name = f"layer {index} {type(config).__name__}"
        with streaming(Stream(context)), holding(values) as held:
            y = block.mixer_norm(x)
            mixed = block.mixer(y, context).hidden
        values = held.values
        yield f"{name} mixer", mixed
        normalised = isinstance(block, NormalisedBlock)
        x = (y if normalised else x) + mixed
        if block.mlp is not None and block.mlp_norm is not None:
            with streaming(Stream(context)):
                y = block.mlp_norm(x)
                mapped = block.mlp(y)
            yield f"{name} mlp", mapped
            x = (y if normalised else x) + mapped
    yield "final norm", model.leave(x, layout)
