"""The training loop: clips through streams, their embeddings towards the dense model's."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from ..utils.files import prepare_folder, write_whole
from ..utils.jobs import stop_on_interrupt
from ..utils.provenance import fingerprint
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .clips import Batch, ClipSet
from .losses import angle_loss, embedding_loss
from .measure import HeldOut, improvement, measure, measured_clips, plain_values
from .settings import DistillSettings
from .student import Student

STATE = "state.safetensors"


@dataclass(eq=False)
class DistillResult:
    """
    What a distillation found.

    Attributes:
        settings: what was asked for.
        training_clips: how many.
        held_out_clips: how many were measured.
        short_videos: names of videos that are too short for a clip.
        losses: of every step.
        held_out: figures on held-out clips by step and by the names of `measure.SHARES`; those of step 0 are before
            training.
        best_step: the step whose weights were written.
        best: these weights.
        seconds: of training, without the teacher's embeddings.
    """

    settings: DistillSettings
    training_clips: int
    held_out_clips: int
    short_videos: list[str]
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, dict[str, HeldOut]] = field(default_factory=dict)
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """False if it was interrupted; the same call goes on."""
        return len(self.losses) == self.settings.steps


def distill(
    videos: Sequence[Path],
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    out: str | Path,
    settings: DistillSettings | None = None,
    held_out: Sequence[Path] | None = None,
    base: str | None = None,
    on_step: Callable[[str, int, int, dict[str, HeldOut] | None], None] = lambda what, done, total, figures: None,
    cache: Path | None = None,
) -> DistillResult:
    """
    Train what a mode computes on sparse frames towards the dense model's embeddings, and write the weights that were
    best on held-out clips.

    An interrupted call leaves its state in the folder; the same call goes on from there. With several processes
    (`accelerate launch`, `torchrun`), each computes a part of every step's gradient.

    Args:
        videos: paths of the training videos.
        model: the dense model, in evaluation mode and float32; it is not changed.
        preprocess: its preprocessing.
        out: folder for the result and the state.
        settings: default: those of [`DistillSettings`].
        held_out: paths of videos to measure on; default: a part of `videos`.
        base: the checkpoint's name, which is written into the adapter.
        on_step: called with what is done, how much of how much, and the figures if there are new ones.
        cache: folder for frames and the teacher's embeddings, which several distillations may share; default: `cache`
            in `out`.

    Returns:
        Losses and held-out figures; the same on every process.

    Raises:
        ValueError: if no video is long enough for a clip, if the model is not in float32, or if the folder holds the
            state of a distillation with other settings, videos or weights.
    """
    settings = settings or DistillSettings()
    if model.dtype != torch.float32:
        raise ValueError(f"The model is in {model.dtype}; distillation needs float32 weights. Load it so.")
    out = prepare_folder(out)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    if settings.accumulate % accelerator.num_processes:
        raise ValueError(
            f"`accumulate` is {settings.accumulate}, and {accelerator.num_processes} processes share the batches of a "
            "step; expected a multiple of them."
        )
    with accelerator.main_process_first():  # the others find the teacher's embeddings in the cache
        clips = ClipSet(
            videos,
            held_out,
            model,
            preprocess,
            settings,
            cache or out / "cache",
            lambda done, total: on_step("videos", done, total, None),
        )
    settings = clips.settings
    student = Student(model, settings, base)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    digests = {"videos": clips.digests[: len(videos)], "held_out": clips.digests[len(videos) :]}
    key = settings.key(**digests, weights=fingerprint(model))
    result = DistillResult(settings, len(clips.training), len(measured_clips(clips)), clips.short_videos)
    if not read_state(out / STATE, key, result, student, optimizer):
        result.held_out[0], result.best = measure(student.model, clips), student.weights()
        on_step("steps", 0, settings.steps, result.held_out[0])
    begun, saved = time.monotonic() - result.seconds, time.monotonic()

    with stop_on_interrupt() as stop:
        for batches in prefetch(step_batches(clips, accelerator, len(result.losses)), depth=2):
            result.losses.append(train_step(student, optimizer, batches, clips, accelerator, len(result.losses)))
            step = len(result.losses)
            measured: dict[str, HeldOut] | None = None
            if step % settings.evaluate_every == 0 or result.finished:
                measured = result.held_out[step] = measure(student.model, clips)
                before, best = result.held_out[0], result.held_out[result.best_step]
                # the paper's recipe ends with its last weights
                if settings.method == "full" or improvement(before, measured) > improvement(before, best):
                    result.best_step, result.best = step, student.weights()
            on_step("steps", step, settings.steps, measured)
            result.seconds = time.monotonic() - begun
            if stop.is_set():
                accelerator.set_trigger()
            last = accelerator.check_trigger() or result.finished
            if accelerator.is_main_process and (last or time.monotonic() - saved > settings.checkpoint_seconds):
                write_state(out / STATE, key, result, student, optimizer)
                saved = time.monotonic()
            if last:
                break
    student.set_weights(result.best)
    if accelerator.is_main_process and result.finished:
        student.save(out)
    return result


def step_batches(clips: ClipSet, accelerator: Accelerator, first: int) -> Iterator[list[tuple[int, Batch]]]:
    """This process's batches of every step from `first` on, each with its number in the step."""
    settings = clips.settings
    for step in range(first, settings.steps):
        mine = range(accelerator.process_index, settings.accumulate, accelerator.num_processes)
        yield [(number, clips.draw(np.random.default_rng((settings.seed, step, number)))) for number in mine]


