"""What holds of every metric, whatever the texts."""

from __future__ import annotations

import math
import random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.metric import bootstrap_interval
from peftlab.metrics import accuracy, bleu, bleu_cased, exact_match, rouge_l, rouge_l_e2e, value_coverage
from peftlab.task import Example

TOP = {"0-100": 100.0, "rate": 1.0}
WITH_REFERENCES = [bleu, bleu_cased, rouge_l, rouge_l_e2e, exact_match]
ALL = [*WITH_REFERENCES, value_coverage, accuracy]

words = st.sampled_from(
    ["The", "the", "a", "pub", "near", "Aromi", "river", "cheap", "£20", "isn't", "food,", "5"]
)
sentences = st.lists(words, min_size=4, max_size=12).map(" ".join)
references = st.lists(sentences, min_size=1, max_size=4).map(tuple)
Pairs = list[tuple[str, Example]]


@st.composite
def pairs(draw: st.DrawFn, min_size: int = 1) -> Pairs:
    """Predictions with examples that every metric can score."""
    count = draw(st.integers(min_size, 8))
    found = []
    for index in range(count):
        label = draw(st.integers(0, 3))
        example = Example(
            f"test-{index}", "s", draw(references), draw(st.lists(words, min_size=1).map(tuple)), label
        )
        found.append((draw(sentences | st.just(str(label)) | st.text(max_size=20)), example))
    return found


def score(module: ModuleType, found: Pairs, seed: int = 1) -> float:
    value: float = module.score([p for p, _ in found], [e for _, e in found], seed=seed).value
    return value


def perfect(module: ModuleType, example: Example) -> str:
    if module is accuracy:
        return str(example.label)
    return " ".join(example.values) if module is value_coverage else example.references[-1]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is not what most of these look at."""
    resample(monkeypatch, 20)


def resample(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    defaults = bootstrap_interval.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "num_resamples", times)


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
@given(found=pairs())
@settings(max_examples=25, deadline=None)
def test_a_perfect_answer_has_the_full_score(module: ModuleType, found: Pairs) -> None:
    right = [(perfect(module, e), e) for _, e in found]
    assert math.isclose(score(module, right), TOP[module.UNIT], abs_tol=1e-9)


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
@given(found=pairs())
@settings(max_examples=25, deadline=None)
def test_every_score_is_in_its_range(module: ModuleType, found: Pairs) -> None:
    assert 0 <= score(module, found) <= TOP[module.UNIT] + 1e-9


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
@given(found=pairs(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_examples_changes_nothing(module: ModuleType, found: Pairs, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(found))
    assert math.isclose(score(module, found), score(module, shuffled), abs_tol=1e-9)


@pytest.mark.parametrize("module", WITH_REFERENCES, ids=lambda m: m.NAME)
@given(found=pairs(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_references_changes_nothing(
    module: ModuleType, found: Pairs, data: st.DataObject
) -> None:
    shuffled = [
        (p, Example(e.id, e.source, tuple(data.draw(st.permutations(e.references))))) for p, e in found
    ]
    assert math.isclose(score(module, found), score(module, shuffled), abs_tol=1e-9)


@pytest.mark.parametrize("module", [rouge_l, rouge_l_e2e, exact_match], ids=lambda m: m.NAME)
@given(found=pairs(), more=references)
@settings(max_examples=25, deadline=None)
def test_more_references_never_lower_the_score(
    module: ModuleType, found: Pairs, more: tuple[str, ...]
) -> None:
    """Not so for BLEU, whose brevity penalty follows the closest reference length."""
    richer = [(p, Example(e.id, e.source, e.references + more)) for p, e in found]
    assert score(module, richer) >= score(module, found) - 1e-9


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
@given(found=pairs(min_size=2), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_the_interval_is_ordered_and_in_range(module: ModuleType, found: Pairs, seed: int) -> None:
    interval = module.score([p for p, _ in found], [e for _, e in found], seed=seed).interval
    assert 0 <= interval[0] <= interval[1] <= TOP[module.UNIT] + 1e-9


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.NAME)
def test_the_interval_mostly_holds_the_value(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A percentile interval of a skewed corpus score need not hold it always; of 30 random corpora 28 must."""
    resample(monkeypatch, 200)
    vocabulary = ["The", "the", "a", "pub", "near", "Aromi", "river", "cheap", "food", "serves"]
    inside = 0
    for seed in range(30):
        rng = random.Random(seed)
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(6, 12))) for _ in range(120)]
        examples = [
            Example(str(i), "s", tuple(texts[3 * i : 3 * i + 2]), (vocabulary[i % 10],), i % 2)
            for i in range(40)
        ]
        answers = [
            str(rng.randrange(2)) if module is accuracy else texts[3 * i + rng.randrange(3)]
            for i in range(40)
        ]
        found = module.score(answers, examples, seed=seed)
        inside += found.interval[0] <= found.value <= found.interval[1]
    assert inside >= 28
