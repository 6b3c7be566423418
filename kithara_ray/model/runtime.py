"""Process start-up for a process that will run KerasHub on JAX.

Only entry points and worker start-up call `prepare`: it changes the environment and `sys.modules`.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kithara_ray.errors import ConfigError
from kithara_ray.model import keras_compat

# KerasHub imports TensorFlow for its preprocessors, which this library does not use: 3 s and 0.6 GB per process.
_UNUSED = ("tensorflow", "tensorflow_text")
# Keras imports it for galleries of images: 0.6 s of processor time per process. A user's callback may import it later.
_UNUSED_BY_KERAS = ("matplotlib",)
# Programs that took longer than this to compile are kept: decoding's are many and small.
_KEPT_FROM_S = 0.1


def prepare() -> None:
    """Select Keras' JAX backend and keep TensorFlow out of this process.

    Raises:
        ConfigError: Keras was imported before with another backend.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    _hide([name for name in _UNUSED if name not in sys.modules])
    with _hidden(_UNUSED_BY_KERAS):
        import keras

    if keras.backend.backend() != "jax":
        raise ConfigError(
            f"keras was imported with the {keras.backend.backend()!r} backend before the worker started; "
            "set KERAS_BACKEND=jax in the environment of the cluster's nodes"
        )


def keep_compiled(platform: str) -> None:
    """Keep compiled programs on disk, so that the next run of the same step does not compile again.

    JAX_COMPILATION_CACHE_DIR names the directory. Without it, programs are kept in this library's cache directory. JAX
    writes only the programs that the run's first process compiled. A shared or `gs://` directory therefore serves all
    hosts; a directory on each host's disk serves only the first. A CPU's programs hold that CPU's instructions, and
    different machines may share a home directory, so each kind of CPU has a directory of its own.
    """
    import jax

    config: Any = jax.config  # its settings are attributes made at run time
    if config.jax_compilation_cache_dir is None:
        from kithara_ray.storage.urls import cache_dir

        kept = cache_dir() / "compiled"
        if platform == "cpu":
            kind = _kind_of_cpu()
            if kind is None:
                return
            kept /= f"cpu-{kind}"
        config.update("jax_compilation_cache_dir", str(kept))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            config.update("jax_persistent_cache_min_compile_time_secs", _KEPT_FROM_S)


def _kind_of_cpu() -> str | None:
    """Name this machine's CPU by its instructions and model; None where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    named = ("flags", "features", "model name", "cpu part")
    told = sorted({line for line in lines if line.partition(":")[0].strip().lower() in named})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16] if told else None


def _hide(names: Iterable[str]) -> None:
    """Make imports of these modules fail, as if they were not installed."""
    modules: Any = sys.modules  # an entry may be None, which typeshed does not know
    modules.update(dict.fromkeys(names))


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Hide TensorFlow from Keras inside this context, unless it is loaded already.

    Whatever its backend, Keras looks for TensorFlow when it serialises. That import costs 4 s and a page of messages
    for nothing. On exit, everything is as before.
    """
    with keras_compat.tensorflow_asked_anew(), _hidden(_UNUSED):
        yield


@contextlib.contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Let imports of these modules fail inside this context, unless they are loaded already."""
    hidden = [name for name in names if name not in sys.modules]
    _hide(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
