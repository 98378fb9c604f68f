"""Decoding with a static cache and compiled code: tokens of the eager model, with a cache that grows."""

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from peft_pcgrow import PCGrowConfig
from tiny import domain, spawned


def grown() -> nn.Module:
    """A layer with newborns that is also deepened, and two as they were."""
    model = spawned(implementation="grouped_mm", gate_fpr=0.3, locus={1: [1, 4]})
    model.add_adapter("deepened", PCGrowConfig(locus={1: [0, 3, 7]}))
    model.base_model.set_adapter(["default", "deepened"])
    torch.manual_seed(1)
    for layer in model.base_model.tuner_layers():
        for weight in (weight for name in layer.births for weight in layer.bank(name).values()):
            weight.data += torch.randn_like(weight)
    return model.eval()


def answers(model: nn.Module, device: str = "cpu", **options) -> list[list[int]]:
    ids = domain(2)[:, :6].to(device)
    return model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, **options).tolist()


def test_static_cache():
    model = grown()
    want = answers(model)
    assert answers(model, cache_implementation="static", disable_compile=True) == want
    with model.disable_adapter():
        assert answers(model) != want


@pytest.mark.slow
def test_compiled():
    """What transformers compiles on a GPU, by a backend that runs the graphs as they are."""
    model, graphs = grown(), []
    want = answers(model)
    config = CompileConfig(backend=lambda graph, _: graphs.append(graph) or graph, mode=None, dynamic=False)
    config._compile_all_devices = True  # it compiles on GPUs alone otherwise
    torch.compiler.reset()
    assert answers(model, cache_implementation="static", compile_config=config) == want
    assert graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs():
    """transformers' own default there: mode "reduce-overhead", which captures CUDA graphs."""
    model = grown().to("cuda")
    want = answers(model, "cuda")
    torch.compiler.reset()
    for _ in range(3):  # warmed up, recorded, replayed
        assert answers(model, "cuda", cache_implementation="static") == want
