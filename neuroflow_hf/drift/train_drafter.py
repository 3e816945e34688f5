"""
Train a drafter on a model's greedy texts, and judge it on held-out prompts: `neuroflow tune-drafts`.

A draft of several tokens continues from the drafter's own predictions, and so does training: the second pass over a
text reads the states that the first predicted, and sees keys and values as the second token of a draft does.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..language.drafter import NeuroFlowDrafter
from ..utils.jobs import stop_on_interrupt
from ..utils.provenance import fingerprint, key_of
from .draft_costs import check_seconds, draft_seconds
from .drafter_texts import Text, read_texts, write_texts

IGNORED = -100  # a target that the drafter's head lacks
STATE, CHECKPOINT_SECONDS = "state", 60.0
WARM_UP = 20  # steps
DEEPEST = 3  # tokens of a draft that are judged
HELD_OUT = 10  # every tenth prompt of a task


@dataclass(frozen=True)
class DrafterSettings:
    """
    Args:
        head_size: number of tokens that the drafter can draft: those that are most frequent in the texts.
        intermediate_size: width of its MLP.
        epochs: passes over the texts.
        passes: tokens of a draft that are trained, each from the prediction before it.
        batch: texts in a step.
        learning_rate: the largest, after which it falls to zero.
        seed: of the order of the texts.
    """

    head_size: int = 4096
    intermediate_size: int = 512
    epochs: int = 8
    passes: int = 2
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0


class Progress:
    """What a training has done so far, which accelerate keeps beside weights and optimizer."""

    def __init__(self, key: str):
        self.key, self.step = key, 0
        self.losses: list[float] = []  # of every step
        self.agreement: list[list[float]] = []  # of every epoch: held-out drafts that agree in their first n tokens

    @property
    def best(self) -> int:
        """The epoch, from 1, whose drafts agree in most tokens."""
        return 1 + max(range(len(self.agreement)), key=lambda epoch: sum(self.agreement[epoch]))

    def state_dict(self) -> dict:
        """For accelerate."""
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """For accelerate."""
        vars(self).update(state)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write accelerate's state into a folder, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        accelerator.save_state(f"{temporary}/new")
        if folder.exists():
            folder.rename(f"{temporary}/old")
        Path(temporary, "new").rename(folder)


def frequent_tokens(texts: Sequence[Text], count: int, vocabulary: int) -> list[int]:
    """The most frequent targets of the texts; of equally frequent ones the first, which tokenizers learned earlier."""
    seen = Counter(token for text in texts for token in text.targets.tolist())
    return sorted(sorted(range(vocabulary), key=lambda token: (-seen[token], token))[:count])


class Learner:
    """
    A drafter with what it reads from its model.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        drafter: its drafter.
    """

    def __init__(self, model: Any, drafter: NeuroFlowDrafter):
        self.drafter, self.device = drafter, model.device
        self.embeddings = model.get_input_embeddings().weight.detach()
        self.head = model.lm_head.weight.detach()[drafter.head_tokens]
        self.places = torch.full((len(self.embeddings),), IGNORED, device=self.device)  # of tokens in the head
        self.places[drafter.head_tokens] = torch.arange(len(self.head), device=self.device)

    def passes(self, texts: Sequence[Text], count: int):
        """
        Predict each token of some texts as the first token of a draft, then as the second, and so on.

        Yields:
            For each pass the predicted states [B, n, D], the model's states there [B, n, D], and the targets [B, n] by
            their place in the head. The first of n predictions is the one after the second token.
        """

        def padded(rows: list[torch.Tensor], value: float) -> torch.Tensor:
            return pad_sequence(rows, True, value).to(self.device)

        states = padded([text.states.float() for text in texts], 0)
        tokens = padded([text.tokens[:-1] for text in texts], 0)
        targets = self.places[padded([text.targets for text in texts], 0)]
        for row, text in enumerate(texts):
            targets[row, len(text.targets) :] = IGNORED
        length = states.shape[1] - 1  # pairs of a state and the token after it
        cache, predicted = DynamicCache(), states[:, :-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=self.device)
        for depth in range(count):
            # pair i: the state at i + depth, known or predicted, and the token after it; sees the pairs up to i of the
            # first pass, and those of the same draft
            rest = length - depth
            mask = torch.cat([seen[:rest], *[own[:rest, : length - past] for past in range(1, depth + 1)]], dim=1)
            positions = torch.arange(depth, length, device=self.device)[None]
            embedded = self.embeddings[tokens[:, 1 + depth :]]
            predicted = self.drafter(predicted[:, :rest], embedded, cache, positions, mask[None, None])
            yield predicted, states[:, 1 + depth :], targets[:, 1 + depth :]

    def loss(self, texts: Sequence[Text], count: int) -> torch.Tensor:
        """The mean loss of the first tokens of a draft, by the model's distribution over the drafter's tokens."""
        total = torch.zeros((), device=self.device)
        for predicted, states, targets in self.passes(texts, count):
            kept = targets != IGNORED
            logits = predicted[kept] @ self.head.T
            total = total + cross_entropy(logits, (states[kept] @ self.head.T).softmax(dim=-1)) / count
        return total

    @torch.no_grad()
    def agreement(self, texts: Sequence[Text]) -> tuple[np.ndarray, int]:
        """How many drafts of the greedy text agree in their first token, the first two ..., [DEEPEST], and of all."""
        agreed, count = np.zeros(DEEPEST), 0
        for text in texts:
            so_far, first = None, text.begin - 1  # the first pair with a generated token
            for depth, (predicted, _, targets) in enumerate(self.passes([text], DEEPEST)):
                right = (predicted[0, first:] @ self.head.T).argmax(dim=-1) == targets[0, first:]
                so_far = right if so_far is None else so_far[: len(right)] & right
                agreed[depth] += so_far.sum().item()
                count += len(right) if depth == 0 else 0
        return agreed, count


def fit_drafter(
    model: Any,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    out: Path,
    name: str,
    settings: DrafterSettings,
    on_step: Callable[[str, int, int], object] = lambda *_: None,
) -> dict | None:
    """
    Train a drafter, and save in `out` the one of the epoch that agrees most often on held-out texts.

    An interrupted call leaves its state in `out`; the same call goes on from there, to the same result.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        texts, held_out: what to learn from, and what to choose the epoch by.
        out: folder of the result.
        name: of the model, for the drafter's configuration.
        settings: of the training.
        on_step: called with what is done, how much of it, and the total.

    Returns:
        The loss and the held-out agreement of every epoch, and the best epoch; None if it was interrupted.

    Raises:
        ValueError: if the folder holds the state of another training.
    """
    weights = fingerprint(model)
    digest = [[text.index, text.begin, text.tokens.tolist()] for text in (*texts, *held_out)]
    key = key_of(settings=asdict(settings), weights=weights, texts=digest)
    head = frequent_tokens(texts, min(settings.head_size, model.config.vocab_size), model.config.vocab_size)
    drafter = NeuroFlowDrafter.for_model(model, head, name, weights, settings.intermediate_size)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    each = -(-len(texts) // settings.batch)
    total = settings.epochs * each
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    warm = min(WARM_UP, total)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    drafter, optimizer, scheduler = accelerator.prepare(drafter, optimizer, scheduler)
    learner = Learner(model, drafter)
    progress = Progress(key)
    accelerator.register_for_checkpointing(progress)
    state = out / STATE
    if state.exists():
        accelerator.load_state(state)
        if progress.key != key:
            raise ValueError(
                f"{out} holds the state of a training with other settings, texts or weights. Choose another folder, "
                f"or delete {STATE} in it to begin anew."
            )
    saved = time.monotonic()
    with stop_on_interrupt() as stop:
        while progress.step < total:
            order = np.random.default_rng((settings.seed, progress.step // each)).permutation(len(texts))
            chosen = order[progress.step % each :: each]  # of similar number, not of similar length
            loss = learner.loss([texts[place] for place in chosen], settings.passes)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(drafter.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.losses.append(loss.item())
            progress.step += 1
            on_step("steps", progress.step, total)
            if progress.step % each == 0:
                agreed, count = learner.agreement(held_out)
                progress.agreement.append((agreed / count).tolist())
                if progress.best == len(progress.agreement):
                    copy.deepcopy(drafter).half().save_pretrained(out)
            if progress.step % each == 0 or stop.is_set() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_state(accelerator, state)
                saved = time.monotonic()
            if stop.is_set():
                return None
    return {"losses": progress.losses, "agreement": progress.agreement, "best_epoch": progress.best}


def judge(learner: Learner, texts: Sequence[Text], checks: Sequence[float], draft: float) -> dict:
    """
    How often drafts agree in their first n tokens, and the expected speed of drafts of the best length.

    Args:
        learner: the trained drafter.
        texts: held-out texts.
        checks: times of dense forwards by their number of draft tokens, from 0 on, in dense steps.
        draft: time of a draft token, in dense steps.
    """
    agreed, count = learner.agreement(texts)
    shares = (agreed / count).tolist()
    speeds = [1.0] + [
        (1 + sum(shares[:length])) / (checks[length] + length * draft) for length in range(1, DEEPEST + 1)
    ]
    length = int(np.argmax(speeds))
    return {"tokens": count, "agreement": shares, "length": length, "speed": speeds[length]}


def tune_drafter(
    model: Any,
    rows: Sequence[Sequence[int]],
    tasks: Sequence[str],
    out: Path,
    name: str,
    new_tokens: int,
    settings: DrafterSettings,
    on_step: Callable[[str, int, int], object] = lambda *_: None,
) -> dict | None:
    """
    Generate the texts of prompts, train a drafter on them, and judge it on every tenth prompt of each task.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`] in float32.
        rows: token ids of each prompt.
        tasks: the task of each prompt.
        out: folder of the drafter, the texts and the training's state.
        name, settings, on_step: as of `fit_drafter`.
        new_tokens: maximum number of tokens to generate after each prompt.

    Returns:
        Times, losses, agreement of every epoch, and of each task; None if it was interrupted.

    Raises:
        ValueError: if there are too few texts to hold some out, or as of `fit_drafter`.
    """
    key = key_of(weights=fingerprint(model), rows=[list(row) for row in rows], new_tokens=new_tokens)
    folder = out / f"texts-{key}"
    write_texts(model, rows, new_tokens, folder, lambda done: on_step("texts", done, len(rows)))
    texts = [text for text in read_texts(folder) if len(text.tokens) - text.begin > DEEPEST]
    seen: Counter = Counter()
    split: tuple[list[Text], list[Text]] = ([], [])
    for text in texts:
        seen[tasks[text.index]] += 1
        split[seen[tasks[text.index]] % HELD_OUT == 0].append(text)
    training, held_out = split
    if not held_out:
        raise ValueError(f"{len(texts)} prompts have texts to learn from; expected at least {HELD_OUT} of a task.")
    fitted = fit_drafter(model, training, held_out, out, name, settings, on_step)
    if fitted is None:
        return None
    drafter = NeuroFlowDrafter.from_pretrained(out, dtype=model.dtype).to(model.device)
    learner, ids = Learner(model, drafter), held_out[0].tokens[None].to(model.device)
    seconds = check_seconds(model, ids, range(1, DEEPEST + 2))
    checks, draft = [value / seconds[1] for value in seconds.values()], draft_seconds(model, drafter, ids) / seconds[1]
    by_task = {task: [text for text in held_out if tasks[text.index] == task] for task in dict.fromkeys(tasks)}
    return {
        "step_seconds": seconds[1],
        "check": checks[1:],
        "draft": draft,
        "texts": len(training),
        "tokens": sum(len(text.tokens) - text.begin for text in training),
        **fitted,
        "held_out": {task: judge(learner, chosen, checks, draft) for task, chosen in by_task.items() if chosen},
    }
