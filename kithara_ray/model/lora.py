"""LoRA as PEFT defines it, on built Keras layers.

    I  in     width of what the layer contracts, its input dims flattened
    O  out    width of what it gives, its output dims flattened
    R  rank

    y = layer(x) + scale * (dropout(x_I) @ A_RI.T) @ B_OR.T        Hu et al. 2021, arXiv:2106.09685

The factors are stored in PEFT's orientation, A (R, I) and B (O, R), float32, so what is trained is what is saved.
A layer is adapted by giving the *built* layer the class of a LoRA subclass: every reference to it, in the functional
graph and in its block, stays valid.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.model.dropout import dropped
from kithara_ray.model.stack import Chain
from kithara_ray.model.targets import check_targets, linear
from kithara_ray.model.ports import Port

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Target:
    """One adapted layer.

    Attributes:
        module: the HF module, e.g. `model.layers.0.self_attn.q_proj`.
        layer: the Keras layer.
        initialiser: of A's first values, "kaiming" or "gaussian"; B's are zeros.
        lora_A, lora_B: the layer's `keras.Variable`s.
    """

    module: str
    layer: keras.layers.Layer
    initialiser: str
    lora_A: keras.Variable
    lora_B: keras.Variable

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """By the names that an adapter file gives them."""
        return {f"{self.module}.lora_A.weight": self.lora_A, f"{self.module}.lora_B.weight": self.lora_B}


def _contracted_dims(layer) -> int:
    """How many trailing dims of its input a layer contracts."""
    if isinstance(layer, keras.layers.Dense):
        return 1
    inputs, rest = layer.equation.split(",")
    kernel, output = rest.split("->")
    contracted = "".join(label for label in inputs if label in kernel and label not in output)
    produced = "".join(label for label in output if label in kernel and label not in inputs)
    batch = inputs.removesuffix(contracted)
    if batch + contracted != inputs or batch + produced != output:
        raise UnsupportedError(f"layer {layer.path}: equation {layer.equation!r} is not a linear map of trailing dims")
    return len(contracted)


class _SidePath:
    """Mixed into Dense and EinsumDense; `call` keeps the signature that Keras has cached for the layer."""

    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        contracted = self._lora_contracted_dims
        batch_shape = ops.shape(inputs)[: len(inputs.shape) - contracted]
        x_I = ops.reshape(inputs, (*batch_shape, self._lora_in_dim))
        x_I = dropped(ops.cast(x_I, self.compute_dtype), self._lora_dropout, self._lora_number)
        x_R = ops.matmul(x_I, ops.transpose(self.lora_A))
        delta_O = ops.matmul(x_R, ops.transpose(self.lora_B)) * self._lora_scale
        return ops.add(y, ops.reshape(delta_O, ops.shape(y)))


class _LoraDense(_SidePath, keras.layers.Dense):
    pass


class _LoraEinsumDense(_SidePath, keras.layers.EinsumDense):
    pass


_ADAPTED = {keras.layers.Dense: _LoraDense, keras.layers.EinsumDense: _LoraEinsumDense}


def linear_modules(backbone, ports: Sequence[Port]) -> dict[str, keras.layers.Layer]:
    """HF module name -> Keras layer, for every linear layer of the backbone.

    Layers are matched to names by the identity of their kernel: variable paths are not unique in every family.
    """
    name_of = {id(port.variable): port.hf_name for port in ports}
    layers = [layer for layer in backbone._flatten_layers() if type(layer) in _ADAPTED]
    named = {name_of[id(layer._kernel)]: layer for layer in layers if id(layer._kernel) in name_of}
    modules = {name.removesuffix(_WEIGHT): named[name] for name in name_of.values() if name in named}
    return {module: modules[module] for module in linear(_modules(ports)) if module in modules}


def _modules(ports: Sequence[Port]) -> list[str]:
    """HF modules with a matrix."""
    pieces = [piece for port in ports for piece in port.pieces if len(piece.shape) > 1]
    return [piece.hf_name.removesuffix(_WEIGHT) for piece in pieces if piece.hf_name.endswith(_WEIGHT)]


def inject(backbone, ports: Sequence[Port], config: LoraConfig) -> list[Target]:
    """Adapt every linear layer that `config` targets.

    Raises:
        ConfigError: a target module matches nothing.
        UnsupportedError: one matches experts or a router; a matched layer has an activation or is not a linear map.
    """
    check_targets(config, _modules(ports))
    layers = linear_modules(backbone, ports)
    return [_adapt(module, layer, config) for module, layer in layers.items() if config.matches(module)]


def _adapt(module: str, layer, config: LoraConfig) -> Target:
    if keras.activations.serialize(layer.activation) not in ("linear", None):
        raise UnsupportedError(f"{module}: its layer applies an activation, LoRA beside it would not be PEFT's")
    contracted = _contracted_dims(layer)
    kernel_size = math.prod(layer._kernel.shape)
    if isinstance(layer, keras.layers.Dense):
        in_dim = layer._kernel.shape[0]
    else:
        kernel_labels = layer.equation.split(",")[1].split("->")[0]
        output = layer.equation.split("->")[1]
        in_dim = math.prod(
            size for label, size in zip(kernel_labels, layer._kernel.shape, strict=True) if label not in output
        )
    out_dim = kernel_size // in_dim
    rank = config.rank_of(module)
    layer.__class__ = _ADAPTED[type(layer)]
    layer._tracker.unlock()
    layer.lora_A = layer.add_weight(name="lora_A", shape=(rank, in_dim), dtype="float32", initializer="zeros")
    layer.lora_B = layer.add_weight(name="lora_B", shape=(out_dim, rank), dtype="float32", initializer="zeros")
    layer._tracker.lock()
    layer._lora_contracted_dims, layer._lora_in_dim = contracted, in_dim
    layer._lora_scale, layer._lora_dropout = config.scale_of(module), config.lora_dropout
    layer._lora_number = zlib.crc32(module.encode())
    layer._kernel.trainable = False
    initialiser = "gaussian" if config.init_lora_weights == "gaussian" else "kaiming"
    return Target(module, layer, initialiser, layer.lora_A, layer.lora_B)


@dataclass(frozen=True)
class FactorSlot:
    """One trained array: a factor, or the same factor of every step of the scan, stacked.

    Attributes:
        names: adapter tensor names, one or one for each step.
        variables: theirs, in the same order.
        initialiser: of their first values: "zeros", "kaiming" or "gaussian".
        stacked: whether the array's first dim counts the steps.
    """

    names: tuple[str, ...]
    variables: tuple[keras.Variable, ...]
    initialiser: str
    stacked: bool

    @property
    def key(self) -> str:
        """What the array is called in a state: the name of its first factor."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        one = tuple(self.variables[0].shape)
        return (len(self.names), *one) if self.stacked else one

    def initial(self, name: str, seed: int) -> np.ndarray:
        """PEFT's initial values of one of its factors, float32: A uniform in +-1/sqrt(I) (kaiming with a = sqrt 5) or
        normal with deviation 1/R, B zero.

        A factor's depend on the seed and its name alone, not on the mesh, the stacking or the other targets.
        """
        shape = self.shape[self.stacked :]
        # Drawn on the host: XLA takes 20 s to compile the drawing of a few hundred factors by name.
        draws = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        if self.initialiser == "zeros":
            return np.zeros(shape, np.float32)
        if self.initialiser == "gaussian":
            return draws.standard_normal(shape, np.float32) / np.float32(shape[0])
        unit = draws.random(shape, np.float32)
        return (2 * unit - 1) / np.float32(math.sqrt(shape[1]))


def factor_slots(targets: Sequence[Target], chain: Chain | None) -> list[FactorSlot]:
    """The trained arrays: factors of the chain's scanned blocks stacked by step, the others by themselves.

    Args:
        chain: None stacks nothing.
    """
    factors = {
        id(variable): (name, variable, target.initialiser if variable is target.lora_A else "zeros")
        for target in targets
        for name, variable in target.variables.items()
    }
    peers = chain.peers() if chain is not None else {}
    made = []
    for number in factors:
        group = [factors[id(variable)] for variable in peers.get(number, ())] or [factors[number]]
        names, variables, initialisers = zip(*group, strict=True)
        if variables[0] is factors[number][1]:
            made.append(FactorSlot(names, variables, initialisers[0], stacked=number in peers))
    return made
