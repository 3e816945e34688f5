"""What a drafter learns from: prompts with the model's greedy texts, and its final hidden states along both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..language.calibration import cut_at_end, end_tokens
from ..utils.files import write_whole
from .decode import decode, make_batches

BATCH = 32


@dataclass(frozen=True)
class Text:
    """
    A prompt and the model's greedy text after it.

    Args:
        index: the prompt's place in the file.
        begin: number of prompt tokens.
        tokens: int64 [L], of both.
        states: [L - 1, D], the model's final hidden states at all tokens but the last, in half precision.
        targets: int64 [L - 1], the most probable token after each of them: after the prompt, the text itself.
    """

    index: int
    begin: int
    tokens: torch.Tensor
    states: torch.Tensor
    targets: torch.Tensor


@torch.inference_mode()
def write_texts(
    model: Any,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    folder: Path,
    on_step: Callable[[int], object] = lambda done: None,
) -> None:
    """
    Generate the text of each prompt densely, in batches, and keep it in a folder, a file for each batch. Files that
    are there already are kept.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        rows: token ids of each prompt.
        new_tokens: maximum number of tokens to generate after each.
        folder: where to write.
        on_step: called after each batch with the number of prompts finished.
    """
    done, batches = 0, make_batches(rows, BATCH)
    for number in np.random.default_rng(0).permutation(len(batches)):  # not by length, so that progress is even
        batch, path = batches[number], folder / f"{number:04d}.safetensors"
        done += len(batch.indices)
        if not path.exists():
            states: list[torch.Tensor] = []
            hook = model.model.norm.register_forward_hook(lambda *found, states=states: states.append(found[2]))
            try:
                decoded = decode(model, batch, new_tokens, ends=end_tokens(model))
            finally:
                hook.remove()
            write_whole(
                path, save(batch_tensors(model, rows, batch.indices, decoded.tokens, torch.cat(states, dim=1)))
            )
        on_step(done)


def batch_tensors(
    model: Any, rows: Sequence[Sequence[int]], indices: Sequence[int], new: torch.Tensor, states: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A batch's texts as tensors, one after the other, of new tokens [B, n] and states [B, T + n - 1, D]."""
    texts, kept, targets = [], [], []
    padded = states.shape[1] + 1 - new.shape[1]  # length of the prompts
    for row, index in enumerate(indices):
        tokens = [*rows[index], *cut_at_end(new[row].tolist(), end_tokens(model))]
        first = padded - len(rows[index])
        texts.append(torch.tensor(tokens))
        kept.append(states[row, first : first + len(tokens) - 1])
        targets.append(model.lm_head(kept[-1]).argmax(dim=-1))
        targets[-1][len(rows[index]) - 1 :] = texts[-1][len(rows[index]) :]  # equal but for rounding
    return {
        "index": torch.tensor(indices),
        "begin": torch.tensor([len(rows[index]) for index in indices]),
        "length": torch.tensor(list(map(len, texts))),
        "tokens": torch.cat(texts),
        "states": torch.cat(kept).half().cpu(),
        "targets": torch.cat(targets).cpu(),
    }


def read_texts(folder: Path) -> Iterator[Text]:
    """The texts that `write_texts` left in a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        lengths = found["length"].tolist()
        fed = [length - 1 for length in lengths]
        yield from map(
            Text,
            found["index"].tolist(),
            found["begin"].tolist(),
            found["tokens"].split(lengths),
            found["states"].split(fed),
            found["targets"].split(fed),
        )
