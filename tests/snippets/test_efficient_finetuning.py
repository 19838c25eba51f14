"""The efficient fine-tuning document's snippets run, all of them, each with its smallest difference."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import documents_s4
import documents_s4_examples
import documents_s4_practices
import pytest

import peftlab
from peftlab.manager import EfficientFineTuningManager

DOCUMENT = Path(__file__).parents[3] / "shared" / "seeds" / "004_102ae7a1944c0c1c.txt"
SNIPPETS = documents_s4.SNIPPETS | documents_s4_examples.SNIPPETS | documents_s4_practices.SNIPPETS


def plain(text: str) -> str:
    """A text without spaces at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[name].runnable(), name, "exec"), {"__name__": name})


def test_every_snippet_of_the_document_is_here_as_it_stands_there() -> None:
    if not DOCUMENT.exists():
        pytest.skip(f"needs {DOCUMENT}, which is not part of the repository")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert {plain(block) for block in blocks} == {plain(snippet.text) for snippet in SNIPPETS.values()}


def test_every_difference_has_a_reason() -> None:
    assert all(reason for snippet in SNIPPETS.values() for _, _, reason in snippet.differences)


SIGNATURES = {
    "LoRALayer": "input_dimension output_dimension rank alpha dropout_probability bias",
    "LoRALinear": "original_layer rank alpha dropout_probability bias",
    "AdaLoRALayer": "input_dimension output_dimension rank alpha dropout_probability bias adaptive_rank rank_allocation",
    "PTuningEmbedding": "num_virtual_tokens embedding_dimension hidden_dimension dropout_probability",
    "PrefixTuning": "num_layers num_heads head_dimension prefix_length dropout_probability",
    "EfficientFineTuningManager": "model",
    "create_efficient_finetuning_manager": "model",
    "apply_lora": "target_modules rank alpha dropout_probability bias",
    "apply_adalora": "target_modules rank alpha dropout_probability bias adaptive_rank rank_allocation",
    "apply_ptuning": "num_virtual_tokens embedding_dimension hidden_dimension dropout_probability",
    "apply_prefix_tuning": "num_layers num_heads head_dimension prefix_length dropout_probability",
    "save_efficient_weights": "path",
    "load_efficient_weights": "path",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_documents(name: str) -> None:
    def arguments(of: Any) -> list[str]:
        parameters = inspect.signature(of).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    wanted = SIGNATURES[name].split()
    assert arguments(getattr(peftlab, name, None) or getattr(EfficientFineTuningManager, name)) == wanted
    if name.startswith("apply_"):
        assert arguments(getattr(peftlab, f"{name}_to_model")) == ["model", *wanted]
