"""A user's optimizer in the form that the workers receive and rebuild; see `kithara_ray.train.optimizer`."""

from typing import Any

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.runtime import without_tensorflow


def portable(optimizer: Any) -> tuple[str, Any]:
    """Serialise an optimizer: ("keras", its configuration) or ("optax", the transformation itself).

    Raises:
        ConfigError: it is neither a Keras optimizer nor an optax transformation.
        UnsupportedError: it refers to variables, which do not exist yet.
    """
    if hasattr(optimizer, "stateless_apply") and hasattr(optimizer, "get_config"):
        import keras

        with without_tensorflow():
            serialized: Any = keras.optimizers.serialize(optimizer)
        variables, pattern = keras_compat.excluded_from_weight_decay(optimizer)
        if variables:
            raise UnsupportedError(
                "optimizer.exclude_from_weight_decay(var_list=...): the variables are made on the workers; give "
                "var_names=[...], patterns of Hugging Face's tensor names such as 'norm' or 'embed_tokens'"
            )
        # Same value as train.optimizer.NO_DECAY, a module that a driver does not import.
        return "keras", serialized | ({"exclude_from_weight_decay": pattern} if pattern else {})
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return "optax", optimizer
    raise ConfigError(
        f"optimizer must be a keras.optimizers.Optimizer or an optax.GradientTransformation, "
        f"got {type(optimizer).__name__}"
    )
