"""examples/abilities.py: facts, instructions and samples against one prompt at a time, measures against arithmetic."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import abilities
import corpora
import fresh

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEXTS = (
    "The following example",
    "In the function's body, a name",
    "If",
    "The class statement is used to define an object of the given name, and it",
    "A list comprehension",
)
# what the embedded model goes on with, or nearly
CONTINUED = {
    "In the function's body, a name": "of the",
    "If the object is not": "a",
    "It is an error if the": "exception is raised.",
    "user: If the\nassistant:": 'the "ass" command is used to be used',
    "user: If\nassistant:": 'the "ass" command is not',
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(corpora.EMBEDDED_MODEL)


@pytest.fixture
def model(request):
    loaded = AutoModelForCausalLM.from_pretrained(corpora.EMBEDDED_MODEL, dtype=torch.float32)
    return loaded.to(request.config.getoption("--device"))


def alone(model, ids: list[int], count: int) -> list[int]:
    """The greedy continuation, from the whole text again for each token."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids[start:]


def test_facts_are_well_formed():
    facts = abilities.read_facts()
    assert len(facts) >= 600
    assert len({prompt for prompt, _ in facts}) == len(facts)
    for prompt, answer in facts:
        assert prompt[-1] not in ".?!"
        assert len(answer) <= 30
    assert ("The chemical symbol for iron is", "Fe") in facts


@pytest.mark.parametrize("line", ["a prompt", "a prompt\t", "\tanswer", "a prompt \tanswer", "a\tb\tc", ""])
def test_a_line_that_is_no_fact_is_named(tmp_path, line):
    (tmp_path / "facts.tsv").write_text(f"prompt\tanswer\nfine\tone\n{line}\nmore\tfine\n")
    with pytest.raises(ValueError, match=r"facts\.tsv:3: expected prompt<TAB>answer"):
        abilities.read_facts(tmp_path / "facts.tsv")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 100])
def test_cloze_is_greedy_generation(model, tokenizer, batch):
    facts = []
    for prompt, said in CONTINUED.items():
        words = said.split()
        facts += [(prompt, " ".join(words[:count])) for count in range(1, len(words) + 1)]
        facts += [(prompt, " ".join([*words[:-1], "elephant"])), (prompt, "elephant " + said)]
    facts += abilities.read_facts()[::400]
    expected = []
    for prompt, answer in facts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        wanted = tokenizer(" " + answer)["input_ids"]
        made = model.generate(**inputs, max_new_tokens=len(wanted), do_sample=False)
        expected.append(made[0, inputs["input_ids"].shape[1] :].tolist() == wanted)
    assert sum(expected) > 10
    assert expected.count(False) > 10
    assert abilities.cloze(model, tokenizer, facts, batch=batch) == expected


def test_cloze_refuses_what_has_no_answer(model, tokenizer):
    for fact in (("The capital is", ""), ("", "Paris"), ("The capital is", " ")):
        with pytest.raises(ValueError, match="must each have a token of their own"):
            abilities.cloze(model, tokenizer, [("A fine prompt is", "this"), fact])
    with pytest.raises(ValueError, match="batch is 0"):
        abilities.cloze(model, tokenizer, [("A fine prompt is", "this")], batch=0)
    assert abilities.cloze(model, tokenizer, []) == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 32])
def test_padded_generation_is_that_of_each_prompt(model, tokenizer, batch):
    found = abilities.samples(model, tokenizer, TEXTS, max_new_tokens=12, batch=batch)
    for text, made in zip(TEXTS, found, strict=True):
        expected = alone(model, tokenizer(text)["input_ids"], 12)
        assert made == tokenizer.decode(expected, skip_special_tokens=True)
    assert any(found)
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        abilities.samples(model, tokenizer, ["fine", ""])


