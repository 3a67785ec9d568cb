"""Landmark attention written a query at a time in numpy float64, from the paper's description: an oracle for the
kernels.

Independent of `pallas_kernels`: no code is shared, and groups are dicts of blocks, not masks.
"""

from __future__ import annotations

import numpy as np


def softmax(scores: dict) -> dict:
    high = max(scores.values())
    weights = {key: np.exp(score - high) for key, score in scores.items()}
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def rotate(x: np.ndarray, position: float, base: float = 10_000.0) -> np.ndarray:
    """Rotary positions on one vector, first half paired with second."""
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def grouped(
    scores: dict[int, dict[int, float]], own: dict[int, float], landmarks: dict[int, float]
) -> dict[int, float]:
    """Weights of keys: `own` and `landmarks` by key and by block share one softmax; each block's `scores` have their
    own."""
    main = softmax({**{("own", j): s for j, s in own.items()}, **{("block", n): s for n, s in landmarks.items()}})
    weights = {j: main["own", j] for j in own} if own else {}
    for n, inside in scores.items():
        for j, weight in softmax(inside).items():
            weights[j] = main["block", n] * weight
    return weights


def document_of(row: int, segment: int, positions: np.ndarray, segments: np.ndarray) -> dict[int, int]:
    """Key index -> position, for the keys of one document."""
    return {j: int(positions[row, j]) for j in range(positions.shape[1]) if segments[row, j] == segment}


def training_weights(q, k, block, scale, q_positions, k_positions, q_segments, k_segments) -> np.ndarray:
    """(b, h, t, s) weights of the grouped softmax."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    found = np.zeros((b, h, t, s))
    for row in range(b):
        for i in range(t):
            if q_segments[row, i] == 0:
                continue
            here = int(q_positions[row, i])
            keys = {j: p for j, p in document_of(row, q_segments[row, i], k_positions, k_segments).items() if p <= here}
            for head in range(h):
                score = {j: scale * float(q[row, i, head] @ k[row, j, head // (h // g)]) for j in keys}
                own, marks, inside = {}, {}, {}
                for j, p in keys.items():
                    number, place = divmod(p, block + 1)
                    if number == here // (block + 1):
                        if place != block:
                            own[j] = score[j]
                    elif place == block:
                        marks[number] = score[j]
                    else:
                        inside.setdefault(number, {})[j] = score[j]
                for j, weight in grouped(inside, own, marks).items():
                    found[row, head, i, j] = weight
    return found


def retrieval(q, k, v, block, top, scale, q_positions, k_positions, q_segments, k_segments, window=1):
    """(b, t, h, v) outputs with stingy positions, unrotated q and k, and the largest position that any vector was
    turned by for queries with more than `top` blocks before their window of so many blocks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, h, _ = q.shape
    g, c, furthest = k.shape[2], block + 1, 0
    out = np.zeros((b, t, h, v.shape[3]))
    for row in range(b):
        for i in range(t):
            if q_segments[row, i] == 0:
                continue
            place, inside = divmod(int(q_positions[row, i]), c)
            here = place // window * window  # how many blocks are before the window
            at = {p: j for j, p in document_of(row, q_segments[row, i], k_positions, k_segments).items()}
            shifted = here > top
            slot_of_query = top + 1 if shifted else here
            where_query = (slot_of_query + place - here) * c + inside
            for head in range(h):
                group = head // (h // g)
                turned = rotate(q[row, i, head], where_query)

                def score(block_number, place, slot, turned=turned, group=group, at=at, row=row):
                    return scale * float(turned @ rotate(k[row, at[block_number * c + place], group], slot * c + place))

                def rank(n, score=score, shifted=shifted, here=here):
                    recent = here - n <= top
                    return score(n, block, (top + 1 - (here - n) if recent else 0) if shifted else n)

                best = sorted(sorted(range(here), key=rank, reverse=True)[:top])
                places = {n: (index + (1 if here - n <= top else 0)) if shifted else n for index, n in enumerate(best)}
                places |= {n: slot_of_query + n - here for n in range(here, place)}
                slot = slot_of_query + place - here
                own = {at[place * c + p]: score(place, p, slot) for p in range(min(inside + 1, block))}
                marks = {n: score(n, block, slot) for n, slot in places.items()}
                cross = {n: {at[n * c + p]: score(n, p, slot) for p in range(block)} for n, slot in places.items()}
                for j, weight in grouped(cross, own, marks).items():
                    out[row, i, head] += weight * v[row, j, group]
                if shifted:
                    furthest = max(furthest, where_query, *(slot * c + block for slot in places.values()))
    return out, furthest
