"""Adapted layers of a joint pass: the base's product once for all runs, then peft's own layer for each run's part.

For each run there is a view of peft's layer: the same layer with this run's adapter alone, and with a base layer that
answers with what the shared product gave for the run's part. So peft's own formula, dropout and variants (DoRA) compute all
the rest. A layer's class is exchanged for a subclass, as `attaching.wide_copies` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peftlab.errors import MethodError
from peftlab.joint.blocks import BlockLayer, Blocks, can_be_block
from peftlab.joint.shares import Shares, whole_share
from peftlab.joint.streams import DividedDraws

_ROOM, _VIEWS, _BLOCKS, _KIND = "_joint_room", "_joint_views", "_joint_blocks", "_joint_kind"


class Room:
    """What the layers of one base look at: whose the rows of the pass are.

    Attributes:
        shares: Which part of the batch is whose; None leaves peft's layers as they are.
        draws: Each run's random draws; None where nothing is drawn.
        blocks: Whose the entries of h are; None where the pass is one run's.
    """

    def __init__(self) -> None:
        self.shares: Shares | None = None
        self.draws: DividedDraws | None = None
        self.blocks: Blocks | None = None

    @contextmanager
    def entered(self, shares: Shares, draws: DividedDraws | None = None) -> Iterator[None]:
        """A context for one pass.

        Args:
            shares: Which part of the batch is whose.
            draws: Each run's random draws; None where nothing is drawn.
        """
        before = self.shares, self.draws, self.blocks
        self.shares, self.draws = shares, draws
        self.blocks = None if shares.is_whole else Blocks(shares)
        try:
            with nullcontext() if draws is None else draws:
                yield
        finally:
            self.shares, self.draws, self.blocks = before

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A context in which the model has one run's adapter.

        Args:
            name: The run.
        """
        with self.entered(whole_share(name)):
            yield


def share_layers(model: nn.Module, names: Sequence[str], room: Room) -> dict[str, nn.ModuleList]:
    """Have the adapted layers of a model compute jointly.

    Args:
        model: peft's model with all adapters on it.
        names: The adapters.
        room: What the layers shall look at.

    Returns:
        Adapter to its views, for whoever looks for its dropout.

    Raises:
        MethodError: A layer of peft is of a kind that cannot be shared.
    """
    found: dict[str, nn.ModuleList] = {name: nn.ModuleList() for name in names}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        own = [name for name in names if name in module.lora_A]
        if not own or not hasattr(module.get_base_layer(), "weight"):
            raise MethodError(f"{type(module).__name__} of peft ({path}) cannot be shared by several runs")
        views = {name: _view(module, name) for name in own}
        for name, view in views.items():
            found[name].append(view)
        vars(module)[_ROOM], vars(module)[_VIEWS] = room, views
        vars(module)[_BLOCKS] = _block_layer(module, views, room)
        kind: Any = type(module)
        module.__class__ = _shared_layer(kind)
    return found


def part_layers(model: nn.Module) -> None:
    """Make layers plain layers of peft again.

    Args:
        model: A model whose layers compute jointly; where there are none, nothing changes.
    """
    for module in model.modules():
        if vars(module).pop(_VIEWS, None) is not None:
            del vars(module)[_ROOM], vars(module)[_BLOCKS]
            module.__class__ = getattr(type(module), _KIND)


class _Answer(nn.Module):
    """Stands in for a base layer whose answer is known; everything else is the layer's."""

    answer: torch.Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self)["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """What the shared product gave."""
        answer: torch.Tensor = vars(self).pop("answer")
        return answer


def _view(layer: Any, name: str) -> nn.Module:
    """Peft's layer with one of its adapters, which shares all tensors with it."""
    kind: Any = type(layer)
    view: nn.Module = kind.__new__(kind)
    vars(view).update(vars(layer))
    modules: dict[str, Any] = dict(layer._modules)
    for key, parts in layer._modules.items():
        if isinstance(parts, nn.ModuleDict | nn.ParameterDict):
            modules[key] = type(parts)({n: part for n, part in parts.items() if n == name})
    modules["base_layer"] = _Answer(layer.base_layer)
    vars(view).update(_modules=modules, _active_adapter=[name])
    return view


def _draws(view: Any, name: str) -> bool:
    """Whether a view's dropout drops now."""
    dropout = view.lora_dropout[name]
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _block_layer(layer: Any, views: Mapping[str, nn.Module], room: Room) -> BlockLayer | None:
    """The layer with the runs' adapters as blocks of one; None where fewer than two can be."""
    names = [name for name in views if can_be_block(layer, name)]
    if len(names) < 2:
        return None

    def drop(x: torch.Tensor, now: Sequence[str]) -> torch.Tensor:
        shares, draws = room.shares, room.draws
        if shares is None or draws is None or not any(_draws(views[name], name) for name in now):
            return x
        pieces = shares.split(x)
        for number, name in enumerate(shares.names):
            if name in now and _draws(views[name], name):
                with draws.of(name):
                    pieces[number] = layer.lora_dropout[name](pieces[number])
        return shares.merge(pieces, x)

    return BlockLayer(layer, names, drop)


@cache
def _shared_layer(kind: Any) -> type[nn.Module]:
    """A subclass of a layer of peft that computes its base once for all runs."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        room, views = vars(self)[_ROOM], vars(self)[_VIEWS]
        shares = room.shares
        if shares is None or self.disable_adapters or self.merged:
            whole: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return whole
        layer, blocks = vars(self)[_BLOCKS], room.blocks
        together = [name for name in shares.names if layer is not None and name in layer.names]
        if blocks is None or layer is None or not layer.fits(together, x):
            together = []
        result = (
            layer(blocks, together, x, *args, **kwargs) if together else self.base_layer(x, *args, **kwargs)
        )
        if not any(name in views and name not in together for name in shares.names):
            return result  # type: ignore[no-any-return]
        done = []
        for name, inputs, answer in zip(shares.names, shares.split(x), shares.split(result), strict=True):
            view = views.get(name)
            if view is None or name in together:
                done.append(answer)
                continue
            vars(view)["training"] = self.training  # DoRA asks
            vars(view.base_layer)["answer"] = answer
            drawing = room.draws is not None and _draws(view, name)
            with room.draws.of(name) if drawing else nullcontext():
                done.append(kind.forward(view, inputs, *args, **kwargs))
        merged: torch.Tensor = shares.merge(done, result)
        return merged

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, _KIND: kind})
