"""What a fine-tuned model still knows: closed-book facts, instructions checked by program, samples to read.

A fact is a sentence cut before its last words (`facts.tsv`); it is right if the model's most likely tokens are those
words. An instruction is a prompt with a check of the answer that needs no judge. Measure both before and
after training: `kept` is the share of what was right before that is right still. `measures` has loss and bits per byte.

    python examples/abilities.py MODEL --adapter DIR
"""

import argparse
import json
import math
import re
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

import corpora
import peft_pcgrow  # noqa: F401 - makes its adapters known to PEFT

FACTS = Path(__file__).resolve().parent / "facts.tsv"
EDGES = string.whitespace + string.punctuation
PROMPTS = (
    "The most important thing about water is",
    "Once upon a time, there was a little girl who",
    "To make a good soup, first",
    "The main reason why people learn history is",
)


class Fact(NamedTuple):
    prompt: str  # no space at its end
    answer: str  # follows after one space


class Instruction(NamedTuple):
    prompt: str
    check: str  # a name in CHECKS
    argument: Any = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode and no gradients within, the earlier mode afterwards; gives the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def read_facts(path: str | Path = FACTS) -> list[Fact]:
    """Facts of a file with ``prompt<TAB>answer`` lines under a header; ValueError names a line that is none."""
    facts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()[1:], start=2):
        parts = line.split("\t")
        if len(parts) != 2 or not all(parts) or any(part != part.strip() for part in parts):
            raise ValueError(f"{path}:{number}: expected prompt<TAB>answer without outer spaces, found {line[:60]!r}")
        facts.append(Fact(*parts))
    return facts


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids as the model was trained to read a text's beginning: without the end that some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encoded(tokenizer: Tokenizer, fact: tuple[str, str]) -> tuple[list[int], int]:
    """Token ids of the whole sentence, and how many of them are the prompt's; ValueError if either has none."""
    ids, start = _ids(tokenizer, " ".join(fact)), _ids(tokenizer, fact[0])
    # a token that prompt and answer share is the answer's
    known = next((i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), min(len(ids), len(start)))
    if not fact[1].strip() or known == 0 or known == len(ids):
        raise ValueError(f"{fact!r}: prompt and answer must each have a token of their own")
    return ids, known


def _by_length(sequences: Sequence[list[int]], batch: int) -> Iterator[list[int]]:
    """Indices in batches of about the same length, so that little is padded."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    yield from (order[i : i + batch] for i in range(0, len(order), batch))


def padded(rows: list[list[int]], left: bool, device: torch.device) -> dict[str, Tensor]:
    """Token ids `[N, S]` and attention mask `[N, S]`; what is padded with does not matter."""
    length = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.long, device=device) for _ in range(2))
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, device=device), 1
    return {"input_ids": ids, "attention_mask": mask}


def cloze(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[tuple[str, str]], batch: int = 32) -> list[bool]:
    """Whether greedy decoding after each prompt begins with its answer's tokens; what follows them is not looked at.

    Raises ValueError for a fact without a prompt or an answer.
    """
    encoded = [_encoded(tokenizer, fact) for fact in facts]
    right = [False] * len(encoded)
    with evaluating(model) as device:
        # the last token is only predicted, never read
        for chosen in _by_length([ids[:-1] for ids, _ in encoded], batch):
            inputs = padded([encoded[i][0][:-1] for i in chosen], left=False, device=device)
            likely = model(**inputs, use_cache=False).logits.argmax(-1).tolist()
            for i, row in zip(chosen, likely, strict=True):
                ids, known = encoded[i]
                right[i] = row[known - 1 : len(ids) - 1] == ids[known:]
    return right


def _greedy(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[list[int]], batch: int, max_new_tokens: int
) -> list[str]:
    """What follows each prompt of token ids, without special tokens."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "pad_token_id": pad}
    answers = [""] * len(prompts)
    with evaluating(model) as device:
        for chosen in _by_length(prompts, batch):
            inputs = padded([prompts[i] for i in chosen], left=True, device=device)
            made = model.generate(**inputs, **options, max_new_tokens=max_new_tokens)
            texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


def samples(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 40, batch: int = 32
) -> list[str]:
    """Greedy continuations to read, without the prompts; ValueError for a prompt that makes no token."""
    encoded = [_ids(tokenizer, prompt) for prompt in prompts]
    for ids, prompt in zip(encoded, prompts, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no token to go on from")
    return _greedy(model, tokenizer, encoded, batch, max_new_tokens)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text.casefold())


