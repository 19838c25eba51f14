"""The VQA document's way: LoRA from peft, and from nothing else, on the vision and on the text encoder of one model.

A model that has a `vision_encoder`, an `encoder` and a `decoder` takes `VisionTextLoRA` as a base class; the functions work
on any encoder. Targets are found by role, so that the names a release of transformers gives its layers do not matter; counts
are measured. There is no other way than peft: where it is missing, that is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from peftlab.errors import MethodError, MissingPeftError
from peftlab.mapping import map_model

_ROLES = ("attention.query", "attention.key", "attention.value", "attention.qkv", "attention.key_value")
"""Query, key and value, as one module or several."""
_UNFROZEN_LAYERS = 3
"""The document's default for a text encoder without LoRA."""

Show = Callable[[str], None]


def inject_lora_to_vision_encoder(
    encoder: nn.Module, r: int = 8, alpha: int = 16, dropout: float = 0.1, *, show: Show = print
) -> Any:
    """Put LoRA on query, key and value of every layer of a vision encoder.

    Args:
        encoder: A transformers model; frozen, its tensors are not changed.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the adapter's input while training.
        show: Receives the two lines that the document prints.

    Returns:
        peft's model, without a task type: it is called with pixels.

    Raises:
        MissingPeftError: peft is not installed; a RuntimeError.
        TargetError: The encoder has no such layers.
        MethodError: It has adapters already.
    """
    show("[LoRA] Using PEFT library for vision encoder...")
    injected = _inject(encoder, r=r, alpha=alpha, dropout=dropout)
    show(f"[LoRA] Vision - {_describe(injected)}")
    show(f"Vision LoRA: r={r}, alpha={alpha}, dropout={dropout}")
    return injected


def inject_lora_to_text_encoder(
    encoder: nn.Module, r: int = 16, alpha: int = 32, dropout: float = 0.1, *, show: Show = print
) -> Any:
    """Put LoRA on query, key and value of every layer of a text encoder.

    Args:
        encoder: A transformers model, such as the encoder of an MBart; frozen, its tensors are not changed.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the adapter's input while training.
        show: Receives the lines that the document prints.

    Returns:
        peft's model, without a task type: a bare encoder generates nothing.

    Raises:
        MissingPeftError: peft is not installed; a RuntimeError.
        TargetError: The encoder has no such layers.
        MethodError: It has adapters already.
    """
    show(f"[LoRA] Injecting into the text encoder (r={r})...")
    injected = _inject(encoder, r=r, alpha=alpha, dropout=dropout)
    show(f"[LoRA] Text Encoder - {_describe(injected)}")
    show(f"Text LoRA: r={r}, alpha={alpha}, dropout={dropout}")
    return injected


def freeze_pretrained(
    towers: Mapping[str, nn.Module],
    *,
    unfreeze_encoder_layers: int | None = None,
    unfreeze_decoder: bool = True,
    show: Show = print,
) -> dict[str, int]:
    """Freeze what was pretrained; adapters stay trainable, and that is asserted.

    A tensor that a trained decoder shares with the encoder, such as an embedding, trains.

    Args:
        towers: The pretrained parts by name: `vision_encoder`, `encoder`, `decoder`; any may be missing.
        unfreeze_encoder_layers: How many of the text encoder's last layers train, beside LoRA too; None is 3, or all where
            it has fewer, and 0 where the text encoder has adapters.
        unfreeze_decoder: Whether the decoder trains.
        show: Receives a line for each part.

    Returns:
        Name to the number of parameters that train in that part.

    Raises:
        MethodError: An adapter would not train, or there are fewer layers than were to be unfrozen.
    """
    if not isinstance(towers, Mapping):
        raise MethodError("give the parts by name: {'vision_encoder': ..., 'encoder': ..., 'decoder': ...}")
    unknown = set(towers) - {"vision_encoder", "encoder", "decoder"}
    if unknown:
        raise MethodError(
            f"parts are called vision_encoder, encoder and decoder, not {', '.join(sorted(unknown))}"
        )
    asked = unfreeze_encoder_layers
    if asked is not None and (not isinstance(asked, int) or asked < 0):
        raise MethodError(f"unfreeze_encoder_layers must be a number of layers, 0 or more, not {asked!r}")
    found = {name: _adapter_tensors(tower) for name, tower in towers.items()}
    last = _last_blocks(towers["encoder"], unfreeze_encoder_layers) if "encoder" in towers else []
    for tower in towers.values():
        tower.requires_grad_(False)
    trained = [*last, *([towers["decoder"]] if unfreeze_decoder and "decoder" in towers else [])]
    for module in trained:  # after all were frozen: a decoder may share its embedding with the encoder
        module.requires_grad_(True)
    for parameter in (p for adapters in found.values() for p in adapters.values()):
        parameter.requires_grad_(True)
    counts = {}
    for name, tower in towers.items():
        frozen = [path for path, parameter in _adapter_tensors(tower).items() if not parameter.requires_grad]
        if frozen:
            raise MethodError(f"{len(frozen)} tensors of the {name}'s adapters do not train: {frozen[0]}")
        counts[name] = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        show(f"[Freeze] {_say(name, tower, found[name], len(last))}")
    return counts


