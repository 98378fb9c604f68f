"""The programs of the README and the guides run as printed; the first command is the quickstart of the repository."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator, set_seed

import fresh
from peft_pcgrow import measure_errors
from tiny import build, domain, logits, retain, tokens

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


GUIDES = ROOT / "examples" / "guides"
EMBEDDED = ROOT / "examples" / "embedded-moe"
# what must be there when a guide's program has run
WRITTEN = {
    "compress": "compressed/model.safetensors",
    "deepen": "deepened/adapter_model.safetensors",
    "grow": "grown/adapter/adapter_model.safetensors",
    "locate": None,
    "measure": "map.html",
    "ship": "merged/model.safetensors",
    "spawn": "spawned/adapter_model.safetensors",
}


def block(language: str, after: str, page: str = README) -> str:
    found = re.search(rf"{re.escape(after)}\s*```{language}\n(.*?)```", page, re.DOTALL)
    assert found, f"no {language} block after {after!r}"
    return found.group(1)


@pytest.mark.slow
def test_program_of_the_readme(tmp_path, monkeypatch):
    """Only the model's path and the data, which the README leaves to the reader, are filled in."""
    build("olmoe").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    program = block("python", "<!-- program -->")
    program = program.replace('"allenai/OLMoE-1B-7B-0924"', repr(str(tmp_path / "model")))
    assert str(tmp_path / "model") in program
    (tmp_path / "program.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        "from tiny import tokens\n"
        "from transformers import TrainingArguments, default_data_collator\n"
        "domain_batches = [tokens(4, 16, seed) for seed in range(3)]\n"
        "train_dataset = [{'input_ids': row, 'labels': row} for row in tokens(16, 16)]\n"
        "collator = default_data_collator\n"
        "args = TrainingArguments('out', max_steps=2, report_to='none', use_cpu=True, learning_rate=1e-3)\n" + program
    )
    done = fresh.run(tmp_path / "program.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Error map of olmoe" in done.stdout
    assert "trainable params" in done.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "grown" / "adapter_model.safetensors").is_file()


def test_commands_of_the_readme():
    first, second = block("bash", "<!-- run command -->"), block("bash", "<!-- test command -->")
    assert len(first.strip().splitlines()) == len(second.strip().splitlines()) == 1
    assert first.strip().endswith("python examples/quickstart.py")
    assert (ROOT / "examples" / "quickstart.py").is_file()
    assert "pytest" in second


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", "examples/RESULTS.md"]
    + [f"examples/guides/{guide.name}" for guide in sorted(GUIDES.glob("*.md"))]
)  # fmt: skip
def test_links(page):
    """Every link within the repository leads to a file, and to a heading of it if it names one."""
    path = ROOT / page
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    targets = [target for target in targets if "://" not in target]
    assert targets or page == "tests/README.md"
    for target in targets:
        name, _, heading = target.partition("#")
        led = (path.parent / name).resolve() if name else path
        assert led.exists(), target
        assert not heading or heading in anchors(led), target


def test_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_spawn_program_of_the_readme(tmp_path, monkeypatch):
    """Again only the model and the data are filled in."""
    monkeypatch.chdir(tmp_path)
    program = block("python", "<!-- program -->")
    imports = "".join(line + "\n" for line in program.splitlines() if line.startswith(("from ", "import ")))
    filled = {
        "model": build("olmoe"),
        "domain_batches": [domain(16, 24, seed) for seed in range(2)],
        "retain_batches": [retain(16, 24, seed) for seed in range(2)],
        "train_dataset": [{"input_ids": row, "labels": row} for row in domain(16, 24)],
        "collator": default_data_collator,
        "args": TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True, learning_rate=1e-3),
    }
    exec(imports + block("python", "<!-- spawn program -->"), filled)
    assert filled["model"].peft_config["default"].gate_fpr == 0.05
    assert (tmp_path / "spawned" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_compress_program_of_the_readme(tmp_path, monkeypatch):
    """Once more only the model and the data are filled in."""
    monkeypatch.chdir(tmp_path)
    model, batches = build("olmoe"), [retain(16, 24, seed) for seed in range(2)]
    filled = {"model": model, "emap": measure_errors(model, [domain(16, 24)]), "retain_batches": batches}
    exec(block("python", "<!-- compress program -->"), filled)
    report = filled["report"]
    assert report.bytes_after <= 0.35 * report.bytes_before or report.stopped
    assert max(after - before for before, after in zip(report.before, report.after, strict=True)) <= 0.02
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")), logits(filled["model"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that reads the embedded one's tokens and is much smaller."""
    folder = tmp_path_factory.mktemp("small")
    set_seed(0)
    build("qwen3_moe", vocab_size=4096).save_pretrained(folder)
    for file in EMBEDDED.glob("token*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("guide", sorted(WRITTEN))
def test_program_of_a_guide(guide, small, tmp_path, monkeypatch, capsys):
    """Only the model is another one."""
    monkeypatch.chdir(tmp_path)
    program = block("python", "<!-- program -->", (GUIDES / f"{guide}.md").read_text())
    assert program.count('"examples/embedded-moe"') == 1
    exec(program.replace('"examples/embedded-moe"', repr(str(small))), {})
    assert WRITTEN[guide] is None or (tmp_path / WRITTEN[guide]).is_file()
    assert guide != "ship" or capsys.readouterr().out == "True\n"


def test_guides_have_programs():
    """But for the list of limits."""
    assert {guide.stem for guide in GUIDES.glob("*.md")} == {*WRITTEN, "limits"}


@pytest.mark.slow
def test_quickstart(tmp_path):
    """The main job on the embedded default, cut short: it must already learn, and keep every promise that is exact."""
    short = ["--steps", 16, "--lr", 0.02, "--eval-windows", 16, "--length", 96]
    program = ROOT / "examples" / "quickstart.py"
    done = fresh.run(program, "--json", "--out", tmp_path / "out", *short, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    row = json.loads(line)
    assert row["domain_loss_after"] < row["domain_loss_before"] - 0.1
    assert row["reload_max_abs_diff"] == 0
    assert row["merge_max_abs_diff"] < 1e-4
    assert row["base_bit_identical"] is True
    assert 0 < row["trained_parameters"] < row["total_parameters"]
    assert Path(tmp_path / row["map_png"]).is_file()


def test_embedded_model_fits_its_promise():
    """Under 10 MB, safetensors, a real MoE that transformers loads without code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "examples" / "embedded-moe"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    assert (folder / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_experts >= 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def main():\n    return None\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with torch.no_grad():
        assert model(input_ids=tokens(1, 8)).logits.isfinite().all()
