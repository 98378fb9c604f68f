"""Donors of newborns: chosen in orders that were worked out by hand."""

import pytest
import torch
from peft import get_peft_model

import donors
from close import assert_close
from peft_pcgrow import ErrorMap, Locus, PCGrowConfig, choose
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.gates.separation import Separation
from tiny import build, contrast, logits


def constructed(domain_rows, retain_rows, recall=None):
    """Two layers, three experts; a recall table is its value at each rate, the same for all rates if a number."""
    rows = [torch.tensor(value, dtype=torch.float64) for value in (domain_rows, retain_rows)]
    table = torch.zeros(2, 3, len(RATES), dtype=torch.float64) if recall is None else recall
    return Separation(torch.zeros(2, 4), torch.zeros(2, 4), table[0], table, table, *rows, {}, {}, {"window": 1})


def test_contested_is_the_smaller_share():
    separation = constructed([[6.0, 3, 1], [0, 0, 0]], [[10.0, 50, 40], [1, 1, 2]])
    assert_close("contested", separation.contested, torch.tensor([[0.1, 0.3, 0.1], [0, 0, 0]]), "fp32")
    assert (constructed([[4.0, 0, 0]] * 2, [[0, 4.0, 4]] * 2).contested == 0).all()


def a_map(**fields):
    mass = torch.tensor([[5.0, 1.0, 9.0], [2.0, 0.0, 4.0]], dtype=torch.float64)
    count = torch.tensor([[3.0, 1.0, 9.0], [2.0, 0.0, 4.0]], dtype=torch.float64)
    return ErrorMap((2, 7), count, count, mass, mass, **fields)


# nodes by rule, best first, worked out by hand
ORDERS = {
    "lowest": [(2, 1), (7, 0), (7, 2), (2, 0), (2, 2)],  # mass 1 2 4 5 9; no token comes to 7.1
    # shares of the domain's rows .3 .1 .6 | .5 0 .5, of the retain text's .2 .7 .1 | .8 .05 .15
    "contested": [(7, 0), (2, 0), (7, 2), (2, 1), (2, 2)],
    # mass times recall: 5 x .5, 1 x 1, 9 x .1 | 2 x .3, 0 x 1, 4 x 1
    "separable": [(7, 2), (2, 0), (2, 1), (2, 2), (7, 0)],
}


RULES = {
    "lowest": donors.lowest,
    "contested": donors.contested,
    "separable": lambda emap, rate=0.01: donors.separable(emap, rate),
}


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_donors_are_chosen_in_the_order_worked_out(rule, nodes):
    recall = torch.tensor([[0.5, 1.0, 0.1], [0.3, 1.0, 1.0]], dtype=torch.float64)
    table = recall.unsqueeze(-1).expand(2, 3, len(RATES))
    separation = constructed([[3.0, 1, 6], [2, 0, 2]], [[20.0, 70, 10], [16, 1, 3]], table)
    emap = a_map(separation=separation)
    assert set(choose(RULES[rule](emap), nodes / 6, emap.layers).nodes) == set(ORDERS[rule][:nodes])


def test_separable_reads_recall_at_the_rate():
    """Two nodes change places between 1% and 10%."""
    table = torch.zeros(2, 3, len(RATES), dtype=torch.float64)
    rates = torch.tensor(RATES)
    table[0, 0], table[1, 2] = (rates > 0.03).double(), 0.5
    emap = a_map(separation=constructed([[1.0] * 3] * 2, [[1.0] * 3] * 2, table))
    assert choose(donors.separable(emap, 0.01), 0.01, emap.layers) == Locus({7: [2]})
    assert choose(donors.separable(emap, 0.1), 0.01, emap.layers) == Locus({2: [0]})


def test_rules_that_compare_need_retain_text():
    assert choose(donors.lowest(a_map()), 0.01, (2, 7)) == Locus({2: [1]})
    for rule in ("contested", "separable"):
        with pytest.raises(ValueError, match="retain="):
            RULES[rule](a_map())


def test_lowest_takes_no_node_that_the_domain_does_not_reach():
    emap = a_map()
    assert (7, 1) not in choose(donors.lowest(emap), 1.0, emap.layers).nodes
    emap.count.zero_()  # not one token anywhere
    with pytest.raises(ValueError, match="-inf everywhere"):
        choose(donors.lowest(emap), 0.5, emap.layers)


@pytest.mark.parametrize("rule", ORDERS)
def test_spawning_at_donors_by_hand(rule):
    """With a locus and a map that knows retain text, newborns are born at these donors, and nowhere else."""
    emap = contrast()
    locus = choose(RULES[rule](emap), 0.25, layers=emap.layers)
    base = logits(build())
    model = get_peft_model(build(), PCGrowConfig(error_map=emap, locus=locus, grow="spawn", gate_fpr=0.3))
    config = model.peft_config["default"]
    left = {(d.layer, d.expert) for d in config.decisions if d.growth == "leave"}
    assert {(d.layer, d.expert) for d in config.decisions} == set(locus.nodes)
    assert set(Locus(config.spawned).nodes) == set(locus.nodes) - left
    assert torch.equal(logits(model), base)
