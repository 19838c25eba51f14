"""LoRA with all that peft offers on it by setting: what `lora` attaches.

Where B A is not zero at the start, what of W0 remains beside it is computed from the original and the first A and B alone,
W0 - s B0 A0, so that a checkpoint holds A0 and B0 and no second base.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab.attaching.attachment import ADAPTER_FILE
from peftlab.attaching.lora_start import Start, start_from_rows, start_from_weights
from peftlab.attaching.low_rank import LowRankAttachment
from peftlab.attaching.tensors import cuda_devices, kept
from peftlab.errors import MethodError
from peftlab.family import FamilyMap
from peftlab.files import write_json
from peftlab.method import Head
from peftlab.streams import seed_for

if TYPE_CHECKING:
    from peftlab.methods.lora import Settings

_FIRST = "first."
"""Before the names of the first A and B in what a checkpoint keeps."""


class LoraAttachment(LowRankAttachment):
    """LoRA by peft, with its start; satisfies `method.Attachment`.

    Args:
        model: The base.
        family: The map of the base.
        settings: The method's settings.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds A.

    Raises:
        MethodError: A setting has no place in this model.
        TargetError: Targets, layers, patterns or modules match nothing in this model.
    """

    def __init__(
        self, model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int
    ) -> None:
        self._seed = seed
        has_data = not any(p.is_meta for p in model.parameters())
        super().__init__(model, family, settings, _start_of(settings), head=head, seed=seed)
        self._first = self._factors() if self._start.rewrites else {}
        self._prepared = not self._start.from_data
        if self._start.rewrites and not self._start.from_data and has_data:
            with self._seeded():
                start_from_weights(self._layers, self._start)
            self._take_out(self._factors())

    def prepare(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Start from rows, with eva, corda and lora_ga; the others take none.

        Args:
            batches: Collated batches of the run's rows, in the order of training.

        Raises:
            MethodError: These rows do not let it be computed.
        """
        if self._prepared:
            return
        device = next(iter(self._layers.values())).get_base_layer().weight.device
        first = [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in itertools.islice(batches, self._start.num_batches)
        ]
        if not first:
            raise MethodError(f"init {self._start.name} looks at rows of the run, and there are none")
        states = {name: p.requires_grad for name, p in self.model.named_parameters()}
        with self._seeded():
            start_from_rows(self.model, self._layers, self._start, first, self._stacks())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(states[name])
        if self._start.rewrites:
            self._take_out(self._factors())
        self._prepared = True

    def _stacks(self) -> dict[str, str]:
        """Which layers see the decoder's tokens of an encoder-decoder."""
        sees_encoder = ("cross_attention.key", "cross_attention.value", "cross_attention.key_value")
        is_decoder = self._head == "seq2seq"
        return {
            site.path: "decoder"
            if is_decoder and site.stack == "decoder" and site.role not in sees_encoder
            else "encoder"
            if is_decoder
            else ""
            for site in self.selection.adapted
        }

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Draw from a stream of this purpose's own."""
        devices = cuda_devices(self.model)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_for(self._seed, "adapter start"))
            yield

    def _factors(self) -> dict[str, torch.Tensor]:
        """A and B of the adapted layers, on the CPU, by the names of the saved file."""
        return {
            f"base_model.model.{path}.{kind}.weight": kept(getattr(layer, kind)[self.name].weight)
            for path, layer in self._layers.items()
            for kind in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def _take_out(self, first: dict[str, torch.Tensor]) -> None:
        """Leave W0 - s B0 A0 in the base: from the original, and from A0 and B0 as they are kept.

        Args:
            first: A0 and B0.
        """
        self._first = first
        for path, layer in self._layers.items():
            weight = layer.get_base_layer().weight
            factors = [getattr(layer, kind)[self.name].weight for kind in ("lora_A", "lora_B")]
            now = [factor.data for factor in factors]
            for factor, kind in zip(factors, ("lora_A", "lora_B"), strict=True):
                factor.data = first[f"base_model.model.{path}.{kind}.weight"].to(factor.device, factor.dtype)
            taken = layer.get_delta_weight(self.name)
            for factor, data in zip(factors, now, strict=True):
                factor.data = data
            original = self._originals[f"{path}.weight"].to(weight.device)
            weight.data = (original.to(torch.promote_types(original.dtype, taken.dtype)) - taken).to(
                weight.dtype
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, on the CPU, by the names of the saved file; the first A and B where they count."""
        return super().tensors() | {f"{_FIRST}{name}": tensor.clone() for name, tensor in self._first.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        self.check_fit(tensors)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FIRST)}
        active = {name: p.requires_grad for name, p in self.model.named_parameters()}
        peft.set_peft_model_state_dict(self.model, own, adapter_name=self.name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(active[name])
        if self._start.rewrites and self._first:
            self._take_out({name: tensors[f"{_FIRST}{name}"].clone() for name in self._first})
        self._prepared = True

    def save(self, folder: Path) -> None:
        """Write a plain LoRA for the untouched base, as anybody's peft loads it.

        W0 - s B0 A0 + s B A = W0 + s [B, -B0] [A; A0]: where the start rewrote the base, the rank doubles.

        Args:
            folder: Where; peft makes it if needed.

        Raises:
            MethodError: It was to start from rows and never has.
        """
        if not self._prepared:
            raise MethodError(
                f"init {self._start.name}: the adapter has never seen the rows it starts from; call prepare(batches) before"
                " training"
            )
        super().save(folder)
        folder = self._saved_in(folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"init_lora_weights": True, "eva_config": None}
        if self._first:
            tensors = load_file(folder / ADAPTER_FILE)
            for name, first in self._first.items():
                is_a = name.endswith(".lora_A.weight")
                both = [tensors[name], (first if is_a else -first).to(tensors[name].dtype)]
                tensors[name] = torch.cat(both, dim=0 if is_a else 1).contiguous()
            save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
            config |= _doubled(config)
        write_json(path, config)

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote; where the start had rewritten the base, it is a plain LoRA on the original now.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit.
        """
        if self._first:
            self._become_plain()
        super().load_saved(folder)

    def _become_plain(self) -> None:
        """Give the base its weights back, and every layer the rank of the saved file."""
        config = _doubled(self.config.to_dict())
        for layer in self._layers.values():
            rank = 2 * layer.r[self.name]
            alpha = layer.scaling[self.name] * (math.sqrt(rank) if self._settings.use_rslora else rank)
            states = layer.lora_A[self.name].weight.dtype
            layer.update_layer(self.name, r=rank, lora_alpha=alpha, config=self.config)
            for kind in ("lora_A", "lora_B"):
                getattr(layer, kind)[self.name].to(states)
        for name, value in config.items():
            setattr(self.config, name, value)
        with torch.no_grad():
            for path in self._layers:
                name = f"{path}.weight"
                self.model.get_parameter(self._live.pop(name)).copy_(self._originals.pop(name))
        self._start, self._first, self._prepared = Start("default"), {}, True
        self.rewritten = tuple(self._originals)
        for name, parameter in self.model.named_parameters():
            if self._is_frozen(name):
                parameter.requires_grad_(False)


def _start_of(settings: Settings) -> Start:
    """How A and B start, from the settings."""
    plain = Start(settings.init)
    return Start(
        settings.init,
        settings.init_batches or plain.num_batches,
        settings.corda_method or plain.corda_method,
        settings.lora_ga_direction or plain.direction,
        settings.lora_ga_scale or plain.scale,
    )


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in a peft config when every rank doubles and every scale stays."""
    factor = math.sqrt(2) if config["use_rslora"] else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {path: 2 * rank for path, rank in config["rank_pattern"].items()},
        "alpha_pattern": {path: factor * alpha for path, alpha in config["alpha_pattern"].items()},
    }
