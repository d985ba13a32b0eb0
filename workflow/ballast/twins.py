"""What PEFT 0.21.2 has of the methods here: one table for the index, the benchmark and the tests.

A twin is PEFT's configuration that computes the same as our file at its defaults, or that comes
nearest; where the two differ the note says it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PEFT_VERSION = "0.21.2"


@dataclass(frozen=True)
class Twin:
    """PEFT's counterpart of a method.

    config: name of its configuration class in `peft`.
    options: options(rank, hyper) are the keywords of the class, without the modules; rank and hyper
        are those of our method.
    note: what is not in the configuration, or differs.
    step: a training step of it can be measured beside ours.
    prompt: it changes inputs or cache, takes no modules, and is wrapped around the model.
    """

    config: str
    options: Callable[[int, Any], dict[str, Any]]
    note: str = ""
    step: bool = True
    prompt: bool = False

    def text(self) -> str:
        """How the index names it: the class and what tells it from the class's default."""
        telling = {k: v for k, v in self.options(-1, _Any()).items() if not _sized(k, v)}
        inside = ", ".join(f"{key}={value!r}" for key, value in telling.items())
        return f"`{self.config}({inside})`" + (f"; {self.note}" if self.note else "")


class _Any:
    """Stands for settings whose values do not matter."""

    def __getattr__(self, name: str) -> int:
        return -1


def _sized(key: str, value: Any) -> bool:
    """Whether an option only says a size or a scale that ours has too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lora(alpha_over_r: float = 2.0, **options: Any) -> Callable[[int, Any], dict[str, Any]]:
    return lambda rank, hyper: {"r": rank, "lora_alpha": alpha_over_r * rank, **options}


def _tokens(rank: int, hyper: Any) -> dict[str, Any]:
    return {"num_virtual_tokens": hyper.tokens}


TWINS: dict[str, Twin] = {
    "lora": Twin("LoraConfig", _lora()),
    "lora_plus": Twin("LoraConfig", _lora(), "create_loraplus_optimizer"),
    "lora_fa": Twin("LoraConfig", _lora(), "create_lorafa_optimizer (ours: projected)"),
    "rslora": Twin(
        "LoraConfig", lambda rank, hyper: {"r": rank, "lora_alpha": hyper.alpha, "use_rslora": True}
    ),
    "dora": Twin("LoraConfig", _lora(use_dora=True)),
    "pissa": Twin("LoraConfig", _lora(1.0, init_lora_weights="pissa")),
    "olora": Twin("LoraConfig", _lora(1.0, init_lora_weights="olora")),
    "corda": Twin("LoraConfig", _lora(1.0, init_lora_weights="corda"), step=False),
    "adalora": Twin(
        "AdaLoraConfig",
        lambda rank, hyper: {
            "target_r": rank, "init_r": -(-3 * rank // 2), "lora_alpha": hyper.alpha,
            "total_step": 1000, "tinit": 100, "tfinal": 100,
        },
        "update_and_allocate after every step",
    ),
    "vera": Twin("VeraConfig", lambda rank, hyper: {"r": rank, "d_initial": hyper.d_initial}),
    "bone": Twin("MissConfig", lambda rank, hyper: {"r": rank}, "strided groups"),
    "disha": Twin(
        "MissConfig",
        lambda rank, hyper: {"r": rank, "mini_r": hyper.tile, "init_weights": "mini"},
        "strided groups",
    ),
    "bat": Twin("MissConfig", lambda rank, hyper: {"r": rank, "init_weights": "bat"}),
    "fourierft": Twin(
        "FourierFTConfig",
        lambda rank, hyper: {"n_frequency": hyper.n_frequency, "scaling": hyper.scaling},
        "always with another draw",
    ),
    "ia3": Twin("IA3Config", lambda rank, hyper: {}),
    "prompt_tuning": Twin("PromptTuningConfig", _tokens, prompt=True),
    "prefix_tuning": Twin("PrefixTuningConfig", _tokens, prompt=True),
    "p_tuning": Twin("PromptEncoderConfig", _tokens, prompt=True),
}  # fmt: skip
