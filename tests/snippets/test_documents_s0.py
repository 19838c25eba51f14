"""The model extensions document's snippets run, all of them; its names are there, with its and its code's signatures."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import documents_s0
import pytest

import peftlab

DOCUMENT = Path(__file__).parents[3] / "shared" / "seeds" / "000_e35480dcbe60fb51.txt"
SNIPPETS = documents_s0.SNIPPETS


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
    assert [plain(block) for block in blocks] == [plain(snippet.text) for snippet in SNIPPETS.values()]


def test_every_difference_has_a_reason() -> None:
    assert all(reason for snippet in SNIPPETS.values() for _, _, reason in snippet.differences)


SIGNATURES = {
    "LoRAExtension": "base_model config device_manager",
    "LoRAExtension.create_adapter": "task_name",
    "LoRAExtension.save_adapter": "model task_name path",
    "LoRAExtension.load_adapter": "task_name",
    "LoRAExtension.list_adapters": "",
    "LoRAExtension.get_adapter_info": "",
    "TransformerLayerExtension": "base_model config device_manager",
    "TransformerLayerExtension.add_layer": "task_name",
    "TransformerLayerExtension.create_extended_model": "task_name",
    "TransformerLayerExtension.save_checkpoint": "model task_name path",
    "TransformerLayerExtension.load_checkpoint": "task_name",
    "TransformerLayerExtension.get_checkpoint_info": "",
    "HybridExtension": "base_model config device_manager",
    "HybridExtension.create_hybrid": "task_name",
    "HybridExtension.create_hybrid_from_existing": "base_model task_name",
    "HybridExtension.create_hybrid_model": "task_name use_shared_layer shared_layer_model",
    "HybridExtension.save_hybrid_model": "model task_name path",
    "HybridExtension.load_hybrid_model": "task_name base_with_layer",
    "DeviceManager": "preferred_device",
    "DeviceManager.optimize_for_device": "model",
    "DeviceManager.get_device_info": "",
    "DeviceManager.set_seed": "seed",
    "DeviceManager.clear_cache": "",
    "create_lora_adapter": "base_model task_name config device_manager",
    "create_extended_model": "base_model task_name config device_manager",
    "create_hybrid_model": "base_model task_name config device_manager use_shared_layer shared_layer_model",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_documents(name: str) -> None:
    """The document's and its code's arguments come first, in their order; what is added has a default."""
    owner, _, method = name.partition(".")
    thing = getattr(peftlab, owner)
    parameters = inspect.signature(getattr(thing, method) if method else thing).parameters
    names = [parameter for parameter in parameters if parameter != "self"]
    wanted = SIGNATURES[name].split()
    assert names[: len(wanted)] == wanted
    assert all(parameters[more].default is not inspect.Parameter.empty for more in names[len(wanted) :])
