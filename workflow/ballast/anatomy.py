"""Where the parts of a transformers model lie: language model, connector, vision tower, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ballast.errors import BallastError

CONNECTORS = ("multi_modal_projector", "connector", "merger", "embed_vision")
TOWERS = ("vision_tower", "visual", "vision_model")
# Where encoders keep their layers, inside the base model.
ENCODER_LAYERS = ("encoder.layer", "transformer.layer", "encoder.layers", "layers")
# What the linears of a layer are called by the architectures; the longest suffix that fits counts.
ROLES = {
    "q": ("q_proj", "query", "query_proj"),
    "k": ("k_proj", "key", "key_proj"),
    "v": ("v_proj", "value", "value_proj"),
    "o": ("o_proj", "attention.output.dense"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "intermediate.dense"),
    "down": ("down_proj", "output.dense"),
}
_ROLE = {suffix: role for role, suffixes in ROLES.items() for suffix in suffixes}


@dataclass(frozen=True)
class Anatomy:
    """Dotted names of a model's parts.

    language_model: the text decoder, or the encoder; layers: its list of layers; embeddings: the
    input embedding; connector and tower: None for a text model; encoder: whether the model is a
    masked language model.
    """

    language_model: str
    layers: str
    embeddings: str
    connector: str | None
    tower: str | None
    encoder: bool = False

    @property
    def kind(self) -> str:
        """text, vision-language or encoder, as in `declare.KINDS`."""
        if self.encoder:
            return "encoder"
        return "text" if self.tower is None else "vision-language"

    def role(self, name: str) -> str | None:
        """What a linear of a layer is: q, k, v, o, gate, up or down; None for any other module."""
        if not name.startswith(f"{self.layers}."):
            return None
        parts = name.split(".")
        for count in (3, 2, 1):
            role = _ROLE.get(".".join(parts[-count:]))
            if role is not None:
                return role
        return None

    def layer_names(self, model: nn.Module) -> list[str]:
        """Names of the decoder layers, from the input to the output."""
        return [f"{self.layers}.{i}" for i in range(len(model.get_submodule(self.layers)))]

    def linears(self, model: nn.Module, scope: str, leaves: Sequence[str] | None) -> list[str]:
        """Names of the nn.Linear modules under `scope`: all, or those with these leaf names."""
        root = model.get_submodule(scope)
        return [
            f"{scope}.{name}"
            for name, module in root.named_modules()
            if isinstance(module, nn.Linear) and (not leaves or name.split(".")[-1] in leaves)
        ]


def _first(model: nn.Module, leaves: Sequence[str]) -> str | None:
    for name, _ in model.named_modules():
        if name.split(".")[-1] in leaves:
            return name
    return None


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find the parts of a causal, masked or vision-language model of transformers.

    Raises BallastError for a model whose layers cannot be found.
    """
    if type(model).__name__.endswith("ForMaskedLM"):
        return _encoder(model)
    tower, connector = _first(model, TOWERS), _first(model, CONNECTORS)
    language = _first(model, ("language_model",)) or "model"
    try:
        layers = f"{language}.layers"
        model.get_submodule(layers)
    except AttributeError:
        raise BallastError(
            f"{type(model).__name__}: no decoder layers at {language}.layers; "
            "causal and image-text-to-text models of transformers are supported"
        ) from None
    return Anatomy(language, layers, _embeddings(model), connector, tower)


def _encoder(model: nn.Module) -> Anatomy:
    """The parts of a masked language model: BERT's and RoBERTa's, DeBERTa's, DistilBERT's ..."""
    base = model.base_model_prefix
    for inner in ENCODER_LAYERS:
        try:
            model.get_submodule(f"{base}.{inner}")
        except AttributeError:
            continue
        return Anatomy(base, f"{base}.{inner}", _embeddings(model), None, None, encoder=True)
    raise BallastError(
        f"{type(model).__name__}: no encoder layers at {base}.{f', {base}.'.join(ENCODER_LAYERS)}"
    )


def _embeddings(model: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is model.get_input_embeddings())


def targets_of(model: nn.Module, modules: Sequence[str] | str, connector: str) -> tuple[str, ...]:
    """Names of the modules that a method adapts.

    modules: "all" for every linear of the decoder layers, or leaf names such as q_proj and
    embed_tokens; connector: the connector's linears join if it is "adapted".
    Raises BallastError that names a leaf which matches nothing.
    """
    parts = anatomy_of(model)
    leaves = None if modules == "all" else list(modules)
    names = parts.linears(model, parts.layers, leaves)
    if leaves:
        embedding = parts.embeddings.split(".")[-1]
        if embedding in leaves:
            names.append(parts.embeddings)
        found = {name.split(".")[-1] for name in names}
        for leaf in leaves:
            if leaf not in found:
                raise BallastError(f"modules: no module {leaf!r} in the decoder layers")
    if connector == "adapted":
        if parts.connector is None:
            raise BallastError("connector: adapted, but the base has no connector")
        names += parts.linears(model, parts.connector, None)
    return tuple(names)
