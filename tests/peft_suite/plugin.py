"""The pytest plugin: puts our rows in the suite's matrices, leaves out what has none of ours, and counts.

No test's body is touched.
"""

from collections import Counter
from pathlib import Path

import pytest

from peft_suite import cases


class Suite:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(passed=0, skipped=0, failed=0, inapplicable=0, deselected=0)
        self.skipped: Counter[str] = Counter()
        self.inapplicable: Counter[str] = Counter()
        self.failures: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        file = Path(metafunc.module.__file__ or "").stem
        test_class = metafunc.cls.__name__ if metafunc.cls else ""
        for owner in (metafunc.definition, metafunc.definition.parent):
            for place, mark in enumerate(owner.own_markers if owner is not None else ()):
                if mark.name != "parametrize":
                    continue
                names = mark.args[0]
                names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
                if (rows := cases.rows(file, test_class, names)) is not None:
                    owner.own_markers[place] = pytest.mark.parametrize(mark.args[0], rows).mark

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        for item in items:
            arguments = getattr(getattr(item, "callspec", None), "params", {}).values()
            reason = next((why for name, why in cases.INAPPLICABLE.items() if name in item.nodeid), None)
            ours = any(map(cases.is_ours, arguments))
            if ours and reason is not None:
                self.inapplicable[f"{item.originalname}: {reason}"] += 1
            (kept if ours and reason is None else left).append(item)
        self.counts["inapplicable"] += self.inapplicable.total()
        self.counts["deselected"] += len(left) - self.inapplicable.total()
        items[:] = kept
        config.hook.pytest_deselected(items=left)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)
        elif report.skipped:
            where = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped[str(where).removeprefix("Skipped: ")] += 1
