"""What is printed of a large model is short, and what it leaves out is in the objects."""

from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from peft_pcgrow import Locus, PCGrowConfig
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.locate.decide import Decision, report
from peft_pcgrow.maps.draw import Column, Page, figure
from peft_pcgrow.packed.forms import Form
from peft_pcgrow.say import ends
from tiny import build, contrast

VERDICT = (
    "distributed: loss 5.026 nats/token, share of it that a step of 0.02 removes 0.0299 (covered up to 0.005); half of "
    "it sits in 12.5% of the nodes (concentrated up to 5%)"
)


def test_ends():
    assert ends([1, 2, 3]) == ["1", "2", "3"]
    assert ends(list(range(100)), 5) == ["0", "1", "2", "... 95 more ...", "98", "99"]


def test_report_of_many_nodes():
    nodes = [(layer, expert) for layer in range(48) for expert in range(64)]
    decisions = [Decision(*node, "spawn", i / 3072, 0.0, 1.0, "why") for i, node in enumerate(nodes)]
    lines = report(decisions, "pcgrow").splitlines()
    assert lines[0] == "pcgrow: spawn 3072"
    assert len(lines) == 12
    assert lines[1].split()[0] == "47.63"
    assert lines[-1].split()[0] == "0.0"


def test_config_holds_every_decision(caplog):
    config = PCGrowConfig(error_map=contrast(), budget=0.6, grow="spawn", gate_fpr=0.05)
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        get_peft_model(build(), config)
    assert len(caplog.text.splitlines()) < 14 == len(config.decisions)
    spawned = {(d.layer, d.expert) for d in config.decisions if d.growth == "spawn"}
    assert spawned == {(int(layer), e) for layer, donors in config.spawned.items() for e in donors}


def test_locus_of_many_nodes():
    assert Locus({3: [0, 5], 4: [1]}).describe() == "layer 3: 0 5 | layer 4: 1"
    large = Locus({layer: range(64) for layer in (*range(40), 47)})
    assert large.describe() == "2624 nodes, 64 in each of layers 0-39, 47"
    assert Locus({0: range(50), 1: range(3)}).describe() == "53 nodes, 3 to 50 in each of layers 0-1"


def test_plan_of_many_experts():
    nodes = [NodePlan(0, e, Form(4), 100, 25, e / 1000) for e in range(6144)]
    shown = str(CompressionPlan(nodes, [], 0.25, 614400, "fisher", [], [], {})).splitlines()
    assert len(shown) < 16
    assert "0.6143 " in shown[3]
    assert "predicted +0.00000" in shown[-1]


def test_layer_with_many_nodes():
    model = get_peft_model(build(num_experts=64), PCGrowConfig(locus={1: range(64)}))
    assert "grown={'default': [0, 1, 2, 3, 4, ... 54 more ..., 59, 60, 61, 62, 63]}" in repr(model)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 8), (6, 16), (48, 128), (1, 8), (1, 1), (94, 384)])
def test_heat_map_has_room_for_what_it_says(shape):
    """Nothing is cut at the sides, and nothing is written over the picture."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    panel = Column(
        "error", "Share of error", values, "orange", "of the whole model", True, values.sum(1), "in the layer"
    )
    everywhere = torch.ones(shape, dtype=torch.bool)
    drawn = figure(Page("Error per node", [VERDICT], "", range(shape[0]), [panel], everywhere, ~everywhere, (), ()))
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts]
    assert " ".join(text.get_text() for text in drawn.texts[1:]) == VERDICT
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= drawn.bbox.x1
        assert box.y1 <= drawn.bbox.y1
    lowest = min(box.y0 for box in boxes)
    assert all(axes.get_tightbbox().y1 <= lowest for axes in drawn.axes)
    for one, other in pairwise(boxes):
        assert one.y0 >= other.y1 - 2
