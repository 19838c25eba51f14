"""Groups of like length: the same step as whole batches, the least cost, the same bits after a cut."""

import math
from itertools import combinations, pairwise

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from peftlab.batches import Collator, EpochOrder, Row, count_tokens
from peftlab.config import TrainingSettings
from peftlab.errors import ConfigError
from peftlab.grouping import Grouping, divide
from peftlab.layout import choose_grouping, choose_layout
from peftlab.mapping import map_model
from peftlab.objective import ModelLoss, choose_objective
from peftlab.step_engine import choose_engine
from peftlab.streams import seed_for
from tiny_runs import SEED, make_rows, prepare, run, same

LONG = [Row(f"r{n}", [5] * length, [n % 3]) for n, length in enumerate([9, 120, 14, 100, 11, 12, 10, 90] * 2)]


def cost(groups, lengths, pass_tokens):
    return sum(
        pass_tokens + len(g) * (max(lengths[i][0] for i in g) + max(lengths[i][1] for i in g)) for g in groups
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=7),
    st.integers(0, 60),
)
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths, pass_tokens):
    groups = divide(lengths, pass_tokens=pass_tokens)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    found = cost(groups, lengths, pass_tokens)
    places = range(1, len(order))
    for number in range(len(order)):
        for cuts in combinations(places, number):
            ends = [0, *cuts, len(order)]
            other = [order[a:b] for a, b in pairwise(ends)]
            assert found <= cost(other, lengths, pass_tokens)


def test_rows_of_one_length_are_one_pass():
    assert divide([(7, 0)] * 5, pass_tokens=0) == [[0, 1, 2, 3, 4]]
    whole = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2)}
    assert Grouping("classification").split(whole) == [whole]


@pytest.mark.parametrize("head", ["causal", "seq2seq", "classification"])
def test_a_group_is_the_batch_of_its_rows(head):
    rows, collate = make_rows(head, 9), Collator(0, head)
    grouping = Grouping(head, pass_tokens=2)
    parts = grouping.split(collate(rows))
    assert len(parts) > 2
    groups = divide(grouping.lengths(rows), pass_tokens=2)
    for part, group in zip(parts, groups, strict=True):
        expected = collate([rows[i] for i in group])
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[key], expected[key]) for key in expected)
    assert sum(count_tokens(part) for part in parts) == count_tokens(collate(rows))


@pytest.mark.parametrize(
    ("name", "limit", "changes"),
    [
        ("bert", 1e-9, {}),
        ("t5", 1e-7, {}),  # here something is rounded to float32 whatever the model is in
        ("bloom", 1e-7, {}),
        ("gpt2", 1e-6, {"method": "prompt_tuning", "settings": {}}),
        (
            "bert", 1e-9,
            {"method": "adalora", "settings": {"orthogonality": 0.1, "dropout": 0.0}, "max_steps": 14},
        ),
    ],
)  # fmt: skip
def test_a_run_in_groups_is_the_run_in_whole_batches(name, limit, changes, tmp_path):
    common = {"dropout": 0.0, "dtype": torch.float64, "batch_size": 5, "phases": [], "probe": False}
    common |= {"max_steps": 6, "save_steps": 6, "validation_steps": 6} | changes
    whole, grouped = (run(tmp_path / str(how), name, grouped=how, **common) for how in (False, True))
    assert whole.trainer.num_tokens == grouped.trainer.num_tokens
    for one, two in zip(whole.told("step"), grouped.told("step"), strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-6)  # logged in float32
    for one, two in zip(whole.told("validated"), grouped.told("validated"), strict=True):
        assert math.isclose(one["validation_loss"], two["validation_loss"], rel_tol=1e-6)  # logged in float32
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(grouped.tensors[key], tensor, rtol=0, atol=limit, msg=key)


