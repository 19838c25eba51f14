"""Blocks in a live stack: put in, with the count of blocks, the lists beside it and the cache's indexes; taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftlab.insertion.new_blocks import make_plain
from peftlab.insertion.stack_facts import StackFacts, configs_of

_ABSENT = object()


class Insertion:
    """New blocks in one stack of a model; out of it at first.

    Args:
        core: The transformers model that holds the stack.
        path: Path of the list of blocks in it.
        facts: What follows the number of blocks.
        index: Where the first new block stands afterwards.
        blocks: The new blocks.

    Attributes:
        index: Where the first new block stands while they are in.
        blocks: The new blocks.
        is_in: Whether they are in the stack.
    """

    def __init__(
        self, core: nn.Module, path: str, facts: StackFacts, *, index: int, blocks: Sequence[nn.Module]
    ) -> None:
        found = core.get_submodule(path)
        assert isinstance(found, nn.ModuleList)
        self.index, self.blocks, self.is_in = index, tuple(blocks), False
        self._stack, self._names = found, facts.index_names
        self._depth = len(found)
        self._neighbour = neighbour_of(index)
        self._indexed = list(self._find_indexed())
        configs = configs_of(core)
        self._counts = [
            (configs[place], name)
            for place, names in facts.counts.items()
            for name in names
            if place in configs
        ]
        self._lists = [
            (configs[place], name)
            for place, names in facts.lists.items()
            for name in names
            if place in configs
        ]
        self._decoder = [(configs[""], facts.decoder_setting)] if facts.decoder_setting else []
        self._before: list[tuple[Any, str, Any]] = []

    def put_in(self) -> None:
        """Put the blocks into the stack, unless they are in it."""
        if self.is_in:
            return
        for offset, block in enumerate(self.blocks):
            self._stack.insert(self.index + offset, block)
            for module in block.modules():
                for name in self._names & vars(module).keys():
                    setattr(module, name, self.index + offset)
        count = len(self.blocks)
        for module, name, position in self._indexed:
            setattr(module, name, position + count * (position >= self.index))
        for config, name in self._counts:
            self._change(config, name, vars(config)[name] + count)
        for config, name in self._decoder:
            self._change(config, name, self._depth + count)
        for config, name in self._lists:
            entries = vars(config)[name]
            if entries is not None and len(entries) == self._depth:
                new = [entries[self._neighbour]] * count
                grown = [*entries[: self.index], *new, *entries[self.index :]]
                self._change(config, name, type(entries)(grown))
        self.is_in = True

    def take_out(self) -> None:
        """Take the blocks out: stack, indexes and configs are as they were."""
        if not self.is_in:
            return
        for _ in self.blocks:
            del self._stack[self.index]
        for module, name, position in self._indexed:
            setattr(module, name, position)
        for config, name, value in reversed(self._before):
            if value is _ABSENT:
                object.__delattr__(config, name)
            else:
                object.__setattr__(config, name, value)
        self._before = []
        self.is_in = False

    def stay(self) -> None:
        """Make the blocks that are in the stack the base's own: they can not be taken out any more."""
        own = [block for block in self._stack if all(block is not new for new in self.blocks)]
        for block in self.blocks:
            make_plain(block, own[self._neighbour])

    def _change(self, config: Any, name: str, value: Any) -> None:
        """Set an attribute past the config's own checks, which see it half changed."""
        self._before.append((config, name, vars(config).get(name, _ABSENT)))
        object.__setattr__(config, name, value)

    def _find_indexed(self) -> Iterator[tuple[nn.Module, str, int]]:
        """The modules of the base's blocks that know their block's index: (module, attribute, index)."""
        for position, block in enumerate(self._stack):
            for module in block.modules():
                for name in self._names & vars(module).keys():
                    if vars(module)[name] == position:
                        yield module, name, position


class OwnConfigs:
    """A model's own copies of its configs: the objects that it was made from may be another model's too.

    Args:
        core: A transformers model; from now on its modules refer to the copies.
    """

    def __init__(self, core: nn.Module) -> None:
        originals = list(configs_of(core).values())
        copies = copy.deepcopy(originals)  # at once, so that one inside another stays so
        known = {id(one): other for one, other in zip(originals, copies, strict=True)}
        self._places = [
            (module, name, value)
            for module in core.modules()
            for name, value in vars(module).items()
            if id(value) in known
        ]
        for module, name, value in self._places:
            setattr(module, name, known[id(value)])

    def give_back(self) -> None:
        """Let the model refer to the configs again that it was given with."""
        for module, name, value in self._places:
            setattr(module, name, value)


def neighbour_of(index: int) -> int:
    """The block that a new one at an index is a copy of: the one in front of it, the first for the first place.

    Args:
        index: Where the new block stands afterwards.

    Returns:
        Index of the neighbour in the base's stack.
    """
    return max(index - 1, 0)
