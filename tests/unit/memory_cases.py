"""Runs on models of which only the config is there, and the same runs measured on random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T

from peftlab.batches import Collator
from peftlab.config import RunConfig, build_config
from peftlab.devices import storage_bytes
from peftlab.loading import ModelSource, switch_checkpointing
from peftlab.mapping import map_model
from peftlab.memory.measuring import MeasuredPeak, measure_step
from peftlab.memory.peaks import measured_peak
from peftlab.memory.prediction import attach_method, find_structure
from peftlab.memory.steps import BatchShape
from peftlab.method import OrdinaryTraining
from peftlab.objective import ModelLoss, labelled_loss
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, make_arguments

VOCABULARY = 512
ALLOWED = 0.02
"""Five per cent are promised. What is missed is oneDNN's scratch memory: up to 1.4 MiB, much for tiny models."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=160, max_position_embeddings=1024,
    ),
    "gpt2": lambda: T.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=2
    ),
    "bert": lambda: T.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=1024, num_labels=3,
    ),
    "small": lambda: T.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=256, num_labels=3,
    ),
    "t5": lambda: T.T5Config(
        vocab_size=VOCABULARY, d_model=64, num_layers=1, d_kv=16, d_ff=256, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    ),
    "bart": lambda: T.BartConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=512,
        decoder_start_token_id=2, forced_eos_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "deberta": lambda: T.DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=512, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32,
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False, num_labels=3,
    ),
    "mixtral": lambda: T.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=512,
    ),
}  # fmt: skip


class Whole(OrdinaryTraining):
    """Full fine-tuning as an attachment: every parameter trains."""

    rewritten: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.answering, self.family = model, model, map_model(model)
        model.requires_grad_(True)

    def parameters(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())

    def steps_to_train(self, name: str) -> int:
        return 1

    def begin(self, schedule: Any) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass


def make_config(folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """A run on a model of which only `config.json` is there."""
    if not (folder / name / "config.json").exists():
        CONFIGS[name]().save_pretrained(folder / name)
    values: dict[str, Any] = {
        "model": {"name": str(folder / name), "device": "cpu"},
        "task": {"max_length": 64},
        "training": {"batch_size": 4, "max_steps": 8, "warmup_steps": 0},
    }
    if name == "mixtral":
        values["method"] = {"targets": "attention"}
    for section, changed in sections.items():
        values[section] = values.get(section, {}) | changed
    return build_config(values)


def _random_model(config: RunConfig, source: ModelSource) -> Any:
    """The base with random weights, as loading would leave it."""
    kinds = {
        "causal": T.AutoModelForCausalLM,
        "seq2seq": T.AutoModelForSeq2SeqLM,
        "classification": T.AutoModelForSequenceClassification,
    }
    dtype = {"auto": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
    torch.manual_seed(0)
    model = kinds[source.head].from_config(source.config, dtype=dtype).eval()
    if config.model.gradient_checkpointing:
        switch_checkpointing(model, True)
    return model


def measure(config: RunConfig, shape: BatchShape, attach: Any = None) -> MeasuredPeak:
    """The run's first steps on a random model, under the profiler."""
    source = find_structure(config)
    model = _random_model(config, source)
    attachment = (attach or attach_method(config, source))(model)
    return measure_step(attachment, config, shape, head=source.head, vocabulary=VOCABULARY)


def measure_run(config: RunConfig, shape: BatchShape, folder: Path, attach: Any = None) -> int:
    """All steps of a whole run on rows of one length, on random weights; nothing of `peftlab.memory` but the account."""
    source = find_structure(config)
    model = _random_model(config, source)
    attachment = (attach or attach_method(config, source))(model)
    schedule = config.make_schedule()
    arguments = make_arguments(config, folder, schedule)
    arguments.save_strategy = arguments.eval_strategy = "no"
    training = config.training
    row = shape.make_row(source.head, vocabulary=VOCABULARY)
    rows = [row] * (shape.rows * training.accumulation_steps * training.max_steps)
    labelled = labelled_loss(attachment.answering, head=source.head, penalty=attachment.penalty)
    objective = ModelLoss(source.head) if isinstance(labelled, str) else labelled
    parts = TrainingParts(
        attachment, schedule, objective, Collator(0, source.head), rows, [], seed=training.seed
    )
    trainer = LabTrainer(parts, arguments)
    weights = storage_bytes([*attachment.model.parameters(), *attachment.model.buffers()])
    with measured_peak(torch.device("cpu")) as found:
        trainer.train()
    return weights + found[0]
