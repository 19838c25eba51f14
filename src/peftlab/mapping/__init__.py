"""From a live model to its FamilyMap: blocks by structure, roles proved by experiment on a tiny twin."""

from peftlab.mapping.assembly import map_model
from peftlab.mapping.structure import unwrap

__all__ = ["map_model", "unwrap"]
