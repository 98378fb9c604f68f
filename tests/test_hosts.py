"""Names that other packages do not promise stand in the files called `host` and nowhere else."""

import importlib
import inspect
import pkgutil
import shutil

import pytest

import host_names
import peft_pcgrow

# a name of each kind, and how it gets into a file
BREACHES = {
    "an import": "from transformers.integrations.moe import _grouped_linear\n",
    "a module": "from peft.tuners._buffer_dict import BufferDict\n",
    "an attribute": "def f(config):\n    return config._commit_hash\n",
    "by getattr": "def f(model):\n    return getattr(model, '_no_split_modules', None)\n",
}


@pytest.mark.slow
def test_all_are_listed():
    assert list(host_names.unlisted(host_names.PACKAGE)) == []


@pytest.mark.slow
@pytest.mark.parametrize("breach", BREACHES)
def test_others_are_found(breach, tmp_path):
    copy = tmp_path / "peft_pcgrow"
    shutil.copytree(host_names.PACKAGE, copy)
    file = copy / "gates" / "gate.py"
    file.write_text(file.read_text() + BREACHES[breach])
    assert list(host_names.unlisted(copy))


def test_what_is_overridden_is_listed():
    """Methods behind an underscore that a class of ours has in the place of its base class's."""
    known = set().union(*map(host_names.listed, host_names.HOSTS))
    made = {"_abc_impl", "_backward_cls", "_is_protocol"}  # by metaclasses
    for module in map(importlib.import_module, modules()):
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__:
                theirs = {
                    name
                    for base in kind.__mro__[1:]
                    if not base.__module__.startswith("peft_pcgrow")
                    for name in vars(base)
                }
                assert {n for n in vars(kind) if host_names.private(n)} & theirs <= known | made, kind


def modules():
    return [found.name for found in pkgutil.walk_packages(peft_pcgrow.__path__, "peft_pcgrow.")]
