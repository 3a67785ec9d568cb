"""Answers to examples of tasks, written from the definition of each task, one example at a time, without its code.

A solver takes the task and the tokens of one example, and returns the label of each labelled position.
"""

import itertools


def replies(tokens, first, answer):
    """Labels of an answer whose first token is due at position `first`."""
    return {first + place: token for place, token in enumerate(answer)}


def permutation_product(size, even=False):
    """Elements of a group of permutations in order, and their product: the left one acts first."""

    def parity(one):
        return sum(left > right for left, right in itertools.combinations(one, 2)) % 2

    elements = [one for one in itertools.permutations(range(size)) if not (even and parity(one))]
    return elements, lambda left, right: tuple(right[left[place]] for place in range(size))


def state_tracking(task, tokens):
    if task.group in ("Z2", "Z60"):
        order = int(task.group[1:])
        elements, product = list(range(order)), lambda left, right: (left + right) % order
    elif task.group == "A4xZ5":
        fours, compose = permutation_product(4, even=True)
        elements = [(four, five) for four in fours for five in range(5)]
        product = lambda left, right: (compose(left[0], right[0]), (left[1] + right[1]) % 5)  # noqa: E731
    else:
        elements, product = permutation_product(int(task.group[1:]), even=task.group[0] == "A")
    state, labels = None, {}
    for place, token in enumerate(tokens):
        state = elements[token] if state is None else product(state, elements[token])
        labels[place] = elements.index(state)
    return labels if task.labels == "all" else {place: labels[place]}


def needles(task, tokens):
    tokens, k, v = list(tokens), task.key_tokens, task.value_tokens
    values, labels, place = {}, {}, 0
    while place < len(tokens):
        if tokens[place] == 0:
            key = tuple(tokens[place + 1 : place + 1 + k])
            values.setdefault(key, []).extend(tokens[place + 1 + k : place + 1 + k + v])
            place += k + v
        elif tokens[place] == 1:
            answer = values[tuple(tokens[place + 1 : place + 1 + k])]
            assert len(answer) == task.values * v
            labels |= replies(tokens, place + k, answer)
            place += k + len(answer)
        place += 1
    return labels


def variable_tracking(task, tokens):
    tokens = list(tokens)
    value_of, ask = {}, tokens.index(1)
    for place in range(ask):
        if tokens[place] == 0:
            name, source = tokens[place + 1 : place + 3]
            value_of[name] = value_of.get(source, source)
    return replies(tokens, ask + 1, [name for name, value in value_of.items() if value == tokens[ask + 1]])


def common_words(task, tokens):
    tokens = list(tokens)
    ask = tokens.index(1)
    listed = [word for word in tokens[:ask] if word]
    return replies(tokens, ask, [word for word in dict.fromkeys(listed) if listed.count(word) == task.often])


def frequent_words(task, tokens):
    tokens = list(tokens)
    ask = tokens.index(1)
    words = sorted(set(tokens[:ask]) - {0}, key=tokens[:ask].count, reverse=True)
    return replies(tokens, ask, words[: task.answers])


def set_disjointness(task, tokens):
    tokens = list(tokens)
    middle = tokens.index(0)
    (shared,) = set(tokens[:middle]) & set(tokens[middle + 1 : -1])
    return {len(tokens) - 1: shared}


def majority(task, tokens):
    def most(seen):
        return max(dict.fromkeys(seen), key=seen.count)  # the first of the largest

    tokens = list(tokens)
    places = range(len(tokens)) if task.labels == "all" else [len(tokens) - 1]
    return {place: most(tokens[: place + 1]) for place in places}


def depo(task, tokens):
    tokens, size = list(tokens), task.word_tokens
    ends = [place for place, token in enumerate(tokens) if 1 <= token <= task.hops]
    words = [tuple(tokens[place : place + size]) for place in range(0, ends[0], size)]
    after = {left: right for left, right in zip(words[::2], words[1::2], strict=True) if 0 not in left}
    labels = {}
    for place in ends:
        word = tuple(tokens[place + 1 : place + 1 + size])
        for _ in range(tokens[place]):
            word = after[word]
        labels |= replies(tokens, place + size, word)
    return labels


