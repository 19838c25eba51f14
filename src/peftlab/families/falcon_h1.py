"""Falcon-H1: short sequences fit one chunk of its scan."""

TWIN = {"mamba_chunk_size": 256}
