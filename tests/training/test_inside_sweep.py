"""Steps inside the sweep: those after it, with one layer's gradients in memory; what needs all of them is refused."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_lr
from peft_pcgrow.adapter import inside_sweep
from peft_pcgrow.settling.layer_run import LayerRun
from tiny import assert_same, build, grown, spawned, tokens, trainable

DEEP = {0: [2, 5, 6], 1: [1, 4, 7], 2: [0, 3, 7], 3: [1, 2, 3], 4: [0, 1, 2]}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def deep(dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    base = build(dtype=dtype, num_hidden_layers=len(DEEP))
    return get_peft_model(base, PCGrowConfig(locus=DEEP, **changes), autocast_adapter_dtype=False)


def checkpointed() -> torch.nn.Module:
    model = deep()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def beside() -> torch.nn.Module:
    torch.manual_seed(0)
    return grown(dtype=torch.float64, lora=LORA, modules_to_save=["lm_head"])


def shared() -> torch.nn.Module:
    """Two layers with one bank."""
    model = grown(locus={1: [1, 4], 2: [1, 4]}, dtype=torch.float64)
    lower, upper = model.base_model.tuner_layers()
    for name in ("pcgrow_gate_up_proj", "pcgrow_down_proj"):
        getattr(upper, name)["default"].weight = getattr(lower, name)["default"].weight
    return model


MODELS = {
    "fp32": lambda: deep(torch.float32),
    "biases": lambda: grown(name="gpt_oss", dtype=torch.float64, autocast_adapter_dtype=False),
    "kept activations": lambda: deep(keep_activations=3),
    "checkpointed": checkpointed,
    "direct": lambda: deep(settle="direct"),
    "backprop": lambda: deep(settle="backprop"),
    "LoRA and a head": beside,
    "one bank in two layers": shared,
    "protected newborns": lambda: spawned(protect=0.5),
}


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    return model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss


def trained(model: torch.nn.Module, inside: bool, steps: int = 3) -> tuple[dict, dict, list[float]]:
    """Weights, the optimizer's state and gradient norms, under a schedule."""
    optimizer = create_pcgrow_optimizer(model.train(), lr=0.05, inside_sweep=inside)
    schedule, norms = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, steps), []
    for step in range(steps):
        loss_of(model, step).backward()
        norms.append(float(clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in trainable(model).items()}, optimizer.state_dict(), norms


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_after_it(name):
    """Weights, states and norms; a schedule's rates count, and the state is one that either way goes on from."""
    (want, state, norms), (got, other, seen) = (trained(MODELS[name](), inside) for inside in (False, True))
    assert_same(want, got)
    assert len(norms) == 3
    assert norms == pytest.approx(seen, rel=1e-6)
    assert state["param_groups"] == other["param_groups"]
    for index, held in state["state"].items():
        assert_same({k: torch.as_tensor(v) for k, v in held.items()}, other["state"][index])
    start = {n: p.detach().clone() for n, p in trainable(MODELS[name]()).items()}
    assert not any(torch.equal(start[n], p) for n, p in got.items())


class Alive(TorchDispatchMode):
    """How many tensors of the shapes of `own` ones, which are not counted, are alive at most of those made in it."""

    def __init__(self, own: list[torch.Tensor]):
        super().__init__()
        self.shapes, self.own = {(p.shape, p.dtype) for p in own}, {p.untyped_storage().data_ptr() for p in own}
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.held = {key: ref for key, ref in self.held.items() if not ref.expired()}
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and (tensor.shape, tensor.dtype) in self.shapes:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.held.setdefault(storage.data_ptr(), StorageWeakRef(storage))
        self.most = max(self.most, len(self.held))
        return made


@pytest.mark.parametrize("keep", [0, 5])
def test_one_layers_gradients_at_a_time(keep):
    """Counted: of five layers with two banks each, ten gradients live at the end of a backward, and two inside it."""
    found = {}
    for inside in (False, True):
        model = deep(keep_activations=keep).train()
        banks = list(trainable(model).values())
        optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=inside)
        loss_of(model).backward()  # the state of the optimizer is made
        optimizer.step()
        optimizer.zero_grad()
        loss, momenta = loss_of(model, 1), [state["momentum"] for state in optimizer.state.values()]
        with Alive([*banks, *momenta]) as alive:
            loss.backward()
        found[inside] = alive.most
        assert all(p.grad is not None for p in banks)
    assert found[False] >= 10
    assert found[True] <= 3


