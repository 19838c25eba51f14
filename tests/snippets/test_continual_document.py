"""The model extensions document's `train_task`, as it stands there and as peftlab's learners have it, on one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import documents_s0
import pytest
import torch

import tiny_models
from peftlab import (
    ExtensionConfig,
    FullLayerContinualLearner,
    HybridLoRAFullLayerLearner,
    LoRAContinualLearner,
)

ROWS = [{"prompt": f"say {n}", "completion": "yes" if n % 2 else "no"} for n in range(8)]


def prepared(kind: Any, folder: Path) -> Any:
    tokenizer = tiny_models.tokenizer(byte_level=True)
    model = tiny_models.build("t5")  # the document's family
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    own = {} if kind is FullLayerContinualLearner else {"lora_r": 2}
    learner = kind(model, tokenizer, config=ExtensionConfig(save_directory=folder, **own), learning_rate=1e-3)
    learner.prepare_model()
    return learner


@pytest.mark.parametrize(
    "kind", [LoRAContinualLearner, FullLayerContinualLearner, HybridLoRAFullLayerLearner]
)
def test_the_documented_call(kind: Any, tmp_path: Path) -> None:
    learner = prepared(kind, tmp_path)
    minutes = learner.train_task(ROWS, "python", epochs=5, batch_size=16)
    learner.train_task(ROWS, task_name="javascript")
    learner.switch_to_task("python")
    scores = learner.evaluate_task(ROWS, "python", num_samples=500)
    assert 0 < minutes < 1
    assert scores["bleu"].count == len(ROWS)


def test_the_documents_own_functions_train_with_the_learners_extensions(tmp_path: Path) -> None:
    """The document's two `train_task`, its text unchanged, with a learner of peftlab's as `self`."""
    names: dict[str, Any] = {}
    text = documents_s0.LEARNERS.text
    exec(
        compile(text.replace("# FullLayer", "train_lora_task = train_task\n# FullLayer"), "document", "exec"),
        names,
    )
    learner = prepared(LoRAContinualLearner, tmp_path)
    minutes = names["train_lora_task"](learner, ROWS, "python", 1, 4)
    assert 0 < minutes < 1
    learner.switch_to_task("python")
    layered = prepared(FullLayerContinualLearner, tmp_path)
    assert names["train_task"](layered, ROWS, "python", 1, 4) is None  # its training is left out there
    ids = torch.arange(3, 9)[None]
    adapted, plain = (
        m(input_ids=ids, decoder_input_ids=ids).logits for m in (learner.current_model, learner.base_model)
    )
    assert not torch.equal(adapted, plain)
