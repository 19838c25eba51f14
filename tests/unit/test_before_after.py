"""Base and tuned model in one loaded model against two models of their own and the published formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from before_after_cases import (
    TEXTS,
    apart,
    attached,
    log_softmax,
    passages,
    reader,
    seen_alone,
    survey,
    tokenizer,
)

import tiny_bundles
import tiny_models
from peftlab.batches import IGNORED
from peftlab.errors import DataError, ModelError
from peftlab.inspection.before_after.lens import Lens
from peftlab.inspection.before_after.passages import (
    MOST_PASSAGES,
    PassageReader,
    read_general_text,
)
from peftlab.inspection.before_after.sides import OUTPUT, Sides
from peftlab.inspection.before_after.token_sums import SAMPLE_TOKENS, TokenSample

LORA = {"rank": 4, "targets": "both"}


@pytest.fixture(scope="module")
def lora() -> Any:
    """On GPT-2, whose norms stay in float64."""
    return attached("gpt2", **LORA)


@pytest.fixture(scope="module")
def values(lora: Any) -> Any:
    return survey(lora, "gpt2")


@pytest.fixture(scope="module")
def alone(lora: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every text through both models on their own."""
    base, tuned = apart(lora, "gpt2")
    ids = [tokenizer("gpt2")(text)["input_ids"] for text in TEXTS]
    return [
        tuple(seen_alone(model, model.transformer.h, row) for model in (base, tuned))  # type: ignore[misc]
        for row in ids
    ]


# -- one pass against two models of their own ---------------------------------------------------------------------


def test_drift_and_cosine_with_and_without_the_first_token(values: Any, alone: Any) -> None:
    found, _, notes, sides = values
    assert (sides.num_passes, notes) == (1, [])
    for layer in range(3):
        drift, cosine = [], []
        for one, other in alone:
            h, moved = one["states"][layer], other["states"][layer]
            lengths = np.linalg.norm(h, axis=1)
            drift.append(np.linalg.norm(moved - h, axis=1) / lengths)
            cosine.append((h * moved).sum(axis=1) / lengths / np.linalg.norm(moved, axis=1))
        row = found["layers"][layer]
        for name, per_text in (("drift", drift), ("cosine", cosine)):
            assert row[name] == pytest.approx(np.concatenate(per_text).mean(), abs=1e-10)
            rest = np.concatenate([text[1:] for text in per_text])
            assert row[f"{name}_without_first"] == pytest.approx(rest.mean(), abs=1e-10)


def hsic(k: np.ndarray, other: np.ndarray) -> float:
    """HSIC_1 of Song et al. 2012, equation 5, of two Gram matrices."""
    n = len(k)
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    ones = np.ones(n)
    middle = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ other) + middle - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3)))


def test_similarity_is_debiased_linear_cka_without_first_tokens(values: Any, alone: Any) -> None:
    similarity = values[0]["similarity"]
    sides = [
        [np.concatenate([text[side]["states"][layer][1:] for text in alone]) for layer in range(3)]
        for side in (0, 1)
    ]
    assert similarity["tokens"] == len(sides[0][0])
    for i in range(3):
        for j in range(3):
            k, other = (x @ x.T for x in (sides[0][i], sides[1][j]))
            expected = hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))
            assert similarity["all_dimensions"][i][j] == pytest.approx(expected, abs=1e-9)
    assert values[0]["layers"][1]["cka_all_dimensions"] == similarity["all_dimensions"][1][1]


def test_attention_drift_of_every_head(values: Any, alone: Any) -> None:
    (seen,) = values[0]["attention"]
    for layer in range(3):
        js, tv = [], []
        for one, other in alone:
            p, q = (
                one["attention"][layer][:, 1:],
                other["attention"][layer][:, 1:],
            )  # the first query sees itself alone
            middle = (p + q) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                parts = [np.nan_to_num(side * np.log(side / middle)) for side in (p, q)]
            js.append(sum(part.sum(axis=-1) for part in parts) / 2)
            tv.append(np.abs(p - q).sum(axis=-1) / 2)
        row = seen["layers"][layer]
        np.testing.assert_allclose(row["js"], np.concatenate(js, axis=1).mean(axis=1), atol=1e-9)
        np.testing.assert_allclose(row["tv"], np.concatenate(tv, axis=1).mean(axis=1), atol=1e-9)
    assert seen["queries"] == sum(len(one["logits"]) - 1 for one, _ in alone)


