"""The commands. Each prints a table for people, or with --json one object for programs, on standard output; progress
and what is said on the way go to standard error."""

import inspect
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from peft_pcgrow.adapter.model_card import CARD, make_card
from peft_pcgrow.command.corpus_file import read_corpus_file
from peft_pcgrow.command.doctor import check_up, gpu_bytes
from peft_pcgrow.command.fail import Unusable, exit_codes
from peft_pcgrow.command.load import load_config, load_model, usable_device
from peft_pcgrow.command.settings_file import read_settings
from peft_pcgrow.compress import apply, plan
from peft_pcgrow.compress.form_survey import check_target
from peft_pcgrow.files import check_empty
from peft_pcgrow.hub.contents import find_grown, write_card
from peft_pcgrow.hub.push import push as push_grown
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import measure_errors
from peft_pcgrow.rounds.arguments import check_arguments
from peft_pcgrow.rounds.grow import grow as grow_model
from peft_pcgrow.rounds.journal import check_folder
from peft_pcgrow.rounds.texts import by_name, in_batches, windows

app = typer.Typer(
    name="pcgrow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Grow mixture-of-experts models: measure where they err, grow there, compress what has converged.",
    epilog="Exit codes: 0 done, 1 failed on the way, 2 what was given cannot be used, 130 interrupted.",
)
Model = Annotated[str, typer.Argument(help="A model of the Hub, or a folder.")]
Revision = Annotated[str | None, typer.Option(help="Of a model of the Hub.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: the checkpoint's.")
]
Device = Annotated[str, typer.Option(help="auto: a GPU if there is one.")]
Data = Annotated[Path, typer.Option(help="The domain's text: .jsonl (a text a line) or .txt (a text a paragraph).")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows of a batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def show(text: Any, row: dict[str, Any], as_json: bool, stdout: TextIO) -> None:
    print(json.dumps(row, default=str) if as_json else text, file=stdout)


def read_files(**paths: Path | str | None) -> dict[str, Any]:
    """The texts of those that are given, by name; of "self" there are none yet."""
    given = {name: path for name, path in paths.items() if path is not None}
    return {name: path if path == "self" else read_corpus_file(Path(path)) for name, path in given.items()}


def read_retain(paths: list[str]) -> dict[str, Any]:
    """Retain text as `grow` takes it, if there is any; of several files, each by its name."""
    names = [path if path == "self" else Path(path).stem for path in paths]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise Unusable(f"--retain names two texts {again}, by which they are told apart: rename one of the files")
    texts = read_files(**dict(zip(names, paths, strict=True)))
    if len(texts) > 1:
        by_name(texts)  # refuses before anything is loaded
    return {"retain": texts if len(texts) > 1 else next(iter(texts.values()))} if texts else {}


def count_texts(read: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({count_texts(text)})" if isinstance(text, dict)
        else f"{name} {text if text == 'self' else f'{len(text):,} texts'}" for name, text in read.items()
    )  # fmt: skip


def batched(read: dict[str, Any], tokenizer: Any, length: int, size: int) -> dict[str, Any]:
    return {
        name: text if text == "self" else in_batches(windows(text, name, tokenizer, length, size), size)
        for name, text in read.items()
    }


@app.command()
def doctor(
    model: Model,
    budget: Annotated[float, typer.Option(help="Share of the nodes to grow.")] = 0.2,
    nodes: Annotated[str | None, typer.Option(help="routed, shared or dense.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Say what fits: into as many GiB, or a GPU's name (H100).")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that FSDP2 spreads training over.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window in training.")] = 512,
    batch_size: Batch = 8,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what of a model can grow, and what a training step takes by every way; no weight is loaded."""
    with exit_codes() as stdout:
        there = None if gpu is None else gpu_bytes(gpu)
        found = check_up(load_config(model, revision), budget, nodes, batch_size, length, there, ranks=ranks)
        show(found, found.row(), as_json, stdout)


@app.command("map")
def measure(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the map and map.html: new, or one to go on in.")],
    heldout: Annotated[Path | None, typer.Option(help="Text of the domain that nothing is trained on.")] = None,
    retain: Annotated[str | None, typer.Option(help="Text that must not change, or self.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after as many.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure where a model errs on a text: a table, a verdict and pictures. Interrupted, it goes on."""
    with exit_codes(goes_on=True) as stdout:
        read = read_files(batches=data, heldout=heldout, retain=retain)
        if (out / "map").exists() or (out.exists() and not out.is_dir()):
            raise Unusable(f"out {out} {'holds a map already' if out.is_dir() else 'is a file'}: give a new folder")
        loaded, tokenizer = load_model(model, revision, dtype, device)
        given = batched(read, tokenizer, length, batch_size)
        emap = measure_errors(loaded, max_tokens=max_tokens, checkpoint=out / "measuring", **given)
        emap.save(out / "map")
        emap.page(out / "map.html")
        row = {"map": str(out / "map"), **emap.scalars("")}
        show(f"{emap}\n\n{out / 'map'}, {out / 'map.html'}", row, as_json, stdout)


@app.command()
def grow(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run: new, or a run's to go on with.")],
    heldout: Annotated[Path | None, typer.Option(help="Text of the domain that is not trained on.")] = None,
    retain: Annotated[
        list[str] | None, typer.Option(help="Text whose loss must not rise, or self; of several, each one's.")
    ] = None,
    max_forgetting: Annotated[float | None, typer.Option(help="Nats per token that its loss may rise by.")] = None,
    budget: Annotated[float, typer.Option(help="Share of the expert parameters that a round grows.")] = 0.2,
    rounds: Annotated[int, typer.Option(min=1, help="At most.")] = 3,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Of each round, at most.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    config: Annotated[Path | None, typer.Option(help="YAML: arguments of peft_pcgrow.grow; options go before.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and load no weight.")] = False,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Grow a model into a domain, unattended. The same command on the same folder goes on with an interrupted run."""
    with exit_codes(goes_on=True) as stdout:
        names = [name for name in inspect.signature(grow_model).parameters if name not in OF_COMMAND]
        options: dict[str, Any] = {
            "max_forgetting": max_forgetting, "budget": budget, "rounds": rounds, "max_steps": max_steps,
            "length": length, "batch_size": batch_size,
        }  # fmt: skip
        given: dict[str, Any] = options | (read_settings(config, names, OF_COMMAND) if config is not None else {})
        typed = [name for name in options if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
        given = {"map_after": True, **given, **{name: options[name] for name in typed}}
        if revision is not None:
            given["config"] = {**(given.get("config") or {}), "revision": revision}
        check_arguments(given)
        if given["max_forgetting"] is not None and not retain:
            raise Unusable(f"max_forgetting={given['max_forgetting']} is about retain text: give --retain")
        check_folder(out)
        read = read_files(train_on=data, heldout=heldout) | read_retain(retain or [])
        if dry_run:
            usable_device(device)
            step = {"batch": given["batch_size"], "length": given["length"]}
            found = check_up(load_config(model, revision), given["budget"], **step)
            row = {**found.row(), "texts": count_texts(read)}
            show(f"{found}\n{row['texts']}\n{given}", row | {"arguments": given}, as_json, stdout)
            return
        loaded, tokenizer = load_model(model, revision, dtype, device)
        result = grow_model(loaded, read.pop("train_on"), output_dir=out, tokenizer=tokenizer, **read, **given)
        page = out / "growth.html"
        result.page(page, domain=data.stem)
        show(f"{result}\n{page}", result.row() | {"page": str(page)}, as_json, stdout)


# arguments of grow that the command has in another form, or cannot have
OF_COMMAND = {
    "model": "MODEL", "train_on": "--data", "output_dir": "--out", "heldout": "--heldout", "retain": "--retain",
    "tokenizer": None, "callbacks": None, "progress": None,
}  # fmt: skip


@app.command()
def compress(
    model: Model,
    target: Annotated[float, typer.Option(help="Share of the experts' bytes to come out under.")],
    out: Annotated[Path, typer.Option(help="A new folder for the checkpoint.")],
    retain: Annotated[Path | None, typer.Option(help="Text that must stay as it is predicted.")] = None,
    data: Annotated[Path | None, typer.Option(help="The domain's text.")] = None,
    map_folder: Annotated[Path | None, typer.Option("--map", help="A map, in the place of the domain's text.")] = None,
    max_loss_rise: Annotated[float | None, typer.Option(min=0, help="Of any text, nats per token.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Store a model's experts in fewer bytes, where it changes least of what the texts need."""
    with exit_codes() as stdout:
        check_target(target)
        check_empty(out)
        read = read_files(retain=retain, domain=data)
        if not read:
            raise Unusable("compressing is measured on text: give --retain, or --data")
        emap = None if map_folder is None else ErrorMap.load(map_folder)
        loaded, tokenizer = load_model(model, revision, dtype, device)
        texts = batched(read, tokenizer, length, batch_size)
        small: Any
        small, report = apply(loaded, plan(loaded, emap, target=target, **texts), max_loss_rise)
        small.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        show(report, {"out": str(out), "report": str(report)}, as_json, stdout)


Grown = Annotated[Path, typer.Argument(help="A folder of an adapter, or of a run of grow.")]


@app.command()
def card(
    folder: Grown,
    write: Annotated[bool, typer.Option("--write", help="Into README.md beside the adapter, with a picture.")] = False,
    as_json: Json = False,
) -> None:
    """Print the model card of what was grown; what is written by hand in its README.md stays."""
    with exit_codes() as stdout:
        found = find_grown(folder)
        text = write_card(found, found.folder, found.measured) if write else make_card(found.folder, found.measured)
        written = str(found.folder / CARD) if write else None
        show(written or text, {"card": text, "written": written}, as_json, stdout)


@app.command()
def push(
    folder: Grown,
    repo: Annotated[str, typer.Option(help="owner/name on the Hub; made if it is not there.")],
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the banks.")] = "bfloat16",
    shrink: Annotated[float | None, typer.Option(help="Instead: 8, 4, 3 or 2 bits, or a share below 1.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's name on the Hub, where it came from a folder.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Text to measure on what that costs; loads the base.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files, bytes and the card, and send none.")] = False,
    length: Length = 256,
    batch_size: Batch = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Send what was grown to the Hub, in 16 bit and with its card. Broken off, it sends only what is missing."""
    with exit_codes(goes_on=True) as stdout:
        found, read = find_grown(folder), read_files(heldout=heldout)
        given: dict[str, Any] = {}
        if read or shrink is not None:
            name, commit = found.base
            if not name:
                raise Unusable(f"{found.folder} does not name its base, which --shrink and --heldout load")
            given["model"], tokenizer = load_model(name, commit, "auto", device)
            given |= batched(read, tokenizer, length, batch_size)
        if shrink is not None:
            given["shrink"] = int(shrink) if shrink >= 2 and shrink.is_integer() else shrink
        options = {"dtype": dtype, "base": base, "private": private or None, "revision": revision, "dry_run": dry_run}
        done = push_grown(folder, repo, **options, **given)
        show(f"{done.card}\n{done}" if dry_run else done, done.row(), as_json, stdout)


# what follows the script, --help too, is the script's
@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def run(context: typer.Context, script: Annotated[str, typer.Argument(help="A file, or a module.")]) -> None:
    """Run a script with the plugin registered, for tools that cannot import it: pcgrow run SCRIPT ..."""
    sys.argv = [script, *context.args]
    if Path(script).exists():
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    else:
        with exit_codes():
            try:
                found = find_spec(script)
            except ImportError:
                found = None
            if found is None:
                raise Unusable(f"{script} is no file, and no module that can be imported: give the path of a script")
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def main() -> None:
    app()
