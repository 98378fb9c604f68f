"""The error map: per node, how wrong its prediction was on a corpus.

Everything a map holds is a sum over routed rows, so maps of two corpora add up to the map of their union, whatever
the batches were. A row belongs to the node that computes it: an expert (of the base, or deepened), or a newborn.
Shapes: L layers with experts, E experts, N newborns.
"""

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures import same_base
from peft_pcgrow.files import write_whole
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps import draw, draw_html, lifecycle, map_file, node_table
from peft_pcgrow.maps.diagnosis import Diagnosis, context_free, judge, on_heldout
from peft_pcgrow.maps.map_tensors import COUNTERS, OPTIONAL, from_tensors, to_tensors
from peft_pcgrow.maps.newborns import SUMS, Newborns
from peft_pcgrow.maps.node_table import NodeError
from peft_pcgrow.maps.removable import Removable, coherent, removable

# gradients are summed in so many folds, batches in turn: see `removable`
FOLDS = 4
# what `score` can rank nodes by
STATISTICS = ("error", "square", "coherent", "removable", "gate", "frequency")


@dataclass(eq=False)
class ErrorMap:
    """Sums over a corpus, one per node: those of the experts by (layer, expert), those of newborns beside them.

    Of the error of each row r, a token t at an expert: eps_r = p_r dLoss/dy_t, with the routing weight p_r, and y_t
    what the layer's experts together put out.

    Attributes:
        layers: decoder layer of each of the L rows, counted from 0.
        count: rows that an expert computes, `[L, E]`; what newborns took from it is theirs.
        weight: sum of routing weights, `[L, E]`.
        mass: sum of |eps_r|, `[L, E]`, nats per unit of output.
        square: sum of |eps_r|^2 (twice the node's energy), `[L, E]`.
        gradient: per expert tensor, fold sums of the weight gradient or its sketch, `[F, L, E, a, b]`; batch b of the
            corpus is in fold b mod F.
        fold_labels: label tokens of each fold, `[F]`.
        loss: summed token loss, nats.
        labels: label tokens.
        tokens: tokens that were not padding.
        batches: batches read.
        hops: with settle="relax", how many tokens needed h hops at each of the D decoder layers, `[D, D + 1]`.
        newborns: the same sums of the newborns that were active.
        words: how often each word of the vocabulary is a label, `[V]`.
        heldout: map of held-out text of the same domain; the verdict is then about that.
        run: what a measurement goes on by (see `resume`).
        base: what the map was measured on (model type, shapes, fingerprint of the routers, sketch, way of settling).
        separation: what tells the corpus from the retain text, if one was given.

    Example:
        >>> emap = measure_errors(model, batches, progress=False)
        >>> emap.layers, tuple(emap.mass.shape)
        ((0, 1, 2), (3, 8))
        >>> bool((emap.score("frequency").sum(1) == 3 * emap.tokens).all())  # 3 experts for each token in each layer
        True
        >>> emap.save(folder / "map")
        >>> torch.equal(ErrorMap.load(folder / "map").mass, emap.mass)
        True
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
    fold_labels: Tensor = field(default_factory=lambda: torch.zeros(FOLDS, dtype=torch.float64, device="cpu"))
    batches: int = 0
    hops: Tensor | None = None
    newborns: Newborns = field(default_factory=Newborns)
    words: Tensor | None = None
    heldout: "ErrorMap | None" = None
    run: dict[str, Any] = field(default_factory=dict)
    _removable: dict[str, Removable] = field(default_factory=dict, init=False, repr=False)

    @property
    def coherent(self) -> Tensor:
        """Norm of the summed weight gradient of each node, `[L, E]` fp64 (see `GradientSketch`)."""
        return coherent(self.gradient) if self.gradient else torch.zeros_like(self.count)

    @property
    def has_parts(self) -> bool:
        """Whether weight gradients were measured, so that `removable` can tell the parts of experts apart."""
        return bool(self.gradient) and bool(self.fold_labels.any())

    def removable(self, resolution: str = "expert") -> Removable:
        """The loss decrease that a step at each part alone would bring, with its standard error (see `removable`).

        Args:
            resolution: "expert" or "matrix".

        Raises:
            ValueError: a map without gradients, or an unknown resolution.
        """
        if not self.has_parts:
            raise ValueError("this map holds no weight gradients: measure_errors(model, batches, gradients=True)")
        if resolution not in self._removable:
            self._removable[resolution] = removable(self.gradient, self.fold_labels, self.base["shapes"], resolution)
        return self._removable[resolution]

    def score(self, statistic: str = "error") -> Tensor:
        """The `[L, E]` statistic that nodes are ranked by.

        "error" is the error mass, "square" twice the energy, "coherent" the norm of the summed weight gradient,
        "removable" the loss decrease that a step there would bring (see `removable`); "gate" (summed routing weight)
        and "frequency" (routed rows) are the scores of ESFT (arXiv:2407.01906).
        """
        if statistic not in STATISTICS:
            raise ValueError(f"unknown statistic {statistic!r}; a map can rank by {', '.join(STATISTICS)}")
        if statistic == "coherent":
            return self.coherent
        if statistic == "removable":
            return self.removable().estimate
        return {"error": self.mass, "square": self.square, "gate": self.weight, "frequency": self.count}[statistic]

    @cached_property
    def born(self) -> "ErrorMap":
        """The newborns as a map of one layer, `[1, N]`: what is known of experts is known of them."""
        born = self.newborns
        return replace(
            self,
            layers=(0,),
            **{name: getattr(born, name).unsqueeze(0) for name in SUMS},
            gradient={name: gradient.unsqueeze(1) for name, gradient in born.gradient.items()},
            **dict.fromkeys(OPTIONAL),
            separation=None,
            newborns=Newborns(),
            heldout=None,
        )

    def scores(self, statistic: str = "error") -> Tensor:
        """`score` of all nodes: the experts, then the newborns, `[L * E + N]`."""
        own = self.score(statistic).flatten()
        return torch.cat([own, self.born.score(statistic).flatten()]) if self.newborns.nodes else own

    def with_newborns(self, statistic: str = "error") -> Tensor:
        """`score` of experts and their newborns together, `[L, E]`: of all rows that are routed there."""
        own = self.score(statistic)
        if not self.newborns.nodes:
            return own
        return self.newborns.added_to(own, self.layers, self.born.score(statistic).flatten())

    def top(self, n: int = 10, by: str = "error") -> list[NodeError]:
        """The `n` nodes with the highest score, highest first."""
        return node_table.top(self, n, by)

    @property
    def diagnosis(self) -> Diagnosis:
        """`diagnose()` without a reference."""
        return self.diagnose()

    def diagnose(self, reference: "ErrorMap | None" = None, *, concentrated_below: float | None = None) -> Diagnosis:
        """What the model needs for this domain, and where: see `diagnosis.judge` for the thresholds.

        With held-out text the verdict is about that, and says whether the corpus itself was memorised.

        Args:
            reference: map of text that the model knows as well as it should: covered is what has at most its loss; what
                its nodes could recover does not count. The same corpus before damage, for example.
            concentrated_below: share of the nodes in (0, 1] up to which half of what could be recovered counts as
                concentrated, instead of the defaults.
        """
        if self.heldout is not None:
            known = (reference.heldout or reference) if reference is not None else None
            unseen = self.heldout.diagnose(known, concentrated_below=concentrated_below)
            return on_heldout(unseen, self._judge())
        return self._judge(reference, concentrated_below)

    def _judge(self, reference: "ErrorMap | None" = None, concentrated_below: float | None = None) -> Diagnosis:
        """On the corpus itself."""
        recoverable = removed = None
        if self.has_parts:
            removable = self.with_newborns("removable").clamp_min(0)
            removed = float(self.scores("removable").clamp_min(0).sum())
            if reference is not None and reference.has_parts and reference.layers == self.layers:
                removable = (removable - reference.with_newborns("removable").clamp_min(0)).clamp_min(0)
            recoverable = removable.square() / self.with_newborns("frequency").clamp_min(1)
        return judge(
            self.layers,
            self.loss / max(self.labels, 1),
            self.base.get("vocabulary") or 1,
            self.with_newborns(),
            recoverable,
            removed,
            reference.loss / max(reference.labels, 1) if reference is not None else None,
            concentrated_below,
            context_free(self.words) if self.words is not None else None,
        )

    def __add__(self, other: "ErrorMap") -> "ErrorMap":
        if not isinstance(other, ErrorMap):
            return NotImplemented
        if self.layers != other.layers or self.base != other.base:
            raise ValueError(
                "these maps cannot be added: they were measured on different models or with different sketches "
                f"({_difference(self.base, other.base) or 'other layers'})"
            )
        if len({emap.run.get("weights") for emap in (self, other)} - {None}) > 1:
            raise ValueError("these maps cannot be added: measured with other weights, or with other adapters in use")
        if (self.heldout is None) != (other.heldout is None):
            raise ValueError("these maps cannot be added: only one has held-out text; measure both with heldout=")
        if self.gradient.keys() != other.gradient.keys():
            raise ValueError("these maps cannot be added: only one of them holds coherent errors")
        if self.separation is not None or other.separation is not None:
            raise ValueError("maps with retain= cannot be added: gates are fitted to all text; measure it in one call")
        newborns = self.newborns + other.newborns
        return ErrorMap(
            layers=self.layers,
            **{name: getattr(self, name) + getattr(other, name) for name in SUMS},
            gradient={name: g + other.gradient[name] for name, g in self.gradient.items()},
            fold_labels=self.fold_labels + other.fold_labels,
            **{name: _both(getattr(self, name), getattr(other, name)) for name in OPTIONAL},
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTERS},
            base=dict(self.base),
            run={"weights": weights} if (weights := self.run.get("weights")) else {},
            newborns=newborns,
            heldout=self.heldout + other.heldout if self.heldout is not None and other.heldout is not None else None,
        )

    def restrict(self, layers: tuple[int, ...]) -> "ErrorMap":
        """The rows of some layers; loss and tokens stay those of the whole corpus."""
        rows, born = [self.layers.index(layer) for layer in layers], self.newborns.of_layers(layers)
        return replace(
            self,
            layers=tuple(layers),
            **{name: getattr(self, name)[rows] for name in SUMS},
            gradient={name: gradient[:, rows] for name, gradient in self.gradient.items()},
            separation=self.separation.restrict(rows, born) if self.separation else None,
            newborns=self.newborns.restrict(born),
            heldout=self.heldout.restrict(layers) if self.heldout is not None else None,
        )

    def check_base(self, base: dict[str, Any]) -> None:
        """Raise ValueError if the map was not measured on the model that `base` describes."""
        if unlike := same_base.difference(self.base, base):
            raise ValueError(
                f"this error map was measured on another model ({unlike}); measure one on this model with "
                "measure_errors(model, batches)"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write `error_map.safetensors` into the folder `path`: whole, or not at all."""
        map_file.write(Path(path), *to_tensors(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ErrorMap":
        """Read a folder written by `save`.

        Raises:
            FileNotFoundError: no map there. ValueError: truncated, altered or of an unknown format.
        """
        tensors, facts = map_file.read(Path(path))
        try:
            return from_tensors(cls, tensors, facts)
        except (KeyError, TypeError) as error:
            raise ValueError(map_file.damaged(Path(path), f"missing or unreadable entry: {error}")) from error

    def plot(self, path: str | os.PathLike | None = None, by: str = "error", locus: Locus | None = None):
        """Draw layer x expert as a heat map, newborns with their donors; with `path`, save it there. Returns the
        matplotlib figure.

        Nodes of `locus` are outlined. Needs matplotlib (`pip install peft-pcgrow[plot]`).
        """
        figure = draw.figure(node_table.picture(self, by, locus))
        if path is not None:
            write_whole(path, draw.rendered(figure, Path(path).suffix or ".png"))
        return figure

    def __str__(self) -> str:
        return node_table.text(self)

    def lifecycle(self, before: "ErrorMap", locus: Locus | None = None) -> Tensor:
        """What growing did to each node since `before`, `[L, E]` int8: the place of its stage in `lifecycle.STAGES`.

        `before` is the map of the same corpus and base from before growth, `locus` what grew (`PCGrowConfig.locus`).
        Generic, relieved, frontier, growing and converged are defined, with their thresholds, in
        `peft_pcgrow/maps/lifecycle.py`. A map knows which newborns it was measured with; without `locus` nothing else
        grew.

        Raises:
            TypeError: `before` is no map. ValueError: it is of another base or corpus, or the locus has other nodes.
        """
        return lifecycle.stages(self, before, node_table.located(self, locus))

    def page(self, path: str | os.PathLike, before: "ErrorMap | None" = None, locus: Locus | None = None) -> None:
        """Write one page on the map: error, frequency, coherent error and, where measured, gate separability per expert
        with its newborns.

        With `before`, the map from before growth, also the change of the error and each node's `lifecycle`. Nodes of
        `locus` are outlined. `path` ends in .html (self-contained, opens offline) or in .png, .pdf or .svg (needs
        matplotlib); the file is written all or nothing.

        Raises:
            ValueError: another suffix, or what `lifecycle` raises. ImportError: matplotlib is missing.
        """
        suffix = draw.suffix_of(path)
        contents = node_table.contents(self, before, locus)
        drawn = draw_html.draw(contents) if suffix == ".html" else draw.rendered(draw.figure(contents), suffix)
        write_whole(path, drawn)

    def to_pandas(self) -> Any:
        """A DataFrame with one row per node: layer, expert, count, weight, error, share, square, coherent.

        With held-out text also heldout_error, its error there. With a separation also domain_rows, retain_rows,
        contested, and recall and false_positive of a gate that takes 1 % of the retain rows. Newborns come last:
        `expert` is their donor, and `adapter`, "" for experts, whose they are. Raises ImportError without pandas.
        """
        return node_table.frame(self)

    def scalars(self, prefix: str = "pcgrow/") -> dict[str, float]:
        """A few plain numbers for `Trainer.log`: finite floats only, others are left out.

        Loss and error per label token, the loss of held-out text where there is some, share of the error in the top 5 %
        of the nodes and in each layer, the diagnosis' concentration, number of nodes that no row was routed to.
        """
        return node_table.scalars(self, prefix)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one + other if one is not None and other is not None else None


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key}: {ours.get(key)!r} against {theirs.get(key)!r}" for key in keys)
