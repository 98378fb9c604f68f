"""Bases whose experts are no plain weights (quantized, offloaded, sharded) are refused by name, wherever they enter."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from close import assert_close
from foreign import llama4
from peft_pcgrow import PCGrowConfig, compress, find_experts, measure_errors
from tiny import assert_same, build, dense, logits, retain, snapshot, tokens

WAYS_IN = {
    "get_peft_model": lambda model: get_peft_model(model, PCGrowConfig(select="random", budget=0.1)),
    "measure_errors": lambda model: measure_errors(model, [tokens()], progress=False),
    "quantize_experts": compress.quantize_experts,
    "plan": lambda model: compress.plan(model, target=0.5, retain=[retain()]),
}

pytestmark = pytest.mark.cpu("processes meet over gloo, and quantized layers are put together on the CPU")


def grown_on(model: nn.Module, **settings) -> nn.Module:
    return get_peft_model(model, PCGrowConfig(locus={0: [1, 4], 2: [3]}, **settings))


every_way = pytest.mark.parametrize("way", WAYS_IN)


class Coded(torch.Tensor):
    """A tensor whose numbers are not what its storage holds, as torchao's and quanto's are."""


def in_fp8(model: nn.Module) -> nn.Module:
    """As loading an FP8 checkpoint makes it."""
    settings = FineGrainedFP8Config(weight_block_size=(16, 16))
    replace_with_fp8_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
    model.config.quantization_config = settings
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False))
    return model


def fp8_experts() -> nn.Module:
    return in_fp8(build())


def fp8_linears() -> nn.Module:
    return in_fp8(dense())


def mxfp4_experts() -> nn.Module:
    model = build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    model.config.quantization_config = Mxfp4Config()
    return model


def fbgemm_experts() -> nn.Module:
    model = llama4()
    for layer in model.model.layers:
        layer.feed_forward.experts = FbgemmFp8Llama4TextExperts(model.config)
    return model


def subclassed_experts() -> nn.Module:
    model = build()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Coded), requires_grad=False)
    return model


def scaled_experts() -> nn.Module:
    """Codes that are whole numbers in bf16, with their scales beside."""
    model = build(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts.register_buffer("down_proj_scales", torch.ones(8, 32, 1))
    return model


def integer_experts() -> nn.Module:
    model = build()
    for name, stack in list(model.model.layers[1].mlp.experts.named_parameters()):
        code = nn.Parameter((stack.detach() * 9).to(torch.int8), requires_grad=False)
        setattr(model.model.layers[1].mlp.experts, name, code)
    return model


def parametrized_experts() -> nn.Module:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = build()
    parametrize.replace_parameter_4bit(model.model.layers[2].mlp.experts, "down_proj")
    return model


BASES = {
    fp8_experts: r"FP8Experts\) holds no plain weights.*codes in float8_e4m3fn.*FineGrainedFP8Config\(dequantize=True",
    mxfp4_experts: r"loaded quantized.*GptOssExperts.*Mxfp4Config\(dequantize=True\)",
    fbgemm_experts: r"Llama4TextMoe\) hold no plain weights: experts.gate_up_proj is codes in float8_e4m3fn.*in bf16",
    subclassed_experts: r"holds no plain weights.*down_proj is a Coded.*load the model in bf16",
    scaled_experts: r"holds no plain weights.*beside its weights there is down_proj_scales",
    integer_experts: r"layers.1.mlp.experts.*gate_up_proj is codes in int8",
    parametrized_experts: r"layers.2.mlp.experts.*down_proj is computed from other tensors",
    fp8_linears: r"linear layers that have weights that are codes in float8.*FineGrainedFP8Config\(dequantize=True",
}


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_refused_by_name(base, way):
    model = base()
    before, kinds = snapshot(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=BASES[base]):
        WAYS_IN[way](model)
    assert_same(before, snapshot(model))
    assert [type(module) for module in model.modules()] == kinds


@every_way
def test_sharded_experts(way, one_process):
    model, mesh = build(), init_device_mesh("cpu", (1,))
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(distribute_tensor(experts.gate_up_proj.detach(), mesh))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.*gate_up_proj is a DTensor \(sharded by fully_shard"):
        WAYS_IN[way](model)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["get_peft_model", "measure_errors", "plan"])
def test_offloaded_experts(way):
    """A map whose errors need no weights can still be measured, and is the map of the same model in memory."""
    model = build()
    cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded, and their values are needed here|has no values here"):
        WAYS_IN[way](model)
    found, want = (measure_errors(m, [tokens()], gradients=False, progress=False) for m in (model, build()))
    assert_close("mass", found.mass, want.mass, "fp32")


def test_dequantized_bases_are_plain():
    """What FineGrainedFP8Config(dequantize=True) leaves behind: 16-bit weights, and a note of where they come from."""
    model = build(dtype=torch.bfloat16)
    want = logits(model)
    model.config.quantization_config = FineGrainedFP8Config(dequantize=True)
    grown = get_peft_model(copy.deepcopy(model), PCGrowConfig(locus={0: [1]}))
    assert torch.equal(logits(grown), want)
    assert {site.base.down_proj.dtype for site in find_experts(grown).sites} == {torch.bfloat16}


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def scaling(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return 1.5 * output


def scaling_input(module: nn.Module, args: tuple) -> tuple:
    return (1.5 * args[0], *args[1:])


def subclassed(mlp: nn.Module) -> None:
    mlp.up_proj.__class__ = Scaled


def patched(mlp: nn.Module) -> None:
    held = mlp.up_proj
    held.forward = lambda x: 1.5 * nn.functional.linear(x, held.weight)


# what is done to the MLP of layer 1, which kind of model it is in, and what is said of it
ALTERED = {
    "hook": (lambda mlp: mlp.experts.register_forward_hook(scaling), build, r"layers.1.mlp.experts.*hook \(scaling\)"),
    "pre-hook": (
        *(lambda mlp: mlp.experts.register_forward_pre_hook(scaling_input), build),
        r"layers.1.mlp.experts.*forward hook \(scaling_input\).*remove it by its handle",
    ),
    "pruned": (
        *(lambda mlp: prune.l1_unstructured(mlp.experts, "down_proj", 0.5), build),
        r"layers.1.mlp.experts.*its down_proj is computed.*down_proj_mask\).*prune.remove\(module, 'down_proj'\)",
    ),
    "weight norm, parametrized": (
        *(lambda mlp: parametrizations.weight_norm(mlp.experts, "gate_up_proj"), build),
        r"layers.1.mlp.experts.*gate_up_proj is computed from other tensors",
    ),
    "linear hook": (
        *(lambda mlp: mlp.down_proj.register_forward_hook(scaling), dense),
        r"mlp of layer 1.*of down_proj, it has a forward hook \(scaling\)",
    ),
    "linear pruned": (
        *(lambda mlp: prune.l1_unstructured(mlp.gate_proj, "weight", 0.5), dense),
        r"mlp of layer 1.*of gate_proj, its weight is computed.*prune.remove\(module, 'weight'\)",
    ),
    "weight norm": (lambda mlp: weight_norm(mlp.up_proj), dense, r"layer 1.*remove_weight_norm\(module, 'weight'\)"),
    "spectral norm": (lambda mlp: spectral_norm(mlp.up_proj), dense, r"layer 1.*remove_spectral_norm"),
    "linear subclass": (subclassed, dense, r"mlp of layer 1.*of up_proj, Scaled has a forward of its own"),
    "linear patched": (patched, dense, r"mlp of layer 1.*of up_proj, its forward was replaced"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
# packed experts run their hooks
@pytest.mark.parametrize(
    ("way", "how"),
    [
        (way, how)
        for way in WAYS_IN
        for how in ALTERED
        if "hook" not in how or way in ("get_peft_model", "measure_errors")
    ],
)
def test_more_than_weights(how, way):
    """A bank copies weights: what else computes with them, or them, would be lost without a word."""
    alter, made, said = ALTERED[how]
    model = made()
    alter(model.model.layers[1].mlp)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        WAYS_IN[way](model)
    assert_same(before, snapshot(model))


@pytest.mark.slow
@pytest.mark.parametrize("made", [build, dense])
def test_what_is_put_on_an_mlp_measured_already(made):
    """It is adopted then, and looked at again."""
    model = made()
    measure_errors(model, [tokens()], progress=False)
    mlp = model.model.layers[1].mlp
    handle = (mlp.experts if made is build else mlp.up_proj).register_forward_hook(scaling)
    with pytest.raises(ValueError, match=r"forward hook \(scaling\)"):
        WAYS_IN["get_peft_model"](model)
    handle.remove()
    before = logits(model)
    assert torch.equal(logits(WAYS_IN["get_peft_model"](model)), before)


def test_hooks_around_nodes_are_kept():
    """On the MLP, they run whatever computes its rows."""
    model = dense()
    model.model.layers[1].mlp.register_forward_hook(scaling)
    before = logits(model)
    grown = get_peft_model(model, PCGrowConfig(locus={1: [0]}))
    assert torch.equal(logits(grown), before)


def tied_stack(model: nn.Module) -> None:
    model.model.layers[2].mlp.experts.gate_up_proj = model.model.layers[0].mlp.experts.gate_up_proj


def shared_module(model: nn.Module) -> None:
    model.model.layers[2].mlp.experts = model.model.layers[0].mlp.experts


def shared_mlp(model: nn.Module) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


def tied_linear(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def tied_to_attention(model: nn.Module) -> None:
    """Not a node, and just as much written over."""
    mlp, attention = model.model.layers[2].mlp, model.model.layers[0].self_attn
    mlp.down_proj.weight.data[:, :32] = attention.o_proj.weight
    attention.o_proj.weight = nn.Parameter(mlp.down_proj.weight.data[:, :32])


def expanded(model: nn.Module) -> None:
    held = model.model.layers[1].mlp.experts
    held.gate_up_proj = nn.Parameter(held.gate_up_proj.detach()[:1].expand(8, -1, -1))


SHARED = {
    tied_stack: (build, r"layers.0.mlp.experts.gate_up_proj and model.layers.2.mlp.experts.gate_up_proj are the same"),
    shared_module: (build, r"layers.0.mlp.experts.\w+ and model.layers.2.mlp.experts.\w+ are the same weights"),
    shared_mlp: (build, r"layers.0.mlp.experts.\w+ and model.layers.2.mlp.experts.\w+ are the same weights"),
    tied_linear: (dense, r"layers.0.mlp.down_proj.weight and model.layers.2.mlp.down_proj.weight are the same weights"),
    tied_to_attention: (
        dense,
        r"layers.2.mlp.down_proj.weight and model.layers.0.self_attn.o_proj.weight are",
    ),
    expanded: (build, r"layers.1.mlp.experts.gate_up_proj lies over itself"),
}


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("how", SHARED, ids=lambda how: how.__name__)
def test_weights_of_two_layers(how, way):
    """Merging one would change the other, and their map would be of one use only."""
    made, said = SHARED[how]
    model = made()
    how(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        WAYS_IN[way](model)
    assert_same(before, snapshot(model))


def test_one_memory_side_by_side():
    """As `vector_to_parameters` and memory-mapped files lay weights out: apart, in one storage; and tied embeddings."""
    for model in (build(tie_word_embeddings=True), dense()):
        whole = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(whole, model.parameters())
        before = logits(model)
        grown = get_peft_model(model, PCGrowConfig(select="random", budget=0.4))
        assert torch.equal(logits(grown), before)


def test_a_second_name():
    """A model that keeps a module under two names uses it once."""
    model = build()
    model.decoder = model.model
    before = logits(model)
    assert torch.equal(logits(grown_on(model)), before)


def test_lora_on_expert_parameters():
    """PEFT puts it around the experts module, where nothing could be told apart."""
    model = build()
    targets = LoraConfig(r=2, target_parameters=["experts.gate_up_proj"], target_modules=[], init_lora_weights=False)
    model = inject_adapter_in_model(targets, model, "beside")
    for way in WAYS_IN.values():
        with pytest.raises(ValueError, match=r"ParamWrapper of another tuner \(adapters: \['beside'\]\)"):
            way(model)
