"""Restaurants in words: an E2E-style task that a grammar generates, for trying peftlab with no download.

A meaning representation of three to eight attributes is to be said in one to a few English sentences that hold
every value. The data set is fixed: the same splits at every load, whatever the run's seed. Names in validation and
test, and the names that they are near, never occur in train, so they have to be copied. A row:

```
source      name[Jolly Gander], eatType[pub], food[Korean], customer rating[3 out of 5], near[Painted Crumb]
reference   Close to Painted Crumb, Jolly Gander is a Korean pub. It is rated 3 out of 5 by customers.
reference   With a customer rating of 3 out of 5, Jolly Gander is a Korean pub near Painted Crumb.
```

The references of one meaning come from different sentence plans of `assets/restaurant_grammar.yaml`. Plans are drawn
by weight: as in texts that people write, a few plans are common and many are rare.

Source: the form of the data follows Novikova et al. 2017, "The E2E Dataset"; no text of it is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from peftlab.errors import DataError
from peftlab.task import Example, Splits

PROMPT = "meaning: {source}\ntext:"
METRICS = ("bleu", "rouge_l", "value_coverage")

KEYS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
SIZES = {"train": 1000, "validation": 100, "test": 100}
NUM_REFERENCES = {"train": 3, "validation": 3, "test": 5}
NUM_NAMES = {"train": 600, "validation": 120, "test": 120}
_SHORT = {"rating": "customer rating", "price": "priceRange", "family": "familyFriendly", "noun": "eatType"}
_GRAMMAR = Path(__file__).parents[1] / "assets" / "restaurant_grammar.yaml"
_SLOT = re.compile(r"\{(\w+)([?!]?)((?: \w+)*)\}")
_DATA_SEED = "peftlab embedded task, version 1"
_ATTRIBUTE_WEIGHTS = {3: 1, 4: 2, 5: 3, 6: 3, 7: 2, 8: 1}

Meaning = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SentencePlan:
    """One way to build a text.

    Attributes:
        name: What the plan is called in the grammar.
        weight: How often it is drawn, in relation to the others.
        wording: Which form of a phrase it uses, where there are several.
        sentences: Templates, see the grammar's head.
    """

    name: str
    weight: int
    wording: int
    sentences: tuple[str, ...]

    def fits(self, meaning: Meaning) -> bool:
        """Whether the meaning has what the plan cannot do without.

        Args:
            meaning: Attributes and their values.

        Returns:
            True where `realize` can be called.
        """
        for slot, mark, keys in _SLOT.findall(" ".join(self.sentences)):
            if mark == "!" and not any(_long(k) in meaning for k in keys.split()):
                return False
            if not keys and slot not in ("a", "noun") and _needs(slot) not in meaning:
                return False
        return True

    def realize(self, meaning: Meaning) -> str:
        """The meaning in this plan's words.

        Args:
            meaning: Attributes and their values; the plan must fit.

        Returns:
            The text, every value in it.
        """
        return " ".join(
            s for s in (_sentence(template, meaning, self.wording) for template in self.sentences) if s
        )


@cache
def _grammar() -> dict[str, Any]:
    with _GRAMMAR.open(encoding="utf-8") as file:
        grammar: dict[str, Any] = yaml.safe_load(file)
    return grammar


def _plans() -> tuple[SentencePlan, ...]:
    return tuple(
        SentencePlan(name, p["weight"], p.get("wording", 0), tuple(p["sentences"]))
        for name, p in _grammar()["plans"].items()
    )


SENTENCE_PLANS = _plans()


def _long(key: str) -> str:
    return _SHORT.get(key, key)


def _needs(slot: str) -> str:
    """The attribute that a slot without arguments says."""
    phrases = _grammar()["phrases"].get(slot)
    return next(iter(phrases)) if phrases else _long(slot)


def _phrase(kind: str, key: str, meaning: Meaning, wording: int) -> str:
    """What the grammar says of one attribute, e.g. ("after", "area") -> "in the park area"."""
    forms = _grammar()["phrases"][kind][key]
    if isinstance(forms, list):
        forms = forms[wording % len(forms)]
    if isinstance(forms, dict):
        value = meaning[key]
        forms = forms[value] if value in forms else forms["count" if re.search(r"\d", value) else "word"]
    return _SLOT.sub(lambda m: m[0] if m[1] == "a" else meaning[_long(m[1])], forms)


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _share_has(parts: Sequence[str]) -> list[str]:
    """The parts, with "has x", "has y" as one part "has x and y"."""
    merged: list[str] = []
    for part in parts:
        if merged and part.startswith("has ") and merged[-1].startswith("has "):
            merged[-1] += f" and {part[4:]}"
        else:
            merged.append(part)
    return merged


def _filled(slot: str, keys: Sequence[str], meaning: Meaning, wording: int) -> str:
    """The text of one slot, "" where the meaning has none of its keys."""
    if slot == "a":
        return "{a}"
    if slot == "noun":
        return meaning["eatType"]
    if not keys:
        return (
            _phrase(slot, _needs(slot), meaning, wording)
            if slot in _grammar()["phrases"]
            else meaning[_long(slot)]
        )
    parts = [_phrase(slot, _long(key), meaning, wording) for key in keys if _long(key) in meaning]
    if slot in ("adjective", "after") or not parts:
        return " ".join(parts)
    return f"with {_joined(parts)}" if slot == "with" else _joined(_share_has(parts))


def _sentence(template: str, meaning: Meaning, wording: int) -> str:
    """One sentence of a plan, "" where it would say nothing."""
    for slot, mark, keys in _SLOT.findall(template):
        if mark == "?" and not _filled(slot, keys.split(), meaning, wording):
            return ""
    text = _SLOT.sub(lambda m: _filled(m[1], m[3].split(), meaning, wording), template)
    text = re.sub(r" +([ .,?])", r"\1", text)
    text = re.sub(r"\{a\} (?=(\w))", lambda m: "an " if m[1] in "aeiouAEIOU" else "a ", text)
    return text[0].upper() + text[1:]


def _names() -> dict[str, list[str]]:
    """Names for each split, none in two; a name differs from those of other splits by more than "The"."""
    words = _grammar()["names"]
    pairs = [(first, second) for first in words["first"].split() for second in words["second"].split()]
    rng = random.Random(f"{_DATA_SEED}, names")
    rng.shuffle(pairs)
    names = iter([rng.choice(words["forms"]).format(first=first, second=second) for first, second in pairs])
    return {split: [next(names) for _ in range(count)] for split, count in NUM_NAMES.items()}


def _meanings(rng: random.Random, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Meanings without end, all different."""
    values = _grammar()["values"]
    seen = set()
    while True:
        number = rng.choices(list(_ATTRIBUTE_WEIGHTS), list(_ATTRIBUTE_WEIGHTS.values()))[0]
        chosen = {"name", "eatType", *rng.sample(KEYS[2:], number - 2)}
        name, near = rng.sample(names, 2)
        drawn = {key: rng.choice(values[key]) for key in KEYS if key in values}
        meaning = {key: ({"name": name, "near": near} | drawn)[key] for key in KEYS if key in chosen}
        if tuple(meaning.items()) not in seen:
            seen.add(tuple(meaning.items()))
            yield meaning


