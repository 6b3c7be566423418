"""LoRA as PEFT defines it, on built Keras layers.

    I  in     input width: the contracted dims, flattened
    O  out    output width: the produced dims, flattened
    R  rank

    y = layer(x) + scale * (dropout(x_I) @ A_RI.T) @ B_OR.T        Hu et al. 2021, arXiv:2106.09685
    y = m_O / ||V_OI|| * (V_OI @ x), V = W + scale * B @ A         DoRA, Liu et al. 2024, arXiv:2402.09353

The factors keep PEFT's orientation, A (R, I) and B (O, R), float32, so training and saving use the same arrays. An
adapted layer is the *built* layer with its class changed to a LoRA subclass. Every reference to it, in the functional
graph and in its block, stays valid.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.adapter import A_SUFFIX, B_SUFFIX, BIAS_SUFFIX, MAGNITUDE_SUFFIX, LoraConfig
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks.dropout import dropped
from kithara_ray.model.blocks.stack import Chain
from kithara_ray.model.families.ports import Port
from kithara_ray.model.identity import IdentityMap, IdentitySet
from kithara_ray.model.lora.targets import linear

_WEIGHT = ".weight"
ops: Any = keras.ops  # Keras' annotations admit None and every backend's tensors


@dataclass(frozen=True)
class Target:
    """One adapted layer.

    Attributes:
        module: the HF module, e.g. `model.layers.0.self_attn.q_proj`.
        layer: the Keras layer.
        initialiser: kind of A's initial values, "kaiming" or "gaussian". B starts at zeros, the magnitude at row norms.
        lora_A, lora_B, magnitude, bias: the layer's `keras.Variable`s. `magnitude` is None without DoRA; `bias`, the
            bias of lora_B, is None without lora_bias.
        is_target: False for a layer that has the side path only so that its block stays like the others. Its factors
            are zero, and nothing of it is trained or saved.
        rank: rank of the factors; experts have as many rows of A each.
        by_step: True if the factors are as large as weights, as those of experts. They are then gathered for one step
            of the scan at a time.
    """

    module: str
    layer: keras.layers.Layer
    initialiser: str
    lora_A: keras.Variable
    lora_B: keras.Variable
    magnitude: keras.Variable | None
    bias: keras.Variable | None
    is_target: bool = True
    rank: int = 1
    by_step: bool = False

    @property
    def variables(self) -> dict[str, tuple[keras.Variable, str]]:
        """(variable, initialiser) pairs by their names in an adapter file."""
        made = {
            A_SUFFIX: (self.lora_A, self.initialiser),
            B_SUFFIX: (self.lora_B, "zeros"),
            MAGNITUDE_SUFFIX: (self.magnitude, "norms"),
            BIAS_SUFFIX: (self.bias, "zeros"),
        }
        return {self.module + suffix: pair for suffix, pair in made.items() if pair[0] is not None}


@dataclass(frozen=True)
class Place:
    """A place for factors in the built model.

    Attributes:
        kernel: the variable of the weight that they adapt, or the first of several.
        adapt: adds them, given the module or parameter, the one whose rank and scale they get, and the config.
    """

    kernel: keras.Variable
    adapt: Callable[[str, str, LoraConfig], Target]


@dataclass(frozen=True)
class LinearMap:
    """The linear map of a layer's kernel, one letter per dim: "mnh" with contracted "m" and produced "nh".

    Attributes:
        contracted: the input's trailing dims, in order.
        produced: the output's trailing dims, in order.
        shape: the kernel's shape.
    """

    kernel: str
    contracted: str
    produced: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> "LinearMap":
        shape = tuple(layer.kernel.shape)
        if isinstance(layer, keras.layers.Dense):
            return cls("io", "i", "o", shape)
        inputs, rest = layer.equation.split(",")
        kernel, output = rest.split("->")
        contracted = "".join(label for label in inputs if label in kernel and label not in output)
        produced = "".join(label for label in output if label in kernel and label not in inputs)
        batch = inputs.removesuffix(contracted)
        if batch + contracted != inputs or batch + produced != output:
            raise UnsupportedError(
                f"layer {layer.path}: equation {layer.equation!r} is not a linear map of trailing dims"
            )
        return cls(kernel, contracted, produced, shape)

    def dims(self, labels: str) -> tuple[int, ...]:
        """Sizes of the kernel dims with these labels."""
        return tuple(self.shape[self.kernel.index(label)] for label in labels)

    @property
    def in_dim(self) -> int:
        return math.prod(self.dims(self.contracted))

    @property
    def out_dim(self) -> int:
        return math.prod(self.dims(self.produced))

    def squares_O(self, kernel: jax.Array) -> jax.Array:
        """The squared norm of each row of W_OI, float32."""
        axes = tuple(self.kernel.index(label) for label in self.contracted)
        squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes)
        left = [label for label in self.kernel if label not in self.contracted]
        return jnp.transpose(squares, [left.index(label) for label in self.produced]).reshape(self.out_dim)

    def norms_O(self, kernel: jax.Array) -> jax.Array:
        """The norm of each row of W_OI, float32: DoRA's initial magnitudes."""
        return jnp.sqrt(self.squares_O(kernel))

    def adapted_norms_O(self, kernel: jax.Array, a_RI: jax.Array, b_OR: jax.Array, scale: float) -> jax.Array:
        """The norm of each row of W + scale * B @ A, float32, from products with R columns; the sum is never built.

        ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b^T
        """
        kernel, a_RI, b_OR = (array.astype(jnp.float32) for array in (kernel, a_RI, b_OR))
        rank, exact = a_RI.shape[0], jax.lax.Precision.HIGHEST
        a_R = a_RI.reshape(rank, *self.dims(self.contracted))
        # No label is "Z": Keras' equations use small letters.
        wa = jnp.einsum(f"{self.kernel},Z{self.contracted}->{self.produced}Z", kernel, a_R, precision=exact)
        gram_RR = jnp.matmul(a_RI, a_RI.T, precision=exact)
        quadratic_OR = jnp.matmul(b_OR, gram_RR, precision=exact)
        cross_OR = 2 * scale * wa.reshape(self.out_dim, rank) + scale**2 * quadratic_OR
        return jnp.sqrt(self.squares_O(kernel) + jnp.sum(b_OR * cross_OR, axis=-1))


