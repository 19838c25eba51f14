"""Virtual tokens in front of what a plain module reads, where its structure allows it.

A module with one `nn.Embedding` of ids (batch, seq) gets them between the embedding and all that follows, in every call of
the module; its positions are taken out of the output again. The embedding itself, called on its own, gives what it gave. A
mask given to nn.MultiheadAttention is made longer: the text sees the virtual tokens beside what it saw, the virtual tokens
see each other. nn.TransformerEncoderLayer reads (seq, batch, features) unless it is built with `batch_first=True`; then the
virtual tokens stand along the first dimension.

One call with made-up ids shows at once that the module still runs, that its output has its shape, and that gradients reach
the virtual tokens; modules that take more than ids are taken at their word.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftlab.efficient.embeddings import PTuningEmbedding
from peftlab.efficient.targets import Undo, leave_shortcuts
from peftlab.errors import MethodError

BY_HAND = """wire them by hand:
    manager.apply_ptuning(num_virtual_tokens=..., embedding_dimension=..., by_hand=True)
    # where the module has its embeddings, (batch, seq, features):
    virtual_tokens = manager.ptuning_embeddings(embeddings.size(0))
    embeddings = torch.cat([virtual_tokens, embeddings], dim=1)
    # masks grow by as many positions; outputs lose them again: output[:, virtual_tokens.size(1):]"""
"""What a person has to write where it cannot be done for them."""
_PROBE = (2, 5)
_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What a module that does not take the probe's ids, or no longer fits together, raises."""


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The only embedding of a plain module.

    Args:
        model: The module.

    Returns:
        The embedding.

    Raises:
        MethodError: There is none or more than one; says what to write.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if len(found) != 1:
        told = f"embeddings {', '.join(found)}" if found else "no nn.Embedding"
        raise MethodError(
            f"{type(model).__name__} has {told}: where virtual tokens belong is not plain; {BY_HAND}"
        )
    return next(iter(found.values()))


