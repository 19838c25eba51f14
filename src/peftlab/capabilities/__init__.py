"""Which methods work on which models, and with which of a method's promises, found by trying each on tiny random models."""

from peftlab.capabilities.bases import BASES, MODELS, Base
from peftlab.capabilities.proving import (
    FAILED,
    NOT_APPLICABLE,
    PROPERTIES,
    REFUSED,
    WORKS,
    Capability,
    prove_methods,
    try_method,
    try_property,
)

__all__ = [
    "BASES",
    "FAILED",
    "MODELS",
    "NOT_APPLICABLE",
    "PROPERTIES",
    "REFUSED",
    "WORKS",
    "Base",
    "Capability",
    "prove_methods",
    "try_method",
    "try_property",
]
