"""Packed experts in groups: the same bits however many are decoded at a time, and dense experts' results."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from test_packed import FORMS
from test_packed import packed as pack_model
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from close import assert_all_close, assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.packed import packed_experts
from peft_pcgrow.packed.forms import Form
from peft_pcgrow.packed.quantize import quantize_experts
from tiny import ARCHITECTURES, LOCUS, build, domain, logits, mixed, spawned, tokens

BITS = [(16, None), (8, None), (4, None), (3, None), (2, None), (16, "half")]
HIDDEN, NEURONS, EXPERTS = 24, 16, 8


class _Experts(nn.Module):
    """What the decorator needs; `forward` is the architectures' loop."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.functional.silu
        self.post_expert_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, NEURONS, HIDDEN))
        self.up_proj_bias = nn.Parameter(torch.randn(EXPERTS, NEURONS))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, NEURONS))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for token, choice in (index < EXPERTS).nonzero().tolist():
            e = int(index[token, choice])
            inner = self.act_fn(self.up_proj[e] @ hidden[token] + self.up_proj_bias[e])
            y = self.post_expert_norm(self.down_proj[e] @ inner + self.down_proj_bias[e])
            total[token] = total[token] + y * weight[token, choice]
        return total


Experts = use_experts_implementation(_Experts, has_gate=False, has_bias=True, has_post_expert_norm=True)


def routed(rows: int = 40, choices: int = 3) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights; some places are nobody's."""
    index = torch.rand(rows, EXPERTS + 1).topk(choices).indices
    assert (index == EXPERTS).any()
    return index, torch.rand(rows, choices).double()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 16), (6, 20), (128, 64)])
@pytest.mark.parametrize(("width", "sparsity"), BITS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_several_matrices_are_decoded_as_one_is(dtype, width, sparsity, shape):
    data = lowbit.encode(torch.randn(5, *shape), width, sparsity)
    one_by_one = torch.stack([lowbit.decode(row, *shape, width, sparsity, dtype) for row in data])
    assert torch.equal(lowbit.decode(data, *shape, width, sparsity, dtype), one_by_one)


def test_sparse_matrices():
    """What is kept has its own bits and place, the rest is zero: as many in each matrix."""
    weights = torch.randn(3, 6, 20).bfloat16().float()
    found = lowbit.rounded(weights, 16, "half")
    kept = found != 0
    assert torch.equal(found, torch.where(kept, weights, 0.0))
    groups = kept.view(3, 1, -1)
    assert (groups.sum(-1) * 2 == groups.shape[-1]).all()
    size = weights.abs().view_as(groups)
    assert (size.where(groups, torch.inf).amin(-1) >= size.where(~groups, 0.0).amax(-1)).all()


@pytest.mark.slow
def test_norms_biases_sentinels_and_no_gate():
    """In fp64, output and gradients of a loop over the rows with the decoded weights, those of thinned experts zero."""
    torch.manual_seed(0)
    module = Experts(SimpleNamespace(_experts_implementation="eager")).double()
    data = {}
    for name in ("up_proj", "down_proj"):
        data[name] = []
        for whole, form in zip(expert_stacks(module)[name].detach(), FORMS, strict=True):
            left = NEURONS if form.neurons is None else form.neurons
            cut = whole[:, :left] if name == "down_proj" else whole[:left]
            data[name] += lowbit.encode(cut[None], form.width, form.sparsity)
    dense = copy.deepcopy(module)
    packed_experts.pack(module, FORMS, data)
    for name, stack in expert_stacks(module).items():
        dense.get_parameter(name).data = stack[torch.arange(EXPERTS)].detach()
    index, weight = routed()
    found = {}
    for key, each in (("packed", module), ("dense", dense)):
        x, given = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)).double(), weight.clone()
        x.requires_grad_(True), given.requires_grad_(True)
        output = each(x, index, given)
        output.square().sum().backward()
        found[key] = {"output": output.detach(), "x": x.grad, "weight": given.grad, "bias": each.up_proj_bias.grad[:5]}
    assert_all_close(found["packed"], found["dense"], "fp64 gradient")
    with module.composed_once():
        assert_close("composed", module(x, index, weight).detach(), found["dense"]["output"], "fp64 gradient")
    for dtype in (torch.float32, torch.bfloat16):
        lower = copy.deepcopy(module).to(dtype)
        got = lower(x.detach().to(dtype), index, weight.to(dtype))
        assert got.dtype == dtype
        assert_close(str(dtype), got, found["dense"]["output"], "fp32" if dtype == torch.float32 else "bf16")


