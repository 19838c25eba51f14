"""Which examples a person is shown: laws of best, worst and random, for every metric that there is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.catalog import METRICS
from peftlab.errors import DataError, NotComputedError, UnknownNameError
from peftlab.example_choice import NUM_SHOWN, check_split, choose_examples, pick_examples, values_of_examples
from peftlab.metric import Score
from peftlab.metrics import bleu
from peftlab.task import Example, Splits
from peftlab.text_scores import mean_score

PAIRS = [
    ("a cheap pub by the river", "a cheap pub by the river"),
    ("", "a dear inn"),
    ("a cheap inn", "a cheap pub near the old mill"),
    ("wholly something else", "the river is near"),
]
CODE = [
    ("return a", "return a"),
    ("", "return b"),
    ("return a + b", "return a + b * c"),
    (")(", "x = [1, 2]"),
]
QUERIES = [
    ('SELECT "Player" FROM table', 'SELECT "Player" FROM table'),
    ("", 'SELECT MAX("No.") FROM table'),
    ('SELECT "Team" FROM table', 'SELECT "Team" FROM table WHERE "No." = \'42\''),
    ("SELECT", 'SELECT "Team" FROM table WHERE "Team" = \'Leeds\''),
]


def score_of(values: list[float], *, higher: bool = True, unit: str = "rate") -> Score:
    return mean_score("made", values, unit=unit, higher_is_better=higher, signature="", seed=1)


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=30),
    st.booleans(),
    st.integers(0, 3),
    st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_laws(values: list[float], higher: bool, seed: int, count: int) -> None:
    ids = [f"e{i}" for i in range(len(values))]
    found = pick_examples(score_of(values, higher=higher), ids, seed=seed, count=count)
    assert json.loads(json.dumps(found)) == found
    own = dict(zip(ids, values, strict=True))
    sign = 1 if higher else -1
    for kind in ("best", "worst", "random"):
        assert len(found[kind]) <= count
        assert all(entry["score"] == own[entry["id"]] for entry in found[kind])
        assert len({entry["id"] for entry in found[kind]}) == len(found[kind])
    assert len(found["random"]) == min(count, len(values))
    best, worst = ([sign * e["score"] for e in found[kind]] for kind in ("best", "worst"))
    goods = sorted(sign * value for value in values)
    assert best == [good for good in goods[::-1] if good > goods[0]][:count]
    assert worst == [good for good in goods if good < goods[-1]][:count]
    assert found == pick_examples(score_of(values, higher=higher), ids, seed=seed, count=count)


def test_the_draw_is_seeded_and_from_all() -> None:
    ids = [f"e{i}" for i in range(40)]
    drawn = {
        seed: [e["id"] for e in pick_examples(score_of([0.0] * 40), ids, seed=seed)["random"]]
        for seed in range(60)
    }
    assert len({tuple(one) for one in drawn.values()}) > 50
    assert len({name for one in drawn.values() for name in one}) == 40


def test_surely_wrong_is_worse_than_wrong() -> None:
    hits = score_of([1, 0, 1, 0, 0])
    found = pick_examples(hits, list("abcde"), seed=1, probabilities=[0.5, 0.4, 0.9, 0.99, 0.7])
    assert [(e["id"], e["probability"]) for e in found["worst"]] == [("d", 0.99), ("e", 0.7), ("b", 0.4)]
    assert [e["id"] for e in found["best"]] == ["c", "a"], "no wrong answer is among the best"
    plain = pick_examples(hits, list("abcde"), seed=1)
    assert [e["id"] for e in plain["worst"]] == ["b", "d", "e"]
    assert "probability" not in plain["worst"][0]


def test_where_none_is_best() -> None:
    found = pick_examples(score_of([1.0, 1.0]), ["a", "b"], seed=1)
    assert (found["best"], found["worst"]) == ([], [])
    assert found["note"] == "made is 1 for every example, so none is best or worst"
    without = Score("meteor", 31.0, "0-100", True, 2)
    found = pick_examples(without, ["a", "b"], seed=1)
    assert "meteor has no value for a single example" in found["note"]
    assert [entry["score"] for entry in found["random"]] == [None, None]
    assert (found["best"], found["worst"]) == ([], [])


def test_a_corpus_score_is_said_not_to_be_the_mean() -> None:
    examples = [Example(f"e{i}", "s", (reference,)) for i, (_, reference) in enumerate(PAIRS)]
    score = bleu.score([answer for answer, _ in PAIRS], examples, seed=1)
    found = pick_examples(score, [e.id for e in examples], seed=1)
    assert found["note"] == "bleu of each example alone; the score of all is not their mean"
    alone = [bleu.score([a], [e], seed=1).value for (a, _), e in zip(PAIRS, examples, strict=True)]
    assert values_of_examples(score) == pytest.approx(alone)
    assert found["best"][0]["id"] == "e0"


@pytest.mark.parametrize("name", [n for n in METRICS.names() if n != "meteor"])  # Java's takes seconds
def test_every_metric_has_values_of_examples(name: str) -> None:
    code = (
        "ast_similarity",
        "code_bleu_no_dataflow",
        "complexity_difference",
        "syntax_valid",
        "edit_distance",
    )
    pairs = QUERIES if name.startswith("logical_form") else CODE if name in code else PAIRS
    examples = [
        Example(f"e{i}", "s", (reference,), values=(reference[:3],), label=i % 2)
        for i, (_, reference) in enumerate(pairs)
    ]
    answers = [answer for answer, _ in pairs]
    if name in ("accuracy", "macro_f1"):
        answers = ["0", "1", "", "7"]
    try:
        score = METRICS.load(name).score(answers, examples, seed=1)
    except NotComputedError as error:
        pytest.skip(str(error))
    values = values_of_examples(score)
    assert values is not None
    assert len(values) == len(examples)
    best = min(values) if not score.higher_is_better else max(values)
    assert values[0] == best, "an answer that is its reference is the best"
    found = pick_examples(score, [e.id for e in examples], seed=1)
    assert len(found["random"]) == NUM_SHOWN


def test_splits() -> None:
    example = Example("a", "s", ("r",))
    splits = Splits((example,), (), (example,))
    assert choose_examples(splits, "test", None, 1) == [example]
    with pytest.raises(DataError, match=r"the split 'validation' is empty"):
        choose_examples(splits, "validation", None, 1)
    with pytest.raises(UnknownNameError, match=r"unknown split 'tset' \(did you mean 'test'\?\)"):
        check_split("tset")
