"""PCGrowExperts: a PEFT tuner layer around an experts module, owner of the grown banks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter import dispatch
from peft_pcgrow.adapter.bank import SHRUNK, ShrunkBank, make_bank
from peft_pcgrow.adapter.birth import Birth, asked, check_disjoint, parents_of
from peft_pcgrow.adapter.given import GATE_TENSORS, GATES, Given
from peft_pcgrow.adapter.host import BaseTunerLayer, BufferDict, check_adapters_to_merge
from peft_pcgrow.adapter.layer_call import Call
from peft_pcgrow.adapter.merged import check_mergeable, write_merged
from peft_pcgrow.adapter.mixed_batch import adapters_in_use, for_their_samples
from peft_pcgrow.adapter.sealed_layer import SealedLayer, SealHolder
from peft_pcgrow.adapter.shared_out import SharedOut
from peft_pcgrow.adapter.working_copies import Prepared
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.expert_parallel import Share
from peft_pcgrow.architectures.slices import Pieces
from peft_pcgrow.architectures.stack_view import ViewedExperts
from peft_pcgrow.atomic import all_or_nothing
from peft_pcgrow.gates.gate import unknown_gate
from peft_pcgrow.locate import parts
from peft_pcgrow.say import ends

# relative size of the perturbation that init_weights=False asks for
PERTURBATION = 0.5


class PCGrowExperts(Prepared, Given, SealedLayer, SharedOut, experts.GrownExperts, BaseTunerLayer):
    """Runs `base_layer`, except for the rows of grown experts, which their bank computes.

    Args:
        base_layer: an experts module (see `experts`).
        layer_index: index of its decoder layer.
    """

    other_param_names = ("pcgrow_seal", *(f"pcgrow_{kind}_{name}" for kind in GATES for name in GATE_TENSORS))

    def __init__(self, base_layer: experts.ExpertsModule, layer_index: int):
        super().__init__()
        self.base_layer: experts.ExpertsModule = base_layer
        # a model that evaluates gives the base's bits at once
        self.training = base_layer.training  # type: ignore[attr-defined]
        self.layer_index = layer_index
        self.share, self.total = Share.of(base_layer), experts.count_experts(base_layer)
        stacks = experts.expert_stacks(base_layer)
        for name in stacks:
            setattr(self, f"pcgrow_{name}", nn.ModuleDict())
        self.adapter_layer_names = tuple(f"pcgrow_{name}" for name in stacks)
        self.merged_adapters = []
        self._disable_adapters = False
        self._originals: dict[str, dict[str, Tensor]] = {}
        # by active adapters and device, what `asked` gave for which births
        self._asked: dict[Any, tuple[tuple[Birth, ...], list[Any]]] = {}
        self._placed: dict[tuple[str, torch.device], dict[str, Pieces]] = {}
        # weights composed once for all forwards, while `composed_once` says so
        self._composed: dict[str, dict[str, Tensor]] = {}
        # of each adapter that spawned here: see `gate.Gate`
        for name in (f"{kind}_{name}" for kind in GATES for name in GATE_TENSORS):
            setattr(self, f"pcgrow_{name}", BufferDict({}, persistent=True))
        # per stack, what an adapter's updates are kept off
        for name in stacks:
            setattr(self, f"pcgrow_protect_{name}", BufferDict({}, persistent=True))
        self.other_param_names += tuple(f"pcgrow_protect_{name}" for name in stacks)
        # of its decoder layer: see `sequence.cache_place` and `sequence.attention_chunk`
        self.place, self.chunk = layer_index, 0
        self.call = Call()
        hidden = next(stack for name, stack in stacks.items() if name == "down_proj")
        self.in_features = self.out_features = hidden.shape[2 if getattr(base_layer, "is_transposed", False) else 1]

    def update_layer(
        self, adapter_name: str, birth: Birth, init_weights: bool, inference_mode: bool, verify: bool = True
    ) -> None:
        """Give `adapter_name` a bank with copies of what it grows of the experts in use (perturbed unless
        `init_weights`); `verify` what is loaded into it."""
        if birth.shrunk is not None and not inference_mode:
            raise ValueError(SHRUNK.format(adapter_name))
        self.births[adapter_name] = birth
        for name, weights in self.donors(birth).items():
            if not init_weights:
                weights = weights + PERTURBATION * weights.std() * torch.randn_like(weights)
            weights = self.dealt(adapter_name, weights)
            coding = None if birth.shrunk is None else birth.shrunk[name]
            self._banks(name)[adapter_name] = make_bank(weights, self.base_layer.is_transposed, coding)
        self.pcgrow_seal[adapter_name] = SealHolder(partial(self.facts, adapter_name), adapter_name, verify)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        device = self._get_base_layer_device_and_dtype(self.base_layer)[0]
        for kind in GATES[: 1 + birth.lora] if birth.spawned else ():
            gate, threshold = getattr(birth, kind) or unknown_gate(self.in_features, birth.window)
            # after the move, which casts to the base's dtype: gates stay in fp32
            for name, tensor in zip(GATE_TENSORS, (gate.direction, gate.law, threshold), strict=True):
                self._buffers_of(f"{kind}_{name}")[adapter_name] = tensor.to(device, copy=True)
        for name, directions in birth.directions.items():
            self._buffers_of(f"protect_{name}")[adapter_name] = directions.to(device, copy=True)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def donors(self, birth: Birth) -> dict[str, Tensor]:
        """Copies of the chosen experts, or their pieces; of a newborn's donor, as an active adapter deepened it, and of
        a newborn's parent."""
        weights = experts.read_pieces(self.base_layer, self.pieces(birth))
        if birth.pieces is not None:
            return weights  # the rest of an expert is the base's, so its pieces are too
        parents = parents_of("", {"": birth, **{name: self.births[name] for name in self.active_banks()}})
        for other in self.active_banks():
            theirs = self.births[other]
            deepened = set(birth.spawned) & (set(theirs.grown) - set(theirs.spawned)) - set(birth.parents)
            for expert in deepened | {donor for donor, parent in parents.items() if parent == other}:
                for name, weight in self.whole_weights(other).items():
                    copied = weight[theirs.grown.index(expert)]
                    weights[name][birth.grown.index(expert)] = copied.to(weights[name].device, weights[name].dtype)
        return weights

    @property
    def grown(self) -> dict[str, tuple[int, ...]]:
        """Experts that each adapter grows here, in the order of its bank."""
        return {name: birth.grown for name, birth in self.births.items()}

    def _banks(self, stack: str) -> Any:
        return getattr(self, f"pcgrow_{stack}")

    def bank(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Parameters of an adapter's bank by stack name, `[G, ...]`, or a slice for each piece; decoded, if shrunk."""
        stacks = experts.expert_stacks(self.base_layer) if self.is_shrunk(adapter_name) else {}
        found: dict[str, Any] = {}
        for name in self.adapter_layer_names:
            held: Any = self._modules[name]
            if (bank := held._modules.get(adapter_name)) is not None:
                stack = name.removeprefix("pcgrow_")
                found[stack] = bank.read(stacks.get(stack), partial(self.born, adapter_name, stack))
        return found

    def born(self, adapter_name: str, stack: str) -> Tensor:
        """The base's own slices of what an adapter grows of a stack, also while they are merged over."""
        if adapter_name in self._originals:
            return self._originals[adapter_name][stack]
        return experts.read_pieces(self.base_layer, {stack: self.pieces(self.births[adapter_name])[stack]})[stack]

    def shrink(self, adapter_name: str, banks: Mapping[str, ShrunkBank]) -> None:
        """Put shrunk banks, by stack, in the place of an adapter's."""
        shrunk = {name: bank.coding for name, bank in banks.items()}
        self.put(adapter_name, replace(self.births[adapter_name], shrunk=shrunk), banks)

    def put(self, adapter_name: str, birth: Birth, banks: Mapping[str, nn.Module]) -> None:
        """Make these an adapter's banks, by stack."""
        for name, bank in banks.items():
            self._banks(name)[adapter_name] = bank
        self.births[adapter_name] = birth

    def holding(self, adapter_name: str) -> Callable[[], None]:
        """What puts back the banks that an adapter has now."""
        names = [name.removeprefix("pcgrow_") for name in self.adapter_layer_names]
        banks = {name: self._banks(name)[adapter_name] for name in names if adapter_name in self._banks(name)}
        return partial(self.put, adapter_name, self.births[adapter_name], banks)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if requires_grad and self.is_shrunk(name):
                raise ValueError(SHRUNK.format(name))
        super().set_requires_grad(adapter_names, requires_grad)

    def pieces(self, birth: Birth) -> Mapping[str, Pieces]:
        """What a bank holds, by stack."""
        return birth.pieces if birth.pieces is not None else parts.whole(self.base_layer, birth.grown)

    def weights(self, adapter_name: str) -> Mapping[str, Tensor]:
        """An adapter's experts, whole, `[G, ...]` by stack: its bank, or composed of that and the base."""
        bank, birth = self.bank(adapter_name), self.births[adapter_name]
        if birth.pieces is None:
            return bank
        if adapter_name in self._composed:
            return self._composed[adapter_name]
        key = (adapter_name, next(iter(bank.values())).device)
        if key not in self._placed:
            slot = dispatch.slots(birth.grown, self.total, key[1])
            self._placed[key] = parts.placed(birth.pieces, slot)
        return parts.compose(self.base_layer, birth.grown, self._placed[key], bank)

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        try:
            self._composed = {
                name: {stack: weight.detach() for stack, weight in self.weights(name).items()}
                for name in self.active_banks()
                if self.births[name].pieces is not None
            }
            with self.base_layer.composed_once() if isinstance(self.base_layer, ViewedExperts) else nullcontext():
                yield
        finally:
            self._composed = {}

    def node(self, adapter_name: str, weight: nn.Parameter, place: int) -> tuple[int, int, str]:
        """Layer, expert and name of a slice of a bank parameter: `2.5` or `2.5 down_proj`."""
        held = self.pieces(self.births[adapter_name])[self.stack_of(adapter_name, weight)]
        place = self.among_all(adapter_name, place)
        expert = int(held.experts[place])
        return self.layer_index, expert, f"{self.layer_index}.{expert} {held.labels[place]}".rstrip()

    def spawned(self, adapter_name: str) -> tuple[int, ...]:
        """Donors of an adapter's newborns here."""
        return self.births[adapter_name].spawned if adapter_name in self.births else ()

    def stack_of(self, adapter_name: str, weight: nn.Parameter) -> str:
        """Name of the stack that one of an adapter's bank parameters is."""
        return next(name for name, held in self.bank(adapter_name).items() if held is weight)

    def active_banks(self) -> list[str]:
        """Active adapters, or those that the call at hand names, that grow experts here."""
        return [name for name in adapters_in_use(self) if name in self.births]

    def weights_in_use(self) -> dict[str, list[tuple[Tensor, tuple[int, ...] | None]]]:
        stacks, every = experts.expert_stacks(self.base_layer), experts.nodes_here(self.base_layer)
        in_use: dict[str, list[tuple[Tensor, tuple[int, ...] | None]]] = {n: [(s, every)] for n, s in stacks.items()}
        newborns = {newborn: self.total + n for n, newborn in enumerate(self.newborns)}
        for adapter in [] if self.disable_adapters or self.merged else self.active_banks():
            here = [self.births[adapter].grown[place] for place in self.places_here(adapter)]
            nodes = tuple(newborns.get((adapter, expert), expert) for expert in here)
            for name, weight in self.weights(adapter).items():
                in_use[name].append((weight, nodes))
        return in_use

    @property
    def newborns(self) -> list[tuple[str, int]]:
        if self.disable_adapters or self.merged:
            return []
        return [(name, donor) for name in self.active_banks() for donor in self.spawned(name)]

    @torch.no_grad()
    def nodes_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        newborns, total = self.newborns, self.total
        if not newborns:
            return index
        branches = self._branches(self.active_banks(), hidden, None, remember=False)
        owners = [name if branch.passes is not None else "" for name, branch in branches]
        return dispatch.nodes([branch for _, branch in branches], owners, newborns, index, total)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.call.begin()
        base = self.base_layer
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return base(hidden_states, top_k_index, top_k_weights)
        active = [] if self.merged_adapters else self.active_banks()
        if not active:
            return base(hidden_states, top_k_index, top_k_weights)
        branches = [branch for _, branch in self._branches(active, hidden_states, self.share)]
        # training needs no bits, and computes no row twice
        return self.run(branches, (hidden_states, top_k_index, top_k_weights), exact=not self.training)

    def _branches(
        self, active: Sequence[str], hidden: Tensor, share: Share | None, remember: bool = True
    ) -> list[tuple[str, dispatch.Branch]]:
        """What computes the rows of experts that the `active` adapters grow, with its adapter, in the order of
        `asked`; of a `share`'s alone."""
        births = {name: self.births[name] for name in active}
        key, now = (hidden.device, share is None, *active), tuple(births.values())
        held = self._asked.get(key)
        if held is None or not all(map(is_, held[0], now)):
            order = []
            for name, slot, gated, parents in asked(births, self.total):
                slot = slot if share is None else share.slots(slot, births[name].grown)
                order.append((name, slot.to(hidden.device), gated, parents))
            held = self._asked[key] = now, order
        banks, passes = {}, {}
        for name, birth in births.items():
            banks[name] = self.weights_to_run(name)
            if birth.spawned:
                passes[name] = self.margin(name, hidden, remember) > 0
        # read where they are, by no call of the modules that offloading brings them back for
        own: Any = self.base_layer
        here = [*own._parameters.values(), *(weight for bank in banks.values() for weight in bank.values())]
        if not hidden.is_meta and any(tensor is not None and tensor.is_meta for tensor in here):
            raise RuntimeError(
                f"weights of layer {self.layer_index} are offloaded, and grown experts read them where they are: keep "
                "the experts of layers that grow in memory (by device_map, or by no cpu_offload after growing)"
            )
        branches = [
            (name, dispatch.Branch(slot, banks[name], passes[name] if gated else None, parents))
            for name, slot, gated, parents in held[1]
        ]
        return for_their_samples(self, branches, hidden)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else [*dict.fromkeys(adapter_names)]
        self.check_disjoint(names)
        super().set_adapter(names, inference_mode=inference_mode)

    def check_disjoint(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if these adapters cannot be active together here (see `birth.check_disjoint`)."""
        births = {name: self.births[name] for name in adapter_names if name in self.births}
        check_disjoint(births, self.layer_index)

    def deepened(self) -> dict[int, str]:
        """Which active adapter deepens an expert here."""
        births = {name: self.births[name] for name in self.active_banks()}
        return {e: name for name, birth in births.items() for e in birth.grown if e not in birth.spawned}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.births.pop(adapter_name, None)
        self._asked.clear()
        self._working.held.clear()
        self._placed = {key: placed for key, placed in self._placed.items() if key[0] != adapter_name}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write what has grown over the base's; where several adapters grow the same expert, their changes add up."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.births]
        check_mergeable(self, safe_merge, names)
        self._merge_only([*self.merged_adapters, *names])

    def unmerge(self) -> None:
        """Put back, bit for bit, what the merges replaced.

        Several threads may: all write the same values, and none finds the layer unmerged before one has written all.
        """
        if self.merged:
            self._merge_only([])

    def _merge_only(self, names: Sequence[str]) -> None:
        with all_or_nothing() as undo:
            undo.append(self.merging())
            write_merged(self, names)

    def merging(self) -> Callable[[], None]:
        """What merges again, from any state, exactly what is merged now."""
        return partial(write_merged, self, tuple(self.merged_adapters))

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        stack = next(iter(experts.expert_stacks(base_layer).values()))
        return stack.device, stack.dtype

    def extra_repr(self) -> str:
        nodes = ", ".join(
            f"{name!r}: [{', '.join(ends([f'{e} (newborn)' if e in birth.spawned else e for e in birth.grown]))}]"
            for name, birth in self.births.items()
        )
        held = {name: parts.count(birth.pieces) for name, birth in self.births.items() if birth.pieces is not None}
        return f"layer={self.layer_index}, grown={{{nodes}}}" + (f", parts={held}" if held else "")

    def __repr__(self) -> str:
        return "pcgrow." + super().__repr__()
