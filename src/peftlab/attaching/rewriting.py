"""Training a base's own tensors in place, with the way back: full fine-tuning and bias-only tuning.

The originals of what trains are kept once, on the CPU: as many bytes of host memory as the trained tensors have
(`originals_bytes`). `disabled` exchanges them for the trained ones, `remove` writes them back. On a GPU a disabled block
holds both there.

What trains must be float32 or wider: next to a weight of 1, bfloat16 has no number between 1 and 1.008, so that steps of
a usual learning rate change nothing, and training would be stopped by law 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab.attaching.merging import check_not_over
from peftlab.attaching.occupancy import AllOrNothing, check_free, occupy
from peftlab.attaching.tensors import check_fit, kept
from peftlab.errors import CheckpointError, MethodError, NonFiniteError
from peftlab.family import FamilyMap, Selection, Site
from peftlab.files import write_json
from peftlab.method import OrdinaryTraining
from peftlab.schedule import Schedule

RECORD_FILE = "rewritten.json"
"""Which method rewrote which tensors; beside the files of a whole model or `TENSORS_FILE`."""
TENSORS_FILE = "rewritten.safetensors"
"""The rewritten tensors, where not the whole model is saved."""
_RECORD_VERSION = 1
_SHOWN = 6


class RewrittenAttachment(OrdinaryTraining, metaclass=AllOrNothing):
    """Base tensors that train in place; satisfies `method.Attachment`.

    Args:
        model: The base.
        family: Its map.
        names: Names of the parameters that train, as `named_parameters` has them: a tied tensor once.
        method: The method's name, for messages and for the record on disk.
        whole: Whether the whole model is saved, as `from_pretrained` loads it, or the trained tensors alone.

    Attributes:
        model: The base itself.
        family: Its map.
        selection: What trains: linear layers in `adapted`, embeddings and head in `saved`.
        rewritten: The names of what trains; none once removed.

    Raises:
        MethodError: There is nothing to train, or it is not of float32 or wider.
    """

    ended = ""

    def __init__(
        self, model: nn.Module, family: FamilyMap, names: Iterable[str], *, method: str, whole: bool
    ) -> None:
        check_free(model)
        chosen = set(names)
        self.model, self.family = model, family
        self.rewritten = tuple(name for name, _ in model.named_parameters() if name in chosen)
        self.selection = _selection(family, self.rewritten)
        self._method, self._whole = method, whole and hasattr(model, "save_pretrained")
        self._check_trainable()
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._originals = {name: kept(p) for name, p in self.parameters().items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        occupy(model, self)

    def _check_trainable(self) -> None:
        """Refuse what would not train.

        Raises:
            MethodError: There is nothing to train, or it is not of float32 or wider.
        """
        if not self.rewritten:
            raise MethodError(f"{self._method} has nothing to train in this {type(self.model).__name__}")
        narrow = {n: p for n, p in self.parameters().items() if not is_wide(p)}
        if narrow:
            name, parameter = next(iter(narrow.items()))
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise MethodError(
                f"{self._method} trains the base's own tensors, and {len(narrow)} of them are {dtype} ({name}), in which"
                " small steps round to nothing; set model.dtype=float32, or use a method that adds tensors, such as lora"
            )

    @property
    def originals_bytes(self) -> int:
        """Host memory that the originals take."""
        return sum(original.nbytes for original in self._originals.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, by its name in `model`."""
        there = dict(self.model.named_parameters())
        return {name: there[name] for name in self.rewritten}

    def steps_to_train(self, name: str) -> int:
        """Law 1's K for one tensor.

        Args:
            name: The tensor's name in `model`.

        Returns:
            1: nothing that is zero at the start stands in front of a pretrained tensor.
        """
        return 1

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which `model` computes with the original tensors; nothing may be trained or loaded inside."""
        check_not_over(self.ended, "switched off")
        # the data is exchanged, not copied: the parameters, what autograd has kept of them and their storages stay
        parameters = self.parameters()
        trained = {name: p.data for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._originals[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    def begin(self, schedule: Schedule) -> None:
        """Nothing to prepare for a schedule."""

    def after_step(self, step: int) -> None:
        """Nothing to do after a step."""

    def is_complete(self, step: int) -> bool:
        """Whether the tensors after this step are ones to keep.

        Args:
            step: An optimizer step, from 1.

        Returns:
            True.
        """
        return True

    @property
    def answering(self) -> nn.Module:
        """The model: nothing is added to its loss."""
        return self.model

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, by name, on the CPU."""
        check_not_over(self.ended, "saved")
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in self.parameters().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from what trains here.
        """
        parameters = self.parameters()
        check_not_over(self.ended, "loaded")
        check_fit(parameters, tensors)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Write the whole model as transformers does, or the trained tensors alone, and which they are.

        Args:
            folder: Where; made if needed.
        """
        check_not_over(self.ended, "saved")
        folder.mkdir(parents=True, exist_ok=True)
        if self._whole:
            from transformers.utils import logging

            logging.disable_progress_bar()
            model: Any = self.model
            config = dict(vars(model.config))
            try:
                model.save_pretrained(str(folder))
            finally:  # saving writes class and dtype into the live config
                vars(model.config).clear()
                vars(model.config).update(config)
        else:
            save_file(self.tensors(), folder / TENSORS_FILE)
        record = {
            "version": _RECORD_VERSION,
            "method": self._method,
            "whole_model": self._whole,
            "tensors": list(self.rewritten),
        }
        write_json(folder / RECORD_FILE, record)

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote; a whole model is read beside this one, so both are in memory for a moment.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit, or cannot be read.
        """
        try:
            record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
            whole, names = bool(record["whole_model"]), list(record["tensors"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} holds no {RECORD_FILE} that can be read: it is not what {self._method} saves ({error})"
            ) from error
        if record.get("version") != _RECORD_VERSION:
            raise CheckpointError(
                f"{folder / RECORD_FILE}: version {record.get('version')}, this peftlab reads {_RECORD_VERSION}"
            )
        try:
            tensors = self._read_model(folder) if whole else load_file(folder / TENSORS_FILE)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        self.load({name: tensors[name] for name in names if name in tensors} if whole else tensors)

    def _read_model(self, folder: Path) -> dict[str, torch.Tensor]:
        """The parameters of a whole saved model, by name, as transformers reads them: its files may name them otherwise."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        kind: Any = type(self.model)
        dtype = self.model.get_parameter(self.rewritten[0]).dtype
        told = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would only warn of is an error here
        try:
            saved, report = kind.from_pretrained(
                str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        finally:
            logging.set_verbosity(told)
        wrong = {
            "missing": sorted(report["missing_keys"]),
            "unexpected": sorted(report["unexpected_keys"]),
            "of another shape": sorted(str(key[0]) for key in report["mismatched_keys"]),
        }
        if any(wrong.values()):
            found = "; ".join(f"{what} {names[:_SHOWN]}" for what, names in wrong.items() if names)
            raise CheckpointError(f"the whole model in {folder} does not fit: {found}")
        return {name: p.detach() for name, p in saved.named_parameters()}

    def remove(self) -> nn.Module:
        """Write the originals back.

        Returns:
            The base as it was given: same object, same tensors, bit-equal, same `requires_grad`.

        Raises:
            MethodError: It has been merged.
        """
        check_not_over(self.ended, "removed")
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(self._originals[name])
        return self._hand_back("removed")

    def merge(self) -> nn.Module:
        """Keep the trained tensors for good and let go of the originals.

        Returns:
            The base, the same object, with the values that were trained and the `requires_grad` it was given with.

        Raises:
            MethodError: It is not on the base any more.
            NonFiniteError: A trained value is not finite; nothing has changed.
        """
        check_not_over(self.ended, "merged")
        bad = next((n for n, p in self.parameters().items() if not torch.isfinite(p.detach()).all()), None)
        if bad is not None:
            raise NonFiniteError(f"{bad} has values that are not finite: {self._method} is not merged")
        return self._hand_back("merged")

    def _hand_back(self, how: str) -> nn.Module:
        """The base as a plain model, with the tensors as they are now."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
            if name in self._originals:
                parameter.grad = None
        self.rewritten, self._originals, self.ended = (), {}, how
        return self.model


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of float32 or wider, and so moves by a usual step."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 4


def _selection(family: FamilyMap, names: Iterable[str]) -> Selection:
    """What the names of trained parameters stand for."""
    paths = {family.locate(name).path for name in names}
    there = [site for site in family.sites if site.path in paths]
    adapted = tuple(site for site in there if site.linear and site.layer is not None)
    saved = tuple(site for site in there if site.role in ("embedding", "head"))
    return Selection(adapted, saved)


def names_below(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The parameters of some modules.

    Args:
        model: The base.
        paths: Dotted paths of modules.

    Returns:
        Parameter names as `named_parameters` has them; a tied tensor under its one name there, whichever path it is
        asked by.
    """
    wanted = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    return [name for name, p in model.named_parameters() if id(p) in wanted]


def names_of_sites(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The parameters of some sites, as `names_below`."""
    return names_below(model, [site.path for site in sites])


def names_in_last_layers(model: nn.Module, family: FamilyMap, num_layers: int) -> list[str]:
    """The parameters of the last layers of every stack.

    Args:
        model: The base.
        family: Its map.
        num_layers: How many of each stack.

    Returns:
        Parameter names; all of a stack's where it has fewer layers.

    Raises:
        MethodError: No stack has so many layers.
    """
    deepest = max(family.stacks.values())
    if num_layers > deepest:
        raise MethodError(f"num_layers is {num_layers}, and this model's deepest stack has {deepest} layers")
    blocks = [
        site for site in family.blocks() if (site.layer or 0) >= family.num_blocks(site.stack) - num_layers
    ]
    return names_of_sites(model, blocks)


def bias_names(model: nn.Module) -> list[str]:
    """The additive biases: parameters whose own name ends in "bias" (`bias`, `in_proj_bias`), of linear layers and norms.

    Args:
        model: The base.

    Returns:
        Parameter names.
    """
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")]


def gain_names(model: nn.Module, family: FamilyMap) -> list[str]:
    """The gains of the norms: what a norm has beside its bias.

    Args:
        model: The base.
        family: Its map.

    Returns:
        Parameter names.
    """
    biases = set(bias_names(model))
    return [n for n, _ in model.named_parameters() if family.locate(n).role == "norm" and n not in biases]