class PlainTokens:
    """Virtual tokens in every call of a plain module.

    Args:
        model: The module.
        tokens: What makes the virtual tokens.

    Attributes:
        undo: What to remove to have the module as it was.

    Raises:
        MethodError: Its structure does not allow it; says what to write.
    """

    def __init__(self, model: nn.Module, tokens: PTuningEmbedding) -> None:
        self._tokens, self._count = tokens, tokens.num_virtual_tokens
        embedding = embedding_of(model)
        self._axis = _sequence_axis(model)
        self._inside, self._length = False, 0
        expected = _answer(model, embedding)
        attentions = {path: m for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
        self.undo: list[Undo] = [
            model.register_forward_pre_hook(self._enter),
            embedding.register_forward_hook(self._put_in_front),
            model.register_forward_hook(self._leave, always_call=True),
            *(
                m.register_forward_pre_hook(self._lengthen_masks, with_kwargs=True)
                for m in attentions.values()
            ),
            *leave_shortcuts(model, list(attentions)),
        ]
        try:
            if expected is not None:
                self._show(model, embedding, expected)
        except MethodError:
            for change in reversed(self.undo):
                change.remove()
            raise

    def _enter(self, module: nn.Module, args: Any) -> None:
        """The module is called: from here on its embedding is followed by virtual tokens."""
        self._inside, self._length = True, 0

    def _put_in_front(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Embeddings with the virtual tokens in front."""
        if not self._inside:
            return None
        if output.dim() != 3 or self._length:
            why = (
                f"has an output of {tuple(output.shape)}"
                if output.dim() != 3
                else "is called twice in one call"
            )
            raise MethodError(
                f"the embedding {why}: virtual tokens need (batch, seq, features), once; {BY_HAND}"
            )
        made = self._tokens(output.shape[1 - self._axis]).to(output.device, output.dtype)
        longer = torch.cat([made if self._axis == 1 else made.transpose(0, 1), output], dim=self._axis)
        self._length = longer.shape[self._axis]
        return longer

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take the virtual positions out of the output."""
        self._inside = False
        return _map_tensors(output, self._cut) if self._length and output is not None else None

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """One output without the virtual positions: those with features behind a dimension of their length."""
        if tensor.dim() < 3 or tensor.shape[self._axis] != self._length:
            return tensor
        return tensor.narrow(self._axis, self._count, self._length - self._count)

    def _lengthen_masks(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Masks made for the text alone, made longer; self-attention over the longer text only."""
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        axis = 1 if getattr(module, "batch_first", False) else 0
        text = self._length - self._count
        if not self._length or given["key"].dim() != 3 or given["key"].shape[axis] != self._length:
            return None
        padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
        if padding is not None and padding.shape[-1] == text:
            given["key_padding_mask"] = nn.functional.pad(padding, (self._count, 0))  # 0 and False: seen
        if mask is not None and mask.shape[-1] == text:
            rows = self._count if mask.shape[-2] == text and given["query"].shape[axis] == self._length else 0
            longer = nn.functional.pad(mask, (self._count, 0, rows, 0))
            longer[..., :rows, self._count :] = True if mask.dtype == torch.bool else float("-inf")
            given["attn_mask"], given["is_causal"] = longer, False
        return (), given

    def _show(self, model: nn.Module, embedding: nn.Embedding, expected: list[torch.Tensor]) -> None:
        """Call the module once and see that all is as it should be.

        Raises:
            MethodError: It is not; says what to write.
        """
        problem: list[str] = []
        found = _answer(model, embedding, problem.append)
        name = type(model).__name__
        if found is None:
            raise MethodError(f"{name} does not run with virtual tokens in front ({problem[0]}); {BY_HAND}")
        if [t.shape for t in found] != [t.shape for t in expected]:
            shapes = f"{[tuple(t.shape) for t in expected]} became {[tuple(t.shape) for t in found]}"
            raise MethodError(f"virtual tokens change the shape of what {name} puts out: {shapes}; {BY_HAND}")
        source = torch.Generator().manual_seed(0)
        scored = [(t * torch.randn(t.shape, generator=source).to(t)).sum() for t in found if t.requires_grad]
        virtual = self._tokens.virtual_embeddings
        gradient = (
            torch.autograd.grad(torch.stack(scored).sum(), virtual, allow_unused=True)[0] if scored else None
        )
        if gradient is None or not bool((gradient != 0).any()):
            raise MethodError(f"virtual tokens have no effect on what {name} puts out; {BY_HAND}")


def _sequence_axis(model: nn.Module) -> int:
    """The dimension along which a plain module's sequence lies.

    Raises:
        MethodError: Its parts disagree.
    """
    readers = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
    orders = {bool(module.batch_first) for module in readers}
    if len(orders) > 1:
        raise MethodError(f"parts of {type(model).__name__} read batch first, others do not; {BY_HAND}")
    if orders == {False}:
        warnings.warn(
            f"{type(model).__name__} has layers with batch_first=False: they read (seq, batch, features), and the virtual"
            " tokens stand along the first dimension; if its ids are (batch, seq), its attention mixes the rows of a batch,"
            " and it should be built with batch_first=True",
            stacklevel=5,
        )
        return 0
    return 1


def _answer(
    model: nn.Module, embedding: nn.Embedding, tell: Callable[[str], None] = lambda _: None
) -> list[torch.Tensor] | None:
    """What a module puts out for made-up ids, in evaluation mode, with every random stream as it was.

    Args:
        model: The module.
        embedding: Its embedding.
        tell: Hears what went wrong.

    Returns:
        The tensors it puts out; None where it needs more than ids, or does not take these.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    device = embedding.weight.device
    if len(needed) != 1 or device.type == "meta":
        return None
    ids = torch.arange(_PROBE[0] * _PROBE[1], device=device).view(_PROBE) % embedding.num_embeddings
    modes = {module: module.training for module in model.modules()}
    devices = [device.index or 0] if device.type == "cuda" else []
    found: list[torch.Tensor] = []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            _map_tensors(model.eval()(ids), lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    except MethodError:
        raise
    except _FAULTS as error:
        tell(f"{type(error).__name__}: {error}")
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or tensors in tuples, lists and dicts, each changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({key: _map_tensors(part, change) for key, part in value.items()})
    if isinstance(value, tuple | list):
        parts = [_map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
