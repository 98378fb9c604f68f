"""Which adapters' newborns a new adapter's grow from, and beside (see `spawn` for the rule)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.architectures.find import ExpertsSite
from peft_pcgrow.locate.decide import Decision
from peft_pcgrow.maps.error_map import ErrorMap

# (decoder layer, donor, adapter)
Node = tuple[int, int, str]


def follows_newborns(config: PCGrowConfig) -> bool:
    """Whether newborns of newborns can be grown: whole ones, that no plain checkpoint is to hold."""
    return config.grow != "deepen" and config.resolution == "expert" and config.router == "branch"


def identity(digest: str, told_by: str, lineage: Mapping[str, Any] | None = None) -> str:
    """What tells an adapter with newborns from others: a digest of its gates and directions, what else is known of it,
    and those that it grows on. Gates alone are the same of siblings from one map, and in the lowest layer of a newborn
    and one that is grown from it, for both read the same."""
    return hashlib.sha256(f"{digest} {told_by} {json.dumps(lineage, sort_keys=True)}".encode()).hexdigest()


def check(lineage: Mapping[str, Any] | None, spawned: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless what a config says is as `noted` gives it."""
    if lineage is None:
        return
    try:
        parents = {
            (layer, int(donor)): who for layer, here in lineage["parents"].items() for donor, who in here.items()
        }
        names = [*lineage["elders"], *parents.values()]
        strangers = [node for node in parents if node[1] not in spawned.get(node[0], ())]
        good = all(isinstance(name, str) for name in names) and not strangers and len(lineage) == 2
    except (KeyError, TypeError, AttributeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"lineage={str(lineage)[:80]!r} does not say which newborns the adapter's were grown from: it is set when "
            "an adapter is made; leave it out for a new one, or its adapter_config.json was altered"
        )


def older(sites: Sequence[ExpertsSite], emap: ErrorMap) -> dict[Node, str]:
    """Fingerprint of the adapter of each newborn in the map.

    Raises:
        ValueError: a newborn that is not active now.
    """
    active = {
        (site.layer, donor, name): site.module.births[name].identity  # type: ignore[union-attr,index]
        for site in sites
        for name, donor in getattr(site.module, "newborns", ())
    }
    mine = {node for node in emap.newborns.nodes if node[0] in {site.layer for site in sites}}
    if missing := sorted(mine - active.keys()):
        raise ValueError(
            f"this error map was measured with newborns that are not active now (adapter {missing[0][2]!r}, layer "
            f"{missing[0][0]}, and {len(missing) - 1} more): activate that adapter, or measure the model as it is"
        )
    return {node: active[node] for node in mine}


def noted(decisions: Sequence[Decision], older: Mapping[Node, str]) -> dict[str, Any]:
    """What an adapter's config says of the adapters that it grows on: their fingerprints, and by layer and donor whose
    newborn is the parent of a newborn."""
    parents: dict[str, dict[str, str]] = {}
    for d in decisions:
        if d.growth == "spawn" and d.adapter:
            parents.setdefault(str(d.layer), {})[str(d.expert)] = older[d.layer, d.expert, d.adapter]
    return {"elders": sorted(set(older.values())), "parents": parents}
