"""What the parts of a block do: which mix tokens, which work on each position alone, which are norms.

Experiment: change a part's input at one position. Where the result moves at other positions too, the part mixes tokens.
A part with vectors only whose result does not change when its input is three times as large is a norm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from peftlab.mapping.positions import Shape, depends_on_more, looks_across, reach
from peftlab.mapping.structure import is_vectors_only
from peftlab.mapping.trace import Call, equal, replay


@dataclass
class Parts:
    """The parts of one block, by path in the block.

    Attributes:
        kinds: Path to "mixer", "cross_mixer", "position_wise" or "norm".
        norms: The makes of its norms.
        causal: Whether its mixers look back only; None without mixers.
        unproven: Path to the reason why nothing is known.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    causal: bool | None = None
    unproven: dict[str, str] = field(default_factory=dict)

    def of(self, *kinds: str) -> list[str]:
        """The paths of some kinds of parts."""
        return [path for path, kind in self.kinds.items() if kind in kinds]


def find_parts(
    block: nn.Module,
    calls: Mapping[str, Call],
    shape: Shape,
    other_length: int | None,
    *,
    opened: Collection[str] = (),
) -> Parts:
    """Tell the parts of a block apart.

    Args:
        block: The block.
        calls: Path in the block to a recorded call.
        shape: Batch and length of the block's sequence.
        other_length: Length of the sequence that cross attention looks at; None where there is none.
        opened: Parts that are looked into instead, because they hold more than one.

    Returns:
        The parts.
    """
    found = Parts()
    for path, module in _candidates(block, opened):
        call = calls.get(path)
        if is_vectors_only(module) and call is not None and _is_norm(module, call):
            found.kinds[path] = "norm"
            found.norms.add(_norm_make(module, call))
        elif _holds_matrix(module) or (call is not None and _mixes(module, call, shape)):
            _place(found, path, module, call, shape, other_length)
        for inner, norm in _inner_norms(path, module, calls):
            found.kinds[inner] = "norm"
            found.norms.add(_norm_make(norm, calls[inner]))
    return found


def _mixes(module: nn.Module, call: Call, shape: Shape) -> bool:
    """Whether a module without matrices mixes tokens all the same (FNet's Fourier transform)."""
    far = reach(module, call, shape)
    return far is not None and far.elsewhere


def _place(
    found: Parts, path: str, module: nn.Module, call: Call | None, shape: Shape, other_length: int | None
) -> None:
    """Find out what one part with matrices does."""
    if call is None:
        found.unproven[path] = "it did not run"
        return
    far = reach(module, call, shape)
    if far is None:
        found.unproven[path] = "its input or output has no positions"
    elif far.elsewhere:
        found.kinds[path] = "mixer"
        found.causal = bool(found.causal in (None, True) and not far.earlier)
    elif other_length is not None and looks_across(module, call, shape, other_length):
        found.kinds[path] = "cross_mixer"
    elif depends_on_more(module, call, shape):
        found.unproven[path] = "its own input stays at its position, but another argument is felt elsewhere"
    elif far.here:
        found.kinds[path] = "position_wise"
    else:
        found.unproven[path] = "its result does not depend on its input"


def _candidates(block: nn.Module, opened: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """The children of a block; those of lists, of mere containers and of opened parts stand for these."""
    children = list(_children(block))
    while True:
        holders = [(path, m) for path, m in children if _holds_matrix(m)]
        grand = [inner for _, m in holders for _, inner in _children(m) if _holds_matrix(inner)]
        container = len(holders) == 1 and any(
            any(True for _ in inner.children()) for inner in grand
        )  # ALBERT's
        inside = [pair for pair in holders if container or pair[0] in opened]
        if not inside:
            break
        for path, outer in inside:
            children.remove((path, outer))
            children += [(f"{path}.{name}", child) for name, child in _children(outer)]
    yield from children


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children; the elements of a list count as children."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{key}", element) for key, element in _children(child))
        else:
            yield name, child


def _holds_matrix(module: nn.Module) -> bool:
    """Whether a module has a parameter of two or more axes."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _inner_norms(path: str, module: nn.Module, calls: Mapping[str, Call]) -> Iterator[tuple[str, nn.Module]]:
    """The norms inside a part (T5's and BERT's, and those on queries and keys)."""
    for name, inner in module.named_modules():
        full = f"{path}.{name}"
        if name and is_vectors_only(inner) and full in calls and _is_norm(inner, calls[full]):
            yield full, inner


def _is_norm(module: nn.Module, call: Call) -> bool:
    """Whether a module of vectors gives the same for an input three times as large."""
    hidden = call.hidden
    if hidden is None or call.result is None or equal(call.result, hidden):
        return False
    return equal(replay(module, call.with_tensor(hidden, 3 * hidden)), call.result, tolerance=1e-2)


def _norm_make(module: nn.Module, call: Call) -> str:
    """Whether a norm takes the mean off: a constant added to its input does not matter then."""
    hidden = call.hidden
    assert hidden is not None
    shifted = replay(module, call.with_tensor(hidden, hidden + hidden.std()))
    return "layernorm" if equal(shifted, call.result, tolerance=1e-2) else "rmsnorm"
