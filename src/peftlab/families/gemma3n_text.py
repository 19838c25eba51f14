"""Gemma 3n: the last layers share keys and values with earlier ones, which a short twin does not have."""

TWIN = {"num_kv_shared_layers": 0}