def test_no_row_is_anybodys():
    """Tokens of sentinels and removed experts alone get zeros, and so do their gradients."""
    base = find_experts(pack_model(build())).sites[0].base
    x = torch.randn(5, 32, requires_grad=True)
    index = torch.tensor([[7], [8], [7], [8], [9]])
    output = base(x, index, torch.ones(5, 1))
    output.sum().backward()
    assert not output.any()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_do_not_depend_on_how_many_are_decoded_at_a_time(monkeypatch, dtype, name):
    """Nor does the gradient; and no more is decoded at a time than is allowed."""
    # neighbours of one form, and others of it further on
    forms = [Form(4), Form(4), Form(8), Form(4), Form(), Form(), Form(neurons=8), Form(neurons=8)]
    model = pack_model(build(name, dtype), forms)
    sizes: list[int] = []
    decode = lowbit.decode

    def noted(*args) -> Tensor:
        found = decode(*args)
        sizes.append(found.numel() * found.element_size())
        return found

    monkeypatch.setattr(lowbit, "decode", noted)
    found, calls = [], []
    for bound in (1, 2 * 32 * 32 * dtype.itemsize, 2**20):
        monkeypatch.setattr(packed_experts, "DECODED_ON_CPU", bound)
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_(True)
        sizes.clear()
        output = model(inputs_embeds=embedded, labels=tokens())
        output.loss.backward()
        found.append((output.logits, embedded.grad))
        calls.append(len(sizes))
        largest = max(
            stack.shape[1:].numel() for s in find_experts(model).sites for stack in s.base.stack_views.values()
        )
        assert max(sizes) <= max(bound, 2 * largest * dtype.itemsize)
    assert calls[0] > calls[1] >= calls[2]
    for output, gradient in found[1:]:
        assert torch.equal(output, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_birth_is_exact(rows, dtype, name):
    """Banks hold what is decoded: the same bits as without, for any number of rows, and in halves of bytes too."""
    base = pack_model(build(name, dtype))
    before = logits(copy.deepcopy(base), tokens(rows, 1 if rows == 1 else 16))
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS), autocast_adapter_dtype=False)
    assert torch.equal(logits(model, tokens(rows, 1 if rows == 1 else 16)), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newborns_are_born_exact(dtype, name):
    model = spawned(name, dtype, autocast=False, gate_fpr=0.3)
    quantize_experts(model, "nf4")
    for layer in model.base_model.tuner_layers():
        for stack, bank in layer.bank("default").items():
            bank.data = expert_stacks(layer.base_layer)[stack][torch.tensor(layer.grown["default"])].to(bank.dtype)
    for ids in (mixed(), domain(1, 5)):
        got = logits(model, ids)
        with model.disable_adapter():
            assert torch.equal(got, logits(model, ids))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_autocast(name):
    """Products in bf16, as of a dense model with the decoded weights."""
    model = pack_model(build(name))
    dense = build(name)
    for site, other in zip(find_experts(dense).sites, find_experts(model).sites, strict=True):
        for stack, weight in expert_stacks(other.base).items():
            site.base.get_parameter(stack).data = weight[torch.arange(EXPERTS)].detach()
    x, (index, weight) = torch.randn(40, 32), routed()
    index = index.clamp(max=EXPERTS - 1)
    ours, theirs = (find_experts(each).sites[0].base for each in (model, dense))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(name, ours(x, index, weight.float()), theirs(x, index, weight.float()), "bf16")
