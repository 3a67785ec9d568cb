"""Landmark attention, and the model that puts landmarks among its tokens. The state is all keys, unrotated, and values,
each at the place of its token in the row."""

import torch
from model import RecollectForCausalLM
from parts import Tokens, mixer
from softmax import Attention
from torch import nn
from torch.nn import functional as F


@mixer
class Landmark(Attention):
    """w_ij = main_i(j) in i's own block; main_i(landmark of j's block) softmax_{j's block}(s_ij) in an earlier one.

    main_i is the softmax over the tokens of i's block up to i and the landmarks of earlier blocks. With `retrieve` a
    query and head takes so many earlier blocks, those of the best landmarks, at positions no further than it was
    trained on: the newest so many where they are, each chosen older one in the slot of its rank.
    """

    def forward(self, x, tokens, state):
        q, k, v = self.project(x)
        repeats, size = self.heads // self.key_heads, self.config["block"] + 1
        blocks = int(tokens.positions.max()) // size + 1
        places = torch.where(tokens.real, tokens.positions, blocks * size)  # padding behind everything, and cut off
        after, by_block = {}, []
        for name, new in (("k", k), ("v", v)):
            kept = new.new_zeros(x.shape[0], blocks * size + 1, *new.shape[2:])
            if state is not None:
                kept[:, : state[name].shape[1]] = state[name]
            after[name] = kept.scatter(1, places[..., None, None].expand_as(new), new)[:, :-1]
            split = after[name].unflatten(1, (blocks, size)).repeat_interleave(repeats, 3)
            by_block.append(split.permute(0, 3, 1, 2, 4))
        keys, values = by_block
        attend = self.attend if self.config["retrieve"] is None else self.retrieve
        # Retrieval reads copies of its blocks, so few queries at once.
        pieces = [
            attend(part, keys, values, positions)
            for part, positions in zip(q.split(64, 1), tokens.positions.split(64, 1), strict=True)
        ]
        return self.output(torch.cat(pieces, 1).flatten(2)), after

    def attend(self, q, keys, values, positions):
        """Returns outputs (b, t, h, v) of queries (b, t, h, k) that read all blocks, (b, h, n, c, k) and (b, h, n, c,
        v)."""
        blocks, size = keys.shape[2:4]
        places = torch.arange(blocks * size, device=q.device).view(blocks, size)
        q, keys = self.rotated(q, positions), self.rotated(keys[..., None, :], places)[..., 0, :]
        scores = torch.einsum("bthk,bhnck->bthnc", q, keys)
        own = (positions // size)[..., None, None]
        number = torch.arange(blocks, device=q.device)
        weights = self.grouped(scores, number < own, number == own, positions)
        return torch.einsum("bthnc,bhncv->bthv", weights, values[..., :-1, :])

    def retrieve(self, q, keys, values, positions):
        """Returns the same of queries that read the blocks of the best landmarks, among equal ones the older."""
        blocks, size = keys.shape[2:4]
        most = min(self.config["retrieve"], blocks)
        before = positions // size
        near = positions % size + before.clamp(max=most + 1) * size
        number = torch.arange(blocks, device=q.device)
        landmarks = keys[..., -1, :].transpose(1, 2)
        # Sums of products, which rank equal landmarks equally wherever they are; a matrix product need not.
        there = self.rotated(q, positions)[:, :, None] * self.rotated(landmarks, (number + 1) * size - 1)[:, None]
        first = self.rotated(q, near)[:, :, None] * self.rotated(landmarks, torch.full_like(number, size - 1))[:, None]
        before = before[..., None, None]
        recent = before - number[:, None] <= most
        scores = torch.where(recent, there.sum(-1), first.sum(-1)).masked_fill(number[:, None] >= before, -torch.inf)
        best = scores.sort(dim=2, descending=True, stable=True).indices[:, :, :most]
        chosen = best.sort(dim=2).values.transpose(2, 3)
        slots = torch.where(before > most, torch.arange(most, device=q.device) + (before - chosen <= most), chosen)
        earlier = F.pad(chosen < before, (0, 1))
        own = torch.arange(most + 1, device=q.device) == most
        chosen = torch.cat([chosen, before.expand(-1, -1, self.heads, -1)], -1)
        slots = torch.cat([slots, before.clamp(max=most + 1).expand(-1, -1, self.heads, -1)], -1)
        row, head = (torch.arange(size, device=q.device) for size in (q.shape[0], self.heads))
        at = row[:, None, None, None], head[:, None], chosen
        places = slots[..., None] * size + torch.arange(size, device=q.device)
        picked = self.rotated(keys[at][..., None, :], places)[..., 0, :]
        scores = torch.einsum("bthk,bthnck->bthnc", self.rotated(q, near), picked)
        weights = self.grouped(scores, earlier, own, positions)
        return torch.einsum("bthnc,bthncv->bthv", weights, values[at][..., :-1, :])

    def grouped(self, scores, earlier, own, positions):
        """Returns weights (b, t, h, n, c - 1) of the ordinary tokens of blocks whose scores are (b, t, h, n, c): which
        are before the queries' and which their own, each (b, t, h, n)."""
        scores = scores * self.head_dim**-0.5
        size, low = scores.shape[-1], torch.finfo(scores.dtype).min
        up_to = torch.arange(size - 1, device=scores.device) <= (positions % size)[..., None, None, None]
        gates = scores[..., -1].masked_fill(~earlier, low)
        inside = scores[..., :-1].masked_fill(~(own[..., None] & up_to), low)
        main = torch.cat([gates, inside.flatten(-2)], -1).softmax(-1)
        gates, inside = main.split([gates.shape[-1], inside[0, 0, 0].numel()], -1)
        return inside.unflatten(-1, (-1, size - 1)) + gates[..., None] * scores[..., :-1].softmax(-1)


class LandmarkForCausalLM(RecollectForCausalLM):
    """Puts a landmark after every `block` tokens of a row, and leaves its output out."""

    def __init__(self, config):
        super().__init__(config)
        model = config.recollect
        mixers = [mixer for stage in model["stages"] for mixer in stage["pattern"]]
        self.block = next(mixer["block"] for mixer in mixers if mixer["class"] == "Landmark")
        self.landmark = nn.Parameter(torch.empty(model["width"]))

    def enter(self, x, tokens):
        closes = tokens.real & ((tokens.positions + 1) % self.block == 0)
        sizes = 1 + closes.long()
        longer = int(sizes.sum(1).max())
        slots = longer - sizes.flip(1).cumsum(1).flip(1)
        after, places = slots + closes, tokens.positions + tokens.positions // self.block
        real = tokens.real.new_zeros(x.shape[0], longer).scatter(1, after, closes).scatter(1, slots, tokens.real)
        positions = places.new_zeros(x.shape[0], longer).scatter(1, after, places + 1).scatter(1, slots, places)
        landmarks = self.landmark.expand(x.shape[0], longer, -1)
        return landmarks.scatter(1, slots[..., None].expand_as(x), x), Tokens(real, positions), slots

    def leave(self, x, slots):
        return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
