"""Rows: the prompt is masked, the end is learnt, the source is what gets cut, the order is a function of seed and epoch."""

import pytest
import torch

import tiny_models
from peftlab import batches
from peftlab.batches import IGNORED, Collator, EpochOrder, Row, RowBuilder
from peftlab.errors import DataError
from peftlab.generation import generate
from peftlab.task import Example, render_prompt
from peftlab.tokenizing import Tokenizing

PROMPT = "Say: {source} ="


def builder(head="causal", max_length=40, prompt=PROMPT, **changes):
    return RowBuilder(tiny_models.tokenizer(**changes), prompt=prompt, head=head, max_length=max_length)


def example(source="the cat", *references, label=None, name="x"):
    return Example(id=name, source=source, references=references, label=label)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_causal_row_is_prompt_answer_end(pad_is_eos):
    made = builder(pad_is_eos=pad_is_eos)
    (row,), count = made.build([example("the cat", "runs")])
    tokenizer = made.tokenizer
    prompt = tokenizer("Say: the cat =")["input_ids"]
    answer = [*tokenizer(" runs", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row == Row("x/0", prompt + answer, [IGNORED] * len(prompt) + answer)
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert count.labelled_tokens == 2
    assert (count.read, count.kept, count.tokens, count.longest) == (
        1,
        1,
        len(row.input_ids),
        len(row.input_ids),
    )


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_end_stays_learnt_when_it_doubles_as_pad(pad_is_eos):
    made = builder(pad_is_eos=pad_is_eos)
    rows, _ = made.build([example("the cat", "runs"), example("the big blue cat", "runs on and on")])
    batch = Collator(made.tokenizer.pad_token_id, "causal")(rows)
    eos = made.tokenizer.eos_token_id
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert batch["labels"][i, length - 1] == eos, "the end of sequence carries a label"
        assert (batch["labels"][i, length:] == IGNORED).all(), "the fill does not"
        assert batch["input_ids"][i, :length].tolist() == row.input_ids
    assert (batch["labels"] == eos).sum() == 2


@pytest.mark.parametrize("closes", [False, True])
def test_no_end_of_sequence_stands_between_prompt_and_answer(closes):
    made = builder(closes=closes)
    (row,), _ = made.build([example("the cat", "runs")])
    assert row.input_ids.count(made.tokenizer.eos_token_id) == 1
    assert row.input_ids[-1] == made.tokenizer.eos_token_id


def test_an_end_in_the_middle_of_the_batch_is_the_only_label_beside_the_answer():
    made = builder(byte_level=True, max_length=100)
    (row,), _ = made.build([example("a {cat} sits", "the cat runs")])
    answer = [i for i in row.labels if i != IGNORED]
    assert made.tokenizer.decode(answer) == " the cat runs</s>"
    prompt = row.input_ids[: -len(answer)]
    assert made.tokenizer.decode(prompt) == "<s>Say: a {cat} sits ="


def test_truncation_cuts_the_source_only():
    made = builder(byte_level=True, max_length=45)
    source = "the cat sits on the mat under the house and a big blue bird flies"
    (row,), count = made.build([example(source, "green tree")])
    assert count.truncated == 1
    assert len(row.input_ids) <= 45
    text = made.tokenizer.decode(row.input_ids)
    head, _, tail = text.partition("Say: ")
    kept, _, answer = tail.partition(" =")
    assert head == "<s>", "the template's beginning stays"
    assert source.startswith(kept), "a beginning of the source stays"
    assert 0 < len(kept) < len(source)
    assert answer == " green tree</s>", "the template's end and the whole answer stay"
    longer = made.tokenizer(f"Say: {source[: len(kept) + 1]} =")["input_ids"]
    assert len(longer) + sum(i != IGNORED for i in row.labels) > 45, "no more than needed is cut"


def test_an_answer_that_does_not_fit_is_dropped_and_counted():
    made = builder(max_length=10)
    long = " ".join(["cat"] * 10)
    rows, count = made.build([example("the cat", long, "runs"), example("the dog", long)])
    assert [row.id for row in rows] == ["x/1"]
    assert count.read == 3
    assert count.kept == 1
    assert count.dropped == {"prompt and answer do not fit 10 tokens": 2}


def test_an_answer_too_long_for_seq2seq_is_dropped_and_counted():
    made = builder(head="seq2seq", max_length=6, closes=True)
    rows, count = made.build([example("the cat", " ".join(["cat"] * 6)), example("the cat", "runs")])
    assert len(rows) == 1
    assert count.dropped == {"answer longer than 6 tokens": 1}


@pytest.mark.parametrize("head", ["causal", "seq2seq"])
def test_an_empty_answer_is_the_end_alone(head):
    made = builder(head=head)
    (row,), count = made.build([example("the cat", "")])
    assert [i for i in row.labels if i != IGNORED] == [made.tokenizer.eos_token_id]
    assert count.labelled_tokens == 1


@pytest.mark.parametrize("head", ["causal", "seq2seq", "classification"])
def test_an_example_without_an_answer_is_dropped_and_counted(head):
    rows, count = builder(head=head).build([example("the cat"), example("the cat")])
    assert rows == []
    assert count.dropped == {"no answer": 2}
    assert count.read == 2


def test_every_reference_is_a_row_and_the_limit_counts_rows():
    made = builder()
    given = [example("the cat", "runs", "sits", name="a"), example("the dog", "flies", name="b")]
    rows, _ = made.build(given)
    assert [row.id for row in rows] == ["a/0", "a/1", "b/0"]
    limited, count = made.build(given, limit=2)
    assert [row.id for row in limited] == ["a/0", "a/1"]
    assert count.kept == 2


def test_a_seq2seq_row_keeps_source_and_target_apart():
    made = builder(head="seq2seq", opens=False, closes=True)
    (row,), count = made.build([example("the cat", "runs")])
    eos = made.tokenizer.eos_token_id
    assert row.input_ids == made.tokenizer("Say: the cat =")["input_ids"]
    assert row.input_ids[-1] == eos
    assert row.labels == [*made.tokenizer("runs", add_special_tokens=False)["input_ids"], eos]
    assert count.tokens == len(row.input_ids) + len(row.labels)


def test_a_classification_row_has_one_label():
    made = builder(head="classification", closes=True)
    rows, count = made.build([example("the cat", label=2), example("the big blue cat", label=0)])
    assert [row.labels for row in rows] == [[2], [0]]
    assert count.labelled_tokens == 2
    batch = Collator(0, "classification")(rows)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row.input_ids) for row in rows]


