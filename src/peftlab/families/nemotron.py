"""Nemotron: the library's default config leaves the number of key-value heads open."""

CONFIG = {"num_key_value_heads": 8}
