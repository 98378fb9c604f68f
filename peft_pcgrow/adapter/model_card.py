"""How an adapter's files say what loads them, to readers and to a PEFT that does not know the method.

The card is made of the files alone. Of a README.md that is there it keeps what is not between its own marks; the
template that PEFT and transformers fill in for whoever has written nothing is left out.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_pcgrow.adapter.register import NAME
from peft_pcgrow.adapter.seal import SEAL_MARK, Seal
from peft_pcgrow.files import write_whole
from peft_pcgrow.hub_access import is_on_hub
from peft_pcgrow.say import ends

# the peft_type of an adapter_config.json: where the package was not imported, PEFT raises a KeyError with this text
SPELLED_OUT = f"{NAME}: needs `pip install peft-pcgrow`, and `import peft_pcgrow` before loading"
CARD, PICTURE = "README.md", "map.png"
BEGIN = "<!-- peft_pcgrow writes this part anew, up to its end: write above or below -->"
END = "<!-- end of what peft_pcgrow writes -->"
TEMPLATE = "[More Information Needed]"
SOURCE = "https://github.com/peft-pcgrow/peft_pcgrow/blob/main/examples"
NAMELESS = "this adapter"
UNMEASURED = """## What it brings

Not noted with these files: measure gain and forgetting, beside a control such as LoRA, before relying on it.
"""


@dataclass(frozen=True)
class Measured:
    """What a run measured of the adapters that it left.

    Attributes:
        text: a part of the card. of: what tells by name whether adapters are still these (see `sealed_as`).
    """

    text: str
    of: Mapping[str, str | None]

    def holds(self, folder: Path) -> bool:
        """Whether a folder has these adapters, all of them, and no other."""
        return self.of == {name: sealed_as(place) for name, place in adapters_in(folder).items()}


def adapters_in(folder: Path) -> dict[str, Path]:
    """Folders of adapters by name, as `save_pretrained` puts them there: "default" in the folder itself."""
    below = sorted((file.parent for file in folder.glob(f"*/{CONFIG_NAME}")), key=lambda place: _in_order(place.name))
    here = {"default": folder} if (folder / CONFIG_NAME).is_file() else {}
    return here | {place.name: place for place in below}


def folder_of(root: Path, name: str) -> Path:
    """Where an adapter of that name lies, as `save_pretrained` puts it there."""
    return root if name == "default" else root / name


def sealed_as(place: Path) -> str | None:
    """The digest of an adapter's tensors and of what they are for; None: no file, or one without."""
    try:
        with safe_open(place / SAFETENSORS_WEIGHTS_NAME, "pt") as held:
            key = next((key for key in held.keys() if f".{SEAL_MARK}." in key), None)  # noqa: SIM118
            return None if key is None else Seal.read(held.get_tensor(key)).whole
    except (OSError, ValueError, SafetensorError):
        return None


def save_card(place: Path, measured: Measured | None) -> None:
    """Write the card beside an adapter that was saved, or one folder above, where PEFT puts one for several."""
    folder = place if (place / CARD).is_file() else place.parent
    card = folder / CARD
    if not card.is_file() or (folder != place and "\nlibrary_name: peft\n" not in card.read_text(encoding="utf-8")):
        return
    text = measured.text if measured is not None and measured.holds(folder) else UNMEASURED
    write_whole(card, make_card(folder, text, here=True).encode())


