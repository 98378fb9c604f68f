"""Compress: collapse what has converged. Quantizing, thinning, sparsifying and skipping by one budget."""

from peft_pcgrow.compress.apply import CompressionReport, apply, stored_bytes
from peft_pcgrow.compress.plain import PlainReport, export_plain
from peft_pcgrow.compress.plan import CompressionPlan, NodePlan
from peft_pcgrow.compress.survey import Survey, plan, survey

__all__ = [
    "CompressionPlan",
    "CompressionReport",
    "NodePlan",
    "PlainReport",
    "Survey",
    "apply",
    "export_plain",
    "plan",
    "stored_bytes",
    "survey",
]
