"""A whole training step with every kernel where a GPU would launch it, in the interpreter, against torch."""

import pytest
import torch
from torch import Tensor, nn

from close import assert_all_close
from kernel_runs import needs_triton
from pcgrow_kernels import combine, gate_score, sort_rows, swiglu
from peft_pcgrow import create_pcgrow_optimizer
from peft_pcgrow.architectures import one_sort
from peft_pcgrow.training import muon
from tiny import grown, mixed, spawned, tokens, trainable

MODULES = (combine, gate_score, sort_rows, swiglu, one_sort, muon)


def stepped(model: nn.Module, ids: Tensor, lr: float) -> dict[str, Tensor]:
    """Loss, gradients, and where Muon takes the weights."""
    optimizer = create_pcgrow_optimizer(model.train(), lr=lr)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach()} | {f"gradient of {n}": p.grad.clone() for n, p in trainable(model).items()}
    optimizer.step()
    return found | {name: p.detach().clone() for name, p in trainable(model).items()}


@needs_triton
@pytest.mark.parametrize(("settle", "born"), [("sweep", True), ("direct", False)])
def test_a_step_by_kernels(settle, born, monkeypatch):
    found, launched = [], []

    def noted(*given: Tensor) -> bool:
        launched.append(len(given))
        return all(tensor.dtype != torch.float64 for tensor in given)

    for by_kernels in (False, True):
        if by_kernels:
            for module in MODULES:
                monkeypatch.setattr(module, "use_triton", noted)
        torch.manual_seed(0)
        model = spawned(gate_fpr=0.3, settle=settle) if born else grown(settle=settle, init_weights=False)
        found.append(stepped(model, (mixed() if born else tokens())[::4, :8], lr=0.01))
    assert launched
    assert_all_close(*found, "fp32")
