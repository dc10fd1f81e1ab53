"""Models: small built-in ones, any configuration of `transformers`, or a user's own function."""

from msfusion.models.build import BUILT_IN, build_model
from msfusion.models.spec import ModelSpec

__all__ = ["BUILT_IN", "ModelSpec", "build_model"]
