"""The frozen blocks below the lowest one that trains: run once for each row, then read from a cache.

What a block gives is fixed by the tokens of a row where neither it nor anything below it trains or drops. Later epochs,
phases, seeds and runs of a sweep read these hidden states and begin at the cut. States are always computed in one
canonical shape, so that in float32 those read and those computed anew are the same to the bit, whatever rows a batch has.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from peftlab.downloads import cache_folder
from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.streams import seed_for
from peftlab.trunk_cache import TrunkCache, row_digest

_ROWS, _STEP = 16, 16
"""The canonical shape: 16 rows, padded to a multiple of 16 tokens."""


class _Reached(BaseException):
    """Ends a forward pass at the cut; no `except Exception` in a model's code can hold it up."""


def find_cut(family: FamilyMap, active: Sequence[str]) -> tuple[int, str]:
    """How many blocks lie below the lowest one that trains.

    Args:
        family: The map of the model with its adapter.
        active: Names of the tensors that train.

    Returns:
        The number of blocks, and why there are none where it is 0.
    """
    if len(family.stacks) != 1:
        return 0, f"the model has {len(family.stacks)} stacks of blocks"
    (stack,) = family.stacks
    if family.order(stack) != tuple(range(family.num_blocks(stack))):
        return 0, "its blocks are shared between layers"
    if family.layout(stack) != "bsh":
        return 0, f"its hidden states are laid out as {family.layout(stack)}"
    layers = [site.layer for name in active if (site := family.locate(name)).stack == stack]
    lowest = min((layer for layer in layers if layer is not None), default=family.num_blocks(stack))
    return lowest, "" if lowest else "the first block trains"