def _number(text: str, wanted: int) -> bool:
    """The last number is the wanted one: answers often repeat the question first."""
    found = re.findall(r"\d+(?:\.\d+)?", text)
    return bool(found) and float(found[-1]) == wanted


def _json_list(text: str, count: int) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and len(found) == count and all(isinstance(item, str) and item for item in found)


# name: whether the answer is as asked, given the argument of the instruction; words in any case
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda text, word: word.casefold() in _words(text),
    "one of": lambda text, words: any(word in _words(text) for word in words),
    "starts with": lambda text, word: _words(text)[:1] == [word.casefold()],
    "equals": lambda text, word: text.strip(EDGES).casefold() == word.casefold(),
    "yes or no": lambda text, yes: _words(text)[:1] == ["yes" if yes else "no"],
    "upper case": lambda text, _: text.isupper(),
    "lower case": lambda text, _: text.islower(),
    "number": _number,
    "lines": lambda text, count: sum(bool(line.strip()) for line in text.splitlines()) == count,
    "full stop": lambda text, word: text.rstrip().endswith(".") and word in _words(text),
    "question": lambda text, word: text.rstrip().endswith("?") and word in _words(text),
    "repeats": lambda text, argument: _words(text).count(argument[0]) == argument[1],
    "at most": lambda text, argument: argument[0] in _words(text) and len(_words(text)) <= argument[1],
    "JSON list": _json_list,
}

NOUNS = ("river", "garden", "castle", "kitchen", "candle", "window", "horse", "mountain", "teacher", "bicycle")
NAMES = ("Anna", "Peter", "Maria", "James", "Laura", "Tom")
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Russia": "Moscow",
}
OPPOSITES = {"hot": "cold", "big": "small", "good": "bad", "fast": "slow", "up": "down", "wet": "dry"}
MAKERS = ("bees", "bakers", "authors", "painters", "farmers")
YES = ("Is a dog an animal?", "Is ice cold?", "Is Rome a city in Italy?", "Do birds have wings?", "Is water wet?")
NO = ("Is a dog a plant?", "Is fire cold?", "Is Rome a city in Japan?", "Do snakes have legs?", "Is iron a fruit?")
COUNTS = {"legs does a dog": 4, "days does a week": 7, "wheels does a bicycle": 2, "months does a year": 12}
KINDS = {
    "color": ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink"),
    "fruit": ("apple", "banana", "orange", "pear", "grape", "mango", "strawberry", "cherry", "peach", "pineapple"),
    "planet": ("mercury", "venus", "earth", "mars", "jupiter", "saturn", "uranus", "neptune"),
    "day of the week": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "country in Europe": ("france", "germany", "italy", "spain", "poland", "greece", "sweden", "norway", "portugal"),
}


def build() -> list[Instruction]:
    """The instructions, always the same: templates filled from the tables above."""
    nouns = {noun: noun for noun in NOUNS}
    sums = {f"{a} + {b}": a + b for a in (1, 2, 3) for b in (4, 5, 6)}
    templates: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("Write a sentence that contains the word {}.", "contains", nouns),
        ("What is a {}?", "contains", nouns),
        ("Write one short sentence about a {}.", "full stop", nouns),
        ("Write one question about a {}.", "question", nouns),
        ("Describe a {} in one short sentence.", "at most", {noun: (noun, 20) for noun in NOUNS}),
        ("Begin your answer with the word {}. Why is it liked?", "starts with", {noun: noun for noun in NOUNS[:5]}),
        ("Repeat the word {} exactly 3 times.", "repeats", {noun: (noun, 3) for noun in NOUNS[:3]}),
        ("Write a short greeting to {}.", "contains", {name: name for name in NAMES}),
        ("What is the capital of {}?", "contains", CAPITALS),
        ("What is the opposite of {}?", "contains", OPPOSITES),
        ("What is the opposite of {}? Answer with one word.", "equals", OPPOSITES),
        ("Answer in lowercase letters only: what do {} make?", "lower case", dict.fromkeys(MAKERS)),
        ("ANSWER IN CAPITAL LETTERS: WHAT DO {} MAKE?", "upper case", dict.fromkeys(who.upper() for who in MAKERS)),
        ("{} Answer yes or no.", "yes or no", {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}),
        ("How many {} have? Answer with a number.", "number", COUNTS),
        ("What is {}?", "number", sums),
        ("Name a {}.", "one of", KINDS),
        ("Name three examples of a {}, one on each line.", "lines", dict.fromkeys(KINDS, 3)),
        ("Give me a JSON list of 3 examples of a {}.", "JSON list", dict.fromkeys(list(KINDS)[:3], 3)),
    )
    return [
        Instruction(template.format(word), check, argument)
        for template, check, table in templates
        for word, argument in table.items()
    ]