class VisionTextLoRA:
    """What the document's model has, for a model with `vision_encoder`, `encoder` and `decoder`.

    Attributes:
        use_vision_lora: Whether `inject_lora` puts LoRA on the vision encoder.
        vision_lora_r: Its rank.
        vision_lora_alpha: Its scale is alpha / r.
        vision_lora_dropout: Its dropout.
        use_text_lora: Whether `inject_lora` puts LoRA on the text encoder.
        text_lora_r: Its rank.
        text_lora_alpha: Its scale is alpha / r.
        text_lora_dropout: Its dropout.
    """

    vision_encoder: Any
    encoder: Any
    use_vision_lora: bool = True
    vision_lora_r: int = 8
    vision_lora_alpha: int = 16
    vision_lora_dropout: float = 0.1
    use_text_lora: bool = True
    text_lora_r: int = 16
    text_lora_alpha: int = 32
    text_lora_dropout: float = 0.1

    def inject_lora(self) -> None:
        """Put LoRA where it is asked for.

        Raises:
            MissingPeftError: peft is not installed; a RuntimeError.
            MethodError: An encoder is missing.
        """
        for name, wanted in (("vision_encoder", self.use_vision_lora), ("encoder", self.use_text_lora)):
            if wanted and not isinstance(getattr(self, name, None), nn.Module):
                raise MethodError(
                    f"this model has no {name} to put LoRA on; set it before, or use_..._lora to False"
                )
        if self.use_vision_lora:
            self._inject_lora_to_vision_encoder()
        if self.use_text_lora:
            self._inject_lora_to_text_encoder()

    def _inject_lora_to_vision_encoder(self) -> None:
        """Put LoRA on `vision_encoder`."""
        self.vision_encoder = inject_lora_to_vision_encoder(
            self.vision_encoder, self.vision_lora_r, self.vision_lora_alpha, self.vision_lora_dropout
        )

    def _inject_lora_to_text_encoder(self) -> None:
        """Put LoRA on `encoder`."""
        self.encoder = inject_lora_to_text_encoder(
            self.encoder, self.text_lora_r, self.text_lora_alpha, self.text_lora_dropout
        )

    def freeze_pretrained(
        self, unfreeze_encoder_layers: int | None = None, unfreeze_decoder: bool = True
    ) -> dict[str, int]:
        """Freeze what was pretrained; adapters stay trainable, and that is asserted.

        Args:
            unfreeze_encoder_layers: How many of the text encoder's last layers train; None is 3, or all where it has fewer,
                and 0 beside LoRA.
            unfreeze_decoder: Whether the decoder trains.

        Returns:
            Name to the number of parameters that train in that part.

        Raises:
            MethodError: An adapter would not train, or there are fewer layers than were to be unfrozen.
        """
        there = {name: getattr(self, name, None) for name in ("vision_encoder", "encoder", "decoder")}
        return freeze_pretrained(
            {name: tower for name, tower in there.items() if tower is not None},
            unfreeze_encoder_layers=unfreeze_encoder_layers,
            unfreeze_decoder=unfreeze_decoder,
        )