def make_card(folder: Path, measured: str = UNMEASURED, repo: str = NAMELESS, here: bool = False) -> str:
    """The card of the adapters in a folder.

    Args:
        measured: what is known of their gain. repo: what loads them: a name of the Hub, or the folder. here: whether it
            stays on this machine, where the base may be a folder, as PEFT notes it; the Hub takes names alone.
    """
    places = adapters_in(folder)
    configs = {name: json.loads((place / CONFIG_NAME).read_text()) for name, place in places.items()}
    first = next(iter(configs.values()))
    held = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "---\n{}\n---\n"
    card = ModelCard(held)
    base = first.get("base_model_name_or_path")
    licence = card.data.get("license") or _licence(base, first.get("revision"))
    noted = card.data.get("base_model") if here else None
    _tag(card.data, base if is_on_hub(base) else None, first.get("task_type"), licence)
    card.data.base_model = card.data.get("base_model") or noted  # type: ignore
    parts = [
        f"# Grown experts for {_name(base)}" + (f", revision {first['revision']}" if first.get("revision") else ""),
        _loading(configs, base, repo),
        _grown(configs) + (f"\n![Where the base erred]({PICTURE})\n" if (folder / PICTURE).is_file() else ""),
        measured,
        _size(places),
        _serving(configs),
        _licence_text(licence, base),
        "### Framework versions\n\n" + "".join(f"- {name} {found}\n" for name, found in _versions().items()),
    ]
    own = f"{BEGIN}\n\n" + "\n".join(f"{part.strip()}\n" for part in parts) + f"\n{END}"
    before, mark, rest = card.text.partition(BEGIN)
    if mark and END in rest:
        card.text = f"{before}{own}{rest.partition(END)[2]}"
    else:
        theirs = "" if TEMPLATE in card.text else re.sub(r"### Framework versions\n+- PEFT \S+\n*", "", card.text)
        card.text = f"\n{own}\n\n{theirs.strip()}".rstrip()
    return f"{card.content.rstrip()}\n"


def _tag(data: Any, base: str | None, task: str | None, licence: str | None) -> None:
    kept = {tag for tag in data.tags or () if not tag.startswith("base_model:")}
    data.tags = sorted(
        kept | {"peft", "peft_pcgrow", "transformers"} | ({f"base_model:adapter:{base}"} if base else set())
    )
    data.library_name, data.base_model, data.license = "peft", base, licence
    if task == "CAUSAL_LM" and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"


