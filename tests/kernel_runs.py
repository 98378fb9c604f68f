"""What tests of kernels share: where they run, in which dtypes, and memory that nobody has written to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (pip install triton, on Linux)")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")]
# the interpreter knows no arithmetic of 16 bits: bf16 is the GPU's
DTYPES = [torch.float32, *(pytest.param(dtype, marks=gpu) for dtype in (torch.bfloat16, torch.float16))]
# a tolerance for each, see close.py
KIND = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN: torch fills it where it is to be deterministic."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, spaced: bool = False) -> Tensor:
    """Normal numbers; spaced: every second column of a wider tensor, so that rows are in no piece."""
    made = torch.randn(*shape[:-1], shape[-1] * (1 + spaced)).to(DEVICE, dtype)
    return made[..., :: 1 + spaced]


def autograd(function: Callable[..., Tensor], error: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `function` gives, and its gradients in floating inputs."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], error)


def in_fp64(*inputs: Tensor) -> list[Tensor]:
    """Copies on the CPU, indices as they are."""
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs]
