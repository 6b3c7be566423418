"""Keras and optax optimizers behind one small interface of pure functions.

The driver sends a Keras optimizer to the workers as its configuration, and an optax transformation as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import keras
import numpy as np

from kithara_ray.train import schedule  # noqa: F401 - Keras finds its class when a configuration names it

Params = dict[str, jax.Array]


class Optimizer(Protocol):
    """The interface that the step needs of an optimizer; every method is pure and may be traced."""

    def init(self, params: Params) -> Any: ...

    def update(self, grads: Params, state: Any, params: Params) -> tuple[Params, Any]: ...

    def learning_rate(self, state: Any) -> jax.Array:
        """float32 scalar; NaN if the optimizer does not report it."""
        ...


# Key in a serialised optimizer for the argument of `exclude_from_weight_decay(var_names=...)`, which Keras omits.
NO_DECAY = "exclude_from_weight_decay"

# Keras optimizers that update each element separately, so that arrays may be stacked; the others need whole tensors.
_ELEMENTWISE = {"Adadelta", "Adagrad", "Adam", "AdamW", "Ftrl", "Lion", "Nadam", "RMSprop", "SGD"}


def is_elementwise(kind: str, value: Any) -> bool:
    """True if an optimizer updates each element from that element only, or from the norm over all of them.

    Args:
        kind, value: ("keras", its serialised configuration) or ("optax", a transformation; it is a closed function).
    """
    if kind != "keras" or value["class_name"] not in _ELEMENTWISE or value["config"].get("clipnorm") is not None:
        return False
    # A number in the pattern may distinguish one block from another.
    return re.search(r"\d", value.get(NO_DECAY) or "") is None


@dataclass
class KerasOptimizer:
    """A Keras optimizer over named arrays, through its `stateless_apply`. Call `init` first.

    Attributes:
        config: the result of `keras.optimizers.serialize`, plus NO_DECAY: a pattern of tensor names.
    """

    config: Mapping[str, Any]

    def init(self, params: Params) -> dict[str, jax.Array]:
        """The optimizer's variables by their paths, which are their names in a checkpoint."""
        # Make a new optimizer each time: under a trace, its variables' first values belong to that trace.
        config = dict(self.config)
        no_decay = config.pop(NO_DECAY, None)
        self._optimizer = keras.optimizers.deserialize(config)
        if no_decay is not None:
            self._optimizer.exclude_from_weight_decay(var_names=[no_decay])
        self._order = list(params)
        self._optimizer.build([keras.Variable(value, name=name.replace("/", "_")) for name, value in params.items()])
        # Drop the optimizer's own name, which Keras numbers within a process: adamw, adamw_1.
        prefix = f"{self._optimizer.name}/"
        self._paths = [variable.path.removeprefix(prefix) for variable in self._optimizer.variables]
        assert len(set(self._paths)) == len(self._paths), "two of the optimizer's variables have one path"
        return self._named(variable.value for variable in self._optimizer.variables)

    def update(self, grads: Params, state, params: Params):
        order = self._order
        new_params, new_state = self._optimizer.stateless_apply(
            self._values(state), [grads[name] for name in order], [params[name] for name in order]
        )
        return dict(zip(order, new_params, strict=True)), self._named(new_state)

    def learning_rate(self, state):
        pairs = list(zip(self._optimizer.variables, self._values(state), strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            return jax.numpy.asarray(self._optimizer.learning_rate, "float32")

    def _named(self, values) -> dict[str, jax.Array]:
        return dict(zip(self._paths, values, strict=True))

    def _values(self, state: dict[str, jax.Array]) -> list[jax.Array]:
        return [state[path] for path in self._paths]


@dataclass
class OptaxOptimizer:
    """An optax gradient transformation."""

    transformation: Any

    def init(self, params: Params):
        return self.transformation.init(params)

    def update(self, grads: Params, state, params: Params):
        import optax

        updates, state = self.transformation.update(grads, state, params)
        updated: Any = optax.apply_updates(params, updates)
        return updated, state

    def learning_rate(self, state):
        """Known only with `optax.inject_hyperparams`; an optax schedule is a closed function."""
        hyperparams = getattr(state, "hyperparams", None) or {}
        return jax.numpy.asarray(hyperparams.get("learning_rate", np.nan), "float32")
