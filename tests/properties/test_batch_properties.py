"""What holds for rows and orders of every size."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from peftlab.batches import IGNORED, Collator, EpochOrder, Row, RowBuilder
from peftlab.task import Example

BYTES = tiny_models.tokenizer(byte_level=True)
BYTES_PAD_EOS = tiny_models.tokenizer(byte_level=True, pad_is_eos=True)
TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>"), max_size=40)
FEW = settings(max_examples=60, deadline=None)


@FEW
@given(
    num_rows=st.integers(1, 60),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_every_row_and_every_step_is_full(
    num_rows, batch, accumulation, processes, seed, epoch
):
    per_step = batch * accumulation * processes
    order = EpochOrder(num_rows, rows_per_step=per_step, batch_size=batch, seed=seed)
    order.set_epoch(epoch)
    batches = list(order)
    rows = [i for b in batches for i in b]
    assert sorted(rows[:num_rows]) == list(range(num_rows))
    assert {len(b) for b in batches} == {batch}
    assert len(batches) == len(order)
    assert len(rows) == order.steps_per_epoch * per_step
    assert order.steps_per_epoch == -(-num_rows // per_step)
    first = epoch * order.steps_per_epoch
    by_step = [i for s in range(order.steps_per_epoch) for i in order.rows_of_step(first + s)]
    assert by_step == rows
    counts = Counter(rows)
    assert max(counts.values()) - min(counts.values()) <= 1, "no row is favoured"


@FEW
@given(
    num_rows=st.integers(1, 40), batch=st.integers(1, 4), processes=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_processes_share_what_one_would_see(num_rows, batch, processes, seed):
    step = batch * processes
    alone = EpochOrder(num_rows, rows_per_step=step, batch_size=step, seed=seed)
    shared = EpochOrder(num_rows, rows_per_step=step, batch_size=batch, seed=seed)
    dealt = [list(shared)[rank::processes] for rank in range(processes)]  # accelerate deals batches in turn
    together = [[i for own in dealt for i in own[s]] for s in range(alone.steps_per_epoch)]
    assert together == list(alone)


@FEW
@given(source=TEXT, answer=TEXT, max_length=st.integers(8, 60), pad_is_eos=st.booleans())
def test_labels_stand_on_the_whole_answer_and_nowhere_else(source, answer, max_length, pad_is_eos):
    tokenizer = BYTES_PAD_EOS if pad_is_eos else BYTES
    builder = RowBuilder(tokenizer, prompt="Q {source} A", head="causal", max_length=max_length)
    rows, count = builder.build([Example("e", source, (answer,))])
    assert count.read == count.kept + sum(count.dropped.values()) == 1
    for row in rows:
        assert len(row.input_ids) == len(row.labels) <= max_length
        prompt = row.labels.count(IGNORED)
        assert row.labels == [IGNORED] * prompt + row.input_ids[prompt:]
        assert row.labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.labels[prompt:-1], clean_up_tokenization_spaces=False) == f" {answer}"
        text = tokenizer.decode(row.input_ids[1:prompt], clean_up_tokenization_spaces=False)
        assert text.startswith("Q ")
        assert text.endswith(" A")
        assert f"Q {source} A".startswith(text[:-2])
        assert bool(count.truncated) == (text != f"Q {source} A")


@FEW
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    pad=st.integers(0, 9),
)
def test_padding_adds_nothing_that_is_learnt(lengths, pad):
    rows = []
    for number, (inputs, _) in enumerate(lengths):
        ids = [(7 * number + i) % 10 for i in range(inputs)]
        rows.append(Row(str(number), ids, list(ids)))
    batch = Collator(pad, "causal")(rows)
    assert int(batch["attention_mask"].sum()) == sum(len(row.input_ids) for row in rows)
    assert int((batch["labels"] != IGNORED).sum()) == sum(len(row.labels) for row in rows)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    for i, row in enumerate(rows):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == row.input_ids
