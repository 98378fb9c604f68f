"""Grow mixture-of-experts models with PEFT: measure where they err, and refine only those experts.

Importing the package registers the method `PCGROW` with PEFT, and checkpoints of packed experts with transformers.

Every public name has an example in its docstring. There, the public names, `torch` and PEFT's `get_peft_model` are
imported; `model` is a small mixture-of-experts causal LM (3 layers of 8 experts, 3 for each token); `batches` are two
tensors of token ids, `[16, 24]`, of a domain, `retain` two of other text; `folder` is the path of an empty folder, and
`trainer` a transformers Trainer of `model` that takes 4 steps on `batches`.
"""

from peft_pcgrow import compress
from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.adapter.model_card import SPELLED_OUT
from peft_pcgrow.adapter.register import register
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.export.flat import export_flat
from peft_pcgrow.hub.push import push
from peft_pcgrow.locate.budget import choose
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.diagnosis import Diagnosis
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import measure_errors
from peft_pcgrow.maps.sample import sample_text
from peft_pcgrow.packed.checkpoint import register_packed
from peft_pcgrow.rounds.grow import grow
from peft_pcgrow.rounds.load import load_grown
from peft_pcgrow.rounds.result import GrowthResult
from peft_pcgrow.training.callback import ErrorMapCallback
from peft_pcgrow.training.curriculum import order_by_surprisal
from peft_pcgrow.training.learning_rate import find_lr
from peft_pcgrow.training.muon import Muon, create_pcgrow_optimizer
from peft_pcgrow.training.refit_gates import RefitGatesCallback

__version__ = "0.2.0.dev0"
__all__ = [
    "Diagnosis",
    "ErrorMap",
    "ErrorMapCallback",
    "GrowthResult",
    "Locus",
    "Muon",
    "PCGrowConfig",
    "PCGrowModel",
    "RefitGatesCallback",
    "choose",
    "compress",
    "create_pcgrow_optimizer",
    "export_flat",
    "find_experts",
    "find_lr",
    "grow",
    "load_grown",
    "measure_errors",
    "order_by_surprisal",
    "push",
    "sample_text",
]

register(PCGrowConfig, PCGrowModel, SPELLED_OUT)
register_packed()
