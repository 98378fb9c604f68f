"""What is done to the gates of newborns once they are there: how open they are, and what they are fitted on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig, check_rate
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.find import find_to_grow
from peft_pcgrow.architectures.gathered import gathered_by_layer, to_gather
from peft_pcgrow.maps.batches import held_still, read_batches
from peft_pcgrow.maps.distributed import everywhere, together
from peft_pcgrow.maps.fit_gates import compare


class Gated:
    """A model whose adapters have newborns."""

    model: nn.Module
    peft_config: dict[str, PCGrowConfig]
    active_adapters: list[str]
    tuner_layers: Callable[[], list[PCGrowExperts]]

    def _with_newborns(self, adapter_name: str | None) -> tuple[list[str], list[PCGrowExperts]]:
        """Adapters, and the layers where they have newborns; ValueError if there are none."""
        names = [adapter_name] if adapter_name else [name for name in self.active_adapters if name in self.peft_config]
        layers = [layer for layer in self.tuner_layers() if any(layer.spawned(name) for name in names)]
        if not layers:
            raise ValueError(f"adapters {names} have no newborns, so there is no gate to set")
        return names, layers

    def set_gate_fpr(self, rate: float, adapter_name: str | None = None) -> None:
        """Let newborns take this share of retain tokens, in (0, 1), from now on: every adapter carries the thresholds.

        Args:
            adapter_name: one adapter; all active ones if None.

        Raises:
            ValueError: a rate out of its range (see `gate.RATES`), or no newborns.
        """
        check_rate(rate)
        names, layers = self._with_newborns(adapter_name)
        for name in names:
            self.peft_config[name].gate_fpr = rate
            for layer in layers:
                if name in layer.births:
                    layer.births[name] = replace(layer.births[name], gate_fpr=rate)

    def refit_gates(
        self,
        batches: Any,
        retain: Any,
        adapter_name: str | None = None,
        batch_size: int = 8,
        tokenizer: Callable[..., Any] | None = None,
        progress: bool = False,
    ) -> None:
        """Fit newborns' gates anew to what their layers read now, two forward passes over both texts.

        Newborns change what the layers above them read, and gates that were fitted before that shut out most of the
        domain there. Directions, thresholds and all change; the rate stays. Best done once, after a sixth of the
        training (`RefitGatesCallback` does, and `grow`).

        Args:
            batches: text of the domain. retain: text that must stay, that gates have seen or not; both in any form that
                `measure_errors` takes, and of all processes together under torch.distributed.
            adapter_name: whose; None: of those that train, or of the only one. Gates of an earlier domain stay so.
            batch_size, tokenizer: as for `measure_errors`.
            progress: show a progress bar.

        Raises:
            ValueError: no newborns, an adapter that is not active or switched off, several of which none trains, or too
                few texts.
        """
        names, layers = self._with_newborns(adapter_name)
        if adapter_name is None:
            born = [name for name in names if any(layer.spawned(name) for layer in layers)]
            trains = [n for n in born if any(p.requires_grad for layer in layers for p in layer.bank(n).values())]
            names = trains or born
            if len(born) > 1 and not trains:
                raise ValueError(f"adapters {born} have newborns and none trains: name the one of this text's domain")
        if idle := [name for name in names if name not in self.active_adapters]:
            raise ValueError(f"adapters {idle} are not active, and gates are fitted to what runs: activate them first")
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("adapters are switched off, and gates are fitted to what runs: enable them first")
        with together("refit_gates"), held_still(self.model):
            engines = to_gather(self.model, "refit_gates")
            here = [list(read_batches(self.model, text, None, batch_size, tokenizer)) for text in (batches, retain)]
        domain, spared = (everywhere(text, self.model) for text in here)
        with together("refit_gates"), held_still(self.model):
            # adapters may grow nodes of other kinds, or look at other windows
            wanted = {name: (self.peft_config[name].nodes, self.peft_config[name].gate_window) for name in names}
            fitted = {}
            for nodes, window in dict.fromkeys(wanted.values()):
                tree = find_to_grow(self.model, nodes, "refit_gates", bool(engines))
                with gathered_by_layer(engines, tree.layers):
                    separation = compare(self.model, tree, domain, spared, window, None, progress, names)
                    fitted[nodes, window] = tree, separation
        for name in names:
            tree, separation = fitted[wanted[name]]
            for row, site in enumerate(tree.sites):
                if isinstance(site.module, PCGrowExperts) and site.module.spawned(name):
                    site.module.take_gates(name, separation, row)
