"""What a person names to be looked into: a model, the embedded base, or a run with its adapter, before weights are read.

Any kind of model can be looked into, not only those that a task can be trained on: the class is the one that the config
names, and a model without a tokenizer is shown without what needs one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.catalog import METHODS
from peftlab.config import EMBEDDED_BASE, ModelSettings, build_config
from peftlab.devices import choose_device, choose_dtype
from peftlab.errors import InputError, ModelError
from peftlab.files import read_yaml
from peftlab.loading import (
    ModelSource,
    find_model,
    load_model,
    meta_model,
    read_config,
    read_tokenizer,
    read_weights,
)
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check
from peftlab.method import Attachment
from peftlab.model_facts import empty_model, model_class
from peftlab.run import LAST, RunFolder
from peftlab.store import MANIFEST, attach_saved, check_belongs, read_manifest

EMBEDDED = "embedded"
"""Short name of the model that lies inside the package."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is looked into.

    Attributes:
        reference: As the person named it.
        name: A short name, good for a folder.
        settings: Which model it or its base is, and the device.
        location: What transformers loads.
        config: transformers' config.
        tokenizer: Its tokenizer; None where it has none.
        bundle: The adapter's folder; None for a bare model.
        manifest: The bundle's manifest.
    """

    reference: str
    name: str
    settings: ModelSettings
    location: str
    config: Any
    tokenizer: Any | None
    bundle: Path | None = None
    manifest: Mapping[str, Any] | None = None

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What adapts it, as plain values; None for a bare model."""
        if self.manifest is None:
            return None
        kept = ("method", "settings", "base", "task", "counts", "scores")
        return {key: self.manifest[key] for key in kept}

    def structure(self) -> nn.Module:
        """The model on the meta device, its adapter attached.

        Returns:
            The model in evaluation mode; no weights are read.
        """
        source = self.trained_source
        if source is None or self.manifest is None:
            return empty_model(self.config)
        base = meta_model(source)
        method = METHODS.load(self.manifest["method"])
        settings = method.Settings(**self.manifest["settings"])
        attached: nn.Module = method.attach(base, map_model(base), settings, head=source.head, seed=0).model
        return attached.eval()

    def load(self) -> tuple[nn.Module, list[str]]:
        """Read the weights.

        Returns:
            The model in evaluation mode on its device, and the names of tensors that its files lack: they are random.

        Raises:
            ModelError: The weights are missing or damaged, or the map does not hold on them.
            CheckpointError: The adapter's files are damaged, or the base is another one.
        """
        if self.manifest is not None:
            return self.attach().model, []
        device = choose_device(self.settings.device)
        dtype = choose_dtype(self.settings.weights_dtype, device)
        model, missing = read_weights(
            model_class(self.config), self.config, self.settings, self.location, dtype=dtype
        )
        model = model.to(device).eval()
        spot_check(model, map_model(model))
        return model, missing

    def attach(self) -> Attachment:
        """Read the weights of a base and of the adapter on it.

        Returns:
            The attachment, its model in evaluation mode on its device.

        Raises:
            ModelError: It is a bare model, the weights are missing or damaged, or the map does not hold on them.
            CheckpointError: The adapter's files are damaged, or the base is another one.
        """
        source = self.trained_source
        if source is None or self.manifest is None or self.bundle is None:
            raise ModelError(f"'{self.reference}' has no adapter: name a run or a bundle")
        check_belongs(self.manifest, source, self.bundle)
        base = load_model(source, self.settings, seed=self.manifest["seed"])
        spot_check(base, map_model(base))
        return attach_saved(base, self.bundle)

    @property
    def trained_source(self) -> ModelSource | None:
        """The base of a trained adapter as `loading` knows it; None for a bare model."""
        if self.manifest is None:
            return None
        head = self.manifest["head"]
        return ModelSource(self.settings.name, self.location, self.config, self.tokenizer, head)


def find_subject(reference: str, *, runs: Path, device: str = "auto") -> Subject:
    """Find what a person names and read its config.

    Args:
        reference: "embedded", a run (path, name or last), a bundle's folder, a model's folder, or a name on the hub.
        runs: Where run folders lie.
        device: Where it will run: auto, cpu, cuda, mps.

    Returns:
        The subject; no weights are read.

    Raises:
        InputError: A run that has not finished.
        ModelError: There is no such model, or transformers does not know its class.
        CheckpointError: The adapter's files are damaged.
        ConfigError: The device is not there.
    """
    choose_device(device)
    folder = Path(reference).expanduser()
    run = _find_run(reference, folder, runs)
    if run is not None:
        bundle = run.path / "final_model"
        if not (bundle / MANIFEST).is_file():
            raise InputError(
                f"the run {run.path} has no final model yet; go on with it: peftlab run --resume {run.path}"
            )
        settings = build_config(read_yaml(run.path / RunFolder.CONFIG)).model
        return _trained(reference, run.name, bundle, settings, device)
    if (folder / MANIFEST).is_file():
        base = read_manifest(folder)["base"]["name"]
        return _trained(reference, folder.absolute().name, folder, ModelSettings(name=base), device)
    name = EMBEDDED_BASE if reference == EMBEDDED else reference
    settings = ModelSettings(name=name, device=device)
    location, config = read_config(settings)
    tokenizer = None
    if "input_ids" in inspect.signature(model_class(config).forward).parameters:
        tokenizer = read_tokenizer(settings, location)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # pads are masked by position
    short = folder.absolute().name if folder.is_dir() else name.rpartition("/")[2]
    return Subject(reference, short, settings, location, config, tokenizer)


def _find_run(reference: str, folder: Path, runs: Path) -> RunFolder | None:
    """The run that a reference names; None where it names none."""
    if (folder / RunFolder.CONFIG).is_file():
        return RunFolder(folder)
    if reference == LAST or (
        not folder.exists() and (runs.expanduser() / reference / RunFolder.CONFIG).is_file()
    ):
        return RunFolder.find(reference, runs)
    return None


def _trained(reference: str, name: str, bundle: Path, settings: ModelSettings, device: str) -> Subject:
    """A base with a bundle's adapter."""
    manifest = read_manifest(bundle)
    asked = settings.model_copy(update={"device": device})
    source = find_model(asked, num_labels=len(manifest["labels"]) or None)
    return Subject(reference, name, asked, source.location, source.config, source.tokenizer, bundle, manifest)
