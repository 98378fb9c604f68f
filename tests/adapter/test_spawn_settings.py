"""What a config asks of newborns: which nodes spawn, at what rate, kept off which directions; and what it cannot."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_pcgrow import ErrorMap, PCGrowConfig, create_pcgrow_optimizer, measure_errors
from tiny import (
    assert_same,
    build,
    contrast,
    domain,
    logits,
    mixed,
    retain,
    snapshot,
    spawned,
    spawning,
    taken,
    tokens,
    train,
)


def changed_map(emap: ErrorMap | None = None, **tables) -> ErrorMap:
    """A map with some nodes' numbers in its separation replaced: {(row, expert): number} by table."""
    emap = emap or contrast()
    separation = copy.deepcopy(emap.separation)
    for name, numbers in tables.items():
        for node, number in numbers.items():
            getattr(separation, name)[node] = number
    return replace(emap, separation=separation)


# ---- what spawns, and at what rate


def test_auto_decides_for_each_node():
    """Nodes that retain text barely uses are deepened, for all of their rows; the others spawn."""
    emap = changed_map(retain_rows={(2, 3): 0.0, (1, 4): 1.0})
    model = spawned(error_map=emap, grow="auto")
    assert model.peft_config["default"].locus == {"1": [1, 4], "2": [0, 3, 7]}
    assert model.peft_config["default"].spawned == {"1": [1], "2": [0, 7]}
    assert [layer.births["default"].grown for layer in model.base_model.tuner_layers()] == [(1, 4), (0, 3, 7)]
    assert torch.equal(logits(model, mixed()), logits(build(), mixed()))
    routed = []
    first = model.base_model.tuner_layers()[0]
    handle = first.register_forward_hook(lambda _, args, output: routed.append((args[1], output)))
    train(model, lr=3e-2, texts=domain)
    routed.clear()
    logits(model, mixed())
    with model.disable_adapter():
        logits(model, mixed())
    handle.remove()
    (index, after), (_, before) = routed
    mine = (index == 4).any(dim=1) | taken(model, mixed())[1].flatten()
    assert torch.equal((after != before).any(dim=1), mine)
    assert (taken(model, mixed())[1].flatten() & (index != 4).all(dim=1)).any()


def test_auto_leaves_out_what_cannot_be_told_apart():
    emap = changed_map(recall={(1, 4): 0.04}, false_positive={(2, 0): 1.0})
    config = spawned(error_map=emap, grow="auto").peft_config["default"]
    assert config.locus == config.spawned == {"1": [1], "2": [3, 7]}


def test_what_is_decided_is_said(caplog):
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        spawned(error_map=changed_map(retain_rows={(2, 3): 0.0}, recall={(1, 4): 0.0}), grow="auto")
    assert "grow='auto' at gate_fpr=0.05: spawn 3, deepen 1, leave out 1" in caplog.text
    assert "1.4     leave" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("select", ["error", "frequency"])
def test_nodes_chosen_by_a_budget(select):
    """The map's choice spawns, is born as the base and trains."""
    model = spawned(locus=None, budget=0.25, select=select)
    assert sum(map(len, model.peft_config["default"].spawned.values())) == round(0.25 * 24)
    assert torch.equal(logits(model, mixed()), logits(build(), mixed()))
    train(model, lr=3e-2, texts=domain)
    assert not torch.equal(logits(model, mixed()), logits(build(), mixed()))


@pytest.mark.slow
def test_the_rate_sets_how_much_is_taken():
    """A higher rate takes more, of retain text too, but always less of that."""
    shares = {}
    for rate in (0.01, 0.1, 0.4):
        model = spawned(gate_fpr=rate)
        shares[rate] = [float(taken(model, texts(32, seed=9))[1].float().mean()) for texts in (domain, retain)]
    assert 0 < shares[0.01][0] < shares[0.1][0] < shares[0.4][0]
    assert shares[0.01][1] < shares[0.1][1] < shares[0.4][1] < shares[0.4][0]


@pytest.mark.slow
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_rate_set_later(low_cpu_mem_usage, tmp_path):
    """set_gate_fpr: a model as if spawned at that rate, which is saved and loaded again."""
    model, wanted = spawned(gate_fpr=0.01), spawned(gate_fpr=0.3)
    for each in (model, wanted):
        with torch.no_grad():
            each.base_model.tuner_layers()[1].bank("default")["down_proj"].mul_(3)
    strict = logits(model, mixed())
    model.base_model.set_gate_fpr(0.3)
    assert torch.equal(logits(model, mixed()), logits(wanted, mixed()))
    assert not torch.equal(logits(model, mixed()), strict)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, mixed()), logits(wanted, mixed()))
    loaded.base_model.set_gate_fpr(0.01)
    assert torch.equal(logits(loaded, mixed()), strict)


