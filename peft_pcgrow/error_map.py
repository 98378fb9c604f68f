"""The error map: per (layer, expert), how wrong the node's prediction was on a corpus.

Everything a map holds is a sum over routed rows, so maps of two corpora add up to the map of their union, whatever
the batches were. Shapes: L layers with experts, E experts.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peft_pcgrow import heatmap
from peft_pcgrow.locus import Locus
from peft_pcgrow.removable import Removable, StackLayout, coherent, removable
from peft_pcgrow.separation import Separation

FORMAT = 2
# gradients are summed in so many folds, batches in turn: see `removable`
FOLDS = 4
SUMS = ("count", "weight", "mass", "square")
OPTIONAL = ("hops", "shared")
COUNTERS = ("loss", "labels", "tokens", "batches")
# what `score` and PCGrowConfig(select=...) can rank nodes by
STATISTICS = ("error", "square", "coherent", "removable", "gate", "frequency")
# a corpus is covered if a Muon step of this size at every node would remove at most this share of its loss. Text that a
# model was trained on measured 0.3 to 0.4 %, text that it had never seen 3.5 % (see README)
COVERED_STEP, COVERED_REMOVABLE = 0.02, 0.005
# without weight gradients: below this share of a uniform guess's loss
COVERED_SHARE = 0.1
# what a node could recover is concentrated if half of it sits in at most this share of the nodes: one damaged expert
# measured 1 to 3 % of the nodes, a new domain 7 %
CONCENTRATED_RECOVERABLE = 0.05
# without weight gradients, of the error mass; a flat map needs half of the nodes
CONCENTRATED_SHARE = 0.2


@dataclass(frozen=True)
class NodeError:
    """One row of `ErrorMap.top`: sums over the corpus for one node."""

    layer: int
    expert: int
    count: int
    weight: float
    error: float
    share: float
    coherent: float


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and the numbers that it was decided on.

    Attributes:
        verdict: "covered" (nothing to do), "concentrated" (deepen) or "distributed" (spawn).
        loss: mean loss of the corpus, nats per label token.
        statistic: what was compared with `covered_below`, in words, and `value`, what it is.
        concentration: smallest share of all nodes that holds half of what could be recovered (without gradients: half of
            the error mass).
        concentrated_below: share up to which it counts as concentrated.
        nodes: the (layer, expert) pairs of that share, most first.
    """

    verdict: str
    loss: float
    statistic: str
    value: float
    covered_below: float
    concentration: float
    concentrated_below: float
    nodes: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.verdict}: loss {self.loss:.3f} nats/token, {self.statistic} {self.value:.3g} (covered up to "
            f"{self.covered_below:.3g}); half of it sits in {self.concentration:.1%} of the nodes (concentrated up to "
            f"{self.concentrated_below:.0%})"
        )