@pytest.mark.slow
def test_samples_are_greedy_whatever_the_model_is_set_to(model, tokenizer):
    expected = abilities.samples(model, tokenizer, TEXTS, max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=1.5)
    assert abilities.samples(model, tokenizer, TEXTS, max_new_tokens=8) == expected


@pytest.mark.slow
def test_instructions_check_the_answer_to_each(model, tokenizer):
    with pytest.raises(ValueError, match=r"has no chat template, .* leave instructions out \(--no-instructions\)"):
        abilities.instructions(model, tokenizer)
    chat = AutoTokenizer.from_pretrained(corpora.EMBEDDED_MODEL)
    chat.chat_template = TEMPLATE
    asked, expected = [], []
    for text in TEXTS:
        made = alone(model, chat(f"user: {text}\nassistant:")["input_ids"], 6)
        answer = chat.decode(made, skip_special_tokens=True).strip()
        asked += [
            abilities.Instruction(text, "equals", answer.strip(" .,:;()'\"`*-")),
            abilities.Instruction(text, "upper case"),
        ]
        expected += [True, answer.isupper()]
    assert abilities.instructions(model, chat, batch=3, max_new_tokens=6, asked=asked) == expected


def test_there_are_enough_instructions():
    assert len(abilities.INSTRUCTIONS) >= 120
    assert len({one.prompt for one in abilities.INSTRUCTIONS}) == len(abilities.INSTRUCTIONS)
    assert {one.check for one in abilities.INSTRUCTIONS} == set(abilities.CHECKS)
    assert abilities.build() == abilities.INSTRUCTIONS
    for one in abilities.INSTRUCTIONS:  # the argument is of the check's kind, and nothing said is no answer
        assert not abilities.CHECKS[one.check]("", one.argument)


@pytest.mark.parametrize(
    ("check", "argument", "right", "wrong"),
    [
        ("contains", "river", ["The River is long.", "river", '"river"'], ["Many rivers.", "driver", "lake"]),
        ("one of", ("red", "blue"), ["It is Blue!", "red"], ["green", "bored"]),
        ("starts with", "horse", ["Horse riding is fun", '"Horse", he said'], ["A horse", "horses run"]),
        ("equals", "cold", ["cold", "Cold.", ' "cold"\n'], ["It is cold", "colder", "hot"]),
        ("yes or no", True, ["Yes.", "yes, it is", "YES"], ["No, yes", "It is", "yesterday"]),
        ("yes or no", False, ["No", "no, never"], ["Yes", "not", "nothing"]),
        ("upper case", None, ["HONEY.", "BEES MAKE HONEY 3"], ["Honey", "honey", "123"]),
        ("lower case", None, ["honey.", "they make it"], ["Honey", "HONEY", "1 + 2"]),
        ("number", 7, ["7", "3 + 4 = 7.", "It is 7!", "7.0"], ["8", "7 or 8", "17", "seven", "7.5"]),
        ("lines", 3, ["a\nb\nc", "a\n\nb\nc\n"], ["a\nb", "a b c", "a\nb\nc\nd"]),
        ("full stop", "horse", ["A horse runs.", "The Horse. "], ["A horse runs", "It runs.", "A horse?"]),
        ("question", "horse", ["Where is the horse?"], ["Where is it?", "The horse.", "horse? Yes."]),
        ("repeats", ("dog", 2), ["dog dog", "Dog, dog."], ["dog", "dog dog dog", "dogs dogs"]),
        ("at most", ("dog", 4), ["A dog runs fast.", "dog"], ["It runs.", "A dog is not a cat."]),
        (
            "JSON list",
            2,
            ['["a", "b"]', '[ "a",\n"b" ]'],
            ['["a"]', "[1, 2]", "a, b", '{"a": "b", "c": "d"}', '["a", ""]'],
        ),
    ],
)
def test_checks(check, argument, right, wrong):
    for text in right:
        assert abilities.CHECKS[check](text, argument), text
    for text in wrong:
        assert not abilities.CHECKS[check](text, argument), text


