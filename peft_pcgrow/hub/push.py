"""Push what was grown to the Hub: small, with a card that says what is known of it."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from peft.utils import CONFIG_NAME
from torch import nn

from peft_pcgrow.adapter.model_card import CARD, PICTURE, folder_of
from peft_pcgrow.adapter.sealed_file import SealedFile
from peft_pcgrow.compress.shrink import shrink_adapter
from peft_pcgrow.files import write_whole
from peft_pcgrow.hub.contents import Grown, find_grown, write_card
from peft_pcgrow.hub_access import LOGIN, check_repo, is_on_hub, plain_errors
from peft_pcgrow.maps.batches import IGNORED, Batch, losses, read_batches
from peft_pcgrow.rounds.load import load_grown
from peft_pcgrow.say import say

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# files of an earlier push that this one has not
OURS = re.compile(rf"round-\d+/.*|{re.escape(PICTURE)}")


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo: its name. commit: its hash; None: nothing was sent. url: of that commit.
        files: bytes of each. card: the text of README.md.
        stored: how the banks are held, and what that costs, in words.
        loss_before, loss_after: of the held-out text with the adapters as they were and as they are shipped, nats per
            token; None where none was given.

    Example:
        >>> get_peft_model(model, PCGrowConfig(locus={1: [0, 4]})).save_pretrained(folder / "adapter")
        >>> push(folder / "adapter", "me/medicine", dry_run=True).commit is None  # nothing was sent
        True
    """

    repo: str
    commit: str | None
    url: str | None
    files: Mapping[str, int]
    card: str
    stored: str
    loss_before: float | None = None
    loss_after: float | None = None

    def __str__(self) -> str:
        lines = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        done = f"{self.repo} is at commit {self.commit}: {self.url}" if self.commit else f"nothing sent to {self.repo}"
        return "\n".join([*lines, f"{sum(self.files.values()):>14,}  bytes in all", self.stored, done])

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def push(
    folder: str | Path,
    repo: str,
    *,
    dtype: str = "bfloat16",
    shrink: float | None = None,
    model: nn.Module | None = None,
    heldout: Any = None,
    base: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Send what was grown to the Hub, in one commit, with a card. The folder stays as it is.

    Banks are sent in 16 bit, which halves them: over a base that is loaded in the same 16 bit they compute the same
    bits, since they are cast to the base's dtype anyway; otherwise the card says how far they are rounded.
    Gates, LoRA and further modules are sent as they are. A call that broke off is made again: it sends only files that
    are not there yet. `load_grown(base, repo)` loads it, and PEFT's loaders do where there is one adapter.

    Args:
        folder: of an adapter, or of a run of `grow`, whose numbers then stand on the card.
        repo: "owner/name"; made if it is not there.
        dtype: of the banks: "bfloat16", "float16", or "float32" for what trains on exactly.
        shrink: instead, banks in so few bits (8, 4, 3 or 2), or to this share of their bytes in 16 bit (see
            `compress.shrink_adapter`); they can then no longer be trained. Needs `model`.
        model: the base, without adapters, and so again afterwards; for `shrink` and `heldout` only.
        heldout: text of the domain, as for `measure_errors`, to measure what was lost on.
        base: name of the base on the Hub, where it was loaded from a folder.
        private: whether a new repository is.
        revision: branch to push to, made if it is not there; None: main.
        token: of the Hub; None: that of `hf auth login`.
        dry_run: send nothing, and say what would be sent.

    Returns:
        Files, bytes, card, commit, and what was lost.

    Raises:
        FileNotFoundError: no adapter in the folder. ValueError: files of it that are missing, cut short or altered, no
            name of a repository, a dtype or shrink= that is none, model= missing, or a repository that is public where
            private=True.
        PermissionError: not logged in, or not allowed. ConnectionError: the Hub was not reached, or broke off.

    Example:
        >>> get_peft_model(model, PCGrowConfig(locus={1: [0, 4]})).save_pretrained(folder / "adapter")
        >>> list(push(folder / "adapter", "me/medicine", dry_run=True).files)
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    check_repo(repo)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: banks are sent in {', '.join(DTYPES)}")
    if base is not None:
        check_repo(base)
    if model is None and (shrink is not None or heldout is not None):
        needs = "shrink=" if shrink is not None else "heldout="
        raise ValueError(f"{needs} needs the base that the adapters grew on: give model=")
    grown = find_grown(folder)
    with tempfile.TemporaryDirectory(prefix="pcgrow-push-") as made:
        staging = Path(made)
        if (grown.folder / CARD).is_file():
            shutil.copy(grown.folder / CARD, staging)
        read = None if model is None or heldout is None else _read(model, heldout)
        if shrink is None:
            stored, before, after = _rounded(grown, dtype, staging), None, None
            if model is not None and read is not None:
                before, after = (_loss(model, each, list(grown.places), read) for each in (grown.folder, staging))
        else:
            stored, before, after = _shrunk(model, grown, shrink, read, staging)  # type: ignore[arg-type]
        if after is not None:
            stored += f" Held-out loss {before:.4f} before that and {after:.4f} after, nats per token."
        if base is None and not is_on_hub(grown.base[0]):
            say(f"pcgrow: the base is noted as {grown.base[0]}, which nobody else has: give its name on the Hub, base=")
        if base is not None:
            for path in staging.rglob(CONFIG_NAME):
                held = json.loads(path.read_text()) | {"base_model_name_or_path": base, "revision": None}
                write_whole(path, json.dumps(held, indent=2, sort_keys=True).encode())
        when = "These were measured before this: " if grown.journal is not None else ""
        card = write_card(grown, staging, f"{grown.measured}\n{when}{stored}\n", repo)
        files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        commit = None if dry_run else _send(repo, files, private, revision, token)
    url, oid = (None, None) if commit is None else (str(commit.commit_url), str(commit.oid))
    return Pushed(repo, oid, url, sizes, card, stored, before, after)


def _rounded(grown: Grown, dtype: str, staging: Path) -> str:
    worst = 0.0
    for name, place in grown.places.items():
        target = folder_of(staging, name)
        held, error = SealedFile.read(place).rounded(DTYPES[dtype])
        held.write(target)
        shutil.copy(place / CONFIG_NAME, target)
        worst = max(worst, error)
    if not worst:
        return f"Banks are held in {dtype} or less, without loss."
    return (
        f"Banks are rounded to {dtype}, the most of any by {worst:.3%} of its norm; over a base in {dtype}, where they "
        "are computed in that anyway, nothing is lost."
    )


def _shrunk(
    model: nn.Module, grown: Grown, shrink: float, read: list[Batch] | None, staging: Path
) -> tuple[str, float | None, float | None]:
    option: dict[str, Any] = {"target": shrink} if isinstance(shrink, float) and shrink <= 1 else {"bits": shrink}
    for place in grown.places.values():
        SealedFile.read(place)
    loaded: Any = load_grown(model, grown.folder, list(grown.places))
    try:
        before = None if read is None else losses(loaded, [read])[0]
        reports = {name: shrink_adapter(loaded, name, **option) for name in grown.places}
        after = None if read is None else losses(loaded, [read])[0]
        loaded.save_pretrained(str(staging))
    finally:
        loaded.unload()
    told = "; ".join(f"{name}: {report.form}, deltas off by {report.error:.1%}" for name, report in reports.items())
    return f"Banks are shrunk to what they add to the base ({told}), and cannot be trained.", before, after


def _read(model: nn.Module, heldout: Any) -> list[Batch]:
    read = list(read_batches(model, heldout))
    if not any(bool((target[:, 1:] != IGNORED).any()) for _, target, _ in read):
        raise ValueError("heldout holds no token to predict: give texts of 2 tokens or more, or leave it out")
    return read


def _loss(model: nn.Module, folder: Path, names: list[str], read: list[Batch]) -> float:
    loaded: Any = load_grown(model, folder, names)
    try:
        return losses(loaded, [read])[0]
    finally:
        loaded.unload()


def _send(repo: str, files: Mapping[str, Path], private: bool | None, revision: str | None, token: str | None) -> Any:
    if (token or get_token()) is None:
        raise PermissionError(f"nobody is logged in to the Hub on this machine: {LOGIN}")
    api = HfApi(token=token)
    with plain_errors(repo):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            raise ValueError(f"{name} is there already, and public: leave out private, or give another repository")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        gone = [path for path in api.list_repo_files(name, revision=revision) if OURS.fullmatch(path)]
        return api.create_commit(
            name,
            [CommitOperationAdd(path, file) for path, file in files.items()]
            + [CommitOperationDelete(path) for path in gone if path not in files],
            commit_message="Grown experts, by peft_pcgrow",
            revision=revision,
        )
