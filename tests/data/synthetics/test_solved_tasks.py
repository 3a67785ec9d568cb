"""Tasks whose labels a solver finds (solvers.py): every label is what the task's definition says, answers follow their
distribution, and training and evaluation share no example."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.synthetics import (
    GCOG,
    BigramBackcopy,
    Brevo,
    CommonWords,
    Copying,
    Depo,
    DigitArithmetic,
    FrequentWords,
    GridQuestions,
    InductionHeads,
    KnowledgeConflict,
    Majority,
    Mano,
    Needles,
    NGramLookup,
    Phonebook,
    SelectiveCopying,
    SetDisjointness,
    Stacks,
    StateTracking,
    VariableTracking,
    ruler,
)
from recollect.data.synthetics.knowledge_conflict import fact_objects
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.ruler import RULER
from tests.data.synthetics import solvers
from tests.data.synthetics.task_laws import (
    answers_are_equally_likely,
    drawn,
    fits,
    labels_are_a_solvers,
    settings_are_kept_and_possible,
    streams_repeat_and_share_no_example,
)


def knowledge_conflict(task, tokens):
    objects = fact_objects(task.subjects, task.objects, task.facts)
    return solvers.knowledge_conflict(task, tokens, {1 + i: 1 + task.subjects + o for i, o in enumerate(objects)})


SOLVERS = {
    BigramBackcopy: solvers.bigram_backcopy,
    Brevo: solvers.brevo,
    CommonWords: solvers.common_words,
    Copying: solvers.copying,
    Depo: solvers.depo,
    DigitArithmetic: solvers.digit_arithmetic,
    FrequentWords: solvers.frequent_words,
    GCOG: solvers.gcog,
    GridQuestions: solvers.grid_questions,
    InductionHeads: solvers.induction_heads,
    KnowledgeConflict: knowledge_conflict,
    Majority: solvers.majority,
    Mano: solvers.mano,
    NGramLookup: solvers.ngram_lookup,
    Needles: solvers.needles,
    Phonebook: solvers.phonebook,
    SelectiveCopying: solvers.selective_copying,
    SetDisjointness: solvers.set_disjointness,
    Stacks: solvers.stacks,
    StateTracking: solvers.state_tracking,
    VariableTracking: solvers.variable_tracking,
}

QUICK = {
    "parity": StateTracking(group="Z2", length=40),
    "A4xZ5": StateTracking(group="A4xZ5", length=9),
    "A5, last": StateTracking(group="A5", length=12, labels="last"),
    "passkey": ruler("passkey", 64),
    "values and queries": Needles(length=64, keys=3, values=2, queries=2, key_tokens=2, words=5, value_tokens=2),
    "needles": ruler("niah_multikey_3", 96),
    "chains": VariableTracking(length=48, chains=2, hops=3, names=8, values=2),
    "common words": CommonWords(length=40, answers=3, often=5, seldom=2, words=20, extrapolation=()),
    "frequent words": ruler("fwe", 128),
    "sets": SetDisjointness(vocab_size=32, first=3, second=11, extrapolation=(2,)),
    "majority": Majority(classes=5, length=12, labels="all"),
    "Depo": Depo(nodes=9, hops=3, word_tokens=2, symbols=5, extrapolation=(2,)),
    "Brevo": Brevo(nodes=8, names=12, extrapolation=()),
    "Mano": Mano(operations=7, smallest=5),
    "backcopy": BigramBackcopy(length=48, characters=12),
    "product": DigitArithmetic(digits=3, operation="*"),
    "difference": DigitArithmetic(digits=5, operation="-", lowest_first=False),
    "conflict": KnowledgeConflict(
        subjects=20, objects=9, overrides=5, from_context=3, from_memory=4, extrapolation=(2,)
    ),
    "copying": Copying(fewest=6, most=9),
    "palindrome": Copying(order="reversed", most=9),
    "selective copying": SelectiveCopying(length=24, copies=7),
    "induction": InductionHeads(length=12),
    "suffix": NGramLookup(symbols=4, context=24, ngram=4),
    "prefix": NGramLookup(symbols=3, context=24, ngram=5, answer=2, order="prefix"),
    "phonebook": Phonebook(entries=5, words=7, digits=4),
    "stacks": Stacks(stacks=3, symbols=9, operations=12),
    "gCOG": GCOG(operators=5, distractors=10, side=8, extrapolation=(2,)),
    "grid": GridQuestions(side=5, filler=7, extrapolation=(2,)),
}

MORE = {
    "Z60": StateTracking(group="Z60", length=12),
    "S5": StateTracking(group="S5", length=12),
    **{name: ruler(name) for name in RULER if name not in ("passkey", "fwe")},
    "majority, last": Majority(),
    "sets, tight": SetDisjointness(vocab_size=17, first=12, second=4, extrapolation=()),
    "Depo, full": Depo(nodes=12, smallest=12),
    "Brevo, few": Brevo(nodes=3, names=3, parents=5, extrapolation=()),
    "Mano, one": Mano(operations=1, operators="s", modulus=5),
    "sum": DigitArithmetic(digits=6),
    "selective copying, full": SelectiveCopying(length=9, copies=4),
    "induction, short": InductionHeads(length=3),
    "unigrams": NGramLookup(symbols=5, context=4, ngram=1, answer=1, extrapolation=()),
    "one stack": Stacks(stacks=1, operations=2),
    "gCOG, one": GCOG(operators=1, distractors=5, order="grid_first", side=6, extrapolation=(2,)),
    "gCOG, three": GCOG(operators=3, distractors=40, fewest=40, extrapolation=()),
    "grids": GridQuestions(side=3, grids=4, objects=4, kinds=("colour", "count"), order="questions_first"),
}


def labels_are_known(task):
    # What follows the input of a bigram chain is any token, unless a trigger ends it.
    unknown = (task.length - 1,) if isinstance(task, BigramBackcopy) else ()
    labels_are_a_solvers(task, SOLVERS[type(task)], unknown)


@pytest.mark.parametrize("task", QUICK.values(), ids=QUICK)
def test_every_label_is_what_a_solver_finds(task):
    labels_are_known(task)
    settings_are_kept_and_possible(task)


@pytest.mark.more
@pytest.mark.parametrize("task", MORE.values(), ids=MORE)
def test_every_label_of_further_settings_is_what_a_solver_finds(task):
    labels_are_known(task)


@pytest.mark.more
@pytest.mark.parametrize("name", QUICK)
def test_streams_repeat_and_share_no_example(name):
    streams_repeat_and_share_no_example(QUICK[name], few=name in ("passkey", "product"))  # some millions of examples


UNIFORM = {
    "parity": (0, 2),
    "A4xZ5": (0, 60),
    "A5, last": (0, 60),
    "passkey": (2, 12),
    "chains": (2, 10),
    "common words": (2, 22),
    "sets": (2, 32),
    "majority": (0, 5),
    "selective copying": (2, 16),
    "induction": (1, 16),
    "phonebook": (1, 11),
    "stacks": (5, 14),
}
"""First label, and the one after the last, of tasks whose single answers are equally likely."""


@pytest.mark.more
@pytest.mark.parametrize("name", UNIFORM)
def test_answers_are_equally_likely(name):
    answers_are_equally_likely(QUICK[name], *UNIFORM[name])


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (StateTracking, {"group": "B3"}, "group=B3: no group; name factors"),
        (StateTracking, {"group": "S7"}, "group=S7 has 5,040 elements: 2 to 1,024 fit"),
        (Needles, {"length": 12}, "length=12: the needles and questions need 17 tokens"),
        (Needles, {"queries": 2}, "queries=2: there are keys=1 to ask, raise keys to 2"),
        (Needles, {"keys": 3, "words": 2}, "words=2: only 2 keys, 3 are needed"),
        (Needles, {"key_tokens": 8, "words": 16}, "key_tokens=8: 16 .. key_tokens keys must be fewer"),
        (VariableTracking, {"length": 20}, "length=20: 5 assignments and the question need 21 tokens"),
        (VariableTracking, {"names": 4}, "names=4: 5 different ones are needed"),
        (CommonWords, {"length": 50}, "length=50: the common words, another and the question need 71"),
        (CommonWords, {"seldom": 6}, "seldom=6: must be below often=6"),
        (FrequentWords, {"length": 16}, "length=16: ranks 2 to 4 must differ in their counts; 64 tokens do"),
        (SetDisjointness, {"vocab_size": 30}, "vocab_size=30: the sets need at least 33"),
        (Majority, {"length": 30}, "length=30: two classes may tie at an even length; take 29 or 31"),
        (Depo, {"nodes": 300}, "nodes=300: 256 .. 1 words must be at least as many"),
        (Depo, {"smallest": 20}, "smallest=20: must be at most nodes=16"),
        (Brevo, {"names": 9}, "names=9: 10 nodes need as many"),
        (Mano, {"operators": "ad"}, "operators=ad: must be some of asm"),
        (BigramBackcopy, {"characters": 3}, "triggers=3: must be below the 3 tokens"),
        (BigramBackcopy, {"corpus": "/nowhere/at/all"}, "corpus=/nowhere/at/all: cannot be read"),
        (KnowledgeConflict, {"from_context": 5}, "from_context=5: must be at most overrides=4"),
        (KnowledgeConflict, {"subjects": 7}, "subjects=7: 8 different ones are needed"),
        (Copying, {"fewest": 21}, "fewest=21: must be at most most=20"),
        (SelectiveCopying, {"length": 32}, "length=32: 16 copies need at least 33 tokens"),
        (InductionHeads, {"length": 2}, "length=2: two marks and a token between them take 3"),
        (NGramLookup, {"context": 5}, "context=5: the n-gram and the answer need 6 symbols"),
        (NGramLookup, {"ngram": 1}, "ngram=1: only 26 different ones for a context of 64, take ngram=2"),
        (Phonebook, {"entries": 2}, "entries=2: with examples=2 take at least 3"),
        (Phonebook, {"words": 3}, "words=3: only 9 names for 16 entries, raise words"),
        (Stacks, {"operations": 1}, "operations=1"),
        (GCOG, {"operators": 2}, "operators=2: must be 1, 3, 5 or 7"),
        (GCOG, {"distractors": 97}, "distractors=97, side=10: at most 96 fit"),
        (GridQuestions, {"shapes": 27}, "shapes=27: there are 26"),
        (GridQuestions, {"kinds": ("color",)}, r"kinds=\('color',\): must be some of colour, shape, count"),
        (GridQuestions, {"grids": 2}, "shape is asked of one grid, not of grids=2"),
        (GridQuestions, {"side": 2}, "objects=9: a grid of 2 x 2 has 4 cells"),
        (GridQuestions, {"objects": 17}, "objects=17: no shape appears twice, so shapes=16 allow 16"),
    ],
)
def test_impossible_settings_are_refused_with_what_fits(task, fields, message):
    with pytest.raises(UserError, match=message):
        task(**fields)
    with pytest.raises(UserError, match="RULER has passkey, niah_single_1"):
        ruler("niah")


def test_a_chain_may_be_counted_in_a_text(tmp_path):
    (tmp_path / "text").write_text("abababac", encoding="utf-8")
    after, unigram = BigramBackcopy(corpus=str(tmp_path / "text"), triggers=1).chain()
    np.testing.assert_allclose(unigram, [4 / 8, 3 / 8, 1 / 8])
    np.testing.assert_allclose(after, [[0, 3 / 4, 1 / 4], [1, 0, 0], unigram])


@pytest.mark.more
def test_gcog_is_balanced_by_operator():
    task = GCOG(operators=1, distractors=5)
    tokens, labels = drawn(task, rows=10_000)
    operator, answers = tokens[:, 1] - 4, labels[:, -1]
    for number in range(5):
        assert abs((answers[operator == number] == 13).mean() - 0.5) < 0.06  # 1,250 each: 4 standard deviations
    assert np.bincount(operator, minlength=8).min() > 1100


@pytest.mark.more
def test_the_chain_of_backcopy_is_followed():
    task = BigramBackcopy(length=64, characters=12)
    tokens, labels = drawn(task, rows=10_000)
    after, triggers = task.chain()[0], set(task.trigger_tokens().tolist())
    for token in range(12):
        if token not in triggers:
            counts = np.bincount(labels[tokens == token], minlength=12)
            fits(counts, after[token] * counts.sum())


def test_orders_are_equally_likely_with_the_last_behind():
    last = np.arange(5) >= 4
    orders = jax.jit(lambda key: shuffled(key, 20_000, 5, jnp.broadcast_to(last, (20_000, 5))))(jax.random.key(0))
    rows, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert {tuple(row) for row in rows.tolist()} == {(*order, 4) for order in itertools.permutations(range(4))}
    fits(counts, 20_000 / 24)


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("passkey", {"KEY", "ASK", "w0", "7", "."}),
        ("chains", {"SET", "ASK", "x7", "1", "."}),
        ("common words", {"ASK", "w19"}),
        ("sets", {"|", "?", "29"}),
        ("Depo", {"+3", "4"}),
        ("Brevo", {".", "ASK", "END", "11"}),
        ("Mano", {".", "=", "+", "-", "*", "22"}),
        ("backcopy", {"<s>", "11"}),
        ("product", {"*", "=", "9"}),
        ("conflict", {"|", "s19", "o8"}),
        ("copying", {".", "|", "25", "end"}),
        ("selective copying", {".", "?", "13"}),
        ("induction", {"*", "14"}),
        ("phonebook", {":", "9", "n6"}),
        ("stacks", {"push", "pop", "#2", "8"}),
        ("grid", {"COLOUR?", "[a.red]", "[ ]", "p", "blue", "row4", "col4", "0", "w15", "."}),
        ("gCOG", {"IF", "DO", "ASK", "producteven", "go", "z", "cyan", "."}),
    ],
)
def test_tokens_read_as_what_they_mean(name, spelled):
    tokens, labels = drawn(QUICK[name])
    words = {QUICK[name].spelling(int(token)) for token in [*np.unique(tokens), *np.unique(labels[labels >= 0])]}
    assert spelled <= words and len({QUICK[name].spelling(token) for token in range(QUICK[name].vocabulary)}) > 8