def test_seq2seq_labels_are_padded_on_their_own():
    rows = [Row("a", [5, 6, 7], [8, 2]), Row("b", [5], [8, 9, 9, 2])]
    batch = Collator(0, "seq2seq")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, IGNORED, IGNORED], [8, 9, 9, 2]]


def test_the_mask_is_by_place_not_by_token():
    rows = [Row("a", [0, 5, 0], [IGNORED, 5, 0]), Row("b", [5], [5])]
    batch = Collator(0, "causal")(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 0], [5, IGNORED, IGNORED]]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    for head in ("causal", "seq2seq"):
        with pytest.raises(DataError, match="no end-of-sequence token"):
            RowBuilder(tokenizer, prompt=PROMPT, head=head, max_length=20)
    RowBuilder(tokenizer, prompt=PROMPT, head="classification", max_length=20)


def test_a_template_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="does not fit 3 tokens"):
        builder().prompt_ids("the cat", room=3)


@pytest.mark.parametrize("changes", [{}, {"pad_is_eos": True}, {"closes": True}, {"byte_level": True}])
@pytest.mark.parametrize("source", ["the cat", "a {b} c", "the big blue bird sits on the red house"])
def test_law_5_generation_reads_the_prompt_that_training_read(changes, source):
    made = builder(max_length=60, **changes)
    (row,), _ = made.build([example(source, "runs")])
    prompt = row.input_ids[: row.labels.count(IGNORED)]
    assert made.prompt_ids(source, room=60) == prompt
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, *, input_ids, attention_mask, **_):
            seen.append(input_ids[attention_mask.bool()].tolist())
            return input_ids

    generate(
        Recorder(),
        made.tokenizer,
        [made.prompt_ids(source, room=60)],
        head="causal",
        max_new_tokens=1,
        batch_size=1,
    )
    assert seen == [prompt]