def train_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[int, Batch]],
    clips: ClipSet,
    accelerator: Accelerator,
    step: int,
) -> float:
    """One optimizer step on this process's part of the step's batches; the mean loss of all processes."""
    settings = clips.settings
    optimizer.zero_grad()
    total = torch.zeros((), device=accelerator.device)
    for number, batch in batches:
        rng = np.random.default_rng((settings.seed, step, number, 1))
        gate = settings.draw_gate(rng, clips.grid_at(batch.frames.shape[-1]) ** 2)
        for loss in clip_losses(student.model, batch, clips, gate):
            share = loss * accelerator.num_processes / settings.accumulate
            if share.requires_grad:
                accelerator.backward(share, inputs=student.parameters())
            total += share.detach()
    average_gradients(student, accelerator)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(step)
    optimizer.step()
    return accelerator.reduce(total, "mean").item()


def clip_losses(
    model: NeuroFlowSiglipVisionModel, batch: Batch, clips: ClipSet, gate: NeuroFlowGateConfig
) -> Iterator[Tensor]:
    """
    The loss of each frame of a batch, which sum to the batch's. What a stream remembers carries no gradient, so each
    frame's is complete when it is yielded, and memory stays that of one frame.
    """
    settings, preprocess = clips.settings, clips.preprocess_at(batch.frames.shape[-1])
    stream = model.new_stream(batch.frames.shape[1], **gate.to_dict())
    first = 0 if settings.method == "full" else 1  # a keyframe teaches an adapter nothing
    for number in range(len(batch.frames)):
        pixels = preprocess.normalise(batch.frames[number], model.dtype, model.device)
        with torch.set_grad_enabled(number >= first):
            output = model(pixels, interpolate_pos_encoding=True, stream=stream)
        if number < first:
            continue
        teacher = batch.teacher[number].to(model.device)
        loss = embedding_loss(output.pooler_output, teacher, settings.mse, settings.cosine)
        if settings.angle:
            loss = loss + settings.angle * angle_loss(output.pooler_output, teacher)
        yield loss / (len(batch.frames) - first)


def average_gradients(student: Student, accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes, exchanged in one tensor."""
    if accelerator.num_processes > 1:
        parameters = student.parameters()
        gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
        mean = accelerator.reduce(parameters_to_vector(gradients), "mean")
        for item, part in zip(parameters, mean.split([item.numel() for item in parameters]), strict=True):
            item.grad = part.view_as(item)


# --- state -----------------------------------------------------------------------------------------------------------

KEPT = ("losses", "best_step", "seconds")  # of a result, as they are


def write_state(
    path: Path, key: str, result: DistillResult, student: Student, optimizer: torch.optim.Optimizer
) -> None:
    """Write everything to go on from, whole or not at all."""
    about = {"key": key, "held_out": plain_values(result.held_out), **{name: getattr(result, name) for name in KEPT}}
    tensors = {f"weights.{name}": value for name, value in student.weights().items()}
    tensors |= {f"best.{name}": value for name, value in result.best.items()}
    for place, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{name}": value.cpu().contiguous() for name, value in moments.items()}
    write_whole(path, save(tensors, metadata={"neuroflow_distill": json.dumps(about)}))


def read_state(
    path: Path, key: str, result: DistillResult, student: Student, optimizer: torch.optim.Optimizer
) -> bool:
    """
    Put the state in a file into result, student and optimizer; False if there is none.

    Raises:
        ValueError: if it belongs to another distillation, or is damaged.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["neuroflow_distill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin anew.") from error
    if about["key"] != key:
        raise ValueError(
            f"{path.parent} holds a distillation with other settings, videos or weights. Choose another folder, or "
            f"delete {path.name} in it to begin anew."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    student.set_weights(part("weights."))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        place, moment = name.split(".")
        moments.setdefault(int(place), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    result.best = part("best.")
    result.held_out = {
        int(step): {name: HeldOut(**figures) for name, figures in measured.items()}
        for step, measured in about["held_out"].items()
    }
    for name in KEPT:
        setattr(result, name, about[name])
    return True
