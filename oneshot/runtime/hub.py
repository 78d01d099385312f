"""The Hugging Face hub: whether it may be asked, and whether it answers."""

import functools
import os

from .inputs import reason


def offline(variable: str = "HF_HUB_OFFLINE") -> bool:
    """Whether the user has told the Hugging Face libraries to stay with their cache; one by a variable of its own."""
    return os.environ.get(variable, "0").lower() in ("1", "true", "yes", "on")


def hub_away() -> str | None:
    """Why the hub does not answer, or None if it does (with any status). One request of at most 5 seconds, once."""
    return "HF_HUB_OFFLINE is set" if offline() else _asked()


@functools.cache
def _asked() -> str | None:
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # from whichever HTTP library huggingface_hub uses
        return f"{type(error).__name__}: {reason(error)}"
    return None
