"""Process start-up for a process that will run KerasHub on JAX.

Only entry points and worker start-up call `prepare`: it changes the environment and `sys.modules`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from kithara_ray.errors import ConfigError
from kithara_ray.model import keras_compat

# KerasHub imports TensorFlow for its preprocessors, which this library does not use: 3 s and 0.6 GB per process.
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
    """Keep compiled programs on disk, so that a restarted run does not compile again.

    JAX_COMPILATION_CACHE_DIR names the directory. Without it, a TPU uses this library's cache directory. JAX writes
    only the programs that the run's first process compiled. A shared or `gs://` directory therefore serves all hosts; a
    directory on each host's disk serves only the first. A CPU's programs are kept only if that variable is set: they
    hold that CPU's instructions, and different machines may share a home directory.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None and platform == "tpu":
        from kithara_ray.storage.urls import cache_dir

        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Hide TensorFlow from Keras inside this context, unless it is loaded already.

    Whatever its backend, Keras looks for TensorFlow when it serialises. That import costs 4 s and a page of messages
    for nothing. On exit, everything is as before.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    with keras_compat.tensorflow_asked_anew():
        sys.modules.update(dict.fromkeys(hidden))
        try:
            yield
        finally:
            for name in hidden:
                del sys.modules[name]
