"""From what a person names - a run, an adapter or a model - to the model with a task's data, ready to be scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.catalog import TASKS
from peftlab.config import RunConfig, build_config
from peftlab.decoding import ONE_KIND_ALONE, WRITTEN_ALONE
from peftlab.errors import InputError, OutputError, UnknownNameError
from peftlab.files import read_yaml
from peftlab.run import RunFolder
from peftlab.store import MANIFEST, Opened, open_config, read_manifest

_PEFT_CONFIG = "adapter_config.json"
_SOURCES = ("data_dir", "hub", "archive", "archive_sha256")


@dataclass(frozen=True, slots=True)
class Reference:
    """What a person named.

    Attributes:
        config: Model, task and settings that belong to it.
        bundle: The folder of its adapter; None for a bare model.
        own_task: Whether the task is the one it was trained on.
        foreign: The folder of an adapter in peft's own form; None for everything else.
    """

    config: RunConfig
    bundle: Path | None
    own_task: bool
    foreign: Path | None = None

    def open(self) -> Opened:
        """Load the model, its adapter and the task's data.

        Returns:
            What was opened.

        Raises:
            InputError: There is no such model or data.
            CheckpointError: A file is damaged or does not fit.
        """
        if self.foreign is None:
            return open_config(self.config, self.bundle, with_data=True)
        from peftlab.importing.opening import open_foreign

        return open_foreign(self.config, self.foreign)

    def identity(self) -> str:
        """What decides the model's answers beside prompts and decoding: model, adapter and when their files changed."""
        model = self.config.model
        files = [*Path(model.name).glob("*.safetensors")] if Path(model.name).is_dir() else []
        files += [] if self.bundle is None else [self.bundle / MANIFEST]
        files += [] if self.foreign is None else [*self.foreign.glob("adapter_*")]
        written = [f"{file}:{file.stat().st_mtime_ns}" for file in sorted(files)]
        return "\n".join([model.model_dump_json(), str(self.bundle or self.foreign), *written])


def find_reference(
    reference: str | None,
    *,
    task: str | None,
    data_dir: Path | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    base: str | None = None,
    directory: Path = Path("runs"),
) -> Reference:
    """A finished run, an adapter's folder, or a bare base model, with the task to score it on.

    Args:
        reference: A run's path or name, "last", a folder that peftlab or peft has saved an adapter in, or a model's
            folder or hub name; None for data alone.
        task: The task; its own where None.
        data_dir: The task's data; its own where None.
        changes: More settings of the sections "task" and "evaluation".
        base: The base that an adapter in peft's own form is put on; the one that it names where None.
        directory: Where run folders lie.

    Returns:
        What was named.

    Raises:
        InputError: There is no such run, or nothing says what to score on.
        ConfigError: A setting is unknown or does not fit.
    """
    changed = {section: dict(values) for section, values in (changes or {}).items()}
    wanted = changed.get("task", {})
    if task is not None:
        wanted["name"] = TASKS.check(task)
    if data_dir is not None:
        wanted["data_dir"] = str(data_dir)
    named = wanted.get("name")
    foreign = _peft_folder(reference)
    if foreign is not None:
        values, bundle = _values_of_peft(foreign, named=named, base=base), None
    else:
        values, bundle = _values(reference, named=named, directory=directory)
    own = dict(values.get("task", {}))
    own_task = "name" in own and wanted.get("name", own["name"]) == own["name"]
    if not own_task:  # the length stays: it is the model's as much as the task's
        own = {key: own[key] for key in ("max_length",) if key in own}
    elif any(key in wanted for key in _SOURCES):
        own = {key: value for key, value in own.items() if key not in _SOURCES}
    settings = {**own.get("settings", {}), **wanted.get("settings", {})}
    values["task"] = {**own, **wanted, "settings": settings}
    values["evaluation"] = _decoded_anew(values.get("evaluation", {}), changed.get("evaluation", {}))
    return Reference(build_config(values), bundle, own_task, foreign)


def _peft_folder(reference: str | None) -> Path | None:
    """The folder where it holds an adapter in peft's own form and nothing of peftlab's."""
    if reference is None:
        return None
    folder = Path(reference).expanduser()
    own = any((folder / file).is_file() for file in (MANIFEST, RunFolder.CONFIG))
    return folder if (folder / _PEFT_CONFIG).is_file() and not own else None


def _values_of_peft(folder: Path, *, named: str | None, base: str | None) -> dict[str, Any]:
    """The config of an adapter in peft's own form, as plain values."""
    hint = f"or take it over first: peftlab import {folder} --base MODEL --output DIR"
    try:
        config = json.loads((folder / _PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / _PEFT_CONFIG} cannot be read ({type(error).__name__})") from None
    told = config if isinstance(config, dict) else {}
    name = base or told.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"the adapter {folder} is in peft's own form and does not name its base; {hint}")
    if named is None:
        raise InputError(
            f"the adapter {folder} is in peft's own form, which does not say what it was trained on; say what to score it"
            f" on: --task NAME; {hint}"
        )
    revision = told.get("revision") if base is None else None
    return {"model": {"name": name} | ({"revision": revision} if isinstance(revision, str) else {})}


def _values(
    reference: str | None, *, named: str | None, directory: Path
) -> tuple[dict[str, Any], Path | None]:
    """The config of what was named, as plain values, and where its adapter lies."""
    if reference is None:
        if named is None:
            raise InputError(
                "name a run, an adapter or a model, or say which task the predictions are for: --task NAME"
            )
        return {}, None
    folder = Path(reference).expanduser()
    if (
        folder.name == "final_model"
        and (folder / MANIFEST).is_file()
        and (folder.parent / RunFolder.CONFIG).is_file()
    ):
        return read_yaml(folder.parent / RunFolder.CONFIG), folder  # the run beside it knows its data
    if (folder / MANIFEST).is_file() and not (folder / RunFolder.CONFIG).is_file():
        manifest = read_manifest(folder)
        return {
            "model": {"name": manifest["base"]["name"]},
            "task": _known_task(manifest["task"], named),
        }, folder
    try:
        run = RunFolder.find(reference, directory)
    except (UnknownNameError, OutputError) as error:
        if named is None:
            raise InputError(f"{error}; to score a model, say on which task: --task NAME") from None
        return {"model": {"name": reference}}, None
    if not (run.path / "final_model" / MANIFEST).exists():
        raise InputError(
            f"the run {run.path} has no final model yet; go on with it: peftlab run --resume {run.path}"
        )
    return read_yaml(run.path / "config.yaml"), run.path / "final_model"


def _known_task(name: str, named: str | None) -> dict[str, str]:
    """The task of an adapter; an imported one may have none."""
    if named is None:
        try:
            TASKS.check(name)
        except UnknownNameError:  # an imported adapter has its folder's name there, or nothing
            told = f"says that it is for '{name}', which is no task here" if name else "does not say its task"
            raise InputError(f"this adapter {told}; say what to score it on: --task NAME") from None
    return {"name": name} if name else {}


def _decoded_anew(own: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluation settings with changes; another way to an answer drops what only the old one reads."""
    kept = dict(own)
    if changes.get("decoding", own.get("decoding")) != own.get("decoding"):
        for name in ONE_KIND_ALONE:
            kept.pop(name, None)
    if changes.get("answers") == "likelihood":
        for name in ("decoding", *WRITTEN_ALONE):
            kept.pop(name, None)
    return {**kept, **changes}
