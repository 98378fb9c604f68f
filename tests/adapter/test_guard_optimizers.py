"""The guard lets every kind of optimizer work, asks those of other models nothing, and finds what cannot train."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from test_training_guard import grow, loss_of, trainable
from torch import nn
from transformers.optimization import Adafactor

from close import assert_close
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.adapter.training_guard import PATIENCE
from tiny import assert_same, build, domain, grown, snapshot, spawned, spawning


class NoRate(torch.optim.Optimizer):
    """SGD by a tenth of the gradient, without a learning rate in its groups."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data -= 0.1 * p.grad
        return loss


class InTurns(NoRate):
    """Moves one of its parameters in each step."""

    turn = 0

    def step(self, closure=None):
        p = self.param_groups[0]["params"][self.turn]
        p.data -= 0.1 * p.grad
        self.turn = (self.turn + 1) % len(self.param_groups[0]["params"])


class Asked(dict):
    """A group of parameters that tells nothing else."""

    def __getitem__(self, key):
        assert key == "params", f"asked for {key}"
        return super().__getitem__(key)

    def get(self, key, default=None):
        assert key == "params", f"asked for {key}"
        return super().get(key, default)


OPTIMIZERS = {
    "Adafactor, relative steps": lambda p: Adafactor(p, lr=None, relative_step=True, warmup_init=True),
    "no rate": NoRate,
    "a rate for each group": lambda p: torch.optim.SGD([{"params": [q], "lr": 0.1 + i} for i, q in enumerate(p)]),
    "a tensor as rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), capturable=False, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "accelerate's": lambda p: Accelerator(cpu=True).prepare(torch.optim.AdamW(p, lr=1e-2)),
    "in turns": InTurns,
    "in two": lambda p: [torch.optim.AdamW(p[:2], lr=1e-2), torch.optim.AdamW(p[2:], lr=1e-2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_kind_trains(kind):
    model = grow(build())
    made = OPTIMIZERS[kind](trainable(model))
    optimizers, before = made if isinstance(made, list) else [made], snapshot(model)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer = optimizers[step % len(optimizers)]  # one after the other, in different steps
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_bitsandbytes_8_bit():
    bnb = pytest.importorskip("bitsandbytes")
    model = grow(build())
    optimizer, before = bnb.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=16), snapshot(model)
    for step in range(2):
        loss_of(model, step).backward()
        try:
            optimizer.step()
        except NotImplementedError:
            pytest.skip("this bitsandbytes has no such optimizer for CPUs")
        optimizer.zero_grad()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_one_optimizer_for_each_parameter():
    """They step inside the backward, as transformers' layer-wise GaLore does, when few gradients are there yet."""
    model, before = grow(build(), modules_to_save=["lm_head"]), {}
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in trainable(model)}
    before = {p: p.detach().clone() for p in optimizers}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        loss_of(model, seed).backward()
    assert all(not torch.equal(p, start) for p, start in before.items())
    with pytest.raises(FloatingPointError, match="is NaN or infinite"):
        (loss_of(model) * float("nan")).backward()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD, NoRate])
def test_closures(kind):
    """Gradients are checked once the closure has made them, before any weight changes."""
    model = grow(build(), modules_to_save=["lm_head"])
    optimizer = kind(trainable(model), **({} if kind is NoRate else {"lr": 0.1}))

    def closure(scale: float = 1.0):
        optimizer.zero_grad()
        loss = scale * loss_of(model)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert float(optimizer.step(closure=closure).detach()) < first
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match="is NaN or infinite"):
        optimizer.step(lambda: closure(float("nan")))
    assert_same(before, snapshot(model))


def test_other_models_are_asked_nothing():
    """Before, while and after a grown model trains."""

    def train_another() -> None:
        other = nn.Linear(2, 2)
        optimizer = NoRate(other.parameters())
        optimizer.param_groups = [Asked(group) for group in optimizer.param_groups]
        other(torch.full((1, 2), float("nan"))).sum().backward()
        optimizer.step()
        assert bool(torch.isnan(other.weight).all())

    model = grow(build())
    train_another()
    loss_of(model).backward()
    train_another()
    torch.optim.SGD(trainable(model), lr=1e-2).step()
    train_another()
    for layer in model.base_model.tuner_layers():
        del layer.births  # whatever state our model is in
    train_another()


