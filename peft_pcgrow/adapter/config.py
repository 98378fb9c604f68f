"""PCGrowConfig: the only home of the method's settings."""

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from peft import PeftConfig
from peft.utils import PeftType

from peft_pcgrow.adapter.gone import knows_gone, without_gone
from peft_pcgrow.adapter.lora_beside import read_lora, settings_of
from peft_pcgrow.adapter.model_card import SPELLED_OUT, Measured, save_card
from peft_pcgrow.adapter.register import NAME, extend_peft_type
from peft_pcgrow.architectures.find import NODES
from peft_pcgrow.gates.gate import MOST, RATES
from peft_pcgrow.locate.budget import SELECTIONS, check_budget
from peft_pcgrow.locate.decide import GROWTHS, Decision
from peft_pcgrow.locus import RESOLUTIONS, Locus, read_parts
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.settings import dictionary, flag, names, number, plain, text, token_indices, whole, wholes
from peft_pcgrow.settling.descent import Way

SETTLING = ("sweep", "direct", "backprop")
ROUTERS = ("branch", "flat")
BASE_QUANTIZATIONS = ("nf4", "int8")
# fields by what they hold (whole numbers: from, to)
_NUMBERS = ("budget", "gate_fpr", "protect")
_WHOLE = {"settle_depth": 0, "keep_activations": 0, "gate_window": 0}
_FLAGS = ("keep_logits", "init_weights", "inference_mode")
_TEXTS = ("base_model_name_or_path", "revision", "peft_version")
_NAMES = ("modules_to_save", "target_modules", "exclude_modules", "target_parameters", "layers_pattern")
# of those, what PEFT takes for a regular expression if it is one text
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_DICTS = ("protected", "shrunk", "base", "spawned", "auto_mapping")
_WORDS: dict[str, tuple[Any, ...]] = {
    "select": (*SELECTIONS, None),
    "settle": SETTLING,
    "grow": GROWTHS,
    "router": ROUTERS,
    "resolution": RESOLUTIONS,
    "nodes": (*NODES, None),
    "base_quantization": (*BASE_QUANTIZATIONS, None),
}
_OTHERS = ("seed", "locus", "parts", "layers_to_transform", "trainable_token_indices")


