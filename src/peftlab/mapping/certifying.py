"""The certificate of a live model's architecture: from memory, from the cache folder, or proved now on a twin."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
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

_MOST_LAYERS = 16
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
    family = family_exceptions(getattr(config, "model_type", ""))
    small = twin_config(config, num_layers=layers_needed(model), changes=getattr(family, "TWIN", None))
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


def layers_needed(model: nn.Module) -> int:
    """How many layers a twin needs to have every make of block that a model has, four at least.

    Args:
        model: The model, on any device.

    Returns:
        The number, at most 16.
    """
    most = 4
    for blocks in block_lists(model).values():
        marks = [signature(block) for block in blocks]
        most = max(most, *(marks.index(mark) + 1 for mark in set(marks)))
    return min(most, _MOST_LAYERS)


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


def _key(model_class: type, small: Any, foreign: list[str]) -> str:
    """One key for a class, a config without its sizes, and everything that could change a proof."""
    facts = {
        "code": _proving_code(),
        "foreign": foreign,
        "class": f"{model_class.__module__}.{model_class.__qualname__}",
        "config": small.to_dict(),
        "version": VERSION,
        "libraries": [metadata.version(name) for name in ("transformers", "torch")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def prove_config(model_class: type[nn.Module], config: Any) -> tuple[nn.Module | None, Certificate]:
    """Prove the architecture of a class and a config, without the cache.

    Args:
        model_class: The class.
        config: A config of any size.

    Returns:
        The twin and its certificate; None and the problem where no twin runs.
    """
    with torch.device("meta"):
        whole = getattr(model_class, "_from_config", model_class)(copy.deepcopy(config))
    family = family_exceptions(config.model_type)
    small = twin_config(config, num_layers=layers_needed(whole), changes=getattr(family, "TWIN", None))
    return _prove(model_class, small)


def _prove(model_class: type[nn.Module], small: Any) -> tuple[nn.Module | None, Certificate]:
    """Build the twin and carry out the experiments; a twin that cannot be built or run is the certificate's problem."""
    name, model_type = model_class.__name__, getattr(small, "model_type", "")
    try:
        with _plain_torch():
            twin = build_twin(model_class, small)
            count = sum(p.numel() for p in twin.parameters())
            if count > _MOST_PARAMETERS:
                raise ValueError(f"a tiny {name} still has {count:,} parameters")
            return twin, prove(twin, complete_inputs(twin, twin_inputs(twin)))
    except Exception as error:  # noqa: BLE001 - any model code can fail in any way; the reason is kept and told
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        problem = f"no tiny twin of it runs ({type(error).__name__}: {said})"
        return None, Certificate(name, model_type, problem=problem)


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
