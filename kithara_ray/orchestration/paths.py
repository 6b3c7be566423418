"""Local paths as the driver means them."""

import os


def absolute(path: str) -> str:
    """Workers and the coordinator run in other directories: a local path is made absolute where it is written."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
