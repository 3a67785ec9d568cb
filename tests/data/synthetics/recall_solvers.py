"""Answers to examples of recall tasks (as in solvers.py): the variants of MQAR, joint recall, MAD."""

import itertools


def forgetting_mqar(task, tokens):
    tokens, context = list(tokens), 2 * (task.pairs + round(task.updated * task.pairs)) * task.passes
    values = dict(zip(tokens[:context:2], tokens[1:context:2], strict=True))
    assert len(values) == task.pairs
    return {place: values[tokens[place]] for place in range(context, len(tokens)) if tokens[place] in values}


def compositional_mqar(task, tokens):
    tokens, context = list(tokens), 3 * task.pairs * task.passes
    values = {(tokens[place], tokens[place + 1]): tokens[place + 2] for place in range(0, context, 3)}
    assert len({first for first, _ in values}) ** 2 == len(values) == task.pairs
    places = range(context, len(tokens) - 1)
    return {place + 1: values[pair] for place in places if (pair := tuple(tokens[place : place + 2])) in values}


def asked_first_mqar(task, tokens):
    tokens, asked = list(tokens), round(task.asked * task.pairs)
    start = asked if task.before else 0
    end = start + 2 * task.pairs * task.passes
    values = dict(zip(tokens[start:end:2], tokens[start + 1 : end : 2], strict=True))
    labels = {place: values[tokens[place]] for place in range(end, len(tokens)) if tokens[place] in values}
    assert len(labels) == asked and (not start or {tokens[place] for place in labels} == set(tokens[:start]))
    return labels


def noisy_mqar(task, tokens):
    tokens, size = list(tokens), task.key_tokens
    context = (size + 1) * task.pairs * task.passes
    values = {tuple(tokens[p : p + size]): tokens[p + size] for p in range(0, context, size + 1)}
    labels = {}
    for place in range(context, len(tokens) - size + 1):
        window = tokens[place : place + size]
        same, value = max((sum(a == b for a, b in zip(key, window, strict=True)), v) for key, v in values.items())
        if same >= size - task.replaced:
            assert same == size - task.replaced
            labels[place + size - 1] = value
    return labels


def joint_recall(task, tokens):
    tokens, third, values, labels = list(tokens), task.vocab_size // 3, {}, {}
    for place, token in enumerate(tokens):
        if token < third:
            context = token
        elif token < 2 * third:
            if (context, token) in values:
                labels[place] = values[context, token]
            else:
                values[context, token] = tokens[place + 1]
    assert len(values) == task.contexts * task.keys
    return labels


def in_context_recall(task, tokens):
    tokens, values, labels = list(tokens), {}, {}
    for place in range(0, len(tokens), 2):
        key = tokens[place]
        if key < task.vocab_size - task.noise_tokens:
            if key in values:
                labels[place] = values[key]
            elif place + 1 < len(tokens):
                values[key] = tokens[place + 1]
            assert place + 1 == len(tokens) or tokens[place + 1] == values[key]
    assert len(tokens) - 1 in labels
    return labels


def fuzzy_recall(task, tokens):
    tokens, keys, values, labels = list(tokens), (task.vocab_size - 1) // 2, {}, {}
    padding = tokens.count(task.vocab_size - 1)
    runs, place = [], padding
    for _, run in itertools.groupby(tokens[padding:], lambda token: token < keys):
        runs.append((place, tuple(run)))
        place += len(runs[-1][1])
    if len(runs) % 2:  # of the last value, one token long, nothing is in the input
        runs.append((place, ()))
    for (_, key), (end, value) in zip(runs[::2], runs[1::2], strict=True):
        assert 1 <= len(key) <= task.key_tokens and len(set(key)) == len(key)
        if key in values:
            assert values[key] == value or (place == end + len(value) and values[key][:-1] == value)
            labels |= {end - 1 + number: token for number, token in enumerate(values[key])}
        values.setdefault(key, value)
    assert len(tokens) - 1 in labels
    return labels


def memorization(task, tokens, facts):
    return {place + 1: facts[tokens[place]] for place in range(0, len(tokens), 2)}
