"""What version 0.1 had and this version has not: refused by name where it has an effect, read where it has none."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_pcgrow import ErrorMap, Locus, PCGrowConfig, choose, measure_errors
from peft_pcgrow.adapter import injection
from peft_pcgrow.maps.map_file import FILE, write
from peft_pcgrow.maps.map_tensors import to_tensors
from tiny import LOCUS, assert_same, build, contrast, logits, snapshot, spawned, tokens, train

# the fields that are gone, as version 0.1 wrote them where nobody asked for them
IDLE = {"max_per_layer": None, "cost_weight": 0.0, "block": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"select": "joint"}, "select='joint' was removed after version 0.1: use select='removable'"),
        ({"select": "square"}, r"select='square' was removed .*choose\(emap.square, budget"),
        ({"select": "coherent"}, r"select='coherent' was removed .*choose\(emap.coherent, budget"),
        ({"select": "lowest"}, r"select='lowest' was removed .*choose\(scores, budget.* examples/donors.py"),
        ({"select": "contested"}, "select='contested' was removed .*examples/donors.py"),
        ({"select": "separable"}, "select='separable' was removed .*examples/donors.py"),
        ({"max_per_layer": 2}, r"max_per_layer=2 was removed .*locus=peft_pcgrow.choose\(scores, budget"),
        ({"cost_weight": 0.5}, "cost_weight=0.5 was removed .*layers_to_transform="),
        ({"resolution": "neurons"}, "resolution='neurons' was removed .*resolution='matrix'"),
        ({"resolution": "neurons", "parts": {1: {0: [0]}}}, "resolution='neurons' was removed .*resolution='matrix'"),
        ({"block": 8}, "block=8 was removed .*resolution='matrix'"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"locus": LOCUS}, {"error_map": "map"}])
def test_new_configs(given, instead, beside, tmp_path):
    """Also from a file that no adapter was made by."""
    with pytest.raises(ValueError, match=instead):
        PCGrowConfig(**given, **beside)
    rewrite(tmp_path, PCGrowConfig(**beside), {**IDLE, **given})
    with pytest.raises(ValueError, match=instead):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", IDLE)
def test_a_field_set_later(name):
    config = PCGrowConfig(locus=LOCUS)
    setattr(config, name, 8)
    with pytest.raises(ValueError, match=f"{name}=8 was removed after version 0.1"):
        get_peft_model(build(), config)


def test_a_word_that_never_was():
    for word in ("loss", 3):
        with pytest.raises(ValueError, match="unknown select="):
            PCGrowConfig(locus=LOCUS, select=word)
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
        PCGrowConfig(locus=LOCUS, blocks=2)


@pytest.mark.parametrize("reader", [PCGrowConfig, PeftConfig])
def test_files_that_ask_for_nothing_of_it(reader, tmp_path, recwarn):
    rewrite(tmp_path, PCGrowConfig(locus=LOCUS), IDLE)
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    config = reader.from_pretrained(tmp_path)
    assert config.locus == Locus(LOCUS).to_json()
    assert not vars(config).keys() & IDLE.keys()


# what chose the nodes of an adapter that was made already
CHOSEN_BY = {
    "nobody asked": {},
    "joint": {"select": "joint"},
    "a donor rule": {"select": "contested"},
    "capped": {"select": "error", "max_per_layer": 2, "cost_weight": 0.5, "block": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CHOSEN_BY)
@pytest.mark.parametrize("kind", ["deepened", "spawned", "matrices"])
def test_adapters_made_by_it_load(kind, how, tmp_path, monkeypatch, recwarn):
    """A trained adapter, its seals and its config as version 0.1 wrote them: the same bits, and it trains on."""

    def birth(*args):
        born = made(*args)
        return replace(born, facts={**born.facts, "block": None})

    made = injection.birth
    with monkeypatch.context() as m:
        m.setattr(injection, "birth", birth)
        if kind == "spawned":
            model = spawned(protect=0.5)
        else:
            fine = {"resolution": "matrix"} if kind == "matrices" else {}
            model = get_peft_model(build(), PCGrowConfig(locus=LOCUS, **fine))
        train(model, steps=2)
        model.save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", None, {**IDLE, **CHOSEN_BY[how]})
    recwarn.clear()
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter", is_trainable=True)
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]
    assert torch.equal(logits(loaded), logits(model))
    train(loaded, steps=1)
    loaded.save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "adapter_config.json").read_text()).keys() & IDLE.keys()
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "again")), logits(loaded))


def test_adapters_of_blocks_are_refused(tmp_path):
    get_peft_model(build(), PCGrowConfig(locus=LOCUS, resolution="matrix")).save_pretrained(tmp_path)
    blocks = {"1": {"1": [0], "4": [0]}, "2": {"0": [0], "3": [1], "7": [0]}}
    rewrite(tmp_path, None, {**IDLE, "resolution": "neurons", "block": 8, "parts": blocks})
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"neurons, which were removed: merge or export it with version 0\.1"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(before, snapshot(model))


def rewrite(folder, config: PCGrowConfig | None, held: dict) -> None:
    """Save a config, or take the one that is there, and write more into it."""
    if config is not None:
        config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | held))


# ---- maps


def older(emap: ErrorMap, folder) -> None:
    """The folder that version 0.1 wrote: with how far nodes' errors lie at the same tokens, of held-out text too."""
    tensors, facts = to_tensors(emap)
    nodes = emap.count.numel() + len(emap.newborns.nodes)
    for prefix in ("", "heldout.") if emap.heldout is not None else ("",):
        tensors[f"{prefix}shared"] = torch.rand(nodes, nodes)
    write(folder, tensors, facts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "retain", "heldout"])
def test_maps(kind, tmp_path):
    """Read, saved, added and grown from as those that never held it."""
    emap = {
        "plain": lambda: measure_errors(build(), [tokens()], progress=False),
        "retain": contrast,
        "heldout": lambda: measure_errors(build(), [tokens()], heldout=[tokens(seed=3)], progress=False),
    }[kind]()
    older(emap, tmp_path / "old")
    emap.save(tmp_path / "new")
    assert b'"shared"' in (tmp_path / "old" / FILE).read_bytes()
    found = ErrorMap.load(tmp_path / "old")
    found.save(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "new" / FILE).read_bytes()
    if kind != "retain":
        assert_same({"sum": (found + emap).mass}, {"sum": 2 * emap.mass})
    model = get_peft_model(build(), PCGrowConfig(error_map=tmp_path / "old", budget=0.2))
    want = choose(emap.score("removable" if emap.has_parts else "error"), 0.2, emap.layers)
    assert model.peft_config["default"].locus == want.to_json()


@pytest.mark.slow
def test_measuring_goes_on_from_its_checkpoint(tmp_path):
    texts = tokens(12, 16).split(2)
    whole = measure_errors(build(), texts, progress=False)

    def interrupted():
        yield from texts[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_errors(build(), interrupted(), checkpoint=tmp_path, checkpoint_every=1, progress=False)
    older(ErrorMap.load(tmp_path), tmp_path)
    again = measure_errors(build(), texts, checkpoint=tmp_path, progress=False)
    assert torch.equal(again.mass, whole.mass)
    assert again.batches == whole.batches
