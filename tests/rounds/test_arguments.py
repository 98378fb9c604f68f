"""What arguments of `grow` may be, without a model; and their plain form, which tells runs from each other."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

from peft_pcgrow.rounds.arguments import OURS, check_arguments, plain_form
from peft_pcgrow.rounds.journal import differences, open_journal

REFUSED = {
    "lr text": ({"lr": "1e-3"}, ValueError, "lr='1e-3' is a text: give a number"),
    "lr zero": ({"lr": 0}, ValueError, "lr must be above 0"),
    "lr nan": ({"lr": math.nan}, ValueError, "lr must be a finite number"),
    "lr flag": ({"lr": True}, ValueError, "lr must be a finite number"),
    "epochs": ({"epochs": -1.0}, ValueError, "epochs must be above 0"),
    "epochs none": ({"epochs": None}, ValueError, "epochs must be a finite number"),
    "max_steps": ({"max_steps": 0}, ValueError, "max_steps must be a whole number of steps"),
    "max_steps half": ({"max_steps": 2.5}, ValueError, "max_steps must be a whole number"),
    "seed": ({"seed": 1.5}, ValueError, "seed must be a whole number"),
    "seed below": ({"seed": -1}, ValueError, "seed must be a whole number"),
    "seed large": ({"seed": 2**32}, ValueError, "seed must be at most 4294967295"),
    "forgetting": ({"max_forgetting": math.inf}, ValueError, "max_forgetting must be a finite number"),
    "forgetting text": ({"max_forgetting": "little"}, ValueError, "max_forgetting='little' is a text"),
    "windows": ({"map_windows": 3}, ValueError, "map_windows must be a whole number of windows, at least 4"),
    "curriculum": ({"curriculum": "yes"}, ValueError, "curriculum must be True or False"),
    "config kind": ({"config": [1]}, TypeError, "config must be a mapping"),
    "trainer kind": ({"trainer": "wandb"}, TypeError, "trainer must be a mapping"),
    "config unknown": ({"config": {"loar": 1}}, TypeError, "config has no field loar: did you mean lora"),
    "config ours": ({"config": {"locus": {0: [1]}}}, TypeError, "config sets locus, which grow decides itself: leave"),
    "config targets": ({"config": {"target_modules": ["q_proj"]}}, TypeError, "config sets target_modules"),
    "config of grow": ({"config": {"budget": 0.1}}, TypeError, "config sets budget, .*: give budget= to grow"),
    "config inference": ({"config": {"inference_mode": True}}, TypeError, "config sets inference_mode"),
    "config lora": ({"config": {"lora": {"rr": 4}}}, (TypeError, ValueError), "rr"),
    "trainer ours": ({"trainer": {"max_steps": 3}}, TypeError, "trainer sets max_steps, .*: give max_steps= to grow"),
    "trainer batch": ({"trainer": {"per_device_train_batch_size": 3}}, TypeError, "give batch_size= to grow"),
    "trainer rate": ({"trainer": {"optim": "sgd", "learning_rate": 1}}, TypeError, "optim, learning_rate, .* lr= to"),
    "trainer value": ({"trainer": {"logging_strategy": "seldom"}}, ValueError, "trainer: .*seldom"),
    "trainer unknown": ({"trainer": {"report_too": "none"}}, TypeError, "no field report_too: did you mean report_to"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_and_names_the_argument(given, error, message):
    with pytest.raises(error, match=message):
        check_arguments(given)


def test_takes_any_subset_of_good_ones():
    check_arguments({})
    check_arguments({"lr": None, "max_steps": None, "max_forgetting": -0.5, "config": None, "trainer": None})
    check_arguments({"lr": np.float64(0.1), "max_steps": np.int64(4), "seed": 0, "config": {"lora": LoraConfig(r=2)}})
    check_arguments({"config": {"lora": {"r": 2, "target_modules": ["q_proj"]}}, "trainer": {"report_to": "none"}})


def test_what_only_the_loop_sets_are_names_of_training_arguments():
    assert set(OURS) <= set(TrainingArguments.__dataclass_fields__)


def test_plain_form_is_the_same_in_every_process():
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)  # they hash to the same place
    assert plain_form({"a": one}) == plain_form({"a": other}) == {"a": [0, 8]}
    settings = plain_form({"lora": LoraConfig(target_modules={"v_proj", "q_proj"}), "dtype": torch.bfloat16})
    assert settings["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert settings["dtype"] == "torch.bfloat16"
    assert json.loads(json.dumps(settings)) == settings
    # no address in memory
    assert plain_form(object()) == "builtins.object"


def test_says_which_argument_differs_and_how(tmp_path):
    names = [f"layers.{n}.q_proj" for n in range(40)]
    one = plain_form({"config": {"lora": {"r": 4, "target_modules": names}}, "lr": None})
    other = plain_form({"config": {"lora": {"r": 4, "target_modules": [*names[:-1], "last"]}}, "lr": None})
    assert [name for name, *_ in differences(one, other)] == ["config.lora.target_modules"]
    open_journal(tmp_path, one).save()
    assert open_journal(tmp_path, one).asked == one
    with pytest.raises(ValueError, match=r"run with config.lora.target_modules=.*layers.39.q_proj.*now it is .*'last'"):
        open_journal(tmp_path, other)
    with pytest.raises(ValueError, match=r"run with lr=\(not given\), and now it is 0.1"):
        open_journal(tmp_path / "new", {}).save() or open_journal(tmp_path / "new", {"lr": 0.1})
