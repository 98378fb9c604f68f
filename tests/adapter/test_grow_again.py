"""Growing again: on a map that shows the newborns of the first round, and never on nothing."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_pcgrow import PCGrowConfig, export_flat, measure_errors
from tiny import LOCUS, assert_same, build, contrast, domain, logits, mixed, retain, snapshot, spawned, spawning, train

GROW = {"budget": 0.4, "grow": "spawn", "gate_fpr": 0.1}
ORDERS = (["default", "second"], ["second", "default"])


def measured(model):
    texts = [domain(64, seed=1)], [retain(64, seed=1)]
    return measure_errors(model, texts[0], retain=texts[1], window=8, progress=False)


@pytest.fixture(scope="module")
def first_round():
    """A model after one round, its losses, and the map measured on it."""
    model = get_peft_model(build(), PCGrowConfig(error_map=contrast(), **GROW))
    losses = train(model, 8, texts=domain)
    return model, losses, measured(model)


@pytest.fixture
def second_round(first_round):
    """A copy of it with a second round's newborns beside, not yet trained."""
    model, _, emap = copy.deepcopy(first_round)
    model.add_adapter("second", PCGrowConfig(error_map=emap, **GROW))
    return model


def both(model, order):
    model.base_model.set_adapter(order)
    model.set_requires_grad("default", False)
    return model