INSTRUCTIONS = build()


def chat_text(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt as the user's turn, up to where the answer begins; ValueError without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so the model was not made for instructions; set "
            "tokenizer.chat_template, or leave instructions out (--no-instructions)"
        )
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def chat_prompts(tokenizer: Tokenizer, asked: Sequence[Instruction] = INSTRUCTIONS) -> list[list[int]]:
    """Token ids of each instruction as `chat_text`; ValueError without a chat template."""
    texts = [chat_text(tokenizer, instruction.prompt) for instruction in asked]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def instructions(
    model: nn.Module,
    tokenizer: Tokenizer,
    batch: int = 32,
    max_new_tokens: int = 48,
    asked: Sequence[Instruction] = INSTRUCTIONS,
) -> list[bool]:
    """Whether the greedy answer to each instruction is as asked; ValueError without a chat template."""
    answers = _greedy(model, tokenizer, chat_prompts(tokenizer, asked), batch, max_new_tokens)
    return [CHECKS[one.check](answer.strip(), one.argument) for one, answer in zip(asked, answers, strict=True)]


def kept(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Of what was right before, the share that is right after; ValueError if nothing was, or lengths differ."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} results before and {len(after)} after; expected the same questions")
    still = [bool(now) for then, now in zip(before, after, strict=True) if then]
    if not still:
        raise ValueError("nothing was right before, so no share of it can be kept")
    return sum(still) / len(still)


def measures(model: nn.Module, windows: Tensor, tokenizer: Tokenizer, batch: int | None = None) -> dict[str, float]:
    """Of all tokens of windows `[N, S]` but each first: `loss` in nats per token, `bits_per_byte`, and `accuracy`, the
    share that is the model's most likely next token.

    Bytes are those of the tokens' text in UTF-8; special tokens have none. Raises ValueError for windows of another
    shape or without text.
    """
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows have shape {list(windows.shape)}; expected [N, S] with N at least 1 and S 2")
    texts = tokenizer.batch_decode(windows[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = sum(len(text.encode("utf-8")) for text in texts)
    if size == 0:
        raise ValueError("the windows hold special tokens only: no bytes to divide by")
    nats, hits = 0.0, 0
    with evaluating(model):
        for ids in corpora.in_batches(model, windows, batch):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            hits += int((logits.argmax(-1) == ids[:, 1:]).sum())
    tokens = windows[:, 1:].numel()
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size, "accuracy": hits / tokens}


def _some(items: list, limit: int | None) -> list:
    """At most `limit` of them, evenly spaced."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub name of the model")
    add("--adapter", metavar="DIR", help="folder of a PEFT adapter of it")
    add("--limit", metavar="N", type=int, help="ask only N facts and N instructions, evenly spread")
    add("--no-instructions", action="store_true", help="for a model without a chat template")
    add("--device", default="cpu", help="what the model is on (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line, with each question's result as 1 or 0")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: expected at least 1")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not args.no_instructions:
        chat_text(tokenizer, "")  # refuses now rather than after all facts
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.to(args.device)

    facts, asked = _some(read_facts(), args.limit), _some(INSTRUCTIONS, args.limit)
    jobs: dict[str, Callable[[], list[bool]]] = {"facts": lambda: cloze(model, tokenizer, facts)}
    if not args.no_instructions:
        jobs["instructions"] = lambda: instructions(model, tokenizer, asked=asked)
    for name, job in jobs.items():
        started = time.perf_counter()
        right = job()
        row = {"measure": name, "right": sum(right), "of": len(right), "seconds": time.perf_counter() - started}
        corpora.emit({**row, "each": "".join(str(int(one)) for one in right)} if args.json else row, args.json)
    for prompt, text in zip(PROMPTS, samples(model, tokenizer, PROMPTS), strict=True):
        corpora.emit({"prompt": prompt, "text": text} if args.json else {"sample": repr(prompt + text)}, args.json)


if __name__ == "__main__":
    main()
