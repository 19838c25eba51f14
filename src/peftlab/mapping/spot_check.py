"""What was proved on a twin, looked at once more on the real weights in one small forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import nn

from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.mapping.certifying import complete_inputs
from peftlab.mapping.outputs import compare_head, compare_outputs, hidden_states_of
from peftlab.mapping.structure import output_head
from peftlab.mapping.trace import Call, first_tensor
from peftlab.mapping.twin import classifies_by_decoder, twin_inputs, with_end

_MOST_TOKENS = 64


def spot_check(model: Any, family: FamilyMap, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Compare block outputs with hidden states, and the head with the logits, on a model's own weights.

    Args:
        model: A transformers model, bare.
        family: Its map.
        inputs: A batch; its first row's first 64 tokens are used, labels are left out. None takes tokens by chance.

    Returns:
        What was found to hold, one sentence each; what the certificate does not claim is not looked at.

    Raises:
        ModelError: Something that was proved on the twin does not hold here.
    """
    if inputs is None:
        inputs = complete_inputs(model, twin_inputs(model))
    row = {
        name: value[:1, :_MOST_TOKENS]
        for name, value in inputs.items()
        if name != "labels" and value.dim() > 1
    }
    if classifies_by_decoder(model):
        row["input_ids"] = with_end(model, row["input_ids"])  # a long row was cut before its end
    elif getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in row:
        row["decoder_input_ids"] = inputs["input_ids"][:1, :8]
    calls, output = _run(model, family, row)
    found = [_check_stack(family, stack, calls, output) for stack in family.stacks if _claims(family, stack)]
    head = next((c.head for c in family.certificates if c.head == "equal"), None)
    if head and _logits_differ(model, calls, output):
        raise ModelError(_broken(family, "the logits are not the head's output"))
    return [*found, *(["the logits are the head's output"] if head else [])]


def _claims(family: FamilyMap, stack: str) -> bool:
    """Whether the certificate says that the stack's outputs are hidden states."""
    proof = family.proofs.get(stack)
    return proof is not None and proof.outputs == "equal"


def _run(model: nn.Module, family: FamilyMap, row: Mapping[str, Any]) -> tuple[dict[str, list[Call]], Any]:
    """One forward pass; the calls of blocks, final norms and head."""
    head = output_head(model)
    paths = {site.path for site in family.blocks()}
    paths |= {proof.final_norm for proof in family.proofs.values() if proof.final_norm}
    calls: dict[str, list[Call]] = {}
    turns = count()
    handles = []
    for path, module in model.named_modules():
        if path in paths or module is head:
            name = "head" if module is head else path
            handles.append(
                module.register_forward_hook(
                    lambda _, args, kwargs, out, name=name: calls.setdefault(name, []).append(
                        Call(args, kwargs, out, next(turns))
                    ),
                    with_kwargs=True,
                )
            )
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            output = model(
                **{k: v.to(device) for k, v in row.items()}, output_hidden_states=True, return_dict=True
            )
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _check_stack(family: FamilyMap, stack: str, calls: Mapping[str, list[Call]], output: Any) -> str:
    """Compare the outputs of one stack's blocks with the hidden states, in the order in which they were made."""
    made = [call for site in family.blocks(stack) for call in calls.get(site.path, ())]
    outputs = [call.result for call in sorted(made, key=lambda call: call.turn)]
    norms = calls.get(family.proofs[stack].final_norm or "", ())
    normed = [norm.result for norm in norms if norm.result is not None]
    if len(outputs) != family.num_outputs(stack):
        raise ModelError(
            _broken(family, f"{len(outputs)} blocks ran, not {family.num_outputs(stack)} ({stack})")
        )
    verdict, _ = compare_outputs(outputs, hidden_states_of(output), normed)
    if verdict != "equal":
        raise ModelError(_broken(family, f"{verdict} ({stack})"))
    return f"{stack}: the outputs of {len(outputs)} layers are the hidden states"


def _logits_differ(model: nn.Module, calls: Mapping[str, list[Call]], output: Any) -> bool:
    """Whether there are logits and a head that does not give them."""
    logits = getattr(output, "logits", None)
    if "head" not in calls or logits is None:
        return False
    return compare_head(logits.float(), _float(first_tensor(calls["head"][-1].output))) not in (
        "equal",
        "none",
    )


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _broken(family: FamilyMap, what: str) -> str:
    return (
        f"the map of this {family.model_type} model was proved on a tiny twin but does not hold on its weights: {what};"
        " is its code or config changed after loading?"
    )
