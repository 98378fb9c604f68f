"""Plan: spend one budget of bytes on all experts and all methods, where the loss is expected to change least."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow import experts
from peft_pcgrow.compress.allocate import allocate
from peft_pcgrow.compress.calibrate import Calibration, calibrate
from peft_pcgrow.compress.candidates import STATISTICS, Candidates, candidates, forms_of
from peft_pcgrow.compress.packed import WHOLE, Form
from peft_pcgrow.compress.skip import can_skip, skip_damage
from peft_pcgrow.error_map import ErrorMap

METHODS = ("quantize", "thin", "sparsify", "skip")
# how forms may be chosen beside the statistics: "bytes" ranks them by size alone
SELECTIONS = (*STATISTICS, "random")
FORMAT = 1


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one expert.

    Attributes:
        before, after: bytes of its matrices, in 16 bit and in its form.
        predicted: expected change of the mean loss of the texts, nats per token.
    """

    layer: int
    expert: int
    form: Form
    before: int
    after: int
    predicted: float

    def __str__(self) -> str:
        return (
            f"{f'{self.layer}.{self.expert}':<7} {self.form!s:<24} {self.before:>10,} -> {self.after:>10,} bytes   "
            f"predicted {self.predicted:+.5f}"
        )


@dataclass
class CompressionPlan:
    """Which form every expert takes; nothing has been touched yet.

    Attributes:
        nodes: of all experts that are left. skipped: decoder layers that are taken out.
        target: share of the experts' bytes in 16 bit that was asked for. total: those bytes.
        select: the statistic that forms were chosen by. seed: of "random".
        names, losses: the texts it was made on, and their mean losses, nats per token.
        base: what tells the model from another.
    """

    nodes: list[NodePlan]
    skipped: list[int]
    target: float
    total: int
    select: str
    seed: int
    names: list[str]
    losses: list[float]
    base: dict[str, Any]
    # what it was made of, for `apply`; not saved
    calibration: Calibration | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Of all experts, afterwards."""
        return sum(node.after for node in self.nodes)

    @property
    def predicted(self) -> float:
        """Expected change of the mean loss of the texts, nats per token."""
        return sum(node.predicted for node in self.nodes)

    def forms(self) -> dict[int, list[Form]]:
        """The forms of each layer's experts."""
        found: dict[int, list[Form]] = {}
        for node in self.nodes:
            found.setdefault(node.layer, []).append(node.form)
        return found

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[str(node.form)] = counts.get(str(node.form), 0) + 1
        skipped = f"; layers skipped: {', '.join(map(str, self.skipped))}" if self.skipped else ""
        texts = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(self.names, self.losses, strict=True))
        return "\n".join(
            [
                f"Compression plan: {self.total:,} -> {self.bytes:,} bytes of experts ({self.bytes / self.total:.1%} of "
                f"16 bit, {self.target:.0%} asked for){skipped}",
                f"  losses before: {texts or 'not measured'}; predicted change of their mean {self.predicted:+.4f} "
                f"nats/token by {self.select!r}",
                "  " + ", ".join(f"{count} x {form}" for form, count in sorted(counts.items())),
                *(f"  {node}" for node in self.nodes),
            ]
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write it as one JSON file, all or nothing."""
        target = Path(path)
        held = {name: value for name, value in vars(self).items() if name not in ("calibration", "nodes")}
        held |= {"format": FORMAT, "nodes": [asdict(node) for node in self.nodes]}
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
            json.dump(held, file)
        Path(file.name).replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CompressionPlan":
        """Raises FileNotFoundError, or ValueError for a file that is no plan of this format."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            if held.pop("format") != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}")
            nodes = [NodePlan(**{**node, "form": Form(**node["form"])}) for node in held.pop("nodes")]
            return cls(nodes=nodes, **held)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a compression plan ({error}): make it again") from error


def plan(
    model: nn.Module,
    emap: ErrorMap | None = None,
    *,
    target: float,
    methods: Sequence[str] = ("quantize", "thin"),
    retain: Iterable[Any] | None = None,
    domain: Iterable[Any] | None = None,
    select: str = "fisher",
    max_tokens: int | None = 65_536,
    seed: int = 0,
    progress: bool = True,
) -> CompressionPlan:
    """Choose a form for every expert so that all of them together take `target` of their bytes in 16 bit.

    One sweep over the texts notes what enters every node and which error comes back; then each expert is tried in every
    form on its own rows, and the forms are chosen whose predicted changes of the loss add up to the least.

    Args:
        model: a transformers causal LM with experts in full precision; other modules may be quantized. Not changed.
        emap: its error map on the domain; used for the domain's share where `domain` gives no text: the map knows how
            much squared error reaches each node, the retain text how far each form moves its output.
        target: share of the experts' bytes in 16 bit, in (0, 1].
        methods: of `METHODS`. "thin" may remove experts altogether; "skip" takes out whole decoder layers.
        retain, domain: batches as for `measure_errors`, at least one of them.
        select: the statistic to choose by, of `SELECTIONS`.
        max_tokens: of each text, at most. seed: of "random".

    Raises:
        ValueError: a target that the methods cannot reach (the nearest is named), no text, a map of another model,
            an unknown method or statistic, experts that are packed already, or a model with grown experts.
    """
    tree = check(model, emap, target, methods, select)
    texts = {name: batches for name, batches in (("domain", domain), ("retain", retain)) if batches is not None}
    calibration = calibrate(model, texts, max_tokens, progress)
    found = {site.layer: try_forms(site, methods, calibration) for site in tree.sites}
    by_map = emap if domain is None else None
    damage = {site.layer: _damage(site, found[site.layer], calibration, by_map, select, seed) for site in tree.sites}
    layers = tuple(found)
    sizes = torch.stack([found[layer].bytes for layer in layers])[:, None].expand(-1, tree.sites[0].experts, -1)
    total = float(sizes[..., 0].sum())
    skipped: list[int] = []
    choice = allocate(torch.stack([damage[layer] for layer in layers]), sizes, target * total)
    if "skip" in methods and can_skip(model):
        choice, skipped = _with_skips(choice, layers, damage, sizes, target * total, calibration)
    if choice is None:
        least = float(sizes.min(-1).values.sum()) / total
        raise ValueError(
            f"target={target} is out of reach of {', '.join(methods)}: the smallest forms of all experts take {least:.3f} "
            "of their bytes in 16 bit; ask for that, or add methods"
        )
    nodes = []
    for row, layer in enumerate(layers):
        for expert, form in enumerate(choice[row].tolist() if layer not in skipped else ()):
            after = int(sizes[row, expert, form])
            predicted = float(damage[layer][expert, form]) if select in ("fisher", "isotropic") else float("nan")
            nodes.append(
                NodePlan(layer, expert, found[layer].forms[form], int(sizes[row, expert, 0]), after, predicted)
            )
    return CompressionPlan(
        nodes,
        skipped,
        target,
        int(total),
        select,
        seed,
        list(calibration.names),
        calibration.losses,
        experts.describe_base(model, tree),
        calibration,
    )


