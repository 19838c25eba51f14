"""Which linear layer of a mixer makes queries, keys, values, and which puts the result out.

Two experiments, each with noise on one layer's output at a time:

- *interface*: where attention goes through transformers' interface, look which of q, k, v it is given has changed;
- *reach*: elsewhere, look where noise at one position is felt before the output layer. A query is felt there alone; a
  value everywhere and in proportion; a key everywhere and not in proportion. It counts only if, with one value for all
  positions, noise on queries and keys is felt nowhere: rows of attention sum to one, recurrences do not.

A layer whose input already holds other positions' values puts out; one that changes neither q, k nor v is a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from peftlab.attention_interface import AttentionCall
from peftlab.mapping.positions import Shape
from peftlab.mapping.structure import widths
from peftlab.mapping.trace import Call, equal, first_tensor, noise_like, noise_on, replay
from peftlab.mapping.twin_sizes import EXPERTS

_NAMES = {
    frozenset("q"): "query",
    frozenset("k"): "key",
    frozenset("v"): "value",
    frozenset("qk"): "query_key",
    frozenset("kv"): "key_value",
    frozenset("qkv"): "qkv",
    frozenset("qv"): "qkv",
}
"""What a layer makes to the last part of its role."""


@dataclass(frozen=True)
class Bench:
    """A module on the bench: replayed with recorded arguments while its linear layers are watched.

    Attributes:
        module: The mixer or block.
        call: Its recorded call.
        layers: Name to linear layer, in the order they ran.
        seen: Filled by the observer of attention calls while the module runs.
    """

    module: nn.Module
    call: Call
    layers: Mapping[str, nn.Module]
    seen: list[AttentionCall]

    def run(self) -> tuple[torch.Tensor | None, list[AttentionCall], dict[str, torch.Tensor]]:
        """Replay once.

        Returns:
            The result, the attention calls, and each layer's input.
        """
        inputs: dict[str, torch.Tensor] = {}
        self.seen.clear()
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_pre_hook(
                    lambda _, args, name=name: inputs.__setitem__(name, args[0])
                )
                stack.callback(handle.remove)
            result = replay(self.module, self.call)
        return result, list(self.seen), inputs


def attribute_mixer(bench: Bench, shape: Shape, other: Shape | None = None) -> tuple[dict[str, str], str]:
    """Name the linear layers of a mixer.

    Args:
        bench: The mixer.
        shape: Batch and length of its sequence.
        other: Batch and length of the sequence that it looks at; None where that is its own.

    Returns:
        Layer to the last part of its role (query, key, value, qkv, key_value, output, gate, linear, or "behind" where it
        belongs to something that follows the mixer); and the evidence: "interface", "reach" or "".
    """
    result, calls, inputs = bench.run()
    names = [name for name in bench.layers if name in inputs]
    if calls:
        made = {name: _made(bench, name, calls) for name in names}
        evidence = "interface"
    else:
        made = _made_by_reach(bench, names, inputs, shape, other)
        evidence = "reach" if made else ""
    roles = {name: _NAMES[frozenset(kinds)] for name, kinds in made.items() if frozenset(kinds) in _NAMES}
    sources = [name for name, kinds in made.items() if "v" in kinds]
    mixed = {name for name in names if _input_is_mixed(bench, name, inputs, shape, other)}
    for name in names:
        if name not in roles:
            found = _role_behind(bench, name, sources, result, inputs)
            alone = (
                found == "output" and mixed and name not in mixed
            )  # made from a value, before the mixing (Doge)
            roles[name] = "gate" if alone else found
    return roles | dict.fromkeys(_behind(bench, roles), "behind"), evidence


def _behind(bench: Bench, roles: Mapping[str, str]) -> set[str]:
    """The layers fed by an output layer with more than its output: they belong to what follows the mixer."""
    outputs = [name for name, role in roles.items() if role == "output"]
    _, _, quiet = bench.run()
    found = set()
    for name in outputs:
        with noise_on(bench.layers[name]):
            _, _, noisy = bench.run()
        put_out = replay_layer(bench, name)
        fed = [other for other in outputs if other != name and not equal(noisy[other], quiet[other])]
        found |= {other for other in fed if not _same_values(quiet[other], put_out)}
    return found


def _same_values(given: torch.Tensor, put_out: torch.Tensor | None) -> bool:
    """Whether a layer is given just what another puts out (two factors of one output layer), whatever the shape."""
    return (
        put_out is not None
        and given.numel() == put_out.numel()
        and equal(given.reshape(put_out.shape), put_out)
    )


def _made(bench: Bench, name: str, calls: Sequence[AttentionCall]) -> set[str]:
    """Which of q, k, v change with noise on a layer."""
    with noise_on(bench.layers[name]):
        _, noisy, _ = bench.run()
    if len(noisy) != len(calls):
        return set()
    changed = set()
    for before, after in zip(calls, noisy, strict=True):
        pairs = {
            "q": (before.query, after.query),
            "k": (before.key, after.key),
            "v": (before.value, after.value),
        }
        changed |= {letter for letter, pair in pairs.items() if not equal(*pair)}
    return changed


def _role_behind(
    bench: Bench,
    name: str,
    sources: Sequence[str],
    result: torch.Tensor | None,
    inputs: Mapping[str, torch.Tensor],
) -> str:
    """The role of a layer that makes neither queries, keys nor values."""
    with noise_on(bench.layers[name]):
        noisy, _, _ = bench.run()
    if equal(noisy, result):
        return "unused"
    for source in sources:
        with noise_on(bench.layers[source]):
            _, _, moved = bench.run()
        if name in moved and not equal(moved[name], inputs[name]):
            return "output"
    return "gate" if sources else "linear"


def _made_by_reach(
    bench: Bench,
    names: Sequence[str],
    inputs: Mapping[str, torch.Tensor],
    shape: Shape,
    other: Shape | None,
) -> dict[str, set[str]]:
    """Which of q, k, v each layer makes, by where noise on it is felt; empty where it is no attention."""
    before = [name for name in names if not _input_is_mixed(bench, name, inputs, shape, other)]
    after = [name for name in names if name not in before]
    feel = _feeler(bench, after)
    made: dict[str, set[str]] = {}
    parts: dict[str, dict[str, list[int]]] = {}
    for name in before:
        parts[name] = _parts_of(bench, name, feel, shape, other)
        made[name] = set(parts[name])
    if not {"q", "k", "v"} <= set().union(*made.values(), set()):
        return {}
    return made if _is_attention(bench, parts, feel, shape) else {}


def _input_is_mixed(
    bench: Bench, name: str, inputs: Mapping[str, torch.Tensor], shape: Shape, other: Shape | None
) -> bool:
    """Whether a layer's input at a position holds other positions, of the own sequence or of the one looked at."""
    position = shape.length // 2
    if shape.index(inputs[name], position) is None:
        return False
    for tensor in bench.call.tensors():
        own = tensor is bench.call.hidden
        sequence = shape if own else other
        if sequence is None or not tensor.is_floating_point():
            continue
        place = sequence.index(tensor, sequence.length // 2)
        if place is None:
            continue
        changed = tensor + noise_like(tensor, at=place)  # a constant would be taken off again by a norm
        moved = Bench(bench.module, bench.call.with_tensor(tensor, changed), bench.layers, bench.seen).run()[
            2
        ]
        felt = shape.moved(inputs[name], moved[name]) if name in moved else []
        if any([*felt[:position], *felt[position + 1 :]] if own else felt):
            return True
    return False


Feeler = Callable[[], torch.Tensor | None]


def _feeler(bench: Bench, after: Sequence[str]) -> Feeler:
    """What is looked at while noise is added: the input of the first layer behind the mixing, else the result."""

    def feel() -> torch.Tensor | None:
        result, _, inputs = bench.run()
        return inputs.get(after[0]) if after else result

    return feel


def _parts_of(
    bench: Bench, name: str, feel: Feeler, shape: Shape, other: Shape | None
) -> dict[str, list[int]]:
    """The output features of a layer that make queries, keys and values."""
    layer, position = bench.layers[name], shape.length // 2
    whole = first_tensor(replay_layer(bench, name))
    quiet = feel()
    found: dict[str, list[int]] = {}
    if whole is None or quiet is None:
        return found
    place = shape.index(whole, position)
    abroad = (
        place is None and other is not None
    )  # it works on the sequence looked at: what it makes is felt anywhere
    if abroad and other is not None:
        place = other.index(whole, other.length // 2)
    if place is None:
        return found
    for feature in range(whole.shape[-1]):
        at = (*place[:2], feature)
        with noise_on(layer, scale=3.0, at=at, like=whole.shape):
            one = feel()
        with noise_on(layer, scale=6.0, at=at, like=whole.shape):
            two = feel()
        if one is None or two is None:
            return {}
        felt = shape.moved(quiet, two, tolerance=1e-6)
        if not any(felt):
            continue
        elsewhere = abroad or any(felt[:position]) or any(felt[position + 1 :])
        in_proportion = equal(two - quiet, 2 * (one - quiet), tolerance=1e-3)
        found.setdefault("q" if not elsewhere else "v" if in_proportion else "k", []).append(feature)
    felt_in_all = sum(map(len, found.values()))
    return {kind: features for kind, features in found.items() if 8 * len(features) >= felt_in_all}


def replay_layer(bench: Bench, name: str) -> torch.Tensor | None:
    """A layer's output in a replay.

    Args:
        bench: The module it lies in.
        name: The layer.

    Returns:
        Its output.
    """
    outputs: list[torch.Tensor] = []
    handle = bench.layers[name].register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        replay(bench.module, bench.call)
    finally:
        handle.remove()
    return outputs[0] if outputs else None


def _is_attention(
    bench: Bench, parts: Mapping[str, Mapping[str, list[int]]], feel: Feeler, shape: Shape
) -> bool:
    """Whether, with one value at every position, noise on queries and keys is felt nowhere."""
    with ExitStack() as stack:
        for name, kinds in parts.items():
            if "v" in kinds:
                stack.enter_context(_one_value(bench.layers[name], kinds["v"], shape))
        quiet = feel()
        for name, kinds in parts.items():
            others = [*kinds.get("q", ()), *kinds.get("k", ())]
            if others:
                stack.enter_context(noise_on(bench.layers[name], at=(..., others)))
        return equal(feel(), quiet, tolerance=1e-3)


@contextmanager
def _one_value(layer: nn.Module, features: list[int], shape: Shape) -> Iterator[None]:
    """Give some output features of a layer their first position's value everywhere."""

    def hook(_: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        axis = 1 if output.shape[0] == shape.batch else 0
        changed[..., features] = output.narrow(axis, 0, 1)[..., features].expand_as(output[..., features])
        return changed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def attribute_mlp(bench: Bench) -> dict[str, str]:
    """Name the linear layers of a position-wise part.

    Args:
        bench: The part, or the block where its layers stand in the block itself.

    Returns:
        Layer to the last part of its role: gate, up, gate_up, down, router (as narrow as there are experts), or linear
        where the experiment does not tell.
    """
    _, _, inputs = bench.run()
    names = [name for name in bench.layers if name in inputs]
    fed: dict[str, list[str]] = {}
    for name in names:
        with noise_on(bench.layers[name]):
            _, _, moved = bench.run()
        fed[name] = [n for n in names if n != name and n in moved and not equal(moved[n], inputs[n])]
    second = {name for targets in fed.values() for name in targets}
    routers = {name for name in names if _width(bench.layers[name]) <= EXPERTS}
    roles = dict.fromkeys(names, "linear") | dict.fromkeys(second, "down") | dict.fromkeys(routers, "router")
    first = [name for name in names if name not in second | routers and fed[name]]
    straight = {name: _in_proportion(bench, name, fed[name][0]) for name in first}
    for name in first:
        target = bench.layers[fed[name][0]]
        partners = [other for other in first if fed[other] == fed[name]]
        if len(partners) == 1:
            roles[name] = "gate_up" if _width(bench.layers[name]) == 2 * _width(target, given=True) else "up"
        elif straight[name]:
            roles[name] = "up"
        else:
            roles[name] = "gate" if any(straight[other] for other in partners) else "linear"
    return roles


def _in_proportion(bench: Bench, name: str, target: str) -> bool:
    """Whether twice the noise on a layer moves another's input twice as far."""
    quiet = bench.run()[2][target]
    moved = []
    for scale in (0.5, 1.0):
        with noise_on(bench.layers[name], scale=scale):
            moved.append(bench.run()[2][target] - quiet)
    return equal(moved[1], 2 * moved[0], tolerance=1e-3)


def _width(layer: nn.Module, *, given: bool = False) -> int:
    """Output width of a linear layer, or the width it is given."""
    return widths(layer)[0 if given else 1]
