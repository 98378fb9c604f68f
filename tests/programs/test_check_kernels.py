"""Kernels compile for a GPU where there is none: the interpreter takes what the compiler refuses."""

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pcgrow_kernels
from kernel_runs import needs_triton
from pcgrow_kernels.dispatch import Kernel

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles(tmp_path):
    modules = [import_module(f"pcgrow_kernels.{m.name}") for m in pkgutil.iter_modules(pcgrow_kernels.__path__)]
    names = {value.function.__name__ for module in modules for value in vars(module).values() if type(value) is Kernel}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "examples" / "check_kernels.py"), "--compile", "90"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert names
    assert {line.split(":")[0].strip() for line in run.stdout.splitlines() if ":" in line} == names
