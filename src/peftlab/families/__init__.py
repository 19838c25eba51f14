"""Exceptions of architectures: a few lines of data each, where structure and experiment alone do not suffice.

A leaf is named after the config's model type and may hold:

- `TWIN`: attributes of a twin's config that the table of sizes does not get right.
- `ALSO`: the same for further twins, whose makes of blocks the first does not have.
- `inputs(model, inputs)`: what its forward takes beside or instead of the usual inputs.
"""
