"""The numerical ops of peft_pcgrow, each with a plain-torch definition in `reference`."""

from pcgrow_kernels.reference import expert_error

__all__ = ["expert_error"]
