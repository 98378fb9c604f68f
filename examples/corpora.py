"""Data, evaluation and command line options shared by the example scripts.

Losses and entropies are in nats per token. A corpus is a list of texts; a tensor of windows is a LongTensor
``[N, length]`` of token ids on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = Path(__file__).resolve().parent / "embedded-moe"

# Besides what is not the library itself: `encodings` is mostly generated tables, nearly the same in every
# file, which would make the held-out loss look better than it is.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings")
)
# after the name of a text that is only evaluated
UNSEEN = " (unseen)"
SKIPPED_PREFIX = "_sysconfigdata"  # written when Python is built: paths and flags of the building machine


def in_split(key: str, split: str, one_in: int) -> bool:
    """Whether `key` is in `split`; one key in `one_in` goes to "eval", the same ones on every machine."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'")
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") % one_in == 0) == (split == "eval")


def stdlib_source(split: str) -> list[str]:
    """Python files of the running installation's standard library, in the order of their paths.

    About one file in twelve is in "eval". Raises FileNotFoundError where the installation keeps no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        sources = (name for name in files if name.endswith(".py") and not name.startswith(SKIPPED_PREFIX))
        paths += [Path(folder, name) for name in sources]
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    texts = []
    for name, path in named:
        if not in_split(name, split, one_in=12):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
    if not texts:
        raise FileNotFoundError(
            f"no Python sources under {root}, the standard library of this Python; use a Python that ships "
            "them, or pass --retain DIR/NAME with texts of your own"
        )
    return texts


def language_reference(split: str) -> list[str]:
    """Topics of Python's language reference as `help()` shows them, in the order of their names.

    About one topic in six is in "eval". Raises ModuleNotFoundError where the installation leaves them out.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this Python has no pydoc_data.topics, the text of its language reference; install the full "
            "standard library (some distributions put it in a package such as python3-doc), or pass "
            "--domain DIR/NAME with texts of your own"
        ) from error
    return [topics[name] for name in sorted(topics) if in_split(name, split, one_in=6)]


def read_jsonl(path: str | Path) -> list[str]:
    """Texts of a file with one ``{"text": ...}`` object a line; blank lines are skipped.

    Raises FileNotFoundError, or ValueError naming the file and the line that is not such an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; expected one JSON object a line, {{"text": ...}}')
    texts = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON, and bytes that are not UTF-8
            raise ValueError(f'{path}:{number}: not JSON ({error}); expected {{"text": ...}}') from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = line.decode(errors="replace").strip()[:60]
            raise ValueError(f'{path}:{number}: expected an object with a string under "text", found {found}')
        texts.append(row["text"])
    if not texts:
        raise ValueError(f'{path}: no texts in it; expected one JSON object a line, {{"text": ...}}')
    return texts


def load_corpus(spec: str, split: str) -> list[str]:
    """Texts of ``DIR/NAME.<split>.jsonl`` for the spec ``DIR/NAME``; raises what `read_jsonl` raises."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'")
    return read_jsonl(f"{spec}.{split}.jsonl")


def windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> torch.LongTensor:
    """All texts, an end-of-text token after each, cut into windows ``[N, length]``; the remainder is dropped.

    Raises ValueError if the tokenizer has no end-of-text token, or the texts do not fill one window.
    """
    if length < 2:
        raise ValueError(f"length is {length}; expected at least 2 tokens, as the first one is not predicted")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to put between texts; set tokenizer.eos_token first")
    tokens: list[int] = []
    if texts:
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += ids
            tokens.append(tokenizer.eos_token_id)
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"{len(texts)} texts make {len(tokens)} tokens, less than one window of {length}; "
            "give more text or a smaller --length"
        )
    return torch.tensor(tokens[: count * length], dtype=torch.long).view(count, length)


