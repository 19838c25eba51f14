"""Pairs of sentences: divided so that no premise stands in two parts, written as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import DataError
from peftlab.nli_rows import Pair, divide_pairs, read_pairs, write_pairs

PAIRS = [Pair(n % 3, f"Premise {n // 2}.", f"Hypothesis {n}.") for n in range(80)]


def test_a_premise_is_the_same_however_it_is_written() -> None:
    one = Pair(0, "In Temple Bar, the bookshop isn't open.", "x")
    assert one.premise_key == Pair(1, "in Temple Bar , the bookshop is n't open .", "y").premise_key
    assert one.premise_key != Pair(0, "In Temple Bar, the bookshop is open.", "x").premise_key
    assert Pair(0, "CAFÉ", "x").premise_key == "café"


def test_parts_share_no_premise_and_depend_on_the_seed_alone() -> None:
    parts = divide_pairs(PAIRS, validation=0.1, test=0.3, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 48, "validation": 8, "test": 24}
    keys = {name: {pair.premise_key for pair in part} for name, part in parts.items()}
    assert not (
        keys["train"] & keys["test"] | keys["train"] & keys["validation"] | keys["validation"] & keys["test"]
    )
    turned = divide_pairs(PAIRS[::-1], validation=0.1, test=0.3, seed=1)
    assert {name: set(part) for name, part in turned.items()} == {
        name: set(part) for name, part in parts.items()
    }
    assert set(divide_pairs(PAIRS, validation=0.1, test=0.3, seed=2)["test"]) != set(parts["test"])


def test_too_few_premises() -> None:
    with pytest.raises(DataError, match=r"2 different premises cannot be divided into three parts"):
        divide_pairs(PAIRS[:4], validation=0.1, test=0.3, seed=1)


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 0, 1, 2]), st.text(min_size=1), st.text(min_size=1)), min_size=1
    )
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str]]
) -> None:
    pairs = [Pair(label, " ".join(premise.split()), " ".join(text.split())) for label, premise, text in rows]
    pairs = [pair for pair in pairs if pair.premise and pair.hypothesis]
    assert list(read_pairs(write_pairs(tmp_path_factory.mktemp("pairs") / "a.tsv", pairs))) == pairs


def test_a_header_is_no_pair(tmp_path: Path) -> None:
    assert list(read_pairs(write_pairs(tmp_path / "a.tsv", []))) == []