if TYPE_CHECKING:
    _Linear = keras.layers.Dense
else:
    _Linear = object


class _SidePath(_Linear):
    """A mixin for Dense and EinsumDense; `call` keeps the signature that Keras has cached for the layer."""

    lora_map: LinearMap
    lora_A: keras.Variable
    lora_B: keras.Variable
    lora_bias: keras.Variable | None
    lora_magnitude: keras.Variable | None
    lora_scale: float
    lora_dropout: float
    lora_number: int

    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        linear = self.lora_map
        batch_shape = ops.shape(inputs)[: len(inputs.shape) - len(linear.contracted)]
        whole_I = ops.cast(ops.reshape(inputs, (*batch_shape, linear.in_dim)), self.compute_dtype)
        x_I = dropped(whole_I, self.lora_dropout, self.lora_number)
        x_R = ops.matmul(x_I, ops.transpose(self.lora_A))
        product = ops.matmul(x_R, ops.transpose(self.lora_B))
        if self.lora_bias is not None:
            product = ops.add(product, self.lora_bias)
        delta = ops.reshape(product * self.lora_scale, ops.shape(y))
        if self.lora_magnitude is None:
            return ops.add(y, delta)
        # PEFT scales the kernel's output for the dropped input, and adds the layer's output for the whole input.
        scaled = y if x_I is whole_I else super().call(ops.reshape(x_I, ops.shape(inputs)), training=training)
        return self._with_magnitude(y, scaled, delta)

    def _with_magnitude(self, y, scaled, delta):
        assert self.lora_magnitude is not None
        """y + (m / norm - 1) * (scaled - bias) + m / norm * delta, in float32, rounded once to y's dtype."""
        with keras_compat.without_autocast():
            # The norm is a constant to the gradient, as in section 4.3 of the paper and in PEFT.
            held: list[Any] = [self.kernel, self.lora_A, self.lora_B]
            kernel, a_RI, b_OR = (jax.lax.stop_gradient(variable.value) for variable in held)
            norms_O = self.lora_map.adapted_norms_O(kernel, a_RI, b_OR, self.lora_scale)
            ratio = (self.lora_magnitude.value / norms_O).reshape(self.lora_map.dims(self.lora_map.produced))
        scaled = scaled.astype(jnp.float32)
        if self.bias is not None:
            scaled = scaled - self.bias.value.astype(jnp.float32)
        return (y.astype(jnp.float32) + (ratio - 1) * scaled + ratio * delta.astype(jnp.float32)).astype(y.dtype)


