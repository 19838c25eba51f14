"""Importing an adapter: read, translated, put on its base, compared with what the file says, and kept as a bundle."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from peftlab.attaching.attachment import ADAPTER, ADAPTER_FILE
from peftlab.attaching.prompting import PromptAttachment
from peftlab.attaching.targeting import new_modules
from peftlab.catalog import METHODS
from peftlab.config import AdapterSettings, ModelSettings
from peftlab.errors import CheckpointError, InputError, ModelError, TargetError
from peftlab.files import sha256, write_json
from peftlab.folders import OnConflict, choose_folder
from peftlab.importing.fit import check_places, check_ranks, name_base
from peftlab.importing.foreign import PREFIX, Foreign, Translation
from peftlab.importing.loralib_file import is_loralib, read_loralib
from peftlab.importing.peft_folder import CONFIG_FILE, PROMPT, read_peft_folder
from peftlab.importing.tensor_files import read_tensors
from peftlab.loading import ModelSource, find_model, hash_tensors, hash_tokenizer, load_model, meta_model
from peftlab.mapping import map_model
from peftlab.method import Attachment
from peftlab.restoring import all_or_nothing
from peftlab.settings import validate
from peftlab.store import MANIFEST, BundleFacts, save_bundle

_UNLIKELY_LABELS = 7919
"""A number of classes that is no other size of a model: it shows which tensor of a new head has one row for each class."""
_SEED = 42
_LIBRARIES = ("peftlab", "torch", "transformers", "peft", "safetensors")
_COPY = ".modules_to_save."
_ENCODER = "prompt_encoder.embedding.weight"
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import.

    Attributes:
        path: The bundle's folder.
        method: The method it is of.
        num_tensors: How many tensors the adapter has.
        num_parameters: How many numbers they hold.
        notes: What a person should know.
    """

    path: Path
    method: str
    num_tensors: int
    num_parameters: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The bundle in words."""
        told = f"{self.path}: {self.method}, {self.num_parameters:,} parameters in {self.num_tensors} tensors"
        return "\n".join([told, *(f"  note: {note}" for note in self.notes)])


def import_adapter(
    source: str | Path,
    *,
    base: str,
    output: str | Path,
    name: str | None = None,
    on_conflict: OnConflict = "refuse",
    labels: Sequence[str] = (),
    alpha: float | None = None,
    merged: Sequence[str] = (),
    torch_file: bool = False,
    ignored: Collection[str] = (),
) -> Imported:
    """Make a bundle out of somebody else's adapter.

    Args:
        source: A plain peft folder, or a state dict of loralib.
        base: The base's folder or hub name.
        output: The folder in which the bundle's folder shall lie.
        name: The bundle's name, such as its task's; None is the source's own.
        on_conflict: What happens where there is one of this name: "refuse", "version" or "overwrite".
        labels: Names of the classes of a classifier; the base's own where left out.
        alpha: loralib's alpha, which its files do not hold.
        merged: Which of query, key and value a loralib `MergedLinear` adapts, which its files do not hold.
        torch_file: Whether a file of torch's own format may be read, tensors only.
        ignored: Fields of a peft config that shall not be heeded.

    Returns:
        The bundle.

    Raises:
        InputError: A file is missing, or something that it does not say is needed.
        ConfigError: The adapter's config says what no method here can express; lists it.
        CheckpointError: The tensors are damaged, or do not fit the config or the base; lists them.
        ModelError: The base cannot be loaded.
        MethodError: The method does not work on this base.
        TargetError: The adapter's modules are not in this base.
        OutputError: The name is there already, or the folder cannot be written.
    """
    path = Path(source).expanduser()
    foreign = read_foreign(path, alpha=alpha, merged=merged, torch_file=torch_file, ignored=ignored)
    named = path.name.partition(".")[0] if name is None and path.is_file() else name or path.resolve().name
    folder = choose_folder(Path(output).expanduser(), named, on_conflict)
    settings = ModelSettings(name=base, device="cpu")
    found = find_base(foreign, settings, labels)
    model = load_model(found, settings, seed=_SEED)
    translation, attachment = put_on(foreign, model, found)
    facts = BundleFacts(
        adapter=AdapterSettings(method=translation.method, settings=dict(translation.settings)),
        base=base,
        base_hash=hash_tensors(found),
        tokenizer_hash=hash_tokenizer(found.tokenizer),
        prompt="",
        task=named,
        head=found.head,
        labels=_labels(found, labels),
        seed=_SEED,
        versions={library: metadata.version(library) for library in _LIBRARIES},
        scores={},
        origin=_origin(foreign),
    )
    save_bundle(attachment, found.tokenizer, facts, folder)
    parameters = attachment.parameters().values()
    notes = [*translation.notes]
    if foreign.base and foreign.base != base:
        notes.insert(0, f"the file names the base '{foreign.base}'; that this is the same is not shown by it")
    count = sum(parameter.numel() for parameter in parameters)
    return Imported(folder, translation.method, len(parameters), count, tuple(notes))


def read_foreign(
    path: Path,
    *,
    alpha: float | None = None,
    merged: Sequence[str] = (),
    torch_file: bool = False,
    ignored: Collection[str] = (),
) -> Foreign:
    """Read an adapter of a form that is recognised by what it holds.

    Args:
        path: A folder or a file.
        alpha: As for `import_adapter`, as all that follow.
        merged: Parts of a merged layer.
        torch_file: Whether a file of torch's own format may be read.
        ignored: Fields of a peft config that shall not be heeded.

    Returns:
        The adapter.

    Raises:
        InputError: There is nothing, or nothing of a known form, or a setting has no effect on this form.
        ConfigError: Its config cannot be read.
        CheckpointError: Its tensors are damaged.
        UnknownNameError: This peft has no such type.
    """
    if path.is_dir():
        _check_folder(path)
        if alpha is not None or merged:
            raise InputError("alpha and merged are for files of loralib; a peft folder says them itself")
        return read_peft_folder(path, torch_file=torch_file, ignored=ignored)
    tensors = read_tensors(path, torch_file=torch_file)
    if not is_loralib(list(tensors)):
        raise InputError(
            f"{path} holds named tensors, but neither loralib's (PATH.lora_A, PATH.lora_B) nor a config beside them: give"
            f" the folder that holds {CONFIG_FILE}; EfficientFineTuningManager's are read by its"
            " load_efficient_weights"
        )
    if ignored:
        raise InputError("ignored is for peft folders; a file of loralib has no fields")
    return read_loralib(path, tensors, alpha=alpha, merged=merged)


def _check_folder(path: Path) -> None:
    """Refuse a folder that is no plain peft folder, with the way that works."""
    if (path / MANIFEST).is_file():
        raise InputError(f"{path} is a bundle of peftlab already: load it with peftlab.load")
    if not (path / CONFIG_FILE).is_file():
        below = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"; there is one in {', '.join(below[:5])}: import that folder" if below else ""
        raise InputError(f"{path} holds no {CONFIG_FILE}, so it is no peft folder{hint}")


def put_on(foreign: Foreign, model: nn.Module, source: ModelSource) -> tuple[Translation, Attachment]:
    """Attach the method that an adapter is of, with the adapter's tensors.

    Args:
        foreign: The adapter.
        model: The base; where this fails it is as it was, but for what attaching itself leaves.
        source: What it was loaded from.

    Returns:
        The translation, and the attachment.

    Raises:
        ConfigError: The adapter's config says what the method cannot express.
        CheckpointError: The tensors do not fit, or the method would scale them otherwise; nothing is left on the base.
        MethodError: The method does not work on this base.
        TargetError: The adapter's modules are not in this base.
    """
    family = map_model(model)
    base = str(getattr(source, "name", ""))
    try:
        translation = foreign.translate(model, family)
    except TargetError as error:
        raise TargetError(f"{error} (the base is {name_base(base, model)})") from error
    check_places(foreign, translation.tensors, model, base)
    check_ranks(foreign, translation.rank_pattern, model, base)
    leaf = METHODS.load(translation.method)
    values = {"method": translation.method, "settings": dict(translation.settings)}
    checked = validate(AdapterSettings, values, where=str(foreign.path))
    bare = dict(model.named_parameters())
    attachment: Attachment = leaf.attach(
        model, family, leaf.Settings(**checked.settings), head=source.head, seed=_SEED
    )
    with all_or_nothing(attachment, foreign.path):
        tensors, dropped = _without_base(translation.tensors, attachment.tensors().keys(), bare)
        _load(attachment, tensors, translation.rank_pattern)
        _check_scaling(attachment, translation.scaling)
    notes = (*translation.notes, *dropped)
    return replace(translation, settings=checked.settings, notes=notes), attachment


def _load(
    attachment: Attachment, tensors: Mapping[str, torch.Tensor], rank_pattern: Mapping[str, Any]
) -> None:
    """Put tensors by peft's names into an attachment."""
    copies = {n: n.replace(_COPY, ".") for n in attachment.tensors() if _COPY in n and n not in tensors}
    if isinstance(attachment, PromptAttachment):  # its own names are those of the model, not of peft's file
        renamed = {plain: name for name, plain in copies.items()} | {PROMPT: _ENCODER}
        found = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        if (
            _ENCODER in found and _ENCODER not in attachment.tensors()
        ):  # a cartridge has no table of embeddings
            encoder = attachment.model.prompt_encoder[ADAPTER]
            encoder._load_adapter_state_dict({PROMPT: found.pop(_ENCODER)})
            found = attachment.tensors() | found
        attachment.load(found)
    elif rank_pattern:  # modules are cut to their ranks by what lies on disk
        with tempfile.TemporaryDirectory() as folder:
            save_file(dict(tensors), Path(folder) / ADAPTER_FILE)
            write_json(Path(folder) / CONFIG_FILE, {"rank_pattern": dict(rank_pattern)})
            attachment.load_saved(Path(folder))
    else:  # a copied module's bias is there twice where all biases train, under one name once read
        twice = {name: tensors[plain] for name, plain in copies.items() if plain in tensors}
        attachment.load({**tensors, **twice})


