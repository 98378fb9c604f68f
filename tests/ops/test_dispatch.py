"""Where kernels run."""

import pytest
import torch

from pcgrow_kernels import dispatch


def test_definitions_run_on_processors():
    """Whatever is installed, and in the interpreter too."""
    x = torch.zeros(2, device="cpu")
    assert not dispatch.use_triton(x)
    assert not dispatch.use_triton(x, x.double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernels_run_on_gpus(monkeypatch):
    x = torch.zeros(2, device="cuda")
    assert dispatch.use_triton(x, x.bfloat16(), x.long())
    assert not dispatch.use_triton(x, x.double())
    assert not dispatch.use_triton(x, x.cpu())
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert not dispatch.use_triton(x)


@pytest.mark.parametrize(("size", "numbers"), [(0, 1), (1, 1), (5, 8), (64, 64), (5000, dispatch.WIDEST)])
def test_blocks(size, numbers):
    assert dispatch.block(size) == numbers