def test_kept():
    assert abilities.kept([True, True, False, True], [True, False, True, True]) == pytest.approx(2 / 3)
    assert abilities.kept([True, False], [True, False]) == 1.0
    assert abilities.kept([True, False], [False, True]) == 0.0
    with pytest.raises(ValueError, match="nothing was right before"):
        abilities.kept([False, False], [True, True])
    with pytest.raises(ValueError, match="2 results before and 1 after"):
        abilities.kept([True, True], [True])


def test_measures(model, tokenizer):
    text = "for i in range(10):\n    print(i)  # naïve: ten lines\n"
    ids = tokenizer(text)["input_ids"]
    half = len(ids) // 2
    windows = torch.tensor([ids[:half], ids[half : 2 * half]])
    nats, hits, size = 0.0, 0, 0
    for row in windows.tolist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row], device=model.device)).logits[0].double().cpu()
        for position, token in enumerate(row[1:]):
            nats += float(logits[position].logsumexp(0) - logits[position, token])
            hits += int(logits[position].argmax()) == token
        size += len(tokenizer.decode(row).encode()) - len(tokenizer.decode(row[:1]).encode())
    for batch in (1, 16):
        found = abilities.measures(model, windows, tokenizer, batch=batch)
        assert found["loss"] == pytest.approx(nats / (2 * half - 2), rel=1e-5)
        assert found["loss"] == pytest.approx(corpora.evaluate(model, windows, batch=batch), rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found["accuracy"] == hits / (2 * half - 2)
    assert hits > 0


def test_measures_count_no_bytes_of_special_tokens(model, tokenizer):
    end = tokenizer.eos_token_id
    ids = tokenizer("print")["input_ids"]
    windows = torch.tensor([[end, *ids, end]])
    found = abilities.measures(model, windows, tokenizer)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * (len(ids) + 1) / math.log(2) / len("print"))
    with pytest.raises(ValueError, match="special tokens only"):
        abilities.measures(model, torch.tensor([[end, end]]), tokenizer)
    for shape in ((0, 4), (4,), (2, 1)):
        with pytest.raises(ValueError, match=r"expected \[N, S\]"):
            abilities.measures(model, torch.zeros(shape, dtype=torch.long), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_before(model, tokenizer, training):
    seen = []
    model.train(training)
    model.model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    abilities.cloze(model, tokenizer, [("One fact is", "this")])
    abilities.samples(model, tokenizer, ["One"], max_new_tokens=2)
    abilities.measures(model, torch.tensor([[5, 6, 7]]), tokenizer)
    assert set(seen) == {(False, False)}
    assert model.training is training


@pytest.mark.slow
@pytest.mark.cpu("compares with a program that computes there")
def test_the_program(model, tokenizer, tmp_path):
    """With an adapter, each question's result in the JSON."""
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    options = ["--limit", 7, "--json", "--no-instructions", "--adapter", tmp_path / "adapter"]
    done = fresh.run(ROOT / "examples" / "abilities.py", corpora.EMBEDDED_MODEL, *options, folder=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    facts, *samples = map(json.loads, done.stdout.splitlines())
    assert (facts["measure"], facts["of"], len(facts["each"])) == ("facts", 7, 7)
    assert facts["right"] == facts["each"].count("1")
    expected = abilities.samples(adapted, tokenizer, abilities.PROMPTS)
    assert [(row["prompt"], row["text"]) for row in samples] == list(zip(abilities.PROMPTS, expected, strict=True))


def test_the_program_refuses(monkeypatch, capsys):
    command = ["abilities.py", str(corpora.EMBEDDED_MODEL)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="no chat template"):
        abilities.main()
    monkeypatch.setattr(sys, "argv", [*command, "--limit", "0"])
    with pytest.raises(SystemExit):
        abilities.main()
    assert "--limit 0: expected at least 1" in capsys.readouterr().err
