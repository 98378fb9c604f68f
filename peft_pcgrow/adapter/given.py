"""What adapters have from a map beside their weights: branch gates, and protected directions."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.birth import Birth, parents_of
from peft_pcgrow.adapter.working_copies import WorkingCopies
from peft_pcgrow.gates.gate import Gate, at_rate
from peft_pcgrow.gates.separation import Separation

# gates of a layer: of what enters its experts, and of what enters its attention
GATES = ("gate", "entry")
# what each consists of: see `gate.Gate`, and the thresholds for `gate.RATES`
GATE_TENSORS = ("direction", "law", "threshold")
# torch says of it that it takes no arguments
_uncompiled: Any = torch.compiler.disable


class Given(nn.Module):
    """A layer whose buffers `pcgrow_gate_*`, `pcgrow_entry_*` and `pcgrow_protect_*` hold these by adapter."""

    layer_index: int
    births: dict[str, Birth]
    call: Any
    active_banks: Any
    disable_adapters: bool
    merged: bool
    _working: WorkingCopies

    def _buffers_of(self, name: str) -> Any:
        return getattr(self, f"pcgrow_{name}")

    def directions(self, adapter_name: str, stack: str) -> Tensor | None:
        """Those that are protected of each slice of a stack, `[G, I, K]`; None for a bias."""
        return dict(self._buffers_of(f"protect_{stack}").items()).get(adapter_name)

    def protected_directions(self, adapter_name: str) -> dict[str, Tensor]:
        """Those of an adapter, by stack, as they are held."""
        stacks = self.births[adapter_name].directions
        return {stack: self._buffers_of(f"protect_{stack}")[adapter_name] for stack in stacks}

    def _apply(self, *args: Any, **kwargs: Any) -> "Given":
        """Gates go to other devices, and are no other gates where a model is cast, as DeepSpeed does to 16 bits."""
        names = [f"{kind}_{name}" for kind in GATES for name in GATE_TENSORS]
        held = [(self._buffers_of(name), key, t) for name in names for key, t in self._buffers_of(name).items()]
        super()._apply(*args, **kwargs)
        for buffers, key, tensor in held:
            if buffers[key].dtype != tensor.dtype:
                buffers[key] = tensor.to(buffers[key].device)
        return self

    def is_protected(self, adapter_name: str) -> bool:
        return bool(self.births[adapter_name].directions)

    def gates(self, adapter_name: str) -> tuple[str, ...]:
        """Which of `GATES` an adapter has here."""
        return tuple(kind for kind in GATES if adapter_name in self._buffers_of(f"{kind}_direction"))

    def gate(self, adapter_name: str, kind: str = "gate") -> Gate:
        """A gate of an adapter that spawned here."""
        direction, law = (self._buffers_of(f"{kind}_{name}")[adapter_name] for name in ("direction", "law"))
        return Gate(direction, law, self.births[adapter_name].window)

    @torch.no_grad()
    def take_gates(self, adapter_name: str, separation: Separation, row: int) -> None:
        """Put a layer's gates of a separation in the place of an adapter's own."""
        for kind in self.gates(adapter_name):
            gate, threshold = separation.gate(row) if kind == "gate" else separation.entry_gate(row) or (None, None)
            for name, tensor in zip(GATE_TENSORS, (gate.direction, gate.law, threshold), strict=True) if gate else ():
                self._buffers_of(f"{kind}_{name}")[adapter_name].copy_(tensor)

    def gates_are_known(self, adapter_name: str) -> bool:
        """Whether the gates came with a map or an adapter file."""
        direction, threshold = (
            torch.cat([self._buffers_of(f"{kind}_{name}")[adapter_name] for kind in self.gates(adapter_name)])
            for name in ("direction", "threshold")
        )
        return bool(torch.isfinite(threshold).all() & direction.any())

    def check_gate(self, adapter_name: str) -> None:
        """Raise RuntimeError if newborns are behind a gate that was never set, where they would take nothing."""
        if not self.gates_are_known(adapter_name):
            raise RuntimeError(
                f"the branch gates of adapter {adapter_name!r} were never set (layer {self.layer_index}): its config "
                "was resolved for another model or adapter. Make a new PCGrowConfig with error_map=, or load the "
                "adapter's weights"
            )

    def _gate_asked(self, adapter_name: str, kind: str, device: torch.device) -> tuple[Gate, Tensor]:
        """A gate on a device, its law in fp64, and its threshold for the rate in use.

        Raises:
            RuntimeError: see `check_gate`. That is looked at again when something was written to, not at every call: it
                would hold up a GPU.
        """
        birth, tensors = (
            self.births[adapter_name],
            [self._buffers_of(f"{kind}_{n}")[adapter_name] for n in GATE_TENSORS],
        )

        def make() -> tuple[Gate, Tensor]:
            self.check_gate(adapter_name)
            direction, law, table = tensors
            gate = Gate(direction.to(device, copy=True), law.to(device).double(), birth.window)
            return gate, at_rate(table.float(), birth.gate_fpr).to(device, copy=True)

        return self._working.read((adapter_name, kind), tensors, make, device, birth.gate_fpr, birth.window)

    def parent_of(self, adapter_name: str, donor: int) -> str | None:
        births = {adapter_name: self.births[adapter_name], **{name: self.births[name] for name in self.active_banks()}}
        return parents_of(adapter_name, births).get(donor)

    def given_by(self, adapter_name: str, birth: Birth) -> Birth:
        """`birth`, of nodes like those of an adapter here, with that one's gates and directions."""
        theirs = self.births.get(adapter_name)
        if theirs is None or any(getattr(theirs, n) != getattr(birth, n) for n in ("grown", "spawned", "window")):
            return birth
        found: dict[str, Any] = {}
        if birth.spawned and self.gates_are_known(adapter_name):
            for kind in self.gates(adapter_name):
                found[kind] = self.gate(adapter_name, kind), self._buffers_of(f"{kind}_threshold")[adapter_name]
        return replace(birth, directions=self.protected_directions(adapter_name), **found)

    @_uncompiled  # what a text has shown so far outlives the call, as no buffer of a CUDA graph does
    def margin(self, adapter_name: str, hidden: Tensor, remember: bool = True, kind: str = "gate") -> Tensor:
        """How far above a gate's threshold the evidence for each of `hidden [T, H]` is, `[T]` nats."""
        call = self.call.sequence
        if call is None or call.shape[0] * call.shape[1] != len(hidden):
            raise RuntimeError(
                f"layer {self.layer_index} has newborns, whose gate needs to know which text each token belongs to: "
                "run the whole decoder layer, not its experts alone"
            )
        gate, threshold = self._gate_asked(adapter_name, kind, hidden.device)  # type: ignore
        scores = gate.scores(hidden).view(call.shape)
        name = adapter_name if kind == "gate" else f"{adapter_name}.{kind}"
        rows = call.rows(name, hidden.device)
        evidence, running = gate.evidence(scores, rows)
        if remember and kind == "gate":
            call.remember(name, running, rows)
        elif remember:
            self.call.waiting += ((name, running, rows),)
        return evidence.reshape(-1) - threshold

    @torch.no_grad()
    def note_entry(self, hidden: Tensor) -> None:
        """Ask the gates of what enters the attention, `hidden [B, S, H]`, where LoRA is behind them."""
        if self.call.sequence is None or self.disable_adapters or self.merged:
            return
        gated = [name for name in self.active_banks() if "entry" in self.gates(name)]
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.call.passes = {name: (self.margin(name, flat, kind="entry") > 0).view(hidden.shape[:-1]) for name in gated}
