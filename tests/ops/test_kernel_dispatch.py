"""Where kernels run, and what importing them brings."""

import ast
from pathlib import Path

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
    x = torch.zeros(2, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "TRIED", frozenset())
    assert not dispatch.use_triton(x)
    monkeypatch.setattr(dispatch, "TRIED", {torch.cuda.get_device_capability()})
    assert dispatch.use_triton(x, x.float(), x.long())
    assert dispatch.use_triton(x.long())
    assert not dispatch.use_triton(x.float())
    assert not dispatch.use_triton(x, x.double())
    assert not dispatch.use_triton(x, x.cpu())
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    assert not dispatch.use_triton(x)


@pytest.mark.parametrize(("size", "numbers"), [(0, 1), (1, 1), (5, 8), (64, 64), (5000, dispatch.WIDEST)])
def test_blocks(size, numbers):
    assert dispatch.block(size) == numbers


def test_importing_brings_no_triton():
    """From the source: transformers imports it itself where it is installed."""
    for path in Path(dispatch.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "triton"], path.name