@knows_gone
@dataclass
class PCGrowConfig(PeftConfig):
    """Configuration of [`PCGrowModel`]: which experts grow, and how their error reaches them.

    Args:
        error_map (`str`, `os.PathLike` or [`ErrorMap`], *optional*):
            The map that `budget` is spent by: a folder written by `ErrorMap.save`, or the map itself. Only read when
            the adapter is created; the locus that it leads to is stored, so no map is needed to load the adapter.
        budget (`float`, defaults to `0.12`):
            Share of the expert parameters to grow, in (0, 1].
        select (`str`, *optional*):
            What the map ranks nodes by: `"removable"` (the loss decrease that a step there would bring; the default of
            maps with weight gradients), `"error"` (that of all others), or the controls `"gate"`, `"frequency"` (both
            need a map) and `"random"` (needs none, but for matrices). By any other rule: `locus=choose(scores, budget)`
            (see [`choose`]).
        grow (`str`, defaults to `"deepen"`):
            `"deepen"`: located experts are refined for all of their rows. `"spawn"`: each gets a newborn, a clone that
            takes only the domain's rows, so that other text keeps its expert; needs a map measured with `retain=`.
            `"auto"`: decides for each node, and says what and why (`decisions` holds all of it).
        gate_fpr (`float`, defaults to `0.1`):
            Share of retain tokens that a newborn may take, in (0, 1), at every stage of a text: the threshold of the
            branch gates, set on text that they were not fitted on.
        protect (`float`, defaults to `0.0`):
            Keeps updates off the main input directions of the retain text at each node, down to this share of their
            energy, in [0, 1); needs a map measured with `retain=`. Costs the memory of the directions and three thin
            matrix products a step.
        router (`str`, defaults to `"branch"`):
            `"flat"` spawns equally many newborns in each layer, from the best donors there, so that [`export_flat`] can
            write a plain checkpoint; architectures that have no room for one are refused at once.
        seed (`int`, defaults to `0`):
            Seed of `select="random"`.
        locus (`dict[int, list[int]]`, *optional*):
            The nodes to grow, decoder layer -> experts, instead of a map and a budget. Resolved when the adapter is
            created and stored in adapter_config.json.
        nodes (`str`, *optional*):
            What grows: `"routed"`: experts that a router chooses. `"shared"`: the MLPs that serve every token beside
            them. `"dense"`: the MLPs of layers without routed experts. Shared and dense ones are one expert a layer,
            number 0. By default what the map was measured on, or routed where there are some, else dense.
        resolution (`str`, defaults to `"expert"`):
            How much of a chosen expert trains: `"expert"`: all of it; `"matrix"`: single matrices. The rest stays as
            the base has it and takes no memory in the adapter.
        parts (`dict[int, dict[int, list]]`, *optional*):
            The parts to grow, decoder layer -> expert -> names of weight stacks (a bias goes with its matrix), instead
            of `locus`. All parts of each located expert by default.
        settle (`str`, defaults to `"sweep"`):
            `"sweep"`: local predictive-coding updates, one layer's graph at a time. `"backprop"`: ordinary autograd
            through the model, with the same gradients (the control). `"direct"`: an approximation that costs less, for
            a locus in the uppermost layers: the residual stream carries the top layer's error down unchanged.
        settle_depth (`int`, defaults to `0`):
            Of `settle="direct"`: top decoder layers that the error is carried through exactly, 0 or more; with all of
            them it is the sweep.
        keep_activations (`int`, defaults to `0`):
            Of `settle="sweep"`: top decoder layers whose activations are kept, not computed again. Same gradients.
        keep_logits (`bool`, defaults to `True`):
            `False`: a training forward with labels makes its loss of some rows' logits at a time and returns none.
        base_quantization (`str`, *optional*):
            `"nf4"` (4 bits a weight) or `"int8"`: once the adapter holds its copies, read in full precision, all
            experts of the base are packed in so few bits (see `compress.quantize_experts`); loading the adapter packs
            the base alike. A `BitsAndBytesConfig` of transformers' leaves experts in 16 bit.
        lora (`peft.LoraConfig`, *optional*):
            LoRA beside the grown experts, on the attention for example, as part of this adapter: it is created, saved,
            loaded, switched, disabled and merged with it. Beside newborns it is behind gates like theirs, in the layers
            that have newborns: tokens that do not pass keep their bits. A dict of its settings will do.
        verify (`bool`, `True`; to be set on a config, not given):
            Whether tensors loaded into the adapter must be sealed, unaltered, and for this locus and base. `False` is
            for files from before there were seals, and for bases with other weights; it is not saved.
        task_type (`str`, defaults to `"CAUSAL_LM"`):
            As in LoRA; None for a model without a language head, which it is set to where such a model is given.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save, as in LoRA.
        init_weights (`bool`, defaults to `True`):
            `True`: grown experts start as exact copies. `False`: perturbed copies, for tests.
        target_modules (`list[str]` or `str`, *optional*):
            Experts modules that may grow, as in LoRA; by default all of them.
        exclude_modules (`list[str]` or `str`, *optional*):
            Experts modules that must not grow.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Decoder layers that may grow; by default all of them.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that `layers_to_transform` counts in.
        target_parameters (`list[str]`, *optional*):
            Refused: an experts module grows as a whole.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Further tokens whose embeddings train, as in LoRA.

    Raises:
        ValueError: a setting out of its range; the text names it.

    Example:
        >>> config = PCGrowConfig(locus={1: [4, 0], 2: [7]})  # or error_map=, budget=
        >>> get_peft_model(model, config).print_trainable_parameters()
        trainable params: 4,608 || all params: 59,920 || trainable%: 7.6903
    """

    error_map: Optional[Any] = field(default=None, metadata={"help": "Error map, or the folder it was saved in."})
    budget: float = field(default=0.12, metadata={"help": "Share of the expert parameters to grow, in (0, 1]."})
    select: Optional[str] = field(
        default=None,
        metadata={"help": f"What nodes are ranked by: {', '.join(SELECTIONS)}. None: the best that the map can tell."},
    )
    grow: str = field(default="deepen", metadata={"help": f"What growing does: {', '.join(GROWTHS)}."})
    gate_fpr: float = field(default=0.1, metadata={"help": "Share of retain tokens a newborn may take, in (0, 1)."})
    protect: float = field(default=0.0, metadata={"help": "Share of the retain inputs' energy to protect, in [0, 1)."})
    router: str = field(default="branch", metadata={"help": f"How newborns are reached: {', '.join(ROUTERS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of select='random'."})
    locus: Optional[dict] = field(default=None, metadata={"help": "Nodes to grow: decoder layer -> experts."})
    nodes: Optional[str] = field(default=None, metadata={"help": f"What grows: {', '.join(NODES)}."})
    resolution: str = field(default="expert", metadata={"help": f"What trains: one of {', '.join(RESOLUTIONS)}."})
    parts: Optional[dict] = field(default=None, metadata={"help": "Parts to grow: layer -> expert -> [parts]."})
    settle: str = field(default="sweep", metadata={"help": f"How errors reach the locus: {', '.join(SETTLING)}."})
    settle_depth: int = field(default=0, metadata={"help": "Exact top layers of settle='direct'."})
    keep_activations: int = field(default=0, metadata={"help": "Top layers that settle='sweep' does not run again."})
    keep_logits: bool = field(default=True, metadata={"help": "Whether training forwards with labels give logits."})
    base_quantization: Optional[str] = field(
        default=None, metadata={"help": f"Pack the base's experts: {', '.join(BASE_QUANTIZATIONS)}."}
    )
    lora: Optional[Any] = field(default=None, metadata={"help": "LoraConfig of LoRA beside the grown experts."})
    # set on a config, never read from a file, which could switch its own checks off
    verify: bool = field(default=True, init=False, metadata={"help": "Whether what is loaded must be sealed for this."})
    modules_to_save: Optional[list[str]] = field(default=None, metadata={"help": "Further modules to train and save."})
    init_weights: bool = field(default=True, metadata={"help": "Whether grown experts start as exact copies."})
    target_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None, metadata={"help": "Experts modules that may grow; all of them by default."}
    )
    exclude_modules: Optional[Union[list[str], set[str], str]] = field(
        default=None, metadata={"help": "Experts modules that must not grow."}
    )
    target_parameters: Optional[list[str]] = field(
        default=None, metadata={"help": "Not used: an experts module grows as a whole."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Decoder layers that may grow; all of them by default."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts in."}
    )
    trainable_token_indices: Optional[Any] = field(default=None, metadata={"help": "As in LoRA."})
    task_type: Optional[str] = field(default="CAUSAL_LM", metadata={"help": "None of a model that writes no text."})
    spawned: Optional[dict] = field(
        default=None, metadata={"help": "Nodes of the locus that are newborns, layer -> donors. Set on creation."}
    )
    lineage: Optional[dict] = field(
        default=None, metadata={"help": "Which adapters' newborns these grew from, and beside. Set on creation."}
    )
    gate_window: int = field(default=0, metadata={"help": "Tokens of context the gates look at. Set on creation."})
    protected: Optional[dict] = field(
        default=None, metadata={"help": "Protected directions, layer -> stack -> number. Set on creation."}
    )
    fingerprint: Optional[str] = field(
        default=None, metadata={"help": "Of the gates and directions that the map gave. Set on creation."}
    )
    shrunk: Optional[dict] = field(
        default=None, metadata={"help": "How the banks are stored, if not in full. Set by shrink_adapter."}
    )
    base: Optional[dict] = field(
        default=None, metadata={"help": "Facts of the base the adapter grew on. Set on creation."}
    )

    def __post_init__(self):
        # JSON knows no enumerations: what comes from a file must not lead to another file
        self._noted_map = self.error_map if type(self.peft_type) is str and isinstance(self.error_map, str) else None
        super().__post_init__()
        extend_peft_type()
        self.peft_type = PeftType.PCGROW  # type: ignore[attr-defined]
        # not saved: the map that was used, for adapters made of this config later; what became of each node, and why
        self._measured: Optional[ErrorMap] = None
        # beside its gates, what tells the adapter from others: its name, and of which run it is
        self._told_by: str = ""
        self.run: Optional[Measured] = None  # what a card says of it
        self.decisions: list[Decision] = []
        self.check()

    def check(self) -> None:
        """Bring every setting to a plain value that JSON gives back equal.

        Raises:
            ValueError: a setting that is none, or out of its range; the text names it.
        """
        without_gone(vars(self))
        self._normalise()
        check_budget(self.budget)
        Way(depth=self.settle_depth)  # refuses what is out of range
        if self.way is None and self.keep_activations:
            raise ValueError("keep_activations= is of settle='sweep', and 'backprop' keeps them all: leave it at 0")
        if self.router == "flat" and self.grow == "deepen":
            raise ValueError("router='flat' is about newborns: use it with grow='spawn'; deepened experts just merge")
        if self.parts is not None:
            self.parts = read_parts(self.parts, self.resolution)
            if self.locus is not None and self.base is None:
                raise ValueError("parts= says which experts grow: leave out locus=, which follows from it")
        self.lora = read_lora(plain(self.lora) if isinstance(self.lora, Mapping) else self.lora)
        check_rate(self.gate_fpr)
        check_share("protect", self.protect, "[0, 1)")
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters}: an experts module grows as a whole, name it in "
                "target_modules (for example ['mlp.experts']) or choose nodes with locus="
            )
        if self.locus is not None:
            for layer, donors in self.locus.items() if self.grow != "deepen" and self.spawned is None else ():
                if isinstance(donors, list) and len(set(map(str, donors))) < len(donors):
                    raise ValueError(
                        f"layer {layer} of the locus names a donor twice ({donors}): an adapter has room for one "
                        "newborn of each; add another adapter for a second one"
                    )
            # string keys, as JSON gives them back: equal before and after saving
            self.locus = Locus(self.locus).to_json()
        if self.spawned is not None:
            self.spawned = Locus(self.spawned, "spawned").to_json() if self.spawned else {}

    def _normalise(self) -> None:
        """Turn what other libraries give as settings into plain values."""
        if self.error_map is not None and not isinstance(self.error_map, (str, os.PathLike, ErrorMap)):
            raise ValueError(f"error_map must be a path or an ErrorMap, got {type(self.error_map).__name__}")
        for name in ("error_map", "base_model_name_or_path"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        fields = (*_NUMBERS, *_WHOLE, *_FLAGS, *_TEXTS, *_NAMES, *_DICTS, *_WORDS, *_OTHERS)
        read = {name: plain(getattr(self, name)) for name in fields}
        read |= {name: number(read[name]) for name in _NUMBERS}
        read |= {name: whole(name, read[name], least) for name, least in _WHOLE.items()}
        read |= {name: flag(name, read[name]) for name in _FLAGS}
        read |= {name: text(name, read[name]) for name in _TEXTS}
        for name in _NAMES:
            pattern = name in _PATTERNS and isinstance(read[name], str)
            read[name] = read[name] if pattern else names(name, read[name])
            for written in [read[name]] if pattern else read[name] or ():
                _check_pattern(name, written)
        read |= {name: dictionary(name, read[name]) for name in _DICTS}
        for name, known in _WORDS.items():
            if read[name] not in known:
                words = ", ".join("or None" if word is None else word for word in known)
                raise ValueError(f"unknown {name}={read[name]!r}; choose from {words}")
        read["seed"] = whole("seed", read["seed"], -(2**63), 2**63 - 1)
        if (listed := read["layers_to_transform"]) is not None:
            found = wholes("layers_to_transform", listed)
            read["layers_to_transform"] = found if isinstance(listed, list) else found[0]
        read["trainable_token_indices"] = token_indices("trainable_token_indices", read["trainable_token_indices"])
        for name in ("target_modules", "exclude_modules"):
            read[name] = set(read[name]) if isinstance(read[name], list) else read[name]
        self.__dict__.update(read)

    @property
    def way(self) -> Optional[Way]:
        """How to settle, without the settings of other ways; None for backprop."""
        if self.settle == "backprop":
            return None
        return Way(self.settle, self.settle_depth if self.settle == "direct" else 0, keep=self.keep_activations)

    def to_dict(self) -> dict[str, Any]:
        # a map held in memory does not belong in a config file; what it led to is in `locus`
        held, self.error_map = self.error_map, self.error_map if isinstance(self.error_map, str) else None
        try:
            found = {name: value for name, value in super().to_dict().items() if name != "verify"}
            return {**found, "lora": None if self.lora is None else settings_of(self.lora)}
        finally:
            self.error_map = held

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, with the short name of the method."""
        found = super().from_json_file(path_json_file, **kwargs)
        return found | ({"peft_type": NAME} if found.get("peft_type") == SPELLED_OUT else {})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the file and a model card beside it say what must be imported to load the adapter."""
        spelled = copy.copy(self)
        spelled.peft_type = SPELLED_OUT
        super(PCGrowConfig, spelled).save_pretrained(save_directory, **kwargs)
        save_card(Path(save_directory), self.run)


def _check_pattern(name: str, value: str) -> None:
    """Raise ValueError, naming the field, unless PEFT can take a text for a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name}: {value!r} is no regular expression ({error}); to name modules, give a list"
        ) from None


def check_share(name: str, value: Any, interval: str) -> None:
    """Raise ValueError unless `value` is a number in "(0, 1)" or "[0, 1)"."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1 or (value == 0 and interval.startswith("(")):
        raise ValueError(f"{name} must be a share in {interval}, got {value!r}")


def check_rate(rate: Any) -> None:
    """Raise ValueError unless a gate has a threshold for a false-positive rate."""
    check_share("gate_fpr", rate, "(0, 1)")
    if not RATES[-1] * (1 - 1e-9) <= rate <= MOST:
        raise ValueError(
            f"gate_fpr={rate!r}: gates have thresholds for rates from {RATES[-1]:g} to {MOST:g}, choose one of these"
        )
