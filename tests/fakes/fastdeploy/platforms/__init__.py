"""The platform that FastDeploy runs on: CUDA, here on any machine."""

from .base import Platform, _Backend
from .cuda import CUDAPlatform

current_platform = CUDAPlatform()

__all__ = ["CUDAPlatform", "Platform", "_Backend", "current_platform"]
