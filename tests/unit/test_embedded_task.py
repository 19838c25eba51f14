"""The embedded data set: sizes, honest splits, correct references, and the same everywhere."""

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sacrebleu

from peftlab.errors import DataError
from peftlab.task import Task, render_prompt
from peftlab.tasks import embedded

SPLITS = embedded.load(None, seed=42)
ALL = [*SPLITS.train, *SPLITS.validation, *SPLITS.test]


def attributes(source):
    return dict(re.findall(r"(?:^|, )([\w ]+)\[([^\]]*)\]", source))


def digest(splits):
    return hashlib.sha256(repr([splits.train, splits.validation, splits.test]).encode()).hexdigest()


def names_of(split):
    return {
        v.removeprefix("The ")
        for e in split
        for k, v in attributes(e.source).items()
        if k in ("name", "near")
    }


def test_it_is_a_task():
    assert isinstance(embedded, Task)
    assert embedded.METRICS == ("bleu", "rouge_l", "value_coverage")
    assert render_prompt(embedded.PROMPT, "name[X]") == "meaning: name[X]\ntext:"


def test_sizes():
    assert (len(SPLITS.train), len(SPLITS.validation), len(SPLITS.test)) == (1000, 100, 100)
    assert {len(e.references) for e in SPLITS.train} == {3}
    assert {len(e.references) for e in SPLITS.test} == {5}
    assert len({e.id for e in ALL}) == len(ALL)


def test_no_meaning_is_shared():
    assert len({e.source for e in ALL}) == len(ALL)
    assert len({frozenset(attributes(e.source).items()) for e in ALL}) == len(ALL)


def test_meanings_have_three_to_eight_attributes():
    counts = {len(attributes(e.source)) for e in ALL}
    assert counts == {3, 4, 5, 6, 7, 8}
    assert {k for e in ALL for k in attributes(e.source)} == set(embedded.KEYS)


def test_names_of_one_split_are_unknown_to_the_others():
    train, validation, test = names_of(SPLITS.train), names_of(SPLITS.validation), names_of(SPLITS.test)
    assert not train & test
    assert not train & validation
    assert not validation & test
    train_texts = "\n".join(r for e in SPLITS.train for r in e.references)
    assert not [name for name in test if name in train_texts]


def test_every_reference_holds_every_value_and_no_other():
    closed = {
        v for vs in embedded._grammar()["values"].values() for v in vs if len(v.split()) > 1 or v[0].isupper()
    }
    for example in ALL:
        given = attributes(example.source)
        assert example.values == tuple(v for k, v in given.items() if k != "familyFriendly")
        for reference in example.references:
            assert all(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reference) for v in example.values), (
                reference
            )
            assert not [
                v
                for v in closed - set(example.values)
                if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reference)
            ]


def test_families_are_mentioned_where_and_as_given():
    yes = re.compile(
        r"(family|child)-friendly|welcomes children|is a place for families|Families are welcome"
    )
    no = re.compile(r"adult|not family-friendly|does not welcome|no place for families|Families are not")
    for example in ALL:
        given = attributes(example.source).get("familyFriendly")
        for reference in example.references:
            assert bool(no.search(reference)) == (given == "no"), reference
            assert bool(yes.search(no.sub("", reference))) == (given == "yes"), reference


def test_english():
    for reference in {r for e in ALL for r in e.references}:
        assert reference.endswith(".")
        assert not re.search(r"\s\s|\s[.,?]|[{}\[\]]|\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", reference), (
            reference
        )
        assert all(s[0].isupper() or s[0].isdigit() for s in re.split(r"[.?] ", reference)), reference


def test_at_least_twenty_plans_and_all_are_used():
    plans = embedded.SENTENCE_PLANS
    assert len(plans) >= 20
    assert len({p.sentences for p in plans}) == len(plans)
    used = set()
    for example in SPLITS.train:
        meaning = attributes(example.source)
        of_text = {p.realize(meaning): p.name for p in plans if p.fits(meaning)}
        assert set(example.references) <= set(of_text)
        used |= {of_text[r] for r in example.references}
    assert used == {p.name for p in plans}


def test_references_of_one_meaning_differ():
    scores = []
    for example in [*SPLITS.test, *SPLITS.train[:200]]:
        assert len(set(example.references)) == len(example.references)
        for i, reference in enumerate(example.references):
            others = [r for j, r in enumerate(example.references) if j != i]
            scores.append(sacrebleu.sentence_bleu(reference, others).score)
    assert sum(scores) / len(scores) < 70


def test_the_seed_has_no_effect():
    assert digest(embedded.load(None, seed=7)) == digest(SPLITS)


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_draws_the_same(hash_seed):
    code = (
        "import hashlib; from peftlab.tasks import embedded; s = embedded.load(None, seed=1);"
        "print(hashlib.sha256(repr([s.train, s.validation, s.test]).encode()).hexdigest())"
    )
    source = str(Path(embedded.__file__).parents[2])
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": source}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(SPLITS)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"generated and takes no folder"):
        embedded.load(tmp_path, seed=42)


def test_it_is_quick():
    started = time.process_time()
    embedded.load(None, seed=42)
    assert time.process_time() - started < 1
