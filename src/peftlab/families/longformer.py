"""Longformer: its attention window is a list, one entry for each layer; rows are padded to a whole window."""

TWIN = {"attention_window": [4, 4, 4, 4]}
