"""Tokens that are decoded run packed experts without the host reading where they go, as it would wait for a GPU."""

import copy

import pytest
import torch
from peft import get_peft_model
from test_packed import packed
from torch import Tensor

from asked import nothing_asked
from close import assert_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.adapter import dispatch
from peft_pcgrow.packed import packed_experts
from peft_pcgrow.packed.forms import Form
from tiny import EXPERTS, LOCUS, build, logits, tokens

ONE = [[form] * EXPERTS for form in (Form(), Form(8), Form(4), Form(3), Form(2), Form(16, sparsity="half"))]
TWO = [Form(4), Form(neurons=0)] * (EXPERTS // 2), [Form(16, sparsity="half"), Form(8, neurons=8)] * (EXPERTS // 2)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(packed_experts, "AT_HAND", ())


def routed(tokens: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A place is nobody's."""
    index = torch.tensor([[0, 3], [1, EXPERTS]])
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)), index, torch.rand(tokens, 2)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("forms", [*ONE, *TWO], ids=lambda forms: str(forms[0]))
@torch.no_grad()
def test_the_host_reads_nothing(monkeypatch, forms, name):
    """And the output is that of the products of sorted rows, which do read."""
    base, given = find_experts(packed(build(name), forms, layers=[1])).sites[1].base, routed()
    want = base(*given)
    # planted: read they do
    with pytest.raises(AssertionError, match="read"), nothing_asked():
        base(*given)
    monkeypatch.setattr(packed_experts, "AT_HAND", ())
    base(*given)  # what is put on the device once
    with nothing_asked():
        got = base(*given)
    assert_close(name, got, want, "fp32")
    assert got.abs().sum() > 0


@torch.no_grad()
def test_nor_with_a_bank(as_on_a_gpu):
    """The bank's rows are multiplied as the base's: at birth, the base's bits."""
    base, given = packed(build(), ONE[2], layers=[1]), routed()
    want = find_experts(base).sites[1].base(*given)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    layer = model.eval().base_model.tuner_layers()[0]
    branches = [branch for _, branch in layer._branches(["default"], given[0], None)]
    run = dispatch.run(layer.base_layer, branches, *given, asking=False)
    assert torch.equal(run, want)
    with nothing_asked():
        dispatch.run(layer.base_layer, branches, *given, asking=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_born_exact(name, as_on_a_gpu):
    """A model that decodes so, and reads its prompt by sorted rows."""
    base = packed(build(name), ONE[2])
    before = logits(copy.deepcopy(base), tokens(1, 1))
    assert find_experts(base).sites[0].base.takes_each_row(torch.zeros(1, 2))
    assert not find_experts(base).sites[0].base.takes_each_row(torch.zeros(16, 2))
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS), autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(model, tokens(1, 1)), before)
