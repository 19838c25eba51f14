"""Virtual tokens and prefixes of the efficient fine-tuning document: the two things that it has and peft does not.

peft's P-tuning has another network (three layers, no norm), its prefix no dropout. Where these are used in a model is
decided in `virtual_tokens.py`, `plain_tokens.py` and `prefixes.py`.

Source: Liu et al. 2021, arXiv 2103.10385 (P-tuning), in the document's shape: two linear layers and a LayerNorm; Li and
Liang 2021, arXiv 2101.00190, section 4 (prefix tuning).
"""

from __future__ import annotations

import torch
from torch import nn

from peftlab.errors import ConfigError


class PTuningEmbedding(nn.Module):
    """Embeddings of virtual tokens, made by a small network: LayerNorm(W2 relu(W1 e + b1) + b2).

    Args:
        num_virtual_tokens: How many.
        embedding_dimension: Width of the model's embeddings.
        hidden_dimension: The network's inner width.
        dropout_probability: Dropout behind the relu while training.

    Raises:
        ConfigError: A size is below 1, or dropout is not in [0, 1).

    Example:
        >>> made = PTuningEmbedding(num_virtual_tokens=20, embedding_dimension=768, hidden_dimension=512)
        >>> sum(p.numel() for p in made.parameters()), tuple(made(4).shape)
        (804608, (4, 20, 768))
    """

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        embedding_dimension: int = 768,
        hidden_dimension: int = 512,
        dropout_probability: float = 0.1,
    ) -> None:
        super().__init__()
        _check(
            dropout_probability,
            num_virtual_tokens=num_virtual_tokens,
            embedding_dimension=embedding_dimension,
            hidden_dimension=hidden_dimension,
        )
        self.num_virtual_tokens, self.embedding_dimension = num_virtual_tokens, embedding_dimension
        self.virtual_embeddings = nn.Parameter(torch.randn(num_virtual_tokens, embedding_dimension))
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dimension, hidden_dimension),
            nn.ReLU(),
            nn.Dropout(dropout_probability),
            nn.Linear(hidden_dimension, embedding_dimension),
        )
        self.layer_norm = nn.LayerNorm(embedding_dimension)

    def forward(self, batch_size: int) -> torch.Tensor:
        """The virtual tokens, once for every row.

        Args:
            batch_size: Rows.

        Returns:
            (batch, num_virtual_tokens, embedding_dimension); all rows alike, dropout among them.
        """
        tokens: torch.Tensor = self.layer_norm(self.mlp(self.virtual_embeddings))
        return tokens.unsqueeze(0).expand(batch_size, -1, -1)


class PrefixTuning(nn.Module):
    """Keys and values in front of those of the text, in every layer.

    Args:
        num_layers: Layers of the model.
        num_heads: Heads of keys and values (under grouped attention fewer than of queries).
        head_dimension: Features of a head.
        prefix_length: Keys and values of one layer.
        dropout_probability: Dropout on them while training.

    Raises:
        ConfigError: A size is below 1, or dropout is not in [0, 1).

    Example:
        >>> made = PrefixTuning(num_layers=12, num_heads=12, head_dimension=64, prefix_length=20)
        >>> sum(p.numel() for p in made.parameters()), tuple(made.get_prefix_states(0)[0].shape)
        (368640, (20, 12, 64))
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dimension: int,
        prefix_length: int = 20,
        dropout_probability: float = 0.1,
    ) -> None:
        super().__init__()
        _check(
            dropout_probability,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dimension=head_dimension,
            prefix_length=prefix_length,
        )
        self.num_layers, self.num_heads = num_layers, num_heads
        self.head_dimension, self.prefix_length = head_dimension, prefix_length
        self.prefix_embeddings = nn.ParameterList(
            nn.Parameter(torch.randn(prefix_length, 2 * num_heads * head_dimension))
            for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout_probability)

    def get_prefix_states(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one layer, with dropout while training.

        Args:
            layer_idx: The layer, from 0.

        Returns:
            Keys and values, (prefix_length, num_heads, head_dimension) each.

        Raises:
            ConfigError: There is no such layer.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise ConfigError(
                f"there is no layer {layer_idx}: the prefix has layers 0 to {self.num_layers - 1}"
            )
        both = self.dropout(self.prefix_embeddings[layer_idx])
        keys, values = both.view(self.prefix_length, 2, self.num_heads, self.head_dimension).unbind(1)
        return keys, values


def _check(dropout: float, **sizes: int) -> None:
    """Refuse values out of their range."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number from 1, not {value!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout_probability must be in [0, 1), not {dropout!r}")
