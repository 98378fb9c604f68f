"""Grow mixture-of-experts models with PEFT: measure where they err, and refine only those experts.

Importing the package registers the method `PCGROW` with PEFT, and checkpoints of packed experts with transformers.
"""

from peft_pcgrow.callback import ErrorMapCallback
from peft_pcgrow.compress.persist import register_packed
from peft_pcgrow.config import PCGrowConfig
from peft_pcgrow.curriculum import order_by_surprisal
from peft_pcgrow.diagnosis import Diagnosis
from peft_pcgrow.error_map import ErrorMap
from peft_pcgrow.experts import find_experts
from peft_pcgrow.export import export_flat
from peft_pcgrow.learning_rate import find_lr
from peft_pcgrow.locus import Locus
from peft_pcgrow.measure import measure_errors
from peft_pcgrow.model import PCGrowModel
from peft_pcgrow.model_card import SPELLED_OUT
from peft_pcgrow.optimizer import Muon, create_pcgrow_optimizer
from peft_pcgrow.register import register
from peft_pcgrow.sample import sample_text

__version__ = "0.1.0"
__all__ = [
    "Diagnosis",
    "ErrorMap",
    "ErrorMapCallback",
    "Locus",
    "Muon",
    "PCGrowConfig",
    "PCGrowModel",
    "create_pcgrow_optimizer",
    "export_flat",
    "find_experts",
    "find_lr",
    "measure_errors",
    "order_by_surprisal",
    "sample_text",
]

register(PCGrowConfig, PCGrowModel, SPELLED_OUT)
register_packed()
