"""What a model can read: texts that are texts, as many tokens as it has positions, the ids of its vocabulary.

Beyond these a model ends in an index error, or, with rotary positions, goes on in silence where it was never trained.
Both are refused alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from peftlab.errors import ConfigError, DataError
from peftlab.mapping.structure import input_embedding

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""How transformers' configs call the number of positions."""


class ReadingLimits:
    """How many tokens a model reads, and which.

    Args:
        model: A transformers model on any device, bare or wrapped by peft.
        tokenizer: Its tokenizer, whose own limit counts where nothing is cut; None where only inputs are checked.
        max_length: Texts will be cut to so many tokens; None for texts as they are.

    Attributes:
        max_length: As given.
        positions: Most tokens that are read by the model (by the encoder of an encoder-decoder), and by its decoder; None
            where there is no limit. Virtual tokens of peft are taken off.
        vocabulary: How many token ids either side knows; None where that is not known.

    Raises:
        ConfigError: max_length is more than the model has positions.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, max_length: int | None = None) -> None:
        self.max_length = max_length
        found = [_positions(model, side) for side in ("encoder", "decoder")]
        limit = found[0]
        fits = isinstance(max_length, Integral) and 0 < max_length <= (limit or max_length)
        if max_length is not None and not fits:
            raise ConfigError(
                f"max_length {max_length!r}: the model reads 1 to {limit or 'any number of'} tokens"
            )
        named = int(getattr(tokenizer, "model_max_length", None) or 0)
        if max_length is None and 0 < named < 10**9:  # above: transformers' way to say that it is not known
            found = [min(most or named, named) for most in found]
        self.positions = (found[0], found[1])
        self._labels = ("labels",) if _two_sided(model) else ()  # its decoder reads them, shifted by one
        self.vocabulary = (_vocabulary(model, "encoder"), _vocabulary(model, "decoder"))

    def check_length(self, number: int, length: int, *, text: str = "", decoder: bool = False) -> None:
        """Refuse a text that is empty or too long.

        Args:
            number: Which text it is, for the message.
            length: Its tokens.
            text: The text, for the message.
            decoder: Whether the decoder reads it.

        Raises:
            DataError: It has no tokens, or more than the model reads.
        """
        name, most = f"{'decoder ' * decoder}text {number}", self.positions[decoder]
        if not length:
            raise DataError(f"{name} has no tokens: {text[:40]!r}; leave it out")
        if most is not None and length > most:
            raise DataError(
                f"{name} has {length} tokens, the model reads {most}: give max_length={most} to cut such texts, or split"
                " them"
            )

    def check_ids(self, name: str, ids: npt.ArrayLike, *, decoder: bool = False) -> None:
        """Refuse token ids that the model has no embedding for.

        Args:
            name: What they are, for the message.
            ids: The ids.
            decoder: Whether the decoder reads them.

        Raises:
            DataError: One is negative or too large.
        """
        known, values = self.vocabulary[decoder], np.asarray(ids)
        if known is None or not values.size:
            return
        wrong = int(values.max() if values.max() >= known else values.min())
        if not 0 <= wrong < known:
            raise DataError(
                f"{name} has the token id {wrong}, the model knows 0 to {known - 1}: give the tokenizer that belongs to the"
                " model, or resize_token_embeddings where tokens were added"
            )

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse arguments of a forward pass that are too long or hold unknown ids.

        Args:
            inputs: Argument names to tensors; what is no sequence of tokens is passed over.

        Raises:
            DataError: There are more positions than the model reads, or unknown token ids.
        """
        for decoder, side in ((False, ""), (True, "decoder_")):
            most = None if f"{side}position_ids" in inputs else self.positions[decoder]
            for name in (f"{side}input_ids", f"{side}inputs_embeds", *(self._labels if decoder else ())):
                given = inputs.get(name)
                if not isinstance(given, torch.Tensor) or given.dim() < 2:
                    continue
                if most is not None and given.shape[1] > most:
                    raise DataError(
                        f"{name} of {tuple(given.shape)} has {given.shape[1]} positions, the model reads {most}: give fewer"
                    )
                if not given.is_floating_point():
                    read = given[given != -100] if name in self._labels else given
                    self.check_ids(name, read.cpu().numpy(), decoder=decoder)


def as_texts(given: Any, name: str = "texts") -> Sequence[str]:
    """Texts as a sequence.

    Args:
        given: Anything that texts can be taken from, one after another.
        name: What they are called, for the message.

    Returns:
        The texts; a sequence as it is, so that one that reads from a disk goes on doing so.

    Raises:
        DataError: It is one text, holds none, or holds something else.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise DataError(f"{name} {str(given)[:60]!r}: expected a list with at least one text")
    texts = given if isinstance(given, Sequence) else list(given)
    if not len(texts):
        raise DataError(f"{name} {str(texts)[:60]!r}: expected a list with at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"{name}[{number}] is {str(text)[:40]!r} of type {type(text).__name__}: expected a text; leave it out, or"
                " write it as one"
            )
    return texts


def repeatable(given: Any) -> Any:
    """What can be gone through once, as a list; anything else as it is.

    Args:
        given: Texts or images, in whatever holds them.

    Returns:
        Something that can be gone through more than once.
    """
    return list(given) if isinstance(given, Iterator) else given


def _positions(model: Any, side: str) -> int | None:
    """The longest sequence that one side of a model has positions for; None where it has no limit."""
    config = _part(model, side)
    names = [*_POSITIONS, f"max_{side}_position_embeddings"]
    if side == "decoder" or not _two_sided(model):
        names.append("max_target_positions")  # Whisper's; its encoder reads no tokens
    counts = [getattr(config, name, None) for name in names]
    modules = dict(model.named_modules())
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        table = getattr(module, "weight", None)
        if name == "position_embeddings" and isinstance(table, torch.Tensor) and table.dim() == 2:
            paddings = [getattr(m, "padding_idx", None) for m in (module, modules[above])]
            padding = next((index for index in paddings if index is not None), -1)
            counts.append(len(table) - padding - 1)  # RoBERTa counts positions from behind its pad id
    found = [n for n in counts if isinstance(n, int) and n > 0]
    return max(0, min(found) - _virtual_tokens(model)) if found else None


def _virtual_tokens(model: Any) -> int:
    """Positions that peft's virtual tokens or prefixes take, where they are switched on."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or model._adapters_disabled:
        return 0
    return int(config.num_virtual_tokens)


def _vocabulary(model: Any, side: str) -> int | None:
    """How many token ids one side of a model knows; None where that is not known."""
    base = getattr(model, "get_base_model", lambda: model)()
    owners = [base, getattr(base, "text_model", None)]
    if _two_sided(base):
        owners.insert(0, getattr(base, f"get_{side}", lambda: None)())
    for owner in owners:
        table = input_embedding(owner) if owner is not None else None
        if isinstance(table, nn.Embedding):
            return table.num_embeddings + int(getattr(table, "num_additional_embeddings", 0))
    return getattr(_part(model, side), "vocab_size", None)


def _two_sided(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _part(model: Any, side: str) -> Any:
    """The part of a model's config that is about the text that one side reads."""
    config: Any = getattr(model, "config", None)
    inner = getattr(config, side, None) if _two_sided(model) else None  # a config for each side
    config = inner if hasattr(inner, "get_text_config") else config
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several parts that read text: nothing is known of which
        return config
