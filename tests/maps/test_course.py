"""The lives of nodes over the rounds of a run, against loops over the maps."""

import torch

from invented import made
from peft_pcgrow.maps.lifecycle import COMPRESSIBLE, LIGHT, STAGES, course, stages


def maps():
    """Of four layers of six experts; a few nodes hold next to nothing, others more and more."""
    found = []
    for seed in range(3):
        mass = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mass.flatten()[seed : seed + 5] *= 1e-3
        found.append(made(mass=mass, count=torch.full((4, 6), 100.0, dtype=torch.float64), gradient={}))
    return found


def test_lightest_idle_nodes_are_compressible():
    emaps = maps()
    grown = [torch.zeros(4, 6, dtype=torch.bool) for _ in emaps]
    grown[1][0, 1] = grown[2][0, 1] = grown[2][3, 3] = True
    names = (*STAGES, COMPRESSIBLE)
    found = course(emaps, grown)
    for emap, located, told in zip(emaps, grown, found, strict=True):
        plain, lightest, held = stages(emap, emaps[0], located), set(), 0.0
        for node in emap.mass.flatten().argsort().tolist():
            held += float(emap.mass.flatten()[node])
            if held > LIGHT * float(emap.mass.sum()):
                break
            lightest.add(node)
        assert lightest
        for node, (before, now) in enumerate(zip(plain.flatten().tolist(), told.flatten().tolist(), strict=True)):
            idle = names[before] in ("generic", "relieved", "converged")
            assert names[now] == (COMPRESSIBLE if idle and node in lightest else names[before])
    assert {names[code] for code in found.flatten().tolist()} >= {"generic", "growing", COMPRESSIBLE}
