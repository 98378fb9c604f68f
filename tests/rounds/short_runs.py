"""Runs of growth on small models and two made-up languages, and ways to interrupt them."""

import torch
from torch import Tensor
from transformers import TrainerCallback

from peft_pcgrow import grow
from tiny import DOMAIN_WORDS, RETAIN_WORDS, build, snapshot

# of a random model, most directions that the domain needs are the retain text's too
UNPROTECTED = {"protect": 0.0}
OPTIONS = {
    "length": 24, "map_windows": 64, "max_steps": 12, "gate_fpr": 0.1, "progress": False, "config": UNPROTECTED,
}  # fmt: skip


def text(words: tuple[int, int], count: int, seed: int) -> Tensor:
    """A language of its own: four words of five follow from the one before, `[count, 24]`."""
    first, span, draw = words[0], words[1] - words[0] + 1, torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, span, (count,), generator=draw)]
    for _ in range(23):
        any_word = torch.randint(0, span, (count,), generator=draw)
        rows.append(torch.where(torch.rand(count, generator=draw) < 0.8, (3 * rows[-1] + 1) % span, any_word))
    return torch.stack(rows, 1) + first


def corpora() -> dict[str, Tensor]:
    return {
        "train_on": text(DOMAIN_WORDS, 64, 1),
        "heldout": text(DOMAIN_WORDS, 16, 2),
        "retain": text(RETAIN_WORDS, 128, 3),
    }


def run(folder, model=None, **changes):
    given = {**corpora(), **OPTIONS, "rounds": 1, "output_dir": folder, **changes}
    return grow(build() if model is None else model, **given)


class Interrupt(TrainerCallback):
    """Ctrl-C at a step, or once a checkpoint is being written."""

    def __init__(self, step: int, saving: bool = False):
        self.step, self.saving = step, saving

    def on_step_end(self, args, state, control, **kwargs):
        if not self.saving and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if self.saving and state.global_step == self.step:
            raise KeyboardInterrupt


def banks(model) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in snapshot(model).items() if "pcgrow" in name}
