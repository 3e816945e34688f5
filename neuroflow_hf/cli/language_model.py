"""Which language model a command loads."""

from pathlib import Path

from .progress import CommandProgress


def language_model(name: str | None) -> str | Path:
    """
    What `--model` names: a folder or Hub name as it is; for `smollm2` and for None, the folder with SmolLM2, which is
    fetched and converted on first use.

    Raises:
        ModelLoadError, RuntimeError, ValueError, OSError: if it is not there and cannot be made.
    """
    from ..conversion.smollm2 import NAME, smollm2_folder

    if name is not None and (name != NAME or Path(name).exists()):
        return name
    with CommandProgress("") as progress:
        return smollm2_folder(progress.show)
