"""The platform that FastDeploy runs on: CUDA, here on any machine."""

from .base import _Backend
from .cuda import CUDAPlatform

current_platform = CUDAPlatform()

__all__ = ["CUDAPlatform", "_Backend", "current_platform"]