@pytest.mark.slow
def test_two_rounds(first_round):
    """As a user would: grow, map, grow again; the loss falls in both rounds, and every new node trains."""
    model, losses, emap = copy.deepcopy(first_round)
    assert losses[-1] < losses[0]
    # donors whose rows are taken have made room for their newborns, and for others
    born = {(layer, donor) for layer, donor, _ in emap.newborns.nodes}
    for node in emap.top(100):
        if not node.adapter and (node.layer, node.expert) in born:
            assert node.count < contrast().count[node.layer, node.expert] / 2
    config = PCGrowConfig(error_map=emap, **GROW)
    model.add_adapter("second", config)
    grown = {(int(layer), donor) for layer, donors in config.spawned.items() for donor in donors}
    parents = {(int(layer), int(donor)) for layer, here in config.lineage["parents"].items() for donor in here}
    assert parents
    assert parents <= grown & born
    assert grown - born
    both(model, ["default", "second"])
    kept, before = snapshot(model), float(measured(model).loss)
    train(model, 8, seed=20, texts=domain)
    assert measured(model).loss < before
    for layer in model.base_model.tuner_layers():
        for name, bank in layer.bank("second").items() if "second" in layer.births else ():
            old = next(
                t for key, t in kept.items() if f"layers.{layer.layer_index}." in key and f"{name}.second" in key
            )
            assert (bank != old).flatten(1).any(dim=1).all()
    assert_same({k: t for k, t in kept.items() if ".second." not in k}, {
        k: t for k, t in snapshot(model).items() if ".second." not in k
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_changes_at_birth(second_round, order):
    """Newborns of newborns are clones of those and take their rows only: the same bits, whoever is listed first."""
    model, ids = second_round, mixed()
    first, trained = logits(model, ids), snapshot(model)
    assert not torch.equal(first, logits(build(), ids))
    assert torch.equal(logits(both(model, order), ids), first)
    assert_same(trained, snapshot(model))
    for layer in model.base_model.tuner_layers():
        parents = layer.births["second"].parents if "second" in layer.births else {}
        for donor in parents:
            for name, bank in layer.bank("second").items():
                mine = bank[layer.grown["second"].index(donor)]
                assert torch.equal(mine, layer.bank("default")[name][layer.grown["default"].index(donor)])


def test_generations_in_the_lowest_layer_are_told_apart(tmp_path):
    """There, gates of the same donors on the same text are the same in every generation: nothing below has changed."""
    model, want = build(), None
    for name in ("default", "second", "third"):
        config = PCGrowConfig(error_map=measured(model), grow="spawn", gate_fpr=0.1, locus={0: [1, 2, 3]})
        if want is None:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(name, config)
            model.base_model.set_adapter([name, *want])
            model.set_requires_grad([*want], False)
            assert torch.equal(logits(model, mixed()), want[[*want][-1]])
        train(model, 3, lr=0.1, texts=domain)
        want = {**(want or {}), name: logits(model, mixed())}
    assert len({config.fingerprint for config in model.peft_config.values()}) == 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    for name in ("second", "third"):
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    loaded.base_model.set_adapter(["default", "third", "second"])
    assert torch.equal(logits(loaded, mixed()), want["third"])
    with pytest.raises(ValueError, match="'third' has newborns of newborns of 'second'"):
        model.delete_adapter("second")
    for name in ("third", "second"):
        model.delete_adapter(name)
        model.base_model.set_adapter([each for each in want if each in model.peft_config])
        assert torch.equal(logits(model, mixed()), want["second" if name == "third" else "default"])


@pytest.mark.slow
def test_order_does_not_matter_once_trained(second_round, tmp_path):
    """Also after loading, under other names."""
    model = both(second_round, ORDERS[0])
    train(model, 2, seed=20, texts=domain)
    want = logits(model, mixed())
    assert torch.equal(logits(both(model, ORDERS[1]), mixed()), want)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, adapter_name="one")
    loaded.load_adapter(tmp_path / "second", adapter_name="two")
    for order in (["one", "two"], ["two", "one"]):
        loaded.base_model.set_adapter(order)
        assert torch.equal(logits(loaded, mixed()), want)


def test_a_missing_parent_is_refused(second_round, tmp_path):
    model = both(second_round, ORDERS[0])
    model.save_pretrained(tmp_path)
    before = model.base_model.active_adapters
    with pytest.raises(ValueError, match="adapter 'second' has newborns of newborns"):
        model.set_adapter("second")
    with pytest.raises(ValueError, match="delete 'second' first"):
        model.delete_adapter("default")
    assert model.base_model.active_adapters == before
    assert set(model.peft_config) == {"default", "second"}
    with pytest.raises(ValueError, match="load that one first"):
        PeftModel.from_pretrained(build(), tmp_path / "second")
    with pytest.raises(ValueError, match="newborns of newborns"):
        export_flat(model, tmp_path / "flat", [mixed()])
    model.delete_adapter("second")
    model.delete_adapter("default")


def test_a_map_needs_its_newborns(first_round):
    model, _, emap = copy.deepcopy(first_round)
    with pytest.raises(ValueError, match="newborns that are not active now"):
        get_peft_model(build(), PCGrowConfig(error_map=emap, **GROW))
    altered = PCGrowConfig(**{**model.peft_config["default"].to_dict(), "lineage": {"elders": 3}})
    with pytest.raises(ValueError, match="lineage="):
        get_peft_model(build(), altered)


def test_deepening_says_what_it_leaves(first_round, caplog):
    """A new adapter deepens experts; how much the newborns hold is said."""
    model, _, emap = copy.deepcopy(first_round)
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        model.add_adapter("second", PCGrowConfig(error_map=emap, budget=0.2, select="error"))
    share = float(emap.newborns.mass.sum() / emap.scores().sum())
    assert f"newborns ({len(emap.newborns)} of 'default') hold {share:.0%} of the error" in caplog.text
    experts = emap.mass.flatten().topk(5).indices.tolist()
    chosen = {(int(layer), e) for layer, here in model.peft_config["second"].locus.items() for e in here}
    assert chosen == {(emap.layers[i // 8], i % 8) for i in experts}


@pytest.mark.slow
def test_newborns_that_get_no_rows_are_named():
    """Of a map of the base, so that a second adapter knows nothing of the first, which takes all of its rows."""
    model = spawned()
    model.add_adapter("second", spawning())
    both(model, ORDERS[0])
    with pytest.raises(RuntimeError, match=r"adapter 'second' trains on nothing.* 5 nodes \(1.1, 1.4, 2.0.*'default'"):
        train(model, 4, texts=domain)
    both(model, ORDERS[1])
    train(model, 4, texts=domain)


def test_gates_that_let_nothing_pass_are_named():
    model = spawned()
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_gate_threshold["default"].fill_(1e9)
    with pytest.raises(RuntimeError, match=r"'default' trains on nothing.* none of [\d,]+ rows pass"):
        train(model, 4, texts=domain)


def test_experts_that_no_token_is_routed_to_are_named():
    words = torch.full((2, 8), 7)
    emap = measure_errors(build(), [words], progress=False)
    idle = (emap.count == 0).nonzero().tolist()[:2]
    locus = {emap.layers[row]: [e for r, e in idle if r == row] for row, _ in idle}
    model = get_peft_model(build(), PCGrowConfig(locus=locus))
    with pytest.raises(
        RuntimeError, match=f"{emap.layers[idle[0][0]]}.{idle[0][1]}.*no token is routed to their experts"
    ):
        train(model, 4, texts=lambda seed: words)


@pytest.mark.slow
def test_rows_without_an_error_are_no_reason():
    """As in reinforcement learning, where the first batches may earn nothing."""
    model = spawned(locus=LOCUS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    for seed in range(5):
        (0 * model(input_ids=domain(seed=seed)).logits.sum()).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_siblings_of_one_map_are_told_apart(order, tmp_path):
    """Their gates are the same: a grandchild takes rows from the one that it was cloned from, and only that one stays
    for it."""
    config = {"error_map": contrast(), "grow": "spawn", "locus": {0: [1, 2, 3]}}
    model = get_peft_model(build(), PCGrowConfig(**config, gate_fpr=0.02), adapter_name="a")
    model.add_adapter("b", PCGrowConfig(**config, gate_fpr=0.4))
    for name, seed in (("a", 1), ("b", 30)):
        model.set_adapter(name)
        train(model, 5, lr=0.1, seed=seed, texts=domain)
    model.base_model.set_adapter(order)
    want = logits(model, mixed())
    model.add_adapter("c", PCGrowConfig(**{**config, "error_map": measured(model), "gate_fpr": 0.3}))
    model.base_model.set_adapter([*order, "c"])
    assert torch.equal(logits(model, mixed()), want)
    (layer,) = [layer for layer in model.base_model.tuner_layers() if "c" in layer.births]
    parents = {layer.parent_of("c", donor) for donor in (1, 2, 3)} - {None}
    assert len(parents) == 1
    with pytest.raises(ValueError, match="'c' has newborns of newborns"):
        model.delete_adapter(*parents)
    model.delete_adapter(*({"a", "b"} - parents))


def test_a_config_that_is_used_twice_is_two_adapters(tmp_path):
    """What is set of one is not said of the other, nor by the file that it is saved to."""
    config = spawning()
    one, other = get_peft_model(build(), config), get_peft_model(build(), config)
    train(one, 3, lr=0.05, texts=domain)
    want = logits(one, mixed())
    other.base_model.set_gate_fpr(0.3)
    one.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded, mixed()), want)
    assert loaded.peft_config["default"].gate_fpr == 0.05
    one.add_adapter("second", config)
    assert one.peft_config["second"].fingerprint != one.peft_config["default"].fingerprint
    assert config.locus == one.peft_config["second"].locus


def test_deleting_an_adapter_that_is_not_active_changes_nothing_else():
    model = get_peft_model(build(), PCGrowConfig(locus={1: [1]}), adapter_name="a")
    model.add_adapter("b", PCGrowConfig(locus={2: [0]}))
    model.set_adapter("a")
    model.requires_grad_(False)
    model.delete_adapter("b")
    assert not any(p.requires_grad for p in model.parameters())
    model.add_adapter("b", PCGrowConfig(locus={2: [0]}))
    model.merge_adapter(["a"])
    model.delete_adapter("b")
    assert any(layer.merged for layer in model.base_model.tuner_layers())
