"""What a grown layer knows of the forward that is going on."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from peft_pcgrow.gates.gate import Rows
from peft_pcgrow.gates.text_position import TextPosition
from peft_pcgrow.per_thread import PerThread


class Call(PerThread):
    """The run of a decoder layer that a thread is in the middle of; the model keeps it up to date.

    Attributes:
        sequence: how its tokens stand in their texts. entered: whether the decoder layer said so itself.
        called: whether it has come to its grown experts yet.
        passes: by adapter, which tokens the gate of what enters the attention lets pass, `[B, S]` bool.
        waiting: what these gates are to remember, once the attention has made its entry in the KV cache.
    """

    sequence: TextPosition | None = None
    entered = False
    called = False
    passes: Mapping[str, Tensor] = MappingProxyType({})
    waiting: tuple[tuple[str, Tensor, Rows], ...] = ()

    @torch.compiler.disable
    def begin(self) -> None:
        self.called = True
        if self.sequence is not None:
            for gate in self.waiting:
                self.sequence.remember(*gate)
        self.waiting = ()

    def end(self) -> None:
        self.entered, self.sequence, self.passes, self.waiting = False, None, MappingProxyType({}), ()
