"""A map from Hugging Face tensors to the parts of Keras variables that they feed.

There are no mapping tables here. KerasHub's own converter runs once with a loader that records instead of reading.
Every call `port_weight(keras_variable, hf_weight_key, hook_fn)` is one line of the map. Converters of mixtures of
experts request each expert's tensors, transpose and stack them, and assign the result to one variable. The recorder
covers these numpy calls too, so it knows every part of a variable and can still read it slice by slice.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import keras
import numpy as np

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf import mxfp4
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts import stored
from kithara_ray.hf.tower import in_tower, text_of
from kithara_ray.model import keras_compat
from kithara_ray.model.decoder.backbone import DecoderBackbone, fed_variables
from kithara_ray.model.families.family import Family
from kithara_ray.model.identity import IdentitySet

# From HF layout to Keras layout: of an array, or of `mxfp4.Packed`, which transposes by itself.
Transform = Callable[[Any, Sequence[int]], Any]
Tensor = TypeVar("Tensor", np.ndarray, mxfp4.Packed)


def _unchanged(tensor: np.ndarray, _shape: Sequence[int]) -> np.ndarray:
    return tensor


class _Uncast(np.ndarray):
    """An array that keeps its dtype: mistral's converter casts tensors to float16, which would read and round them."""

    def astype(self, *args, **kwargs) -> np.ndarray:
        return self


@dataclass(frozen=True)
class Piece:
    """One HF tensor and its part of a variable: `variable[index] == transform(tensor, shape)`.

    Attributes:
        hf_name: the tensor's name in the checkpoint.
        transform: converts HF layout to Keras layout by a transpose or a reshape; a mapped tensor stays a view.
        index: for each dim of the variable a slice, or an int if the part lacks the dim.
        shape: the part's shape.
    """

    hf_name: str
    transform: Transform
    index: tuple[slice | int, ...]
    shape: tuple[int, ...]

    def view(self, base: BaseCheckpoint) -> np.ndarray | mxfp4.Packed:
        """The part in Keras' layout; nothing is read before it is sliced."""
        tensor: Any = stored.view(base, self.hf_name)
        view: np.ndarray | mxfp4.Packed = self.of(tensor)
        if tuple(view.shape) != self.shape:
            raise CheckpointError(
                f"{base.directory}: {self.hf_name} has shape {tuple(tensor.shape)}, "
                f"which does not give the model's {self.shape}; config.json and weights do not belong together"
            )
        return view

    def of(self, tensor: Tensor) -> Tensor:
        """Apply the transform to a tensor; the result for an array is a view of it."""
        if isinstance(tensor, mxfp4.Packed):
            return self.transform(tensor, list(self.shape))
        return self.transform(tensor.view(_Uncast), list(self.shape)).view(np.ndarray)


@dataclass(frozen=True)
class Port:
    """One Keras variable and the HF tensors that tile it.

    Attributes:
        variable: the `keras.Variable`.
        pieces: one piece, or one for each expert's tensors.
    """

    variable: keras.Variable
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    @property
    def hf_name(self) -> str:
        """The name of the variable's tensor, or of the first one."""
        return self.pieces[0].hf_name

    @property
    def tiled_dims(self) -> tuple[int, ...]:
        """The dims along which the tensors are stacked."""
        return tuple(dim for dim, index in enumerate(self.pieces[0].index) if isinstance(index, int))

    def view(self, base: BaseCheckpoint) -> Any:
        """The variable's value: an array, an `mxfp4.Packed` or a `Tiled`. Nothing is read before it is sliced."""
        if len(self.pieces) == 1:
            return self.pieces[0].view(base)
        return Tiled(self.shape, [(piece.index, piece.view(base)) for piece in self.pieces])


