"""timm backbones, one file per paper. Importing this package registers them with timm."""

from .vmamba import VMamba

__all__ = ["VMamba"]
