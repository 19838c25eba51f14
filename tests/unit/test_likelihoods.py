"""How likely answers are: equal to the model's own loss and to a calculation by hand, batched or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import task_samples
import tiny_models
import whole_runs
from peftlab.batches import IGNORED, Collator, RowBuilder
from peftlab.errors import ConfigError, EvaluationError
from peftlab.likelihoods import log_likelihoods, most_likely
from peftlab.seed_evaluation import ModelEvaluator
from peftlab.task import Example
from peftlab.tasks import multi_nli

CLASSES = {"llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
HEADS = {"llama": "causal", "t5": "seq2seq"}


def prepare(name: str, folder: Path, max_length: int = 200) -> tuple[torch.nn.Module, RowBuilder]:
    """A tiny model in float64 and what makes its rows."""
    path = whole_runs.save_byte_model(folder / name, name)
    model = getattr(transformers, CLASSES[name]).from_pretrained(path, dtype=torch.float64)
    tokenizer = tiny_models.tokenizer(byte_level=True)
    return model, RowBuilder(tokenizer, prompt=multi_nli.PROMPT, head=HEADS[name], max_length=max_length)


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_models_own_loss(name: str, tmp_path: Path) -> None:
    model, builder = prepare(name, tmp_path)
    rows, _ = builder.build([Example("a", "one two", multi_nli.LABELS), Example("b", "three", ("x",))])
    pad, head = builder.tokenizer.pad_token_id, builder.head
    found = log_likelihoods(model, rows, pad_id=pad, head=head, batch_size=4)
    for row, number in zip(rows, found, strict=True):
        with torch.no_grad():
            loss = model(**Collator(pad, head)([row])).loss
        count = sum(label != IGNORED for label in row.labels)
        assert number == pytest.approx(-loss.item() * count, rel=1e-6)  # transformers computes it in float32
    single = log_likelihoods(model, rows, pad_id=pad, head=head, batch_size=1)
    assert found == pytest.approx(single, rel=1e-10)
    assert all(number < 0 for number in found)


def test_it_is_the_product_of_the_tokens_probabilities(tmp_path: Path) -> None:
    model, builder = prepare("llama", tmp_path)
    (row,), _ = builder.build([Example("a", "one two", ("neutral",))])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    answer = [i for i, label in enumerate(row.labels) if label != IGNORED]
    by_hand = sum(logits[i - 1].log_softmax(-1)[row.input_ids[i]].item() for i in answer)
    (found,) = log_likelihoods(
        model, [row], pad_id=builder.tokenizer.pad_token_id, head="causal", batch_size=1
    )
    assert found == pytest.approx(by_hand, rel=1e-10)


def test_the_most_likely_answer_is_taken(tmp_path: Path) -> None:
    model, builder = prepare("llama", tmp_path)
    examples = [Example(f"test-{i}", f"source {i}", ("neutral",)) for i in range(3)]
    chosen = most_likely(model, builder, examples, multi_nli.LABELS, batch_size=2)
    for example, answer in zip(examples, chosen, strict=True):
        rows, _ = builder.build([Example("x", example.source, multi_nli.LABELS)])
        numbers = log_likelihoods(
            model, rows, pad_id=builder.tokenizer.pad_token_id, head="causal", batch_size=1
        )
        assert answer == multi_nli.LABELS[numbers.index(max(numbers))]
    builder.max_length = 9
    with pytest.raises(EvaluationError, match=r"cannot be compared \(prompt and answer do not fit"):
        most_likely(model, builder, examples, multi_nli.LABELS, batch_size=2)


def test_multi_nli_by_likelihood(tmp_path: Path) -> None:
    data = task_samples.write_multi_nli(tmp_path / "pairs")
    evaluator = ModelEvaluator(None, str(whole_runs.save_byte_model(tmp_path / "llama")), device="cpu")
    result = evaluator.evaluate("multi_nli", 3, data_dir=data, by_likelihood=True)
    assert {row["prediction"] for row in result.predictions} <= set(multi_nli.LABELS)
    assert result.metrics["label_accuracy"]["signature"].endswith("no label:0")
    assert result.decoding == {
        "kind": "the most likely label", "labels": list(multi_nli.LABELS), "batch_size": 8,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"its data set has no labels"):
        evaluator.evaluate(
            "samsum", 1, data_dir=task_samples.write_samsum(tmp_path / "chats"), by_likelihood=True
        )
    encoder = ModelEvaluator(None, str(whole_runs.save_byte_model(tmp_path / "bert", "bert")), device="cpu")
    with pytest.raises(ConfigError, match=r"it is a classifier"):
        encoder.evaluate("multi_nli", 1, data_dir=data, by_likelihood=True)
