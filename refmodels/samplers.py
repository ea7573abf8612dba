"""KerasHub's samplers: objects that say how `generate` chooses tokens, for `compile(sampler=...)` or `generate(sampler=...)`.

Names, arguments and defaults are KerasHub's; what each does is in `refmodels.generate`. Equal seeds give equal draws at every
call. They are not KerasHub's draws, which depend on its backend.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, ClassVar

from refmodels.files import keras_object
from refmodels.generate import CHOOSING, Sampling


@dataclass
class Sampler:
    """Base of the samplers. The scores are divided by `temperature` before the softmax."""

    kind: ClassVar[str] = ""

    _: KW_ONLY
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.kind:
            raise TypeError("Sampler is a base class: use one of " + ", ".join(cls.__name__ for cls in SAMPLERS.values()))
        settings = self.settings()
        settings.pop("return_all_beams", None)
        Sampling(**settings)  # refuses what generate would refuse

    def settings(self) -> dict[str, Any]:
        """This sampler as settings of `generate`."""
        names = {"k": "top_k", "p": "top_p", "alpha": "penalty_alpha"}
        return {"sampler": self.kind, **{names.get(name, name): value for name, value in asdict(self).items()}}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sampler":
        """A sampler from `get_config`'s dictionary."""
        return cls(**config)


@dataclass
class GreedySampler(Sampler):
    """The most likely token. The temperature makes no difference."""

    kind: ClassVar[str] = "greedy"

    def settings(self) -> dict[str, Any]:
        return {"sampler": self.kind}


@dataclass
class RandomSampler(Sampler):
    """A draw from all tokens."""

    kind: ClassVar[str] = "random"
    seed: int | None = None


@dataclass
class TopKSampler(Sampler):
    """A draw from the `k` most likely tokens."""

    kind: ClassVar[str] = "top_k"
    k: int = 5
    seed: int | None = None


@dataclass
class TopPSampler(Sampler):
    """A draw from the most likely tokens (of the first `k`), until their probability exceeds `p`.

    With `k`, p is a share of the probability of the first k tokens; KerasHub's is one of all tokens.
    """

    kind: ClassVar[str] = "top_p"
    p: float = 0.1
    k: int | None = None
    seed: int | None = None


@dataclass
class BeamSampler(Sampler):
    """A beam search; with `return_all_beams` each input gets all its beams, the best first."""

    kind: ClassVar[str] = "beam"
    num_beams: int = 5
    return_all_beams: bool = False


@dataclass
class ContrastiveSampler(Sampler):
    """The best of the `k` most likely tokens by (1 - alpha) * probability - alpha * likeness to earlier tokens."""

    kind: ClassVar[str] = "contrastive"
    k: int = 5
    alpha: float = 0.6


SAMPLERS: dict[str, type[Sampler]] = {
    cls.kind: cls for cls in (GreedySampler, RandomSampler, TopKSampler, TopPSampler, BeamSampler, ContrastiveSampler)
}
"""Name -> class: the names that `get` and `compile` take."""


def get(identifier: Any) -> Sampler | None:
    """The sampler of this name (`"top_k"`), in this serialised form (a dictionary of `class_name` and `config`), or itself.

    A class gives a sampler with its defaults, None gives None. ValueError for what is no sampler.
    """
    if isinstance(identifier, Mapping):
        return deserialize(identifier)
    if isinstance(identifier, type) and issubclass(identifier, Sampler):
        return identifier()
    if identifier is None or isinstance(identifier, Sampler):
        return identifier
    if not isinstance(identifier, str) or identifier not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} or a Sampler, got {identifier!r}")
    return SAMPLERS[identifier]()


def serialize(sampler: Sampler) -> dict[str, Any]:
    """KerasHub's form of a sampler: its class and its arguments."""
    return keras_object("keras_hub.samplers", type(sampler).__name__, sampler.get_config())


def deserialize(config: Mapping[str, Any]) -> Sampler:
    """The sampler of a dictionary such as `serialize` gives; `class_name` may be a name that `get` takes."""
    name, arguments = config.get("class_name"), config.get("config") or {}
    known = SAMPLERS | {cls.__name__: cls for cls in SAMPLERS.values()}
    short = name.removeprefix("keras_hub>").removeprefix("keras_nlp>") if isinstance(name, str) else None
    if short not in known or not isinstance(arguments, Mapping):
        raise ValueError(f"sampler class_name must be one of {', '.join(known)}, its config a dictionary, got {dict(config)!r}")
    try:
        return known[short].from_config(arguments)
    except TypeError as error:  # an argument that it does not have
        raise ValueError(f"sampler {short}: {str(error).rpartition('() ')[2]}") from None


def chosen_settings(given: Mapping[str, Any], compiled: Sampler | None) -> dict[str, Any]:
    """The settings of `generate`: those given, over those of a given sampler object, or else of the compiled sampler.

    The compiled sampler is asked when none of the given settings chooses one (`refmodels.generate.CHOOSING`).
    """
    settings = dict(given)
    if isinstance(settings.get("sampler"), Sampler | Mapping | type):
        compiled = get(settings.pop("sampler"))
    elif any(settings.get(name) is not None for name in CHOOSING):
        compiled = None
    return {**({} if compiled is None else compiled.settings()), **settings}
