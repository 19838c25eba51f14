"""Adapters that somebody made with peft alone, for the tests of importing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from tiny_bundles import answers, fill

CAUSAL, SEQ2SEQ, CLASSES = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"
QUERY_VALUE = ["q_proj", "v_proj"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def lora(task: str | None = CAUSAL, **settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": QUERY_VALUE} | settings, task_type=task)


def prompt(kind: Any, task: str = CAUSAL, **settings: Any) -> Any:
    return kind(num_virtual_tokens=3, task_type=task, **settings)


ADAPTERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "names": ("llama", lambda: lora(r=4, lora_alpha=6), "lora"),
    "no_task": ("llama", lambda: lora(None, target_modules=["o_proj"]), "lora"),
    "regex": ("llama", lambda: lora(target_modules=r".*\.1\.mlp\.(up|down)_proj"), "lora"),
    "all_linear": ("gpt2", lambda: lora(target_modules="all-linear", fan_in_fan_out=True), "lora"),
    "layers": ("llama", lambda: lora(layers_to_transform=[1], exclude_modules=["v_proj"]), "lora"),
    "patterns": (
        "llama",
        lambda: lora(
            r=4,
            lora_alpha=6,
            rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            alpha_pattern={"q_proj": 1.5},
            use_rslora=True,
        ),
        "lora",
    ),
    "dora": ("bert", lambda: lora(CLASSES, target_modules=["query", "dense"], use_dora=True), "lora"),
    "bias": ("bert", lambda: lora(CLASSES, target_modules=["query"], bias="all"), "lora"),
    "beside": ("llama", lambda: lora(modules_to_save=["norm", "lm_head"]), "lora"),
    "start": ("t5", lambda: lora(SEQ2SEQ, target_modules=["q", "wo"], init_lora_weights="gaussian"), "lora"),
    "adalora": (
        "bart",
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "fc1"], task_type=SEQ2SEQ
        ),
        "adalora",
    ),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type=CLASSES),
        "ia3",
    ),
    "ia3_inner": (
        "t5",
        lambda: peft.IA3Config(
            target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type=SEQ2SEQ
        ),
        "ia3",
    ),
    "prompt": ("gpt2", lambda: prompt(peft.PromptTuningConfig), "prompt_tuning"),
    "prompt_classes": ("bert", lambda: prompt(peft.PromptTuningConfig, CLASSES), "prompt_tuning"),
    "p_tuning": ("llama", lambda: prompt(peft.PromptEncoderConfig, encoder_hidden_size=8), "prompt_tuning"),
    "prefix": ("llama", lambda: prompt(peft.PrefixTuningConfig), "prefix_tuning"),
    "prefix_mlp": (
        "gpt2",
        lambda: prompt(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8),
        "prefix_tuning",
    ),
    "loha": (
        "llama",
        lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=QUERY_VALUE, task_type=CAUSAL),
        "peft",
    ),
    "vera": ("llama", lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type=CAUSAL), "peft"),
    "oft": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=QUERY_VALUE, task_type=CAUSAL),
        "peft",
    ),
    "ln_tuning": ("llama", lambda: peft.LNTuningConfig(task_type=CAUSAL), "peft"),
}
"""Name to a model, what somebody trained on it with peft, and the method that it is imported as."""


def other_save(model: Any, folder: Path) -> Path:
    """What peft writes, its guesses about embeddings switched off: they would ask a hub."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


class Made:
    """Adapters that somebody made with peft alone, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, model: str) -> Path:
        folder = self.folder / "bases" / model
        return folder if folder.exists() else tiny_models.save_model(folder, model)

    def get(self, name: str) -> tuple[Path, Path, torch.Tensor]:
        """The adapter's folder, its base's folder, and what peft answers after loading it."""
        model, config, _ = ADAPTERS[name]
        base, folder = self.base(model), self.folder / name
        kind = type(tiny_models.build(model))
        if not folder.exists():
            live = peft.get_peft_model(kind.from_pretrained(base), config())
            fill({n: p for n, p in live.named_parameters() if p.requires_grad})
            other_save(live, folder)
        with torch.random.fork_rng():
            loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(base), str(folder)).eval()
        return folder, base, answers(loaded, model)


def copied(made: Made, name: str, tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A copy of an adapter, to be changed."""
    folder, base, expected = made.get(name)
    return Path(shutil.copytree(folder, tmp_path / "theirs")), base, expected


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / TENSORS)


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | values), encoding="utf-8")


def with_adapters_name(name: str) -> str:
    return name.removesuffix(".weight") + ".default.weight" if ".lora_" in name else name
