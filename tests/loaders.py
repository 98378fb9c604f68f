"""Every way that users have to load an adapter: from the folders of a base and of an adapter."""

from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

LOADERS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "low_cpu_mem_usage": lambda base, adapter: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: native(AutoModelForCausalLM.from_pretrained(base), adapter),
}


def native(model: nn.Module, adapter) -> nn.Module:
    model.load_adapter(adapter)
    return model
