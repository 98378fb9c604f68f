"""Training that cannot work is refused: steps that are not finite, experts that do not move, bypassed blocks."""

import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer
from tiny import LOCUS, PAD, assert_same, build, logits, snapshot, tokens, train

POISONS = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss / loss.new_zeros(()),
    "overflow": lambda loss: loss * 3e38 * 1e4,
}


def grow(model: nn.Module, **settings) -> PeftModel:
    autocast = settings.pop("autocast_adapter_dtype", True)
    config = PCGrowConfig(**{"locus": LOCUS, **settings})
    return get_peft_model(model, config, autocast_adapter_dtype=autocast).train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, seed: int = 0, mask: Tensor | None = None) -> Tensor:
    ids = tokens(seed=seed)
    if mask is None:
        return model(input_ids=ids, labels=ids).loss
    padded, labels = ids.masked_fill(mask == 0, PAD), ids.masked_fill(mask == 0, -100)
    return model(input_ids=padded, attention_mask=mask, labels=labels).loss


OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
    "SGD": lambda model: torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9),
    "Muon": lambda model: create_pcgrow_optimizer(model, lr=0.02),
}


# ---- steps that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_poisoned_step_is_refused(optimizer, poison, settle):
    """A loss that is NaN or infinite stops the step: no weight, no optimizer state changes, and training can go on."""
    model = grow(build(), settle=settle, modules_to_save=["lm_head"])
    optimizer = OPTIMIZERS[optimizer](model)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    POISONS[poison](loss_of(model, 1)).backward()
    before = snapshot(model)
    state = {key: value.clone() for p in trainable(model) for key, value in named_state(optimizer, p).items()}
    with pytest.raises(FloatingPointError, match=r"layer [12], experts .*\(adapter 'default'\) is NaN or infinite"):
        optimizer.step()
    assert_same(before, snapshot(model))
    assert_same(state, {key: value for p in trainable(model) for key, value in named_state(optimizer, p).items()})
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in trainable(model))


def named_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    held = optimizer.state[parameter].items()
    return {f"{id(parameter)} {key}": value for key, value in held if isinstance(value, Tensor)}


def test_poison_in_one_micro_batch():
    """Under accumulation one poisoned micro-batch of several refuses the step; without it the step goes through."""
    model = grow(build())
    optimizer = torch.optim.AdamW(trainable(model))
    for seed in range(3):
        loss = loss_of(model, seed) / 3
        (loss * float("nan") if seed == 1 else loss).backward()
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match="the step is refused and no weight has changed"):
        optimizer.step()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_broken_expert_is_named(value):
    model = grow(build())
    optimizer = torch.optim.AdamW(trainable(model))
    loss_of(model).backward()
    model.base_model.tuner_layers()[1].bank("default")["down_proj"].grad[2, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"the gradient of layer 2, experts \[7\] \(adapter 'default'\)"):
        optimizer.step()


def test_other_models_are_not_watched():
    """The guard of one model leaves the steps of others alone, NaN or not."""
    model, other = grow(build()), nn.Linear(2, 2)
    loss_of(model).backward()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.full((1, 2), float("nan"))).sum().backward()
    optimizer.step()
    assert bool(torch.isnan(other.weight).all())


# ---- experts that do not move


@pytest.mark.slow
def test_optimizer_from_before():
    """An optimizer made before get_peft_model holds none of the banks: said at the second training forward."""
    base = build()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    model = grow(base)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    text = r"node\(s\) 1\.1, 1\.4, 2\.0, 2\.3, 2\.7 that received error have not moved; no optimizer holds its weights"
    with pytest.raises(RuntimeError, match=text):
        loss_of(model, 1)


@pytest.mark.slow
def test_optimizer_of_a_part():
    """An optimizer that holds one layer's banks only: the others are named, and training may go on."""
    model = grow(build())
    optimizer = torch.optim.AdamW(model.base_model.tuner_layers()[0].parameters(), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"node\(s\) 2\.0, 2\.3, 2\.7 received error, but no optimizer holds their"):
        loss_of(model, 1).backward()
    optimizer.step()


