"""Outputs of single encoder layers that a stream keeps, for models that read them (`output_hidden_states`)."""

import torch

from .layer_step import ModeSpec

HiddenStates = bool | int | list[int] | tuple[int, ...] | None


def requested_hidden_states(request: HiddenStates, num_layers: int) -> tuple[int, ...]:
    """
    The hidden states that `output_hidden_states` asks for: 0 is the encoder's input, l the output of its l-th layer.

    Args:
        request: True for all, or, as transformers' video language models pass it, one index or several; negative ones
            count from the last layer.
        num_layers: L.

    Raises:
        ValueError: for an index that no hidden state has.
    """
    if request is None or request is False:
        return ()
    everything = range(num_layers + 1)
    indices = everything if request is True else [request] if isinstance(request, int) else request
    for index in indices:
        if not -len(everything) <= index < len(everything):
            raise ValueError(
                f"`output_hidden_states` asks for hidden state {index}; expected 0 to {num_layers}, or "
                f"-{len(everything)} to -1."
            )
    return tuple(sorted({everything[index] for index in indices}))


def hidden_state_name(index: int) -> str:
    """The name of a hidden state among a stream's memories."""
    return f"hidden_state_{index}"


def as_output(kept: dict[str, torch.Tensor], requested: tuple[int, ...], num_layers: int) -> tuple | None:
    """Copies of the requested hidden states as transformers returns them: L + 1 entries, None for the others."""
    if not requested:
        return None
    return tuple(
        kept[hidden_state_name(index)].clone() if index in requested else None for index in range(num_layers + 1)
    )


def require_kept(requested: tuple[int, ...], kept: tuple[int, ...], mode: ModeSpec) -> None:
    """Raise a ValueError if the mode keeps no outputs, or a hidden state is not among those that the stream keeps."""
    if requested and not mode.pools_all_patches:
        raise ValueError(
            "`output_hidden_states` is not supported in mode `eliminate`, which keeps no outputs; make the stream "
            "with another mode."
        )
    missing = sorted(set(requested) - set(kept))
    if missing:
        raise ValueError(
            f"`output_hidden_states` asks for hidden states {missing}, and this stream keeps {list(kept)}: its first "
            "frame decides. Ask for the same ones on every frame, or call `stream.reset()`."
        )