@dataclass(eq=False)
class ErrorMap:
    """Sums over a corpus, one per (layer, expert).

    Attributes:
        layers: decoder layer index of each of the L rows.
        count: routed rows, `[L, E]`.
        weight: sum of routing weights, `[L, E]`.
        mass: sum of |eps_r|, the gate-weighted norm of the error at the node, `[L, E]`, nats per unit of output.
        square: sum of |eps_r|^2 (twice the node's energy), `[L, E]`.
        gradient: per expert tensor, fold sums of the weight gradient or its sketch, `[F, L, E, a, b]`; batch b of the
            corpus is in fold b mod F.
        fold_labels: label tokens of each fold, `[F]`.
        loss: summed token loss, nats; labels: label tokens; tokens: tokens that were not padding; batches read.
        hops: with settle="relax", how many tokens needed h hops at each of the D decoder layers, `[D, D + 1]`.
        shared: sum over tokens of the product of the error norms at two nodes, `[L * E, L * E]`, up to 2048 nodes.
        base: what the map was measured on (model type, shapes, fingerprint of the routers, sketch, way of settling).
        separation: what tells the corpus from the retain text, if one was given.
    """

    layers: tuple[int, ...]
    count: Tensor
    weight: Tensor
    mass: Tensor
    square: Tensor
    gradient: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    labels: int = 0
    tokens: int = 0
    base: dict[str, Any] = field(default_factory=dict)
    separation: Separation | None = None
    fold_labels: Tensor = field(default_factory=lambda: torch.zeros(FOLDS, dtype=torch.float64))
    batches: int = 0
    hops: Tensor | None = None
    shared: Tensor | None = None
    _removable: dict[tuple[str, int], Removable] = field(default_factory=dict, init=False, repr=False)

    @property
    def coherent(self) -> Tensor:
        """Norm of the summed weight gradient of each node, `[L, E]` fp64 (see `energy.GradientSketch`)."""
        return self.pull() if self.gradient else torch.zeros_like(self.count)

    def pull(self, resolution: str = "expert", block: int = 16) -> Tensor:
        """Norm of the summed weight gradient of each part, shaped as `removable(...).estimate`."""
        return coherent(self.gradient, self._layouts(), resolution, block)

    @property
    def overlap(self) -> Tensor | None:
        """Cosine between nodes of the errors that the tokens have there, `[L * E, L * E]`; 0 for a node without any."""
        if self.shared is None:
            return None
        norm = self.shared.double().diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        return (self.shared.double() / norm / norm[:, None]).clamp_max(1.0)

    def _layouts(self) -> dict[str, StackLayout]:
        return {name: StackLayout(*layout) for name, layout in self.base.get("layouts", {}).items()}

    def removable(self, resolution: str = "expert", block: int = 16) -> Removable:
        """The loss decrease that a step at each part alone would bring, with its standard error (see `removable`).

        Args:
            resolution: "expert", "matrix", or "neurons" (`block` of them each).

        Raises:
            ValueError: a map without gradients, an unknown resolution, or a block that does not fit.
        """
        if not self.gradient:
            raise ValueError("this map holds no weight gradients: measure_errors(model, batches, coherent=True)")
        key = resolution, block if resolution == "neurons" else 0
        if key not in self._removable:
            sizes, layouts = self.base["shapes"], self._layouts()
            self._removable[key] = removable(self.gradient, self.fold_labels, layouts, sizes, resolution, block)
        return self._removable[key]

    def score(self, statistic: str = "error") -> Tensor:
        """The `[L, E]` statistic that nodes are ranked by.

        "error" is the error mass, "square" twice the energy, "coherent" the norm of the summed weight gradient,
        "removable" the loss decrease that a step there would bring (see `removable`); "gate" (summed routing weight) and
        "frequency" (routed rows) are the scores of ESFT (arXiv:2407.01906).
        """
        if statistic not in STATISTICS:
            raise ValueError(f"unknown statistic {statistic!r}; a map can rank by {', '.join(STATISTICS)}")
        if statistic == "coherent":
            return self.coherent
        if statistic == "removable":
            return self.removable().estimate
        return {"error": self.mass, "square": self.square, "gate": self.weight, "frequency": self.count}[statistic]

    def top(self, n: int = 10, by: str = "error") -> list[NodeError]:
        """The `n` nodes with the highest score, highest first."""
        score, total, experts = self.score(by), float(self.mass.sum()), self.count.shape[1]
        coherent = self.coherent
        order = torch.argsort(score.flatten(), descending=True, stable=True)[:n].tolist()
        return [
            NodeError(
                layer=self.layers[i // experts],
                expert=i % experts,
                count=int(self.count[i // experts, i % experts]),
                weight=float(self.weight[i // experts, i % experts]),
                error=float(self.mass[i // experts, i % experts]),
                share=float(self.mass[i // experts, i % experts]) / total if total else 0.0,
                coherent=float(coherent[i // experts, i % experts]),
            )
            for i in order
        ]

    @property
    def diagnosis(self) -> Diagnosis:
        """`diagnose()` without a reference."""
        return self.diagnose()

    def diagnose(self, reference: "ErrorMap | None" = None, *, concentrated_below: float | None = None) -> Diagnosis:
        """Covered, concentrated or distributed.

        With weight gradients: covered if a Muon step of `COVERED_STEP` at every node removes at most `COVERED_REMOVABLE` of
        the loss (to first order; the step counts held-out folds, so noise does not). Otherwise concentrated if half of what
        the nodes could recover sits in at most `concentrated_below` of them (default `CONCENTRATED_RECOVERABLE`). At its
        best step length a node recovers slope^2 / (2 curvature), and curvature grows with its rows: removable^2 / rows.

        Without weight gradients: covered if the loss is at most a tenth of a uniform guess's, concentrated if half of the
        error mass sits in at most `concentrated_below` (default `CONCENTRATED_SHARE`) of the nodes.

        Args:
            reference: map of text that the model has mastered: covered is what has at most its loss; and of the same
                corpus before damage, for example, what could be recovered counts beyond it.
        """
        loss = self.loss / max(self.labels, 1)
        if self.gradient:
            removable = self.removable().estimate.clamp_min(0)
            statistic, value = f"share of it that a step of {COVERED_STEP} removes", float(removable.sum())
            value, limit = value * COVERED_STEP / max(loss, 1e-12), COVERED_REMOVABLE
            if reference is not None and reference.gradient and reference.layers == self.layers:
                removable = (removable - reference.removable().estimate.clamp_min(0)).clamp_min(0)
            weighed, share = removable.square() / self.count.clamp_min(1), CONCENTRATED_RECOVERABLE
        else:
            statistic, value, weighed, share = "loss", loss, self.mass, CONCENTRATED_SHARE
            limit = COVERED_SHARE * math.log(self.base.get("vocabulary") or 1)
        if reference is not None:
            statistic, value, limit = "loss", loss, reference.loss / max(reference.labels, 1)
        ordered, order = torch.sort(weighed.flatten(), descending=True, stable=True)
        total = ordered.sum()
        half = int((ordered.cumsum(0) < total / 2).sum()) + 1 if total > 0 else ordered.numel()
        held = half / ordered.numel()
        threshold = share if concentrated_below is None else concentrated_below
        verdict = "covered" if value <= limit else "concentrated" if held <= threshold else "distributed"
        experts = self.count.shape[1]
        nodes = tuple((self.layers[i // experts], i % experts) for i in order[:half].tolist()) if total > 0 else ()
        return Diagnosis(verdict, loss, statistic, value, limit, held, threshold, nodes)

    def __add__(self, other: "ErrorMap") -> "ErrorMap":
        if not isinstance(other, ErrorMap):
            return NotImplemented
        if self.layers != other.layers or self.base != other.base:
            raise ValueError(
                "these maps cannot be added: they were measured on different models or with different sketches "
                f"({_difference(self.base, other.base) or 'other layers'})"
            )
        if self.gradient.keys() != other.gradient.keys():
            raise ValueError("these maps cannot be added: only one of them holds coherent errors")
        if self.separation is not None or other.separation is not None:
            raise ValueError(
                "maps measured with retain= cannot be added: a gate is fitted to its texts as a whole; measure all of "
                "the text in one call"
            )
        return ErrorMap(
            layers=self.layers,
            **{name: getattr(self, name) + getattr(other, name) for name in SUMS},
            gradient={name: g + other.gradient[name] for name, g in self.gradient.items()},
            fold_labels=self.fold_labels + other.fold_labels,
            **{name: _both(getattr(self, name), getattr(other, name)) for name in OPTIONAL},
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTERS},
            base=dict(self.base),
        )

    def restrict(self, layers: tuple[int, ...]) -> "ErrorMap":
        """The rows of some layers; loss and tokens stay those of the whole corpus."""
        rows = [self.layers.index(layer) for layer in layers]
        experts = self.count.shape[1]
        nodes = [row * experts + expert for row in rows for expert in range(experts)]
        return replace(
            self,
            layers=tuple(layers),
            **{name: getattr(self, name)[rows] for name in SUMS},
            gradient={name: gradient[:, rows] for name, gradient in self.gradient.items()},
            shared=self.shared[nodes][:, nodes] if self.shared is not None else None,
            separation=self.separation.restrict(rows) if self.separation else None,
        )

    def check_base(self, base: dict[str, Any]) -> None:
        """Raise ValueError if the map was not measured on the model that `base` describes."""
        known = {key: value for key, value in base.items() if value is not None}
        mine = {key: self.base.get(key) for key in known}
        if mine != known:
            raise ValueError(
                f"this error map was measured on another model ({_difference(mine, known)}); measure one on this "
                "model with measure_errors(model, batches)"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write `error_map.safetensors` and `error_map.json` into the folder `path`, all or nothing."""
        target = Path(path)
        if target.exists() and not target.is_dir():
            raise FileExistsError(f"{target} is a file; an error map is saved as a folder, give another name")
        tensors = {name: getattr(self, name).cpu().contiguous() for name in (*SUMS, "fold_labels")}
        held = {name: getattr(self, name) for name in OPTIONAL}
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in held.items() if tensor is not None}
        tensors |= {f"gradient.{name}": g.cpu().contiguous() for name, g in self.gradient.items()}
        if self.separation is not None:
            tensors |= self.separation.to_tensors()
        blob = save(tensors)
        facts = {
            "format": FORMAT,
            "layers": list(self.layers),
            **{name: getattr(self, name) for name in COUNTERS},
            "base": self.base,
            "separation": self.separation.facts if self.separation else None,
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            (staging / "error_map.safetensors").write_bytes(blob)
            (staging / "error_map.json").write_text(json.dumps(facts, indent=2) + "\n")
            target.mkdir(exist_ok=True)
            # tensors first: an interruption leaves a checksum that does not fit, which load reports
            for name in ("error_map.safetensors", "error_map.json"):
                (staging / name).replace(target / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ErrorMap":
        """Read a folder written by `save`.

        Raises:
            FileNotFoundError: no map there. ValueError: truncated, altered or of an unknown format.
        """
        folder = Path(path)
        files = folder / "error_map.json", folder / "error_map.safetensors"
        if not all(file.is_file() for file in files):
            raise FileNotFoundError(f"no error map in {folder}: expected {files[0].name} and {files[1].name} there")
        damaged = f"the error map in {folder} is damaged (%s); measure it again"
        blob = files[1].read_bytes()
        try:
            facts = json.loads(files[0].read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(damaged % f"{files[0].name} is not JSON: {error}") from error
        if not isinstance(facts, dict):
            raise ValueError(damaged % f"{files[0].name} holds no object")
        if facts.get("format") != FORMAT:
            found = facts.get("format")
            raise ValueError(f"the error map in {folder} has format {found!r}; this version reads {FORMAT}")
        if hashlib.sha256(blob).hexdigest() != facts.get("sha256"):
            raise ValueError(damaged % f"{files[1].name} does not have the checksum noted beside it")
        try:
            tensors = load(blob)
            separated = facts.get("separation")
            separation = Separation.from_tensors(tensors, separated) if separated else None
            return cls(
                layers=tuple(facts["layers"]),
                **{name: tensors.pop(name) for name in (*SUMS, "fold_labels")},
                **{name: tensors.pop(name, None) for name in OPTIONAL},
                gradient={name.removeprefix("gradient."): tensor for name, tensor in tensors.items()},
                **{name: facts[name] for name in (*COUNTERS, "base")},
                separation=separation,
            )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(damaged % f"missing or unreadable entry: {error}") from error

    def plot(self, path: str | os.PathLike | None = None, by: str = "error", locus: Locus | None = None):
        """Draw layer x expert as a heat map; with `path`, save it there. Returns the matplotlib figure.

        Nodes of `locus` are outlined. Needs matplotlib (`pip install peft-pcgrow[plot]`).
        """
        share = self.score(by) / self.score(by).sum().clamp_min(torch.finfo(torch.float64).tiny)
        marked = [(self.layers.index(layer), expert) for layer, expert in locus.nodes] if locus else []
        return heatmap.draw(
            share.numpy(),
            rows=self.layers,
            title=f"{by} per node",
            subtitle=str(self.diagnosis),
            marked=marked,
            path=path,
        )

    def __str__(self) -> str:
        experts, total = self.count.shape[1], float(self.mass.sum())
        lines = [
            f"Error map of {self.base.get('model_type', 'a model')}: {len(self.layers)} layers x {experts} experts, "
            f"{self.tokens:,} tokens, loss {self.loss / max(self.labels, 1):.3f} nats/token",
            self.diagnosis.__str__(),
            "",
            f"layer  share  error of experts 0..{experts - 1} (height: share of the largest node)",
        ]
        largest = float(self.mass.max()) or 1.0
        for layer, row in zip(self.layers, self.mass, strict=True):
            share = float(row.sum()) / total if total else 0.0
            lines.append(f"{layer:5d}  {share:5.1%}  {heatmap.bars((row / largest).tolist())}")
        if self.separation is not None:
            lines += ["", str(self.separation)]
        lines += ["", "  node (layer.expert)      rows    routed weight   share of error   coherent error"]
        for node in self.top(8):
            lines.append(
                f"  {f'{node.layer}.{node.expert}':<20} {node.count:>8,} {node.weight:>16,.1f} "
                f"{node.share:>16.2%} {node.coherent:>16.4g}"
            )
        return "\n".join(lines)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one + other if one is not None and other is not None else None


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key}: {ours.get(key)!r} against {theirs.get(key)!r}" for key in keys)
