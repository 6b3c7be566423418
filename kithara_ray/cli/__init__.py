"""The command line."""

from kithara_ray.cli.app import main

__all__ = ["main"]
