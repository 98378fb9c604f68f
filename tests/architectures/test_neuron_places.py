"""Where the intermediate neurons of experts lie, in every layout that transformers' contract allows."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_pcgrow.architectures.experts import expert_stacks, neuron_places, stack_inputs, stack_layouts
from peft_pcgrow.architectures.layout import StackLayout


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", ["none", "concatenated", "interleaved"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_layout(gate, transposed, bias):
    """Weights written at the places of some neurons into zeros: those neurons speak, are heard, and no others."""
    e, h, i = 3, 5, 8
    first = "up_proj" if gate == "none" else "gate_up_proj"
    shapes = {first: (i if gate == "none" else 2 * i, h), "down_proj": (h, i)}
    split = {"interleaved": lambda y: (y[..., ::2], y[..., 1::2]), "concatenated": lambda y: y.chunk(2, dim=-1)}
    facts = {
        "num_experts": e,
        "has_gate": gate != "none",
        "has_bias": bias,
        "is_transposed": transposed,
        "is_concatenated": gate != "interleaved",
        "_apply_gate": lambda y: torch.stack(split[gate](y)).abs().sum(0),
        "act_fn": torch.abs,
    }
    base = nn.Module()
    base.__dict__.update(facts)
    for name, (rows, columns) in shapes.items():
        setattr(base, name, nn.Parameter(torch.zeros(e, *((columns, rows) if transposed else (rows, columns)))))
        if bias:
            setattr(base, f"{name}_bias", nn.Parameter(torch.zeros(e, rows)))
    neurons, weights = torch.tensor([1, 6, 7]), {}
    for name, stack in expert_stacks(base).items():
        lying, weights[name] = neuron_places(base, name, neurons), stack.detach().clone()
        assert (lying is None) == (name == "down_proj_bias")
        if lying is not None:
            axis, places = lying
            weights[name].transpose(1, axis)[0, places] = 1 + torch.rand(len(places), *([h] if stack.dim() > 2 else []))
            copies = len(places) // len(neurons)
            assert stack_layouts(base)[name] == StackLayout(axis - 1, copies, copies == 2 and gate == "interleaved")
    full = SimpleNamespace(**facts, **weights)
    inner = stack_inputs(full, torch.rand(4, h) + 1, 0)["down_proj"]
    assert inner.any(dim=0).nonzero().flatten().tolist() == neurons.tolist()
    down = weights["down_proj"][0]
    assert (down if transposed else down.mT).any(dim=1).nonzero().flatten().tolist() == neurons.tolist()
