"""The README's program runs as printed, and its first command is the quickstart of the repository."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

from peft_pcgrow import measure_errors
from tiny import build, domain, logits, retain, tokens

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, after: str) -> str:
    found = re.search(rf"{re.escape(after)}\s*```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no {language} block after {after!r}"
    return found.group(1)


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
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, cwd=tmp_path)
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


def test_links_of_the_readme():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


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
    assert filled["model"].peft_config["default"].gate_fpr == 0.02
    assert (tmp_path / "spawned" / "adapter_model.safetensors").is_file()


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


@pytest.mark.slow
def test_quickstart(tmp_path):
    """The main job on the embedded default, cut short: it must already learn, and keep every promise that is exact."""
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--steps", "16", "--lr", "0.02", "--eval-windows", "16"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
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
