"""Demo of the model extensions: LoRA, a new layer and both on one base, saved, loaded, shared, counted; errors too.

Asks what each kind adds, whether it starts as the base, trains, and comes back from disk; and how the three compare in
parameters. The small base is made here; flan-t5-small's shape is counted on the meta device, without weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from peftlab.errors import ModelError, PeftlabError
from peftlab.files import write_json, write_text
from peftlab.settings import Settings as _Settings
from peftlab.tables import render_text

if TYPE_CHECKING:
    from peftlab.extensions.life_cycle import Extension

_VOCABULARY, _ROWS, _LENGTH, _RATE = 96, 4, 12, 5e-3
_DOCUMENT = {"hybrid / LoRA": 4.5, "hybrid / new layer": 1.3}
"""Ratios that the document's own demo prints."""


class Settings(_Settings):
    """What can be set on the demo."""

    model: str | None = None
    """A model's folder or hub name; none is a small random T5 that is made here."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA's update."""
    targets: str = Field(default="attention", min_length=1)
    """What LoRA adapts."""
    steps: int = Field(default=20, ge=1)
    """Training steps of each kind, on one batch of random tokens."""
    seed: int = Field(default=42, ge=0)
    """Seeds the base, the adapters and the tokens."""


class _Face(NamedTuple):
    """One class and the names of its calls."""

    kind: str
    create: str
    save: str
    load: str


_FACES = {
    "LoRAExtension": _Face("LoRA", "create_adapter", "save_adapter", "load_adapter"),
    "TransformerLayerExtension": _Face("new layer", "add_layer", "save_checkpoint", "load_checkpoint"),
    "HybridExtension": _Face("hybrid", "create_hybrid", "save_hybrid_model", "load_hybrid_model"),
}


def carry_out(settings: Settings, folder: Path, show: Callable[[str], object]) -> list[Path]:
    """Show every class of the model extensions.

    Args:
        settings: What was set.
        folder: Where numbers, table and saved models go.
        show: Is given each text for a person.

    Returns:
        `table.md`, `demo.json` and the folder of the saved models.

    Raises:
        ModelError: The model does not read text.
    """
    from peftlab.extensions.device_manager import DeviceManager

    manager = DeviceManager("cpu")
    manager.set_seed(settings.seed)
    base, again = _base(settings), _base(settings)  # the second is as a fresh process would make it
    size = sum(p.numel() for p in base.parameters())
    name = settings.model or "a small random T5, made here"
    show(f"THE BASE: {name}, {type(base).__name__}, {size:,} parameters")
    best = DeviceManager()
    show(f"DEVICE: {best.device}, because {best.reason}; {best.torch_dtype}, because {best.dtype_reason}")
    place = folder / "adapters"
    kinds = [_try_face(face, settings, base, again, place, show) for face in _FACES]
    tables = {name: _table(size, [(row["kind"], row["trainable"]) for row in kinds])}
    real, counts = _count_flan_t5_small(settings)
    tables["google/flan-t5-small's shape (no weights: counted on the meta device)"] = _table(real, counts)
    for title, rows in tables.items():
        show("\n" + render_text(rows, title=f"PARAMETERS: {title}"))
    found = _ratios(counts)
    said = "; ".join(f"{key} {value:.2f} (the document: {_DOCUMENT[key]})" for key, value in found.items())
    show(f"\n{said}")
    shared = _share(settings, base, show)
    errors = _errors(settings, base, place, show)
    document = {
        "model": name,
        "base_parameters": size,
        "device": best.get_device_info(),
        "kinds": kinds,
        "flan_t5_small": {"base_parameters": real, "trainable": dict(counts), "ratios": found},
        "sharing": shared,
        "errors": errors,
    }
    table = write_text(
        folder / "table.md", "\n".join(_markdown(title, rows) for title, rows in tables.items())
    )
    return [table, write_json(folder / "demo.json", document), place]


