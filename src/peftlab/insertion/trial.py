"""A new block tried on a twin before the model is touched: is it the identity, does it learn, is the cache right.

Which way of making the identity a make of block allows is not read off a list: with the output projections at zero the
block's output must be its input, and with them at a thousandth the block must do about a thousandth of what it did (a
norm behind them would make it whole again, and its gradient a thousand times too large). Else the block is gated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftlab.certificate import StackProof
from peftlab.errors import MethodError
from peftlab.insertion.inserting import Insertion, neighbour_of
from peftlab.insertion.new_blocks import add_gate, copy_block, scale_outputs, stream_of
from peftlab.insertion.stack_facts import StackFacts, configs_of, learn_stack, small_config
from peftlab.mapping.certifying import complete_inputs
from peftlab.mapping.structure import block_lists, signature
from peftlab.mapping.trace import first_tensor
from peftlab.mapping.twin import build_twin, twin_inputs

Place = Literal["start", "inside", "end"]
OUTPUT_ROLES = ("attention.output", "cross_attention.output", "mlp.down")
"""Roles of the projections that end a branch."""

_SMALL, _NEARLY_LINEAR = 1e-3, 0.1
_IDENTITY = 1e-5
_NEW_TOKENS = 4
_known: dict[str, Trial] = {}


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial showed.

    Attributes:
        facts: What follows the number of blocks.
        gated: Whether the block needs a gate to begin as the identity.
    """

    facts: StackFacts
    gated: bool


def try_block(core: Any, proof: StackProof, *, mark: str, place: Place) -> Trial:
    """Put a new block into a twin of a model and look.

    Args:
        core: The transformers model, on any device; its class and config are read.
        proof: What was proved about the stack.
        mark: Signature of the block to copy.
        place: Where in the stack the new block stands.

    Returns:
        What it showed; the same question is not asked twice in a process.

    Raises:
        MethodError: The model does not take a block more, or answers wrongly with one; the message says how.
    """
    small = small_config(core)
    facts_of = [type(core).__module__, type(core).__qualname__, proof.path, mark, place]
    key = json.dumps([*facts_of, small.to_dict()], sort_keys=True, default=str)
    if key not in _known:
        with _plain_torch():
            _known[key] = _Twin(core, small, proof, mark, place).try_out()
    return _known[key]