class _LoraDense(_SidePath, keras.layers.Dense):
    pass


class _LoraEinsumDense(_SidePath, keras.layers.EinsumDense):
    pass


_ADAPTED = {keras.layers.Dense: _LoraDense, keras.layers.EinsumDense: _LoraEinsumDense}


def linear_modules(backbone, ports: Sequence[Port], hf_config: Mapping) -> dict[str, keras.layers.Layer]:
    """Map HF module name to Keras layer, for every linear layer of the backbone.

    Args:
        hf_config: the base's config.json.
    """
    modules = {name.removesuffix(_WEIGHT): layer for name, layer in matrices_of(backbone, ports).items()}
    return {module: modules[module] for module in linear(_modules(ports), hf_config) if module in modules}


def matrices_of(backbone, ports: Sequence[Port]) -> dict[str, keras.layers.Layer]:
    """Map a matrix' tensor to the Keras layer that multiplies with it, in the order of `ports`.

    The kernel's identity matches a layer to its name: variable paths are not unique in every family.
    """
    name_of = IdentityMap((port.variable, port.hf_name) for port in ports)
    layers = [layer for layer in keras_compat.all_layers(backbone) if type(layer) in _ADAPTED]
    named = {name_of[layer.kernel]: layer for layer in layers if layer.kernel in name_of}
    return {name: named[name] for name in name_of.values() if name in named}


def _modules(ports: Sequence[Port]) -> list[str]:
    """HF modules that have a matrix."""
    pieces = [piece for port in ports for piece in port.pieces if len(piece.shape) > 1]
    return [piece.hf_name.removesuffix(_WEIGHT) for piece in pieces if piece.hf_name.endswith(_WEIGHT)]


def initialiser_of(config: LoraConfig) -> str:
    """The kind of A's initial values."""
    return "gaussian" if config.init_lora_weights == "gaussian" else "kaiming"


def place_of(layer) -> Place:
    """The place for factors of a linear layer."""
    return Place(layer.kernel, lambda module, like, config: _adapt(module, layer, like, config))


def _adapt(module: str, layer, like: str, config: LoraConfig) -> Target:
    """Adapt one layer with the rank and scale of module `like`, which for a target is the module itself."""
    if keras.activations.serialize(layer.activation) not in ("linear", None):
        raise UnsupportedError(f"{module}: its layer applies an activation, so LoRA would not compute what PEFT's does")
    linear, rank = LinearMap.of(layer), config.rank_of(like)
    layer.__class__ = _ADAPTED[type(layer)]
    float32 = {"dtype": "float32", "initializer": "zeros"}
    with keras_compat.adding_weights(layer):
        layer.lora_A = layer.add_weight(name="lora_A", shape=(rank, linear.in_dim), **float32)
        layer.lora_B = layer.add_weight(name="lora_B", shape=(linear.out_dim, rank), **float32)
        layer.lora_magnitude = layer.lora_bias = None
        if config.use_dora:
            layer.lora_magnitude = layer.add_weight(name="lora_magnitude", shape=(linear.out_dim,), **float32)
        if config.lora_bias:
            layer.lora_bias = layer.add_weight(name="lora_bias", shape=(linear.out_dim,), **float32)
    layer.lora_map = linear
    layer.lora_scale, layer.lora_dropout = config.scale_of(like), config.lora_dropout
    layer.lora_number = zlib.crc32(module.encode())
    layer.kernel.trainable = False
    variables = layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.lora_bias
    return Target(module, layer, initialiser_of(config), *variables, module == like, rank)


