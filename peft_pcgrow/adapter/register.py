"""Make PEFT know the method: the only file that touches its enum and registry."""

from peft.utils import PeftType

from peft_pcgrow.adapter.host import PEFT_TYPE_TO_CONFIG_MAPPING, register_peft_method

NAME = "PCGROW"
# on the member that is added here
OURS = "_from_pcgrow"


def extend_peft_type() -> None:
    """Add `PeftType.PCGROW`. PEFT has no door for outside methods, so the enum grows in place; harmless if repeated.

    Raises:
        RuntimeError: PEFT has a method of that name itself.
    """
    if NAME in PeftType.__members__:
        if getattr(PeftType[NAME], OURS, False):
            return
        raise RuntimeError(f"this PEFT has its own method {NAME}; uninstall peft_pcgrow or use an older PEFT")
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    setattr(member, OURS, True)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.13
    if isinstance(hashable, (list, set)):
        hashable.append(NAME) if isinstance(hashable, list) else hashable.add(NAME)


def register(config_cls: type, model_cls: type, spelled_out: str = NAME) -> None:
    """Register the method with PEFT, also by the name that files call it; a second call does nothing."""
    extend_peft_type()
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="pcgrow_")
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(spelled_out, config_cls)  # type: ignore[arg-type]
