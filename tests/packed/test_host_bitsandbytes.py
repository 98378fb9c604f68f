"""What the files called `host` name of bitsandbytes is there; after an upgrade, look here first."""

import pytest
import torch

from host_names import missing
from peft_pcgrow.architectures import host
from peft_pcgrow.packed.host import KERNELS

bitsandbytes = pytest.importorskip("bitsandbytes")

SIGNATURES = {
    "bitsandbytes.functional.QuantState": ("absmax", "shape", "blocksize", "quant_type", "dtype"),
    "bitsandbytes.functional.dequantize_4bit": ("A", "quant_state"),
    **{f"{module}.{name}": None for name, module in host.BITSANDBYTES.items()},
    **{f"{module}.{name}": None for name, module in host.LINEARS.items() if module.startswith("bitsandbytes")},
}


@pytest.fixture(scope="module")
def held():
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.weight = layer.weight.to("cpu")
    found = {f"bitsandbytes.functional.{name}": bitsandbytes.functional for name in KERNELS}
    found |= {"Linear8bitLt.state": bitsandbytes.nn.Linear8bitLt(64, 64)}
    return found | {f"Linear4bit.{host.REPACKS}": layer, "Params4bit.quant_state": layer.weight}


def test_names(held):
    assert missing("bitsandbytes", SIGNATURES, held) == []


def test_a_name_that_is_gone_is_told(held, monkeypatch):
    monkeypatch.delattr("bitsandbytes.nn.Params4bit")
    (line,) = missing("bitsandbytes", SIGNATURES, held)
    assert line == (
        f"bitsandbytes {bitsandbytes.__version__} has no bitsandbytes.nn.Params4bit, which peft_pcgrow needs: see "
        "peft_pcgrow/architectures/host.py"
    )


def test_other_parameters_are_told(held, monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda codes, scales: None)
    (line,) = missing("bitsandbytes", SIGNATURES, held)
    assert "takes (codes, scales), and peft_pcgrow calls it with ('A', 'quant_state')" in line
    assert line.endswith("see peft_pcgrow/packed/host.py")


def test_classes_are_found_where_they_are_loaded():
    assert host.loaded(host.BITSANDBYTES) == (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params)
    assert host.loaded({"Nobody": "no.such.module"}) == ()
    assert not isinstance(torch.nn.Parameter(torch.zeros(1)), host.loaded(host.BITSANDBYTES))