# ---- everything that trains is watched


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["modules_to_save", "trainable tokens", "lora"])
@pytest.mark.parametrize("apart", [False, True])
def test_what_trains_beside_the_banks(what, value, apart):
    """A gradient there that is not finite refuses the step too, also of an optimizer that holds no bank."""
    model = build()
    if what == "lora":
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    more = {
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "trainable tokens": {"trainable_token_indices": [5, 7]},
    }
    model = grow(model, **more.get(what, {}))
    part = {"modules_to_save": "modules_to_save.default", "trainable tokens": "trainable_tokens", "lora": "lora_B"}[
        what
    ]
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or part in name)
    beside = {name: p for name, p in model.named_parameters() if p.requires_grad and part in name}
    optimizer = torch.optim.AdamW(list(beside.values()) if apart else trainable(model), lr=1e-2)
    loss_of(model).backward()
    name, broken = next(iter(beside.items()))
    broken.grad.view(-1)[0] = value
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match=rf"the gradient of {name.removeprefix('base_model.model.')} is NaN"):
        optimizer.step()
    assert_same(before, snapshot(model))


# ---- what cannot train is still found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Adafactor, relative steps", "no rate", "fused"])
def test_optimizers_from_before(kind):
    base = build()
    optimizer = OPTIMIZERS[kind](list(base.parameters()))
    model = grow(base)
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"node\(s\) 1\.1, 1\.4, 2\.0, 2\.3, 2\.7 that .* no optimizer holds its weig"
    ):
        loss_of(model)


@pytest.mark.slow
def test_banks_that_a_later_optimizer_holds():
    """One that holds the head steps first, several times; the banks' has its turn later."""
    model = grow(build(), modules_to_save=["lm_head"])
    banks = [p for name, p in model.named_parameters() if "pcgrow_" in name]
    head = torch.optim.SGD([p for p in trainable(model) if all(p is not q for q in banks)], lr=0.1)
    rest = torch.optim.SGD(banks, lr=0.1)
    for step in range(4):
        loss_of(model, step).backward()
        head.step()
    rest.step()
    del rest
    model.base_model._guard.rearm()
    loss_of(model).backward()
    head.step()
    with pytest.raises(RuntimeError, match="no optimizer holds its weights"):
        loss_of(model)