def spread(windows: torch.LongTensor, count: int) -> torch.LongTensor:
    """At most `count` windows ``[min(N, count), length]``, evenly spaced, so that many texts have a share."""
    if count < 1:
        raise ValueError(f"{count} windows asked for; expected at least 1")
    total = len(windows)
    return windows[[i * total // count for i in range(count)]] if total > count else windows


def batches(windows: torch.LongTensor, batch: int, steps: int, seed: int) -> Iterator[torch.LongTensor]:
    """`steps` batches ``[batch, length]`` in an order fixed by `seed`, shuffled anew for each pass."""
    if batch < 1 or len(windows) == 0:
        raise ValueError(f"batch is {batch}, of {len(windows)} windows; expected at least 1 of each")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        chosen, order = order[:batch], order[batch:]
        yield windows[chosen]


def in_batches(model: torch.nn.Module, windows: torch.Tensor, batch: int | None = None) -> Iterator[torch.Tensor]:
    """Windows on the model's device; 64 at once on a GPU, where they cost launches more than arithmetic, else 16."""
    device = next(model.parameters()).device
    yield from (chunk.to(device) for chunk in windows.split(batch or (16 if device.type == "cpu" else 64)))


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows: torch.LongTensor, batch: int | None = None) -> float:
    """Mean loss in nats per predicted token (all tokens of a window but its first), in eval mode."""
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(f"windows have shape {list(windows.shape)}; expected [N, length] with N at least 1")
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for ids in in_batches(model, windows, batch):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    finally:
        model.train(was_training)
    return total / windows[:, 1:].numel()


def unigram_entropy(windows: torch.LongTensor) -> float:
    """Entropy in nats per token of how often each token occurs among those `evaluate` predicts.

    No model that ignores the context has a lower loss on these windows.
    """
    counts = torch.bincount(windows[:, 1:].flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


@dataclass
class Task:
    """What an example trains on and measures; all windows are LongTensors ``[N, length]``."""

    model_path: Path
    tokenizer: PreTrainedTokenizerBase
    domain_train: torch.LongTensor
    domain_eval: torch.LongTensor
    retain: dict[str, tuple[torch.LongTensor, torch.LongTensor]]  # name: (train, eval)
    device: str = "cpu"
    unseen: dict[str, torch.LongTensor] = field(default_factory=dict)  # name: eval

    @property
    def held_out(self) -> dict[str, torch.LongTensor]:
        """All held-out windows: "domain", the retain texts, and those that nothing was trained or fitted on."""
        retain = {name: windows for name, (_, windows) in self.retain.items()}
        return {
            "domain": self.domain_eval,
            **retain,
            **{name + UNSEEN: windows for name, windows in self.unseen.items()},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_task` and the examples' training loops read."""
    add = parser.add_argument
    add("--model", metavar="PATH", type=Path, default=EMBEDDED_MODEL, help="model folder (default: embedded)")
    add("--domain", metavar="DIR/NAME", help="learn DIR/NAME.{train,eval}.jsonl (default: Python reference)")
    add(
        "--retain",
        metavar="DIR/NAME",
        action="append",
        default=[],
        help="keep what DIR/NAME.{train,eval}.jsonl need; repeatable (default: standard library source)",
    )
    add(
        "--unseen",
        metavar="DIR/NAME",
        action="append",
        default=[],
        help="evaluate on DIR/NAME.eval.jsonl too, a text that is neither replayed nor shown to gates; repeatable",
    )
    add("--steps", type=int, default=80, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=8, help="windows a step (default: %(default)s)")
    add("--length", type=int, default=192, help="tokens a window (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each (default: 0 1 2)")
    add("--eval-windows", type=int, default=64, help="windows of each held-out text (default: %(default)s)")
    add("--device", default="cpu", help="what models are on (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line")


def load_task(args: argparse.Namespace) -> Task:
    """The task that the options of `add_arguments` describe.

    Raises FileNotFoundError for a missing model folder, ValueError for two --retain corpora of one name, and
    what reading and cutting the texts raises.
    """
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(
            f"{args.model} has no config.json; expected the folder of a saved model: pass --model PATH, or "
            "write the default one with examples/train_embedded.py"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def pair(texts: dict[str, list[str]]) -> tuple[torch.LongTensor, torch.LongTensor]:
        return (
            windows(tokenizer, texts["train"], args.length),
            spread(windows(tokenizer, texts["eval"], args.length), args.eval_windows),
        )

    splits = ("train", "eval")
    domain = pair({s: load_corpus(args.domain, s) if args.domain else language_reference(s) for s in splits})
    retain = {}
    for spec in args.retain:
        name = Path(spec).name
        if name in retain:
            raise ValueError(f"--retain names {name!r} twice (again in {spec}); rename one of the corpora")
        retain[name] = pair({s: load_corpus(spec, s) for s in splits})
    if not retain:
        retain["source"] = pair({s: stdlib_source(s) for s in splits})
    unseen = {
        Path(spec).name: spread(windows(tokenizer, load_corpus(spec, "eval"), args.length), args.eval_windows)
        for spec in args.unseen
    }
    return Task(args.model, tokenizer, *domain, retain, args.device, unseen)


def new_model(task: Task, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the task's model, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(task.model_path, dtype=dtype).to(task.device)


def emit(row: dict, as_json: bool) -> None:
    """Print one result to stdout: a JSON object, or ``name value`` pairs to read."""
    if as_json:
        print(json.dumps(row), flush=True)
    else:
        shown = ((key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in row.items())
        print("  ".join(f"{key} {value}" for key, value in shown), flush=True)


def note(*parts: object) -> None:
    """Print progress to stderr, so that stdout holds results only."""
    print(*parts, file=sys.stderr, flush=True)


def machine() -> dict[str, str | int]:
    """Versions and hardware that a measurement depends on."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"

    packages = ("torch", "transformers", "peft", "peft_pcgrow")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processor": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
