"""The lifecycle of a node: what growing did to its error, from two maps of one corpus.

With e the error mass per routed row (nats per unit of output), before and now, the first line that fits decides:

    generic    no row of the corpus comes here
    converged  it grew, and e <= max(CONVERGED * e before, COVERED * mean e before)
    growing    it grew
    frontier   it weighs much (its share of the error is above HEAVY times the mean node's), and e > COVERED * mean e
               before. The next locus is here
    relieved   e fell by more than MOVED, because others grew
    generic    what is left: light or covered, and its error stayed

What grew is what was located, and the donors of newborns; a newborn's rows count where they are routed.
Ratios only, so that the unit of the errors does not matter.

Over the rounds of a run there is one stage more: of what is generic, relieved or converged, those nodes are
compressible that hold the least of the error, altogether at most `LIGHT` of it. That ranks what removing single nodes
costs (see RESULTS.md, "What predicts the damage"); how much it does cost, `compress.plan` tries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STAGES = ("generic", "relieved", "frontier", "growing", "converged")
# fall of a node's error per row that counts. Between two halves of a corpus of 12,000 tokens (examples/embedded-moe on
# the language reference) nine nodes of ten differ by less
MOVED = 0.15
# share of its former error per row at which a node has converged: half of the force on its output, a quarter of its
# energy
CONVERGED = 0.5
# the covered level, as a share of the mean error per row before: the diagnosis calls a corpus covered at the same tenth
COVERED = 0.1
# times the mean node's share of the error, above which a node weighs much: none does in a flat map
HEAVY = 2.0
# the stage that only a run over rounds has, behind STAGES; and the share of the error that all of its nodes hold
COMPRESSIBLE, LIGHT = "compressible", 0.01


def check_pair(now: Any, before: Any) -> None:
    """Raise TypeError or ValueError unless `before` is a map of the base and the corpus of `now`."""
    if type(before) is not type(now):
        raise TypeError(f"before must be an ErrorMap measured before growth, got {type(before).__name__}")
    # how gradients were sketched makes no other model, and experts may have trained between the two
    beside = ("sketch", "stacks")
    bases = [{key: value for key, value in emap.base.items() if key not in beside} for emap in (now, before)]
    if bases[0] != bases[1] or now.layers != before.layers or now.count.shape != before.count.shape:
        raise ValueError(
            "these maps cannot be compared: they were measured on different base models; measure both with "
            "measure_errors, on the model before and after growth"
        )
    if (now.tokens, now.labels) != (before.tokens, before.labels):
        raise ValueError(
            f"these maps cannot be compared: one was measured on {now.tokens:,} tokens with {now.labels:,} labels, the "
            f"other on {before.tokens:,} with {before.labels:,}; measure both on the same batches"
        )


def stages(now: Any, before: Any, located: Tensor) -> Tensor:
    """Place in `STAGES` of every node, `[L, E]` int8 (see the module).

    Args:
        now, before: error maps of one corpus and one base.
        located: nodes of the locus, `[L, E]` bool.
    """
    check_pair(now, before)
    (mass, count), (old_mass, old_count) = (
        (emap.with_newborns("error"), emap.with_newborns("frequency")) for emap in (now, before)
    )
    error = mass / count.clamp_min(1)
    former = torch.where(old_count > 0, old_mass / old_count.clamp_min(1), 0.0)
    covered = float(COVERED * old_mass.sum() / old_count.sum().clamp_min(1))
    born = torch.ones(len(now.newborns.nodes), dtype=torch.float64, device="cpu")
    grew = located | (now.newborns.added_to(torch.zeros_like(mass), now.layers, born) > 0)
    stage = torch.zeros(mass.shape, dtype=torch.int8, device="cpu")
    # each line overrides those above it
    for name, found in {
        "relieved": error < (1 - MOVED) * former,
        "frontier": (mass > HEAVY * mass.mean()) & (error > covered),
        "growing": grew,
        "converged": grew & (error <= torch.clamp_min(CONVERGED * former, covered)),
        "generic": count == 0,
    }.items():
        stage[found] = STAGES.index(name)
    return stage


def course(maps: Sequence[Any], located: Sequence[Tensor]) -> Tensor:
    """Stages of every node at each map of a run, `[R, L, E]` int8: places in `(*STAGES, COMPRESSIBLE)`.

    Args:
        maps: of one corpus and one base; the first is from before growth.
        located: nodes that have grown until each of them, `[L, E]` bool.
    """
    found = []
    for emap, grown in zip(maps, located, strict=True):
        stage, mass = stages(emap, maps[0], grown), emap.with_newborns("error").flatten()
        order = mass.argsort()
        least = torch.zeros_like(mass, dtype=torch.bool)
        least[order[mass[order].cumsum(0) <= LIGHT * mass.sum()]] = True
        idle = sum(stage == STAGES.index(name) for name in ("generic", "relieved", "converged")) > 0
        stage[idle & least.view(stage.shape)] = len(STAGES)
        found.append(stage)
    return torch.stack(found)