def brevo(task, tokens):
    tokens = list(tokens)
    ask = tokens.index(1)
    edges = [(left, right) for left, right in zip(tokens[:ask:2], tokens[1:ask:2], strict=True) if left]

    def depth(node):
        return max((1 + depth(parent) for parent, child in edges if child == node), default=0)

    def ancestors(node):
        return {node}.union(*(ancestors(parent) for parent, child in edges if child == node))

    nodes = sorted(ancestors(tokens[ask + 1]), key=lambda node: (depth(node), node))
    assert nodes[-1] == tokens[ask + 1]
    return replies(tokens, ask + 1, [*nodes, 2])


def mano(task, tokens):
    stream = iter([token for token in tokens if token][:-1])

    def value():
        token = next(stream) - 2
        if token >= 3:
            return token - 3
        left, right = value(), value()
        return {0: left + right, 1: left - right, 2: left * right}[token] % task.modulus

    result = value()
    assert next(stream, None) is None
    return {len(tokens) - 1: 5 + result}


def bigram_backcopy(task, tokens):
    """Labels that are determined: what comes next in the input, and copies."""
    tokens = list(tokens)
    labels = dict(enumerate(tokens[1:]))
    triggers = set(task.trigger_tokens().tolist())
    for place, token in enumerate(tokens):
        if token in triggers:
            assert labels.get(place, tokens[place - 1]) == tokens[place - 1]
            labels[place] = tokens[place - 1]
    return labels


def digit_arithmetic(task, tokens):
    tokens, step = list(tokens), -1 if task.lowest_first else 1
    sign, equals = tokens.index(11), tokens.index(10)
    left, right = (int("".join(map(str, part[::step]))) for part in (tokens[:sign], tokens[sign + 1 : equals]))
    result = {"+": left + right, "-": left - right, "*": left * right}[task.operation]
    digits = {"+": sign + 1, "-": sign, "*": 2 * sign}[task.operation]
    return replies(tokens, equals, [int(digit) for digit in str(result).zfill(digits)[::step]])


def knowledge_conflict(task, tokens, facts):
    tokens = list(tokens)
    middle = tokens.index(0)
    known = dict(facts)
    for subject, other in zip(tokens[:middle:2], tokens[1:middle:2], strict=True):
        assert known[subject] != other
        known[subject] = other
    return {middle + 1 + place: known[subject] for place, subject in enumerate(tokens[middle + 1 :])}


def grid_questions(task, tokens):
    tokens, side = list(tokens), task.side
    colour_0 = 4 + task.shapes
    row_0 = colour_0 + task.colours
    count_0 = row_0 + 2 * side
    empty = count_0 + task.shapes + 1 + task.questions + task.words
    cells = [divmod(token - empty - 1, task.colours) if token > empty else None for token in tokens if token >= empty]
    objects = [one for one in cells if one]
    assert len({shape for shape, _ in objects}) == len(objects) == task.grids * task.objects
    assert all(
        len(cells[end - side**2 : end]) - cells[end - side**2 : end].count(None) == task.objects
        for end in range(side**2, len(cells) + 1, side**2)
    )

    def answer(kind, first, second):
        if kind == 1:
            ((colour,),) = [[colour] for shape, colour in objects if shape == second - 4]
            return colour_0 + colour
        if kind == 2:
            return 4 + cells[side * (first - row_0) + second - row_0 - side][0]
        return count_0 + [colour for _, colour in objects].count(second - colour_0)

    asked = [place for place, token in enumerate(tokens) if 1 <= token <= 3]
    if task.order == "grids_first":
        return {place + 2: answer(*tokens[place : place + 3]) for place in asked}
    replies = {token: place for place, token in enumerate(tokens)}  # the last place of a number, behind the grids
    return {replies[tokens[place - 1]]: answer(*tokens[place : place + 3]) for place in asked}