def test_gradients_come_layer_by_layer(monkeypatch):
    """To whoever waits for them by torch's own hook: a layer's before the next layer runs again."""
    model, events, again = deep().train(), [], LayerRun.again
    monkeypatch.setattr(LayerRun, "again", lambda run, *given: (events.append(run.index), again(run, *given))[1])
    for layer in model.base_model.tuner_layers():
        for p in layer.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _, i=layer.layer_index: events.append(f"bank {i}"))
    loss_of(model).backward()
    assert events == [event for i in reversed(range(5)) for event in (i, f"bank {i}", f"bank {i}")]


def test_an_optimizer_of_torchs_in_the_backward():
    """As torch's tutorial does it, one AdamW for each parameter."""
    found = []
    for inside in (False, True):
        model = deep().train()
        held = {p: torch.optim.AdamW([p], lr=1e-2, foreach=False) for p in trainable(model).values()}

        def step(p: torch.Tensor, held=held) -> None:
            held[p].step()
            held[p].zero_grad()

        for p in held if inside else ():
            p.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            loss_of(model, seed).backward()
            for p in () if inside else held:
                step(p)
        found.append({name: p.detach().clone() for name, p in trainable(model).items()})
    assert_same(*found)


REFUSED = {
    "clipping that bites": lambda model: clip_grad_norm_(model.parameters(), 1e-3),
    "clipping by value": lambda model: clip_grad_value_(model.parameters(), 1e-3),
    "another norm": lambda model: clip_grad_norm_(model.parameters(), float("inf"), norm_type=1.0),
    "a second backward": lambda model: loss_of(model, 1).backward(),
    "a look": lambda model: [p.grad.clone() for p in trainable(model).values()],
    "a scaler": lambda model: torch.amp.GradScaler("cpu", 2.0).unscale_(torch.optim.SGD(model.parameters(), 0.1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused(name):
    model = deep().train()
    create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True).step()
    optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True)
    if name == "a scaler":
        scaler = torch.amp.GradScaler("cpu", 2.0)
        scaler.scale(loss_of(model)).backward()
        with pytest.raises(RuntimeError, match="this gradient is gone"):
            scaler.step(optimizer)
        return
    loss_of(model).backward()
    after = {n: p.detach().clone() for n, p in trainable(model).items()}
    with pytest.raises(RuntimeError, match=r"this gradient is gone, it was applied inside .*inside_sweep=False"):
        REFUSED[name](model)
    assert_same(after, {n: p.detach() for n, p in trainable(model).items()})


def test_several_processes_are_refused(monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(inside_sweep, name, lambda value=value: value)
    model = deep().train()
    optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True)
    with pytest.raises(RuntimeError, match=r"several processes train.*inside_sweep=False"):
        loss_of(model).backward()
    assert optimizer.state == {}


def test_not_finite():
    """Of a layer in the midst: said which, and that those above have moved; the others have not."""
    model = deep(torch.float32).train()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True)
    layer = model.base_model.tuner_layers()[2]
    layer.pcgrow_down_proj["default"].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=r"layer 2, experts \[0, 3, 7\].*only banks of the layers above"):
        loss_of(model).backward()
    moved = {n.split("layers.")[1][0] for n, p in trainable(model).items() if not torch.equal(before[n], p)}
    assert {"3", "4"} <= moved <= {"2", "3", "4"}
    assert optimizer.param_groups[0]["params"] == list(trainable(model).values())


def test_gone_with_its_optimizer():
    model = deep().train()
    optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True)
    with pytest.raises(ValueError, match=r"an optimizer steps inside the sweep.*find its rate before"):
        find_lr(model, [tokens(), tokens(seed=1)])
    del optimizer
    gc.collect()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    loss_of(model).backward()
    assert_same(before, {n: p.detach() for n, p in trainable(model).items()})
    assert all(float(p.grad.norm()) > 0 for p in trainable(model).values())


def test_nodes_without_rows_are_named():
    """Counted over whole steps: no layer alone is taken for all."""
    model = spawned().train()
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_gate_threshold["default"].fill_(1e9)
    optimizer = create_pcgrow_optimizer(model, lr=0.05, inside_sweep=True)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match=r"trains on nothing: in its first 3 steps"):
        optimizer.step()
