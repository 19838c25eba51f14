"""How LoRA's A and B start where peft computes it: from the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA), from rows (EVA).

The mathematics is peft's. Around it: peft computes in float32 whatever the base is, a base that is put back to the bit
afterwards, and the check of what would fail, or quietly come out otherwise, before anything is computed.

Source: peft `tuners/lora/layer.py`, `eva.py`, `corda.py`, `loraga.py`; papers in `methods/lora.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from peftlab.attaching.attachment import ADAPTER
from peftlab.batches import IGNORED
from peftlab.errors import MethodError

REWRITING = ("pissa", "olora", "corda", "lora_ga")
"""Starts whose B A is not zero and is taken out of the base's weights."""
FROM_DATA = ("eva", "corda", "lora_ga")
"""Starts that look at rows of the run."""
_ROUNDS = 100

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Start:
    """How A and B start.

    Attributes:
        name: As in the settings of `lora`.
        num_batches: Batches that a start from data looks at.
        corda_method: "ipm" or "kpm".
        direction: LoRA-GA's choice of singular vectors.
        scale: LoRA-GA's scale.
    """

    name: str
    num_batches: int = 8
    corda_method: str = "ipm"
    direction: str = "ArB2r"
    scale: str = "stable"

    @property
    def rewrites(self) -> bool:
        """Whether B A is taken out of the base's weights."""
        return self.name.startswith(REWRITING)

    @property
    def from_data(self) -> bool:
        """Whether rows are looked at."""
        return self.name in FROM_DATA

    @property
    def b_is_zero(self) -> bool:
        """Whether B starts at zero, so that A learns a step later."""
        return self.name in ("default", "gaussian", "eva")

    @property
    def by_peft(self) -> bool | str:
        """What peft is told while it attaches; what rewrites the base comes afterwards."""
        return self.name if self.name in ("gaussian", "orthogonal", "eva") else True


def start_from_weights(layers: Mapping[str, Any], start: Start) -> None:
    """PiSSA and OLoRA: A and B from the base's weights, which stay.

    Args:
        layers: Path to peft's layer.
        start: How A and B start.
    """
    for layer in layers.values():
        with _in_float32(layer):
            layer.olora_init(ADAPTER) if start.name == "olora" else layer.pissa_init(ADAPTER, start.name)


def start_from_rows(
    model: Any, layers: Mapping[str, Any], start: Start, batches: Sequence[Batch], stacks: Mapping[str, str]
) -> None:
    """EVA, CorDA and LoRA-GA: A and B from what rows do in the model; the base's weights stay.

    Args:
        model: The peft model; its adapter is off meanwhile.
        layers: Path in the base to peft's layer.
        start: How A and B start.
        batches: Batches of rows, on the model's device.
        stacks: Path to "decoder" where a layer sees the decoder's tokens of an encoder-decoder, else to "".

    Raises:
        MethodError: These rows do not let it be computed.
    """
    mode = model.training
    try:
        if start.name == "eva":
            _start_eva(model, batches, stacks)
        else:
            _start_rewriting(model, layers, start, batches)
    finally:
        model.train(mode)


def _start_rewriting(model: Any, layers: Mapping[str, Any], start: Start, batches: Sequence[Batch]) -> None:
    """CorDA's covariances or LoRA-GA's gradients by peft, then A and B of each layer.

    Raises:
        MethodError: No row reached a layer, or the values are not finite.
    """
    base = model.base_model.model
    preprocess = _preprocess_corda if start.name == "corda" else _preprocess_gradients
    try:
        with model.disable_adapter():
            preprocess(model, base, layers, start, batches)
    except (ValueError, ZeroDivisionError, AttributeError, RuntimeError) as error:
        raise MethodError(
            f"init {start.name} cannot be computed from these {len(batches)} batches: {error}; a layer that no row reaches,"
            " such as an expert, can be left out by targets, and init_batches gives it more rows"
        ) from error
    for path, layer in layers.items():
        if start.name == "lora_ga" and not hasattr(layer.get_base_layer(), "_peft_loraga_grad"):
            raise MethodError(
                f"init lora_ga: no row reached {path}; raise init_batches or leave it out of targets"
            )
        with _in_float32(layer):
            if start.name == "corda":
                layer.corda_init(ADAPTER, "corda")
            else:
                layer.lora_ga_init(ADAPTER, peft.LoraGAConfig(direction=start.direction, scale=start.scale))


def _config_below(layers: Mapping[str, Any], **settings: Any) -> Any:
    """A peft config whose targets are the base's own layers inside peft's."""
    return peft.LoraConfig(
        target_modules=[f"{path}.base_layer" for path in layers],
        rank_pattern={f"{path}.base_layer": layer.r[ADAPTER] for path, layer in layers.items()},
        **settings,
    )