class Tiled:
    """An array made of adjacent views; a slice of it reads only the part it needs of each."""

    def __init__(self, shape: tuple[int, ...], tiles: Sequence[tuple[tuple[slice | int, ...], Any]]):
        self.shape, self.dtype = shape, holding([view.dtype for _, view in tiles])
        self._tiles = tiles

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        wanted = [range(*one.indices(size)) for one, size in zip(index, self.shape, strict=True)]
        out = np.empty([len(span) for span in wanted], self.dtype)
        for place, view in self._tiles:
            own = [_span(at, size) for at, size in zip(place, self.shape, strict=True)]
            both = [range(max(w.start, o.start), min(w.stop, o.stop)) for w, o in zip(wanted, own, strict=True)]
            if all(both):
                into = out[tuple(_relative(b, w) for b, w in zip(both, wanted, strict=True))]
                kept = [not isinstance(at, int) for at in place]
                of = tuple(_relative(b, o) for b, o, keep in zip(both, own, kept, strict=True) if keep)
                into[...] = view[of].reshape(into.shape)
        return out


def holding(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The smallest dtype that holds the values of all these exactly: float32 for bfloat16 with float16."""
    return functools.reduce(jnp.promote_types, dtypes)


def _span(at: slice | int, size: int) -> range:
    return range(at, at + 1) if isinstance(at, int) else range(*at.indices(size))


def _relative(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


# --- recording -------------------------------------------------------------------------------------------------------


class _Symbol:
    """A stand-in for an HF tensor in a converter that does its own numpy computation."""

    def __array_function__(self, function, types, args, kwargs):
        if function is np.transpose and isinstance(args[0], _Tensor):
            transform = args[0].transform
            return _Tensor(args[0].name, lambda t, shape: np.transpose(transform(t, shape), *args[1:], **kwargs))
        if function in (np.stack, np.concatenate):
            axis = args[1] if len(args) > 1 else kwargs.get("axis", 0)
            return _Joined(tuple(args[0]), axis, stacked=function is np.stack)
        raise UnsupportedError(f"KerasHub's converter does np.{function.__name__} to a weight; that is not recorded")

    def pieces(self, shape: Sequence[int], index: Sequence[slice | int], dims: Sequence[int]) -> Iterator[Piece]:
        """Yield the tensors of part `index` of a variable; `dims` are the variable's dims that the part has."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Tensor(_Symbol):
    name: str
    transform: Transform = _unchanged

    def pieces(self, shape, index, dims):
        yield Piece(self.name, self.transform, tuple(index), tuple(shape))


@dataclass(frozen=True)
class _Joined(_Symbol):
    parts: tuple[_Symbol, ...]
    axis: int
    stacked: bool

    def pieces(self, shape, index, dims):
        axis = self.axis % len(shape)
        # Assume parts of equal size, as converters join them. Otherwise the check of the views' shapes fails.
        size = shape[axis] // len(self.parts)
        for number, part in enumerate(self.parts):
            here, own_shape, own_dims = list(index), list(shape), list(dims)
            if self.stacked:
                here[dims[axis]] = number
                del own_shape[axis], own_dims[axis]
            else:
                here[dims[axis]] = slice(number * size, (number + 1) * size)
                own_shape[axis] = size
            yield from part.pieces(own_shape, here, own_dims)


class _Quantised(np.ndarray):
    """A stand-in for the blocks or scales of an MXFP4 tensor, which a converter dequantises itself.

    It is an array with one element per dim, so that the converter's arithmetic runs. Results keep the tensor's name.
    """

    name: str | None = None

    def __array_finalize__(self, other):
        self.name = getattr(other, "name", None)

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        if isinstance(result, _Quantised):
            result.name = self.name
        return result

    @classmethod
    def of(cls, name: str, dims: int) -> "_Quantised":
        made = np.ones((1,) * dims, np.uint8).view(cls)
        made.name = name
        return made


class _Recorder:
    """A replacement for KerasHub's `SafetensorLoader` that records each request.

    Args:
        config: the config.json of the whole model, whose names the ports get. KerasHub asks by those of a text model.
        tensor: `Family.tensor`.

    Attributes:
        safetensor_config: None, so that a converter does not print which tensors of a checkpoint it has no use for.
    """

    safetensor_config = None

    def __init__(self, config: Mapping, tensor: Callable[[str], str | None]):
        self.ports: list[Port] = []
        self._config, self._tensor = config, tensor

    def port_weight(self, keras_variable, hf_weight_key: str, hook_fn: Transform | None = None) -> None:
        name = self._name(hf_weight_key)
        if name is not None:
            self.assign(keras_variable, _Tensor(name, hook_fn or _unchanged))

    def _name(self, hf_weight_key: str) -> str | None:
        """The tensor's name; None if the family has no such tensor.

        Converters may leave out `model.` (qwen3's do), which holds all but the head.
        """
        name = self._tensor(hf_weight_key)
        return None if name is None else in_tower(self._config, name)

    def get_tensor(self, hf_weight_key: str) -> _Tensor | _Quantised:
        name = self._name(hf_weight_key)
        if name is None:
            # As a checkpoint without the tensor; the converter then asks for others.
            raise KeyError(hf_weight_key)
        for ending, dims in ((mxfp4.BLOCKS, 4), (mxfp4.SCALES, 3)):
            if name.endswith(ending):
                return _Quantised.of(name.removesuffix(ending), dims)
        return _Tensor(name)

    def assign(self, keras_variable, value: _Symbol | _Quantised) -> None:
        if isinstance(value, _Quantised) and value.name is not None:
            value = _Tensor(value.name)
        if not isinstance(value, _Symbol):
            raise UnsupportedError(f"KerasHub's converter assigns to {keras_variable.path} what is not of a tensor")
        shape = tuple(keras_variable.shape)
        whole = [slice(0, size) for size in shape]
        self.ports.append(Port(keras_variable, tuple(value.pieces(shape, whole, range(len(shape))))))

    @contextlib.contextmanager
    def assignments(self) -> Iterator[None]:
        """Record assignments to variables, instead of carrying them out, while this context is active."""
        assign = keras.Variable.assign
        keras.Variable.assign = lambda variable, value: self.assign(variable, value)
        try:
            yield
        finally:
            keras.Variable.assign = assign


def record_ports(family: Family, model, config: Mapping) -> list[Port]:
    """Record the map of one built causal LM: a Port for each variable that holds weights.

    Args:
        config: the whole config.json, which for a multimodal model holds the text model's.

    Raises:
        UnsupportedError: the converter does not feed a variable, or feeds it twice.
    """
    recorder = _Recorder(config, family.tensor)
    if isinstance(model.backbone, DecoderBackbone):
        for variable, names, transform in fed_variables(model.backbone):
            if isinstance(names, str):
                recorder.port_weight(variable, names, transform)
            else:
                tensors = tuple(_Tensor(in_tower(config, name), transform) for name in names)
                recorder.assign(variable, _Joined(tensors, 0, stacked=True))
    else:
        module = keras_compat.converter_of(family.converter)
        # qwen3_5's converters print that they compare with no checkpoint.
        with recorder.assignments(), contextlib.redirect_stdout(io.StringIO()):
            # As a text model's: KerasHub's converter of a wrapper takes the first prefix it tries, since none fails.
            module.convert_weights(model.backbone, recorder, family.for_converter(text_of(config)))
    fed = IdentitySet(port.variable for port in recorder.ports)
    unfed = [v.path for v in model.variables if v not in fed and not is_seed(v)]
    if unfed or len(fed) != len(recorder.ports):
        own = isinstance(model.backbone, DecoderBackbone)
        loader = "the general decoder" if own else f"KerasHub's {family.converter}"
        raise UnsupportedError(f"{loader} leaves {unfed[:3]} unloaded or loads a variable twice")
    return recorder.ports


def check_invertible(recorded: Sequence[Port], config: Mapping) -> None:
    """Check that trained values of these ports can be written back to the tensors they came from; see layout.py.

    Raises:
        UnsupportedError: the base is quantised, or a variable comes from several tensors or is a single number.
    """
    several = next((port.hf_name for port in recorded if len(port.pieces) > 1 or not port.shape), None)
    if config.get("quantization_config") or several:
        what = "quantised weights" if several is None else f"{several} and others like it"
        raise UnsupportedError(
            f"lora_rank=None: {what} of this {config['model_type']} model cannot be written back; give lora_rank="
        )


def is_seed(variable) -> bool:
    """True for a dropout layer's seed state, which holds no weight; the dropout rate is 0."""
    return "seed_generator" in variable.path
