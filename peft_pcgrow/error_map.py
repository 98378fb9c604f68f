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

from peft_pcgrow import heatmap, lifecycle, node_table, page, page_html
from peft_pcgrow.locus import Locus
from peft_pcgrow.separation import Separation

FORMAT = 1
SUMS = ("count", "weight", "mass", "square")
# what `score` and PCGrowConfig(select=...) can rank nodes by
STATISTICS = ("error", "square", "coherent", "gate", "frequency")
# below this share of a uniform guess's loss a corpus without a reference counts as covered
COVERED_SHARE = 0.1
# half of the error mass in at most this share of the nodes is concentrated; a flat map needs half of them
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
        covered_below: loss under which the corpus counts as covered.
        half_mass_share: smallest share of all nodes that holds half of the error mass (0.5 if all are alike).
        concentrated_below: share up to which the error counts as concentrated.
    """

    verdict: str
    loss: float
    covered_below: float
    half_mass_share: float
    concentrated_below: float

    def __str__(self) -> str:
        return (
            f"{self.verdict}: loss {self.loss:.3f} nats/token (covered below {self.covered_below:.3f}); half of the "
            f"error sits in {self.half_mass_share:.1%} of the nodes (concentrated up to {self.concentrated_below:.0%})"
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
        gradient: per expert tensor, the summed weight gradient or its sketch, `[L, E, a, b]`.
        loss: summed token loss, nats; labels: label tokens; tokens: tokens that were not padding.
        base: what the map was measured on (model type, shapes, fingerprint of the routers, sketch).
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

    @property
    def coherent(self) -> Tensor:
        """Norm of the summed weight gradient of each node, `[L, E]` fp64 (see `energy.GradientSketch`)."""
        total = torch.zeros_like(self.count)
        for gradient in self.gradient.values():
            total += gradient.double().square().sum(dim=(-1, -2))
        return total.sqrt()

    def score(self, statistic: str = "error") -> Tensor:
        """The `[L, E]` statistic that nodes are ranked by.

        "error" is the error mass, "square" twice the energy, "coherent" the norm of the summed weight gradient;
        "gate" (summed routing weight) and "frequency" (routed rows) are the scores of ESFT (arXiv:2407.01906).
        """
        if statistic not in STATISTICS:
            raise ValueError(f"unknown statistic {statistic!r}; a map can rank by {', '.join(STATISTICS)}")
        if statistic == "coherent":
            return self.coherent
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

    def diagnose(
        self, reference: "ErrorMap | None" = None, *, concentrated_below: float = CONCENTRATED_SHARE
    ) -> Diagnosis:
        """Covered, concentrated or distributed.

        Covered: the mean loss is at most that of `reference` (a map of text the model has mastered), or without one,
        a tenth of a uniform guess's loss, ln(vocabulary). Otherwise concentrated if half of the error mass sits in at
        most `concentrated_below` of the nodes, else distributed.
        """
        loss = self.loss / max(self.labels, 1)
        vocabulary = self.base.get("vocabulary") or 1
        covered = reference.loss / max(reference.labels, 1) if reference else COVERED_SHARE * math.log(vocabulary)
        ordered = torch.sort(self.mass.flatten(), descending=True).values
        total = ordered.sum()
        half = int((ordered.cumsum(0) < total / 2).sum()) + 1 if total > 0 else ordered.numel()
        share = half / ordered.numel()
        verdict = "covered" if loss <= covered else "concentrated" if share <= concentrated_below else "distributed"
        return Diagnosis(verdict, loss, covered, share, concentrated_below)

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
            loss=self.loss + other.loss,
            labels=self.labels + other.labels,
            tokens=self.tokens + other.tokens,
            base=dict(self.base),
        )

    def restrict(self, layers: tuple[int, ...]) -> "ErrorMap":
        """The rows of some layers; loss and tokens stay those of the whole corpus."""
        rows = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=tuple(layers),
            **{name: getattr(self, name)[rows] for name in SUMS},
            gradient={name: gradient[rows] for name, gradient in self.gradient.items()},
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
        tensors = {name: getattr(self, name).cpu().contiguous() for name in SUMS}
        tensors |= {f"gradient.{name}": g.cpu().contiguous() for name, g in self.gradient.items()}
        if self.separation is not None:
            tensors |= self.separation.to_tensors()
        blob = save(tensors)
        facts = {
            "format": FORMAT,
            "layers": list(self.layers),
            "loss": self.loss,
            "labels": self.labels,
            "tokens": self.tokens,
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
                **{name: tensors.pop(name) for name in SUMS},
                gradient={name.removeprefix("gradient."): tensor for name, tensor in tensors.items()},
                **{name: facts[name] for name in ("loss", "labels", "tokens", "base")},
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

    def lifecycle(self, before: "ErrorMap", locus: Locus | None = None) -> Tensor:
        """What growing did to each node since `before`, `[L, E]` int8: the place of its stage in `lifecycle.STAGES`.

        `before` is the map of the same corpus and base from before growth, `locus` what grew (`PCGrowConfig.locus`).
        Generic, frontier, growing and converged are defined, with their thresholds, in `peft_pcgrow/lifecycle.py`.

        Raises:
            TypeError: `before` is no map. ValueError: it is of another base or corpus, or the locus has other nodes.
        """
        return lifecycle.stages(self, before, node_table.located(self, locus))

    def page(self, path: str | os.PathLike, before: "ErrorMap | None" = None, locus: Locus | None = None) -> None:
        """Write one page on the map: error, frequency, coherent error and, where measured, gate separability per node.

        With `before`, the map from before growth, also the change of the error and each node's `lifecycle`. Nodes of
        `locus` are outlined. `path` ends in .html (self-contained, opens offline) or in .png, .pdf or .svg (needs
        matplotlib); the file is written all or nothing.

        Raises:
            ValueError: another suffix, or what `lifecycle` raises. ImportError: matplotlib is missing.
        """
        suffix = page.suffix_of(path)
        contents = node_table.contents(self, before, locus)
        page.write(path, page_html.draw(contents) if suffix == ".html" else page.draw(contents, suffix))

    def to_pandas(self) -> Any:
        """A DataFrame with one row per node: layer, expert, count, weight, error, share, square, coherent.

        With a separation also domain_rows, retain_rows, contested, and recall and false_positive of a gate that takes
        1 % of the retain rows. Raises ImportError without pandas.
        """
        return node_table.frame(self)

    def scalars(self, prefix: str = "pcgrow/") -> dict[str, float]:
        """A few plain numbers for `Trainer.log`: finite floats only, others are left out.

        Loss and error per label token, share of the error in the top 5 % of the nodes and in each layer, half-mass
        share, number of nodes that no row was routed to.
        """
        return node_table.scalars(self, prefix)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key}: {ours.get(key)!r} against {theirs.get(key)!r}" for key in keys)
