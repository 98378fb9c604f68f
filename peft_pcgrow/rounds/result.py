"""What a run of `grow` found, in numbers and words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from peft_pcgrow.rounds.journal import Round


@dataclass(frozen=True)
class GrowthResult:
    """What `grow` returns.

    The best look of each round, and how strict its gates are, were chosen on the texts that the losses are about, so
    `gain` and `forgetting` are a little too good: for an unbiased number keep a third text, and measure that.

    Attributes:
        model: with the adapters that were kept, active; the base itself if none was.
        rounds: all of them, those that were taken back too. ended: why the run did.
        before, after: losses by text ("heldout", "retain"), nats per token.
        adapter: folder of the grown adapters; None: nothing was kept. size: its bytes.
        seconds: by phase, over all rounds.
    """

    model: nn.Module | PeftModel
    rounds: tuple[Round, ...]
    ended: str
    before: dict[str, float]
    after: dict[str, float]
    adapter: Path | None
    size: int
    seconds: dict[str, float]

    @property
    def gain(self) -> float:
        """Fall of the held-out loss, nats per token."""
        return self.before["heldout"] - self.after["heldout"]

    @property
    def forgetting(self) -> float | None:
        """Rise of the retain text's loss, nats per token; None without retain text."""
        return self.after["retain"] - self.before["retain"] if "retain" in self.before else None

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
        lines.append(
            f"held-out loss {self.before['heldout']:.3f} -> {self.after['heldout']:.3f} nats/token: "
            f"gain {self.gain:.3f}{forgetting}; {self.size:,} bytes; {sum(self.seconds.values()):.0f} s ("
            + ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
            + ")"
        )
        return "\n".join(lines)

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "ended": self.ended,
            "gain": self.gain,
            "forgetting": self.forgetting,
            "before": self.before,
            "after": self.after,
            "rounds": [vars(done) for done in self.rounds],
            "adapter": None if self.adapter is None else str(self.adapter),
            "bytes": self.size,
            "seconds": self.seconds,
        }
