"""The rules of the code base: floors of imports, public names, file sizes, what the wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import floors
import fresh

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "peft_pcgrow", ROOT / "kernels" / "pcgrow_kernels"
# of a file of the library, of a test or script, of the library altogether
# in all: 860 of it are expert parallelism, maps of sharded models and the plan of each process
LINES, OTHERS, TOTAL = 350, 404, 26570
# a breach of each kind: file, text to find there (None: a new file), and what stands there instead
BREACHES = {
    "peft in maps": ("maps/measure.py", "import torch\n", "import peft\nimport torch\n"),
    "transformers in settling": ("settling/layer_stack.py", "import torch\n", "import torch\nimport transformers\n"),
    "an import inside a function": ("gates/gate.py", None, "def f():\n    from peft import PeftModel\n"),
    "upward": ("gates/gate.py", None, "from peft_pcgrow.maps import measure\n"),
    "upward, a name": ("settling/relax.py", None, "from peft_pcgrow.adapter.layer import PCGrowExperts\n"),
    "upward, the package": ("locus.py", None, "from peft_pcgrow import ErrorMap\n"),
    "a circle": ("locus.py", None, "from peft_pcgrow import say\n"),
    "a room without a floor": ("cellar/wine.py", None, "import torch\n"),
    "a new public name": ("__init__.py", '    "Diagnosis",\n', '    "Diagnosis",\n    "Locus2",\n'),
    "a removed public name": ("__init__.py", '    "sample_text",\n', ""),
    "a public name not imported": ("__init__.py", "from peft_pcgrow.maps.sample import sample_text\n", ""),
}


@pytest.mark.slow
def test_floors_and_public_names():
    assert floors.problems(PACKAGE) == []
    assert floors.kernels(KERNELS) == []


@pytest.mark.slow
@pytest.mark.parametrize("breach", BREACHES)
def test_floors_guard(breach, tmp_path):
    """Each kind of breach, planted in a copy, is found."""
    package = tmp_path / "peft_pcgrow"
    shutil.copytree(PACKAGE, package)
    name, old, new = BREACHES[breach]
    if breach == "a circle":
        (package / "say.py").write_text("from peft_pcgrow import locus\n" + (package / "say.py").read_text())
    path = package / name
    path.parent.mkdir(exist_ok=True)
    source = path.read_text() if path.exists() else ""
    assert old is None or source.count(old) == 1
    path.write_text(source.replace(old, new) if old else new + source.replace("from __future__ import annotations", ""))
    assert floors.problems(package), breach


@pytest.mark.slow
def test_tensors_are_made_on_a_device():
    """Each says on which: torch.set_default_device is the user's, and their model may be elsewhere."""
    makers = {"zeros", "ones", "empty", "full", "arange", "tensor", "as_tensor", "rand", "randn", "randint", "eye"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                named = {keyword.arg for keyword in node.keywords}
                if getattr(node.func.value, "id", None) == "torch" and not named & {"device", None}:
                    wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong, wrong


def test_folder_kernels_shadows_nothing():
    """Hugging Face publishes a package `kernels` that transformers imports."""
    roots = [ROOT / "kernels", ROOT / "tests" / "kernels", ROOT / "tests" / "peft", ROOT / "tests"]
    assert not [root for root in roots if (root / "__init__.py").exists()]


def test_files_stay_short():
    sources = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    lines = {path: len(path.read_text().splitlines()) for path in sources}
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert not [path for path in sources if lines[path] > LINES]
    assert not [path for path in others if len(path.read_text().splitlines()) > OTHERS]
    assert sum(lines.values()) <= TOTAL


def test_no_vague_names():
    vague = re.compile(r"util|helper|common|misc|manager|_v\d")
    assert not [path.name for path in ROOT.glob("*/**/*.py") if vague.search(path.stem) and ".venv" not in str(path)]


@pytest.mark.slow
def test_importing_registers_and_costs_little():
    """`import peft_pcgrow` makes PEFT know the method, twice is harmless, and no heavy optional package comes along."""
    code = (
        "import sys, peft;"
        "optional = {'matplotlib', 'bitsandbytes', 'triton', 'datasets'};"
        "plain = optional & set(sys.modules);"
        "import peft_pcgrow;"
        "assert optional & set(sys.modules) == plain, optional & set(sys.modules);"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m;"
        "from peft_pcgrow.adapter.register import register;"
        "register(peft_pcgrow.PCGrowConfig, peft_pcgrow.PCGrowModel);"
        "assert m[peft.PeftType('PCGROW')] is peft_pcgrow.PCGrowModel;"
        "assert list(peft.PeftType).count('PCGROW') == 1"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_oldest_versions_are_the_ones_allowed():
    """What is installed for the tests of the oldest versions are the lower bounds, but torch, whose builds differ."""
    project, pinned = (ROOT / "pyproject.toml").read_text(), (ROOT / ".ci" / "oldest.txt").read_text()
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        (allowed,) = re.findall(rf'"{name}>=([\d.]+)[,"]', project)
        (oldest,) = re.findall(rf"^{name}==([\d.]+)$", pinned, re.MULTILINE)
        assert oldest == f"{allowed}.0"


@pytest.mark.slow
def test_wheel_holds_both_packages(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.suffix in (".py", ".html", ".typed")}
    expected |= {p.relative_to(ROOT / "kernels").as_posix() for p in KERNELS.rglob("*.py")}
    assert expected <= held
    outside = {name.split("/")[0] for name in held} - {"peft_pcgrow", "pcgrow_kernels"}
    assert all(name.endswith(".dist-info") for name in outside)
    assert any(name.endswith("licenses/LICENSE") for name in held)
