"""Packed experts: what they hold, and that they compute, carry errors and grow like any others."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from close import assert_all_close, assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.architectures.experts import expert_stacks, matrices
from peft_pcgrow.packed.forms import WHOLE, Form, form_bytes, matrix_shape
from peft_pcgrow.packed.packed_experts import pack
from tiny import ARCHITECTURES, EXPERTS, LOCUS, backward, build, logits, tokens, train

FORMS = [Form(), Form(8), Form(4), Form(3), Form(2), Form(neurons=8), Form(4, neurons=8), Form(neurons=0)]


def plain(base: nn.Module, stack: str) -> Tensor:
    """Matrices `[E, O, I]`."""
    weight = expert_stacks(base)[stack].detach()
    return weight.mT if base.is_transposed else weight


def packed(model: nn.Module, forms=FORMS, layers=None) -> nn.Module:
    """Every layer's experts, or those of some, in these forms; of thinned experts, the first neurons are kept."""
    for site in find_experts(model).sites:
        if layers is not None and site.layer not in layers:
            continue
        data = {}
        for stack in matrices(site.base):
            data[stack] = []
            for matrix, form in zip(plain(site.base, stack), forms, strict=True):
                outputs, inputs = matrix_shape(site.base, stack, form)
                if form.neurons is not None and stack != "down_proj" and site.base.is_concatenated:
                    half = len(matrix) // 2
                    matrix = torch.cat([matrix[: form.neurons], matrix[half : half + form.neurons]])
                data[stack] += lowbit.encode(matrix[None, :outputs, :inputs], form.width, form.sparsity)
        pack(site.base, forms, data)
    return model


def unpacked(model: nn.Module) -> nn.Module:
    """A dense model with what the packed one holds."""
    dense = build(model.config.model_type, torch.float64, implementation="eager")
    for site, other in zip(find_experts(dense).sites, find_experts(model).sites, strict=True):
        for name, stack in expert_stacks(other.base).items():
            site.base.get_parameter(name).data = stack[torch.arange(EXPERTS)].double()
    return dense


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_what_it_holds(name):
    """Logits and the gradient of the embeddings are those of a dense model with the decoded weights."""
    model = packed(build(name, torch.float64, implementation="eager"))
    dense = unpacked(model)
    found = {}
    for key, each in (("packed", model), ("dense", dense)):
        embedded = each.get_input_embeddings()(tokens()).detach().requires_grad_(True)
        output = each(inputs_embeds=embedded, labels=tokens())
        output.loss.backward()
        found[key] = {"logits": output.logits.detach(), "gradient": embedded.grad}
    assert_all_close(found["packed"], found["dense"], "fp64 across batches")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grows_like_any_other(name):
    """At birth the function is the packed base's, and a sweep's gradients are backprop's."""
    base = packed(build(name, torch.float64, implementation="eager"))
    before = logits(copy.deepcopy(base))
    found = {}
    for settle in ("sweep", "backprop"):
        model = get_peft_model(copy.deepcopy(base), PCGrowConfig(locus=LOCUS, settle=settle))
        assert_close("birth", logits(model), before, "fp64")
        found[settle] = backward(model)
    assert len(found["sweep"]) >= 4
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")
    train(model)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_bytes_are_what_the_buffers_take():
    model = packed(build("qwen3_moe"))
    for site in find_experts(model).sites:
        held = sum(b.numel() * b.element_size() for n, b in site.base.named_buffers(recurse=False) if "packed" in n)
        assert held == sum(form_bytes(site.base, form) for form in FORMS)
        assert not [n for n, p in site.base.named_parameters() if p.dim() == 3]
        assert form_bytes(site.base, Form(4)) < 0.3 * form_bytes(site.base, WHOLE)