def _preprocess_corda(
    model: Any, base: nn.Module, layers: Mapping[str, Any], start: Start, batches: Sequence[Batch]
) -> None:
    """The covariance of each layer's inputs; peft's hook takes one row at a time, without pads."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in batches:
            for row in _rows(batch):
                model(**row)

    corda = CordaConfig(corda_method=start.corda_method)
    preprocess_corda(
        base, _config_below(layers, init_lora_weights="corda", corda_config=corda), run_model=run
    )


def _preprocess_gradients(
    model: Any, base: nn.Module, layers: Mapping[str, Any], start: Start, batches: Sequence[Batch]
) -> None:
    """The mean gradient of each layer's weight."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    config = _config_below(layers, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with (
        warnings.catch_warnings()
    ):  # peft counts backward passes by hooks; the first layer's input needs no gradient
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(base, config, run)


def _rows(batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """Each row of a batch as a batch of one, without its pads."""
    for number, mask in enumerate(batch["attention_mask"].bool()):
        row = {name: tensor[number : number + 1] for name, tensor in batch.items()}
        width = mask.shape[0]
        for name, tensor in row.items():
            if tensor.dim() == 2 and tensor.shape[1] == width and name != "labels":
                row[name] = tensor[:, mask]
        labels = row["labels"]
        if labels.dim() == 2:
            row["labels"] = _without_pads(labels, mask)
        yield row


def _without_pads(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A row's labels, (1, seq): as its tokens where they lie side by side, else without what is ignored (seq2seq)."""
    beside = labels.shape[1] == mask.shape[0] and not bool((labels[0][~mask] != IGNORED).any())
    return labels[:, mask] if beside else labels[:, labels[0] != IGNORED]


def _start_eva(model: Any, batches: Sequence[Batch], stacks: Mapping[str, str]) -> None:
    """The leading directions of each layer's inputs become A; every layer keeps its rank (peft's rho = 1).

    Raises:
        MethodError: The batches have too few tokens, or the directions do not settle.
    """
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    passes = 0

    def forward(model: Any, batch: Batch) -> Any:
        nonlocal passes
        passes += 1
        if passes > _ROUNDS * len(batches):
            raise MethodError(
                f"init eva: after {_ROUNDS} rounds over {len(batches)} batches the directions have not settled; a batch"
                " needs more tokens than the highest rank: raise training.batch_size or init_batches, or lower rank"
            )
        return model(**batch)

    config = model.peft_config[ADAPTER]
    patterns = config.rank_pattern, config.alpha_pattern
    targets = config.target_modules
    initialize_lora_eva_weights(
        model,
        dataloader=batches,
        forward_fn=forward,
        prepare_model_inputs_fn=lambda batch, _: batch,
        prepare_layer_inputs_fn=_seen_tokens(stacks),
        adapter_name=ADAPTER,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    config = model.peft_config[ADAPTER]  # peft writes other names for the same ranks
    config.rank_pattern, config.alpha_pattern = patterns
    config.target_modules = targets


def _seen_tokens(stacks: Mapping[str, str]) -> Callable[[Any, Any, str], torch.Tensor]:
    """For EVA: which rows of a layer's input count, (tokens, in): no pads, and of a causal model labelled ones alone."""

    def choose(given: Any, batch: Batch, name: str) -> torch.Tensor:
        states: torch.Tensor = given[0] if isinstance(given, tuple | list) else given
        labels, mask = batch["labels"], batch["attention_mask"].bool()
        if stacks[name.removeprefix("base_model.model.")] == "decoder":
            mask = labels != IGNORED
        elif labels.shape == mask.shape and not any(stacks.values()):
            mask = mask & (labels != IGNORED)
        if states.shape[:-1] == mask.shape:
            return states[mask]
        return states.reshape(-1, states.shape[-1])

    return choose


@contextmanager
def _in_float32(layer: Any) -> Iterator[None]:
    """Have peft compute on a float32 copy of a layer's weight; the weight itself stays, A and B keep their dtype."""
    weight = layer.get_base_layer().weight
    kept = weight.data
    factors = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    dtypes = [factor.dtype for factor in factors]
    # a float64 base is refused by peft, and one of bfloat16 would take its rounding into A and B
    weight.data = kept.to(torch.float32, copy=True)
    try:
        yield
    finally:
        weight.data = kept
        for factor, dtype in zip(factors, dtypes, strict=True):
            factor.data = factor.data.to(kept.device, dtype).contiguous()
