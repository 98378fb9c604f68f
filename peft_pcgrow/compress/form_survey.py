"""Survey: try every form of every expert once, then plan for as many budgets as wanted."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures import fingerprint, same_base
from peft_pcgrow.architectures.find import Tree, find_experts
from peft_pcgrow.compress.allocate import allocate
from peft_pcgrow.compress.calibrate import Calibration, calibrate
from peft_pcgrow.compress.candidates import DAMAGES, candidates, check_whole, forms_of
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.compress.skip import layers_to_skip, skip_damage
from peft_pcgrow.maps.distributed import from_first
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.packed.forms import Form

METHODS = ("quantize", "thin", "sparsify", "skip")
# what forms are chosen by: predicted damage, or at random (the control)
FORM_SELECTIONS = (*DAMAGES, "random")


@dataclass
class Survey:
    """What every form of every expert would do, on some texts. Shapes: L layers, E experts, F forms, S texts.

    Attributes:
        layers: decoder layer of each row.
        forms: F of them, the first one is the whole expert.
        bytes: of an expert in each form, `[L, F]`.
        damage: by statistic, per label token, `[L, E, F, S]` (units: see `candidates.Candidates`).
        by_map: predicted from the error map in place of the domain's text, `[L, E, F]`; None: there was a text, or no
            map.
        skips: predicted damage of leaving out each layer, `[L]`, infinite for those that the config could not do
            without; None: not asked for, or not possible.
        calibration: what the texts looked like.
        methods: that were asked for.
        base: what tells the model from another.

    Example:
        >>> tried = compress.survey(model, retain=retain, progress=False)
        >>> [tried.plan(target).bytes <= target * 73_728 for target in (0.5, 0.25)]  # of two bytes a parameter
        [True, True]
    """

    layers: tuple[int, ...]
    forms: tuple[Form, ...]
    bytes: Tensor
    damage: dict[str, Tensor]
    by_map: Tensor | None
    skips: Tensor | None
    calibration: Calibration
    methods: tuple[str, ...]
    base: dict[str, Any]

    def score(self, select: str = "fisher", seed: int = 0) -> Tensor:
        """What forms are chosen by, `[L, E, F]`: the mean of the texts (and of the map's)."""
        if select == "random":
            # each form's damage is that to the weights, but which experts matter is drawn
            generator = torch.Generator().manual_seed(seed)
            damage = self.damage["weights"].mean(-1)
            return damage * torch.rand(*damage.shape[:2], 1, generator=generator, dtype=torch.float64, device="cpu")
        texts = list(self.damage[select].unbind(-1))
        if self.by_map is not None and select in ("fisher", "isotropic"):
            texts.append(self.by_map)
        return torch.stack(texts).mean(0)

    def plan(self, target: float, select: str = "fisher", seed: int = 0) -> CompressionPlan:
        """A plan for one budget; arguments and errors as of `plan`."""
        check_target(target)
        if select not in FORM_SELECTIONS:
            raise ValueError(f"unknown select={select!r}; choose from {', '.join(FORM_SELECTIONS)}")
        damage = self.score(select, seed)
        sizes = self.bytes[:, None].expand_as(damage)
        total = float(sizes[..., 0].sum())
        choice, gone = (
            allocate(damage, sizes, target * total),
            torch.zeros(len(self.layers), dtype=torch.bool, device="cpu"),
        )
        skipping = self.skips is not None and select in ("fisher", "isotropic")
        if skipping:
            choice, gone = self._with_skips(choice, damage, sizes, target * total)
        if choice is None:
            smallest = sizes.min(-1).values.sum(-1)
            fixed = ~torch.isfinite(self.skips) if skipping else torch.ones_like(gone)  # type: ignore
            # one layer must stay
            least = float(smallest[fixed].sum() if bool(fixed.any()) else smallest.max()) / total
            raise ValueError(
                f"target={target} is out of reach of {', '.join(self.methods)} by {select!r}: the least that they "
                f"leave is {math.ceil(least * 1e4) / 1e4:.4f} of the experts' bytes in 16 bit; ask for that, or add "
                "methods"
            )
        skipped = [layer for layer, out in zip(self.layers, gone.tolist(), strict=True) if out]
        predicted = self.score()
        nodes = []
        for row, layer in enumerate(self.layers):
            for expert, form in enumerate(choice[row].tolist() if layer not in skipped else ()):
                before, after = int(self.bytes[row, 0]), int(self.bytes[row, form])
                nodes.append(
                    NodePlan(layer, expert, self.forms[form], before, after, float(predicted[row, expert, form]))
                )
        names, losses = list(self.calibration.names), self.calibration.losses
        cost = float(self.skips[gone].sum()) if self.skips is not None else 0.0
        return CompressionPlan(
            nodes, skipped, target, int(total), select, names, list(losses), self.base, cost, self.calibration
        )

    def _with_skips(
        self, choice: Tensor | None, damage: Tensor, sizes: Tensor, budget: float
    ) -> tuple[Tensor | None, Tensor]:
        """Leave out layers, the most nearly identical first, until the budget can be kept, and then as long as the
        rest, with more bytes each, gains by it; the choice and which are out, `[L]`."""
        skips = self.skips
        assert skips is not None

        def cost(chosen: Tensor | None, gone: Tensor) -> float:
            if chosen is None:
                return float("inf")
            rest = damage.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            return float(rest[~gone].sum() + skips[gone].sum())

        gone = torch.zeros(len(self.layers), dtype=torch.bool, device="cpu")
        for row in skips.argsort().tolist()[: min(int(torch.isfinite(skips).sum()), len(skips) - 1)]:
            tried = gone.clone()
            tried[row] = True
            left = ~tried[:, None, None]
            chosen = allocate(damage * left, sizes * left, budget)
            if choice is not None and cost(chosen, tried) >= cost(choice, gone):
                break
            choice, gone = chosen, tried
        return choice, gone


def survey(
    model: nn.Module,
    emap: ErrorMap | None = None,
    *,
    methods: Sequence[str] = ("quantize", "thin"),
    retain: Iterable[Any] | None = None,
    domain: Iterable[Any] | None = None,
    max_tokens: int | None = 65_536,
    progress: bool = True,
) -> Survey:
    """Try every form of every expert on calibration text, for `Survey.plan`.

    Under torch.distributed all processes must call; the survey is the same on all.

    Args:
        model (nn.Module): a transformers causal LM with experts in full precision; other modules may be quantized. Not
            changed.
        emap (ErrorMap): its error map on the domain; used for the domain's share where `domain` gives no text: the map
            knows how much squared error reaches each node, the retain text how far each form moves its output.
        methods (sequence of str): of `METHODS`: "quantize" and "sparsify" (GPTQ, arXiv:2210.17323; SparseGPT,
            arXiv:2301.00774), "thin" (of its neurons or all of an expert), "skip" (whole decoder layers).
        retain: text whose loss must stay, batches as for `measure_errors`; it or `domain`.
        domain: text of the domain, likewise.
        max_tokens (int): of each text, at most; None: all.
        progress (bool): show progress bars.

    Returns:
        A `Survey`.

    Raises:
        ValueError: no text, a map of another model, an unknown method, experts that are packed or quantized already,
            offloaded, or different from layer to layer, or a model with grown experts.
        FloatingPointError: what a form would do to an expert comes out as NaN or infinite.
    Warns:
        UserWarning: layers of this model cannot be skipped.

    Example:
        >>> tried = compress.survey(model, methods=("quantize",), retain=retain, progress=False)
        >>> [str(form) for form in tried.forms], tuple(tried.damage["fisher"].shape)
        (['16 bit', '8 bit', '4 bit', '3 bit', '2 bit'], (3, 8, 5, 1))
    """
    tree = _check(model, emap, methods)
    texts = {name: batches for name, batches in (("domain", domain), ("retain", retain)) if batches is not None}
    calibration = calibrate(model, texts, max_tokens, progress)
    forms = forms_of(tree.sites[0].base, methods)
    labels = torch.tensor(calibration.labels, dtype=torch.float64, device="cpu")
    found = []
    for site in tree.sites:
        tried = candidates(site.base, calibration.layers[site.layer], forms, len(labels))
        # what would be stored is made again by `apply`: of all forms together it would be larger than the model
        tried.data.clear()
        found.append(tried)
    damage = {name: torch.stack([each.damage[name] for each in found]) / labels for name in DAMAGES}
    by_map = None
    if emap is not None and domain is None:
        # without the domain's text: its squared error at each node, spread evenly over the H directions
        hidden = next(iter(calibration.layers.values())).x.shape[1]
        reach = emap.square / (2 * hidden * max(emap.labels, 1))
        by_map = torch.stack([each.spread for each in found]) * reach.unsqueeze(-1)
    layers = tuple(site.layer for site in tree.sites)
    skips = None
    if "skip" in methods:
        free = layers_to_skip(model)
        never = torch.tensor(float("inf"), dtype=torch.float64, device="cpu")
        skips = torch.stack([skip_damage(calibration, n).mean() if n in free else never for n in layers])
    if skips is not None and not bool(torch.isfinite(skips).any()):
        warnings.warn(
            f"the config of {type(model).__name__} cannot describe it with a layer less: 'skip' is left out",
            stacklevel=2,
        )
        skips = None
    sizes = torch.stack([each.bytes for each in found])
    # on accelerators sums are rounded in an order of their own
    damage, by_map, skips = from_first((damage, by_map, skips))
    _check_finite(damage, calibration, layers, forms)
    base = fingerprint.describe_base(model, tree)
    return Survey(layers, forms, sizes, damage, by_map, skips, calibration, tuple(methods), base)


def _check_finite(
    damage: dict[str, Tensor], calibration: Calibration, layers: tuple[int, ...], forms: Sequence[Form]
) -> None:
    for name, each in damage.items():
        wrong = (~torch.isfinite(each)).nonzero().tolist()
        if wrong:
            row, expert, form, _ = wrong[0]
            seen = calibration.layers[layers[row]]
            pieces = {"inputs": seen.x, "routing weights": seen.weight, "errors": seen.error}
            causes = [what for what, piece in pieces.items() if not bool(torch.isfinite(piece).all())]
            raise FloatingPointError(
                f"the damage ({name}) of {len(wrong)} forms of experts is not finite, first that of expert {expert} of "
                f"layer {layers[row]} as {forms[form]}: "
                f"{'the ' + ' and '.join(causes) + ' of that layer' if causes else 'its weights, once made,'} are not; "
                "check the model's weights, and compute in fp32 or bf16"
            )


def plan(
    model: nn.Module, emap: ErrorMap | None = None, *, target: float, select: str = "fisher", **options: Any
) -> CompressionPlan:
    """Choose a form for every expert so that all of them together take `target` of their bytes in 16 bit.

    One sweep over the texts notes what enters every node and which error comes back; then each expert is tried in every
    form on its own rows, and the forms are chosen whose predicted changes of the loss add up to the least. For several
    budgets, `survey` once and call its `plan`. What is predicted is for comparing choices; measured changes are a
    multiple of it (see `CompressionPlan`). Under torch.distributed all processes must call; the text of all of them
    counts, and the plan is the same on all.

    Args:
        model (nn.Module): as for `survey`.
        emap (ErrorMap): as for `survey`.
        target (float): share of the experts' bytes in 16 bit, in (0, 1].
        select (str): the statistic to choose by, of `FORM_SELECTIONS`. "fisher" is sum (dy . delta)^2 / 2 over a node's
            rows, for the change dy of its output and the error delta there (empirical Fisher), in nats.
        **options: of `survey`: methods, retain, domain, max_tokens, progress.

    Returns:
        A `CompressionPlan`.

    Raises:
        ValueError: a target that the methods cannot reach (the nearest is named), an unknown statistic, or what
            `survey` refuses.

    Example:
        >>> plan = compress.plan(model, target=0.5, retain=retain, progress=False)
        >>> plan.bytes <= 0.5 * plan.total, len(plan.nodes)  # 3 layers of 8 experts
        (True, 24)
    """
    check_target(target)
    if select not in FORM_SELECTIONS:
        raise ValueError(f"unknown select={select!r}; choose from {', '.join(FORM_SELECTIONS)}")
    return survey(model, emap, **options).plan(target, select)


def check_target(target: float) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(f"target must be a share of the experts' bytes in 16 bit, in (0, 1]; got {target!r}")


def _check(model: nn.Module, emap: ErrorMap | None, methods: Sequence[str]) -> Tree:
    unknown = [method for method in methods if method not in METHODS]
    if isinstance(methods, str) or unknown or not methods:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, as a tuple or list; got {methods!r}")
    tree = find_experts(model)
    check_whole(tree)
    if emap is not None and not same_base.same_model(emap.base, fingerprint.describe_base(model, tree)):
        raise ValueError("the error map was measured on another model: measure_errors(model, batches) on this one")
    return tree
