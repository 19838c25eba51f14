"""Packed rows: the same loss and gradients as padded ones, each row alone, or a refusal."""

import math

import pytest
import torch

import tiny_models
import tiny_runs
from peftlab.batches import Collator, PackingCollator, Row, count_tokens
from peftlab.catalog import METHODS
from peftlab.errors import ConfigError, ModelError
from peftlab.isolation import Isolation
from peftlab.layout import choose_layout, share_of_pads
from peftlab.mapping import map_model
from peftlab.objective import ModelLoss, choose_objective


def rows_of_lengths(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=draw).tolist()
        prompt = length // 3
        rows.append(Row(f"row-{number}", ids, [-100] * prompt + ids[prompt:]))
    return rows


ROWS = rows_of_lengths(9, 4, 14, 6, 14)


def prepare(name, rows=ROWS, wanted="auto"):
    model = tiny_models.build(name).double()
    objective, _ = choose_objective(model, Collator(0, "causal")(rows[:2]), head="causal")
    isolation, found = choose_layout(
        model, map_model(model), rows, objective, head="causal", pad_id=0, batch_size=len(rows), wanted=wanted
    )
    return model, objective, isolation, found


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(name):
    model, objective, isolation, found = prepare(name)
    assert isolation is not None, found
    results = []
    for packed in (False, True):
        model.zero_grad()
        batch = (PackingCollator() if packed else Collator(0, "causal"))(ROWS)
        if packed:
            with isolation.rows(batch["position_ids"]):
                loss = objective.total(model, batch)
                loss.backward()
        else:
            loss = objective.total(model, batch)
            loss.backward()
        assert objective.count(batch) == sum(sum(label != -100 for label in row.labels[1:]) for row in ROWS)
        results.append(
            (
                float(loss.detach()),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    assert math.isclose(results[0][0], results[1][0], rel_tol=1e-12)
    for key, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], expected, rtol=1e-9, atol=1e-11, msg=key)


def test_a_row_does_not_see_the_others():
    model, _, isolation, _ = prepare("llama")
    other = [ROWS[0], *rows_of_lengths(4, 14, 6, 14, seed=9)]
    hidden = []
    for rows in (ROWS, other):
        batch = PackingCollator()(rows)
        with isolation.rows(batch["position_ids"]):
            out = model.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            )
        hidden.append(out.last_hidden_state[0, : len(ROWS[0].input_ids)])
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-12, atol=1e-12)


def test_windows_of_attention_are_kept():
    import transformers as T

    config = T.MistralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64, sliding_window=3, pad_token_id=0,
    )  # fmt: skip
    model = tiny_models.randomise(T.MistralForCausalLM(config)).double().eval()
    objective = ModelLoss("causal")
    isolation, found = choose_layout(
        model, map_model(model), ROWS, objective, head="causal", pad_id=0, batch_size=5
    )
    assert isolation is not None, found
    batch = PackingCollator()(ROWS)
    with isolation.rows(batch["position_ids"]):
        packed = float(objective.total(model, batch).detach())
    assert math.isclose(
        packed, float(objective.total(model, Collator(0, "causal")(ROWS)).detach()), rel_tol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [("opt", "instead of|fail|blocks"), ("bloom", "instead of|fail|blocks"), ("gptj", "0 of its 2 blocks")],
)
def test_models_that_count_positions_themselves_are_padded_or_right(name, reason):
    model, objective, isolation, found = prepare(name)
    assert isolation is None or name != "gptj", (
        "its attention cannot be reached, so the whole square would be computed"
    )
    if isolation is None:
        assert any(part in found for part in reason.split("|")), found
        with pytest.raises(ConfigError, match="packed cannot be had"):
            prepare(name, wanted="packed")
        return
    batch = PackingCollator()(ROWS)
    with isolation.rows(batch["position_ids"]):
        packed = float(objective.total(model, batch).detach())
    assert math.isclose(
        packed, float(objective.total(model, Collator(0, "causal")(ROWS)).detach()), rel_tol=1e-12
    )


def test_other_heads_and_virtual_tokens_are_padded():
    for name in ("bert", "t5"):
        model, head = tiny_models.build(name), tiny_models.HEADS[name]
        rows = tiny_runs.make_rows(head, 4)
        isolation, found = choose_layout(
            model, map_model(model), rows, ModelLoss(head), head=head, pad_id=0, batch_size=4
        )
        assert isolation is None
        assert "padded" in found
    base = tiny_models.build("llama")
    leaf = METHODS.load("prompt_tuning")
    attached = leaf.attach(base, map_model(base), leaf.Settings(), head="causal", seed=1)
    isolation, found = choose_layout(
        attached.answering, attached.family, ROWS, ModelLoss("causal"), head="causal", pad_id=0, batch_size=5
    )
    assert isolation is None
    assert "virtual tokens" in found


def test_few_pads_are_not_worth_it():
    rows = rows_of_lengths(12, 12, 12, 12)
    assert share_of_pads(rows, 4) == 0
    assert prepare("llama", rows)[2] is None
    assert prepare("llama", ROWS, wanted="padded")[2] is None


def test_a_mask_that_shows_another_row_is_found():
    batch = PackingCollator()(ROWS[:2])
    model = tiny_models.build("llama")
    strict = Isolation(model, strict=True)
    wide = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()
    with strict.rows(batch["position_ids"]), pytest.raises(ModelError, match="another row"):
        model(**{**batch, "labels": None, "attention_mask": wide}, use_cache=False)


def test_tokens_are_counted_without_pads():
    assert count_tokens(Collator(0, "causal")(ROWS)) == count_tokens(PackingCollator()(ROWS)) == 47


def test_no_row_is_predicted_from_the_row_before():
    labelled = [Row("a", [5, 6, 7], [5, 6, 7]), Row("b", [8, 9], [8, 9])]
    model, objective, isolation, found = prepare("llama", [*labelled, *ROWS])
    assert isolation is not None, found
    batch = PackingCollator()(labelled)
    assert objective.count(batch) == 3 == objective.count(Collator(0, "causal")(labelled))
    with isolation.rows(batch["position_ids"]):
        packed = float(objective.total(model, batch).detach())
    assert math.isclose(
        packed, float(objective.total(model, Collator(0, "causal")(labelled)).detach()), rel_tol=1e-12
    )
