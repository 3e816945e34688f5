"""The tower's weights: from an ONNX file's numbers to DINOv2, and from DINOv2 to SigLIP's vision tower."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf.loading import quiet_transformers
from recipes.siglip_dinov2_small.wheels import MODEL_WHEEL

IMAGE_SIZE = 224
HEADS = 6
LAYER_NORM_EPS = 1e-6


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
    """
    Name ONNX numbers as DINOv2 checkpoints on the Hugging Face Hub name them: float32 tensors by that name.

    Linear weights have lost their name in the export and are stored transposed. The node that multiplies by one still
    carries the module's path: `/backbone/encoder/layer.0/mlp/fc1/MatMul` has `encoder.layer.0.mlp.fc1.weight`.

    Args:
        arrays: initializers by name. Used are `backbone.*`, the position embeddings `onnx::Reshape_*` (1, P, D), the
            CLS token's position `onnx::Concat_*` (1, 1, D) and the weights that `matmuls` names.
        matmuls: node name and initializer name of each matrix product with a stored (in, out) weight.

    Raises:
        ValueError: if there is not exactly one array of position embeddings.
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
    """
    The DINOv2 of transformers with a state from `dinov2_state`, its CLS token first, in evaluation mode and float32.
    No weight's shape tells how many attention heads there are. ValueError for a weight that is missing or unknown.
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


def layer_count(state: Mapping[str, Tensor]) -> int:
    """Number of transformer layers in a DINOv2 state dict."""
    return len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """
    Resample square position embeddings (P, D), without the CLS token's, to (grid * grid, D) as DINOv2 does for an
    image of another size.
    """
    side = math.isqrt(positions.shape[0])
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # Not antialiased although this shrinks: DINOv2 itself does not, and the tower is to give what it gives.
    resampled = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resampled.permute(0, 2, 3, 1).reshape(grid * grid, -1).contiguous()


def siglip_state(dinov2: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """
    Turn a DINOv2 state into one of SigLIP's vision tower, by `SiglipVisionModel` name, without its pooling head;
    `grid` is the number of patches in a row.

    LayerScale multiplies a linear layer's output by a vector, so it is folded into that layer's rows and bias. The CLS
    token has no place in SigLIP and is dropped, which is the one change that alters patch features: in DINOv2 they
    attend to it. `make_up_for_cls` gives back what can be given back.
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
    """
    The SigLIP vision tower of a DINOv2 state, in evaluation mode and float32; its pooling head, seeded, is untrained.

    Raises:
        ValueError: for a weight that is missing or unknown.
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


@torch.no_grad()
def make_up_for_cls(tower: SiglipVisionModel, original: Dinov2Model, pixels: Tensor) -> None:
    """
    Add to the biases of a converted tower, in place, what its patches lose on average, over images (B, 3, H, W), for
    having no CLS token to attend to.

    Layer after layer, the mean difference between the original's patches and the tower's goes into the bias of fc2,
    the layer's last sum. What the CLS token gave to one patch and not to another, or in one image only, stays lost.
    """
    theirs, ours = original.embeddings(pixels), tower.embeddings(pixels)  # (B, 1 + N, D), (B, N, D)
    for their_layer, our_layer in zip(original.encoder.layer, tower.encoder.layers, strict=True):
        theirs, ours = their_layer(theirs), our_layer(ours, attention_mask=None)
        lost = (theirs[:, 1:] - ours).mean(dim=(0, 1))
        our_layer.mlp.fc2.bias += lost
        ours += lost


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU random numbers inside the block and give the caller's back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
