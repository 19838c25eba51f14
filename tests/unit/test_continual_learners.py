"""The document's continual learners: one base that stays, a model for each task, switched whole or not at all."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import peftlab
import tiny_models
from peftlab.continual.answers import hash_tensors
from peftlab.continual.learner import ContinualLearner
from peftlab.continual.learners import (
    FullLayerContinualLearner,
    HybridLoRAFullLayerLearner,
    LoRAContinualLearner,
)
from peftlab.errors import CheckpointError, DataError, EvaluationError, InputError, UnknownNameError
from peftlab.extensions.bundles import record_of
from peftlab.extensions.config import ExtensionConfig
from peftlab.task import Example

LEARNERS = (LoRAContinualLearner, FullLayerContinualLearner, HybridLoRAFullLayerLearner)
ROWS = [{"prompt": f"say {n}", "completion": "yes" if n % 2 else "no"} for n in range(8)]
OTHER = [{"prompt": f"say {n}", "completion": "never"} for n in range(8)]


def base(name: str) -> tuple[Any, Any]:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    model = tiny_models.build(name)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tiny_models.randomise(model)  # the new rows too: the same base every time
    if name == "llama":
        model.config.max_position_embeddings = 512  # rotary: only the config knows a limit
    return model, tokenizer


def learner(kind: type[ContinualLearner], folder: Path, name: str = "llama", **more: Any) -> Any:
    model, tokenizer = base(name)
    own = {} if kind is FullLayerContinualLearner else {"lora_r": 2, "lora_dropout": 0.0}
    config = more.pop("config", None) or ExtensionConfig(save_directory=folder, **own)
    options = {"learning_rate": 1e-2, "max_length": 64, "max_new_tokens": 4, "prompt": "{source}:"} | more
    made = kind(model, tokenizer, config=config, **options)  # type: ignore[arg-type]
    made.prepare_model()
    return made


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 9)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize(("kind", "name"), list(zip(LEARNERS, ("llama", "t5", "t5"), strict=True)))
def test_tasks_are_learned_kept_apart_and_found_again(
    kind: type[ContinualLearner], name: str, tmp_path: Path
) -> None:
    made = learner(kind, tmp_path, name)
    before = hash_tensors(dict(made.base_model.named_parameters()))
    minutes = made.train_task(ROWS, "first", epochs=1, batch_size=2)
    assert isinstance(minutes, float)
    assert 0 < minutes < 1
    first = logits(made.current_model)
    scores = made.evaluate_task(ROWS, "first", num_samples=4)
    made.train_task(OTHER, "second", 1, 2)
    assert (made.current_task, made.list_tasks()) == ("second", ["first", "second"])
    assert not torch.equal(logits(made.current_model), first)
    made.switch_to_task("first")
    assert torch.equal(logits(made.current_model), first)
    assert made.evaluate_task(ROWS, "first", num_samples=4)["bleu"].value == scores["bleu"].value
    assert hash_tensors(dict(made.base_model.named_parameters())) == before
    again = learner(kind, tmp_path, name)
    again.switch_to_task("first")
    assert torch.equal(logits(again.current_model), first)
    assert again.current_model.get_input_embeddings().weight.data_ptr() == (
        again.base_model.get_input_embeddings().weight.data_ptr()
    )


def test_a_shared_layer_goes_on_learning_in_the_models_of_all_tasks(tmp_path: Path) -> None:
    made = learner(HybridLoRAFullLayerLearner, tmp_path, use_shared_layer=True)
    made.train_task(ROWS, "first", 1, 4)
    first = logits(made.current_model)
    made.train_task(OTHER, "second", 1, 4)
    layers = []
    for task in ("first", "second"):
        made.switch_to_task(task)
        record = record_of(made.current_model)
        assert record is not None
        layers.append(record.attachment.layers.parameters)  # type: ignore[attr-defined]
    assert all(layers[0][n].data_ptr() == layers[1][n].data_ptr() for n in layers[0])
    made.switch_to_task("first")
    now = logits(made.current_model)
    assert not torch.equal(now, first)  # what the second task did to the layer shows in the first
    again = learner(HybridLoRAFullLayerLearner, tmp_path, use_shared_layer=True)
    again.switch_to_task("first")
    assert torch.equal(logits(again.current_model), now)
    again.train_task(ROWS, "third", 1, 4)
    records = [record_of(model) for model in again._models.values()]
    assert len(records) == 3
    pointers = [next(iter(r.attachment.layers.parameters.values())).data_ptr() for r in records if r]  # type: ignore[attr-defined]
    assert len(set(pointers)) == 1


def test_a_task_that_is_trained_again_starts_as_before_and_is_replaced(tmp_path: Path) -> None:
    made = learner(LoRAContinualLearner, tmp_path)
    made.train_task(ROWS, "task", 1, 4)
    first = logits(made.current_model)
    made.train_task(OTHER, "other", 1, 4)
    made.train_task(ROWS, "task", 1, 4)
    assert torch.equal(logits(made.current_model), first)
    assert made.list_tasks() == ["other", "task"]
    assert len(list((tmp_path / "task").iterdir())) == 1


def test_examples_and_rows_are_the_same_data(tmp_path: Path) -> None:
    made = learner(LoRAContinualLearner, tmp_path)
    examples = [Example(f"row-{n}", row["prompt"], (row["completion"],)) for n, row in enumerate(ROWS)]
    made.train_task(ROWS, "rows", 1, 4)
    made.train_task(examples, "examples", 1, 4)
    counts = [made.evaluate_task(data, "rows", num_samples=None)["bleu"].count for data in (ROWS, examples)]
    assert counts == [8, 8]
    assert made.evaluate_base(ROWS, num_samples=3)["bleu"].count == 3


def test_a_failed_evaluation_raises_and_gives_no_number(tmp_path: Path) -> None:
    made = learner(LoRAContinualLearner, tmp_path, metrics=("value_coverage",))
    made.train_task(ROWS, "task", 1, 4)
    with pytest.raises(EvaluationError):
        made.evaluate_task(ROWS, "task")


def test_a_damaged_bundle_is_not_loaded(tmp_path: Path) -> None:
    made = learner(LoRAContinualLearner, tmp_path)
    made.train_task(ROWS, "task", 1, 4)
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    again = learner(LoRAContinualLearner, tmp_path)
    with pytest.raises(CheckpointError):
        again.switch_to_task("task")
    assert again.current_task is None


def test_what_cannot_be_done_says_why(tmp_path: Path) -> None:
    model, tokenizer = base("llama")
    with pytest.raises(InputError, match=r"with its tokenizer"):
        LoRAContinualLearner(model)
    with pytest.raises(InputError, match=r"no \{source\}"):
        LoRAContinualLearner(model, tokenizer, prompt="say")
    with pytest.raises(InputError, match=r"freeze_base=False"):
        LoRAContinualLearner(model, tokenizer, config=ExtensionConfig(freeze_base=False))
    made = LoRAContinualLearner(model, tokenizer, config=ExtensionConfig(save_directory=tmp_path))
    with pytest.raises(InputError, match=r"call prepare_model first"):
        made.train_task(ROWS, "task")
    made.prepare_model()
    with pytest.raises(InputError, match=r"no task has been trained yet"):
        made.switch_to_task("task")
    with pytest.raises(InputError, match=r"epochs must be a whole number of 1 or more, got 0"):
        made.train_task(ROWS, "task", epochs=0)
    with pytest.raises(InputError, match=r"a/b"):
        made.train_task(ROWS, "a/b")
    for rows, message in (
        ([], r"there are no rows"),
        ([{"prompt": "a"}], r"row 0: expected .* got prompt"),
        ([{"prompt": "a", "completion": " "}], r"row 0: 'completion' must be a text"),
        ([{"prompt": "a", "completion": "b" * 9000}], r"no row is left"),
    ):
        with pytest.raises(DataError, match=message):
            made.train_task(rows, "task")
    made.learning_rate, made.max_length = 1e-2, 64
    made.train_task(ROWS, "task", 1, 4)
    with pytest.raises(InputError, match=r"num_samples must be a whole number of 1 or more, .* got 0"):
        made.evaluate_task(ROWS, "task", num_samples=0)
    with pytest.raises(UnknownNameError, match=r"tsk"):
        made.switch_to_task("tsk")


@pytest.mark.parametrize("kind", LEARNERS)
def test_signatures_are_the_documents(kind: type[ContinualLearner]) -> None:
    assert getattr(peftlab, kind.__name__) is kind
    train = inspect.signature(kind.train_task).parameters
    assert list(train)[1:] == ["train_data", "task_name", "epochs", "batch_size"]
    assert (train["epochs"].default, train["batch_size"].default) == (5, 16)
    assert inspect.signature(kind.evaluate_task).parameters["num_samples"].default == 500
    assert list(inspect.signature(kind).parameters)[:3] == ["model_name", "tokenizer", "device"]
