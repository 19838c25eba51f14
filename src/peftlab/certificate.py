"""What has been proved about the parts of an architecture, as JSON that can be kept and shown.

A certificate belongs to a model class and a config, sizes aside: every size of Llama with the same switches has one
certificate. `mapping/proving.py` makes it by experiments on a tiny twin; nothing here touches torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 2
"""Of the file's form and of the experiments; another version is proved anew."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """What was proved about the blocks of one make: a model may have several (dense and sparse, local and global).

    Attributes:
        signature: The paths and classes of all modules in such a block, as one hash.
        parts: Path in the block to what it does: "mixer", "cross_mixer", "position_wise", "norm".
        roles: Path in the block to the role of a linear layer or parameter holder: "attention.query", "mlp.down".
        causal: Whether its mixers look back only; None where it has none.
        residual: Path of a mixer or position-wise part to what its output is: "branch" (the block adds it),
            "normed_branch" (normed, then added), "with_residual" (its input already added), "with_residual_and_norm",
            "unresolved".
        norms: "layernorm" (mean taken off), "rmsnorm", "mixed" or "none".
        evidence: How query, key and value were told apart: "interface" (seen where attention reads them) or
            "reach" (by where noise on them is felt).
        unproven: Paths of parts with linear layers whose purpose no experiment told, with the reason.
    """

    signature: str
    parts: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    causal: bool | None = None
    residual: Mapping[str, str] = field(default_factory=dict)
    norms: str = "none"
    evidence: str = ""
    unproven: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StackProof:
    """What was proved about one stack of blocks.

    Attributes:
        path: The list that holds the blocks, in the twin.
        layout: Axes of the hidden states: "bsh", "sbh" or "bhs".
        outputs: Whether each block's output is the model's own hidden state: "equal", "not run", or what differs.
        order: Which block makes each layer's output, where blocks run more than once in a pass (ALBERT's one block makes
            all); empty where every block runs once, in the order of the list.
        final_norm: Path of the norm that runs on the last block's output; None without one.
        kinds: The makes of blocks.
    """

    path: str
    layout: str = "bsh"
    outputs: str = "not run"
    order: tuple[int, ...] = ()
    final_norm: str | None = None
    kinds: tuple[BlockKind, ...] = ()

    def kind(self, signature: str) -> BlockKind | None:
        """The proof of one make of block; None where the twin had none of it."""
        return next((kind for kind in self.kinds if kind.signature == signature), None)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proved about one architecture.

    Attributes:
        model_class: The class of the model.
        model_type: The config's model type.
        versions: Library versions that the experiments ran on.
        stacks: One proof per stack.
        head: What the logits are: "equal" (the head's output), "scaled", "softcapped", "biased", "other", "none".
        problem: Why nothing could be proved; "" otherwise.
        seconds: What the experiments took.
    """

    model_class: str
    model_type: str
    versions: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[StackProof, ...] = ()
    head: str = "none"
    problem: str = ""
    seconds: float = 0.0

    def stack(self, path: str) -> StackProof | None:
        """The proof of the stack whose blocks lie at a path; None where there is none."""
        return next((stack for stack in self.stacks if stack.path == path), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Certificate:
        """Build from plain values.

        Args:
            values: As `to_json` gave them.

        Returns:
            The certificate.

        Raises:
            KeyError: A part is missing.
            TypeError: A part is of another form.
        """
        plain = {key: value for key, value in values.items() if key != "version"}
        stacks = tuple(
            StackProof(
                **{
                    **stack,
                    "order": tuple(stack["order"]),
                    "kinds": tuple(BlockKind(**kind) for kind in stack["kinds"]),
                }
            )
            for stack in plain.pop("stacks")
        )
        return cls(stacks=stacks, **plain)