@pytest.mark.slow
def test_one_config_for_two_models():
    """The second model spawns as the first, also after the first has trained."""
    config = spawning(protect=0.8)
    first = get_peft_model(build(), config)
    start = snapshot(first)
    train(first, lr=3e-2, texts=domain)
    second = get_peft_model(build(), config)
    assert_same(start, snapshot(second))
    train(second, lr=3e-2, texts=domain)
    assert torch.equal(logits(first, mixed()), logits(second, mixed()))
    assert not torch.equal(logits(first, mixed()), logits(build(), mixed()))


@pytest.mark.slow
def test_retain_text_of_the_model_itself():
    """retain='self': gates that tell the domain from what the model writes."""
    emap = measure_errors(build(), [domain(32)], retain="self", window=8, gradients=False, progress=False)
    model = spawned(error_map=emap, gate_fpr=0.2)
    assert torch.equal(logits(model, mixed()), logits(build(), mixed()))


@pytest.mark.slow
def test_measured_again():
    """A map of a model with newborns is that of its function: at birth the base's, and less error once trained."""
    texts = [domain(32, seed=5)]
    plain = measure_errors(build(), texts, progress=False)
    model = spawned(gate_fpr=0.3)
    again = measure_errors(model, texts, progress=False)
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)
    torch.testing.assert_close(again.with_newborns(), plain.mass, rtol=1e-4, atol=1e-6)
    train(model, steps=8, texts=lambda seed: domain(32, seed=5))
    with_retain = measure_errors(model, texts, retain=[retain(32, seed=5)], progress=False)
    assert with_retain.loss < plain.loss


# ---- protect

OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1
    ),
    "Muon": lambda model: create_pcgrow_optimizer(model, lr=0.1, weight_decay=0.1),
}


def stepped(model: nn.Module, optimizer: str, steps: int = 3) -> None:
    moving = OPTIMIZERS[optimizer](model)
    model.train()
    for step in range(steps):
        ids = domain(seed=20 + step)
        model(input_ids=ids, labels=ids).loss.backward()
        moving.step()
        moving.zero_grad()
    model.eval()


def stacks(model: nn.Module) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Banks as `[N, O, I]` and protected directions by layer and stack."""
    found = {}
    for layer in model.base_model.tuner_layers():
        for name, weight in layer.bank("default").items():
            if not name.endswith("bias"):
                view = weight.detach().mT if layer.base_layer.is_transposed else weight.detach()
                directions = getattr(layer, f"pcgrow_protect_{name}")["default"]
                found[layer.layer_index, name] = view.clone(), directions.clone()
    return found


def assert_protected(before: dict, after: dict) -> None:
    """All has moved, and nothing of it along the directions that were there before."""
    assert len(before) == 4
    for key, (weight, directions) in before.items():
        assert torch.equal(after[key][1], directions)
        width = directions.shape[1]
        assert 0 < directions.shape[2] < width
        moved = after[key][0] - weight
        assert float(moved.norm()) > 1e-2 * float(weight.norm())
        along = float((moved @ directions).norm() / moved.norm())
        assert along < 1e-5, f"{key}: {along:.2g} of the movement"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grow", ["spawn", "deepen"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_updates_stay_off_protected_directions(name, grow, optimizer, tmp_path):
    """With weight decay, and trained on after loading: the movement since birth is orthogonal to the directions."""
    model = spawned(name, grow=grow, protect=0.6)
    start = stacks(model)
    stepped(model, optimizer)
    assert_protected(start, stacks(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    between = stacks(loaded)
    stepped(loaded, optimizer)
    assert_protected(start, stacks(loaded))
    assert all(not torch.equal(weight, stacks(loaded)[key][0]) for key, (weight, _) in between.items())


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in snapshot(model).items() if "pcgrow_" in name and "_bias." in name}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grow", ["spawn", "deepen"])
def test_protected_biases_keep_their_bits(grow, optimizer, tmp_path):
    """Their input is 1 for all text. Under weight decay and after loading too; the matrices beside them move."""
    model, free = spawned("gpt_oss", grow=grow, protect=0.6), spawned("gpt_oss", grow=grow)
    start, matrices = biases(model), stacks(model)
    assert len(start) == 4
    assert all(bool(bias.any()) for bias in start.values())
    for each in (model, free):
        stepped(each, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("gpt_oss"), tmp_path, is_trainable=True)
    stepped(loaded, optimizer)
    for each in (model, loaded):
        assert_same(start, biases(each))
        assert all(not torch.equal(weight, stacks(each)[key][0]) for key, (weight, _) in matrices.items())
    assert all(not torch.equal(start[name], bias) for name, bias in biases(free).items())


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
def test_protected_by_two_steps_at_once(settle):
    """Accumulation, clipping and a GradScaler in between change nothing about it."""
    model = spawned(protect=0.6, settle=settle)
    start, optimizer = stacks(model), OPTIMIZERS["AdamW"](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.train()
    for seed in range(4):
        ids = domain(seed=seed)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if seed % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_protected(start, stacks(model))


@pytest.mark.slow
def test_unprotected_updates_do_not():
    """The control: without it the same steps move along those directions."""
    start, free = stacks(spawned(protect=0.6)), spawned()
    stepped(free, "AdamW")
    for key, (weight, directions) in start.items():
        layer = next(layer for layer in free.base_model.tuner_layers() if layer.layer_index == key[0])
        moved = layer.bank("default")[key[1]].detach() - weight
        assert float((moved @ directions).norm() / moved.norm()) > 0.1


@pytest.mark.slow
def test_a_larger_share_leaves_retain_text_more_alone():
    """Deepened experts change the retain text's logits less the more of its inputs is protected."""
    change = []
    for share in (0.0, 0.6, 0.95):
        model = spawned(grow="deepen", protect=share)
        stepped(model, "AdamW")
        change.append(float((logits(model, retain(seed=9)) - logits(build(), retain(seed=9))).norm()))
    assert change[0] > change[1] > change[2] > 0


