"""Packing a model's experts: what they read back as, what is measured on them, what they take in memory."""

import copy
import sys

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from test_packed import plain, unpacked
from torch import Tensor, nn

from close import assert_all_close, assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks, matrices
from peft_pcgrow.architectures.fingerprint import describe_base
from peft_pcgrow.architectures.same_base import same_model
from peft_pcgrow.maps.error_map import SUMS
from peft_pcgrow.packed.forms import Form, form_bytes
from peft_pcgrow.packed.quantize import BITS, quantize_experts, storage_bytes
from tiny import (
    ARCHITECTURES,
    EXPERTS,
    LOCUS,
    assert_same,
    build,
    domain,
    grown,
    logits,
    retain,
    snapshot,
    tokens,
    trainable,
)

# ---- packing a model


@pytest.mark.slow
@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantize_experts(name, to):
    """Every matrix reads back as rounded, biases stay, the report counts what is stored."""
    model = build(name, torch.bfloat16)
    want = {
        (site.layer, stack): lowbit.rounded(plain(site.base, stack), BITS[to]).to(torch.bfloat16)
        for site in find_experts(model).sites
        for stack in matrices(site.base)
    }
    before, sites = snapshot(model), find_experts(model).sites
    numbers = sum(stack.numel() for site in sites for stack in expert_stacks(site.base).values())
    total = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    report = quantize_experts(model, to)
    for (layer, stack), matrix in want.items():
        base = next(site.base for site in sites if site.layer == layer)
        found = expert_stacks(base)[stack][torch.arange(EXPERTS)]
        assert torch.equal(found.mT if base.is_transposed else found, matrix)
    after = snapshot(model)
    assert_same({k: t for k, t in before.items() if k in after}, {k: t for k, t in after.items() if k in before})
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert (report.experts_before, report.model_before, report.model_after) == (2 * numbers, total, held)
    assert report.model_before - report.model_after == report.experts_before - report.experts_after
    assert report.experts_after < {"int8": 0.75, "nf4": 0.45, "3bit": 0.4, "2bit": 0.35}[to] * report.experts_before
    assert f"experts in {to}" in str(report)
    again = quantize_experts(model, to)
    assert (again.experts_before, again.experts_after) == (report.experts_before, report.experts_after)
    assert again.model_before == again.model_after == held
    # loaders tell adapters from bases by it
    assert not [key for key in after if "pcgrow_" in key]
    assert_same(after, snapshot(model))


def test_a_real_experts_matrix_takes_its_bits():
    """Of matrices wide enough, a weight takes its bits and its share of a scale."""
    for to, bits in BITS.items():
        shared = 16 / lowbit.BLOCK if to != "int8" else 16 / 2048
        assert lowbit.size(1536, 2048, BITS[to]) == 1536 * 2048 * (bits + shared) / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_what_describes_a_base_stays(name):
    """A map of the full-precision base fits the packed one, and the other way; stacks keep their order."""
    model = build(name)
    other = copy.deepcopy(model)
    quantize_experts(other)
    whole, rounded = (describe_base(each, find_experts(each)) for each in (model, other))
    assert same_model(whole, rounded)
    # what was rounded says nothing of the weights that it was
    assert rounded == whole | {"stacks": None}
    one, two = (list(expert_stacks(find_experts(m).sites[0].base)) for m in (model, other))
    assert one == two
    for measured, base in ((model, other), (other, model)):
        emap = measure_errors(measured, [tokens()], progress=False)
        grow = PCGrowConfig(error_map=emap, budget=0.2, base_quantization="nf4")
        adapted = get_peft_model(copy.deepcopy(base), grow)
        assert list(adapted.state_dict()) == list(get_peft_model(copy.deepcopy(model), grow).state_dict())


def test_experts_behind_accelerates_hooks():
    """As a model spread over several devices has them."""
    model, plain_model = build(), build()
    for site in find_experts(model).sites:
        add_hook_to_module(site.base, AlignDevicesHook(execution_device="cpu"))
    for each in (model, plain_model):
        quantize_experts(each)
    assert torch.equal(logits(model), logits(plain_model))


def test_refused():
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot be packed to 'int4'; choose from 'int8', 'nf4', '3bit', '2bit'"):
        quantize_experts(model, "int4")
    with pytest.raises(ValueError, match=r"base_quantization='3bit'; choose from nf4, int8, or None"):
        PCGrowConfig(locus=LOCUS, base_quantization="3bit")
    model = grown()
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into the experts of layer 1"):
        quantize_experts(model)
    model.unmerge_adapter()
    assert_same(before, snapshot(model.unload()))
    model = build()
    quantize_experts(model, "int8")
    held = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 0 are packed already \(8 bit\), and 'nf4' was asked for"):
        get_peft_model(model, PCGrowConfig(locus=LOCUS, base_quantization="nf4"))
    assert_same(held, snapshot(model))
    with torch.device("meta"):
        empty = copy.deepcopy(build()).to("meta")
    with pytest.raises(ValueError, match="layer 0 have no values to pack"):
        quantize_experts(empty)


# ---- the kernels