def _references(rng: random.Random, meaning: Meaning, count: int) -> tuple[str, ...]:
    """Texts from `count` different plans, the plans drawn by weight."""
    left = [plan for plan in SENTENCE_PLANS if plan.fits(meaning)]
    texts: list[str] = []
    while len(texts) < count:
        plan = rng.choices(left, [p.weight for p in left])[0]
        left.remove(plan)
        text = plan.realize(meaning)
        if text not in texts:
            texts.append(text)
    return tuple(texts)


def _split(split: str, names: Sequence[str]) -> tuple[Example, ...]:
    rng = random.Random(f"{_DATA_SEED}, {split}")
    examples = []
    for index, meaning in zip(range(SIZES[split]), _meanings(rng, names), strict=False):
        examples.append(
            Example(
                id=f"{split}-{index}",
                source=", ".join(f"{key}[{value}]" for key, value in meaning.items()),
                references=_references(rng, meaning, NUM_REFERENCES[split]),
                values=tuple(value for key, value in meaning.items() if key != "familyFriendly"),
            )
        )
    return tuple(examples)


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Generate the examples.

    Args:
        data_dir: Must be None: there are no files.
        seed: Has no effect; the data set is fixed, so that runs of other seeds are scored on the same examples.

    Returns:
        1000 meanings to train on and 100 each for validation and test, always the same.

    Raises:
        DataError: A folder was given.

    Example:
        >>> load(None, seed=42).test[0].id
        'test-0'
    """
    if data_dir is not None:
        raise DataError(
            f"the embedded data set is generated and takes no folder, but data_dir is {data_dir}: leave it "
            "out, or name the task that the folder belongs to"
        )
    names = _names()
    parts = {split: _split(split, names[split]) for split in SIZES}
    return Splits(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        notes=(f"generated by a grammar of {len(SENTENCE_PLANS)} sentence plans; the same for every seed",),
    )
