"""Compress: collapse what has converged. Quantizing, thinning, sparsifying and skipping by one budget.

Names are imported when they are first used: some of these modules stand below the adapter, some above it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_pcgrow.compress.apply_plan import CompressionReport, apply
    from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
    from peft_pcgrow.compress.form_survey import Survey, plan, survey
    from peft_pcgrow.compress.plain import PlainReport, export_plain
    from peft_pcgrow.compress.quantize import QuantizeReport, quantize_experts
    from peft_pcgrow.compress.shrink import ShrinkReport, shrink_adapter

_HOME = {
    "CompressionPlan": "compression_plan",
    "CompressionReport": "apply_plan",
    "NodePlan": "compression_plan",
    "PlainReport": "plain",
    "QuantizeReport": "quantize",
    "ShrinkReport": "shrink",
    "Survey": "form_survey",
    "apply": "apply_plan",
    "export_plain": "plain",
    "plan": "form_survey",
    "quantize_experts": "quantize",
    "shrink_adapter": "shrink",
    "survey": "form_survey",
}
__all__ = [
    "CompressionPlan",
    "CompressionReport",
    "NodePlan",
    "PlainReport",
    "QuantizeReport",
    "ShrinkReport",
    "Survey",
    "apply",
    "export_plain",
    "plan",
    "quantize_experts",
    "shrink_adapter",
    "survey",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