# ---- what cannot be


@pytest.mark.parametrize("name", ["gate_fpr", "protect"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, True, "x", None, float("nan")])
def test_shares_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a share in [\[(]0, 1\), got"):
        spawning(**{name: value})


def test_words_out_of_range():
    with pytest.raises(ValueError, match=r"gate_fpr must be a share in \(0, 1\), got 0"):
        spawning(gate_fpr=0)
    with pytest.raises(ValueError, match="unknown grow='prune'; choose from deepen, spawn, auto"):
        spawning(grow="prune")
    with pytest.raises(ValueError, match="unknown router='top'; choose from branch, flat"):
        spawning(router="top")
    with pytest.raises(ValueError, match="router='flat' is about newborns: use it with grow='spawn'"):
        spawning(grow="deepen", router="flat")
    with pytest.raises(ValueError, match=r"unknown select='best'; choose from .*gate, frequency, random"):
        spawning(select="best")


def refused(text: str, **settings) -> None:
    """get_peft_model raises ValueError with `text` and leaves the model alone."""
    model = build()
    before, hooks = snapshot(model), [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, spawning(**settings))
    assert_same(before, snapshot(model))
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"grow": "spawn"}, {"grow": "auto"}, {"grow": "deepen", "protect": 0.5}])
def test_without_retain_text(settings):
    """A map without it, and no map at all."""
    plain = measure_errors(build(), [tokens()], progress=False)
    asked = f"protect={settings['protect']}" if "protect" in settings else f"grow='{settings['grow']}'"
    for emap in (plain, None):
        refused(
            f"^{asked} needs a map that knows which text must not change.*retain='self'", error_map=emap, **settings
        )


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["spawn", "auto"])
def test_texts_that_are_alike(grow):
    """Retain text that is the domain's own."""
    texts = [domain(32, seed=1)]
    emap = measure_errors(build(), texts, retain=list(texts), window=8, gradients=False, progress=False)
    refused(
        "none of the 5 located nodes can grow at gate_fpr=0.05:\n.*cannot be told apart.*\n(.*\n)*Raise gate_fpr, give "
        "retain text that differs",
        error_map=emap,
        grow=grow,
    )


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["spawn", "auto"])
def test_donors_that_no_domain_token_reaches(grow):
    """A domain of one word reaches few experts: left out among others, refused alone."""
    words = torch.full((8, 12), 5)
    emap = measure_errors(build(), [words], retain=[retain(32)], window=8, gradients=False, progress=False)
    row = emap.layers.index(1)
    idle = int((emap.count[row] == 0).nonzero()[0])
    busy = int(emap.count[row].argmax())
    refused(
        "none of the 1 located nodes can grow.*\n.*no domain token reaches it",
        error_map=emap,
        locus={1: [idle]},
        grow=grow,
    )
    model = spawned(error_map=emap, locus={1: [idle, busy]}, grow=grow, gate_fpr=0.3)
    assert model.peft_config["default"].locus == {"1": [busy]}


def test_a_domain_that_is_covered():
    refused(
        "there is nothing to grow: covered.*Say grow='deepen' or 'spawn'",
        error_map=replace(contrast(), loss=0.0),
        grow="auto",
    )
    assert spawned(error_map=replace(contrast(), loss=0.0)).peft_config["default"].spawned


@pytest.mark.parametrize("window", [-1, -64])
def test_a_window_of_nothing(window):
    with pytest.raises(ValueError, match="window must be a whole number of tokens"):
        measure_errors(build(), [domain()], retain=[retain()], window=window, progress=False)


def test_experts_called_alone():
    """Without the decoder layer around it a gate does not know the texts."""
    layer = spawned().base_model.tuner_layers()[0]
    hidden, index = torch.randn(6, 32), torch.zeros(6, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="layer 1 has newborns, whose gate needs to know which text each token"):
        layer(hidden, index, torch.ones(6, 3))


def test_one_newborn_for_each_donor_and_adapter():
    with pytest.raises(ValueError, match=r"layer 1 .* names a donor twice .* add another adapter"):
        spawning(locus={1: [4, 4]})


def test_gates_that_were_never_set(tmp_path):
    """A config read back from an adapter's folder knows the nodes, not the gates."""
    spawned().save_pretrained(tmp_path)
    config = PCGrowConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(build(), config)
    with pytest.raises(RuntimeError, match=r"gates of adapter 'default' were never set"):
        train(model)
