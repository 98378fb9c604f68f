"""Ctrl-C at any moment of what changes a model: it is as it was, or as it should become, never between."""

import copy
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import peft_pcgrow
from peft_pcgrow import PCGrowConfig, compress, find_experts
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import adopt
from peft_pcgrow.atomic import all_or_nothing, completed
from peft_pcgrow.packed.forms import Form
from tiny import LOCUS, build, dense, grown, logits, tokens, train

OURS = str(Path(peft_pcgrow.__file__).parent)
MOMENTS = 8


class Interrupting:
    """Raises KeyboardInterrupt before the n-th line of ours that runs inside; None: counts them."""

    def __init__(self, moment: int | None):
        self.moment, self.lines = moment, 0

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.moment:
                raise KeyboardInterrupt
        return self._line

    def __enter__(self) -> "Interrupting":
        sys.settrace(self._call)
        return self

    def __exit__(self, *error) -> None:
        sys.settrace(None)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a model computes and is saved by."""
    held: Any = model
    layers = [m for m in model.modules() if isinstance(m, PCGrowExperts)]
    inner: Any = next(m for m in model.modules() if hasattr(m, "generation_config"))
    noted = getattr(inner.config, "quantization_config", None)
    return {
        "kinds": [(name, type(m).__name__) for name, m in model.named_modules()],
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "trains": [name for name, p in model.named_parameters() if p.requires_grad],
        "merged": [list(layer.merged_adapters) for layer in layers],
        "originals": [sorted(layer._originals) for layer in layers],
        "births": [dict(layer.births) for layer in layers],
        "active": [layer.active_adapters for layer in layers],
        # PEFT notes a config before it asks for the adapter
        "adapters": {
            name: (config.shrunk, config.inference_mode)
            for name, config in getattr(held, "peft_config", {}).items()
            if any(name in layer.births for layer in layers)
        },
        "layers": inner.config.num_hidden_layers,
        "noted": noted and noted.layers,
        "method": getattr(inner, "quantization_method", None),
        "quantizer": type(getattr(inner, "hf_quantizer", None)).__name__,
        "training": model.training,
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def adapted() -> nn.Module:
    """Two adapters that deepen some of the same experts, and LoRA beside."""
    model = build()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    model = get_peft_model(model, PCGrowConfig(locus=LOCUS, init_weights=False))
    model.add_adapter("other", PCGrowConfig(locus={1: [4, 5]}, init_weights=False))
    return model.eval()


def merged() -> nn.Module:
    model: Any = adapted()
    model.merge_adapter(["default"])
    return model


def with_forms(model: nn.Module) -> Any:
    plan = compress.plan(model, target=0.3, methods=("thin", "skip"), domain=[tokens(2, 6)], progress=False)
    return plan


def adopted() -> nn.Module:
    """Its MLPs are nodes."""
    model = dense()
    adopt(find_experts(model))
    return model


def cut(model: Any) -> None:
    compress.apply(model, PLAN, domain=[tokens(2, 6)], progress=False)


PLAN: Any = None
# what is changed: how the model is made, and what changes it
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "merge": (adapted, lambda model: model.merge_adapter()),
    "merge one more": (merged, lambda model: model.merge_adapter(["other"])),
    "unmerge": (merged, lambda model: model.unmerge_adapter()),
    "merge and unload": (adapted, lambda model: model.merge_and_unload()),
    "unload": (adapted, lambda model: model.unload()),
    "quantize": (build, lambda model: compress.quantize_experts(model, "int8")),
    "quantize an adapted base": (grown, lambda model: compress.quantize_experts(model, "nf4")),
    "quantize MLPs": (adopted, lambda model: compress.quantize_experts(model, "2bit")),
    "shrink": (grown, lambda model: compress.shrink_adapter(model, bits=3, batches=[tokens(2, 6)])),
    "apply": (build, cut),
    "add an adapter": (adapted, lambda model: model.add_adapter("third", PCGrowConfig(locus={0: [1], 1: [2]}))),
    "grow": (build, lambda model: get_peft_model(model, PCGrowConfig(locus=LOCUS))),
}


def inside(model: Any) -> nn.Module:
    """What may have been wrapped or unwrapped."""
    return getattr(getattr(model, "base_model", None), "model", model)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_all_or_nothing(name, monkeypatch):
    make, change = CHANGES[name]
    start = make()
    if name == "apply":
        monkeypatch.setattr(sys.modules[__name__], "PLAN", with_forms(copy.deepcopy(start)))
    torch.manual_seed(0)
    model = copy.deepcopy(start)
    before = state(model), state(inside(model))
    with Interrupting(None) as counted:
        change(model)
    after = state(model), state(inside(model))
    total = counted.lines
    assert total > 3
    # every moment of the end, where things change, and some of all
    moments = sorted({*range(max(1, total - MOMENTS), total + 1), *range(1, total + 1, total // MOMENTS + 1)})
    torn, ended = [], []
    for moment in moments:
        model = copy.deepcopy(start)
        torch.manual_seed(0)
        try:
            with Interrupting(moment):
                change(model)
        except KeyboardInterrupt:
            pass
        else:
            continue
        found = state(model), state(inside(model))
        if any(equal(found, wanted) for wanted in (before, after)):
            ended.append(equal(found, before))
        else:
            torn.append((moment, [key for key in before[0] if not equal(found[0][key], before[0][key])]))
    assert not torn, (total, torn)
    assert any(ended)


@pytest.fixture
def answers_ctrl_c():
    """Whoever started the tests in the background may have left Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answers_ctrl_c")
def test_a_second_ctrl_c_does_not_break_the_undoing():
    done = []

    def step() -> None:
        with all_or_nothing() as undo:
            undo.append(lambda: done.append(1))
            undo.append(lambda: signal.raise_signal(signal.SIGINT))
            undo.append(lambda: done.append(2))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [2, 1]
    with pytest.raises(KeyboardInterrupt):
        completed(lambda: done.append(3) if 4 in done else (done.append(4), signal.raise_signal(signal.SIGINT)))
    assert done == [2, 1, 4, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_goes_on_after_an_interruption():
    """What was undone can be done again, and comes out as if nothing had been."""
    model, twin = build(), build()
    with pytest.raises(KeyboardInterrupt), Interrupting(400):
        compress.quantize_experts(model, "nf4")
    for each in (model, twin):
        compress.quantize_experts(each, "nf4")
    assert equal(state(model), state(twin))
    assert model.config.quantization_config.forms()[0] == (Form(4),) * 8
    grown_model: Any = grown()
    with pytest.raises(KeyboardInterrupt), Interrupting(150):
        grown_model.merge_adapter()
    train(grown_model)
    grown_model.merge_adapter()
    want = logits(grown_model)
    grown_model.unmerge_adapter()
    assert logits(grown_model).allclose(want, atol=1e-4)


@pytest.mark.slow
def test_threads_with_the_adapter_off(monkeypatch):
    """The first forward puts the base's weights back; none reads them before they are."""
    model: Any = grown(init_weights=False)
    model.merge_adapter()
    write = experts.write_pieces

    def slowly(*args) -> None:
        time.sleep(0.05)
        write(*args)

    monkeypatch.setattr(experts, "write_pieces", slowly)
    with model.disable_adapter(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: logits(model), range(8)))
    assert all(torch.equal(each, logits(build())) for each in found)