class _Twin:
    """A twin and the place in it at which new blocks are tried."""

    def __init__(self, core: Any, small: Any, proof: StackProof, mark: str, place: Place) -> None:
        self.core, self.path = core, proof.path
        self.name = type(core).__name__
        kind = proof.kind(mark)
        self.outputs = [p for p, role in (kind.roles if kind else {}).items() if role in OUTPUT_ROLES]
        self.model: Any = build_twin(type(core), small)
        self.index: int = self._place(mark, place)
        self.inputs = complete_inputs(self.model, twin_inputs(self.model))

    def _place(self, mark: str, place: Place) -> int:
        """The index in the twin's stack that stands for a place in the model's."""
        marks = [signature(block) for block in block_lists(self.model)[self.path]]
        places: dict[Place, list[int]] = {
            "start": [0],
            "end": [len(marks)],
            "inside": [*range(1, len(marks)), len(marks)],
        }
        wanted = places[place]
        fitting = [index for index in wanted if marks[neighbour_of(index)] == mark]
        if not fitting:
            raise MethodError(
                f"no new block in {self.path} of {self.name}: its twin has no block of that make"
            )
        return fitting[0]

    def try_out(self) -> Trial:
        """All that is looked at; what goes wrong in the model's own code is the answer too."""
        facts = learn_stack(self.core, self.path)
        try:
            gated = not (self.outputs and self._is_identity_by_zeros(facts))
            self._check(facts, gated)
        except MethodError:
            raise
        except Exception as error:
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            raise MethodError(
                f"no new block in {self.path} of {self.name}: it does not run with a block more"
                f" ({type(error).__name__}: {said})"
            ) from error
        return Trial(facts, gated)

    def _is_identity_by_zeros(self, facts: StackFacts) -> bool:
        """Whether zeros in the output projections make the block the identity, and small values nearly so."""
        whole, nothing, little = (self._effect(facts, factor) for factor in (1.0, 0.0, _SMALL))
        return nothing <= _IDENTITY * whole and little <= _NEARLY_LINEAR * whole

    def _effect(self, facts: StackFacts, factor: float) -> float:
        """How much a block whose output projections are multiplied by a factor changes its stream."""
        block = self._new_block(facts)
        scale_outputs(block, self.outputs, factor)
        seen: list[float] = []

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stream, result = stream_of(module, args, kwargs), first_tensor(output)
            same = result is not None and result.shape == stream.shape
            seen.append(float((result - stream).abs().max()) if same else float("inf"))

        block.register_forward_hook(look, with_kwargs=True)
        with self._grown(facts, block):
            self._answer()
        self._require(bool(seen), "the forward pass does not run the block")
        return seen[0]

    def _new_block(self, facts: StackFacts, gate: float | None = None) -> nn.Module:
        """A copy of the neighbour on the twin."""
        block = block_lists(self.model)[self.path][neighbour_of(self.index)]
        shared = [path for path, _ in block.named_modules() if path in facts.only_some]
        made = copy_block(block, shared=shared, kept=configs_of(self.model).values())
        if gate is not None:
            add_gate(made, gate)
        return made

    @contextmanager
    def _grown(self, facts: StackFacts, *blocks: nn.Module) -> Iterator[None]:
        """The twin with blocks more."""
        insertion = Insertion(self.model, self.path, facts, index=self.index, blocks=blocks)
        insertion.put_in()
        try:
            yield
        finally:
            insertion.take_out()

    def _check(self, facts: StackFacts, gated: bool) -> None:
        """Refuse a model that answers wrongly with a new block in it."""
        before, generates = self._answer(), self._caches_rightly()
        start = self._new_block(facts, 0.0 if gated else None)
        if not gated:
            scale_outputs(start, self.outputs, 0.0)
        with self._grown(facts, start):
            self._require(
                _near(self._answer(), before), "the answers change although the block is the identity"
            )
        with self._grown(facts, start, self._new_block(facts, 0.5 if gated else None)):
            self._require(not _near(self._answer(), before), "a block that works makes no difference")
            right = not generates or self._caches_rightly(must_run=True)
            self._require(right, "what it generates with the cache is not what it generates without")
        self._require(torch.equal(self._answer(), before), "the base does not come back")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise MethodError(f"no new block in {self.path} of {self.name}: on a tiny twin {otherwise}")

    def _answer(self) -> torch.Tensor:
        """The first tensor that the twin gives for the inputs: its logits."""
        with torch.no_grad():
            found = first_tensor(self.model(**self.inputs))
        assert found is not None
        return found

    def _caches_rightly(self, *, must_run: bool = False) -> bool:
        """Whether the twin generates the same with its cache as without."""
        if not (hasattr(self.model, "can_generate") and self.model.can_generate()):
            return False
        try:
            cached, uncached = (self._generate(use_cache) for use_cache in (True, False))
        except Exception:
            if must_run:
                raise
            return False  # a model whose tiny twin cannot generate at all is not judged by it
        return torch.equal(cached, uncached)

    def _generate(self, use_cache: bool) -> torch.Tensor:
        """A few tokens, the likeliest each time."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: torch.Tensor = self.model.generate(
                **self.inputs,
                do_sample=False,
                num_beams=1,
                use_cache=use_cache,
                min_new_tokens=_NEW_TOKENS,
                max_new_tokens=_NEW_TOKENS,
                return_dict_in_generate=False,
            )
        return made


def _near(one: torch.Tensor, two: torch.Tensor) -> bool:
    return float((one - two).abs().max()) <= _IDENTITY * max(1.0, float(two.abs().max()))


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Float32 on the CPU without autocast, whatever the caller has set; the caller's random streams are left alone."""
    dtype = torch.get_default_dtype()
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