def test_rate_too_small_for_bf16():
    """bf16 banks whose update rounds away: said after the first step."""
    model = grow(build(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-12)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="have not moved; its learning rate may be too small for the dtype"):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_warm_up_from_zero(optimizer):
    """A first step at rate zero is no fault; the check waits for a rate, and then still finds what does not move."""
    model = grow(build())
    optimizer = OPTIMIZERS[optimizer](model)
    rates = [group["lr"] for group in optimizer.param_groups]
    before = snapshot(model)
    for step, share in enumerate((0.0, 0.0, 0.5, 1.0)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if share == 0:
            assert_same(before, snapshot(model))
    late = grow(build(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    sgd = torch.optim.SGD(trainable(late), lr=0.0)
    loss_of(late).backward()
    sgd.step()
    sgd.param_groups[0]["lr"] = 1e-12
    loss_of(late, 1).backward()
    with pytest.raises(RuntimeError, match="have not moved"):
        sgd.step()


def routed(base: nn.Module, mask: Tensor) -> set[int]:
    """Experts of layer 1 that a batch reaches, padding included."""
    seen = []
    handle = base.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        loss_of(base, mask=mask)
    handle.remove()
    return set(seen[0].flatten().tolist())


def pulled(base: nn.Module, mask: Tensor) -> set[int]:
    """Experts of layer 1 that autograd has a gradient for."""
    stack = base.model.layers[1].mlp.experts.down_proj
    gradient = torch.autograd.grad(loss_of(base, mask=mask), stack)[0]
    return set(gradient.flatten(1).any(dim=1).nonzero().flatten().tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_experts_of_padding_may_rest(side):
    """Experts whose rows are all padding, or tokens that no label follows, have no gradient and need not move."""
    mask = torch.zeros(4, 16, dtype=torch.long)
    mask[:, slice(-2, None) if side == "left" else slice(2)] = 1
    base = build(num_experts_per_tok=1)
    pull = pulled(base, mask)
    assert pull < routed(base, mask), "no expert rests: choose another seed"
    model = grow(base, locus={1: list(range(8))})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    bank = model.base_model.tuner_layers()[0].bank("default")["down_proj"]
    before = bank.detach().clone()
    loss_of(model, mask=mask).backward()
    optimizer.step()
    assert set((bank != before).flatten(1).any(dim=1).nonzero().flatten().tolist()) == pull
    loss_of(model, mask=mask)


def test_discarded_batch_is_forgiven():
    """Experts that only a discarded batch reached need not move in the step that follows on another batch."""
    mask = torch.zeros(4, 16, dtype=torch.long)
    mask[:, :2] = 1
    base = build(num_experts_per_tok=1)
    missed = sorted(set(range(8)) - routed(base, mask))
    assert missed, "choose another seed"
    model = grow(base, locus={1: list(range(8))})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    loss_of(model).backward()
    optimizer.zero_grad()
    before = snapshot(model)
    for _ in range(2):
        loss_of(model, mask=mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    name = next(name for name in before if name.endswith("pcgrow_down_proj.default.weight"))
    assert not (snapshot(model)[name] != before[name])[missed].any()


@pytest.mark.slow
def test_switching_adapters_checks_again():
    """After set_adapter the newly active banks are watched in their turn."""
    model = grow(build())
    train(model)
    model.add_adapter("second", PCGrowConfig(locus={0: [1, 2]}))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)  # of the first adapter
    model.set_adapter("second")
    model.train()
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"node\(s\) 0\.1, 0\.2 that received error have not moved"):
        loss_of(model)


@pytest.mark.slow
def test_two_optimizers():
    """One optimizer for the head and one for the banks, stepped one after the other, raise nothing."""
    model = grow(build(), modules_to_save=["lm_head"])
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    rest = [p for name, p in model.named_parameters() if "pcgrow_" in name]
    optimizers = [torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(rest, lr=1e-2)]
    before = snapshot(model)
    for step in range(3):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = snapshot(model)
    trained = [name for name in before if name.endswith(".default.weight")]
    assert len(trained) == 5
    assert all(not torch.equal(before[name], after[name]) for name in trained)


def test_training_while_merged():
    """A merged adapter's banks are not in use: training them would move nothing."""
    model = grow(build())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged"):
        loss_of(model)
    model.unmerge_adapter()
    loss_of(model).backward()
    assert all(bool(p.grad.any()) for p in trainable(model))


# ---- losses that a sweep does not see


def test_lower_states_are_read_as_they_are():
    """Reading a lower layer's hidden state changes nothing (see test_handover for losses on them)."""
    model = grow(build())
    output = model(input_ids=tokens(), labels=tokens(), output_hidden_states=True)
    control = grow(build(), settle="backprop")
    expected = control(input_ids=tokens(), labels=tokens(), output_hidden_states=True)
    for state, same in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, same, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(bool(p.grad.any()) for p in trainable(model))


# ---- blocks and caches


def test_bypassed_block():
    """A MoE block whose forward was replaced on the instance, as a hub kernel does, is refused before and after."""
    base = build()
    block = base.model.layers[2].mlp
    block.forward = types.MethodType(lambda self, x: x, block)
    with pytest.raises(ValueError, match=r"the block around model.layers.2.mlp.experts \(Qwen3MoeSparseMoeBlock\)"):
        grow(base)
    del block.forward
    model = grow(base)
    block.forward = types.MethodType(lambda self, x: x, block)
    text = "layer 2 ran without calling its grown experts: its MoE block was replaced"
    with pytest.raises(RuntimeError, match=text):
        loss_of(model)
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match=text):
        logits(model)
    del block.forward
    assert torch.equal(logits(model), logits(build()))


def test_filled_cache():
    """Training behind a filled KV cache is refused, and the next training forward is right."""
    model = grow(build(dtype=torch.float64))
    expected = torch.autograd.grad(loss_of(model), trainable(model))
    ids = tokens()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match=r"behind a filled KV cache \((cache|past_key_values) holds 8 positions\)"):
        model(input_ids=ids[:, 8:], past_key_values=cache, labels=ids[:, 8:])
    assert torch.is_grad_enabled()
    again = torch.autograd.grad(loss_of(model), trainable(model))
    assert all(torch.equal(one, two) for one, two in zip(again, expected, strict=True))
    control = grow(build(dtype=torch.float64), settle="backprop")
    control(input_ids=ids[:, 8:], past_key_values=cache, labels=ids[:, 8:]).loss.backward()
    assert all(float(p.grad.norm()) > 0 for p in trainable(control))


@pytest.mark.parametrize("training", [True, False])
def test_returned_cache_is_usable(training):
    """A cache filled while gradients are enabled is full: decoding never forgets its past."""
    model = grow(build()).train(training)
    ids = tokens()
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 8:]
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    with torch.no_grad():
        second = model(input_ids=ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-4)


def test_failing_layer_leaves_no_trace():
    """A forward that dies inside a layer leaves gradients enabled, and the next step is right."""
    model = grow(build(dtype=torch.float64))
    expected = torch.autograd.grad(loss_of(model), trainable(model))
    handle = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    handle.remove()
    assert torch.is_grad_enabled()
    again = torch.autograd.grad(loss_of(model), trainable(model))
    assert all(torch.equal(one, two) for one, two in zip(again, expected, strict=True))
