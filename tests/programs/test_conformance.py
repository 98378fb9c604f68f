"""The operations of `examples/operations.py` on one architecture for each way in which architectures differ.

All others are built, and their experts found; `examples/conformance.py` runs everything on everything.
"""

import pytest

import architectures
from conformance import conform, table
from operations import OPERATIONS

# what stands for what; a name that the installed transformers does not know is left out
FAMILIES = {
    "qwen3_moe": "softmax, renormalized",
    "deepseek_v3": "sigmoid, selection biases, groups; a dense layer; shared experts",
    "gpt_oss": "transposed, interleaved, with biases",
    "aria_text": "transposed",
    "nemotron_h": "no gate; layers of recurrence, attention and experts",
    "lfm2_moe": "convolutions between attention",
    "gemma4_text": "router and experts on the decoder layer; keys shared through a mapping; shared layers see less",
    "deepseek_v4": "layers that route by a table; compressed keys; several residual streams",
    "zaya": "a router's state handed to the next layer; a class that skips",
    "phimoe": "a router that draws",
    "qwen3_5_moe": "a composite's text model",
    "inkling_text": "a router that returns four; shared experts at its end",
    "inkling2_loop_text": "layers run several times; layers and head read all lower layers",
    "minimax": "a cache with states beside its entries",
    "dbrx": "experts that do not follow the contract",
}
KNOWN = architectures.moe_architectures()


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in KNOWN])
def test_operation(name, operation):
    row = conform(name, operation)
    assert row["ok"], row["reason"]


# its experts are rows of an embedding, without matrices
NO_NODES = {"doge"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KNOWN.keys() - FAMILIES.keys() - NO_NODES))
def test_built_and_found(name):
    row = conform(name, "discover")
    assert row["ok"], row["reason"]


def test_every_width_divides_by_eight():
    """So that grouped_mm takes every expert in 16 bit too."""
    for name in FAMILIES.keys() & KNOWN.keys():
        for label, parameter in architectures.build(name).named_parameters():
            if ".experts." in label and parameter.dim() == 3:
                assert all(size % 8 == 0 for size in parameter.shape[1:]), (name, label)


def test_a_row_says_why():
    """What an operation raises becomes its reason, and the table says it once for all that it befalls."""
    passed = conform("qwen3_moe", "discover")
    failed = {"operation": "map", "ok": False, "reason": "ValueError: no"}
    rows = [{**row, "architecture": name} for row in (passed, failed) for name in ("one", "two")]
    assert "2 of 2" in table(rows[:2])
    written = table(rows)
    assert "0 of 2" in written
    assert "| one | yes | **no** |" in written
    assert "- one, two (map): ValueError: no" in written
