"""What comes out: block outputs against hidden states, the last norm, the head against the logits, residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlab.mapping.trace import Call, equal

_LAYOUTS = {"bsh": (0, 1, 2), "sbh": (1, 0, 2), "bhs": (0, 2, 1)}
"""Layout of a block's output to the permutation that makes it (batch, seq, hidden)."""


def hidden_states_of(output: Any) -> list[tuple[torch.Tensor, ...]]:
    """Every tuple of hidden states in a model's output: the encoder's, the decoder's, the only one.

    Args:
        output: A model output asked for hidden states.

    Returns:
        The tuples, those of tensors only.
    """
    found = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        value = getattr(output, name, None)
        if isinstance(value, tuple | list) and value and all(isinstance(t, torch.Tensor) for t in value):
            found.append(tuple(value))
    for name in ("text_model_output", "vision_model_output"):
        inner = getattr(output, name, None)
        found += hidden_states_of(inner) if inner is not None else []
    return found


def compare_outputs(
    outputs: Sequence[torch.Tensor | None],
    hidden: Sequence[tuple[torch.Tensor, ...]],
    behind: Sequence[torch.Tensor],
    *,
    num_stacks: int = 1,
) -> tuple[str, str]:
    """Whether block outputs are hidden states: `outputs[i] == hidden[i + 1]`.

    Args:
        outputs: The blocks' outputs in the order they ran.
        hidden: The tuples of hidden states to find them in.
        behind: What modules make of the last output (final norm, downsampling); transformers puts it into the place of
            the last hidden state of some models.
        num_stacks: Stacks in the model; some that see (Swin) give one state for each stack, not for each block.

    Returns:
        "equal" or what differs; and the layout of the outputs.
    """
    if not outputs or any(output is None for output in outputs):
        return "not run", "bsh"
    if not hidden:
        return "the model gives no hidden states", "bsh"
    best = "no tuple of hidden states has as many as there are blocks"
    for states in hidden:
        if len(states) not in (len(outputs) + 1, len(outputs)):
            continue
        for layout, axes in _LAYOUTS.items():
            given = [_permuted(output, axes) for output in outputs]
            if all(_matches(o, s) for o, s in zip(given, states[: len(given)], strict=True)):
                return "equal, without the embeddings before them", layout  # Mamba's
            wrong = [
                i
                for i, (o, s) in enumerate(zip(given, states[-len(given) :], strict=True))
                if not _matches(o, s)
            ]
            if wrong == [len(outputs) - 1] and any(equal(made, states[-1]) for made in behind):
                wrong = []
            if not wrong:
                return "equal", layout
            if layout == "bsh":
                best = f"output of layer {wrong[0]} is another tensor"
    for layout, axes in _LAYOUTS.items():
        ends = [states[1:] for states in hidden if len(states) == num_stacks + 1 > 2]
        given = [_permuted(outputs[-1], axes), *behind]
        if any(_matches(tensor, state) for states in ends for state in states for tensor in given):
            return "equal after the last block: the model gives one state for each stage", layout
    return best, "bsh"


def _matches(output: torch.Tensor | None, state: torch.Tensor) -> bool:
    """Whether an output is a state, or its rows laid out flat."""
    if output is not None and output.shape != state.shape and output.numel() == state.numel():
        output = output.reshape(state.shape)
    return equal(output, state)


def _permuted(tensor: torch.Tensor | None, axes: tuple[int, ...]) -> torch.Tensor | None:
    """A tensor with its axes in another order; as it is where it has not three."""
    return tensor.permute(axes) if tensor is not None and tensor.dim() == 3 else tensor


def find_final_norm(
    last: torch.Tensor | None, calls: Mapping[str, list[Call]], norms: Sequence[str]
) -> str | None:
    """The norm that runs on the last block's output.

    Args:
        last: That output.
        calls: All recorded calls.
        norms: Paths of what may be a norm outside the blocks.

    Returns:
        Its path; None without one.
    """
    for path in norms:
        runs = [call for call in calls.get(path, ()) if equal(call.hidden, last)]
        if runs and not equal(runs[0].result, last):
            return path
    return None


def compare_head(logits: torch.Tensor | None, head: torch.Tensor | None) -> str:
    """What the logits are, given what the head puts out.

    Args:
        logits: The model's logits; None where it has none.
        head: The output of the output embedding; None where there is none.

    Returns:
        "equal", "scaled", "softcapped", "biased", "other" or "none".
    """
    if logits is None or head is None:
        return "none"
    if head.shape != logits.shape:
        head = head[..., : logits.shape[-1]] if head.dim() == logits.dim() else head
        if head.shape != logits.shape:
            return "other"
    if equal(logits, head):
        return "equal"
    ratio = (logits * head).sum() / (head * head).sum()
    if equal(logits, head * ratio):
        return "scaled"
    difference = logits - head
    if equal(difference, difference[:1, :1].expand_as(difference), tolerance=1e-3):
        return "biased"
    for cap in (5.0, 10.0, 15.0, 20.0, 30.0, 50.0):
        if equal(logits, cap * torch.tanh(head / cap), tolerance=1e-3):
            return "softcapped"
    return "other"


def residual_of(
    path: str,
    block: nn.Module,
    block_call: Call,
    calls: Mapping[str, Call],
    parts: Sequence[str],
    norms: Sequence[str],
) -> str:
    """What a part's output is: the branch alone, or the stream with the branch in it.

    Args:
        path: A mixer or position-wise part, by path in the block.
        block: The block.
        block_call: Its recorded call.
        calls: Path in the block to a recorded call.
        parts: The mixers and position-wise parts in the order they ran.
        norms: The norms in the block.

    Returns:
        One of the kinds that `certificate.BlockKind.residual` lists.
    """
    own = calls[path]
    result, given = own.result, own.hidden
    if result is None:
        return "unresolved"
    leaves = [c.result for p, c in calls.items() if p.startswith(f"{path}.") and c.result is not None]
    if given is not None and given.shape == result.shape:
        if any(equal(result, given + leaf) for leaf in leaves if leaf.shape == result.shape):
            return "with_residual"
        sums = [given + leaf for leaf in leaves if leaf.shape == given.shape]
        inner = [calls[n] for n in norms if n.startswith(f"{path}.")]
        if any(equal(c.result, result) and any(equal(c.hidden, s) for s in sums) for c in inner):
            return "with_residual_and_norm"
    streams = [
        block_call.hidden,
        *(calls[n].hidden for n in norms),
        *(calls[p].result for p in parts if p != path),
    ]
    after = [block_call.result, *(calls[n].hidden for n in norms)]
    for stream in streams:
        if stream is None or stream.shape != result.shape:
            continue
        if any(equal(stream + result, later) for later in after):
            return "branch"
    for name in norms:
        if equal(calls[name].hidden, result):
            normed = calls[name].result
            pairs = [(s, t) for s in streams for t in after if s is not None and t is not None]
            if normed is not None and any(s.shape == normed.shape and equal(s + normed, t) for s, t in pairs):
                return "normed_branch"
    return _beside(result, block_call, calls, parts)


def _beside(result: torch.Tensor, block_call: Call, calls: Mapping[str, Call], parts: Sequence[str]) -> str:
    """A branch where the block adds all its parts at once (parallel attention and MLP), else unresolved."""
    results = [calls[p].result for p in parts]
    stream = block_call.hidden
    if stream is not None and all(r is not None and r.shape == stream.shape for r in results):
        total = stream + sum(r for r in results if r is not None)
        if equal(total, block_call.result):
            return "branch"
    return "unresolved"
