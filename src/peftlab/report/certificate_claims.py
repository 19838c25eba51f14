"""A certificate as claims: what was proved of an architecture by experiment, and what was not, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MIXERS = ("mixer", "cross_mixer")
_FUSED = {"qkv": {"query", "key", "value"}, "key_value": {"key", "value"}, "query_key": {"query", "key"}}
_EVIDENCE = {
    "interface": "seen where attention reads them",
    "reach": "by where noise on them is felt",
    "interface+reach": "seen where attention reads them, and by where noise on them is felt",
}
_RESIDUALS = {
    "branch": "added by the block",
    "normed_branch": "normed, then added by the block",
    "with_residual": "the part adds its own input",
    "with_residual_and_norm": "the part adds its own input, then norms",
}
_HEADS = {
    "equal": "equal to the head's output",
    "scaled": "the head's output times a constant",
    "softcapped": "the head's output, softly capped",
    "biased": "the head's output plus a bias",
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim.

    Attributes:
        text: What is claimed.
        where: Of which stack; "" for the whole model.
        proved: Whether it was proved.
        how: How, or why not.
    """

    text: str
    where: str
    proved: bool
    how: str


def claims_of(certificates: Sequence[Mapping[str, Any]], unproven: Mapping[str, str]) -> list[Claim]:
    """The claims of a model's certificates.

    Args:
        certificates: As JSON.
        unproven: Path of a linear layer to the reason why nothing is known of it.

    Returns:
        The claims in order.
    """
    found: list[Claim] = []
    for certificate in certificates:
        if certificate["problem"]:
            found.append(
                Claim("the roles of all parts", certificate["model_class"], False, certificate["problem"])
            )
            continue
        for stack in certificate["stacks"]:
            found += _stack_claims(stack)
        found += _head_claim(certificate["head"])
    if any(certificate["problem"] for certificate in certificates):
        return found
    if unproven:
        path, reason = next(iter(unproven.items()))
        more = f"{len(unproven):,} have not, such as {path}: {reason}"
        found.append(Claim("every linear layer of the blocks has a role", "", False, more))
    elif found:
        found.append(Claim("every linear layer of the blocks has a role", "", True, "none is left over"))
    return found


def _stack_claims(stack: Mapping[str, Any]) -> Iterator[Claim]:
    """The claims about one stack."""
    where, kinds = stack["path"], stack["kinds"]
    if not kinds:
        yield Claim("the roles of its parts", where, False, "it did not run in a forward pass of the twin")
        return
    outputs = stack["outputs"]
    equal = outputs.startswith("equal")
    yield Claim(
        "block outputs are the model's hidden states",
        where,
        equal,
        "equal to 1e-4" + outputs.removeprefix("equal") if equal else outputs,
    )
    mixing = [kind for kind in kinds if set(kind["parts"].values()) & {*_MIXERS, "position_wise"}]
    reasons = sorted({reason for kind in kinds for reason in kind["unproven"].values()})
    yield Claim(
        "what mixes tokens and what works on each alone", where, len(mixing) == len(kinds),
        "; ".join(reasons) or "by noise at one position, felt at others or not",
    )  # fmt: skip
    yield from _attention_claim(where, kinds)
    yield from _residual_claim(where, kinds)
    norm = stack["final_norm"]
    if norm:
        yield Claim("the norm behind the last block", where, True, norm)


def _attention_claim(where: str, kinds: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """Query, key, value and output."""
    wanted = {"query", "key", "value", "output"}
    missing: set[str] = set()
    evidence: set[str] = set()
    has_mixer = False
    for kind in kinds:
        for part, prefix in (("mixer", "attention"), ("cross_mixer", "cross_attention")):
            if part not in kind["parts"].values():
                continue
            has_mixer = True
            names = {r.rpartition(".")[2] for r in kind["roles"].values() if r.startswith(f"{prefix}.")}
            held = {role for name in names for role in _FUSED.get(name, {name})}
            missing |= {f"{prefix} {role}" for role in wanted - held}
        evidence |= {kind["evidence"]} - {""}
    if has_mixer:
        how = "; ".join(_EVIDENCE.get(e, e) for e in sorted(evidence)) or "by intervention"
        told = f"no layer was found to be {', '.join(sorted(missing))}" if missing else how
        yield Claim("which layers make query, key, value and output", where, not missing, told)


def _residual_claim(where: str, kinds: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """What the outputs of parts are."""
    unresolved = sorted({p for kind in kinds for p, what in kind["residual"].items() if what == "unresolved"})
    known = sorted(
        {_RESIDUALS.get(w, w) for kind in kinds for w in kind["residual"].values() if w != "unresolved"}
    )
    if unresolved or known:
        how = f"not for {', '.join(unresolved)}" if unresolved else "; ".join(known)
        yield Claim("how each part's output joins the stream", where, not unresolved, how)


def _head_claim(head: str) -> Iterator[Claim]:
    """What the logits are."""
    if head in _HEADS:
        yield Claim("what the logits are", "", True, _HEADS[head])
    elif head != "none":
        yield Claim("what the logits are", "", False, "another tensor than the head's output")
