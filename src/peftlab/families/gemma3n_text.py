"""Gemma 3n: the last layers take keys and values from earlier ones of their kind; a second twin has such layers."""

TWIN = {"num_kv_shared_layers": 0}
ALSO = (
    {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
)
