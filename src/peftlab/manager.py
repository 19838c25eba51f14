"""The efficient fine-tuning document's manager: LoRA, P-tuning, AdaLoRA and prefix tuning on any module, in place.

The manager works on the model object that it is given, a plain `nn.Module` or one of transformers. Applying a method
freezes everything but adapters; applying one twice, or two to one layer, is refused. `remove()` gives the model back bit by
bit, `merge()` with LoRA and AdaLoRA folded into its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peftlab.attaching.attachment import ADAPTER
from peftlab.efficient import plain_tokens, virtual_tokens
from peftlab.efficient.adapted import AdaptedModel
from peftlab.efficient.embeddings import PrefixTuning, PTuningEmbedding
from peftlab.efficient.layers import (
    AdaLoRALayer,
    AttentionAdaLoRA,
    AttentionLoRA,
    LoRALayer,
    LoRALinear,
    linear_features,
)
from peftlab.efficient.prefixes import CachedPrefix, put_into_attention
from peftlab.efficient.targets import Undo
from peftlab.errors import ConfigError


class EfficientFineTuningManager(AdaptedModel):
    """Adapters on one model; ranks, counting, saving, loading, `merge` and `remove` are `AdaptedModel`'s.

    Args:
        model: The model; changed in place, and given back by `remove`.

    Example:
        >>> manager = EfficientFineTuningManager(nn.Sequential(nn.Linear(4, 4)))
        >>> manager.apply_lora(target_modules=["0"], rank=2)
        >>> manager.count_trainable_parameters()
        16
    """

    def apply_lora(
        self,
        target_modules: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
    ) -> None:
        """Put LoRA beside linear layers: h = W0 x + (alpha / rank) (B A x + c).

        Args:
            target_modules: Paths, or ends of paths at a dot.
            rank: Rank of the update.
            alpha: Scale of the update: alpha / rank.
            dropout_probability: Dropout on the update's input while training.
            bias: Whether each update has a bias c of its own; the base's biases stay frozen.

        Raises:
            TargetError: A target matches nothing, or no linear layer.
            MethodError: LoRA is on this model already, or a layer cannot be adapted.
            ConfigError: A value is out of its range.
        """
        self._refuse_again("apply_lora", self.lora_layers)

        def make(layer: nn.Module, read_only: bool) -> LoRALinear:
            kind = AttentionLoRA if read_only else LoRALinear
            return kind(layer, rank, alpha, dropout_probability, bias)

        self.lora_layers = self._place(target_modules, make, dropout=bool(dropout_probability))

    def apply_shared_lora(self, target_modules: Sequence[str], lora_layer: LoRALayer) -> None:
        """Put one and the same LoRA beside several linear layers; it is counted and saved once.

        Args:
            target_modules: Paths, or ends of paths at a dot; all of the features of `lora_layer`.
            lora_layer: The LoRA they share, its rank, alpha, dropout and bias with it.

        Raises:
            TargetError: A target matches nothing, or no linear layer.
            MethodError: LoRA is on this model already, or a layer has other features.
        """
        self._refuse_again("apply_shared_lora", self.lora_layers)

        def make(layer: nn.Module, read_only: bool) -> LoRALinear:
            made = (AttentionLoRA if read_only else LoRALinear)(layer)
            made.share(lora_layer)
            return made

        dropout = isinstance(lora_layer.lora_dropout[ADAPTER], nn.Dropout)
        self.lora_layers = self._place(target_modules, make, dropout=dropout)

    def apply_adalora(
        self,
        target_modules: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        dropout_probability: float = 0.1,
        bias: bool = False,
        adaptive_rank: bool = True,
        rank_allocation: str = "uniform",
    ) -> None:
        """Put AdaLoRA beside linear layers: h = W0 x + alpha / (rank + 1e-5) P Lambda Q x.

        Ranks are taken once `begin` has said how long the training is, by `update_and_allocate` in each of its steps.

        Args:
            target_modules: Paths, or ends of paths at a dot.
            rank: Singular triplets of every layer at the start.
            alpha: Scale of the update.
            dropout_probability: Dropout on the update's input while training.
            bias: Must be False: the SVD form has none.
            adaptive_rank: Whether ranks are taken; without it every layer keeps its own.
            rank_allocation: "uniform", "importance" or "magnitude"; see `methods/adalora.py`.

        Raises:
            TargetError: A target matches nothing, or no linear layer.
            MethodError: AdaLoRA is on this model already, or a layer cannot be adapted.
            ConfigError: A value is out of its range.
            UnknownNameError: `rank_allocation` is none of these.
        """
        self._refuse_again("apply_adalora", self.adalora_layers)
        settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout_probability": dropout_probability}
        settings |= {"bias": bias, "adaptive_rank": adaptive_rank, "rank_allocation": rank_allocation}

        def make(layer: nn.Module, read_only: bool) -> AdaLoRALayer:
            kind = AttentionAdaLoRA if read_only else AdaLoRALayer
            return kind(*linear_features(layer), **settings, base_layer=layer)

        self.adalora_layers = self._place(target_modules, make, dropout=bool(dropout_probability))

    def apply_ptuning(
        self,
        num_virtual_tokens: int = 20,
        embedding_dimension: int | None = None,
        hidden_dimension: int = 512,
        dropout_probability: float = 0.1,
        *,
        by_hand: bool = False,
    ) -> None:
        """Put trained virtual tokens in front of what the model reads, in every call of it.

        Args:
            num_virtual_tokens: How many.
            embedding_dimension: Width of the model's embeddings; None is the model's own.
            hidden_dimension: Inner width of the network that makes them.
            dropout_probability: Dropout in that network while training.
            by_hand: Only make them: the model's own code puts them in.

        Raises:
            MethodError: P-tuning is on this model already, or where its tokens belong is not plain; says what to write.
            ConfigError: A value is out of its range, or another width than the model's.
        """
        self._refuse_again("apply_ptuning", self.ptuning_embeddings)
        of_text = isinstance(self.model, PreTrainedModel)
        width = embedding_dimension
        if not by_hand:
            embedding: Any = (virtual_tokens if of_text else plain_tokens).embedding_of(self.model)
            width = int(embedding.weight.shape[1])
        if width is None:
            raise ConfigError(
                "embedding_dimension is needed with by_hand=True: nothing says how wide the embeddings are"
            )
        if embedding_dimension not in (None, width):
            raise ConfigError(
                f"embedding_dimension is {embedding_dimension}, the model's embeddings have {width}"
            )
        made = PTuningEmbedding(num_virtual_tokens, width, hidden_dimension, dropout_probability)
        kind: Any = virtual_tokens.TextTokens if of_text else plain_tokens.PlainTokens
        self._keep("ptuning_embeddings", made, lambda: [] if by_hand else kind(self.model, made).undo)

    def apply_prefix_tuning(
        self,
        num_layers: int,
        num_heads: int,
        head_dimension: int,
        prefix_length: int = 20,
        dropout_probability: float = 0.1,
        *,
        by_hand: bool = False,
    ) -> None:
        """Put trained keys and values in front of those of the text, in every layer's self-attention.

        Args:
            num_layers: The model's layers; of an encoder-decoder, its decoder's.
            num_heads: Its heads of keys and values.
            head_dimension: Features of one head.
            prefix_length: Keys and values per layer.
            dropout_probability: Dropout on them while training.
            by_hand: Only make them: the model's own code puts them in.

        Raises:
            MethodError: Prefix tuning is on this model already, or its attention cannot read one; says what to write.
            ConfigError: A value is out of its range, or a size is not the model's.
        """
        self._refuse_again("apply_prefix_tuning", self.prefix_tuning)
        made = PrefixTuning(num_layers, num_heads, head_dimension, prefix_length, dropout_probability)

        def wire() -> list[Undo]:
            if by_hand:
                return []
            if isinstance(self.model, PreTrainedModel):
                return CachedPrefix(self.model, made).undo
            return put_into_attention(self.model, made)

        self._keep("prefix_tuning", made, wire)


def create_efficient_finetuning_manager(model: nn.Module) -> EfficientFineTuningManager:
    """A manager without adapters yet.

    Args:
        model: The model.

    Returns:
        The manager.
    """
    return EfficientFineTuningManager(model)


def apply_lora_to_model(
    model: nn.Module,
    target_modules: Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    dropout_probability: float = 0.1,
    bias: bool = False,
) -> EfficientFineTuningManager:
    """`EfficientFineTuningManager.apply_lora` in one call.

    Args:
        model: The model; changed in place.
        target_modules: Paths, or ends of paths at a dot.
        rank: Rank of the update.
        alpha: Scale of the update.
        dropout_probability: Dropout while training.
        bias: Whether each update has a bias of its own.

    Returns:
        The manager.
    """
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(target_modules, rank, alpha, dropout_probability, bias)
    return manager


def apply_ptuning_to_model(
    model: nn.Module,
    num_virtual_tokens: int = 20,
    embedding_dimension: int | None = None,
    hidden_dimension: int = 512,
    dropout_probability: float = 0.1,
) -> EfficientFineTuningManager:
    """`EfficientFineTuningManager.apply_ptuning` in one call.

    Args:
        model: The model; changed in place.
        num_virtual_tokens: How many.
        embedding_dimension: Width of the model's embeddings; None is the model's own.
        hidden_dimension: Inner width of the network that makes them.
        dropout_probability: Dropout while training.

    Returns:
        The manager.
    """
    manager = EfficientFineTuningManager(model)
    manager.apply_ptuning(num_virtual_tokens, embedding_dimension, hidden_dimension, dropout_probability)
    return manager


def apply_adalora_to_model(
    model: nn.Module,
    target_modules: Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    dropout_probability: float = 0.1,
    bias: bool = False,
    adaptive_rank: bool = True,
    rank_allocation: str = "uniform",
) -> EfficientFineTuningManager:
    """`EfficientFineTuningManager.apply_adalora` in one call.

    Args:
        model: The model; changed in place.
        target_modules: Paths, or ends of paths at a dot.
        rank: Rank of the update.
        alpha: Scale of the update.
        dropout_probability: Dropout while training.
        bias: Whether each update has a bias of its own.
        adaptive_rank: Whether ranks are taken.
        rank_allocation: "uniform", "importance" or "magnitude".

    Returns:
        The manager.
    """
    manager = EfficientFineTuningManager(model)
    manager.apply_adalora(
        target_modules, rank, alpha, dropout_probability, bias, adaptive_rank, rank_allocation
    )
    return manager


def apply_prefix_tuning_to_model(
    model: nn.Module,
    num_layers: int,
    num_heads: int,
    head_dimension: int,
    prefix_length: int = 20,
    dropout_probability: float = 0.1,
) -> EfficientFineTuningManager:
    """`EfficientFineTuningManager.apply_prefix_tuning` in one call.

    Args:
        model: The model; changed in place.
        num_layers: The model's layers.
        num_heads: Its heads of keys and values.
        head_dimension: Features of one head.
        prefix_length: Keys and values per layer.
        dropout_probability: Dropout while training.

    Returns:
        The manager.
    """
    manager = EfficientFineTuningManager(model)
    manager.apply_prefix_tuning(num_layers, num_heads, head_dimension, prefix_length, dropout_probability)
    return manager
