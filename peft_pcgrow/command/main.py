"""The commands. Each prints a table for people, or with --json one object for programs, on standard output; progress
and what is said on the way go to standard error."""

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peft_pcgrow.command.corpus_file import read_corpus_file
from peft_pcgrow.command.doctor import check_up
from peft_pcgrow.command.fail import Unusable, exit_codes
from peft_pcgrow.command.load import check_new, load_config, load_model
from peft_pcgrow.command.settings_file import read_settings
from peft_pcgrow.compress import apply, plan
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import measure_errors
from peft_pcgrow.rounds.grow import grow as grow_model
from peft_pcgrow.rounds.texts import in_batches, windows

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
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
Batch = Annotated[int, typer.Option(help="Windows of a batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def shown(text: Any, row: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(row, default=str) if as_json else text)


@app.command()
def doctor(
    model: Model,
    budget: Annotated[float, typer.Option(help="Share of the nodes to grow.")] = 0.2,
    nodes: Annotated[str | None, typer.Option(help="routed, shared or dense.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say what of a model can grow and what that takes; no weight is loaded."""
    with exit_codes():
        found = check_up(load_config(model, revision), budget, nodes)
        shown(found, found.row(), as_json)


@app.command("map")
def measure(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="A new folder: the map, map.png and map.html.")],
    heldout: Annotated[Path | None, typer.Option(help="Text of the domain that nothing is trained on.")] = None,
    retain: Annotated[str | None, typer.Option(help="Text that must not change, or self.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after as many.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure where a model errs on a text: a table, a verdict and pictures. Interrupted, it goes on."""
    with exit_codes():
        texts = {"batches": data, "heldout": heldout, "retain": None if retain in (None, "self") else Path(retain)}
        read = {name: read_corpus_file(path) for name, path in texts.items() if path is not None}
        if (out / "map").exists():
            raise Unusable(f"out {out} holds a map already: give a new folder")
        loaded, tokenizer = load_model(model, revision, dtype, device)
        given: dict[str, Any] = {
            name: in_batches(windows(lines, name, tokenizer, length, batch_size), batch_size)
            for name, lines in read.items()
        }
        given |= {"retain": "self"} if retain == "self" else {}
        emap = measure_errors(loaded, max_tokens=max_tokens, checkpoint=out / "measuring", **given)
        emap.save(out / "map")
        emap.page(out / "map.html")
        shown(f"{emap}\n\n{out / 'map'}, {out / 'map.html'}", {"map": str(out / "map"), **emap.scalars("")}, as_json)


@app.command()
def grow(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run: new, or a run's to go on with.")],
    heldout: Annotated[Path | None, typer.Option(help="Text of the domain that is not trained on.")] = None,
    retain: Annotated[str | None, typer.Option(help="Text whose loss must not rise, or self.")] = None,
    max_forgetting: Annotated[float | None, typer.Option(help="Nats per token that its loss may rise by.")] = None,
    budget: Annotated[float, typer.Option(help="Share of the expert parameters that a round grows.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="At most.")] = 3,
    max_steps: Annotated[int | None, typer.Option(help="Of each round, at most.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    config: Annotated[Path | None, typer.Option(help="YAML with arguments of peft_pcgrow.grow.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and load no weight.")] = False,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Grow a model into a domain, unattended. The same command on the same folder goes on with an interrupted run."""
    with exit_codes():
        names = [name for name in inspect.signature(grow_model).parameters if name not in OF_COMMAND]
        given: dict[str, Any] = {
            "max_forgetting": max_forgetting, "budget": budget, "rounds": rounds, "max_steps": max_steps,
            "length": length, "batch_size": batch_size,
        }  # fmt: skip
        given |= read_settings(config, names) if config is not None else {}
        texts = {"train_on": data, "heldout": heldout, "retain": None if retain in (None, "self") else Path(retain)}
        read: dict[str, Any] = {name: read_corpus_file(path) for name, path in texts.items() if path is not None}
        if dry_run:
            found = check_up(load_config(model, revision), given["budget"])
            count = ", ".join(f"{name} {len(lines):,} texts" for name, lines in read.items())
            shown(f"{found}\n{count}\n{given}", {**found.row(), "texts": count, "arguments": given}, as_json)
            return
        loaded, tokenizer = load_model(model, revision, dtype, device)
        read |= {"retain": "self"} if retain == "self" else {}
        result = grow_model(loaded, read.pop("train_on"), output_dir=out, tokenizer=tokenizer, **read, **given)
        shown(result, result.row(), as_json)


# arguments of grow that the command has in another form, or cannot have
OF_COMMAND = ("model", "train_on", "output_dir", "heldout", "retain", "tokenizer", "callbacks", "progress")


@app.command()
def compress(
    model: Model,
    target: Annotated[float, typer.Option(help="Share of the experts' bytes to come out under.")],
    out: Annotated[Path, typer.Option(help="A new folder for the checkpoint.")],
    retain: Annotated[Path | None, typer.Option(help="Text that must stay as it is predicted.")] = None,
    data: Annotated[Path | None, typer.Option(help="The domain's text.")] = None,
    map_folder: Annotated[Path | None, typer.Option("--map", help="A map, in the place of the domain's text.")] = None,
    max_loss_rise: Annotated[float | None, typer.Option(help="Of any of the texts, nats per token.")] = None,
    length: Length = 256,
    batch_size: Batch = 8,
    revision: Revision = None,
    dtype: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Store a model's experts in fewer bytes, where it changes least of what the texts need."""
    with exit_codes():
        check_new(out, "out")
        read = {
            name: read_corpus_file(path) for name, path in (("retain", retain), ("domain", data)) if path is not None
        }
        if not read:
            raise Unusable("compressing is measured on text: give --retain, or --data")
        emap = None if map_folder is None else ErrorMap.load(map_folder)
        loaded, tokenizer = load_model(model, revision, dtype, device)
        texts: dict[str, Any] = {
            name: in_batches(windows(lines, name, tokenizer, length, batch_size), batch_size)
            for name, lines in read.items()
        }
        small: Any
        small, report = apply(loaded, plan(loaded, emap, target=target, **texts), max_loss_rise)
        small.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        shown(report, {"out": str(out), "report": str(report)}, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, script: Annotated[str, typer.Argument(help="A file, or a module.")]) -> None:
    """Run a script with the plugin registered, for tools that cannot import it: pcgrow run SCRIPT ..."""
    sys.argv = [script, *context.args]
    if Path(script).exists():
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def main() -> None:
    app()
