"""The tower's pooling head: views of photographs, what both models make of them, and the fit of one to the other."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Model, SiglipVisionModel

from recipes.siglip_dinov2_small.weights import IMAGE_SIZE, seeded

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
BATCH = 32


# --- views of photographs, and what both models make of them ---------------------------------------------------------


def random_view(photo: Image.Image, rng: np.random.Generator, size: int = IMAGE_SIZE) -> Image.Image:
    """
    A random crop of a photograph with random brightness, sometimes mirrored or blurred: RGB of (size, size) pixels.
    The crop has 10 to 100 % of the photograph's area and an aspect ratio of 3:4 to 4:3.
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
    """
    `count` views of (224, 224) pixels, from the photographs in turn. A third of the views show two photographs side by
    side, because most photographs show one thing, and the head should also learn the CLS output of several things.
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
    """Normalise RGB images of equal size by ImageNet's mean and deviation, as DINOv2 does: (B, 3, H, W) float32."""
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@torch.no_grad()
def paired_features(
    tower: SiglipVisionModel, original: Dinov2Model, pixels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Both models on the same normalised images float32 (B, 3, H, W): the tower's patch features (B, N, D) and pooled
    output (B, D), the original's patch features (B, N, D) and CLS output (B, D), all after the final norm.
    """
    ours = tower(pixel_values=pixels)
    theirs = original(pixel_values=pixels).last_hidden_state
    return ours.last_hidden_state, ours.pooler_output, theirs[:, 1:], theirs[:, 0]


def training_features(
    tower: SiglipVisionModel, original: Dinov2Model, views: Sequence[Image.Image], console: Console
) -> tuple[Tensor, Tensor]:
    """Tower's patch features (M, N, D) float16 and original's CLS outputs (M, D) float32 of the training views."""
    patches, targets = [], []
    for start in track(range(0, len(views), BATCH), "Computing features", console=console):
        ours, _, _, cls = paired_features(tower, original, to_pixels(views[start : start + BATCH]))
        # half precision halves the 350 MB; dropping patches adds far more noise
        patches.append(ours.half())
        targets.append(cls)
    return torch.cat(patches), torch.cat(targets)


# --- pooling head ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_head_at_mean(head: nn.Module) -> None:
    """
    Set SigLIP's pooling head, in place, so that it gives the mean patch feature, or nearly.

    Values and outputs pass unchanged, the MLP adds nothing, and the probe is small, so that all patches have about the
    same weight. A few photographs are enough to train from there, but not from random weights.
    """
    dim = head.attention.embed_dim
    head.attention.in_proj_weight[2 * dim :] = torch.eye(dim)
    head.attention.in_proj_bias.zero_()
    head.attention.out_proj.weight.copy_(torch.eye(dim))
    head.attention.out_proj.bias.zero_()
    head.mlp.fc2.weight.zero_()
    head.mlp.fc2.bias.zero_()


def probe_weights(head: nn.Module, patches: Tensor) -> Tensor:
    """
    Attention weights of SigLIP's pooling head over patches float32 (B, N, D): (B, N, heads), which sum to 1 over the
    patches.
    """
    attention = head.attention
    heads, width = attention.num_heads, attention.head_dim
    query_weight, key_weight, _ = attention.in_proj_weight.chunk(3)  # (D, D) each
    query_bias, _, _ = attention.in_proj_bias.chunk(3)
    query = functional.linear(head.probe[0, 0], query_weight, query_bias).view(heads, width)
    # The key's bias is left out: it adds the same to the score of every patch, which softmax does not see.
    direction = torch.einsum("hw,hwd->hd", query, key_weight.view(heads, width, -1)) / math.sqrt(width)
    return torch.softmax(patches @ direction.T, dim=1)


def pool(head: nn.Module, patches: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    `head(patches)` of SigLIP's pooling head, float32 (B, N, D) to (B, D), computed in another order, which is many
    times faster to train.

    The head has a single query, the probe. So each attention head's key matrix can be applied to the query once
    instead of to every patch, and its value matrix to the weighted mean of the patches instead of to every patch.
    `weights`, from `probe_weights`, are computed if they are not given.
    """
    attention = head.attention
    heads, width = attention.num_heads, attention.head_dim
    value_weight, value_bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    if weights is None:
        weights = probe_weights(head, patches)
    means = torch.einsum("bnh,bnd->bhd", weights, patches)
    values = torch.einsum("bhd,hwd->bhw", means, value_weight.view(heads, width, -1)).flatten(1) + value_bias
    pooled = attention.out_proj(values)
    return pooled + head.mlp(head.layernorm(pooled))


def fit_head(head: nn.Module, patches: Tensor, targets: Tensor, *, epochs: int, seed: int, console: Console) -> float:
    """
    Train SigLIP's pooling head, in place, so that it gives the targets (M, D) float32 for the patches (M, N, D).

    Returns:
        Mean loss of the last epoch: (1 - cosine) + squared error over the targets' variance.
    """
    spread = targets.var(dim=0).mean()
    batches = math.ceil(len(targets) / BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * batches, pct_start=0.1)
    head.train()
    with seeded(seed):
        for _ in track(range(epochs), "Fitting the pooling head", console=console):
            total = 0.0
            for chosen in torch.randperm(len(targets)).split(BATCH):
                # a random half of the patches, against overfitting to few photographs
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
    head.eval()
    return total / len(targets)