SHAPES = [(1, 64), (8, 32), (5, 7), (3, 30), (32, 96), (192, 192), (40, 2048)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bitsandbytes_reads_what_torch_reads(shape, dtype, monkeypatch):
    """The same values to the bit; without bitsandbytes, torch alone reads them."""
    pytest.importorskip("bitsandbytes")
    data = lowbit.encode(torch.randn(1, *shape), 4)[0]
    found = lowbit.decode(data, *shape, 4, dtype=dtype)
    assert lowbit.bitsandbytes_kernels() is not None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    lowbit.bitsandbytes_kernels.cache_clear()
    try:
        assert lowbit.bitsandbytes_kernels() is None
        assert torch.equal(lowbit.decode(data, *shape, 4, dtype=dtype), found)
    finally:
        lowbit.bitsandbytes_kernels.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [4, 3, 2])
def test_decoding(width, shape):
    """Code by code, in plain Python."""
    outputs, inputs = shape
    data = lowbit.encode(torch.randn(1, *shape), width)[0]
    weights = outputs * inputs
    packed = -(-weights * width // 8)
    bits = "".join(f"{byte:08b}" for byte in data[:packed].tolist())
    scales = data[-(-packed // 16) * 16 :].view(torch.bfloat16).float()
    codes = torch.tensor([int(bits[i * width : (i + 1) * width], 2) for i in range(weights)])
    want = lowbit.levels(width)[codes] * scales[torch.arange(weights) // 64]
    assert torch.equal(lowbit.decode(data, outputs, inputs, width), want.view(shape))


# ---- error maps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("settle", ["sweep", "direct"])
@pytest.mark.parametrize("adapted", [False, True])
def test_maps(settle, name, adapted):
    """Of a packed base, in fp64: that of a dense model with the decoded weights; gradients and retain text too."""
    model = build(name, torch.float64)
    quantize_experts(model)
    dense = unpacked(model)
    if adapted:
        model, dense = (get_peft_model(each, PCGrowConfig(locus={2: [1, 4]})) for each in (model, dense))
    settings = {"settle": settle, "gradients": True, "retain": [retain(64, seed=1)], "window": 8, "progress": False}
    one, other = (measure_errors(each, [domain(64, seed=1)], **settings) for each in (model, dense))
    for field in SUMS:
        assert_close(field, getattr(one, field), getattr(other, field), "fp64 across batches")
    assert_all_close(one.gradient, other.gradient, "fp64 across batches")
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert_close("gates", one.separation.threshold, other.separation.threshold, "fp32 solve")
    assert_all_close(one.separation.moment, other.separation.moment, "fp32")


@pytest.mark.slow
def test_one_layer_is_decoded_at_a_time(monkeypatch):
    """While weight gradients are measured, no two layers hold dense stacks."""
    model = build()
    quantize_experts(model)
    sites, most = find_experts(model).sites, []
    bases = [site.base for site in sites]
    for site in sites:
        site.decoder_layer.mlp.register_forward_hook(lambda *_: most.append(sum(b.dense is not None for b in bases)))
    measure_errors(model, [tokens()], progress=False)
    assert max(most) == 1
    assert not any(base.dense for base in bases)


# ---- memory


@pytest.mark.slow
def test_peak_of_packing():
    """Above a model on the CPU, packing takes what it makes of all layers, and less than one of its layers more."""
    model = build(dtype=torch.bfloat16, num_experts=64)
    site = find_experts(model).sites[0]
    layer = sum(stack.numel() * stack.element_size() for stack in expert_stacks(site.base).values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        # of memory from before nothing is noted
        model = copy.deepcopy(model)
        report = quantize_experts(model)
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = torch.tensor([e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]).cumsum(0)
    assert 0 < int(now.max()) - report.model_before - report.experts_after < layer // 2
    assert int(now[-1]) == report.model_after < report.model_before - 2 * layer


def kept(model: nn.Module) -> list[Tensor]:
    """What autograd keeps for the backward of one training step."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_no_decoded_matrix_is_kept_for_the_backward(quantization):
    """Of tensors shaped like an expert's matrices, only trained ones are kept; of a dense base, its stacks too."""
    # the attention and the shared parts have no matrices of these shapes
    sizes = {"moe_intermediate_size": 40}
    model = get_peft_model(build(**sizes), PCGrowConfig(locus=LOCUS, settle="backprop", base_quantization=quantization))
    banks = {p.untyped_storage().data_ptr() for p in trainable(model).values()}
    shapes = {(80, 32), (32, 80), (32, 40), (40, 32)}
    held = [t for t in kept(model) if tuple(t.shape[-2:]) in shapes]
    assert held
    assert all(t.untyped_storage().data_ptr() in banks for t in held)
    dense = get_peft_model(build(**sizes), PCGrowConfig(locus=LOCUS, settle="backprop"))
    more = [t for t in kept(dense) if tuple(t.shape[-2:]) in shapes]
    assert len(more) > len(held)


def test_bytes_of_an_adapted_model():
    """The report of a model with an adapter counts banks too, and nothing of the stacks that were there is left."""
    model = grown(dtype=torch.bfloat16)
    stacks = sum(p.numel() * 2 for name, p in model.named_parameters() if "pcgrow" not in name and p.dim() == 3)
    report = quantize_experts(model)
    assert report.model_after == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert report.experts_before == stacks
    assert report.experts_after == sum(form_bytes(site.base, Form(4)) * EXPERTS for site in find_experts(model).sites)
    assert storage_bytes([*model.parameters(), *model.parameters()]) == storage_bytes(model.parameters())
