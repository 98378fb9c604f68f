"""examples/scale.py: its formulas against counts on a model in miniature, its totals against the published ones."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scale
from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import EXPERTS, HIDDEN, VOCABULARY, build, tokens

QWEN = scale.Shape("qwen3_moe", 3, HIDDEN, EXPERTS, 3, 16, VOCABULARY, 2 * HIDDEN * (32 + 16) + 16, 32, 16)
DEEPSEEK = scale.Shape(
    *("deepseek_v3", 4, HIDDEN, EXPERTS, 2, 16, VOCABULARY, scale.latent_attention(HIDDEN, 4, 16, 16, 8, 8, 8)),
    *(64, 64, 1, 1, 64),
)
SHAPES = {shape.name: shape for shape in (QWEN, DEEPSEEK)}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted(name):
    model = build(name)
    held = {name: p.numel() for name, p in model.named_parameters()}
    shape = SHAPES[name]
    assert shape.parameters() == sum(held.values())
    experts = sum(count for name, count in held.items() if ".experts." in name)
    assert shape.sparse_layers * shape.experts * shape.expert == experts
    assert shape.parameters() - shape.parameters(shape.top_k) == experts * (EXPERTS - shape.top_k) // EXPERTS


def test_the_published_sizes():
    """Model cards: 30.5 and 3.3 billion, 671 and 37 billion (of these, 36.6 without the table of words)."""
    assert scale.QWEN.parameters() / 1e9 == pytest.approx(30.5, abs=0.05)
    assert scale.QWEN.parameters(8) / 1e9 == pytest.approx(3.3, abs=0.1)
    assert scale.DEEPSEEK.parameters() / 1e9 == pytest.approx(671, abs=0.5)
    words = scale.DEEPSEEK.vocabulary * scale.DEEPSEEK.hidden
    assert (scale.DEEPSEEK.parameters(8) - words) / 1e9 == pytest.approx(36.6, abs=0.3)


def runs_of(model: nn.Module, layers: nn.ModuleList) -> tuple[int, int]:
    """Runs of layers in the forward and again in the backward of a step."""
    ids, runs = tokens(2, 16), []
    handles = [layer.input_layernorm.register_forward_pre_hook(lambda *_: runs.append(1)) for layer in layers]
    loss = model(input_ids=ids, labels=ids).loss
    forward = len(runs)
    loss.backward()
    for handle in handles:
        handle.remove()
    return forward, len(runs) - forward


def kept_by(model: nn.Module, layers: nn.ModuleList) -> int:
    """Bytes that the layers keep for a backward, weights aside."""
    ids, kept = tokens(2, 16), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    around: list[torch.autograd.graph.saved_tensors_hooks] = []

    def enter(*_) -> None:
        around.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        around[0].__enter__()

    handles = [
        layers[0].register_forward_pre_hook(enter),
        layers[-1].register_forward_hook(lambda *_: around[0].__exit__(None, None, None)),
    ]
    model(input_ids=ids, labels=ids)
    for handle in handles:
        handle.remove()
    return sum(kept.values())


WAYS: dict[str, Callable[[int], PCGrowConfig]] = {
    way: lambda lowest, way=way: PCGrowConfig(locus={layer: [1, 4] for layer in range(lowest, 3)}, settle=way)
    for way in ("sweep", "direct")
}


@pytest.mark.parametrize("lowest", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_runs_and_bytes_of_a_step(way, lowest):
    """Layers that run, gradients that are sent, and what is kept between forward and backward."""
    model = get_peft_model(build(), WAYS[way](lowest)).train()
    plan = scale.Plan(QWEN, ranks=2, tokens=32, budget=2 / EXPERTS * (3 - lowest) / 3, lowest=lowest)
    layers = model.get_base_model().model.layers
    assert runs_of(model, layers) == plan.runs(way)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # of two processes each receives half of them once by FSDP, and twice that by DDP
    held = sum(gradient.numel() * scale.BANK for gradient in gradients)
    assert plan.fsdp(way)["gradients"] == pytest.approx(held / 2)
    assert plan.ddp(way) == pytest.approx(held)
    if way == "sweep":
        # inputs alone, in fp32; below the lowest layer that trains nothing is kept
        assert kept_by(model, layers) == plan.tokens * HIDDEN * 4 * (3 - lowest)


def test_lora_and_maps():
    """LoRA's factors on a dense twin of each matrix, and the sums that a map holds."""
    model = get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    attention = sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = 4 * 3 * EXPERTS * 3 * (HIDDEN + 16)
    assert scale.Plan(QWEN, 2, rank=4).lora == attention + experts
    emap = measure_errors(build(), [tokens()], sketch_dim=8, progress=False)
    assert scale.Plan(QWEN, 2).map_bytes(sketch=8) == sum(sums.numel() * 4 for sums in emap.gradient.values())


def test_it_prints_what_breaks(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scale.py"])
    scale.main()
    printed = capsys.readouterr().out
    assert all(f" {shape.parameters():,} parameters" in printed for shape in (scale.QWEN, scale.DEEPSEEK))
    assert "Qwen3-30B-A3B, 8: 20.8" in printed
    assert "DeepSeek-V3, 64: 120 GB, does NOT fit; FSDP waits" in printed
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert all(cell.strip() for row in rows for cell in row[1:])