def _loading(configs: Mapping[str, Any], base: str | None, repo: str) -> str:
    revision = next(iter(configs.values())).get("revision")
    pinned = f", revision={revision!r}" if revision else ""
    whole = f'base = AutoModelForCausalLM.from_pretrained("{base if is_on_hub(base) else "its base"}"{pinned})'
    first = "import peft_pcgrow  # first: it makes PEFT know the method"
    if list(configs) == ["default"]:
        lines = [first, "from peft import AutoPeftModelForCausalLM", ""]
        lines += [f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")']
    elif all(name == "default" or name.startswith("round-") for name in configs):
        lines = ["from peft_pcgrow import load_grown", "from transformers import AutoModelForCausalLM", "", whole]
        lines += [f'model = load_grown(base, "{repo}")  # all of its adapters: {", ".join(configs)}']
    else:
        lines = [first, "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "", whole]
        for number, name in enumerate(configs):
            step = "model.load_adapter(" if number else "model = PeftModel.from_pretrained(base, "
            below = "" if name == "default" else f', subfolder="{name}"'
            lines.append(f'{step}"{repo}", adapter_name="{name}"{below})')
    return (
        f"## Loading\n\nThis adapter's method, {NAME}, is not part of PEFT: `pip install peft-pcgrow`, and import it "
        "before any loader.\n\n```python\n" + "\n".join(lines) + "\n```\n\nIt loads onto the weights that it grew "
        "on and is refused on others, so a base that was changed since is noticed.\n"
    )


def _grown(configs: Mapping[str, Any]) -> str:
    found = ["## What grew\n"]
    for name, config in configs.items():
        spawned, locus = config.get("spawned") or {}, config.get("locus") or {}
        count = sum(map(len, locus.values()))
        newborns = sum(map(len, spawned.values()))
        what = {0: "deepened", count: "newborns beside their donors"}.get(newborns, f"{newborns} of them newborns")
        nodes = {None: "experts", "routed": "experts"}.get(config.get("nodes"), "MLPs")
        found.append(f"{'' if name == 'default' else f'`{name}`: '}{count} {nodes} of {len(locus)} layers, {what}.\n")
        found.append("| layer | deepened | newborns of |\n|---|---|---|")
        for layer, experts in sorted(locus.items(), key=lambda each: int(each[0])):
            born = spawned.get(layer, [])
            rows = ([each for each in experts if each not in born], born)
            found.append(f"| {layer} | {' | '.join(', '.join(ends(row, 24)) or '-' for row in rows)} |")
        found.append("")
        if newborns:
            found.append(f"Newborns take at most a share of about {config.get('gate_fpr')} of other text's tokens.\n")
        if config.get("lora"):
            found.append("LoRA beside them is part of the adapter.\n")
    return "\n".join(found)


def _size(places: Mapping[str, Path]) -> str:
    rows, total = [], 0
    for name, place in places.items():
        path = place / SAFETENSORS_WEIGHTS_NAME
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as held:
                own = [key for key in held.keys() if f".{SEAL_MARK}." not in key]  # noqa: SIM118
                kinds = sorted({held.get_slice(key).get_dtype() for key in own})
        except SafetensorError as error:
            raise ValueError(f"{path} was not written to its end ({error}): save it again") from None
        total += (size := path.stat().st_size)
        rows.append(f"| {name} | {size:,} | {', '.join(kinds)} |")
    return "\n".join([f"## Size\n\n{total:,} bytes.\n\n| adapter | bytes | held in |\n|---|---|---|", *rows, ""])


def _serving(configs: Mapping[str, Any]) -> str:
    born = any(config.get("spawned") for config in configs.values())
    found = ["## Merge and serve\n"]
    if not born:
        found.append(
            '`model.merge_and_unload().save_pretrained("merged")` writes a plain checkpoint, which needs neither PEFT '
            "nor this package (not over a base whose experts are packed in few bits)."
        )
    else:
        found.append("Newborns hold for some tokens only, so they do not merge: a runtime must import peft_pcgrow. ")
    if born and all(config.get("nodes") in (None, "routed") for config in configs.values()):
        found[-1] += (
            "`peft_pcgrow.export_flat(model, folder, batches)` writes a plain checkpoint in which each newborn is one "
            "more expert with a router row of its own (not newborns of newborns, nor LoRA beside them). That is an "
            "approximation: it measures and reports by how much predictions depart, and [some of the gain is lost]"
            f"({SOURCE}/RESULTS.md#what-is-lost-in-a-plain-checkpoint)."
        )
    return "\n".join([*found, "", f"[More on saving, loading and serving]({SOURCE}/guides/ship.md).", ""])


def _licence(base: str | None, revision: str | None) -> str | None:
    """What the base's own card says, where that is on this machine."""
    path: Any = None
    if base and Path(base).is_dir():
        path = Path(base) / CARD
    elif is_on_hub(base):
        path = try_to_load_from_cache(str(base), CARD, revision=revision)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except ValueError:
        return None


def _licence_text(licence: str | None, base: str | None) -> str:
    if licence is None:
        return (
            f"## Licence\n\nFill in `license:` at the top of this file: that of the base, {_name(base)}, was not found "
            "where this card was written.\n"
        )
    return f"## Licence\n\n{licence}, as the base. Text that was trained on may have terms of its own.\n"


def _name(base: str | None) -> str:
    if base and is_on_hub(base):
        return f"[{base}](https://huggingface.co/{base})"
    # a path would say more of the machine than of the model
    return f"`{Path(base).name}`, a model of a folder" if base else "a base without a name"


def _versions() -> dict[str, str]:
    # PEFT adds its own line unless it finds it
    found = {}
    for shown, name in {"PEFT": "peft", "peft-pcgrow": "peft-pcgrow", "transformers": "transformers"}.items():
        try:
            found[shown] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _in_order(name: str) -> tuple[str, int]:
    word, _, number = name.rpartition("-")
    return (word, int(number)) if number.isdecimal() else (name, 0)