class Gradients(T.TrainerCallback):
    def __init__(self, attachment, found):
        self.attachment, self.found = attachment, found

    def on_pre_optimizer_step(self, args, state, control, **_):
        for name, parameter in self.attachment.parameters().items():
            if parameter.grad is not None:
                self.found[name] = parameter.grad.clone()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_gradients_of_a_step_are_those_of_its_whole_batches(name, tmp_path):
    seen = []
    for how in (False, True):
        made = prepare(
            tmp_path / str(how), name, grouped=how, dropout=0.0, dtype=torch.float64, batch_size=5, phases=[],
            max_steps=1, warmup_steps=0,
        )  # fmt: skip
        passes = []
        total = made.trainer.parts.objective.total
        made.trainer.parts.objective.total = lambda m, b, t=total, p=passes: p.append(b) or t(m, b)
        found = {}
        made.trainer.add_callback(Gradients(made.attachment, found))
        made.trainer.train()
        seen.append((found, passes))
    assert len(seen[1][1]) > len(seen[0][1]), "some batch was divided"
    assert seen[0][0].keys() == seen[1][0].keys() != set()
    for key, gradient in seen[0][0].items():
        torch.testing.assert_close(seen[1][0][key], gradient, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(name, tmp_path):
    how = {"grouped": True, "dropout": 0.3, "batch_size": 4, "phases": [], "save_steps": 3, "keep": 6}
    how |= {"max_steps": 6, "validation_steps": 6}
    whole = run(tmp_path / "whole", name, **how)
    cut = tmp_path / "whole" / "checkpoint-3"
    assert same(run(tmp_path / "again", name, resume=cut, **how).tensors, whole.tensors)


def test_each_pass_has_a_random_stream_of_its_own(tmp_path):
    made = prepare(tmp_path, "bert", grouped=True, batch_size=8, phases=[], max_steps=2)
    seeds = []
    objective = made.trainer.parts.objective
    total = objective.total
    objective.total = lambda m, b: (seeds.append(torch.initial_seed()) if m.training else None) or total(m, b)
    made.trainer.train()
    assert len(set(seeds)) == len(seeds) > 4
    assert {seed_for(SEED, "dropout", step, micro, 0) for step in range(2) for micro in range(2)} <= set(
        seeds
    )


def test_rows_of_a_step_go_into_its_batches_by_length():
    lengths = Grouping("classification").lengths(LONG)
    plain = EpochOrder(16, rows_per_step=8, batch_size=4, seed=1)
    sorted_ = EpochOrder(16, rows_per_step=8, batch_size=4, seed=1, lengths=lengths)
    for step in range(4):
        rows = sorted_.rows_of_step(step)
        assert sorted(rows) == sorted(plain.rows_of_step(step))
        assert [lengths[i] for i in rows] == sorted((lengths[i] for i in rows), reverse=True)


def choose(name, rows, wanted="auto", model=None):
    model = tiny_models.build(name).double() if model is None else model
    head = tiny_models.HEADS[name]
    objective, _ = choose_objective(model, Collator(0, head)(rows[:2]), head=head)
    return choose_grouping(model, rows, objective, head=head, pad_id=0, batch_size=8, wanted=wanted)


def long_rows(model):
    longest = model.config.max_position_embeddings
    return [Row(r.id, r.input_ids[:longest], r.labels) for r in LONG]


def wide_bert(kind=T.BertForSequenceClassification, config=T.BertConfig, **more):
    made = kind(
        config(vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=24, max_position_embeddings=128,
               num_labels=3, pad_token_id=0, **more)
    )  # fmt: skip
    return tiny_models.randomise(made).double().eval()


def test_groups_are_taken_where_they_cost_less():
    model = wide_bert(num_attention_heads=4)
    grouping, why = choose("bert", LONG, model=model)
    assert grouping is not None, why
    assert why.startswith("grouped by length: passes cost ")
    padded, divided = grouping.cost(LONG, 8)
    whole = [[(len(r.input_ids), 0) for r in LONG[i : i + 8]] for i in (0, 8)]
    assert padded == sum(cost([range(8)], lengths, grouping.pass_tokens) for lengths in whole)
    assert divided < 0.8 * padded
    assert choose("bert", make_rows("classification"))[1].startswith("whole batches: groups")
    assert choose("bert", LONG, wanted="padded", model=model)[0] is None
    assert choose("bert", make_rows("classification"), wanted="grouped")[0] is not None


def test_a_model_whose_rows_depend_on_pads_is_not_divided():
    model = wide_bert(T.FNetForSequenceClassification, T.FNetConfig)
    grouping, why = choose("bert", LONG, model=model)
    assert grouping is None
    assert "apart have the loss" in why
    with pytest.raises(ConfigError, match="grouped cannot be had"):
        choose("bert", LONG, wanted="grouped", model=model)


def test_the_engine_packs_causal_rows_and_groups_others(tmp_path):
    for name, packs in (("llama", True), ("bert", False)):
        made = prepare(tmp_path, name)
        head = tiny_models.HEADS[name]
        rows = make_rows(head, 16)
        engine = choose_engine(made.attachment, rows, TrainingSettings(layout="auto"), head=head, pad_id=0)
        assert (engine.isolation is not None) is packs, engine.found
        asked = choose_engine(made.attachment, rows, TrainingSettings(layout="grouped"), head=head, pad_id=0)
        assert asked.isolation is None
        assert asked.grouping is not None
        assert "grouped by length" in asked.found["layout"]
        plain = choose_engine(made.attachment, rows, TrainingSettings(layout="padded"), head=head, pad_id=0)
        assert plain.layout() == {"isolation": None, "grouping": None}


def test_files_sorted_by_length_are_seen_through():
    rows = sorted(LONG * 4, key=lambda row: len(row.input_ids))
    model = wide_bert(num_attention_heads=4)
    assert choose("bert", rows, model=model)[0] is not None
    causal = [Row(r.id, r.input_ids[:60], r.input_ids[:60]) for r in rows]
    llama = tiny_models.build("llama").double()
    found, why = choose_layout(
        llama, map_model(llama), causal, ModelLoss("causal"), head="causal", pad_id=0, batch_size=8
    )
    assert found is not None, why