def test_loss_of_general_text_is_that_of_the_models_themselves(values: Any, alone: Any) -> None:
    loss = values[1]
    ids = [tokenizer("gpt2")(text)["input_ids"] for text in TEXTS]
    totals = np.zeros(2)
    for row, pair in zip(ids, alone, strict=True):
        for side, one in enumerate(pair):
            said = log_softmax(one["logits"])[:-1]
            totals[side] -= said[np.arange(len(row) - 1), row[1:]].sum()
    count = sum(len(row) - 1 for row in ids)
    assert (loss["passages"], loss["tokens"]) == (len(TEXTS), count)
    assert loss["base"] == pytest.approx(totals[0] / count, abs=1e-10)
    assert loss["tuned"] == pytest.approx(totals[1] / count, abs=1e-10)
    assert loss["difference"] == pytest.approx((totals[1] - totals[0]) / count, abs=1e-10)
    low, high = loss["interval"]
    assert low <= loss["difference"] <= high


def test_lens_and_divergence_are_those_of_norm_and_head(lora: Any, alone: Any) -> None:
    one_text = survey(lora, "gpt2", texts=(TEXTS[0], TEXTS[0]))[0]
    base, tuned = apart(lora, "gpt2")
    ids = tokenizer("gpt2")(TEXTS[0])["input_ids"]
    columns = np.arange(1, len(ids))  # a short text is asked at every token but the first
    assert one_text["lens_tokens"] == 2 * len(columns)
    for layer in range(3):
        with torch.no_grad():
            log_p, log_q = (
                log_softmax(
                    model.lm_head(model.transformer.ln_f(torch.from_numpy(side["states"][layer]))).numpy()
                )
                for model, side in zip((base, tuned), alone[0], strict=True)
            )
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[columns].mean()
        row = one_text["layers"][layer]
        assert row["kl"] == pytest.approx(divergence, abs=1e-10)
        same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1))[columns].mean()
        assert row["same_top"] == pytest.approx(same, abs=1e-12)
        for name, side in (("base", log_p), ("tuned", log_q)):
            said = -side[columns[:-1], np.array(ids)[columns[:-1] + 1]].mean()
            assert row[f"lens_loss_{name}"] == pytest.approx(said, abs=1e-10)
    output = [log_softmax(side["logits"]) for side in alone[0]]
    assert one_text["output"]["kl"] == pytest.approx(
        (np.exp(output[0]) * (output[0] - output[1])).sum(axis=-1)[columns].mean(), abs=1e-10
    )


# -- every kind of method -----------------------------------------------------------------------------------------

