"""What a drafter learns from: prompts with the model's greedy texts, and its final hidden states along both."""

from collections.abc import Callable, Sequence
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
    Generate the text of each prompt densely, in batches, and keep each in a file of a folder. Batches whose files are
    there already are left out.

    Args:
        model: a [`NeuroFlowPhi3ForCausalLM`].
        rows: token ids of each prompt.
        new_tokens: maximum number of tokens to generate after each.
        folder: where to write.
        on_step: called after each batch with the number of prompts finished.
    """
    done, batches, ends = 0, make_batches(rows, BATCH), end_tokens(model)
    for number in np.random.default_rng(0).permutation(len(batches)):  # not by length, so that progress is even
        batch = batches[number]
        paths = [folder / f"{index:06d}.safetensors" for index in batch.indices]
        if not all(path.exists() for path in paths):
            states: list[torch.Tensor] = []
            hook = model.model.norm.register_forward_hook(lambda *found, states=states: states.append(found[2]))
            try:
                new = decode(model, batch, new_tokens, ends=ends).tokens
            finally:
                hook.remove()
            for path, index, after, of_row in zip(paths, batch.indices, new, torch.cat(states, dim=1), strict=True):
                begin, padding = len(rows[index]), batch.ids.shape[1] - len(rows[index])
                tokens = torch.tensor([*rows[index], *cut_at_end(after.tolist(), ends)])
                kept = of_row[padding : padding + len(tokens) - 1]
                targets = model.lm_head(kept).argmax(dim=-1).cpu()
                targets[begin - 1 :] = tokens[begin:]  # equal but for rounding
                found = {"tokens": tokens, "states": kept.half().cpu(), "targets": targets}
                write_whole(path, save({"begin": torch.tensor(begin), **found}))
        done += len(batch.indices)
        on_step(done)


def read_texts(folder: Path) -> list[Text]:
    """The texts that `write_texts` left in a folder, in the order of their prompts."""
    found = [(int(path.stem), load_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    return [Text(index, int(parts.pop("begin")), **parts) for index, parts in found]
