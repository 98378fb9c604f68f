"""What a run leaves in its folder, and how an interrupted one goes on.

    journal.json           what was asked, losses before, each round that ended, what all took, and why the run ended
    retain.safetensors     retain text that the model wrote itself
    rounds/N/map/          the error map of round N; decision.json: what it led to, followed if it is there before;
    rounds/N/rate.json     the learning rate that was found; training/: the Trainer's checkpoints, until the round ends
    .lock                  held by the process that runs
    adapter/               what was grown and kept: the first adapter, and those of later rounds in round-N/

Every file appears whole or not at all, so a run that was killed anywhere goes on from what it finds.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_pcgrow.files import write_whole
from peft_pcgrow.rounds.texts import RETAIN

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

JOURNAL, WRITTEN, ADAPTER, LOCK = "journal.json", "retain.safetensors", "adapter", ".lock"
# of losses, that of the domain's held-out text; those of retain text are under RETAIN
HELDOUT = "heldout"
FORMAT = 1
# of what is read from a file
KINDS = {"asked": dict, "before": dict, "ended": str, "spent": dict}


@dataclass(frozen=True)
class Round:
    """A round that has ended.

    Attributes:
        number: from 1. adapter: its name. growth, why: as decided (see `RoundDecision`); nodes: how many grew.
        kept: whether it was; outcome: why (not).
        lr: learning rate; steps: of training, up to the best look; looks: (step, held-out loss).
        gate_fpr: that its gates were set to; None: it has none.
        heldout, retain: losses afterwards, of what was tried if it was not kept; nats per token. retain: None without
            retain text.
        parameters: that trained. seconds: by phase. retained: losses of each retain text that has a name, by
            `key_of` that.
    """

    number: int
    adapter: str
    growth: str
    why: str
    nodes: int
    kept: bool
    outcome: str
    lr: float
    steps: int
    looks: list[list[float]]
    gate_fpr: float | None
    protect: float
    heldout: float
    retain: float | None
    parameters: int
    seconds: dict[str, float]
    retained: dict[str, float] = field(default_factory=dict)


def key_of(name: str) -> str:
    """What the loss of a retain text that has a name is called among losses."""
    return f"{RETAIN}[{name}]"


def risen(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By how much the loss of each retain text rose, by its name."""
    named = {key: key.removeprefix(f"{RETAIN}[")[:-1] for key in after if key.startswith(f"{RETAIN}[")}
    named = named or {key: key for key in after if key == RETAIN}
    return {name: after[key] - before[key] for key, name in named.items()}


def listed(rises: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rise:+.3f}" for name, rise in rises.items())


@dataclass
class Journal:
    """The state of a run.

    Attributes:
        asked: what must agree for going on: arguments, digests of the texts, what tells the base from others.
        before: losses of the base by text. ended: why the run did; "": it has not.
        spent: what was taken (see `energy`) before the rounds, "0", and in each; by a map after the last one, as by the
            one that would follow.
    """

    folder: Path
    asked: dict[str, Any]
    before: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    ended: str = ""
    spent: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    format: int = FORMAT

    def save(self) -> None:
        held = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_whole(self.folder / JOURNAL, (json.dumps(held, indent=1) + "\n").encode())

    def keep(self) -> None:
        """Save, in the middle of a phase; a run is one to go on with once the base's losses are known."""
        if self.before:
            self.save()

    def at(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / "rounds" / str(number)

    @property
    def kept(self) -> list[Round]:
        return [done for done in self.rounds if done.kept]


def check_folder(folder: Path) -> None:
    """Raise FileExistsError if what is there is no run's."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir={str(folder)!r} is a file: give a folder")
    ours = {"rounds", JOURNAL, WRITTEN}
    if folder.is_dir() and not (folder / JOURNAL).exists():
        found = sorted(
            entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name not in ours
        )
        if found:
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds {', '.join(found[:3])} and no {JOURNAL}, so it is no run to go on "
                "with: give a new folder"
            )


def open_journal(folder: Path, asked: Mapping[str, Any]) -> Journal:
    """The journal of a run, new or to go on with.

    Raises:
        ValueError: the folder holds a run of other arguments, texts or another model, or a journal that is none.
    """
    wanted = json.loads(json.dumps(asked))
    if not (folder / JOURNAL).exists():
        return Journal(folder, wanted)
    found = read_journal(folder, "give a new output_dir, or the file as it was")
    for name, then, now in differences(found.asked, wanted):
        raise ValueError(
            f"{folder} holds a run with {name}={then}, and now it is {now}: give the same arguments to go on, or a new "
            "output_dir"
        )
    return found


def read_journal(folder: Path, otherwise: str = "give the file as it was") -> Journal:
    """The journal of a run.

    Args:
        otherwise: what to do where it cannot be read.

    Raises:
        FileNotFoundError: no run is there. ValueError: its journal is none.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {JOURNAL}: give the output_dir of a run of grow")
    try:
        held = json.loads(path.read_text())
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']}, this version reads {FORMAT}")
        found = Journal(
            folder, held["asked"], held["before"], [Round(**each) for each in held["rounds"]], held["ended"],
            held.get("spent", {}),
        )  # fmt: skip
        if wrong := [name for name, kind in KINDS.items() if not isinstance(getattr(found, name), kind)]:
            raise TypeError(f"{wrong[0]} is no {KINDS[wrong[0]].__name__}")
        if not all(type(loss) in (int, float) for loss in found.before.values()):
            raise TypeError("before holds what is no loss")
        for part in found.spent.values():
            if not all(type(each) in (int, float) for held in part.values() for each in held.values()):
                raise TypeError("spent holds what is no number")
        for done in found.rounds:
            _check(done)
            lacks = done.kept and (done.retain is None) == (RETAIN in found.before)
            if lacks or done.retained.keys() - found.before.keys():
                raise TypeError(f"round {done.number} has losses of other texts than there were before")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {otherwise}") from None
    return found


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ: names of keys, joined by dots, and both values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            inner = f"{name}.{key}" if name else key
            yield from differences(one.get(key, "(not given)"), other.get(key, "(not given)"), inner)
    elif one != other:
        yield name, one, other


def _check(done: Round) -> None:
    """Raise TypeError if what was read is no round."""
    texts = (done.adapter, done.growth, done.why, done.outcome)
    numbers = (
        done.lr,
        done.protect,
        done.heldout,
        *done.seconds.values(),
        *done.retained.values(),
        *(each for look in done.looks for each in look),
    )
    wholes = (done.number, done.nodes, done.steps, done.parameters)
    maybe = [value for value in (done.gate_fpr, done.retain) if value is not None]
    if not (
        all(isinstance(value, str) for value in texts)
        and all(type(value) in (int, float) for value in (*numbers, *maybe))
        and all(type(value) is int for value in wholes)
        and type(done.kept) is bool
    ):
        raise TypeError(f"a round has fields of another kind: {done}")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process runs in the folder; RuntimeError if one does. It is free again when this one ends,
    however that is."""
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is running here, in {folder}: wait until it ends, or give a new output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
