"""Rules for the donors of newborns: which experts they should be clones of.

Each gives scores `[L, E]` from a map that was measured with `retain=`, for `choose`:

    locus = choose(donors.lowest(emap), budget=0.12, layers=emap.layers)
    model = get_peft_model(model, PCGrowConfig(error_map=emap, locus=locus, grow="spawn"))

None gains more than spawning where the error is, and `lowest` next to nothing (`frontier.py --arms donors`).
"""

from torch import Tensor

from peft_pcgrow import ErrorMap
from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.gates.separation import Separation


def lowest(emap: ErrorMap) -> Tensor:
    """Least error first, among the experts that the domain reaches."""
    return (-emap.mass).masked_fill(emap.count == 0, float("-inf"))


def contested(emap: ErrorMap) -> Tensor:
    """What domain and retain text both use: the smaller of their shares of the layer's rows."""
    return separation(emap).contested


def separable(emap: ErrorMap, gate_fpr: float) -> Tensor:
    """The error that a gate would let through which takes this share of the retain tokens."""
    return emap.mass * at_rate(separation(emap).recall, gate_fpr)


def separation(emap: ErrorMap) -> Separation:
    if emap.separation is None:
        raise ValueError("this rule compares with retain text: measure_errors(model, batches, retain=...)")
    return emap.separation
