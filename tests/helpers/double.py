"""transformers' models computed in float64 throughout, also where their code asks for float32."""

import contextlib
import sys
import types
from collections.abc import Iterator

import torch


class _Double(types.ModuleType):
    """torch, with float64 under the names of float32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


_TORCH = _Double("torch")


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 inside: the modules of transformers' models that are loaded, and `Tensor.float`.

    A model that is loaded inside still needs `.double()`.
    """
    patched = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name and vars(module).get("torch") is torch
    ]
    plain = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    for module in patched:
        module.torch = _TORCH
    try:
        yield
    finally:
        torch.Tensor.float = plain
        for module in patched:
            module.torch = torch
