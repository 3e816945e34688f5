"""Which language model a command loads."""

from pathlib import Path

from .progress import CommandProgress


def language_model(name: str | None) -> str | Path:
    """
    What `--model` names: a folder or Hub name as it is, `smollm2` as the folder that it is converted into on first
    use, the small Phi-3 in the checkout for None.

    Raises:
        ModelLoadError, RuntimeError, ValueError, OSError: if it is not there and cannot be made.
    """
    from ..loading import default_language_model

    if name is None:
        return default_language_model()
    from ..conversion.smollm2 import NAME, smollm2_folder

    if name != NAME or Path(name).exists():
        return name
    with CommandProgress("") as progress:
        return smollm2_folder(progress.show)
