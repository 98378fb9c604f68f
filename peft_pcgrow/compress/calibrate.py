"""One sweep over some text that notes, for every node, what entered it and which error reached its output.

Shapes: N tokens, K experts per token, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_pcgrow.architectures.find import Tree, adopt, find_experts
from peft_pcgrow.maps.batches import IGNORED, Batch, check_gradients, held_still, settled_losses
from peft_pcgrow.maps.corpus import whole_number
from peft_pcgrow.maps.distributed import check_same, read_everywhere
from peft_pcgrow.settling.descent import Probe
from peft_pcgrow.settling.layer_run import hidden_of
from peft_pcgrow.settling.layer_stack import LayerStack


@dataclass
class LayerSample:
    """What one decoder layer was given, all tokens that are not padding, one text after the other.

    Attributes:
        x: what entered the experts, `[N, H]`. index, weight: how tokens were routed, `[N, K]`.
        error: dLoss/d(experts' output), of the summed token losses, `[N, H]`.
        text: which of the texts each token is from, `[N]`. row: which sequence, `[N]`.
        skipped: first-order change of the summed loss if the layer's update to the residual stream were left out,
            `[N]`.
    """

    x: Tensor
    index: Tensor
    weight: Tensor
    error: Tensor
    text: Tensor
    row: Tensor
    skipped: Tensor


@dataclass
class Calibration:
    """What some texts looked like to a model.

    Attributes:
        names: of the texts. labels: predicted tokens of each. losses: mean loss of each, nats per token.
        layers: by decoder layer.
        batches: the texts themselves, to measure losses on again.
    """

    names: tuple[str, ...]
    labels: list[int]
    losses: list[float]
    layers: dict[int, LayerSample]
    batches: list[list[Batch]] = field(default_factory=list)


class _NodeProbe(Probe):
    """Collects `LayerSample`s while layers are settled."""

    def __init__(self, tree: Tree):
        self.sites = {site.layer: site for site in tree.sites}
        self.found: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in self.sites}
        self.keep = self.rows = torch.ones(0, device="cpu")
        self.text = 0

    def begin(self, real: Tensor, text: int, first_row: int) -> None:
        self.keep, self.text = real.reshape(-1), text
        self.rows = (first_row + torch.arange(len(real), device=real.device))[:, None].expand_as(real).reshape(-1)

    @contextmanager
    def watch(self, index: int) -> Iterator[Callable[[], list[Tensor]]]:  # type: ignore[override]
        site, outputs, self._seen = self.sites.get(index), [], []
        if site is None:
            yield lambda: []
            return

        def entered(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._seen = [args[0].detach(), args[1], args[2].detach()]
            outputs.insert(0, output)

        layer: Any = site.decoder_layer
        forward = layer.forward

        def followed(*args: Any, **kwargs: Any) -> Any:
            before, output = args[0] if args else kwargs["hidden_states"], forward(*args, **kwargs)
            after = hidden_of(output, layer)
            self._seen.append((before - after).detach())
            outputs.append(after)
            return output

        handle = site.module.register_forward_hook(entered)
        # layers run again without their hooks
        layer.forward = followed
        try:
            yield lambda: outputs
        finally:
            handle.remove()
            layer.forward = forward

    def receive(self, index: int, errors: Sequence[Tensor | None]) -> None:
        if index not in self.sites:
            return
        if len(self._seen) < 4 or len(errors) < 2 or errors[0] is None or errors[1] is None:
            raise RuntimeError(f"layer {index} ran without calling its experts: its MoE block was replaced")
        x, chosen, weight, step = self._seen
        wide = torch.promote_types(step.dtype, torch.float32)
        # of all streams, where the hidden state has several (hyper-connections)
        change = (step.to(wide) * errors[1].to(wide)).reshape(len(self.keep), -1).sum(-1)
        pieces = x.reshape(-1, x.shape[-1]), chosen, weight, errors[0].reshape(-1, x.shape[-1]), self.rows, change
        self.found[index].append(tuple(piece[self.keep.to(piece.device)].cpu() for piece in pieces))


def calibrate(
    model: nn.Module, texts: Mapping[str, Iterable[Any]], max_tokens: int | None = None, progress: bool = True
) -> Calibration:
    """Sweep over each text, with nothing trained.

    Several processes (torch.distributed) put their texts together and each sweeps over all of them: what follows from
    that is the same on all. All must call, with texts of the same names.

    Args:
        texts: name -> batches as for `measure_errors`.
        max_tokens: of each text and process, at most so many (to the end of a batch); what is noted is 2 H + 2 K
            numbers a token and layer, on the CPU.

    Raises:
        ValueError: no text, or one without a token to predict, or `max_tokens` that are no number of tokens.
    """
    if max_tokens is not None:
        max_tokens = whole_number("max_tokens", max_tokens, "tokens")
    check_gradients(model)
    labels, losses, read, row = [], [], [], 0
    check_same("calibrating", {"the texts": tuple(texts)})
    if not texts:
        raise ValueError("no text to calibrate on: give domain= or retain= batches")
    tree = adopt(find_experts(model))
    probe = _NodeProbe(tree)
    with held_still(model), LayerStack(tree.layers, probe=probe), settled_losses(model) as settle_batch:
        for number, (name, batches) in enumerate(texts.items()):
            held = read_everywhere(model, batches, max_tokens)
            count = sum(int((target[:, 1:] != IGNORED).sum()) for _, target, _ in held)
            if not count:
                raise ValueError(f"the {name} text has no token to predict: give batches of at least two tokens each")
            loss = 0.0
            for inputs, target, rows in tqdm(held, desc=f"calibrating on {name}", unit="batch", disable=not progress):
                probe.begin(rows.real, number, row)
                loss += settle_batch(inputs, target)
                row += len(target)
            for noted in probe.found.values():
                for i, piece in enumerate(noted):
                    if len(piece) == 6:
                        noted[i] = (*piece, torch.full((len(piece[0]),), number, device="cpu"))
            labels.append(count)
            losses.append(loss / count)
            read.append(held)
    layers = {}
    for layer, noted in probe.found.items():
        x, index, weight, error, rows, skipped, text = (torch.cat(column) for column in zip(*noted, strict=True))
        layers[layer] = LayerSample(x, index, weight, error, text, rows, skipped)
    return Calibration(tuple(texts), labels, losses, layers, read)