@dataclass(slots=True)
class Trunk:
    """The frozen blocks of a model in one phase, with the states of rows.

    Attributes:
        model: The model with its adapter.
        family: Its map.
        cut: How many blocks are left out.
        cache: The states.
        pad_id: The token that fills.
        in_tuples: Whether a block gives a tuple.
    """

    model: nn.Module
    family: FamilyMap
    cut: int
    cache: TrunkCache
    pad_id: int
    in_tuples: bool

    def fill(self, rows: Sequence[Sequence[int]]) -> int:
        """Compute the states of rows that are not there yet.

        Args:
            rows: Tokens of each.

        Returns:
            How many were computed.
        """
        missing = {d: row for row in rows if (d := row_digest(row)) not in self.cache}
        by_length: dict[int, list[str]] = {}
        for digest, row in missing.items():
            by_length.setdefault(_width(len(row)), []).append(digest)
        for width, digests in sorted(by_length.items()):
            for start in range(0, len(digests), _ROWS):
                chosen = digests[start : start + _ROWS]
                states, _ = compute_states(
                    self.model, self.family, [missing[d] for d in chosen], self.cut, width=width, pad_id=self.pad_id
                )  # fmt: skip
                self.cache.add(zip(chosen, states, strict=True))
        return len(missing)

    @contextmanager
    def fed(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """A context in which a forward pass over a batch begins at the cut.

        Args:
            batch: Padded (with attention_mask, pads on the right) or packed (with position_ids), on any device.

        Yields:
            Nothing.
        """
        rows = rows_of(batch)
        self.fill(rows)
        found = [self.cache.read(row_digest(row)) for row in rows]
        device = batch["input_ids"].device
        if "attention_mask" in batch:
            hidden = torch.zeros(*batch["input_ids"].shape, self.cache.width, dtype=self.cache.dtype)
            for i, states in enumerate(found):
                hidden[i, : len(states)] = states
        else:
            hidden = torch.cat(found).unsqueeze(0)
        with self._standing(hidden.to(device)):
            yield

    @contextmanager
    def _standing(self, states: torch.Tensor) -> Iterator[None]:
        """A context in which the blocks below the cut do nothing and the last of them gives the states."""
        kept: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for number, path in enumerate(_paths(self.family)[: self.cut]):
                holder, _, name = path.rpartition(".")
                parent = self.model.get_submodule(holder)
                block: Any = parent._modules[name]
                kept.append((parent, name, block))
                given = states if number == self.cut - 1 else None
                parent._modules[name] = _Stand(block, given, in_tuple=self.in_tuples)
            yield
        finally:
            for parent, name, block in kept:
                parent._modules[name] = block


def rows_of(batch: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each row of a batch, without pads.

    Args:
        batch: Padded on the right, or packed.
    """
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    begins = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    tokens = ids[0].tolist()
    return [
        tokens[start:end] for start, end in zip(begins, [*begins[1:], len(tokens)], strict=True)
    ]  # fmt: skip


def canonical_tokens(lengths: Sequence[int]) -> int:
    """Tokens, pads counted, of the canonical batches that give the states of rows.

    Args:
        lengths: Tokens of each row.
    """
    widths = Counter(_width(length) for length in lengths)
    return sum(-(-rows // _ROWS) * _ROWS * width for width, rows in widths.items())


def _width(tokens: int) -> int:
    """What a row is padded to."""
    return -(-tokens // _STEP) * _STEP


@torch.no_grad()
def compute_states(
    model: nn.Module, family: FamilyMap, rows: Sequence[Sequence[int]], cut: int, *, width: int, pad_id: int
) -> tuple[list[torch.Tensor], bool]:
    """What the last block below the cut gives for rows, in the canonical shape.

    Args:
        model: The model; its mode is left as it is.
        family: Its map.
        rows: At most 16, tokens of each.
        cut: Blocks below the cut.
        width: Tokens that each is padded to.
        pad_id: The token that fills.

    Returns:
        (tokens, hidden) of each row, on the CPU; and whether the block gives a tuple.

    Raises:
        ModelError: The block gives more than hidden states, or is not reached.
    """
    device = next(model.parameters()).device
    ids = torch.full((_ROWS, width), pad_id)
    mask = torch.zeros((_ROWS, width), dtype=torch.long)
    for i in range(_ROWS):
        row = torch.tensor(rows[min(i, len(rows) - 1)])  # the last one fills
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    found: list[tuple[torch.Tensor, bool]] = []

    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        found.append((_only_hidden(output), isinstance(output, tuple)))
        raise _Reached

    block = model.get_submodule(_paths(family)[cut - 1])
    handle = block.register_forward_hook(keep)
    try:
        with suppress(_Reached):
            model(input_ids=ids.to(device), attention_mask=mask.to(device))
    finally:
        handle.remove()
    if not found:
        raise ModelError("the forward pass does not reach the cut")
    states, in_tuple = found[0]
    return [own[: len(row)].cpu() for own, row in zip(states, rows, strict=False)], in_tuple


def _only_hidden(output: Any) -> torch.Tensor:
    """The hidden states (batch, seq, hidden) of a block that gives nothing else, which later blocks might need."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and output and all(part is None for part in output[1:]):
        hidden: torch.Tensor = output[0]
        return hidden
    raise ModelError("its blocks give more than hidden states")


class _Stand(nn.Module):
    """Stands in the place of a block: gives what it reads, or the states that it was given.

    Args:
        block: The block; a model may read its attributes.
        states: What is given; None hands on what is read.
        in_tuple: Whether the block gives a tuple.
    """

    def __init__(self, block: nn.Module, states: torch.Tensor | None, *, in_tuple: bool) -> None:
        super().__init__()
        vars(self).update(
            block=block, states=states, in_tuple=in_tuple
        )  # not a part: its tensors are not listed

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """What the block would give, in its form.

        Args:
            hidden_states: What it reads.
            _: What else a block is given.
            __: What else a block is given.

        Returns:
            The states.
        """
        states = vars(self)["states"]
        given = hidden_states if states is None else states
        return (given,) if vars(self)["in_tuple"] else given


@dataclass(frozen=True, slots=True)
class CutTrial:
    """What a trial of a cut came to.

    Attributes:
        reason: Why the states below it cannot be kept; "" where they can.
        below: Names of the tensors that decide the states.
        width: Features of a state.
        in_tuples: Whether a block gives a tuple.
    """

    reason: str
    below: tuple[str, ...] = ()
    width: int = 0
    in_tuples: bool = False


def try_cut(
    model: nn.Module,
    family: FamilyMap,
    rows: Sequence[Sequence[int]],
    cut: int,
    active: Sequence[str],
    *,
    pad_id: int,
) -> CutTrial:
    """Whether the states below a cut can be kept.

    Args:
        model: The model with its adapter; tried in its training mode, which is left as it was.
        family: Its map.
        rows: A few rows of the run.
        cut: Blocks below the cut.
        active: Names of the tensors that train.
        pad_id: The token that fills.

    Returns:
        What was found.
    """
    width = _width(max(len(row) for row in rows))
    was_training = model.training
    model.train()
    tries: list[list[torch.Tensor]] = []
    in_tuples = False
    try:
        with torch.random.fork_rng(devices=[]), _calls(model) as ran:
            for number in range(2):
                torch.manual_seed(seed_for(number, "trunk"))
                states, in_tuples = compute_states(model, family, rows, cut, width=width, pad_id=pad_id)
                tries.append(states)
    except ModelError as error:
        return CutTrial(str(error))
    finally:
        model.train(was_training)
    named = [*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())]
    below = tuple(name for name in named if id(_owner(model, name)) in ran)
    trained = sorted(set(active) & set(below))
    if trained:
        return CutTrial(f"'{trained[0]}' trains and runs below the cut")
    if not all(torch.equal(one, other) for one, other in zip(*tries, strict=True)):
        return CutTrial("dropout acts below the lowest block that trains")
    return CutTrial("", below, tries[0][0].shape[-1], in_tuples)


def trunk_key(model: Any, below: Sequence[str], cut: int) -> str:
    """A hash of all that decides the states below a cut, the rows' tokens left aside.

    Args:
        model: The model with its adapter.
        below: Names of the tensors that decide the states.
        cut: Blocks below the cut.

    Returns:
        24 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=12)
    config: Any = getattr(model, "config", None)
    facts = {
        "class": type(model).__name__,
        "config": config.to_dict() if hasattr(config, "to_dict") else {},
        "attention": getattr(config, "_attn_implementation", ""),
        "cut": cut,
        "versions": [version(name) for name in ("torch", "transformers", "peft")],
        "threads": torch.get_num_threads(),
        "device": next(model.parameters()).device.type,
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name in below:
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _calls(model: nn.Module) -> Iterator[set[int]]:
    """A context that lists the modules of a model that run."""
    members, ran = {id(module) for module in model.modules()}, set[int]()

    def note(module: nn.Module, _: Any) -> None:
        if id(module) in members:
            ran.add(id(module))

    handle = register_module_forward_pre_hook(note)
    try:
        yield ran
    finally:
        handle.remove()


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that a tensor is a part of and that runs: a dict of parameters does not."""
    path = name.rpartition(".")[0]
    while isinstance(model.get_submodule(path), nn.ParameterDict | nn.ParameterList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def _paths(family: FamilyMap) -> list[str]:
    """The paths of the blocks of the only stack."""
    (stack,) = family.stacks
    return [block.path for block in family.blocks(stack)]


def cache_root() -> Path:
    """The folder of all trunk caches."""
    return cache_folder() / "trunk"
