"""The certificate of a live model's architecture: from memory, from the cache folder, or proved now on a twin."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, reduce
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.catalog import FAMILIES
from peftlab.certificate import VERSION, Certificate
from peftlab.files import sha256, write_json
from peftlab.mapping.proving import prove
from peftlab.mapping.structure import block_lists, signature
from peftlab.mapping.twin import build_twin, twin_config, twin_inputs
from peftlab.mapping.twin_sizes import LAYERS

_MOST_LAYERS = 16
_MOST_SHARED = 64
_MOST_PARAMETERS = 20_000_000
_known: dict[str, Certificate] = {}


def certify(model: Any) -> Certificate:
    """The certificate of a model's architecture.

    Args:
        model: A transformers model on any device; only its class, config and module tree are read.

    Returns:
        The certificate; `problem` says why where nothing could be proved.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return Certificate(type(model).__name__, "", problem="it is not a transformers model with a config")
    small = _twin_configs(model, config)
    foreign = _foreign_code(model)
    if foreign is None:
        return _prove(type(model), small)[1]
    key = _key(type(model), small, foreign)
    if key in _known:
        return _known[key]
    kept = cache_folder() / f"{key}.json"
    certificate = _read(kept) or _keep(kept, _prove(type(model), small)[1])
    if not certificate.problem:
        _known[key] = certificate
    return certificate


def _twin_configs(model: nn.Module, config: Any) -> list[Any]:
    """The configs of a model's twins: one, and more where its family says that one has not every make of block."""
    family = family_exceptions(getattr(config, "model_type", ""))
    changes = [getattr(family, "TWIN", None), *getattr(family, "ALSO", ())]
    layers = layers_needed(model)
    return [twin_config(config, num_layers=layers, changes=change) for change in changes]


def layers_needed(model: nn.Module) -> int:
    """How many layers a twin needs to have every make of block that a model has, four at least.

    Args:
        model: The model, on any device.

    Returns:
        The number, at most 16; all layers where blocks are shared between them.
    """
    most, longest = 4, 0
    for blocks in block_lists(model).values():
        marks = [signature(block) for block in blocks]
        most = max(most, *(marks.index(mark) + 1 for mark in set(marks)))
        longest = max(longest, len(blocks))
    declared = _declared_layers(model)
    if longest and longest < declared <= _MOST_SHARED:
        return declared  # blocks are shared (ALBERT): which makes which layer shows in a twin of the same depth alone
    return min(most, _MOST_LAYERS)


def _declared_layers(model: Any) -> int:
    """The number of layers that a model's own config gives; 0 where it gives none."""
    known = vars(model.config) if hasattr(model, "config") else {}
    return max([value for name, value in known.items() if name in LAYERS and isinstance(value, int)] or [0])


def family_exceptions(model_type: str) -> Any:
    """The leaf in `families/` for a model type.

    Args:
        model_type: The config's model type.

    Returns:
        The module, or None where the type needs no exception.
    """
    name = model_type.replace("-", "_")
    return FAMILIES.load(name) if name in FAMILIES.names() else None


def cache_folder() -> Path:
    """Where certificates are kept between processes: PEFTLAB_CACHE, or `peftlab` in the user's cache folder."""
    given = os.environ.get("PEFTLAB_CACHE")
    base = (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlab"
    )
    return base / "certificates"


def _foreign_code(model: nn.Module) -> list[str] | None:
    """Sums of the source files of a model's classes that are not transformers', torch's or peft's own.

    Args:
        model: The model.

    Returns:
        The sums; None where a class has no file (written in a notebook): it may change at any time, so nothing is kept.
    """
    own = ("transformers.", "torch.", "peft.")
    modules = {type(m).__module__ for m in model.modules() if not f"{type(m).__module__}.".startswith(own)}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    return None if None in files else [sha256(Path(str(file))) for file in files]