@pytest.mark.slow
def test_a_bank_that_never_gets_its_turn():
    """One bank in bf16, whose updates all round away, beside others that move: said once patience is at an end."""
    model = grow(build(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    still, *rest = trainable(model)
    groups = [{"params": [still], "lr": 1e-12}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for _ in range(PATIENCE):
        loss_of(model).backward()
        optimizer.step()
    text = rf"after {PATIENCE} optimizer steps, located node\(s\) 1\.1, 1\.4 that .* too small"
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()


# ---- what is kept off stays, whatever the model went through


def kept(model: nn.Module, adapter: str = "default") -> dict[tuple[int, str], torch.Tensor]:
    """What an adapter's banks hold along their protected directions."""
    found = {}
    for layer in model.base_model.tuner_layers():
        for name, weight in layer.bank(adapter).items() if adapter in layer.births else ():
            held = weight.detach().mT if layer.base_layer.is_transposed and weight.dim() == 3 else weight.detach()
            directions = layer.directions(adapter, name)
            found[layer.layer_index, name] = held.clone() if directions is None else held @ directions.to(held)
    return found


def step_of(model: nn.Module, lr: float = 1.0, scale: float = 1.0) -> None:
    """One step of SGD on domain text; everything that trains must move, but biases, which are protected whole."""
    before, held = snapshot(model), trainable(model)
    optimizer = torch.optim.SGD(held, lr)
    optimizer.zero_grad()
    ids = domain(4)
    (scale * model(input_ids=ids, labels=ids).loss).backward()
    optimizer.step()
    after = snapshot(model)
    moved = [name for name, p in model.named_parameters() if p.requires_grad and "bias" not in name]
    assert moved
    assert all(not torch.equal(before[name], after[name]) for name in moved)


def assert_kept(before, after, kind: str = "fp32") -> None:
    assert any(bool(tensor.any()) for tensor in before.values())
    for key, tensor in before.items():
        assert_close(f"kept part of {key}", after[key], tensor, kind)


@pytest.mark.slow
@pytest.mark.parametrize("active", ["second", ["default", "second"]])
@pytest.mark.parametrize("loaded", [False, True], ids=["switched", "loaded"])
def test_newborns_stay_what_they_were_born_as(active, loaded, tmp_path):
    """Their donors, deepened by another adapter, train on, or are not in use any more."""
    model = grown().train()
    step_of(model)
    model.add_adapter("second", spawning(protect=0.8, gate_fpr=0.4))
    model.base_model.set_adapter(["default", "second"])
    before = kept(model, "second")
    if loaded:
        model.save_pretrained(str(tmp_path))
        model = PeftModel.from_pretrained(build(), str(tmp_path), is_trainable=True)
        model.base_model.tuner_layers()[0].bank("default")["down_proj"].data += 0.1
        model.load_adapter(str(tmp_path / "second"), "second", is_trainable=True)
    model.base_model.set_adapter(active)
    model.set_requires_grad("second", True)
    step_of(model.train(), 0.1)
    assert_kept(before, kept(model, "second"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"init_weights": False}, {"autocast": False, "dtype": torch.bfloat16}])
def test_the_bank_is_its_own_reference(settings):
    """Perturbed at birth; and in 16 bit, where its donor's products are no others."""
    model = spawned(protect=0.8, gate_fpr=0.4, **settings).train()
    before = kept(model)
    for _ in range(3):
        step_of(model)
    assert_kept(before, kept(model), "bf16" if "dtype" in settings else "fp32")


def loaded_anew(model: nn.Module) -> nn.Module:
    """Its parameters are others, while those of before stay alive."""
    model.was = list(model.parameters())
    needed = [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in needed)
    return model


def trained_first(change):
    def changed(model: nn.Module) -> nn.Module:
        step_of(model.train())
        return change(model)

    return changed


def added_later(_) -> nn.Module:
    model = get_peft_model(build(), PCGrowConfig(locus={0: [1]}))
    model.add_adapter("other", spawning(protect=0.8, gate_fpr=0.4))
    model.set_adapter("other")
    return model


def poured_over(model: nn.Module) -> nn.Module:
    """Weights of another training are loaded into the same parameters."""
    model.load_state_dict(spawned(protect=0.8, gate_fpr=0.4, init_weights=False).state_dict())
    return model


WAYS = {
    "in evaluation": lambda model: model.eval(),
    "a copy": lambda model: copy.deepcopy(model).eval(),
    "a copy that trained": trained_first(copy.deepcopy),
    "added later": added_later,
    "loaded by assignment": trained_first(loaded_anew),
    "other weights loaded": trained_first(poured_over),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_guard_knows_its_model(way):
    model = WAYS[way](spawned(protect=0.8, gate_fpr=0.4))
    before = kept(model, model.active_adapter)
    step_of(model)
    step_of(model)
    assert_kept(before, kept(model, model.active_adapter))
    weights = snapshot(model)
    with pytest.raises(FloatingPointError, match="the step is refused and no weight has changed"):
        step_of(model, scale=float("nan"))
    assert_same(weights, snapshot(model))


def test_an_adapter_that_is_switched_off_before_the_step():
    """Its gradients are there already, and its optimizer steps."""
    model = spawned(protect=0.8, gate_fpr=0.4).train()
    model.add_adapter("other", PCGrowConfig(locus={0: [1]}))
    optimizer, before, weights = torch.optim.SGD(trainable(model), 1.0), kept(model), snapshot(model)
    model(input_ids=domain(4), labels=domain(4)).loss.backward()
    model.set_adapter("other")
    optimizer.step()
    moved = [name for name, tensor in snapshot(model).items() if not torch.equal(tensor, weights[name])]
    assert moved
    assert all(".default." in name for name in moved)
    assert_kept(before, kept(model))


def test_the_optimizer_of_a_bank_is_known_without_a_walk(monkeypatch):
    """Asked twice a step, whose optimizer it is; of another one, all parameters say that it is not."""
    model, other = grow(build()), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    guard, mine = model.base_model._guard, torch.optim.SGD(trainable(model), 1.0)
    assert not guard.is_mine(other)
    monkeypatch.setattr(guard.model, "parameters", lambda: pytest.fail("walked"))
    assert guard.is_mine(mine)
    with pytest.raises(pytest.fail.Exception, match="walked"):
        guard.is_mine(other)
