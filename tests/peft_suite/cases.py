"""What the suite's matrices hold for this method: models, configs, and the rows that do not apply.

To add an architecture, mixture or not, add one line to MODELS, which `stand_ins.make` reads.
"""

from typing import Any

from peft_pcgrow import PCGrowConfig
from tiny import ARCHITECTURES, LOCUS

# a fresh config has to be told what grows: everything
SETTINGS = {"select": "random", "budget": 1.0}
PARTS = {"locus": LOCUS, "resolution": "matrix"}

# id -> architecture and changes to it. The suite treats the first id specially, so it keeps its name
MODELS: dict[str, dict[str, Any]] = {
    "trl-internal-testing/tiny-GptOssForCausalLM": {"architecture": "gpt_oss"},
    **{f"tiny/{name}": {"architecture": name} for name in ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe")},
    # some rows grow layer 0 alone, which is dense by default
    "tiny/deepseek_v3": {"architecture": "deepseek_v3", "first_k_dense_replace": 0},
    # experts that do not follow transformers' contract, one for each token
    "tiny/llama4": {
        "architecture": "llama4_text",
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    # MLPs as nodes
    **{
        f"tiny/{name}": {"architecture": name, "intermediate_size": 64}
        for name in ("llama", "qwen2", "phi3", "gpt_neox")
    },
}
CLASSIFIERS = {
    f"tiny/{name}-{head}": {"architecture": name, "head": head}
    for head, names in {
        "SEQ_CLS": ("qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"),
        "TOKEN_CLS": ("qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"),
        "QUESTION_ANS": ("qwen3_moe", "mixtral", "qwen2_moe"),
    }.items()
    for name in names
}
# ids that tests name in their bodies: they get a mixture of experts too. bitsandbytes packs rows of 64 on a CPU
FIXED = {
    "peft-internal-testing/opt-125m": {"architecture": "qwen3_moe", "hidden_size": 64, "head_dim": 16},
    "peft-internal-testing/tiny-random-OPTForCausalLM": {"architecture": "qwen3_moe"},
    "peft-internal-testing/tiny-random-BertForSequenceClassification": {"architecture": "qwen3_moe", "head": "SEQ_CLS"},
}
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
    "test_quantization": "CAUSAL_LM",
    "TestTokenClassificationModels": "TOKEN_CLS",
    "TestQuestionAnsweringModels": "QUESTION_ANS",
}
FILES = [
    "test_config.py",
    "test_target_parameters.py",
    "test_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_quantization.py",
    "test_torch_compile.py",
]
INAPPLICABLE = {
    "test_quantization_backend_is_set_and_repr": "counts layers with PEFT's quantization_backend, which reads linear "
    "layers; bitsandbytes leaves experts alone, and `base_quantization` packs them",
    "TestQuantization::test_merge_unmerge_unload": "merging into a base that was loaded quantized is refused",
}


def rows(file: str, test_class: str, names: list[str]) -> list[Any] | None:
    """What a matrix over the arguments `names` holds for this method; None: it is not one over methods or models."""
    task = TASKS.get(test_class, TASKS.get(file))
    config = {**SETTINGS, "task_type": task}
    if names == ["config_class", "mandatory_kwargs"]:
        return [(PCGrowConfig, {})]
    if names == ["config_cls", "config_kwargs"]:
        return [(PCGrowConfig, config)] if task else []
    if names == ["model_id", "config_cls", "config_kwargs"]:
        whole, parts = {**SETTINGS, "task_type": "CAUSAL_LM"}, {**PARTS, "task_type": "CAUSAL_LM"}
        mixtures = [model for model, how in MODELS.items() if how["architecture"] in ARCHITECTURES]
        return [(m, PCGrowConfig, whole) for m in MODELS] + [(m, PCGrowConfig, parts) for m in mixtures]
    if names == ["model_id"] and task:
        found = [name for name, how in CLASSIFIERS.items() if how["head"] == task]
        return found or list(MODELS)
    if names == ["settings"] and file == "test_torch_compile":
        return [(PCGrowConfig(**SETTINGS, task_type="CAUSAL_LM"), {})]
    return None


def is_ours(value: Any) -> bool:
    """Whether a test's argument is, or holds, a config of this method."""
    if isinstance(value, tuple):
        return any(map(is_ours, value))
    return value is PCGrowConfig or isinstance(value, PCGrowConfig)
