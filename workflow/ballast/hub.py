"""What a model hub's refusals mean for a user."""

from __future__ import annotations

ELSEWHERE = "give the base a `path:` to a local transformers folder"


def way_out(error: Exception) -> str:
    """What to do after an error of the hub's client: ask for access, or go without the hub."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return (
            "its owner asks for your consent: give it on the model's page of the hub, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    return f"without the hub, {ELSEWHERE}"
