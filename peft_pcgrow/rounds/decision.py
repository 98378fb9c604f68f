"""What a round does, decided from a map; as a file it can be read, edited and followed again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from peft_pcgrow.adapter.config import check_rate, check_share
from peft_pcgrow.files import write_whole
from peft_pcgrow.locate.budget import choose, leading, located
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.rounds.arguments import check_positive

GROWTHS = ("deepen", "spawn", "auto", "stop")
# of retain inputs' energy that updates are kept off: at equal forgetting that gains more than gates alone
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
        refit: steps after which newborns' gates are fitted anew (see `RefitGatesCallback`).
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
    refit: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        if self.growth == "stop":
            return f"stop: {self.why}"
        count = sum(map(len, self.locus.values()))
        gates = f", gate_fpr {self.gate_fpr:g}, protect {self.protect:g}" if self.growth != "deepen" else ""
        gates += f", fitted anew after step {', '.join(map(str, self.refit))}" if self.refit else ""
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
        known = [each.name for each in fields(cls)]
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a {type(given).__name__}; a decision has {', '.join(known)}")
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; a decision has {', '.join(known)}")
        if given.get("growth") not in GROWTHS or not isinstance(given.get("why"), str):
            raise ValueError(f"{path}: growth={given.get('growth')!r}; choose from {', '.join(GROWTHS)}, and say why")
        try:
            return cls(**_read(given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _read(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a decision, each checked; ValueError names the one that is not as it must be."""
    for name in ("verdict", "numbers"):
        kind = str if name == "verdict" else dict
        if not isinstance(given.get(name, kind()), kind):
            raise ValueError(f"{name}={given[name]!r} must be {'a text' if kind is str else 'a mapping'}")
    if given["growth"] == "stop":
        return given
    for name in ("max_steps", "every", "patience"):
        value = given.get(name, getattr(RoundDecision, name))
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number above 0")
    refit = given.get("refit", [])
    if not isinstance(refit, list) or any(type(step) is not int or step < 1 for step in refit):
        raise ValueError(f"refit={refit!r} must be a list of steps, whole numbers above 0")
    if given.get("lr") is not None:
        check_positive("lr", given["lr"])
    if "gate_fpr" in given:
        check_rate(given["gate_fpr"])
    check_share("protect", given.get("protect", 0.0), "[0, 1)")
    if not isinstance(given.get("locus", {}), dict):
        raise ValueError(f"locus={given['locus']!r} must be a mapping, layer -> experts")
    return given | {"locus": Locus(given.get("locus", {})).to_json()}


def note_decision(decision: RoundDecision, folder: Path) -> None:
    """Note, before training begins, what the training of a round in `folder` follows.

    Raises:
        ValueError: it has begun, by another decision.
    """
    path, digest = folder / "training" / "decision.sha256", hashlib.sha256(json.dumps(asdict(decision)).encode())
    if not path.exists():
        write_whole(path, digest.hexdigest().encode())
    elif path.read_text() != digest.hexdigest():
        raise ValueError(
            f"{folder / 'decision.json'} changed since its training began: delete {folder / 'training'} to train anew"
        )


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
