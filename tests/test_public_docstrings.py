"""Docstrings of the public names: each has an example that runs, and a line of its own for each argument.

What examples find around them is explained in the package's own docstring; `given` builds it.
"""

import dataclasses
import doctest
import inspect
import re
from types import FunctionType, ModuleType
from typing import Any, NoReturn

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import peft_pcgrow
from peft_pcgrow import compress
from tiny import build, domain, retain

PUBLIC = {name: getattr(peft_pcgrow, name) for name in peft_pcgrow.__all__}
PUBLIC |= {f"compress.{name}": getattr(compress, name) for name in compress.__all__}


def given(folder) -> dict[str, Any]:
    """The names that examples know."""
    model, batches = build(), [domain(16, 24, seed) for seed in range(2)]
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.cat(batches)]
    return {
        **{name: public for name, public in PUBLIC.items() if "." not in name},
        **{"torch": torch, "get_peft_model": get_peft_model, "folder": folder},
        **{"model": model, "batches": batches, "retain": [retain(16, 24, seed) for seed in range(2)]},
        "trainer": Trainer(model, args, train_dataset=rows),
    }


def example_of(name: str, public: Any, names: dict[str, Any]) -> doctest.DocTest:
    """The lines below `Example:`, which must be there and expect something of what they compute."""
    _, heading, example = (public.__doc__ or "").partition("Example:\n")
    assert heading, f"{name} has no example in its docstring"
    test = doctest.DocTestParser().get_doctest(example, names, name, None, None)
    assert any(step.want for step in test.examples), f"the example of {name} expects nothing"
    return test


def run(test: doctest.DocTest) -> None:
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False), []
    assert not runner.run(test, out=said.append).failed, "".join(said)


@pytest.mark.cpu("examples name no device")
@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, tmp_path):
    run(example_of(name, PUBLIC[name], given(tmp_path)))


def planted(public: FunctionType, old: str, new: str) -> FunctionType:
    """A copy of a function with another docstring."""
    copy = FunctionType(public.__code__, public.__globals__)
    assert public.__doc__.count(old) == 1
    copy.__doc__ = public.__doc__.replace(old, new)
    return copy


def test_what_is_wrong_with_an_example_is_found():
    choose, names = peft_pcgrow.choose, {"choose": peft_pcgrow.choose, "torch": torch}
    run(example_of("choose", choose, dict(names)))
    with pytest.raises(AssertionError, match="choose has no example"):
        example_of("choose", planted(choose, "Example:", "For instance:"), names)
    with pytest.raises(AssertionError, match="choose has no example"):
        example_of("choose", planted(choose, choose.__doc__, ""), names)
    with pytest.raises(AssertionError, match="choose expects nothing"):
        example_of("choose", planted(choose, "        Locus({1: (1,), 3: (0,)})\n", ""), names)
    for other in (("(1, 3)", "(1, 4)"), ("choose(torch", "chose(torch")):
        with pytest.raises(AssertionError, match="Failed example"):
            run(example_of("choose", planted(choose, *other), dict(names)))


# ---- arguments


def arguments(public: Any) -> list[str]:
    """The arguments of a function or a class, or a data class' fields, but for those that are gone or set by PEFT."""
    if dataclasses.is_dataclass(public):
        inherited = {field.name for field in dataclasses.fields(PeftConfig)} if issubclass(public, PeftConfig) else ()
        return [
            field.name
            for field in dataclasses.fields(public)
            if not field.name.startswith("_")
            and field.name not in inherited
            and not re.search(r"Set (on creation|by )", field.metadata.get("help", ""))
        ]
    found = inspect.signature(public).parameters.values()
    return [p.name for p in found if p.annotation is not NoReturn]


def undocumented(public: Any) -> list[str]:
    """Arguments without a line of their own below `Args:` or `Attributes:`."""
    text = public.__doc__ or ""
    return [name for name in arguments(public) if not re.search(rf"^ +\**`?{name}`?( \(.+\))?:", text, re.MULTILINE)]


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if not isinstance(public, ModuleType)])
def test_arguments_have_a_line_each(name):
    assert undocumented(PUBLIC[name]) == []
    assert inspect.isclass(PUBLIC[name]) or "Raises:" in PUBLIC[name].__doc__


def test_an_argument_without_a_line_is_found():
    def one(x, y):
        """Args:
        x, y: numbers.
        """

    def two(x, y):
        """Args:
        x (int): a number. y: another.
        """

    assert undocumented(one) == ["x", "y"]
    assert undocumented(two) == ["y"]