@cache
def _proving_code() -> list[str]:
    """Sums of the files that make the proofs."""
    folder = Path(__file__).parent
    return [
        sha256(file) for file in sorted([*folder.glob("*.py"), *(folder.parent / "families").glob("*.py")])
    ]


def _key(model_class: type, small: Sequence[Any], foreign: list[str]) -> str:
    """One key for a class, a config without its sizes, and everything that could change a proof."""
    facts = {
        "code": _proving_code(),
        "foreign": foreign,
        "class": f"{model_class.__module__}.{model_class.__qualname__}",
        "configs": [config.to_dict() for config in small],
        "version": VERSION,
        "libraries": [metadata.version(name) for name in ("transformers", "torch")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def prove_config(
    model_class: type[nn.Module], config: Any
) -> tuple[nn.Module | None, Certificate, nn.Module]:
    """Prove the architecture of a class and a config, without the cache.

    Args:
        model_class: The class.
        config: A config of any size.

    Returns:
        The twin and its certificate, None and the problem where no twin runs; and the whole model on the meta device.
    """
    with torch.device("meta"):
        whole = getattr(model_class, "_from_config", model_class)(copy.deepcopy(config))
    return *_prove(model_class, _twin_configs(whole, config)), whole


def _prove(model_class: type[nn.Module], small: Sequence[Any]) -> tuple[nn.Module | None, Certificate]:
    """Build the twins and carry out the experiments on each; the first is the one that is told of.

    A twin that cannot be built or run is the certificate's problem.
    """
    name, model_type = model_class.__name__, getattr(small[0], "model_type", "")
    try:
        with _plain_torch():
            twins = [_build(model_class, config) for config in small]
            first, *more = (prove(twin, complete_inputs(twin, twin_inputs(twin))) for twin in twins)
            return twins[0], reduce(_with_makes_of, more, first)
    except Exception as error:  # noqa: BLE001 - any model code can fail in any way; the reason is kept and told
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        problem = f"no tiny twin of it runs ({type(error).__name__}: {said})"
        return None, Certificate(name, model_type, problem=problem)


def _build(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A twin that is tiny indeed."""
    twin = build_twin(model_class, config)
    count = sum(p.numel() for p in twin.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"a tiny {model_class.__name__} still has {count:,} parameters")
    return twin


def _with_makes_of(one: Certificate, other: Certificate) -> Certificate:
    """A certificate, and the makes of blocks that only another twin has where its block outputs are hidden states too."""
    stacks = []
    for stack in one.stacks:
        further = other.stack(stack.path)
        known = {kind.signature for kind in stack.kinds}
        makes = [kind for kind in further.kinds if kind.signature not in known] if further else []
        worse = further.outputs if further and makes and stack.outputs == "equal" else stack.outputs
        stacks.append(replace(stack, kinds=(*stack.kinds, *makes), outputs=worse))
    return replace(one, stacks=tuple(stacks), seconds=one.seconds + other.seconds)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Float32 on the CPU without autocast, whatever the caller has set; the caller's random streams are left alone."""
    dtype = torch.get_default_dtype()
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.inference_mode(mode=False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            torch.manual_seed(0)
            yield
        finally:
            torch.set_default_dtype(dtype)


def complete_inputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a forward pass with what this model type needs beside the usual ones.

    Args:
        model: A model.
        inputs: The usual inputs.

    Returns:
        The inputs.
    """
    adapt = getattr(family_exceptions(getattr(model.config, "model_type", "")), "inputs", None)
    return adapt(model, inputs) if adapt else inputs


def _read(path: Path) -> Certificate | None:
    """A kept certificate; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        return Certificate.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, OSError):
        return None  # of an older form or cut short: proved anew and written over


def _keep(path: Path, certificate: Certificate) -> Certificate:
    """Write a certificate where the folder allows it: without it the next process proves again."""
    if not certificate.problem and _writable(path.parent):
        write_json(path, certificate.to_json())
    return certificate


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if needed."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return True
