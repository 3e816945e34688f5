"""Which language model a command loads, and how the model generates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from .option_groups import given_bypass
from .progress import CommandProgress


def language_model(name: str | None) -> str | Path:
    """
    The model that `--model` names: a folder or Hub name unchanged; for `smollm2` and None, the folder of SmolLM2,
    which is fetched and converted on first use.
    """
    from ..conversion.smollm2 import NAME, smollm2_folder

    if name is not None and (name != NAME or Path(name).exists()):
        return name
    with CommandProgress("") as progress:
        return smollm2_folder(progress.show)


def with_own_threshold(model: Any, tokenizer: Any, own: dict, raw: bool = False) -> dict:
    """
    Bypass options with a threshold in place of a rate. A checkpoint without the similarities that this needs is
    calibrated on a few built-in prompts first, with a message on stderr. ValueError for wrong options.
    """
    from ..drift.calibrate import PROMPTS, with_threshold

    def show(done: int):
        if not done:
            typer.echo(
                f"Measuring the checkpoint's similarities on {len(PROMPTS)} built-in prompts, to choose the threshold."
                " `neuroflow calibrate` keeps them.",
                err=True,
            )
        progress.show("calibrate", done, len(PROMPTS))

    with CommandProgress("prompts") as progress:
        return with_threshold(model, tokenizer, own, raw, show)


def load_with_decoding(how: dict, own: dict, raw: bool = False) -> tuple[Any, Any, Any]:
    """
    A language model, its tokenizer, and how it generates, a [`Decoding`]: from the values of the options `GENERATION`
    and `BYPASS_OPTIONS`. Sets the random seed. Wrong options raise a ValueError before anything is printed.
    """
    own = given_bypass(own)
    if how["bypass"] and how["lossless"]:
        raise ValueError("--lossless drafts by lookup, or by the bypass options given; leave out --bypass.")

    import torch

    from ..drift.continuation import Decoding
    from ..language.lossless_config import NeuroFlowLosslessConfig
    from ..loading import dtype_named, load_language_model

    decoding = Decoding(how["max_new_tokens"], how["temperature"], how["top_p"])
    dtype, source = dtype_named(how["dtype"]), language_model(how["model"])
    model, tokenizer = load_language_model(source, dtype, how["device"])
    torch.manual_seed(how["seed"])
    if how["bypass"] and model.config.bypass is None and not own:
        raise ValueError(
            f"The configuration of {source} has no bypass. Ask for one, such as --rate 0.2, or write one into the "
            "checkpoint with `neuroflow calibrate --rate 0.2`."
        )
    if own or how["bypass"]:
        own = with_own_threshold(model, tokenizer, own, raw)
        decoding = replace(decoding, bypass=own)
    if how["lossless"]:
        drafts = {"drafter": "bypass", "bypass": own} if own else True
        options = NeuroFlowLosslessConfig.from_options(drafts, model.config.lossless)
        options.draft_bypass(model.config.num_hidden_layers, model.config.bypass_similarities)
        decoding = replace(decoding, bypass=None, lossless=drafts)
    return model, tokenizer, decoding