def check(
    model: nn.Module, emap: ErrorMap | None, target: float, methods: Sequence[str], select: str
) -> experts.Tree:
    """The model's tree; raises what `plan` raises for its arguments."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(f"target must be a share of the experts' bytes in 16 bit, in (0, 1]; got {target!r}")
    unknown = [method for method in methods if method not in METHODS]
    if isinstance(methods, str) or unknown or not methods:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, as a tuple or list; got {methods!r}")
    if select not in SELECTIONS:
        raise ValueError(f"unknown select={select!r}; choose from {', '.join(SELECTIONS)}")
    tree = experts.find_experts(model)
    for site in tree.sites:
        if site.module is not site.base:
            raise ValueError(
                f"{site.name} has an adapter around it: compress what merge_and_unload() gives, or grow on a quantized "
                "base with PCGrowConfig(base_quantization=...)"
            )
        if experts.is_packed(site.base):
            raise ValueError(f"{site.name} is packed already: plan on the model in full precision")
    if len({site.experts for site in tree.sites}) > 1:
        raise ValueError("layers with different numbers of experts cannot be planned together yet")
    if emap is not None:
        base, same = experts.describe_base(model, tree), ("model_type", "layers", "experts", "shapes")
        if any(emap.base.get(key) != base[key] for key in same) or experts.other_routers(emap.base, base):
            raise ValueError("the error map was measured on another model: measure_errors(model, batches) on this one")
    return tree


def try_forms(site: experts.ExpertsSite, methods: Sequence[str], calibration: Calibration) -> Candidates:
    """All forms of one layer's experts, made and run."""
    sample = calibration.layers[site.layer]
    return candidates(site.base, sample, forms_of(site.base, methods), len(calibration.names))


def _damage(
    site: experts.ExpertsSite,
    found: Candidates,
    calibration: Calibration,
    emap: ErrorMap | None,
    select: str,
    seed: int,
) -> Tensor:
    """What to choose one layer's forms by, `[E, F]`: per label token, the mean of the texts (and of the map's)."""
    if select == "random":
        generator = torch.Generator().manual_seed(1000 * seed + site.layer)
        noise = torch.rand(found.spread.shape[0], 1, generator=generator, dtype=torch.float64)
        return noise * (found.bytes[0] - found.bytes)
    by_text = found.damage[select] / torch.tensor(calibration.labels, dtype=torch.float64)
    texts = list(by_text.unbind(-1))
    if emap is not None and select in ("fisher", "isotropic"):
        # without the domain's text: its squared error at the node, spread evenly over the H directions
        row = emap.layers.index(site.layer)
        reach = emap.square[row, :, None] / (2 * calibration.layers[site.layer].x.shape[1] * max(emap.labels, 1))
        texts.append(found.spread * reach)
    return torch.stack(texts).mean(0)


def _with_skips(
    choice: Tensor | None,
    layers: Sequence[int],
    damage: Mapping[int, Tensor],
    sizes: Tensor,
    budget: float,
    calibration: Calibration,
) -> tuple[Tensor | None, list[int]]:
    """Leave out layers, the most nearly identical first, as long as the rest, with more bytes each, gains by it."""

    def cost(chosen: Tensor | None, gone: list[int]) -> float:
        if chosen is None:
            return float("inf")
        rest = sum(
            float(damage[layer].gather(1, chosen[row][:, None]).sum())
            for row, layer in enumerate(layers)
            if layer not in gone
        )
        return rest + sum(float(skip_damage(calibration, layer).mean()) for layer in gone)

    skipped: list[int] = []
    for layer in sorted(layers, key=lambda each: float(skip_damage(calibration, each).mean())):
        tried = [*skipped, layer]
        if len(tried) == len(layers):
            break
        free = torch.stack([damage[each] * (each not in tried) for each in layers])
        left = sizes * torch.tensor([each not in tried for each in layers])[:, None, None]
        chosen = allocate(free, left, budget)
        if cost(chosen, tried) >= cost(choice, skipped):
            break
        choice, skipped = chosen, tried
    return choice, sorted(skipped)
