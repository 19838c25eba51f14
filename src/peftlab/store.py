"""Adapters on disk: bundles, and finished runs opened again.

A bundle is a folder that any Hugging Face tool can load (`adapter_config.json`, `adapter_model.safetensors`, the
tokenizer) with a manifest that says what it belongs to: method, scope, base and the hash of its tensors, tokenizer and
template hash, versions, counts, checksums, scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from peftlab.attaching.towers import attach_adapters
from peftlab.catalog import TASKS
from peftlab.config import AdapterSettings, RunConfig, build_config
from peftlab.errors import CheckpointError, InputError
from peftlab.files import CHECKSUMS, new_folder, read_yaml, verify_folder, write_json, write_text
from peftlab.method import Attachment, Head
from peftlab.model_card import bundle_card
from peftlab.restoring import load_whole, parse_manifest
from peftlab.run import RunFolder
from peftlab.settings import validate
from peftlab.task import Splits
from peftlab.task_data import load_splits

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_FINAL = "final_model"
"""Where a run folder holds its bundle."""


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """What a manifest says beside what the attachment knows.

    Attributes:
        adapter: The adapter's settings.
        base: The base's name as given.
        base_hash: Hash of the base's tensors on disk, "" where they are not local safetensors.
        tokenizer_hash: Hash of the tokenizer.
        prompt: The task's prompt template.
        task: The task's name.
        head: What the model ends in.
        labels: Class names, empty for tasks that generate text.
        seed: The run's seed, from which parts of a classifier that the base lacks were made.
        versions: Package versions.
        scores: Metric to value, after training.
        beside: The adapters of further towers.
        origin: Where an imported adapter comes from; "" for one that was trained here.
    """

    adapter: AdapterSettings
    base: str
    base_hash: str
    tokenizer_hash: str
    prompt: str
    task: str
    head: Head
    labels: tuple[str, ...]
    seed: int
    versions: Mapping[str, str]
    scores: Mapping[str, float]
    beside: tuple[AdapterSettings, ...] = ()
    origin: str = ""


def hash_text(text: str) -> str:
    """SHA-256 of a text, for prompt templates.

    Args:
        text: The text.

    Returns:
        The hexadecimal digest.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def save_bundle(attachment: Attachment, tokenizer: Any, facts: BundleFacts, path: Path) -> Path:
    """Write a bundle.

    Args:
        attachment: The adapter.
        tokenizer: The tokenizer it was trained with.
        facts: What the manifest says.
        path: The bundle's folder.

    Returns:
        The path.

    Raises:
        OutputError: It cannot be written.
    """
    parameters = attachment.parameters().values()
    with new_folder(path) as folder:
        attachment.save(folder)
        _set_base_name(folder, facts.base)
        tokenizer.save_pretrained(str(folder))
        manifest = {
            "version": MANIFEST_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": facts.adapter.method,
            "scope": facts.adapter.scope,
            "settings": facts.adapter.settings,
            "beside": [adapter.model_dump(mode="json") for adapter in facts.beside],
            "head": facts.head,
            "labels": list(facts.labels),
            "seed": facts.seed,
            "base": {"name": facts.base, "tensors_sha256": facts.base_hash or None},
            "tokenizer_sha256": facts.tokenizer_hash,
            "template": {"text": facts.prompt, "sha256": hash_text(facts.prompt)},
            "task": facts.task,
            "versions": dict(facts.versions),
            "counts": {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)},
            "scores": dict(facts.scores),
            "origin": facts.origin,
            "checksums": CHECKSUMS,
        }
        write_json(folder / MANIFEST, manifest)
        write_text(folder / "README.md", bundle_card(manifest, MANIFEST))
    return path


def _set_base_name(folder: Path, name: str) -> None:
    """Name the base in peft's config as the person named it, not by this machine's path."""
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = name
        write_json(path, config)


