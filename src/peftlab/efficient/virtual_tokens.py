"""Virtual tokens in front of what a transformers model reads, on the person's own model object.

Every call of the model gets `num_virtual_tokens` places in front of its text: ids that stand for nothing, whose embeddings
are then exchanged for the virtual tokens, ones in the attention mask, -100 in the labels, moved positions. The places are
taken out of the logits again, so that a training loop meets the shapes it had. An encoder-decoder has them in front of its
encoder's text, and its decoder looks at them. Generating works: in later steps they are in the cache.

Source: Liu et al. 2021, arXiv 2103.10385, section 3; what is extended is what peft's `PeftModelForCausalLM` extends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftlab.efficient.embeddings import PTuningEmbedding
from peftlab.efficient.targets import Undo
from peftlab.efficient.text_inputs import (
    TEXT_LIKE,
    NamedArguments,
    cached_tokens,
    in_front,
    longer_mask,
    shifted_positions,
    text_shape,
)
from peftlab.errors import MethodError

_ENDS = ("start_positions", "end_positions")
_PER_TOKEN_OF_TWO = ("start_logits", "end_logits")


def embedding_of(model: nn.Module) -> nn.Module:
    """What makes embeddings of a transformers model's ids.

    Args:
        model: The model.

    Returns:
        The module.

    Raises:
        MethodError: The model reads no text.
    """
    reader: Any = _reader(model)
    made = getattr(reader, "get_input_embeddings", lambda: None)()
    if getattr(model, "main_input_name", "") != "input_ids" or not isinstance(made, nn.Module):
        raise MethodError(f"virtual tokens stand in front of a text, and {type(model).__name__} reads none")
    return made


def _reader(model: Any) -> nn.Module:
    """The part that reads the text: the encoder of an encoder-decoder, else the model."""
    part: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model
    return part


class TextTokens:
    """Virtual tokens in every call of a transformers model.

    Args:
        model: The model.
        tokens: What makes the virtual tokens.

    Attributes:
        undo: What to remove to have the model as it was.

    Raises:
        MethodError: The model reads no text.
    """

    def __init__(self, model: nn.Module, tokens: PTuningEmbedding) -> None:
        self._tokens, self._count = tokens, tokens.num_virtual_tokens
        embedding, reader = embedding_of(model), _reader(model)
        self._stand_in = _unremarkable_id(model)
        self._named, self._whole = NamedArguments(reader), NamedArguments(model)
        self._waiting = self._missed = False  # ids wait for their virtual tokens; the whole call does
        self._length: int | None = None  # positions of the call, virtual ones among them
        self.undo: list[Undo] = []
        if reader is not model:
            self.undo.append(model.register_forward_pre_hook(self._lengthen_cross_mask, with_kwargs=True))
        self.undo += [
            reader.register_forward_pre_hook(self._lengthen, with_kwargs=True),
            embedding.register_forward_hook(self._exchange),
            model.register_forward_hook(self._shorten, always_call=True),
        ]

    def _lengthen(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Make room in front of the text, in everything with one entry per token."""
        self._waiting, self._length = False, None
        given, count = self._named(args, kwargs), self._count
        shape = text_shape(given)
        if shape is None:
            return None
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        first = cached_tokens(given) == 0  # later steps find the virtual tokens in the cache
        # an encoder called by its own model is handed the mask that the decoder will need too
        if mask is not None and not (first and mask.shape[-1] == shape[1] + count):
            given["attention_mask"] = longer_mask(mask, count)
        if positions is not None:
            given["position_ids"] = shifted_positions(positions, count, own=first)
        if not first:
            return (), given
        self._length = count + shape[1]
        if given.get("input_ids") is not None:
            given["input_ids"] = in_front(given["input_ids"], count, self._stand_in)
            self._waiting = self._missed = True
        else:
            given["inputs_embeds"] = self._put_in_front(given["inputs_embeds"])
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == shape and not value.is_floating_point():
                given[name] = _lengthened(name, value, count)
        given.update({name: given[name] + count for name in _ENDS if given.get(name) is not None})
        return (), given

    def _put_in_front(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings with the virtual tokens in front, (batch, count + seq, hidden)."""
        self._waiting = self._missed = False
        made = self._tokens(embeddings.shape[0]).to(embeddings.device, embeddings.dtype)
        return torch.cat([made, embeddings], dim=1)

    def _exchange(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Put the virtual tokens where the ids that stand for nothing were."""
        return self._put_in_front(output[:, self._count :]) if self._waiting else None

    def _shorten(self, module: Any, args: Any, output: Any) -> Any:
        """Take the virtual positions out of what the model puts out; an encoder keeps its own.

        Raises:
            MethodError: The virtual tokens never came in.
        """
        length, missed = self._length, self._missed
        self._length, self._missed, self._waiting = None, False, False
        if output is None:
            return None
        if missed:
            raise MethodError(f"{type(module).__name__} does not read its text through its input embeddings")
        if length is None or module.config.is_encoder_decoder:
            return None
        if isinstance(output, tuple):
            return tuple(self._cut("", value, length) for value in output)
        for name, value in list(output.items()):
            output[name] = self._cut(name, value, length)
        return output

    def _cut(self, name: str, value: Any, length: int) -> Any:
        """One output without the virtual positions."""
        if isinstance(value, tuple):
            return tuple(self._cut(name, part, length) for part in value)
        per_token = 2 if name in _PER_TOKEN_OF_TWO else 3
        if isinstance(value, torch.Tensor) and value.dim() == per_token and value.shape[1] == length:
            return value[:, self._count :]
        return value

    def _lengthen_cross_mask(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Let the decoder look at the virtual positions of its encoder."""
        given = self._whole(args, kwargs)
        self._missed = text_shape(given) is not None and given.get("encoder_outputs") is None
        mask, states = given.get("attention_mask"), given.get("encoder_outputs")
        if mask is None:
            return None
        if states is not None and mask.shape[-1] == states[0].shape[1]:
            return None
        given["attention_mask"] = longer_mask(mask, self._count)
        return (), given


def _lengthened(name: str, value: torch.Tensor, count: int) -> torch.Tensor:
    """Another argument with one entry per token, made longer.

    Raises:
        MethodError: It is not known what would stand in front.
    """
    if name == "labels":
        return in_front(value, count, -100)
    if name == "token_type_ids":
        return in_front(value, count, 0)
    if name in TEXT_LIKE:
        return value
    raise MethodError(
        f"virtual tokens make the text longer, and what '{name}' would be for them is not known"
    )


def _unremarkable_id(model: Any) -> int:
    """An id without a meaning of its own: models look for pad, end and class tokens among their ids."""
    config = model.config.get_text_config()
    special = {
        getattr(config, f"{kind}_token_id", None)
        for kind in ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    }
    flat = {i for value in special for i in (value if isinstance(value, list | tuple) else [value])}
    return next(i for i in range(len(flat) + 1) if i not in flat)
