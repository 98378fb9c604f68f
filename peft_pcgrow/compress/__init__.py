"""Compress: collapse what has converged. Quantizing, thinning, sparsifying and skipping by one budget.

May import everything below; nothing imports it but the user.

Example:
    >>> plan = compress.plan(model, target=0.5, retain=retain, progress=False)
    >>> model, report = compress.apply(model, plan, max_loss_rise=0.05, progress=False)
    >>> report.bytes_after <= 0.5 * report.bytes_before
    True
"""

from peft_pcgrow.compress.apply_plan import CompressionReport, apply
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.compress.form_survey import Survey, plan, survey
from peft_pcgrow.compress.shrink import ShrinkReport, shrink_adapter
from peft_pcgrow.export.plain import PlainReport, export_plain
from peft_pcgrow.packed.quantize import QuantizeReport, quantize_experts

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