def test_law_5_companion_another_rendering_is_noticed(monkeypatch):
    made = builder()
    (row,), _ = made.build([example("the cat", "runs")])
    monkeypatch.setattr(batches, "render_prompt", lambda template, source: render_prompt("{source}", source))
    assert made.prompt_ids("the cat", room=40) != row.input_ids[: row.labels.count(IGNORED)]


@pytest.mark.parametrize("head", ["causal", "seq2seq", "classification"])
@pytest.mark.parametrize("one_prompt", [False, True])
def test_rows_tokenised_together_are_those_tokenised_alone(head, one_prompt, monkeypatch):
    words = ["the", "big", "blue", "cat", "runs", "on", "and", "on"]
    examples = [
        example(" ".join(words[: 1 + n % 8]), *words[: n % 4], label=n % 2, name=f"x{n}") for n in range(20)
    ]
    together = builder(head, max_length=12).build(examples, limit=14, one_prompt=one_prompt)
    monkeypatch.setattr(batches, "_TOGETHER", 3)
    assert builder(head, max_length=12).build(examples, limit=14, one_prompt=one_prompt) == together
    monkeypatch.setattr(Tokenizing, "read_ahead", lambda *_: None)
    assert builder(head, max_length=12).build(examples, limit=14, one_prompt=one_prompt) == together


def test_known_texts_cost_one_call(monkeypatch):
    made, calls = builder(), []
    tokenizer = made.tokenizer

    def counting(text, **options):
        calls.append(text)
        return tokenizer(text, **options)

    monkeypatch.setattr(made._tokenizing, "tokenizer", counting)
    made.build([example("the cat", "runs", "on"), example("the big cat", "runs")] * 3)
    assert len(calls) == 2, "with and without special tokens"
    first = made._tokenizing.ids("the cat", special=True)
    first.append(0)
    assert made._tokenizing.ids("the cat", special=True) != first, "each caller has a list of its own"


# -- order --------------------------------------------------------------------------------------------------------


def order(num_rows=10, per_step=4, batch=2, seed=1):
    return EpochOrder(num_rows, rows_per_step=per_step, batch_size=batch, seed=seed)


def test_every_epoch_is_a_fresh_permutation():
    made = order(12)
    seen = []
    for epoch in range(3):
        made.set_epoch(epoch)
        rows = [i for batch in made for i in batch]
        assert sorted(rows) == list(range(12))
        seen.append(tuple(rows))
    assert len(set(seen)) == 3


def test_the_last_step_is_filled_up():
    made = order(10)
    batches_ = list(made)
    assert made.steps_per_epoch == 3
    assert len(made) == len(batches_) == 6
    assert {len(batch) for batch in batches_} == {2}
    rows = [i for batch in batches_ for i in batch]
    assert sorted(rows[:10]) == list(range(10))
    assert rows[10:] == rows[:2]


def test_rows_of_step_are_the_rows_of_the_batches():
    made = order(10)
    by_batches = []
    for epoch in range(3):
        made.set_epoch(epoch)
        flat = list(made)
        by_batches += [flat[i] + flat[i + 1] for i in range(0, len(flat), 2)]
    assert [made.rows_of_step(step) for step in range(9)] == by_batches


def test_two_processes_see_together_what_one_sees():
    one = order(10, per_step=4, batch=4)
    two = order(10, per_step=4, batch=2)
    flat = list(two)
    together = [flat[i] + flat[i + 1] for i in range(0, len(flat), 2)]
    assert together == list(one)


def test_the_order_depends_on_the_seed():
    assert order(seed=1).rows_of_step(0) != order(seed=2).rows_of_step(0)
    assert order(seed=1).rows_of_step(5) == order(seed=1).rows_of_step(5)


def test_fewer_rows_than_a_step_needs():
    made = order(3, per_step=8, batch=4)
    assert len(made.rows_of_step(0)) == 8
    assert set(made.rows_of_step(0)) == {0, 1, 2}