def _without_base(
    tensors: Mapping[str, torch.Tensor], own: Collection[str], bare: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """An adapter's tensors without copies of the base's own, which peft saves beside an adapter on an embedding."""
    kept, copies = {}, []
    for name, tensor in tensors.items():
        base = bare.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        same = name not in own and base is not None and torch.equal(base.detach(), tensor.to(base.dtype))
        if same:
            copies.append(name.removeprefix(PREFIX))
        else:
            kept[name] = tensor
    told = f"left out, for the base holds the same: {', '.join(copies)}" if copies else ""
    return kept, [told] if told else []


def _check_scaling(attachment: Attachment, scaling: Mapping[str, float]) -> None:
    """Refuse a method that would scale an update otherwise than the file says."""
    tuner: Any = getattr(attachment.model, "base_model", None)
    for path, expected in scaling.items():
        found = float(tuner.model.get_submodule(path).scaling[ADAPTER])
        if not math.isclose(found, expected, rel_tol=1e-9):
            raise CheckpointError(
                f"the update of {path} is scaled by {expected:g} in the file and would be by {found:g}"
            )


def find_base(foreign: Foreign, settings: ModelSettings, labels: Sequence[str]) -> ModelSource:
    """The base, with as many classes as the adapter's head has.

    Args:
        foreign: The adapter.
        settings: Which base.
        labels: Names of the classes; their number is checked where there are any.

    Returns:
        What it is loaded from.

    Raises:
        InputError: The labels are not as many, or the base ends in something else.
    """
    classes: int | None = None
    looked: tuple[str, ...] = ()
    if foreign.head in ("classification", None):
        classes, looked = _count_classes(foreign, settings)
    if foreign.head == "classification" and classes is None:
        raise CheckpointError(
            f"{foreign.path} is of a classifier and holds no head for '{settings.name}', so how many classes there are is"
            f" not known: {_other_head(foreign, looked)}"
        )
    if labels and len(labels) != (classes or 0):
        raise InputError(f"{len(labels)} labels are given, and the adapter has {classes or 'no'} classes")
    try:
        source = find_model(settings, num_labels=classes)
    except ModelError as error:
        if classes is not None or not looked:
            raise
        raise CheckpointError(
            f"{foreign.path} does not fit the base '{settings.name}', which can only be a classifier, and the file holds no"
            f" head for it: {_other_head(foreign, looked)}"
        ) from error
    if foreign.head is not None and source.head != foreign.head:
        raise InputError(
            f"{foreign.path} is an adapter of a {foreign.head} model, and '{settings.name}' is a {source.head} model"
        )
    return source


def _other_head(foreign: Foreign, looked: Sequence[str]) -> str:
    """Which tensors of a head were looked for, and what the file has instead."""
    others = [name.removeprefix(PREFIX) for name in foreign.tensors if ".lora_" not in name][:_SHOWN]
    return (
        f"looked for {', '.join(looked)}, and beside its adapter the file has {', '.join(others) or 'nothing'}; it is not"
        " complete, or belongs to another base"
    )


def _count_classes(foreign: Foreign, settings: ModelSettings) -> tuple[int | None, tuple[str, ...]]:
    """How many rows the tensor of the head has that has one for each class, and the names under which it was looked for.

    None where the file has none; no names where the base cannot be a classifier.
    """
    try:
        probe = find_model(settings, num_labels=_UNLIKELY_LABELS)
    except ModelError:
        if foreign.head is None:  # no classifier: a file that does not say its head is of another kind
            return None, ()
        raise
    shape, looked = meta_model(probe), []
    for part in new_modules(shape, "classification"):
        for name, parameter in shape.get_submodule(part).named_parameters():
            if parameter.shape[0] != _UNLIKELY_LABELS:
                continue
            looked.append(f"{part}.{name}")
            for saved in (f"{PREFIX}{part}.{name}", f"base_model.{part}.{name}"):
                if saved in foreign.tensors:
                    return int(foreign.tensors[saved].shape[0]), tuple(looked)
    return None, tuple(looked)


def _labels(source: ModelSource, labels: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes: those given, or the base's own."""
    if source.head != "classification":
        return ()
    return tuple(labels) or tuple(str(source.config.id2label[i]) for i in range(source.config.num_labels))


def _origin(foreign: Foreign) -> str:
    """Where an adapter comes from, in words that hold on any machine."""
    files = [foreign.path] if foreign.path.is_file() else sorted(foreign.path.glob("adapter_model.*"))
    told = f" for the base '{foreign.base}'" if foreign.base else ""
    return f"{foreign.form} ({foreign.path.name}, tensors sha256 {sha256(files[0])}){told}"
