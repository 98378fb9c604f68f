"""Settings of any library are plain values once the config is made, saved and read back equal, or refused by name."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftConfig, PeftModel, TaskType, get_peft_model

from peft_pcgrow import Locus, PCGrowConfig
from tiny import LOCUS, assert_same, build, contrast, logits, snapshot, spawned, train

# given, and what it is
ACCEPTED = {
    "budget": [(np.float32(0.5), 0.5), ("0.25", 0.25), (torch.tensor(0.5), 0.5), (1, 1)],
    "gate_fpr": [(np.float64(0.1), 0.1), ("1e-3", 1e-3)],
    "protect": [("0", 0.0), (np.array(0.5), 0.5)],
    "settle_depth": [(np.int32(2), 2), ("2", 2), (torch.tensor(3), 3), (2.0, 2)],
    "keep_activations": [(np.int32(2), 2), ("2", 2), (2.0, 2)],
    "keep_logits": [(np.bool_(False), False), ("true", True)],
    "seed": [(np.uint8(7), 7), ("7", 7), (-1, -1)],
    "init_weights": [(np.bool_(True), True), ("false", False), (torch.tensor(True), True)],
    "inference_mode": [(np.bool_(False), False)],
    "select": [(np.str_("gate"), "gate")],
    "task_type": [(TaskType.CAUSAL_LM, "CAUSAL_LM"), ("CAUSAL_LM", "CAUSAL_LM")],
    "modules_to_save": [
        (("lm_head", "norm"), ["lm_head", "norm"]),
        ({"norm", "lm_head"}, ["lm_head", "norm"]),
        (np.array(["lm_head"]), ["lm_head"]),
        (OmegaConf.create(["lm_head"]), ["lm_head"]),
        ("lm_head", ["lm_head"]),
    ],
    "target_modules": [
        (OmegaConf.create(["mlp.experts"]), {"mlp.experts"}),
        (("a", "b"), {"a", "b"}),
        (".*mlp", ".*mlp"),
    ],
    "exclude_modules": [(np.array(["a"]), {"a"}), (OmegaConf.create(["a", "b"]), {"a", "b"})],
    "layers_to_transform": [
        (np.array([1, 2]), [1, 2]),
        (np.int64(2), 2),
        (OmegaConf.create([1]), [1]),
        ({2, 1}, [1, 2]),
        (range(1, 3), [1, 2]),
        (torch.tensor([1]), [1]),
        (["1", 2.0], [1, 2]),
    ],
    "layers_pattern": [(("layers",), ["layers"]), (OmegaConf.create(["layers"]), ["layers"]), ("layers", "layers")],
    "trainable_token_indices": [
        (np.array([5, 7]), [5, 7]),
        (torch.tensor([5, 7]), [5, 7]),
        (OmegaConf.create([5]), [5]),
        (OmegaConf.create({"embed_tokens": [5]}), {"embed_tokens": [5]}),
        ({"embed_tokens": np.array([5])}, {"embed_tokens": [5]}),
        (5, [5]),
    ],
    "locus": [
        (OmegaConf.create({1: [1, 4], 2: [0]}), {"1": [1, 4], "2": [0]}),
        (OmegaConf.create({"1": ["4", 1]}), {"1": [1, 4]}),
        ({np.int64(1): np.array([4, 1])}, {"1": [1, 4]}),
        ({1: torch.tensor([4])}, {"1": [4]}),
        ({"1": range(2)}, {"1": [0, 1]}),
        (Locus({1: [4]}), {"1": [4]}),
    ],
    "revision": [("main", "main"), (None, None)],
}
ACCEPTED_PARTS = [
    (OmegaConf.create({1: {4: ["up", "down"]}}), {"1": {"4": ["down", "up"]}}),
    ({np.int64(1): {"4": np.array(["up", "down"])}}, {"1": {"4": ["down", "up"]}}),
    (OmegaConf.create({"1": {"4": ["down_proj"]}}), {"1": {"4": ["down_proj"]}}),
]
REFUSED = {
    "budget": [None, True, "half", float("nan"), np.array([0.1, 0.2]), "nan", 0, 2],
    "gate_fpr": [None, True, 0, "inf", [0.1]],
    "protect": [1, "x", None],
    "cost_weight": [True, float("nan"), 0.5],
    "settle_tol": [1.0, "x"],
    "settle_depth": [None, True, -1, 1.5, 10**30, "x"],
    "keep_activations": [None, True, -1, 1.5, "all"],
    "keep_logits": [None, 0, "x"],
    "max_per_layer": [True, 2],
    "seed": [None, 1.5, 2**64, "x"],
    "block": [8],
    "init_weights": [None, 0, 1, "x", "", [], "gaussian"],
    "inference_mode": [None, 0, "x"],
    "select": [0, "best", ["error"]],
    "settle": [None, 1],
    "grow": [None, {}],
    "router": [None],
    "resolution": [None, []],
    "nodes": [0, "all"],
    "base_quantization": [False, "int4"],
    "task_type": ["CHAT"],
    "modules_to_save": ["(", 3, [3], {"lm_head": 1}, [None], [[]]],
    "target_modules": [3, [3], "(", [None]],
    "exclude_modules": [3, "(", {"a": 1}],
    "layers_pattern": [3, [3]],
    "layers_to_transform": ["all", [1.5], [True], True, {"1": 2}, [-1], [[1]]],
    "trainable_token_indices": ["x", [1.5], [-1], {1: [5]}, {"embed_tokens": "x"}, [True]],
    "locus": [{1: [1], "1": [4]}, {1: ["x"]}, {1: [10**30 * 1.5]}, {"\u00b2": [1]}],
    "revision": [1.0, ["main"]],
    "spawned": [[1], "x", {"1": ["x"]}],
    "protected": [[1], 3],
    "shrunk": [[1], "x", {"kind": object()}],
    "base": [[1], "x"],
    "gate_window": [-1, "x", None, 10**30],
    "error_map": [3, ["a"]],
}


def read_back(config: PCGrowConfig, folder) -> PCGrowConfig:
    config.save_pretrained(folder)
    return PCGrowConfig.from_pretrained(folder)


def settings(config: PCGrowConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "peft_type"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given", "want"), [(n, *each) for n, listed in ACCEPTED.items() for each in listed])
def test_accepted(name, given, want, tmp_path):
    config = PCGrowConfig(**{"locus": LOCUS, name: given})
    found = getattr(config, name)
    assert found == want
    assert type(found) is type(want) or name == "task_type"
    again = read_back(config, tmp_path)
    assert settings(again) == settings(config)
    assert settings(read_back(again, tmp_path)) == settings(config)


@pytest.mark.parametrize(("given", "want"), ACCEPTED_PARTS)
def test_accepted_parts(given, want, tmp_path):
    config = PCGrowConfig(parts=given, resolution="matrix")
    assert config.parts == want
    assert read_back(config, tmp_path).parts == want


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), [(name, value) for name, listed in REFUSED.items() for value in listed])
def test_refused(name, given):
    said = "task type" if name == "task_type" else name
    with pytest.raises(ValueError, match=re.escape(said)):
        PCGrowConfig(**{"locus": LOCUS, name: given})


@pytest.mark.slow
def test_settings_changed_later():
    """They are looked at again when the adapter is made."""
    config = PCGrowConfig(locus=LOCUS)
    config.init_weights = None
    with pytest.raises(ValueError, match="init_weights must be True or False, got None"):
        get_peft_model(build(), config)
    config.init_weights, config.modules_to_save = np.bool_(True), OmegaConf.create(["lm_head"])
    assert get_peft_model(build(), config).peft_config["default"].modules_to_save == ["lm_head"]


@pytest.mark.slow
def test_omegaconf_all_the_way(tmp_path):
    """A config from YAML trains, is saved and loaded, and is what the same settings in Python give."""
    given = OmegaConf.create("""
        locus: {1: [1, 4], 2: [0, 3, 7]}
        modules_to_save: [lm_head]
        layers_to_transform: [1, 2]
        trainable_token_indices: [5, 7]
        gate_fpr: 1e-2
    """)
    plain = {"locus": LOCUS, "modules_to_save": ["lm_head"], "layers_to_transform": [1, 2]}
    found = []
    for settings in (dict(given), {**plain, "trainable_token_indices": [5, 7]}):
        model = get_peft_model(build(), PCGrowConfig(**settings))
        train(model)
        found.append(logits(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(*found)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), found[0])


# ---- files that a stranger wrote


@pytest.mark.slow
@pytest.mark.parametrize("reader", [PCGrowConfig, PeftConfig])
def test_a_path_in_a_file_is_not_followed(reader, tmp_path, monkeypatch):
    contrast().save(tmp_path / "map")
    PCGrowConfig(error_map=tmp_path / "map", budget=0.1).save_pretrained(tmp_path / "adapter")
    config = reader.from_pretrained(tmp_path / "adapter")
    with monkeypatch.context() as m:
        m.setattr("builtins.open", lambda *args, **kw: pytest.fail(f"opened {args}"))
        with pytest.raises(ValueError, match=r"error_map='.*map' stands in a config file.*ErrorMap.load"):
            get_peft_model(build(), config)
    config.error_map = contrast()
    get_peft_model(build(), config)


# what in the file of an adapter is altered, how, and what is said
ALTERED = {
    "locus": [
        (["locus", "1"], [99]),
        (["locus", "1"], "x"),
        (["locus", "9"], [0]),
        (["locus"], None),
        (["locus"], [1]),
    ],
    "spawned": [(["spawned", "1"], [99]), (["spawned", "1"], [2]), (["spawned", "0"], [0]), (["spawned"], "x")],
    "protected": [
        (["protected", "1", "down_proj"], 10**9),
        (["protected", "1", "down_proj"], -1),
        (["protected", "1", "down_proj"], "x"),
        (["protected", "1", "up_proj"], 1),
        (["protected", "7"], {"down_proj": 1}),
        (["protected", "1"], None),
    ],
    "gate_window": [(["gate_window"], 10**12), (["gate_window"], -1), (["gate_window"], "x")],
    "shrunk": [
        (["shrunk"], {"kind": "rank", "layers": {"1": {"down_proj": "999999 999999"}}}),
        (["shrunk"], {"kind": "rank", "layers": {}}),
        (["shrunk"], {"kind": "x", "layers": {"1": {}}}),
        (["shrunk"], {"layers": 3}),
        (["shrunk"], "x"),
    ],
    "parts": [
        (["parts"], {"1": {"1": ["a"], "4": ["a"]}, "2": {"0": ["a"], "3": ["a"], "7": ["a"]}}),
        (["resolution"], "matrix"),
    ],
    "trainable_token_indices": [
        (["trainable_token_indices"], [10**9]),
        (["trainable_token_indices"], {"embed_tokens": [10**9]}),
        (["trainable_token_indices"], {"rotary_emb": [1]}),
    ],
    "modules_to_save": [(["modules_to_save"], "("), (["modules_to_save"], [3])],
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    spawned(protect=0.5).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("field", "path", "value"), [(f, *edit) for f, edits in ALTERED.items() for edit in edits])
def test_altered_files(field, path, value, adapter, tmp_path):
    """One clear error that names the field, before anything of that size is made."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    held = written = json.loads((adapter / "adapter_config.json").read_text())
    *way, last = path
    for key in way:
        held = held[key]
    held[last] = value
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=field):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(before, snapshot(model))