def _peft() -> ModuleType:
    """peft, or what to do where it is missing."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise MissingPeftError(
            "PEFT library is REQUIRED for LoRA!\nInstall with: pip install peft\nThen retry training."
        ) from error
    return peft


def _inject(encoder: nn.Module, *, r: int, alpha: int, dropout: float) -> Any:
    """LoRA on query, key and value, by peft."""
    if not isinstance(encoder, nn.Module):
        raise MethodError(f"an encoder is a transformers model, not {encoder!r}")
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise MethodError(
            f"LoRA needs r of 1 or more, alpha above 0 and dropout from 0 to below 1, not r={r}, alpha={alpha},"
            f" dropout={dropout}"
        )
    peft = _peft()
    if _adapter_tensors(encoder):
        raise MethodError(
            "this encoder has adapters already; take them off first: encoder = encoder.unload()"
        )
    family = map_model(encoder)
    there = {site.role for site in family.sites if site.linear}
    selection = family.select([role for role in _ROLES if role in there] or "attention_qv")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[site.path for site in selection.adapted],
        bias="none",
        task_type=None,
    )
    return peft.get_peft_model(encoder, config)


def _adapter_tensors(tower: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors of peft's layers in a module, by name; none where there are no adapters."""
    if not any(getattr(module, "adapter_layer_names", ()) for module in tower.modules()):
        return {}
    from peftlab.attaching.attachment import adapter_parameters

    return adapter_parameters(tower)


def _last_blocks(tower: nn.Module, asked: int | None) -> list[nn.Module]:
    """The last transformer blocks of an encoder, as many as are asked for, or as the document's default has it."""
    if asked == 0 or (asked is None and _adapter_tensors(tower)):
        return []
    blocks = map_model(tower).blocks()
    if asked is not None and asked > len(blocks):
        raise MethodError(f"unfreeze_encoder_layers is {asked}, this encoder has {len(blocks)} layers")
    number = _UNFROZEN_LAYERS if asked is None else asked
    return [tower.get_submodule(site.path) for site in blocks[-number:]]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _describe(injected: nn.Module) -> str:
    """The document's line: trainable, share, total."""
    total = _count(injected.parameters())
    trained = _count(p for p in injected.parameters() if p.requires_grad)
    return f"Trainable: {trained:,} ({100 * trained / total:.2f}%) | Total: {total:,}"


_TITLES = {"vision_encoder": "Vision encoder", "encoder": "Text encoder", "decoder": "Decoder"}


def _say(name: str, tower: nn.Module, adapters: Mapping[str, nn.Parameter], layers: int) -> str:
    """What of a part trains, in the document's words."""
    known = {id(parameter) for parameter in adapters.values()}
    base = [parameter for parameter in tower.parameters() if id(parameter) not in known]
    trained = _count(parameter for parameter in base if parameter.requires_grad)
    if not trained:
        state = "FROZEN (base)"
    elif trained == _count(base):
        state = f"TRAINABLE ({trained / 1e6:.2f}M params)"
    else:
        state = f"last {layers} layers TRAINABLE ({trained / 1e6:.2f}M params), the rest FROZEN"
    if adapters:
        adapted = {site.layer for site in map_model(tower).sites if site.linear and _holds(tower, site.path)}
        state += f" + PEFT LoRA ({_count(adapters.values()) / 1e6:.2f}M params) on {len(adapted)} layers"
    return f"{_TITLES[name]}: {state}"


def _holds(tower: nn.Module, path: str) -> bool:
    """Whether an adapter stands on a module."""
    return bool(getattr(tower.get_submodule(path), "adapter_layer_names", ()))
