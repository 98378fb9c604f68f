"""What a run of `grow` found, in numbers, words and pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from peft_pcgrow.files import write_whole
from peft_pcgrow.maps import draw
from peft_pcgrow.rounds import page, pictures
from peft_pcgrow.rounds.energy import Energy, energy_of, seconds_of
from peft_pcgrow.rounds.journal import ADAPTER, HELDOUT, Journal, Round, listed, read_journal, risen
from peft_pcgrow.rounds.texts import RETAIN

PICTURES = draw.SUFFIXES[1:]


@dataclass(frozen=True)
class GrowthResult:
    """What `grow` returns.

    The best look of each round, and how strict its gates are, were chosen on the texts that the losses are about, so
    `gain` and `forgetting` are a little too good: for an unbiased number keep a third text, and measure that.

    Attributes:
        model: with the adapters that were kept, active; the base itself if none was; None of a result that was read.
        rounds: all of them, those that were taken back too.
        ended: why the run did.
        before: losses by text ("heldout", "retain", and "retain[NAME]" of retain texts by name), nats per token.
        after: the same with what was kept.
        adapter: folder of the grown adapters; None: nothing was kept.
        size: bytes of these.
        seconds: by phase, over the whole run.
        journal: what the run's folder says of it.
        tokenizer: that the texts were read with.
        windows: token ids of some held-out windows, for `page`.

    Example:
        >>> options = {"heldout": batches[1], "retain": retain, "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> grown = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> grown.page(folder / "growth.html")
        >>> GrowthResult.read(folder / "run").gain == grown.gain
        True
    """

    model: nn.Module | PeftModel | None
    rounds: tuple[Round, ...]
    ended: str
    before: dict[str, float]
    after: dict[str, float]
    adapter: Path | None
    size: int
    seconds: dict[str, float]
    journal: Journal
    tokenizer: Callable[..., Any] | None = None
    windows: tuple[list[int], ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module | None,
        journal: Journal,
        tokenizer: Callable[..., Any] | None = None,
        windows: tuple[list[int], ...] = (),
    ) -> "GrowthResult":
        """What a journal says."""
        after = journal.kept[-1] if journal.kept else None
        losses = dict(journal.before)
        if after is not None:
            losses = (
                {HELDOUT: after.heldout} | after.retained | ({} if after.retain is None else {RETAIN: after.retain})
            )
        adapter = journal.folder / ADAPTER if journal.kept else None
        size = sum(file.stat().st_size for file in adapter.rglob("*.safetensors")) if adapter is not None else 0
        # journals of old have seconds by round alone
        rounds = {str(done.number): {"seconds": done.seconds} for done in journal.rounds}
        seconds = seconds_of(journal.spent or rounds)
        known = tuple(journal.rounds), journal.ended, journal.before, losses, adapter, size, seconds, journal
        return cls(model, *known, tokenizer, windows)

    @classmethod
    def read(cls, folder: str | Path) -> "GrowthResult":
        """The result of a run, ended or not, from its `output_dir`, without the model (see `load_grown`).

        Raises:
            FileNotFoundError: no run there. ValueError: its journal cannot be read.
        """
        return cls.of(None, read_journal(Path(folder)))

    @property
    def gain(self) -> float:
        """Fall of the held-out loss, nats per token."""
        return self.before[HELDOUT] - self.after[HELDOUT]

    @property
    def forgetting(self) -> float | None:
        """Rise of the retain text's loss, nats per token, of several texts the mean; None without retain text."""
        return self.after[RETAIN] - self.before[RETAIN] if RETAIN in self.before else None

    @property
    def forgetting_by_text(self) -> dict[str, float]:
        """The same of each retain text, by its name; of text that was given without one, under "retain"."""
        return risen(self.before, self.after)

    @property
    def energy(self) -> Energy | None:
        """Operations by phase, what other ways to train would have taken, and joules; None of runs of old."""
        return energy_of(self.journal.spent)

    def plot(self, path: str | Path | None = None, *, domain: str | None = None) -> Any:
        """Draw the lifecycle of every node over the rounds, from the maps in the run's folder; with `path`, save it
        there. Returns the matplotlib figure. There is a map from after the last round if `grow(map_after=True)`
        measured it, or the run looked again.

        Args:
            path: ends in .png, .pdf or .svg.
            domain: its name, for the title; None: that of the run's folder.

        Raises:
            ValueError: another suffix. FileNotFoundError: the maps are gone. ImportError: matplotlib is missing.
        """
        suffix = None if path is None else Path(path).suffix.lower()
        if suffix not in (None, *PICTURES):
            raise ValueError(f"a picture ends in {', '.join(PICTURES)}, not {str(path)!r}; page() writes HTML")
        figure = draw.figure(pictures.lives(self.journal, f"{self._named(domain)}: lifecycle of the nodes"))
        if path is not None and suffix is not None:
            write_whole(path, draw.rendered(figure, suffix))
        return figure

    def page(self, path: str | Path, *, domain: str | None = None) -> None:
        """Write one HTML page on the run, which opens offline: what was asked, what grew, gain against forgetting, what
        the model writes before and after (if strings were given), the map before and after (see `plot`), and what it
        took. Of a result that was read from a folder, texts are there if a page was written when it was grown.

        Args:
            path: ends in .html.
            domain: its name, for the title; None: that of the run's folder.

        Raises:
            ValueError: another suffix. FileNotFoundError: the maps are gone.
        """
        if Path(path).suffix.lower() != ".html":
            raise ValueError(f"a page is HTML: give a name that ends in .html, not {str(path)!r}")
        write_whole(path, page.draw(self, self._named(domain)))

    def _named(self, domain: str | None) -> str:
        return self.journal.folder.resolve().name if domain is None else domain

    def __str__(self) -> str:
        lines = [f"ended: {self.ended}"]
        for done in self.rounds:
            gates = "" if done.gate_fpr is None else f", gate_fpr {done.gate_fpr:g}"
            kept = "kept" if done.kept else "taken back"
            retain = "" if done.retain is None else f", retain {done.retain:.3f}"
            lines.append(
                f"round {done.number}: {done.growth} at {done.nodes} nodes, {done.steps} steps at {done.lr:.3g}{gates}"
                f": held-out {done.heldout:.3f}{retain}; {kept}: {done.outcome}"
            )
        forgetting = "" if self.forgetting is None else f", forgetting {self.forgetting:+.3f}"
        if len(each := self.forgetting_by_text) > 1:
            forgetting += f" ({listed(each)})"
        lines.append(
            f"held-out loss {self.before[HELDOUT]:.3f} -> {self.after[HELDOUT]:.3f} nats/token: "
            f"gain {self.gain:.3f}{forgetting}; {self.size:,} bytes; {sum(self.seconds.values()):.0f} s ("
            + ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
            + ")"
        )
        if self.energy is not None:
            lines.append(str(self.energy))
        return "\n".join(lines)

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "ended": self.ended,
            "gain": self.gain,
            "forgetting": self.forgetting,
            "forgetting_by_text": self.forgetting_by_text,
            "before": self.before,
            "after": self.after,
            "rounds": [vars(done) for done in self.rounds],
            "adapter": None if self.adapter is None else str(self.adapter),
            "bytes": self.size,
            "seconds": self.seconds,
            "energy": None if self.energy is None else self.energy.row(),
        }
