"""CAE v2 pretraining from cached CLIP targets.

Importing this package loads nothing heavy: torch, timm and zarr are imported by the modules that use them.
"""

from cae2pipe.version import __version__

__all__ = ["__version__"]
