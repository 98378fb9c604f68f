"""Error maps of models that were never there."""

import torch

from peft_pcgrow import ErrorMap, Locus
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.gates.separation import Separation

LOCUS = Locus({2: [1, 3], 3: [0]})


PARTS = {"layouts": {"up_proj": [0, 1, False]}, "shapes": {"up_proj": [2, 3]}}


def made(layers=4, experts=6, seed=0, first=1, **changes):
    """A map with coherent errors and a separation; no row is routed to expert 2 of its first layer."""
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    count = (1000 * positive(layers, experts)).round()
    count[0, 2] = 0
    mass = count * positive(layers, experts) * 1e-3
    recall, rows = positive(layers, experts, len(RATES)) / 1.1, count.clone()
    gates = torch.zeros(layers, 8), torch.zeros(layers, 4), torch.zeros(layers, len(RATES))
    separation = Separation(
        *gates, recall, 0.1 * recall, rows, rows.flip(1),
        facts={"window": 64, "sketch": 8, "domain_tokens": 900, "retain_tokens": 800},
        entry=dict(zip(("direction", "law", "threshold"), (gate.clone() for gate in gates), strict=True)),
    )  # fmt: skip
    given = {
        "layers": tuple(range(first, first + layers)),
        "count": count,
        "weight": 0.3 * count,
        "mass": mass,
        "square": mass**2,
        "gradient": {"up_proj": torch.randn(4, layers, experts, 2, 3, generator=generator)},
        "fold_labels": torch.full((4,), 250.0, dtype=torch.float64),
        "loss": 2400.0,
        "labels": 1000,
        "tokens": 1010,
        "base": {"model_type": "qwen3_moe", "vocabulary": 5000, "routers": "a1", "sketch": 8, **PARTS},
        "separation": separation,
    }
    return ErrorMap(**{**given, **changes})