METHODS_HERE = {
    "dora": ("llama", "lora", {"use_dora": True, **LORA}, "DoRA"),
    "biases": ("gpt2", "lora", {"bias": "lora_only", **LORA}, "changes tensors of the base"),
    "adalora": ("llama", "adalora", {"initial_rank": 4, "target_rank": 2, "interval_steps": 2}, "not for adalora"),
    "ia3": ("llama", "ia3", {}, "not for ia3"),
    "prompt_tuning": ("gpt2", "prompt_tuning", {"num_virtual_tokens": 3}, "before every row"),
    "prefix_tuning": ("llama", "prefix_tuning", {"num_virtual_tokens": 3}, "before every row"),
    "new_layer": ("llama", "new_layer", {"position": 1}, "no adapter of peft"),
    "new_layer_last": ("gpt2", "new_layer", {}, "no adapter of peft"),
    "hybrid": ("llama", "hybrid", {"rank": 2, "position": 1}, "adds blocks"),
    "full": ("llama", "full", {}, "no adapter of peft"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_method_that_cannot_mix_is_run_twice_and_its_base_is_the_base(name: str) -> None:
    model, method, settings, why = METHODS_HERE[name]
    attachment = attached(model, method, double=False, **settings)
    before = tiny_bundles.state_of(attachment.model)
    found, loss, notes, sides = survey(attachment, model)
    assert tiny_bundles.differences(before, tiny_bundles.state_of(attachment.model)) == []
    assert sides.num_passes == 2
    assert why in sides.note
    assert notes == []
    base = tiny_models.build(model, 3)
    totals, count = np.zeros(2), 0
    for text in TEXTS:
        ids = tokenizer(model)(text)["input_ids"]
        for side, one in enumerate((base, attachment.model)):
            with torch.no_grad():
                logits = one(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
            said = log_softmax(logits[-len(ids) :].double().numpy())[:-1]
            totals[side] -= said[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert [loss["base"], loss["tuned"]] == pytest.approx((totals / count).tolist(), abs=2e-5)
    assert found["output"]["kl"] > 1e-4
    assert all(0 <= value <= np.log(2) for row in found["attention"][0]["layers"] for value in row["js"])


@pytest.mark.parametrize("name", ["new_layer", "hybrid"])
def test_layers_behind_a_new_block_are_held_against_themselves(name: str) -> None:
    model, method, settings, _ = METHODS_HERE[name]
    attachment = attached(model, method, double=False, **settings)
    found, _, _, sides = survey(attachment, model)
    assert dict(sides.layers("layers").pairs) == {0: 0, 1: 2, 2: 3}
    assert sides.layers("layers").added == (1,)
    drifts = [row["drift"] for row in found["layers"]]
    assert (drifts[0] == 0) == (name == "new_layer")  # nothing has changed below the new block
    assert min(drifts[1:]) > 0.01


def test_a_pass_that_mixes_wrongly_is_found_out_on_the_first_rows() -> None:
    attachment = attached("llama", **LORA)
    sides = Sides(attachment)
    batch = reader(attachment, "llama").one_batch(passages(attachment, "llama"), [0, 1], decoder=False)
    assert sides.num_passes == 1
    sides.prove("layers", batch.inputs, batch.width)
    assert sides.num_passes == 1
    # a base tensor that training has changed is seen by every row, whatever peft is told
    weight = attachment.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    real_disabled = attachment.disabled

    class Changed:
        def __enter__(self) -> None:
            self.inner = real_disabled()
            self.inner.__enter__()
            weight.data.mul_(0.5)

        def __exit__(self, *raised: Any) -> None:
            weight.data.mul_(2.0)
            self.inner.__exit__(*raised)

    attachment.disabled = Changed
    sides.prove("layers", batch.inputs, batch.width)
    assert sides.num_passes == 2
    assert "differ" in sides.note


def test_an_encoder_decoder_has_both_stacks_and_speaks_in_the_decoder() -> None:
    attachment = attached("t5", **LORA)
    encoder, loss, notes, _ = survey(attachment, "t5", stack="encoder")
    assert (encoder["output"], loss, notes) == (None, None, [])
    decoder, loss, notes, sides = survey(attachment, "t5", stack="decoder")
    assert sides.num_passes == 1
    assert (loss, notes) == (None, [])  # general text is the answer to nothing
    assert [seen["kind"] for seen in decoder["attention"]] == ["self", "cross"]
    assert decoder["output"]["kl"] > 0
    base, tuned = apart(attachment, "t5")
    batch = reader(attachment, "t5").one_batch(passages(attachment, "t5"), [0], decoder=True)
    with torch.no_grad():
        seen = [m(**batch.inputs, output_hidden_states=True).decoder_hidden_states[1] for m in (base, tuned)]
    one, other = sides.hidden_states("decoder", batch.inputs, batch.width)
    torch.testing.assert_close(one[0], seen[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(other[0], seen[1], rtol=0, atol=1e-5)


def test_a_classifier_has_no_lens_and_says_so() -> None:
    found, loss, notes, _ = survey(attached("bert", **LORA), "bert")
    assert (found["output"], loss) == (None, None)
    assert "ends in classes" in notes[0]
    assert found["layers"][0]["drift"] > 0.01
    assert "kl" not in found["layers"][0]


# -- the lens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt", "bart"])
def test_the_lens_on_the_last_layer_gives_the_models_logits(name: str) -> None:
    attachment = attached(name, **LORA)
    sides = Sides(attachment)
    stack = list(sides.base_family.stacks)[-1]
    batch = reader(attachment, name).one_batch(passages(attachment, name), [0, 1], decoder=stack == "decoder")
    sides.prove(stack, batch.inputs, batch.width)
    assert (sides.num_passes, "rows apart" in sides.note) == ((2, True) if name == "opt" else (1, False))
    states = sides.hidden_states(stack, batch.inputs, batch.width)
    lens = Lens(sides, stack)
    lens.prove(batch, *states)
    found = lens.logits(states[0][OUTPUT], states[1][OUTPUT])
    for model, logits in zip(apart(attachment, name), found, strict=True):
        with torch.no_grad():
            expected = model(**batch.inputs).logits
        # norms of Llama and T5 compute in float32, whatever they are given
        torch.testing.assert_close(logits[batch.real], expected[batch.real], rtol=0, atol=1e-5)


def test_there_is_no_lens_where_it_does_not_give_the_logits(lora: Any) -> None:
    sides = Sides(lora)
    batch = reader(lora, "gpt2").one_batch(passages(lora, "gpt2"), [0, 1], decoder=False)
    base, tuned = sides.hidden_states("layers", batch.inputs, batch.width)
    wrong = dict(base) | {OUTPUT: base[0]}
    with pytest.raises(ModelError, match=r"last layer of the base are .* away from its own logits"):
        Lens(sides, "layers").prove(batch, wrong, tuned)


# -- what is read -------------------------------------------------------------------------------------------------


def test_a_sample_leaves_first_tokens_out_and_is_bounded() -> None:
    lengths = [1, 400, 300, 2]
    sample = TokenSample(lengths, [0], 4)
    columns = sample._columns
    assert 0 not in np.concatenate(list(columns.values()))
    assert sum(map(len, columns.values())) == SAMPLE_TOKENS
    assert len(columns[0]) == 0
    assert abs(len(columns[1]) / len(columns[2]) - 4 / 3) < 0.05
    assert TokenSample([3, 1], [0], 4).similarity()["tokens"] == 0
    assert "too few" in TokenSample([3, 1], [0], 4).similarity()["note"]


def test_general_text_comes_from_a_file_or_from_peftlab(lora: Any, tmp_path: Any) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("the cat sits\n\n  a dog runs  \n", encoding="utf-8")
    assert read_general_text(file) == ["the cat sits", "a dog runs"]
    made = reader(lora, "gpt2")
    assert made.general("any", file).told == "2 lines of notes.txt"
    own = made.general("some/base", None)
    assert len(own.rows) == MOST_PASSAGES
    assert "written for this purpose" in own.told
    assert "unknown to this tokenizer" in own.told  # the tiny tokenizer has sixty words
    assert "embedded base's own generator" in made.general("peftlab/tiny-base", None).told
    file.write_text("one line\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"notes.txt holds 1 passages: give 2 at least"):
        read_general_text(file)
    with pytest.raises(DataError, match=r"cannot be read"):
        read_general_text(tmp_path / "nothing.txt")


def test_rows_of_the_task_are_those_of_its_training(lora: Any) -> None:
    from peftlab.batches import RowBuilder
    from peftlab.config import build_config
    from peftlab.tasks import embedded

    config = build_config({"task": {"name": "embedded"}})
    byte_level = tiny_models.tokenizer(byte_level=True)
    model = tiny_models.build("llama")
    model.resize_token_embeddings(len(byte_level), mean_resizing=False)
    made = PassageReader(model, byte_level, "causal")
    made.max_length = 8
    with pytest.raises(DataError, match=r"no test row of embedded fits 8 tokens"):
        made.of_task(config)
    made.max_length = 400
    found = made.of_task(config)
    builder = RowBuilder(byte_level, prompt=embedded.PROMPT, head="causal", max_length=400)
    (row,), _ = builder.build(embedded.load(None, seed=config.data_seed).test[:1], limit=1)
    assert found.rows[0].source.ids.tolist() == row.input_ids
    answers = found.targets[0]
    assert answers[-1] == IGNORED
    np.testing.assert_array_equal(answers[:-1], row.labels[1:])


def test_padding_is_given_up_where_it_changes_what_is_read(lora: Any) -> None:
    from peftlab.inspection.before_after.passages import is_padding_harmless

    sides, made, given = Sides(lora), reader(lora, "gpt2"), passages(lora, "gpt2")
    assert is_padding_harmless(sides, made, given, "layers", decoder=False)
    real = sides.hidden_states

    def leaking(stack: str, inputs: Any, width: int) -> Any:
        base, tuned = real(stack, inputs, width)
        return base, {layer: states + width for layer, states in tuned.items()}

    class Leaking:
        hidden_states = staticmethod(leaking)

    assert not is_padding_harmless(Leaking(), made, given, "layers", decoder=False)
    batches = made.batches(given, decoder=False, padded=False)
    lengths = [[len(given.rows[i].source) for i in batch.numbers] for batch in batches]
    assert all(len(set(group)) == 1 for group in lengths)
