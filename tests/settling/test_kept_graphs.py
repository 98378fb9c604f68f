"""Layers that `direct` keeps the graph of, rather than run them again; `test_ways` has the gradients' closed form."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.settling.descent import Descent
from tiny import backward, build, tokens, trainable


def deep(settle: str, **config) -> torch.nn.Module:
    base = build(num_hidden_layers=5, dtype=torch.float64)
    return get_peft_model(base, PCGrowConfig(locus={0: [1, 4], 3: [0, 3, 7]}, settle=settle, **config)).train()


def kept_layers(model: torch.nn.Module, monkeypatch) -> list[int]:
    """Layers of one step that were not run again."""
    found, through = [], Descent._through
    monkeypatch.setattr(
        Descent,
        "_through",
        lambda self, run, *rest: (run.output is not None and found.append(run.index), through(self, run, *rest))[1],
    )
    backward(model)
    return found


@pytest.mark.parametrize("what", ["nothing", "a hook", "a LoRA beside", "checkpointing", "a user's checkpoint"])
def test_what_else_is_there_makes_direct_run_layers_again(what, monkeypatch):
    """With the same gradients."""
    want = backward(deep("direct", settle_depth=1))
    model = deep("direct", settle_depth=1)
    layer = find_experts(model).layers[3]
    if what == "a hook":
        layer.self_attn.register_forward_hook(lambda *_: None)
    if what == "a LoRA beside":
        config = LoraConfig(target_modules=["layers.3.self_attn.q_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, model.get_base_model(), "beside")
    if what == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if what == "a user's checkpoint":
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k))
    kept = kept_layers(model, monkeypatch)
    assert (3 in kept) == (what == "nothing")
    if what != "a LoRA beside":  # which changes what the layer computes
        assert_all_close({name: p.grad for name, p in trainable(model).items()}, want, "fp64 gradient")


def test_kept_graphs_go_again():
    """As retained ones do; without that, they are freed."""
    model = deep("direct")
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in trainable(model).items()}
    loss.backward()
    assert_all_close({n: p.grad for n, p in trainable(model).items()}, {n: 2 * g for n, g in once.items()}, "fp64")
    with pytest.raises(RuntimeError):
        loss.backward()
