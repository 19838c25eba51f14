"""What attention is looked at on: texts to the model's inputs, a real decoder input, and which positions are no pads."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_choice import Choice, mixers
from peftlab.inspection.reading_limits import ReadingLimits, as_texts


def model_inputs(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | None,
    *,
    decoder_texts: Iterable[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    needs_decoder: bool = False,
    max_length: int | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of a forward pass, on the model's device.

    Args:
        model: A transformers model, bare or wrapped by peft.
        tokenizer: Its tokenizer; may be None where `inputs` is given.
        texts: What it reads; None where `inputs` is given.
        decoder_texts: What the decoder of an encoder-decoder has written, one for each text; it sees them shifted by one, as
            in training.
        inputs: The arguments themselves, e.g. `{"pixel_values": ...}`; in place of texts, or beside them.
        needs_decoder: Whether the decoder's attention is asked for, so that it must have a real input.
        max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.
        numbers: Which texts these are of more, for messages; None counts from 0.

    Returns:
        Argument names to tensors.

    Raises:
        ConfigError: max_length is more than the model has positions, or there are no texts to cut.
        DataError: Neither texts nor inputs, no texts, numbers that do not match, a decoder without input, texts of
            different lengths for a tokenizer that cannot pad, or what the model cannot read: a text that is too long or has
            no tokens, token ids outside its vocabulary.
    """
    device = next(model.parameters()).device
    base = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    limits = ReadingLimits(model, None if texts is None else tokenizer, max_length)
    made: dict[str, Any] = {}
    read: Sequence[str] = ()
    if texts is not None:
        read = as_texts(texts)
        made |= {k: v for k, v in _encode(tokenizer, read, limits, numbers).items() if k in accepted}
    elif max_length is not None:
        raise ConfigError(f"max_length {max_length} cuts texts, and none are given: leave it out")
    limits.check_inputs(inputs or {})
    made |= inputs or {}
    if not made:
        raise DataError("nothing to look at: give texts, or inputs with the model's own arguments")
    if decoder_texts is not None:
        written = as_texts(decoder_texts, "decoder_texts")
        if len(written) != len(read):
            raise DataError(f"{len(written)} decoder_texts for {len(read)} texts: expected one for each")
        made |= _decoder_inputs(base, tokenizer, written, limits=limits, numbers=numbers)
    given = any(name in made for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    if _two_sided(model) and not given:
        if needs_decoder:
            raise DataError(
                f"{base.config.model_type} is an encoder-decoder and its decoder's attention is asked for, but the decoder"
                " has no input: give decoder_texts=[...], or inputs={'decoder_input_ids': ...}"
            )
        rows = next(v for v in made.values() if isinstance(v, torch.Tensor)).shape[0]
        start = _start_token(base)
        made["decoder_input_ids"] = torch.full((rows, 1), start)  # read by no part of the encoder
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def base_of(model: Any) -> Any:
    """The transformers model inside peft's wrapper.

    Args:
        model: A model, wrapped or not.

    Returns:
        The model whose forward pass names its arguments.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def side_of(model: Any, family: FamilyMap, stack: str) -> str:
    """Which side of an encoder-decoder a stack is.

    Args:
        model: The mapped model.
        family: Its map.
        stack: A stack of it.

    Returns:
        "encoder_" or "decoder_", as transformers begins the names of masks and outputs; "" in models of one side.
    """
    if not _two_sided(model):
        return ""
    encoder = set(base_of(model).get_encoder().modules())
    inside = {site.stack: model.get_submodule(site.path) in encoder for site in family.blocks()}
    if all(inside.values()):  # the model names no encoder of its own
        return "decoder_" if mixers(family, stack, "cross") else "encoder_"
    return "encoder_" if inside.get(stack) else "decoder_"


def _two_sided(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _encode(
    tokenizer: Any,
    texts: Sequence[str],
    limits: ReadingLimits,
    numbers: Sequence[int] | None,
    *,
    decoder: bool = False,
) -> dict[str, torch.Tensor]:
    """Texts to tensors, padded on the right: pads on the left would move absolute positions."""
    several = len(texts) > 1
    if several and tokenizer.pad_token_id is None:
        raise DataError(
            "the tokenizer has no pad token, so several texts make no batch: set tokenizer.pad_token (its eos_token serves,"
            " pads are masked by position) or give one text"
        )
    options: dict[str, Any] = {"text_target" if decoder else "text": list(texts), "padding": several}
    if limits.max_length is not None:
        options |= {"truncation": True, "max_length": limits.max_length}
    encoded = dict(tokenizer(**options, padding_side="right", return_tensors="pt", verbose=False))
    ids = encoded["input_ids"]
    real = encoded.get("attention_mask", torch.ones_like(ids)).bool()
    for number, text, row, here in zip(numbers or range(len(texts)), texts, ids, real, strict=True):
        limits.check_length(number, int(here.sum()), text=text, decoder=decoder)
        limits.check_ids(f"{'decoder ' * decoder}text {number}", row[here].numpy(), decoder=decoder)
    known = limits.vocabulary[decoder]
    if known is not None:  # a pad token that was added to the tokenizer alone: it is masked, and may be any
        encoded["input_ids"] = torch.where(real, ids, ids.clamp_max(known - 1))
    return encoded


def _decoder_inputs(
    base: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    limits: ReadingLimits,
    numbers: Sequence[int] | None,
) -> dict[str, torch.Tensor]:
    """What the decoder reads while it writes some texts: they, shifted by one behind its start token."""
    encoded = _encode(tokenizer, texts, limits, numbers, decoder=True)
    ids = encoded["input_ids"]
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):  # mBART opens with the text's language
        shifted = base.prepare_decoder_input_ids_from_labels(labels=ids)
    else:
        shifted = torch.cat([torch.full((len(ids), 1), _start_token(base)), ids[:, :-1]], dim=1)
    mask = encoded.get("attention_mask", torch.ones_like(ids))
    return {"decoder_input_ids": shifted, "decoder_attention_mask": mask}


def _start_token(base: Any) -> int:
    """The token that opens the decoder's input."""
    sources = (base.config, getattr(base, "generation_config", None))
    names = ("decoder_start_token_id", "bos_token_id")
    found = [getattr(source, name, None) for name in names for source in sources]
    start = next((token for token in found if token is not None), None)
    if start is None:
        raise DataError(
            f"this {base.config.model_type} model names no decoder_start_token_id: set it in its config, or give"
            " inputs={'decoder_input_ids': ...}"
        )
    return int(start)


@dataclass(frozen=True, slots=True, eq=False)
class RealPositions:
    """Which positions of queries and keys are no pads.

    Attributes:
        model_type: For messages.
        query: (batch, query), True where real; None where the stack does not read tokens.
        key: (batch, key), likewise.
        num_virtual: Positions that peft puts before the tokens.
        batches: Numbers of rows that the inputs have.
        certain: Whether the inputs are text alone, so that it is the text that the stack reads.
    """

    model_type: str
    query: torch.Tensor | None
    key: torch.Tensor | None
    num_virtual: int
    batches: frozenset[int]
    certain: bool

    @classmethod
    def of(
        cls, model: nn.Module, family: FamilyMap, choice: Choice, inputs: Mapping[str, Any]
    ) -> RealPositions:
        """Read the pads of a choice from the model's inputs.

        Args:
            model: The mapped model, for virtual tokens and whether it is an encoder-decoder.
            family: Its map.
            choice: What is asked for.
            inputs: Arguments of the forward pass.

        Returns:
            The positions.
        """
        source, target = _real(inputs, ""), _real(inputs, "decoder_")
        side = side_of(model, family, choice.stack)
        query = key = target if side == "decoder_" else source
        if choice.kind == "cross":
            key = source if side else None
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name for name, value in tensors.items() if value.is_floating_point() and value.dim() > 2}
        return cls(
            model_type=family.model_type,
            query=query,
            key=key,
            num_virtual=int(
                getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0) or 0
            ),
            batches=frozenset(value.shape[0] for value in tensors.values() if value.dim()),
            certain=others <= {"inputs_embeds", "decoder_inputs_embeds", "attention_mask"},
        )

    def fit(self, rows: torch.Tensor, num_keys: int, *, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The real positions at the size that an attention has.

        Args:
            rows: Its queries, or anything of shape (batch, heads, query, ...).
            num_keys: Its keys.
            masked: Whether it is masked at all; beside other inputs than text, this tells whether a stack reads the text.

        Returns:
            (batch, query) and (batch, key), True where real.

        Raises:
            ModelError: The attention is over other positions than the inputs have.
        """
        batch, _, num_queries = rows.shape[:3]
        return tuple(  # type: ignore[return-value]
            self._fit(real, (batch, size), masked).to(rows.device)
            for real, size in ((self.query, num_queries), (self.key, num_keys))
        )

    def _fit(self, real: torch.Tensor | None, shape: tuple[int, int], masked: bool) -> torch.Tensor:
        """One side's real positions."""
        if real is not None and tuple(real.shape) == shape and (self.certain or masked):
            return real
        if real is not None and self.num_virtual and (len(real), real.shape[1] + self.num_virtual) == shape:
            return torch.cat([real.new_ones(shape[0], self.num_virtual), real], dim=1)
        if (real is None or not self.certain) and shape[0] in self.batches:
            return torch.ones(shape, dtype=torch.bool)
        given = (
            f"{tuple(real.shape)} tokens" if real is not None else f"inputs of {sorted(self.batches)} rows"
        )
        raise ModelError(
            f"attention in this {self.model_type} model is over (rows, positions) {shape} for {given}: it pools, folds or"
            " pads its input, so a position of its attention is no token"
        )


def _real(inputs: Mapping[str, Any], side: str) -> torch.Tensor | None:
    """The real positions of one side's tokens; None where the inputs have no such side."""
    mask = inputs.get(f"{side}attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.bool()
    labels = inputs.get("labels")
    if side and isinstance(labels, torch.Tensor) and labels.dim() == 2 and f"{side}input_ids" not in inputs:
        return labels != -100  # the decoder reads them, shifted by one
    tokens = inputs.get(f"{side}input_ids", inputs.get(f"{side}inputs_embeds"))
    if not isinstance(tokens, torch.Tensor):
        return None
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