def gcog(task, tokens):
    tokens, side = list(tokens)[:-1], task.side
    cut = len(tokens) - 2 * side**2 if task.order == "rule_first" else 2 * side**2
    rule, picture = (tokens[:cut], tokens[cut:]) if task.order == "rule_first" else (tokens[cut:], tokens[:cut])
    objects = {cell: tuple(picture[2 * cell : 2 * cell + 2]) for cell in range(side**2) if picture[2 * cell]}
    rows = [rule[place : place + 6] for place in range(0, len(rule), 6)]

    def cell_of(letter, colour):
        matches = [cell for cell, one in objects.items() if one == (letter, colour)]
        assert len(matches) <= 1
        return matches[0] if matches else None

    def said(row):
        operator, pairs = row[1] - 4, [pair for pair in (row[2:4], row[4:6]) if any(pair)]
        letter, colour = pairs[0]
        if operator == 0:
            return cell_of(letter, colour) is not None
        if operator == 5:
            ((_, answer),) = [one for one in objects.values() if one[0] == letter]
            return answer
        if operator == 6:
            ((answer, _),) = [one for one in objects.values() if one[1] == colour]
            return answer
        cells = [cell_of(*pair) for pair in pairs]
        if operator == 7:
            return 14 + cells[0]
        coordinates = [number for cell in cells for number in divmod(cell, side)]
        total = sum(coordinates)
        if operator >= 3:
            total = 1
            for number in coordinates:
                total *= number
        return total % 2 == (operator in (2, 4))

    place = 0
    while rows[place][0] == 1:
        place += 1 if said(rows[place]) else 2
        if rows[place][0] == 2:
            break
    answer = said(rows[place])
    return {len(tokens): 12 + answer if isinstance(answer, bool) else answer}


def copying(task, tokens):
    tokens = list(tokens)
    ask = tokens.index(1)
    symbols = [token for token in tokens[:ask] if token]
    return replies(tokens, ask, [*(symbols[::-1] if task.order == "reversed" else symbols), 2])


def selective_copying(task, tokens):
    tokens = list(tokens)
    ask = tokens.index(1)
    return replies(tokens, ask + 1, [token for token in tokens[:ask] if token])


def induction_heads(task, tokens):
    tokens = list(tokens)
    assert tokens.count(0) == 2
    return {len(tokens) - 1: tokens[tokens.index(0) + 1]}


def ngram_lookup(task, tokens):
    tokens, size = list(tokens), task.ngram
    parts = "".join(map(chr, tokens)).split(chr(0))
    ngram, text = (parts[0], parts[1]) if task.order == "prefix" else (parts[1][:size], parts[0])
    assert len(ngram) == size
    (place,) = [place for place in range(len(text)) if text.startswith(ngram, place)]
    answer = text[place + size : place + size + task.answer]
    return replies(tokens, len(tokens) - task.answer, map(ord, answer))


def phonebook(task, tokens):
    tokens = list(tokens)
    book, place, name = {}, 0, []
    while len(book) < task.entries:
        if tokens[place] == 0:
            number = tokens[place + 1 : place + 1 + task.digits]
            assert len(name) == task.name_tokens and tuple(name) not in book and number[0] in (7, 8, 9, 10)
            book[tuple(name)], name = number, []
            place += task.digits
        else:
            name.append(tokens[place])
        place += 1
    ask = max(place for place, token in enumerate(tokens) if token == 0)
    return replies(tokens, ask, book[tuple(tokens[ask - task.name_tokens : ask])])


def stacks(task, tokens):
    tokens, contents, labels = list(tokens), {}, {}
    for place in range(0, len(tokens), 3):
        operation, stack, *symbol = tokens[place : place + 3]
        if operation == 0:
            contents.setdefault(stack, []).extend(symbol)
        else:
            labels[place + 1] = contents[stack].pop()
            assert symbol in ([], [labels[place + 1]])
    assert labels
    return labels
