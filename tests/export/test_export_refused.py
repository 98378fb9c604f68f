"""What export_flat and router="flat" refuse: with a text that says why, a model left alone, and no file left behind."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_bad_input import refused
from test_export import batches, config, load, text_map, trained
from test_export_adapters import with_deepened
from test_spawn_settings import changed_map
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeForCausalLM

from peft_pcgrow import ErrorMap, export_flat
from tiny import LOCUS, build, grown, logits, mixed


@contextmanager
def no_export(model: nn.Module, error: type[Exception] | tuple, text: str, folder: Path):
    """The block raises `error` with `text`; the model and all that is in `folder` are as before."""
    before = sorted(folder.rglob("*"))
    with refused(model, error, text):
        yield
    assert sorted(folder.rglob("*")) == before


def deep() -> PeftModel:
    return grown(locus=LOCUS)


def switched_off() -> PeftModel:
    model = trained()
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: trained("deepseek_v3", base={"n_group": 2}), r"routes within groups of experts \(n_group=2\)"),
        (
            lambda: trained(router="branch", locus=LOCUS),
            "layer 0 has 0 newborns and another layer 3.*Qwen3MoeForCausalLM.*no selection bias.*router='flat'",
        ),
        (deep, r"no active adapter has newborns: merge_and_unload\(\) writes deepened experts"),
        (switched_off, "no active adapter has newborns"),
        (build, "takes a PeftModel grown by peft_pcgrow, got Qwen3MoeForCausalLM"),
        (lambda: get_peft_model(build(), LoraConfig(target_modules=["q_proj"])), "got PeftModel"),
    ],
    ids=["groups", "uneven", "deepened", "disabled", "plain", "LoRA"],
)
def test_models_that_cannot_be_exported(make, text, tmp_path):
    model = make()
    with no_export(model, ValueError, text, tmp_path):
        export_flat(model, tmp_path / "flat", batches())


def test_quantized_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    build().save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit)
    model = get_peft_model(base, config(router="branch", locus={0: [0], 1: [4], 2: [3]}, gate_fpr=0.3, budget=0.12))
    with no_export(model, ValueError, "is loaded quantized: load the base in bf16 or fp32", tmp_path):
        export_flat(model, tmp_path / "flat", batches())


@pytest.mark.slow
def test_merged(tmp_path):
    """As in all of PEFT, a layer with a merged adapter computes no other: newborns are not part of the model then."""
    model = with_deepened(trained())
    branch = logits(model, mixed())
    model.merge_adapter(["deep"])
    assert not torch.equal(logits(model, mixed()), branch)
    with no_export(model, (ValueError, RuntimeError), "unmerge_adapter", tmp_path):
        export_flat(model, tmp_path / "flat", batches())


def test_no_text(tmp_path):
    model = trained()
    with no_export(model, ValueError, "batches is empty", tmp_path):
        export_flat(model, tmp_path / "flat", [])


@pytest.mark.slow
def test_targets(tmp_path):
    """A folder with something in it and a file are kept; an empty folder is filled."""
    model = trained()
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "full" / "notes", tmp_path / "file"):
        path.write_text("notes")
    for path in (tmp_path / "full", tmp_path / "file"):
        with no_export(model, FileExistsError, "give a new folder for the checkpoint", tmp_path):
            export_flat(model, path, batches())
    assert (tmp_path / "file").read_text() == "notes"
    export_flat(model, str(tmp_path / "empty"), batches())
    assert torch.isfinite(logits(load(tmp_path / "empty"), mixed())).all()
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty", "file"}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_checkpoint_that_computes_something_else(factor, tmp_path, monkeypatch):
    load_right = Qwen3MoeForCausalLM.from_pretrained

    def load_wrong(*args, **kwargs):
        model = load_right(*args, **kwargs)
        model.lm_head.weight.data *= factor
        return model

    model = trained()
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", load_wrong)
    with no_export(model, RuntimeError, "the checkpoint's logits differ by", tmp_path):
        export_flat(model, tmp_path / "flat", batches())


@pytest.mark.slow
def test_a_full_disk(tmp_path, monkeypatch):
    def fail(self, folder):
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    model = trained()
    monkeypatch.setattr(Qwen3MoeForCausalLM, "save_pretrained", fail)
    with no_export(model, OSError, "No space left", tmp_path):
        export_flat(model, tmp_path / "flat", batches())


# ---- router="flat"


@pytest.mark.slow
def test_flat_newborns_in_each_layer():
    """The best two of each layer, where the budget's best six of the model are spread unevenly."""
    spread = get_peft_model(build(), config(router="branch")).peft_config["default"].spawned
    assert len({len(spread.get(str(layer), ())) for layer in range(3)}) > 1
    best = text_map().score("error").argsort(dim=1, descending=True)[:, :2].sort(dim=1).values.tolist()
    flat = get_peft_model(build(), config()).peft_config["default"]
    assert {layer: sorted(donors) for layer, donors in flat.spawned.items()} == dict(zip("012", best, strict=True))


def test_flat_refuses_groups_at_once():
    model = build("deepseek_v3")
    with refused(model, ValueError, r"n_group=2.*cannot be exported flat; keep the adapter"):
        get_peft_model(model, config("deepseek_v3", router="flat"))


def one_left_out() -> ErrorMap:
    """A map in which layer 1's gate does not separate at its first node."""
    best = int(text_map().score("error")[1].argmax())
    return changed_map(text_map(), recall={(1, best): 0.0})


def test_flat_with_a_node_left_out():
    """The text says where, and does not advise what has been done."""
    model = build()
    with refused(model, ValueError, r"layer 1 has 1 newborns and another layer 2(?!.*router='flat')"):
        get_peft_model(model, config(error_map=one_left_out()))


def test_a_refused_config_can_be_used_again():
    asked = config(error_map=one_left_out())
    with pytest.raises(ValueError, match="layer 1 has 1 newborns"):
        get_peft_model(build(), asked)
    assert asked.locus is None
    assert asked.spawned is None
    asked.error_map = text_map()
    assert len(get_peft_model(build(), asked).peft_config["default"].spawned["1"]) == 2