def read_manifest(path: Path) -> dict[str, Any]:
    """A bundle's manifest, after its files have been checked.

    Args:
        path: The bundle's folder.

    Returns:
        The manifest.

    Raises:
        InputError: The folder is not a bundle.
        CheckpointError: A file is damaged, or the manifest is of another version or lacks fields.
    """
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a peftlab bundle: it holds no {MANIFEST}")
    verify_folder(path)
    return parse_manifest(path, MANIFEST, version=MANIFEST_VERSION)


def attach_saved(base: Any, path: Path) -> Attachment:
    """Put a bundle's adapter on a live base.

    Args:
        base: The base the bundle belongs to.
        path: The bundle's folder.

    Returns:
        The attachment.

    Raises:
        InputError: The folder is not a bundle.
        CheckpointError: A file is damaged, or the adapter does not fit the base, which is then as it was.
        ConfigError: The method does not know the bundle's settings.
    """
    from peftlab.mapping import map_model

    manifest = read_manifest(path)
    first = {name: manifest[name] for name in ("method", "scope", "settings") if name in manifest}
    adapters = [
        validate(AdapterSettings, adapter, where=f"{path}: adapter")
        for adapter in [first, *manifest.get("beside", ())]
    ]
    attachment = attach_adapters(base, map_model(base), adapters, head=manifest["head"], seed=0)
    load_whole(attachment, path)
    attachment.model.eval()
    return attachment


def find_bundle(reference: str | Path, directory: str | Path) -> Path:
    """The folder of a bundle that is named by its own folder, or by the run that it is the final model of.

    Args:
        reference: A bundle's folder, a run folder, a run's name in `directory`, or "last".
        directory: Where run folders lie.

    Returns:
        The bundle's folder.

    Raises:
        InputError: There is no such bundle or run, or it has not finished.
    """
    folder = Path(reference).expanduser()
    if (folder / MANIFEST).is_file():
        return folder
    if folder.is_dir() and not (folder / RunFolder.CONFIG).is_file() and not (folder / _FINAL).is_dir():
        hint = f"; take over what peft has saved first: peftlab import {reference} --base MODEL --output DIR"
        is_peft = (folder / "adapter_config.json").is_file()
        raise InputError(
            f"{reference} is not a peftlab bundle: it holds no {MANIFEST}{hint if is_peft else ''}"
        )
    run = RunFolder(folder) if (folder / _FINAL).is_dir() else RunFolder.find(reference, directory)
    if not (run.path / _FINAL / MANIFEST).is_file():
        raise InputError(
            f"the run {run.path} has no final model yet; go on with it: peftlab run --resume {run.path}"
        )
    return run.path / _FINAL


def load(
    path: str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    directory: str | Path = "runs",
) -> tuple[Any, Any]:
    """Load a bundle or a run's final model, with its base and tokenizer.

    Args:
        path: A bundle's folder, a run folder, a run's name, or "last", the newest run.
        base: The base's folder or hub name; the manifest's where None.
        device: "auto" or a torch device.
        dtype: "auto" or a dtype's name.
        directory: Where run folders lie, for names and "last".

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        InputError: There is no such bundle or run, or it has not finished.
        CheckpointError: A file is damaged, or base or tokenizer are not those it was trained with.
        ModelError: The base cannot be loaded.
    """
    from peftlab.config import ModelSettings
    from peftlab.loading import find_model, load_model

    folder = find_bundle(path, directory)
    manifest = read_manifest(folder)
    settings = ModelSettings(name=base or manifest["base"]["name"], device=device, dtype=dtype)
    source = find_model(settings, num_labels=len(manifest["labels"]) or None)
    check_belongs(manifest, source, folder)
    model = load_model(source, settings, seed=manifest["seed"])
    return attach_saved(model, folder).model, source.tokenizer


