"""Swin: a picture of two stages, whose windows divide it."""

TWIN = {
    "image_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "embed_dim": 32,
    "hidden_size": 64,
    "num_layers": 2,
    "stage_names": ["stem", "stage1", "stage2"],
}
