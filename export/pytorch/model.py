"""The language model around the mixers, as a class of the transformers library: embedding, pre-norm blocks, head.

Decoding passes a list with one state per layer (`cache`), never the tokens before. Padding may stand on either side:
rows are turned so that it comes first, and turned back.
"""

import dataclasses

import torch
from block import BLOCKS
from parts import Tokens, norm_of
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RecollectConfig(PretrainedConfig):
    """`recollect` is the model's config in the JAX project, class names and values."""

    model_type = "recollect"

    def __init__(self, recollect=None, **settings):
        self.recollect = recollect
        super().__init__(**settings)


@dataclasses.dataclass
class Output(ModelOutput):
    """Loss (if there are labels), logits (b, t, z), and the states after the tokens."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: list | None = None


class RecollectForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; `generate` decodes from the states of its layers."""

    config_class = RecollectConfig
    _is_stateful = True
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        model = config.recollect
        stages = model["stages"]
        mixers = [mixer for stage in stages for _ in range(stage["repeats"]) for mixer in stage["pattern"]]
        self.embedding = nn.Embedding(config.vocab_size, model["width"])
        self.positions = None
        if model["positions"] is not None:
            self.positions = nn.Embedding(model["positions"]["maximum"], model["width"])
        block = BLOCKS[model["canon"] and model["canon"]["class"]]
        self.layers = nn.ModuleList(block(mixer, model, index) for index, mixer in enumerate(mixers))
        self.final_norm = norm_of(model["norm"], model["width"])
        self.head = nn.Linear(model["width"], config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids, attention_mask=None, labels=None, cache=None, use_cache=None, **ignored):
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -input_ids.shape[1] :].bool()
        order = real.int().argsort(dim=1, stable=True)  # padding first
        real, ids = real.gather(1, order), input_ids.gather(1, order)
        seen, states = (0, [None] * len(self.layers)) if cache is None else cache
        counted = real.long().cumsum(1)
        positions = (seen + counted - 1).clamp(min=0)
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        x, tokens, slots = self.enter(x, Tokens(real, positions))
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, tokens, state)
            after.append(state)
        x = self.final_norm(self.leave(x, slots))
        x = torch.empty_like(x).scatter(1, order[..., None].expand_as(x), x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(loss, logits, [seen + counted[:, -1:], after] if use_cache else None)

    def enter(self, x, tokens):
        """Returns what the layers take, vectors and tokens, and where the given ones are among these."""
        return x, tokens, None

    def leave(self, x, slots):
        """Returns the layers' outputs at the given tokens."""
        return x

    def prepare_inputs_for_generation(self, input_ids, cache=None, attention_mask=None, **ignored):
        if cache is not None:
            input_ids = input_ids[:, -1:]
        elif attention_mask is not None:
            # The last column predicts the first new token, so padding on the right goes to the left.
            order = attention_mask.argsort(dim=1, stable=True)
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "cache": cache, "use_cache": True}
