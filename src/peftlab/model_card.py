"""The README beside an adapter on disk: how to load it, what it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.attaching.attachment import peft_name

_BY_PEFTLAB = "import peftlab\n\nmodel, tokenizer = peftlab.load(FOLDER)"
_NOT_PEFT = ("bitfit", "new_layer", "hybrid", "full")
"""Methods whose bundles peft does not load."""


def adapter_folders(manifest: Mapping[str, Any]) -> list[str]:
    """The folders of a bundle's adapters, called as the adapters are inside peft.

    Args:
        manifest: The bundle's.

    Returns:
        "." for a bundle of one adapter, else one name for each tower.
    """
    beside = manifest.get("beside") or []
    if not beside:
        return ["."]
    return [peft_name(str(scope)) for scope in (manifest["scope"], *(adapter["scope"] for adapter in beside))]


def bundle_card(manifest: Mapping[str, Any], file: str) -> str:
    """The README of a bundle: front matter for the hub, then the facts.

    Args:
        manifest: The bundle's.
        file: The manifest's name.

    Returns:
        Markdown.
    """
    scores = "".join(f"| {name} | {value:.2f} |\n" for name, value in manifest["scores"].items())
    table = f"\n| metric | after training |\n|---|---|\n{scores}" if scores else ""
    counts, origin = manifest["counts"], manifest["origin"]
    made = f"Imported from {origin}" if origin else f"Trained by peftlab on the task `{manifest['task']}`"
    method = manifest["method"]
    # peft 0.21 would not give each layer of an encoder-decoder its own prefix
    other = method in _NOT_PEFT or (method == "prefix_tuning" and manifest["head"] == "seq2seq")
    return (
        f"{_front(manifest, 'peftlab' if other else 'peft', tags=('peftlab', method))}"
        f"{made}: {counts['parameters']:,} parameters in {counts['tensors']} tensors{_scopes(manifest)}.\n{table}\n"
        f"```python\n{_BY_PEFTLAB if other else _by_peft(adapter_folders(manifest))}\n```\n\n"
        f"{_prompt(manifest)}`{file}` holds the hashes of base, tokenizer and template.\n"
    )


def exported_card(manifest: Mapping[str, Any]) -> str:
    """The README of a plain folder of peft.

    Args:
        manifest: Of the bundle that it was made of.

    Returns:
        Markdown.
    """
    labels = f"\nClasses: {', '.join(manifest['labels'])}.\n" if manifest["labels"] else ""
    lines = _by_peft(adapter_folders(manifest))
    prompt = _prompt(manifest).rstrip("\n")
    return (
        f"{_front(manifest, 'peft', tags=(manifest['method'],))}```python\n{lines}\n```\n{labels}"
        f"{f'{chr(10)}{prompt}{chr(10)}' if prompt else ''}"
    )


def _front(manifest: Mapping[str, Any], library: str, *, tags: Sequence[str]) -> str:
    """Front matter and title."""
    base = manifest["base"]["name"]
    return (
        f"---\nlibrary_name: {library}\nbase_model: {base}\ntags: [{', '.join(tags)}]\n---\n\n"
        f"# {manifest['method']} adapter for {base}\n\n"
    )


def _prompt(manifest: Mapping[str, Any]) -> str:
    """The template that it was trained with, where there is one."""
    template = manifest["template"]["text"]
    return f"Prompt template, exactly as trained:\n\n```\n{template}\n```\n\n" if template else ""


def _scopes(manifest: Mapping[str, Any]) -> str:
    """Which towers the adapters stand on."""
    folders = adapter_folders(manifest)
    return "" if folders == ["."] else f", on {' and '.join(folders)}"


def _by_peft(folders: Sequence[str]) -> str:
    """The lines that load it with peft alone."""
    first, *others = folders
    if first == ".":
        lines = ["model = PeftModel.from_pretrained(base, FOLDER)  # base: the model named above"]
    else:
        lines = [
            f'model = PeftModel.from_pretrained(base, FOLDER + "/{first}", adapter_name="{first}")  # base: named above',
            *(f'model.load_adapter(FOLDER + "/{name}", adapter_name="{name}")' for name in others),
            f"model.base_model.set_adapter({list(folders)!r})",
        ]
    return "\n".join(["from peft import PeftModel", "", *lines])
