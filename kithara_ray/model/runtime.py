"""Process start-up for a process that will run KerasHub on JAX.

Only entry points and worker start-up call `prepare`: it changes the environment and `sys.modules`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from kithara_ray.errors import ConfigError
from kithara_ray.model import keras_compat

# KerasHub imports TensorFlow for its preprocessors, which are not used here: 3 s and 0.6 GB a process.
_UNUSED = ("tensorflow", "tensorflow_text")


def prepare() -> None:
    """Select Keras' JAX backend and keep TensorFlow out of this process.

    Raises:
        ConfigError: Keras was imported before with another backend.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    for name in _UNUSED:
        if name not in sys.modules:
            sys.modules[name] = None
    import keras

    if keras.backend.backend() != "jax":
        raise ConfigError(
            f"keras was imported with the {keras.backend.backend()!r} backend before the worker started; "
            "set KERAS_BACKEND=jax in the environment of the cluster's nodes"
        )


def keep_compiled(platform: str) -> None:
    """Keep compiled programs, so that a run that starts again does not compile again.

    Where JAX_COMPILATION_CACHE_DIR says; else on a TPU in the cache directory of this library. JAX writes what the
    run's first process has compiled: a shared or `gs://` directory serves all hosts, one on each host's disk the first
    alone. Programs for a CPU are kept only where that variable says: they hold that CPU's instructions, and a home
    directory may be shared with another.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None and platform == "tpu":
        from kithara_ray.storage.urls import cache_dir

        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Keras asks for TensorFlow when it serialises, whatever its backend: 4 s and a page of messages for nothing.

    Inside, it is not found, unless it is loaded already; afterwards nothing has changed.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    with keras_compat.tensorflow_asked_anew():
        sys.modules.update(dict.fromkeys(hidden))
        try:
            yield
        finally:
            for name in hidden:
                del sys.modules[name]
