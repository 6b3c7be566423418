"""The directory that keeps the tests' compiled programs between runs."""

import hashlib
import importlib.metadata
import re
import shutil
from pathlib import Path

_MOST_BYTES = 2 << 30


def kept_programs() -> Path:
    """A directory for this processor's programs, emptied when it has grown large."""
    flags = re.search(r"^(flags|Features)\b.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    of_this = f"{flags and flags[0]} {importlib.metadata.version('jaxlib')}"
    kept = Path.home() / ".cache" / "kithara_ray" / "tests" / hashlib.sha256(of_this.encode()).hexdigest()[:12]
    kept.mkdir(parents=True, exist_ok=True)
    if sum(file.stat().st_size for file in kept.iterdir()) > _MOST_BYTES:
        shutil.rmtree(kept)
        kept.mkdir()
    return kept
