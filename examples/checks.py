"""Comparisons that fail with one line: what was measured, and what was allowed."""

from torch import Tensor


class Departure(AssertionError):
    """An operation ran and gave something else than it should."""


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:297]}..."
    return shown if isinstance(error, Departure) else f"{type(error).__name__}: {shown}"


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Departure(what)


def check_same(got: Tensor, want: Tensor, what: str) -> None:
    """Equal bits."""
    check(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    different = int((got != want).sum())
    largest = float((got.double() - want.double()).abs().max())
    check(different == 0, f"{what}: {different} of {want.numel()} values differ, by up to {largest:.2g}")


def check_close(got: Tensor, want: Tensor, allowed: float, what: str) -> None:
    check(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    scale = want.double().square().mean().sqrt()
    error = float((got.double() - want.double()).square().mean().sqrt() / scale.clamp_min(1e-300))
    check(error <= allowed, f"{what}: relative error {error:.2g}, allowed {allowed:.0e}")
