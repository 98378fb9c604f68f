"""What an adapter is follows from its config without changing it; it is written there once the adapter is in."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model

from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.adapter.injection import Injection
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.adapter.resolve import Resolved, resolve
from tiny import assert_same, build, contrast, snapshot, spawning

CONFIGS: dict[str, Callable[[], PCGrowConfig]] = {
    "a map and a budget": lambda: PCGrowConfig(error_map=contrast(), budget=0.3, protect=0.5),
    "newborns": spawning,
    "matrices": lambda: PCGrowConfig(locus={1: [2], 2: [3]}, resolution="matrix"),
    "by hand, with LoRA": lambda: PCGrowConfig(locus={1: [2], 2: [3]}, lora={"target_modules": ["q_proj"]}),
}


def held(config: PCGrowConfig) -> dict[str, Any]:
    """All that a config says and carries; maps are not compared but by which object they are."""
    named = {name: value for name, value in vars(config).items() if name not in ("error_map", "_measured")}
    return copy.deepcopy(named) | {"map": id(config.error_map), "used": id(config._measured)}


@pytest.mark.parametrize("name", CONFIGS)
def test_resolving_changes_nothing(name):
    config = CONFIGS[name]()
    before = held(config)
    found = resolve(config, list(find_experts(build()).sites), config.error_map)
    assert held(config) == before
    # and is what the config of an adapter says afterwards
    made: Any = get_peft_model(build(), config)
    said = {field: value for field, value in vars(Resolved.of(config)).items() if value != before[field]}
    assert said.keys() >= {"base", "nodes", "target_modules"}
    # an adapter with newborns is told from others by its name too
    for field in said.keys() - {"base", "nodes", "target_modules", *(["fingerprint"] if found.spawned else ())}:
        assert said[field] == getattr(found, field), field
    mine = made.peft_config["default"]
    assert mine is not config
    assert vars(Resolved.of(mine)) == vars(Resolved.of(config))
    assert config.error_map is None


@pytest.mark.parametrize("where", ["half of the layers", "at the end"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_left_of_an_injection_that_fails(name, where, monkeypatch):
    """The model, what is carried between PEFT's steps, and the config are as before, which then gives what it would
    have given."""
    config, calls = CONFIGS[name](), []
    model: Any = get_peft_model(build(), PCGrowConfig(locus={0: [1]}))
    before, asked = snapshot(model), held(config)

    def fails(*args: Any, **kwargs: Any) -> None:
        calls.append(model.base_model._injection)
        if where == "at the end" or len(calls) == 2:
            raise RuntimeError("no room")
        update(*args, **kwargs)

    update = PCGrowExperts.update_layer
    late = where == "at the end"
    with monkeypatch.context() as patch:
        patch.setattr(*((PCGrowModel, "_watch") if late else (PCGrowExperts, "update_layer")), fails)
        with pytest.raises(RuntimeError, match="no room"):
            model.add_adapter("other", config)
    # between PEFT's steps it was there
    assert [isinstance(carried, Injection) for carried in calls] == ([False] if late else [True, True])
    assert_same(before, snapshot(model))
    assert model.base_model._injection is None
    assert held(config) == asked
    model.add_adapter("other", config)
    assert model.base_model._injection is None
    want: Any = get_peft_model(build(), CONFIGS[name](), adapter_name="other")
    assert vars(Resolved.of(config)) == vars(Resolved.of(want.peft_config["other"]))


@pytest.mark.parametrize("name", ["1", "experts", "weight", "lora_A", "pcgrow_gate_up_proj"])
def test_names_of_modules_are_no_names_of_adapters(name):
    """PEFT would leave that layer's tensors out of the other adapter's file, whichever is made first."""
    model: Any = get_peft_model(build(), PCGrowConfig(locus={1: [1]}))
    before, plain = snapshot(model), build()
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is what a module or tensor of this model is called"):
        model.add_adapter(name, PCGrowConfig(locus={2: [1]}))
    assert_same(before, snapshot(model))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="call it 'grown_"):
        get_peft_model(plain, PCGrowConfig(locus={1: [1]}), adapter_name=name)
    assert_same(snapshot(build()), snapshot(plain))
