"""What is known of a base's network before any of its cells has run, without torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.files import read_json
from ballast.forecast.architecture import WORLDS, Network, network
from ballast.forecast.stand_in import stand_in, stand_in_config
from ballast.hub import way_out
from ballast.layout import Layout, real_data

CONFIG = "config.json"
# Of a base whose size cannot be known: a common large model's.
UNKNOWN_PARAMETERS = 7e9
HUB_SECONDS = 5.0  # how long to wait for the hub; a plan is made without it too


@dataclass(frozen=True)
class BaseSize:
    """A base's network, or at least its parameter count, and where that was found.

    network: None where no configuration can be read. parameters: exact where there is a network,
    else read from the name ("...-7b"), else None. problem: why it is not exact, and what to do.
    config: its configuration, or that of a network that stands in for it. images: whether it is
    shown any.
    """

    network: Network | None
    parameters: float | None
    origin: str
    problem: str = ""
    config: dict[str, Any] | None = None
    images: bool = False

    @property
    def shape(self) -> Network:
        """The network, or one of the same size, or of a common large model's."""
        return self.network or stand_in(self.parameters or UNKNOWN_PARAMETERS, self.images)


def base_size(
    source: dict[str, Any], folder: Path | None = None, ask: bool = True, images: bool = False
) -> BaseSize:
    """What can be known of a base's size now.

    source: the suite's `source` of the base. folder: where it lies once it is ready, if anywhere.
    images: whether any of its tasks has images. The config.json of a base of the hub that is not
    ready is looked for in the hub's own cache, and with `ask` on the hub.
    """
    try:
        config, origin = _config(source, folder, ask)
        found = network(config)
    except DataError as error:
        guess = _named_size(source)
        like = stand_in_config(guess or UNKNOWN_PARAMETERS, images)
        origin = "its name" if guess else "nothing"
        return BaseSize(None, guess, origin, str(error), like, images)
    return BaseSize(found, found.parameters, origin, config=config)


def base_folder(layout: Layout, name: str, key: str) -> Path:
    """The transformers folder of a ready base."""
    return layout.base(name, key) / "model"


def _config(source: dict[str, Any], folder: Path | None, ask: bool) -> tuple[dict[str, Any], str]:
    """A base's config.json as a dict, and where it comes from. Raises DataError."""
    if folder is not None and (folder / CONFIG).is_file():
        return read_json(folder / CONFIG), "the base's files"
    if "path" in source:
        path = real_data(source["path"]) / CONFIG
        if not path.is_file():
            raise DataError(f"{path}: no such file; a transformers folder is expected")
        return _parsed(path), "the base's files"
    if "world" in source:
        return WORLDS[source["world"]], "the base's definition"
    if "llama2c" in source:
        raise DataError("a llama2c file says its size when it is converted")
    return _fetched(source, ask), "the hub"


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def _fetched(source: dict[str, Any], ask: bool) -> dict[str, Any]:
    """The config.json of a model of the hub, from its cache or the hub itself."""
    import huggingface_hub as hub

    where = {"repo_id": source["hub"], "filename": CONFIG, "revision": source.get("revision")}
    path = hub.try_to_load_from_cache(**where)
    if not isinstance(path, str) and not ask:
        raise DataError(f"{source['hub']}: not asked for; `ballast plan` asks")
    try:
        if not isinstance(path, str):
            if not hub.constants.is_offline_mode():
                # Asked once first: the download itself tries for half a minute.
                hub.utils.get_session().head(hub.hf_hub_url(**where), timeout=HUB_SECONDS)
            path = hub.hf_hub_download(**where, etag_timeout=HUB_SECONDS)
    except Exception as error:  # the hub's own errors, its HTTP client's, and the system's
        raise DataError(
            f"{source['hub']}: its size is not known ({type(error).__name__}); {way_out(error)}, "
            "or `limits:` of its own"
        ) from None
    return _parsed(Path(path))


def _named_size(source: dict[str, Any]) -> float | None:
    """Parameters as a model's name tells them: 7e9 for "Llama-2-7b-hf", or None."""
    name = str(source.get("hub", "")).rpartition("/")[2]
    found = re.findall(r"(?<![0-9.])(\d+(?:\.\d+)?)([bBmMkK])(?![A-Za-z0-9])", name)
    if not found:
        return None
    amount, unit = found[-1]
    return float(amount) * {"b": 1e9, "m": 1e6, "k": 1e3}[unit.lower()]
