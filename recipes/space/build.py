"""Write the folder of a Space, complete but for what its `requirements.txt` installs."""

import shutil
from importlib.metadata import version
from pathlib import Path

from neuroflow_hf.utils.files import new_folder

FILES = ("README.md", "app.py", "requirements.txt")
MODEL = "neuroflow-siglip-small"


def build_space(model: Path, output: Path) -> Path:
    """
    Write the Space; one that is there already is replaced.

    Args:
        model: folder of the checkpoint to take along.
        output: folder to write.

    Returns:
        `output`.

    Raises:
        FileExistsError: if there is something at `output` that is no Space of this kind.
    """
    output = Path(output)
    if output.exists() and all((output / name).is_file() for name in FILES):
        shutil.rmtree(output)
    with new_folder(output) as folder:
        for name in FILES:
            text = Path(__file__).with_name(name).read_text(encoding="utf-8")
            (folder / name).write_text(text.replace("GRADIO_VERSION", version("gradio")), encoding="utf-8")
        shutil.copytree(model, folder / "model")
    return output