def check_belongs(manifest: Mapping[str, Any], source: Any, path: Path) -> None:
    """Refuse a base or tokenizer other than those a bundle was trained with.

    Args:
        manifest: The bundle's manifest.
        source: The base, from `find_model`.
        path: The bundle, for the message.

    Raises:
        CheckpointError: The hashes differ.
    """
    from peftlab.loading import hash_tensors, hash_tokenizer

    expected = manifest["base"]["tensors_sha256"]
    found = hash_tensors(source) if expected else None
    if expected and found and expected != found:
        raise CheckpointError(
            f"{path} was trained on a base with other weights than '{source.name}' has now"
            f" (tensors sha256 {expected[:12]}..., found {found[:12]}...)"
        )
    tokenizer = manifest["tokenizer_sha256"]  # none where an adapter was made without one
    if tokenizer is not None and tokenizer != hash_tokenizer(source.tokenizer):
        raise CheckpointError(f"{path} was trained with another tokenizer than '{source.name}' has now")


@dataclass(frozen=True, slots=True)
class Opened:
    """A finished run or a bare base, ready to answer.

    Attributes:
        config: The run's config.
        task: The task's module.
        splits: The task's data; empty where it was not asked for.
        model: The model.
        tokenizer: Its tokenizer.
        head: What it ends in.
        labels: Class names; empty for models that generate text.
        attachment: The adapter; None for a bare base.
    """

    config: RunConfig
    task: ModuleType
    splits: Splits
    model: Any
    tokenizer: Any
    head: Head
    labels: tuple[str, ...]
    attachment: Attachment | None

    @property
    def prompt(self) -> str:
        """The task's prompt template."""
        template: str = self.task.PROMPT
        return template

    @contextmanager
    def adapter(self, *, on: bool) -> Iterator[None]:
        """A context with the adapter on or off.

        Args:
            on: Whether the adapter takes part.
        """
        off = self.attachment is not None and not on
        with self.attachment.disabled() if off and self.attachment else contextlib.nullcontext():
            yield


def open_run(reference: str, *, directory: Path) -> Opened:
    """A finished run's model, its adapter on the base, without its data.

    Args:
        reference: The run's path, its name, or "last".
        directory: Where run folders lie.

    Returns:
        The opened run.

    Raises:
        InputError: There is no such run, or it has not finished.
        CheckpointError: A file is damaged or does not fit.
    """
    run = RunFolder.find(reference, directory)
    if not (run.path / "final_model" / MANIFEST).exists():
        raise InputError(
            f"the run {run.path} has no final model yet; go on with it: peftlab run --resume {run.path}"
        )
    return open_config(build_config(read_yaml(run.path / "config.yaml")), run.path / "final_model")


def open_config(config: RunConfig, bundle: Path | None, *, with_data: bool = False) -> Opened:
    """Load task, base and, where there is one, the bundle's adapter.

    Args:
        config: Model, task and settings.
        bundle: The bundle's folder; None for the bare base.
        with_data: Whether the task's data are read too.

    Returns:
        What was opened.

    Raises:
        InputError: There is no such model or data.
        CheckpointError: A file is damaged or does not fit.
    """
    from peftlab.loading import find_model, load_model

    task = TASKS.load(config.task.name)
    splits = Splits((), (), ())
    if with_data:
        splits = load_splits(config.task, seed=config.data_seed)
    manifest = None if bundle is None else read_manifest(bundle)
    labels = splits.labels if manifest is None else tuple(manifest["labels"])
    as_texts = manifest is None and splits.as_texts
    source = find_model(config.model, num_labels=len(labels) or None, as_texts=as_texts)
    splits = splits.for_head(source.head)
    labels = splits.labels if manifest is None else labels
    if manifest is not None and bundle is not None:
        check_belongs(manifest, source, bundle)
        told = manifest["template"]["text"]  # none for an adapter of somebody else's making
        if told and manifest["template"]["sha256"] != hash_text(task.PROMPT):
            raise CheckpointError(
                f"{bundle} was trained with another prompt template than task '{config.task.name}' has"
            )
    model = load_model(source, config.model, seed=config.training.seed)
    attachment = None if bundle is None else attach_saved(model, bundle)
    live = model if attachment is None else attachment.model
    return Opened(config, task, splits, live, source.tokenizer, source.head, labels, attachment)