def _base(settings: Settings) -> Any:
    """The base: the model that was named, or a small T5 with random weights, the same every time."""
    import torch

    if settings.model is not None:
        from peftlab.config import ModelSettings
        from peftlab.loading import find_model, load_model

        asked = ModelSettings(name=settings.model, device="cpu", dtype="float32")
        model: Any = load_model(find_model(asked, num_labels=None), asked, seed=settings.seed)
        if model.main_input_name != "input_ids":
            raise ModelError(
                f"the demo trains on tokens, and '{settings.model}' reads {model.main_input_name}"
            )
        return model.eval()
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        config = T5Config(
            vocab_size=_VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()


def _batch(settings: Settings, base: Any) -> dict[str, Any]:
    """Random tokens to learn by heart."""
    import torch

    most = base.config.get_text_config().vocab_size
    source = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(min(3, most - 1), most, (_ROWS, _LENGTH), generator=source)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _config(settings: Settings, face: str, place: Path | None = None) -> Any:
    """The config of one class: only what has an effect in it."""
    from peftlab.extensions.config import ExtensionConfig

    values: dict[str, Any] = {} if place is None else {"save_directory": place}
    if face != "TransformerLayerExtension":
        values |= {
            "lora_r": settings.rank,
            "lora_alpha": 2 * settings.rank,
            "lora_target_modules": settings.targets,
        }
    return ExtensionConfig(**values)


def _extension(face: str, base: Any, config: Any) -> Extension:
    """One of the three classes on a base."""
    from peftlab.extensions import hybrid, lora, new_layer

    homes: dict[str, Any] = {
        "LoRAExtension": lora,
        "TransformerLayerExtension": new_layer,
        "HybridExtension": hybrid,
    }
    made: Extension = getattr(homes[face], face)(base, config)
    return made


def _try_face(
    face: str, settings: Settings, base: Any, again: Any, place: Path, show: Callable[[str], object]
) -> dict[str, Any]:
    """Create, train, save and load with one class, and say what came of it."""
    import torch

    from peftlab.extensions.bundles import count, record_of

    calls, batch = _FACES[face], _batch(settings, base)
    extension = _extension(face, base, _config(settings, face, place))
    began = time.perf_counter()
    model = getattr(extension, calls.create)("python")
    seconds = time.perf_counter() - began
    record = record_of(model)
    assert record is not None
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with torch.no_grad():
        start = float((model(**batch).logits - base(**batch).logits).abs().max())
    first, last, training_seconds = _train(model, batch, settings.steps)
    saved = getattr(extension, calls.save)(model, "python", scores={"loss": last})
    loaded = getattr(_extension(face, again, extension.config), calls.load)("python")
    with torch.no_grad():
        same = torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    kept = all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())
    counts = count(record)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    parts = " + ".join(f"{number:,} {part}" for part, number in counts.items() if number)
    show(
        f"\n{face}: {calls.create}, {calls.save}, {calls.load}\n"
        f"  trains {parts} parameters; made in {seconds:.2f} s\n"
        f"  at the start its answers differ from the base's by at most {start:.1g}\n"
        f"  loss {first:.3f} -> {last:.3f} in {settings.steps} steps, {training_seconds:.2f} s\n"
        f"  saved to {saved} ({size / 1e3:,.0f} kB)\n"
        f"  loaded onto a base made anew: answers {'identical' if same else 'DIFFERENT'}; the first base"
        f" {'has kept every bit' if kept else 'HAS CHANGED'}"
    )
    return {
        "class": face,
        "kind": calls.kind,
        "trainable": sum(counts.values()),
        "by_kind": counts,
        "largest_difference_at_start": start,
        "loss_first": first,
        "loss_last": last,
        "create_seconds": seconds,
        "training_seconds": training_seconds,
        "tensor_file_bytes": size,
        "loaded_answers_identical": same,
        "base_unchanged": kept,
    }


def _train(model: Any, batch: dict[str, Any], steps: int) -> tuple[float, float, float]:
    """Some steps on one batch: loss before, loss after, seconds."""
    import torch

    active = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(active, lr=_RATE)
    with torch.no_grad():
        first = float(model(**batch).loss)
    model.train()
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        return first, float(model(**batch).loss), seconds


