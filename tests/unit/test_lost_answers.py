"""Answers that a tokenizer cannot write, prompts that are cut alike, and stop texts that are special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
import whole_runs
from peftlab.batches import IGNORED, RowBuilder
from peftlab.config import build_config
from peftlab.resolve import resolve
from peftlab.task import Example
from peftlab.token_choice import StopTexts


def test_answers_that_cannot_be_written_are_counted() -> None:
    tokenizer = tiny_models.tokenizer()  # words of its own alone
    builder = RowBuilder(tokenizer, prompt="{source}", head="causal", max_length=32)
    known, unknown = "the dog sits", "the {dog} sits"
    examples = [Example("a", "a cat", (known, unknown)), Example("b", "a cat", ("the\ndog",))]
    _, count = builder.build(examples)
    assert count.unwritable == 2
    assert count.unwritable_example is not None
    assert count.unwritable_example[0] == unknown
    exact = RowBuilder(
        tiny_models.tokenizer(byte_level=True), prompt="{source}", head="causal", max_length=32
    )
    assert exact.build(examples)[1].unwritable == 0
    told = RowBuilder(tokenizer, prompt="{source}", head="classification", max_length=32)
    assert told.build([Example("a", "{", label=1)])[1].unwritable == 0


def test_the_preflight_says_which_split_holds_them(tmp_path: Path) -> None:
    """The pre-flight of a model whose vocabulary lacks what the answers need, and of one that has bytes."""
    folder = whole_runs.save_byte_model(tmp_path / "model")
    whole_runs.write_e2e(tmp_path / "data")
    values = whole_runs.make_values(tmp_path, task={"name": "e2e_nlg", "data_dir": str(tmp_path / "data")})
    values["model"]["name"] = str(folder)
    assert not [n for n in resolve(build_config(values)).preflight["notes"] if "cannot be written" in n]
    tiny_models.tokenizer().save_pretrained(folder)
    notes = [n for n in resolve(build_config(values)).preflight["notes"] if "cannot be written" in n]
    assert [note.partition(":")[0] for note in notes] == ["train", "validation", "test"]
    assert "which reads back as" in notes[0]


def test_all_answers_that_are_compared_follow_one_prompt() -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    builder = RowBuilder(tokenizer, prompt="Say: {source} =", head="causal", max_length=40)
    answers = ("no", "perhaps not", "yes")
    example = [Example("a", "a long source " * 9, answers)]

    def prompts(*, one_prompt: bool) -> set[tuple[int, ...]]:
        rows, count = builder.build(example, one_prompt=one_prompt)
        assert count.truncated == 3
        return {tuple(row.input_ids[: row.labels.count(IGNORED)]) for row in rows}

    assert len(prompts(one_prompt=False)) > 1
    (prompt,) = prompts(one_prompt=True)
    longest = max(len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers)
    assert len(prompt) == 40 - longest - 1


@pytest.mark.parametrize("mark", ["</s>", "x</s>", "<|im_end|>"])
def test_a_stop_text_that_is_a_special_token_fires(mark: str) -> None:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    ids = tokenizer(f"ax{mark.removeprefix('x')} on", add_special_tokens=False)["input_ids"]
    end = next(i for i, token in enumerate(ids) if token in tokenizer.all_special_ids) + 1
    check = StopTexts(tokenizer, (mark,), 0)
    fired = [bool(check(torch.tensor([ids[:n]]), None)) for n in range(1, len(ids) + 1)]
    assert fired.index(True) == end - 1
    opened = [tokenizer.eos_token_id, *tokenizer("a b", add_special_tokens=False)["input_ids"]]
    assert not StopTexts(tokenizer, ("</s>",), 0)(torch.tensor([opened]), None), "a decoder may begin with it"
