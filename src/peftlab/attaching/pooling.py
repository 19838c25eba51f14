"""The last token of a row behind virtual tokens: a classifier that looks for it among the ids is given ids.

A decoder-only classifier answers from a row's last token that is no pad. peft gives it embeddings, virtual tokens among
them, and no ids; transformers then takes the last position, which is a pad in every row but the longest, so that an answer
depends on its neighbours in the batch. Here the model reads ids again, one more for each virtual token, and its embedding
hands out what peft has put together. What looks for the last token, and all that comes after, stays transformers' own.
A saved adapter that peft loads by itself answers right for rows without pads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from peftlab.errors import MethodError
from peftlab.mapping.certifying import complete_inputs, family_exceptions
from peftlab.mapping.twin import LENGTH, build_twin, twin_config, twin_inputs

_SAME = 1e-4
"""How far two answers of a twin may differ that are the same, of values near 1 in float32."""
_PADS = 3


class IdsBesideEmbeddings:
    """Gives a classifier ids beside the embeddings that peft makes; a pass that is given embeddings alone stays as it is.

    Args:
        wrapped: peft's model.
        base: The classifier in it.
        num_virtual_tokens: Virtual tokens in front of each row.
    """

    def __init__(self, wrapped: nn.Module, base: Any, *, num_virtual_tokens: int) -> None:
        self._number, self._name = num_virtual_tokens, type(base).__name__
        self._pad = base.config.get_text_config().pad_token_id
        self._ids: torch.Tensor | None = None
        self._embedded: torch.Tensor | None = None
        self._handles = [
            wrapped.register_forward_pre_hook(self._note_ids, with_kwargs=True),
            base.register_forward_pre_hook(self._give_ids, with_kwargs=True),
            base.get_input_embeddings().register_forward_hook(self._hand_out),
            base.register_forward_hook(self._check_read),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _note_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the ids that peft's model is given."""
        self._embedded, self._ids = None, kwargs.get("input_ids", args[0] if args else None)

    def _give_ids(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Exchange the embeddings for ids, of which no virtual token's is the pad's."""
        ids, self._ids = self._ids, None
        if ids is None or kwargs.get("inputs_embeds") is None:
            return None
        self._embedded = kwargs["inputs_embeds"]
        virtual = ids.new_full((len(ids), self._number), int(self._pad == 0))
        given = {name: value for name, value in kwargs.items() if name != "inputs_embeds"}
        return args, given | {"input_ids": torch.cat((virtual, ids), dim=1)}

    def _hand_out(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """What peft has put together, in place of the embeddings of the ids."""
        made, self._embedded = self._embedded, None
        return made

    def _check_read(self, module: nn.Module, args: Any, output: Any) -> None:
        """Refuse an answer that was made without the virtual tokens.

        Raises:
            MethodError: The model has not called its embedding.
        """
        if self._embedded is not None:
            self._embedded = None
            raise MethodError(
                f"virtual tokens do not work on {self._name}: it does not read its ids by its input embedding"
            )


def looks_for_pads(model: Any) -> bool:
    """Whether a classifier answers otherwise where it is given embeddings of padded rows and no ids.

    It is tried on a tiny random model of the same class.

    Args:
        model: A classifier; only its class and its config are read.

    Returns:
        Whether it does.

    Raises:
        MethodError: It takes no embeddings.
    """
    name = type(model).__name__
    with _unheard(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        twin: Any = _twin(model)
        inputs = complete_inputs(twin, twin_inputs(twin))
        pad = twin.config.get_text_config().pad_token_id
        ids, mask = inputs["input_ids"].clone(), torch.ones_like(inputs["input_ids"])
        ids[0, LENGTH - _PADS :], mask[0, LENGTH - _PADS :] = pad, 0
        rest = {key: value for key, value in inputs.items() if key != "input_ids"} | {"attention_mask": mask}
        by_ids = twin(input_ids=ids, **rest).logits
        try:
            by_embeddings = twin(inputs_embeds=twin.get_input_embeddings()(ids), **rest).logits
        except (RuntimeError, TypeError, ValueError) as error:
            raise MethodError(f"{name} takes ids alone, and no embeddings: {error}") from error
    return not torch.allclose(by_ids, by_embeddings, rtol=_SAME, atol=_SAME)


@contextmanager
def _unheard() -> Iterator[None]:
    """A context without remarks of transformers', which warns of what is being tried."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _twin(model: Any) -> nn.Module:
    """A tiny random model of the same class, in evaluation mode, that knows its pads."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = 0
    changes = getattr(family_exceptions(getattr(config, "model_type", "")), "TWIN", None)
    return build_twin(type(model), twin_config(config, num_layers=2, changes=changes))
