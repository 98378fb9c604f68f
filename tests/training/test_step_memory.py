"""What a step is said to take, against the allocator's own record of one."""

from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config, OlmoeConfig, Qwen3MoeConfig

import benchmark
import memory_script
import two_processes
from memory_script import ATTENTION, LAYERS, SHAPES, config
from peft_pcgrow import find_experts
from peft_pcgrow.training.step_memory import StepMemory, step_memory

CASES = [
    *(("descent", way, "Muon") for way in ("sweep", "direct", "backprop", "spawn")),
    ("descent", "LoRA", "AdamW"),
    ("output", "sweep", "AdamW"),
    ("output", "backprop", "Muon"),
    ("update", "sweep", "Muon"),
]  # AdamW's update takes nothing that the way down has not


@cache
def told(shape: str, ranks: int = 1) -> dict[tuple[str, str], StepMemory]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32)
    *_, grown, texts, length = SHAPES[shape]
    locus = dict.fromkeys(range(LAYERS), grown)
    rows = step_memory(model, find_experts(model), locus, texts, length, "cpu", ranks)
    return {(row.way, row.optimizer): row for row in rows}


def measured(shape: str, way: str, optimizer: str) -> int:
    """Of the second step, when the optimizer's state is there."""
    step = memory_script.stepping(memory_script.grown(shape, way), shape, optimizer)
    return benchmark.peak_bytes(step, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.cpu("kernels of a GPU take other memory on the way")
@pytest.mark.parametrize(("shape", "way", "optimizer"), CASES)
def test_as_measured(shape, way, optimizer):
    row = told(shape)["sweep" if way == "spawn" else way, optimizer]
    assert row.step == getattr(row, shape)
    assert row.step == pytest.approx(measured(shape, way, optimizer), rel=0.1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    return two_processes.run(Path(memory_script.__file__), tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.cpu("processes meet over gloo")
@pytest.mark.parametrize("case", memory_script.TWO)
def test_on_two_processes(ranks, case):
    """That FSDP2 shards it over: what each holds, to the byte, and what a step takes there."""
    row = told(case[0], ranks=2)[case[1:]]
    assert max(found[case]["held"] for found in ranks) == row.base + row.adapter
    for found in ranks:
        assert row.step == pytest.approx(found[case]["step"], rel=0.1)


def test_more_processes_take_less_each():
    """The more of them, the less each holds; what it gathers stays, and one process is as without."""
    alone, two, eight = (told("descent", n)["sweep", "Muon"] for n in (1, 2, 8))
    assert told("descent")["sweep", "Muon"] == alone
    assert eight.base < two.base < alone.base
    assert two.adapter == alone.adapter // 2
    # two experts a layer are on two processes of eight
    assert eight.adapter == two.adapter
    assert eight.descent > alone.descent - alone.adapter


def test_what_is_held():
    """The base, banks in fp32, and the optimizer's state, to the byte."""
    model = AutoModelForCausalLM.from_config(config("descent"))
    storages = {held.untyped_storage().data_ptr(): held.untyped_storage() for held in model.state_dict().values()}
    storages |= {held.untyped_storage().data_ptr(): held.untyped_storage() for held in model.buffers()}
    weights = sum(storage.nbytes() for storage in storages.values())
    experts = model.model.layers[0].mlp.experts
    one = 4 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=ATTENTION)).get_nb_trainable_parameters()[0]
    for (way, optimizer), row in told("descent").items():
        adapter = 4 * lora if way == "LoRA" else LAYERS * 2 * one
        held = row.base, row.adapter, row.state
        assert held == (weights, adapter, adapter * (1 if optimizer == "Muon" else 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OlmoeConfig, DeepseekV3Config, Qwen3MoeConfig])
def test_whole_models(kind):
    """At their real sizes, and by a GPU's kernels: sweeping takes less than backprop, and what a step takes grows with
    its tokens."""
    found = []
    for length in (256, 512):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind(), dtype=torch.bfloat16)
        tree = find_experts(model)
        rows = step_memory(model, tree, {site.layer: 2 for site in tree.sites}, 2, length)
        found.append({(row.way, row.optimizer): row for row in rows})
    short, long = found
    assert long["sweep", "Muon"].step < long["backprop", "Muon"].step
    for name, row in long.items():
        assert short[name].output < row.output < 2.01 * short[name].output
        assert short[name].base == row.base
