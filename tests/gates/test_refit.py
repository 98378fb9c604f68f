"""Gates of newborns that have been trained, fitted anew to what their layers read now."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from peft_pcgrow import PCGrowConfig, RefitGatesCallback, find_experts, measure_errors
from peft_pcgrow.adapter.given import GATE_TENSORS
from peft_pcgrow.gates.gate import RATES, Rows
from peft_pcgrow.maps import fit_gates
from tiny import assert_same, build, domain, grown, logits, mixed, retain, snapshot, spawned, spawning, train

# as many batches as a map has folds: fewer are cut
TEXTS = {"batches": [*domain(32, seed=4).split(8)], "retain": [*retain(32, seed=4).split(8)]}


@pytest.fixture
def trained():
    """Newborns that change much of what the layers above them read."""
    model = spawned(gate_fpr=0.3)
    train(model, steps=6, lr=0.1, texts=domain)
    return model


def gates(model, kind: str = "gate") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_buffers() if f".pcgrow_{kind}_" in name}


def test_gates_of_a_map_of_the_model_as_it_is(trained, monkeypatch):
    """The same as a map of the trained model holds; all else keeps its bits, and training goes on."""
    # for a map its newborns are another's, who learned what they take much of
    monkeypatch.setattr(fit_gates, "LEARNED", 1.0)
    before = snapshot(trained)
    emap = measure_errors(trained, TEXTS["batches"], retain=TEXTS["retain"], window=8, gradients=False, progress=False)
    trained.refit_gates(**TEXTS)
    for row, site in enumerate(find_experts(trained).sites):
        if "default" in getattr(site.module, "births", ()):
            for name in GATE_TENSORS:
                held = getattr(site.module, f"pcgrow_gate_{name}")["default"]
                assert torch.equal(held, getattr(emap.separation, name)[row]), (row, name)
    after = snapshot(trained)
    for name in gates(trained):
        assert not torch.equal(before.pop(name), after.pop(name))
    assert_same(before, after)
    assert any(p.requires_grad for p in trained.parameters())


def test_what_newborns_take_themselves_is_not_spared(trained):
    """As what earlier ones learned is in a map: else each time that gates are fitted would make them stricter."""
    emap = measure_errors(trained, TEXTS["batches"], retain=TEXTS["retain"], window=8, gradients=False, progress=False)
    trained.refit_gates(**TEXTS)
    stricter = torch.tensor(False)
    for row, site in enumerate(find_experts(trained).sites):
        if "default" in getattr(site.module, "births", ()):
            held, mapped = site.module.pcgrow_gate_threshold["default"], emap.separation.threshold[row]
            assert (held <= mapped).all()
            stricter |= (held < mapped).any()
    assert stricter


@pytest.mark.slow
def test_what_newborns_take_from_earlier_ones_is_spared(trained):
    """Of the tokens that are an earlier adapter's, which its newborns' newborns compute until they are fitted anew,
    these then take no more than the rate: by the evidence on the very inputs that they are fitted on."""
    mixed_in = torch.cat([retain(96, seed=1), domain(96, seed=41)])
    spare = mixed_in[torch.randperm(len(mixed_in), generator=torch.Generator().manual_seed(1))]
    emap = measure_errors(trained, [domain(128, seed=1)], retain=[spare], window=8, progress=False)
    trained.add_adapter("second", PCGrowConfig(error_map=emap, grow="spawn", budget=0.5, gate_fpr=0.4))
    trained.base_model.set_adapter(["second", "default"])
    trained.set_requires_grad("default", False)
    train(trained, steps=6, lr=0.1, texts=domain)
    held = torch.stack([text for number, text in enumerate(spare) if fit_gates.is_held_out(number)])
    seen = []

    def look(layer, args):
        claims = layer.margin("default", args[0], remember=False) > 0
        mine = claims & torch.isin(args[1], torch.tensor(layer.births["default"].spawned)).any(1)
        computed = torch.zeros_like(mine)
        for n, (name, _) in enumerate(layer.newborns):
            computed |= (layer.nodes_of(*args[:2]) == layer.total + n).any(1) & (name == "default")
        seen.append((layer, args[0].view(*held.shape, -1), mine.view(held.shape), computed.view(held.shape)))

    both = [layer for layer in trained.base_model.tuner_layers() if {"default", "second"} <= layer.births.keys()]
    handles = [layer.register_forward_pre_hook(look) for layer in both if layer.births["second"].parents]
    logits(trained, held)
    for handle in handles:
        handle.remove()
    trained.refit_gates([domain(128, seed=1)], [spare])
    assert any(computed.sum() < 0.5 * mine.sum() for _, _, mine, computed in seen)
    for layer, x, mine, _ in seen:
        gate = layer.gate("second")
        evidence = gate.evidence(gate.scores(x), Rows(torch.ones(held.shape, dtype=torch.bool)))[0]
        assert mine.float().mean() > fit_gates.LEARNED
        for rate, limit in zip(RATES, layer.pcgrow_gate_threshold["second"], strict=True):
            taken = (evidence > limit)[mine].float().mean()
            assert taken <= max(rate, 1 / mine.sum()), (layer.layer_index, rate, taken)


def test_forwards_ask_them(trained):
    """At once, in evaluation too, whatever was kept of the gates before."""
    ids = mixed()
    before = logits(trained, ids)
    trained.refit_gates(**TEXTS)
    assert not torch.equal(logits(trained, ids), before)


def test_saved_and_loaded(trained, tmp_path):
    trained.refit_gates(**TEXTS)
    want = logits(trained, mixed())
    trained.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert all(torch.equal(t, gates(trained)[name]) for name, t in gates(again).items())
    assert torch.equal(logits(again, mixed()), want)


def test_of_what_enters_the_attention_too():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(build(), spawning(gate_fpr=0.3, lora=lora))
    train(model, steps=6, lr=0.1, texts=domain)
    before = {name: tensor.clone() for name, tensor in gates(model, "entry").items()}
    model.refit_gates(**TEXTS)
    # nothing has changed what the first layer's attention reads, but other text was read
    assert all(not torch.equal(tensor, before[name]) for name, tensor in gates(model, "entry").items())


def test_by_a_trainer(tmp_path):
    """After the step that was asked for, and what is drawn at random goes on as without."""
    seen, drawn = [], []

    class Noted(RefitGatesCallback):
        def refit(self, model):
            state = torch.get_rng_state()
            super().refit(model)
            drawn.append(torch.equal(state, torch.get_rng_state()))
            seen.append([name for name, t in gates(model).items() if not torch.equal(t, before[name])])

    model = spawned(gate_fpr=0.3)
    before = {name: tensor.clone() for name, tensor in gates(model).items()}
    rows = [{"input_ids": row, "labels": row} for row in domain(16)]
    args = TrainingArguments(str(tmp_path), max_steps=6, report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(model, args, train_dataset=rows, callbacks=[Noted(*TEXTS.values())]).train()
    assert [len(changed) for changed in seen] == [len(before)]
    assert drawn == [True]


def test_an_earlier_domain_keeps_its_gates(trained):
    """Where one adapter trains beside another that does not, and where none does."""
    trained.add_adapter("later", spawning(gate_fpr=0.3))
    trained.base_model.set_adapter(["default", "later"])
    trained.set_requires_grad("default", False)
    before = {name: tensor.clone() for name, tensor in gates(trained).items()}
    trained.refit_gates(**TEXTS)
    changed = {
        name.rsplit(".", 1)[1] for name, tensor in gates(trained).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"later"}
    trained.set_requires_grad("later", False)
    with pytest.raises(ValueError, match=r"\['default', 'later'\] have newborns and none trains: name the one"):
        trained.refit_gates(**TEXTS)


def test_refusals(trained):
    with pytest.raises(ValueError, match="no newborns"):
        grown().refit_gates(**TEXTS)
    with pytest.raises(ValueError, match="hold 2 texts"):
        trained.refit_gates(TEXTS["batches"], [retain(2)])
    padding = {"input_ids": retain(8), "attention_mask": torch.zeros(8, 24, dtype=torch.long)}
    with pytest.raises(ValueError, match="the retain batches are padding alone"):
        trained.refit_gates(TEXTS["batches"], [padding])
    with trained.disable_adapter(), pytest.raises(ValueError, match="adapters are switched off"):
        trained.refit_gates(**TEXTS)
    trained.add_adapter("other", PCGrowConfig(locus={0: [7]}))
    with pytest.raises(ValueError, match="no newborns"):
        trained.refit_gates(**TEXTS, adapter_name="other")
    trained.set_adapter("other")
    with pytest.raises(ValueError, match=r"\['default'\] are not active"):
        trained.refit_gates(**TEXTS, adapter_name="default")
    for steps in ([0], [1.5], [True]):
        with pytest.raises(ValueError, match="whole numbers from 1"):
            RefitGatesCallback(*TEXTS.values(), steps=steps)
