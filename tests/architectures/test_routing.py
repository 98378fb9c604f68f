"""However a router chooses and weighs, banks compute what they are handed: against a loop over tokens in fp64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    ZayaConfig,
    ZayaForCausalLM,
)

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks, is_packed
from tiny import COMMON, EXPERTS, LOCUS, build, domain, gate_passes, logits, mixed, spawned, tokens, train, trainable
from tiny import qwen3_moe as qwen3

WAYS = ("eager", "grouped_mm", "batched_mm")
# experts that are on another device: expert parallelism puts EXPERTS, at weight 0, in their place
ELSEWHERE = (2, 5)


def routers(model: nn.Module) -> list[nn.Module]:
    return [site.router for site in find_experts(model).sites if site.router is not None]


def deepseek_v4(**changes) -> PreTrainedModel:
    """Layers 0 and 1 look experts up by the word, some of them twice for a token; layer 2 has a correction bias."""
    settings = {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 16,
        "partial_rotary_factor": 0.5,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "swiglu_limit": 1.0,
    }
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**{**COMMON, **settings, **changes}))
    for label, table in model.named_buffers():
        if label.endswith("tid2eid"):
            table.copy_(torch.randint(EXPERTS, table.shape))
    return model


def phimoe(**changes) -> PreTrainedModel:
    """Sparsemixer: samples in training."""
    settings = {"intermediate_size": 16, "num_local_experts": EXPERTS, "router_jitter_noise": 0.3}
    return PhimoeForCausalLM(PhimoeConfig(**{**COMMON, **settings, **changes}))


def zaya(**changes) -> PreTrainedModel:
    """One expert a token, or none: skipped tokens come as expert 0 at weight 0."""
    settings = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": EXPERTS, "router_hidden_size": 16}
    model = ZayaForCausalLM(ZayaConfig(**{**COMMON, **settings, **changes}))
    for router in routers(model):
        router.get_buffer("balancing_biases")[-1] = 0.5
        for linear in router.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data.mul_(3)  # all tokens would go to few experts
    return model


def sharded(**changes) -> PreTrainedModel:
    """A router's choice as expert parallelism hands it on to one device."""
    model = qwen3(**changes)

    def put(_: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scores, weight, index = output
        away = torch.isin(index, torch.tensor(ELSEWHERE))
        return scores, weight.masked_fill(away, 0), index.masked_fill(away, EXPERTS)

    for router in routers(model):
        router.register_forward_hook(put)
    return model


@dataclass(frozen=True)
class Case:
    """A model, and what is peculiar to how it routes: true of each layer's (layer, words, index, weight)."""

    name: str | Callable[..., PreTrainedModel]
    peculiar: Callable[[int, Tensor, Tensor, Tensor], Any]
    changes: dict[str, Any] = field(default_factory=dict)
    locus: dict[int, list[int]] = field(default_factory=lambda: LOCUS)

    def build(self, dtype: torch.dtype = torch.float32, way: str = "eager") -> PreTrainedModel:
        return build(self.name, dtype, way, **self.changes)


def sums_to(total: float) -> Callable:
    return lambda layer, words, index, weight: torch.allclose(weight.sum(1), torch.tensor(total, dtype=weight.dtype))


def sums_differ(layer: int, words: Tensor, index: Tensor, weight: Tensor) -> bool:
    return float(weight.sum(1).std()) > 0.01


def one_group(layer: int, words: Tensor, index: Tensor, weight: Tensor) -> bool:
    groups = index // (EXPERTS // 2)
    return bool((groups == groups[:, :1]).all()) and len(groups.unique()) == 2


def by_word(layer: int, words: Tensor, index: Tensor, weight: Tensor) -> bool:
    """The same word, the same experts, below the top layer; and some have an expert twice."""
    alike = [len(index[words == word].unique(dim=0)) == 1 for word in words.unique()]
    return all(alike) and bool((index.sort().values.diff() == 0).any()) if layer < 2 else not all(alike)


def some_skipped(layer: int, words: Tensor, index: Tensor, weight: Tensor) -> bool:
    skipped = weight == 0
    return 0 < int(skipped.sum()) < len(weight) and not index[skipped].any()


CASES = {
    "softmax, renormalised": Case("qwen3_moe", sums_to(1)),
    "softmax": Case("qwen3_moe", sums_differ, {"norm_topk_prob": False}),
    "softmax of the chosen": Case("gpt_oss", sums_to(1)),
    "sigmoid, grouped, biased, renormalised": Case("deepseek_v3", one_group),
    "sigmoid, grouped, biased": Case(
        "deepseek_v3",
        lambda *routed: one_group(*routed) and sums_differ(*routed),
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
    "hash": Case(deepseek_v4, by_word),
    "hash, sigmoid": Case(deepseek_v4, by_word, {"scoring_func": "sigmoid"}),
    "sparsemixer": Case(phimoe, sums_differ),
    "skip class": Case(zaya, some_skipped, locus={1: [0, 3], 2: [0, 4]}),
    "sentinels": Case(sharded, lambda layer, words, index, weight: not weight[index == EXPERTS].any()),
}
cases = pytest.mark.parametrize("case", CASES)
ways = pytest.mark.parametrize("way", WAYS)


def expert_output(base: Any, matrices: dict[str, Tensor], x: Tensor) -> Tensor:
    """One expert on one token `x [H]`, fp64, from its architecture's definition."""
    kind = type(base).__name__
    if "GptOss" in kind:
        both = x @ matrices["gate_up_proj"] + matrices["gate_up_proj_bias"]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ matrices["down_proj"] + matrices["down_proj_bias"]
    gate, up = (matrices["gate_up_proj"] @ x).chunk(2)
    if "DeepseekV4" in kind:
        gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return matrices["down_proj"] @ (silu(gate) * up)


def looped(layer: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor, passes: Tensor | None = None) -> Tensor:
    """What a grown layer should put out, `[T, H]` fp64, token by token.

    Args:
        passes: tokens that the layer's gate lets pass, `[T]`; None: all, or there is none.
    """
    base, bank, grown = layer.base_layer, layer.bank("default"), layer.grown["default"]
    every = {
        name: stack[torch.arange(base.num_experts)].detach().double() for name, stack in expert_stacks(base).items()
    }
    bank = {name: stack.detach().double() for name, stack in bank.items()}
    hidden, weight = hidden.double(), weight.double()
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, choice in (index < EXPERTS).nonzero().tolist():
        expert = int(index[token, choice])
        mine = expert in grown and (passes is None or bool(passes[token]))
        place, stacks = (grown.index(expert), bank) if mine else (expert, every)
        matrices = {name: stack[place] for name, stack in stacks.items()}
        total[token] += weight[token, choice] * expert_output(base, matrices, hidden[token])
    return total


def captured(model: nn.Module, ids: Tensor, layers: list[Any]) -> dict[int, tuple[Tensor, ...]]:
    """What layers are called with in one forward, and what they put out: hidden, index, weight, output, by layer."""
    found, handles = {}, []
    for number, layer in layers:

        def look(module: nn.Module, args: tuple, output: Tensor, number: int = number) -> None:
            found[number] = *(a.detach().clone() for a in args), output.detach()

        handles.append(layer.register_forward_hook(look))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def grow(case: str, dtype: torch.dtype, way: str, **config) -> nn.Module:
    """A model whose banks are far from their donors."""
    base = CASES[case].build(dtype, way)
    torch.manual_seed(3)
    config = PCGrowConfig(locus=CASES[case].locus, init_weights=False, **config)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    as_sharded(model, case)
    return model


def as_sharded(model: nn.Module, case: str) -> None:
    """Tell the fast paths of sentinels; no model that says so is grown or measured, so this comes afterwards."""
    for site in find_experts(model).sites if case == "sentinels" else ():
        site.base._is_expert_parallel = True


def assert_as_looped(model: nn.Module, ids: Tensor, case: str, kind: str) -> None:
    """Every grown layer, called the way that the case says, puts out what the loop does."""
    layers = model.base_model.tuner_layers()
    found = captured(model, ids, [(layer.layer_index, layer) for layer in layers])
    assert set(found) == set(LOCUS)
    for layer in layers:
        hidden, index, weight, output = found[layer.layer_index]
        assert CASES[case].peculiar(layer.layer_index, ids.flatten(), index, weight)
        assert bool((index == EXPERTS).any()) == (case == "sentinels")
        passes = None
        if layer.spawned("default"):
            real = torch.ones_like(ids, dtype=torch.bool)
            passes = gate_passes(layer, "default", hidden.view(*ids.shape, -1), real).flatten()
            assert 0 < int(passes.sum()) < len(passes)
        grown = torch.isin(index, torch.tensor(layer.grown["default"])).any(dim=1)
        assert 0 < int((grown if passes is None else grown & passes).sum()) < len(index)
        assert_close(f"layer {layer.layer_index}", output, looped(layer, hidden, index, weight, passes), kind)


# ---- deepened


@pytest.mark.slow
@cases
@ways
@pytest.mark.parametrize("training", [True, False])
def test_forward(case, way, training):
    dtype, kind = (torch.float32, "fp32") if way == "grouped_mm" else (torch.float64, "fp64")
    if case == "skip class":
        dtype, kind = torch.float32, "fp32"  # its residual stream is
    model = grow(case, dtype, way)
    assert_as_looped(model.train(training), tokens(), case, kind)


@pytest.mark.slow
@cases
@ways
def test_birth(case, way):
    base = CASES[case].build(way=way)
    model = get_peft_model(base, PCGrowConfig(locus=CASES[case].locus))
    as_sharded(model, case)
    found = logits(model)
    with model.disable_adapter():
        assert torch.equal(found, logits(model))


@pytest.mark.slow
@cases
def test_gradients(case):
    """Settled and by backprop, at the same random state: what is sampled in the forward is not sampled anew."""
    found = {}
    for settle in ("sweep", "backprop"):
        model = grow(case, torch.float64, "eager", settle=settle)
        torch.manual_seed(7)
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        found[settle] = {name: p.grad for name, p in trainable(model).items()}
    assert all(bool(gradient.any()) for gradient in found["backprop"].values())
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.slow
def test_sparsemixer_samples_in_training_only():
    model = grow("sparsemixer", torch.float32, "eager")
    layers = [(1, model.base_model.tuner_layers()[0])]
    drawn = [captured(model.train(training), tokens(), layers)[1][1] for training in (True, True, False, False)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])


@pytest.mark.slow
def test_skipped_tokens_train_nothing():
    """Expert 0 gets no gradient from tokens that come to it at weight 0 alone."""
    base = build(zaya)
    for router in routers(base):
        router.get_buffer("balancing_biases")[-1] = 2.0
    model = get_peft_model(base, PCGrowConfig(locus={1: [0, 4]}, settle="backprop")).train()
    _, index, weight, output = captured(model, tokens(), [(1, model.base_model.tuner_layers()[0])])[1]
    assert not index.any()
    assert not weight.any()
    assert not output.any()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in trainable(model).values())


