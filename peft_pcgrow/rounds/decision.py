"""What a round does, decided from a map; as a file it can be read, edited and followed again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from peft_pcgrow.files import write_whole
from peft_pcgrow.locate.budget import choose, leading, located
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.error_map import ErrorMap

GROWTHS = ("deepen", "spawn", "auto", "stop")
# of retain inputs' energy that updates are kept off, once newborns without that forgot too much at every gate
PROTECT = 0.8
# where nothing more is to be done; "unlearned" text has something to learn everywhere
NOTHING = ("covered", "memorised")


@dataclass(frozen=True)
class RoundDecision:
    """One round: what grows, and how it is trained.

    Attributes:
        growth: "deepen", "spawn", "auto" (decided for each node, see `locate.decide`), or "stop".
        why: one line. verdict, numbers: what the decision rests on (see `Diagnosis`).
        locus: layer -> experts. gate_fpr, protect: as in `PCGrowConfig`.
        lr: of Muon; None: found by `find_lr` when the adapter is made.
        max_steps: of training; every: steps between two looks at the held-out text.
        patience: looks without a lower held-out loss after which training ends.
    """

    growth: str
    why: str
    verdict: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    locus: dict[str, list[int]] = field(default_factory=dict)
    gate_fpr: float = 0.1
    protect: float = 0.0
    lr: float | None = None
    max_steps: int = 0
    every: int = 0
    patience: int = 2

    def __str__(self) -> str:
        if self.growth == "stop":
            return f"stop: {self.why}"
        count = sum(map(len, self.locus.values()))
        gates = f", gate_fpr {self.gate_fpr:g}, protect {self.protect:g}" if self.growth != "deepen" else ""
        rate = "found on the text" if self.lr is None else f"{self.lr:.3g}"
        return (
            f"{self.growth} at {count} nodes of {len(self.locus)} layers: {self.why}{gates}; learning rate {rate}, at "
            f"most {self.max_steps} steps, a look every {self.every}, patience {self.patience}"
        )

    def save(self, path: Path) -> None:
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RoundDecision":
        """Read what `save` wrote, edited or not.

        Raises:
            ValueError: the file says no such thing; its name and the field are named.
        """
        try:
            given = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is no JSON ({error}): mend it, or delete it to have the round decided anew"
            ) from None
        known = {each.name: each.type for each in fields(cls)}
        unknown = sorted(given.keys() - known.keys()) if isinstance(given, dict) else [str(given)[:40]]
        if unknown or not isinstance(given, dict):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; a decision has {', '.join(known)}")
        if given.get("growth") not in GROWTHS or not isinstance(given.get("why"), str):
            raise ValueError(f"{path}: growth={given.get('growth')!r}; choose from {', '.join(GROWTHS)}, and say why")
        for name in ("max_steps", "every", "patience"):
            if given["growth"] != "stop" and not (type(given.get(name, 1)) is int and given.get(name, 1) > 0):
                raise ValueError(f"{path}: {name}={given[name]!r} must be a whole number above 0")
        if given["growth"] != "stop":
            given["locus"] = Locus(given.get("locus") or {}).to_json()
        return cls(**given)


def decide_round(
    emap: ErrorMap,
    budget: float,
    grown: Mapping[str, Sequence[int]],
    gate_fpr: float,
    protect: float,
    again: bool,
) -> RoundDecision:
    """What the map calls for: nothing where the text is covered or memorised, and else the nodes that bring most.

    Without retain text located experts are deepened, each once. With it, newborns take the domain's tokens; where half
    of what could be recovered sits in few nodes, experts that the retain text barely uses are deepened instead.

    Args:
        budget: share of the expert parameters to grow. grown: experts that are deepened already, layer -> experts.
        again: whether newborns are there to grow from.
    """
    found = emap.diagnosis
    numbers = {
        "loss": found.loss,
        "value": found.value,
        "covered_below": found.covered_below,
        "concentration": found.concentration,
        "concentrated_below": found.concentrated_below,
    }
    numbers |= {"corpus_loss": found.corpus_loss} if found.corpus_loss is not None else {}
    if found.verdict in NOTHING:
        return RoundDecision("stop", f"the domain is {found.verdict}", found.verdict, numbers)
    select = "removable" if emap.has_parts else "error"
    share = f"half of what could be recovered sits in {found.concentration:.1%} of the nodes"
    if emap.separation is None:
        scores = emap.score(select).clone()
        for layer, experts in grown.items():
            scores[
                emap.layers.index(int(layer)), torch.tensor(list(experts), dtype=torch.long, device="cpu")
            ] = -torch.inf
        if not bool((scores > 0).any()):
            return RoundDecision(
                "stop", "no node that has not grown yet could recover anything", found.verdict, numbers
            )
        growth, why, locus = "deepen", f"{share}; no retain text to spare", choose(scores, budget, emap.layers)
    else:
        lead = leading(emap, gate_fpr)
        locus = located(emap.layers, emap.count.shape[1], budget, select, emap, lead=lead).locus
        concentrated = found.verdict == "concentrated" and not again
        growth, why = ("auto" if concentrated else "spawn"), share
    return RoundDecision(growth, why, found.verdict, numbers, locus.to_json(), gate_fpr, protect)


def protected(decision: RoundDecision) -> RoundDecision:
    """The same round once more, with updates kept off what the retain text needs."""
    why = "the same nodes once more, kept off the retain text's directions, which forgot too much without"
    return replace(decision, protect=PROTECT, why=why)