@dataclass(frozen=True)
class FactorSlot:
    """One trained array: a factor, or the same factor of the scan steps that have it, stacked.

    Attributes:
        names: adapter tensor names: one, or one for each of these steps.
        variables: the variables of these factors, in the same order.
        layers: the layers of these factors, in the same order.
        initialiser: the kind of initial values: "zeros", "kaiming", "gaussian" or, for a magnitude, "norms".
        stacked: True if the array's first dim counts these steps.
        peers: for a stacked array, the variables of all steps, in order.
        rank, by_step: as in `Target`.
    """

    names: tuple[str, ...]
    variables: tuple[keras.Variable, ...]
    layers: tuple[keras.layers.Layer, ...]
    initialiser: str
    stacked: bool
    peers: tuple[keras.Variable, ...] = ()
    rank: int = 1
    by_step: bool = False

    @property
    def key(self) -> str:
        """The array's name in a state: the name of its first factor."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        one = tuple(self.variables[0].shape)
        return (len(self.names), *one) if self.stacked else one

    def of_all_steps(self, array: jax.Array) -> jax.Array:
        """A stacked array, with zeros for the steps that lack this factor."""
        own = IdentitySet(self.variables)
        steps = [step for step, variable in enumerate(self.peers) if variable in own]
        if len(steps) == len(self.peers):
            return array
        return jnp.zeros((len(self.peers), *array.shape[1:]), array.dtype).at[jnp.array(steps)].set(array)

    def initial(self, name: str, seed: int) -> np.ndarray:
        """PEFT's initial values of one of its factors, float32.

        A is uniform in +-1/sqrt(I) (kaiming with a = sqrt 5) or normal with deviation 1/R; B is zero. Magnitudes are
        zeros here; `CausalLM.initial_factors` makes them norms. The values depend only on the seed and the factor's
        name, not on the mesh, the stacking or the other targets.
        """
        shape = self.shape[self.stacked :]
        # Draw on the host: XLA takes 20 s to compile the drawing of a few hundred factors by name.
        draws = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        if self.initialiser in ("zeros", "norms"):
            return np.zeros(shape, np.float32)
        if self.initialiser == "gaussian":
            return draws.standard_normal(shape, np.float32) / np.float32(self.rank)
        unit = draws.random(shape, np.float32)
        return (2 * unit - 1) / np.float32(math.sqrt(shape[1]))


def factor_slots(targets: Sequence[Target], chain: Chain | None) -> list[FactorSlot]:
    """List the trained arrays: the scanned blocks' factors stacked by step, the others one by one.

    Args:
        chain: None stacks nothing.
    """
    factors = IdentityMap(
        (variable, (name, variable, target.layer, initialiser, target))
        for target in targets
        if target.is_target
        for name, (variable, initialiser) in target.variables.items()
    )
    peers = chain.peers() if chain is not None else IdentityMap()
    made = []
    for factor in factors:
        steps = peers.get(factor, ())
        group = [factors[peer] for peer in steps if peer in factors] or [factors[factor]]
        names, variables, layers, initialisers, of = zip(*group, strict=True)
        if variables[0] is factor:
            # A single factor gets no dim of steps: a checkpoint could not tell it from a dim of the factor's own.
            own = of[0].rank, of[0].by_step
            made.append(FactorSlot(names, variables, layers, initialisers[0], len(group) > 1, steps, *own))
    return made


def zero_factors(targets: Sequence[Target]) -> list[keras.Variable]:
    """The factors of the layers that are not targets."""
    return [variable for target in targets if not target.is_target for variable, _ in target.variables.values()]