# ---- measured


@pytest.mark.slow
@cases
def test_map_counts(case):
    """Rows and routing weights of a map are those that the experts were handed, without what is nobody's."""
    model, ids = CASES[case].build(torch.float64), tokens()
    found = captured(model, ids, [(site.layer, site.module) for site in find_experts(model).sites])
    emap = measure_errors(model, [ids], progress=False)
    for row, layer in enumerate(emap.layers):
        _, index, weight, _ = found[layer]
        own = (index < EXPERTS) & (weight != 0)
        count = torch.bincount(index[own], minlength=EXPERTS).double()
        assert torch.equal(emap.count[row], count)
        weights = torch.bincount(index[own], weight[own].double(), minlength=EXPERTS)
        assert_close("weights", emap.weight[row], weights, "fp64 across batches")
        assert case != "sentinels" or not count[list(ELSEWHERE)].any()
        assert case != "skip class" or count.sum() < ids.numel()


# ---- spawned, and on packed experts

SPAWNED = ["sigmoid, grouped, biased, renormalised", "softmax of the chosen", "hash", "sparsemixer", "sentinels"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SPAWNED)
@ways
def test_newborns(case, way):
    """Born with the base's bits, they compute their donors' rows of the tokens that pass, by their own matrices."""
    dtype, kind = (torch.float32, "fp32") if way == "grouped_mm" else (torch.float64, "fp64")
    model = spawned(CASES[case].name, dtype, way, autocast=False, gate_fpr=0.2)
    as_sharded(model, case)
    born = logits(model, mixed())
    with model.disable_adapter():
        assert torch.equal(born, logits(model, mixed()))
    train(model, lr=3e-2, texts=domain)
    assert not torch.equal(born, logits(model, mixed()))
    for training in (True, False):
        assert_as_looped(model.train(training), mixed(), case, kind)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SPAWNED, "softmax, renormalised"])
@pytest.mark.parametrize("newborns", [True, False])
def test_packed(case, newborns):
    if newborns:
        model = spawned(CASES[case].name, gate_fpr=0.2, base_quantization="nf4")
        train(model, lr=3e-2, texts=domain)
    else:
        model = grow(case, torch.float32, "eager", base_quantization="nf4")
    assert all(is_packed(layer.base_layer) for layer in model.base_model.tuner_layers())
    for training in (True, False):
        assert_as_looped(model.train(training), mixed(), case, "fp32")
