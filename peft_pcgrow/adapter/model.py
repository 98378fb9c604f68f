"""PCGrowModel: places grown banks on the experts of a model and settles their errors."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn

from peft_pcgrow.adapter import adapter_file
from peft_pcgrow.adapter.before_training import check_given, check_protected, check_trains
from peft_pcgrow.adapter.birth import check_deletable
from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.gated import Gated
from peft_pcgrow.adapter.gated_lora import put_behind_gates
from peft_pcgrow.adapter.host import LoraLayer
from peft_pcgrow.adapter.injection import LEAVE_OUT, Injection, check_name, prepare
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.lora_beside import check_alone, injected, key_in_file, without_others
from peft_pcgrow.adapter.merged import check_mergeable
from peft_pcgrow.adapter.mixed_batch import adapters_named, check_samples
from peft_pcgrow.adapter.shared_out import refuse_other_text
from peft_pcgrow.adapter.text_hooks import enter, follow_inside, follow_whole_texts, refuse_mixed_rows
from peft_pcgrow.adapter.training_guard import TrainingGuard
from peft_pcgrow.adapter.what_trains import rows_alone, what_trains
from peft_pcgrow.adapter.whole_steps import WholeSteps, unmerged
from peft_pcgrow.adapter.without_logits import drop_logits
from peft_pcgrow.architectures.decoder import UNPATCHED
from peft_pcgrow.architectures.engines import check_engine, is_shared_out
from peft_pcgrow.architectures.find import adopt, find_experts, forward_replaced
from peft_pcgrow.architectures.sharded import check_whole, like
from peft_pcgrow.packed.quantize import check_quantizable, quantize_sites
from peft_pcgrow.settling.descent import Way
from peft_pcgrow.settling.host import in_forward_mode
from peft_pcgrow.settling.layer_stack import LayerStack
from peft_pcgrow.settling.output_head import OutputHead


class PCGrowModel(Gated, WholeSteps):
    """Grows the experts of a mixture-of-experts model.

    Args:
        model (`torch.nn.Module`): a transformers model with experts (see [`find_experts`]).
        peft_config ([`PCGrowConfig`]): which nodes grow and how they settle.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`): create the banks on the meta device, for loading.
        state_dict (`dict[str, Tensor]`, *optional*): as for PEFT's other tuners.

    Raises:
        ValueError: no experts in the model, a locus or map that does not fit, or newborns without gates that separate.

    Example:
        >>> grown = get_peft_model(model, PCGrowConfig(locus={1: [0, 4]}))  # base_model is a PCGrowModel
        >>> [layer.layer_index for layer in grown.base_model.tuner_layers()]
        [1]
    """

    prefix: str = "pcgrow_"
    peft_config: dict[str, PCGrowConfig]  # type: ignore[assignment]
    tuner_layer_cls = PCGrowExperts
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # BaseTuner injects the first adapter before a subclass can set anything up
    _stack: LayerStack | None = None
    _guard: TrainingGuard | None = None
    _grown: tuple[PCGrowExperts, ...] = ()
    # while an adapter is put in: see `Injection`
    _injection: Injection | None = None
    # ids of the base's parameters by name, until the first forward after an adapter was added
    _unchecked: dict[str, int] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # PEFT's class for causal LMs asks, also of models without a head
            if name == "prepare_inputs_for_generation":
                return None
            raise

    def _prepare_adapter_config(self, peft_config: PCGrowConfig, model_config: dict) -> PCGrowConfig:  # type: ignore[override]
        """For PEFT, which reads targets from it, a copy: a config that is refused can be changed and used again."""
        peft_config.check()  # settings may have been changed since it was made
        return copy.copy(peft_config)

    def _prepare_model(self, peft_config: PCGrowConfig, model: nn.Module) -> None:  # type: ignore[override]
        injection = prepare(peft_config, model, self.tuner_layers(), self._check_target_module_exists)
        # where PEFT looks for it from now on
        self._injection = replace(injection, tree=adopt(injection.tree))
        peft_config.target_modules = injection.resolved.target_modules

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: PCGrowConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        injection = self._injection
        assert injection is not None
        if isinstance(target, PCGrowExperts):
            layer = target
        else:
            index, decoder_layer = injection.layer_of(current_key)
            layer = PCGrowExperts(target, index)  # type: ignore[arg-type]
            # layers that another tuner on this model wrapped are that tuner's to watch
            self._created = {**self._created, index: (*self._created.get(index, ()), layer)}
            self._handles += follow_inside(decoder_layer, layer)
        birth, fingerprint = injection.births[current_key], injection.resolved.fingerprint
        if injection.measured is None and fingerprint is not None:
            # its map is not at hand, but an adapter that it also made may be
            for name, other in self.peft_config.items():
                if name != adapter_name and getattr(other, "fingerprint", None) == fingerprint:
                    birth = layer.given_by(name, birth)
        layer.update_layer(
            adapter_name, birth, peft_config.init_weights, peft_config.inference_mode, peft_config.verify
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version copies `.weight`, which an experts module does not have
        setattr(parent, child_name, new_module)

    def inject_adapter(  # type: ignore[override]
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """In all layers, or in none."""
        # told, or by PEFT's way of making all parameters empty
        if is_shared_out(model) and (low_cpu_mem_usage or nn.LayerNorm(1, device="cpu").weight.is_meta):
            raise ValueError(LEAVE_OUT.format("low_cpu_mem_usage=True"))
        given = self.peft_config[adapter_name]
        # not the caller's, who may use it again: what is set of one adapter is no other's
        config = self.peft_config[adapter_name] = copy.copy(given)
        config._told_by = f"{given._told_by} {adapter_name}"
        with self.or_not_at_all(model, adapter_name):
            check_name(model, adapter_name)
            if config.base_quantization is not None:
                check_quantizable(find_experts(model).sites, config.base_quantization)
            with unmerged(model), self._lora_beside(model, config, adapter_name, low_cpu_mem_usage) as lora:
                try:
                    super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
                    injection = self._injection
                    assert injection is not None
                finally:
                    self._injection = None
                layers = injection.tree.layers
                if lora is not None and injection.resolved.spawned:
                    grown = [m for m in model.modules() if isinstance(m, PCGrowExperts) and m.spawned(adapter_name)]
                    put_behind_gates(model, adapter_name, layers, {m.layer_index: m for m in grown})
            if (quantization := config.base_quantization) is not None:
                # not before: the banks are copies of the experts as they were
                quantize_sites(model, adopt(find_experts(model)).sites, quantization)
            self._watch(model, layers)
            for noted in (config, given):
                injection.note(noted, lora, model)

    def _watch(self, model: nn.Module, layers: tuple[nn.Module, ...]) -> None:
        self._grown = tuple(layer for layer in model.modules() if isinstance(layer, PCGrowExperts))
        if self._stack is None:
            self._stack = LayerStack(layers, self._begin, entered=self._enter, left=self._leave, keeps=self._keeps)
            self._stack.attach()
            self._guard = TrainingGuard(model, self.tuner_layers, self._summary)
            self._handles += follow_whole_texts(model, layers[0], self.tuner_layers)
            self._handles += (layers[0].register_forward_pre_hook(check_samples, with_kwargs=True),)
            self._handles += (*refuse_mixed_rows(model, self.tuner_layers), *refuse_other_text(model))
            self._handles += (model.register_load_state_dict_pre_hook(adapter_file.check_state),)
            self._handles += (model.register_load_state_dict_post_hook(self._guard.loaded),)
        drops = any(isinstance(handle, OutputHead) for handle in self._handles)
        ours = [config for config in self.peft_config.values() if isinstance(config, PCGrowConfig)]
        if not drops and any(not config.keep_logits for config in ours):
            self._handles += drop_logits(model, self._drops_logits)
        assert self._guard is not None
        self._guard.rearm()
        self._guard.note_banks()
        self._unchecked = {name: id(p) for name, p in adapter_file.base_parameters(model)}

    @contextmanager
    def _lora_beside(
        self, model: nn.Module, config: PCGrowConfig, adapter_name: str, low_cpu_mem_usage: bool
    ) -> Iterator[LoraConfig | None]:
        """Around the creation of an adapter: that of its LoRA layers, which are this model's from then on."""
        if config.lora is None:
            yield None
            return
        if self.tuner_layer_cls is PCGrowExperts:
            check_alone(model)
        with injected(model, config.lora, adapter_name, low_cpu_mem_usage) as lora:
            # PEFT asks isinstance, and switches and deletes adapters in layers of these classes
            self.tuner_layer_cls = (PCGrowExperts, LoraLayer)  # type: ignore[assignment]
            yield lora

    def delete_adapter(self, adapter_name: str) -> None:
        for layer in self.tuner_layers():
            check_deletable(adapter_name, layer.births, layer.layer_index)
        active = list(self.active_adapters)
        left = [name for name in active if name != adapter_name]
        trains = [(p, p.requires_grad) for p in self.parameters()]
        super().delete_adapter(adapter_name)
        if adapter_name in active and (others := left or list(self.peft_config)[:1]):
            self.set_adapter(others)  # the same in all layers, which each take the next that they have themselves
        for p, flag in trains if left else ():
            p.requires_grad_(flag)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
        for layer in self.tuner_layers():
            layer.check_disjoint(names)  # before any layer has changed
        super().set_adapter(adapter_name if isinstance(adapter_name, str) else names, inference_mode=inference_mode)
        if self._guard is not None:
            self._guard.rearm()

    def tuner_layers(self) -> list[PCGrowExperts]:
        """The layers that hold banks, bottom first."""
        return list(self._grown)

    def _begin(self) -> Way | None:
        """At the start of each forward: how to settle; None: let autograd go through the layers."""
        for patched in [layer for layer in self._grown if "forward" in vars(layer) and forward_replaced(layer)]:
            raise RuntimeError(
                f"the grown experts of layer {patched.layer_index} had their forward replaced after get_peft_model, by "
                f"Liger's kernels for example: {UNPATCHED}"
            )
        if self._unchecked is not None:
            self._check_loaded()
            self._unchecked = None
        if not (torch.is_grad_enabled() and self.model.training):
            return None
        if not any(p.requires_grad for layer in self.tuner_layers() for p in layer.parameters()):
            check_trains(self.model, self.tuner_layers())
            return None
        if any(layer.merged for layer in self.tuner_layers()):
            raise RuntimeError(
                "the adapter is merged, so its banks are not used: call unmerge_adapter() before training"
            )
        if self._guard is not None:
            first = not self._guard.announced
            if first:
                check_given(self.model, self.tuner_layers(), self.active_adapters)
            check_protected(self.model, self.tuner_layers(), self.active_adapters, first)
            self._guard.training_forward()
        ways = {name: self.peft_config[name].way for name in self.active_adapters if name in self.peft_config}
        if None in ways.values():
            return None
        if len(set(ways.values())) > 1:
            listed = ", ".join(f"{name}: {way}" for name, way in ways.items())
            raise ValueError(
                f"the active adapters settle in different ways ({listed}), and one forward has one way: give "
                "them the same settle, settle_depth and keep_activations, or activate one of them"
            )
        if in_forward_mode():
            raise RuntimeError(
                "forward-mode derivatives do not pass settled layers: model.eval(), or PCGrowConfig(settle='backprop')"
            )
        way = next(iter(ways.values()), None) or Way()
        return replace(way, checkpoint=self._guard is not None and self._guard.sharded)

    def _check_loaded(self) -> None:
        """What transformers' own loader has brought is compared before it is used: it asks no tuner."""
        adapter_file.check_loaded(self.model, self._unchecked or {}, self._remove_adapter_name_from_key)

    def _enter(self, index: int, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for layer in self._created.get(index, ()):
            enter(layer, decoder_layer, args, kwargs)  # type: ignore

    def _keeps(self, index: int, weights: list[Tensor]) -> bool:
        return rows_alone(self._created.get(index, ()), weights)

    def _leave(self, index: int, ran: bool) -> None:
        for layer in self._created.get(index, ()):
            layer.call.end()
            # a grown layer whose block went round the adapter would train nothing: refuse at once
            if ran and not layer.call.called:
                raise RuntimeError(
                    f"layer {index} ran without calling its grown experts: its MoE block was replaced, by a hub kernel "
                    f"for example; {UNPATCHED}"
                )

    def _drops_logits(self) -> bool:
        held = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        return any(isinstance(config, PCGrowConfig) and not config.keep_logits for config in held)

    def _summary(self) -> str:
        return what_trains(self.tuner_layers(), self.peft_config, self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around forward and generate, with their arguments."""
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets= belongs to activated LoRA; grown experts have no invocation tokens")
        if kwargs.get("adapter_names") is None:
            yield
            return
        with adapters_named(self.model, [*self.peft_config], self.tuner_layer_cls, args, kwargs):
            yield

    def _let_go(self) -> None:
        if self._stack is not None:
            self._stack.detach()
        self._remove_hooks()

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Refuse before any layer has been written."""
        check_whole(self.model, "merging")
        self._check_loaded()
        for layer in self.tuner_layers():
            check_mergeable(layer, safe_merge, layer.active_adapters if adapter_names is None else adapter_names)

    @classmethod
    def _get_adapter_state_dict(cls, model, config: Any, adapter_name, state_dict, unwanted_adapter_names):
        check_engine(model, shared_out=True)
        adapter_file.check_loaded(model, {}, cls._remove_adapter_name_from_key)  # before it is sealed anew
        ours = PCGrowExperts if config.lora is None else (PCGrowExperts, LoraLayer)
        held = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        held = without_others(model, held, adapter_name, ours)
        return adapter_file.Closing(held, model, adapter_name, cls._remove_adapter_name_from_key)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key_in_file(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict: dict[str, Tensor]):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        rename = cls._remove_adapter_name_from_key
        found = adapter_file.check_file(model, adapter_name, config.verify, found, rename)  # type: ignore
        places = {name: p for name, p in model.named_parameters() if name in found}
        dealt = adapter_file.dealt(model, adapter_name, found)
        return {key: like(tensor, places.get(key)) for key, tensor in (found | dealt).items()}