def _count_flan_t5_small(settings: Settings) -> tuple[int, list[tuple[str, int]]]:
    """Base and trainable parameters of flan-t5-small's shape."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from peftlab.extensions.bundles import count, record_of

    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        base = T5ForConditionalGeneration(config)
    # its head is a weight of its own; transformers 5.23 ties it while the model is made, whatever is asked
    base.lm_head.weight = torch.nn.Parameter(torch.empty_like(base.shared.weight))
    counts = []
    for face, calls in _FACES.items():
        record = record_of(getattr(_extension(face, base, _config(settings, face)), calls.create)("python"))
        assert record is not None
        counts.append((calls.kind, sum(count(record).values())))
    return sum(p.numel() for p in base.parameters()), counts


def _ratios(counts: Sequence[tuple[str, int]]) -> dict[str, float]:
    """What the document's demo compares."""
    found = dict(counts)
    return {key: found["hybrid"] / found[key.rpartition(" / ")[2]] for key in _DOCUMENT}


def _table(size: int, counts: Sequence[tuple[str, int]]) -> list[list[str]]:
    """A row for each kind: trainable parameters, share of the base, and how often those of LoRA."""
    lora = dict(counts)["LoRA"]
    rows = [[kind, f"{number:,}", f"{number / size:.3%}", f"{number / lora:.2f}"] for kind, number in counts]
    return [["kind", "trainable", f"of the base's {size:,}", "times LoRA's"], *rows]


def _markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _share(settings: Settings, base: Any, show: Callable[[str], object]) -> dict[str, Any]:
    """Two tasks on one base, and one layer in two models."""
    import torch

    from peftlab.devices import storage_bytes
    from peftlab.extensions.hybrid import HybridExtension

    extension, batch = HybridExtension(base, _config(settings, "HybridExtension")), _batch(settings, base)
    one = extension.create_hybrid("python")
    two = extension.create_hybrid_from_existing(one, "javascript")
    with torch.no_grad():
        before = two(**batch).logits
    _train(one, batch, settings.steps)
    with torch.no_grad():
        moved = not torch.equal(two(**batch).logits, before)
    alone = storage_bytes(base.parameters())
    together = storage_bytes([*base.parameters(), *one.parameters(), *two.parameters()])
    show(
        f"\nONE BASE, TWO TASKS, ONE SHARED LAYER\n"
        f"  the base takes {alone:,} bytes; base and two hybrids together {together:,}\n"
        f"  training the first {'shows' if moved else 'DOES NOT SHOW'} in the second: its layer is the same tensors"
    )
    return {"base_bytes": alone, "base_and_two_hybrids_bytes": together, "shared_layer_moves_both": moved}


def _errors(
    settings: Settings, base: Any, place: Path, show: Callable[[str], object]
) -> list[dict[str, str]]:
    """What bad input is answered with."""
    found = []
    show("\nWHAT GOES WRONG IS SAID")
    for what, attempt in _mistakes(settings, base, place):
        try:
            attempt()
            answer = "NOTHING WAS SAID"
        except PeftlabError as error:
            answer = f"{type(error).__name__}: {error}"
        show(f"  {what}\n      {answer}")
        found.append({"what": what, "answer": answer})
    return found


def _mistakes(settings: Settings, base: Any, place: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Mistakes, and calls that make them."""
    import copy

    import torch

    from peftlab.extensions.config import ExtensionConfig
    from peftlab.extensions.lora import LoRAExtension
    from peftlab.extensions.new_layer import TransformerLayerExtension

    extension = LoRAExtension(base, _config(settings, "LoRAExtension", place))
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    yield "a rank of 0", lambda: ExtensionConfig(lora_r=0)
    yield "a rank for a new layer", lambda: TransformerLayerExtension(base, ExtensionConfig(lora_r=4))
    yield (
        "a target that is not there",
        lambda: LoRAExtension(base, ExtensionConfig(lora_target_modules=["q_projection"])).create_adapter(
            "python"
        ),
    )
    yield "a name that leads out of the folder", lambda: extension.create_adapter("../python")
    yield "a name that is taken", lambda: extension.save_adapter(extension.create_adapter("python"), "python")
    yield "a task that was never saved", lambda: extension.load_adapter("pyhton")
    yield "another base", lambda: LoRAExtension(other, extension.config).load_adapter("python")
    yield "a damaged file", lambda: _load_damaged(extension)


def _load_damaged(extension: Any) -> None:
    """Change one byte of a saved adapter and load it."""
    saved = extension.save_adapter(extension.create_adapter("damaged"), "damaged")
    file = saved / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    extension.load_adapter("damaged")
