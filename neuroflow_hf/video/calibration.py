"""
Logit bias calibration: what a label's logit loses on average through a stream, added back.

    bias = LogitBias.fit(labels, dense_logits, streamed_logits, stream.gate, fingerprint(model))
    bias.save("path/to/siglip")                                   # writes logit_bias.safetensors beside the checkpoint

    bias = LogitBias.load("path/to/siglip")
    calibrated = bias.applied_to(labels, stream.gate, fingerprint(model))
    calibrated.scores(output.pooler_output)                       # of streamed frames; dense ones go to `labels`

A bias belongs to labels, gate options and a checkpoint: with others it is refused.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..utils.provenance import write_whole_bytes
from ..vision.gate_config import NeuroFlowGateConfig
from .labels import Labels

FILE_NAME = "logit_bias.safetensors"
FORMAT = "neuroflow-logit-bias-1"


def fit_logit_bias(dense_logits: Tensor, streamed_logits: Tensor) -> Tensor:
    """
    The mean shift of each label's logit, dense less streamed.

    Args:
        dense_logits, streamed_logits: [n, C], of the same n frames.

    Returns:
        float32 [C], to be added to streamed logits.

    Raises:
        ValueError: if the two are not of one shape [n, C] with at least one frame, or not finite.
    """
    if dense_logits.shape != streamed_logits.shape or dense_logits.ndim != 2 or not len(dense_logits):
        raise ValueError(
            f"The dense logits are {tuple(dense_logits.shape)} and the streamed ones {tuple(streamed_logits.shape)}; "
            "expected (frames, labels) of both, of the same frames, at least one."
        )
    bias = (dense_logits.double() - streamed_logits.double()).mean(0).float()
    if not bias.isfinite().all():
        raise ValueError("Logits to calibrate by have NaN or infinite values; leave those frames out.")
    return bias


@dataclass(frozen=True, eq=False)
class LogitBias:
    """
    What is added to each label's logit, and what it was fitted for.

    Args:
        labels: the labels' names, in order.
        template: the text around them.
        values: float32 [C].
        gate: all gate options, `stream.gate.to_dict()`.
        fingerprint: of the checkpoint, `neuroflow_hf.utils.provenance.fingerprint(model)`.
        frames: how many it was fitted on.
    """

    labels: tuple[str, ...]
    template: str
    values: Tensor
    gate: dict
    fingerprint: str
    frames: int

    @classmethod
    def fit(
        cls,
        labels: Labels,
        dense_logits: Tensor,
        streamed_logits: Tensor,
        gate: NeuroFlowGateConfig,
        fingerprint: str,
    ) -> "LogitBias":
        """
        A bias from the logits float [n, C] of the same frames, without a stream and with one.

        Raises:
            ValueError: as in `fit_logit_bias`, and if there are not as many logits as labels.
        """
        values = fit_logit_bias(dense_logits, streamed_logits).cpu()
        if len(values) != len(labels.names):
            raise ValueError(f"There are logits of {len(values)} labels, and {len(labels.names)} labels.")
        if labels.label_bias is not None:
            raise ValueError("These labels have a calibration already; fit on the labels without it.")
        return cls(labels.names, labels.template, values, gate.to_dict(), fingerprint, len(dense_logits))

    def save(self, folder: str | Path) -> Path:
        """Write FILE_NAME in a folder, whole or not at all, and return its path."""
        path = Path(folder) / FILE_NAME
        metadata = {
            "format": FORMAT,
            "labels": json.dumps(self.labels),
            "template": self.template,
            "gate": json.dumps(self.gate),
            "fingerprint": self.fingerprint,
            "frames": str(self.frames),
        }
        write_whole_bytes(path, save({"logit_bias": self.values.contiguous()}, metadata))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "LogitBias":
        """
        What `save` wrote.

        Raises:
            FileNotFoundError: if there is no FILE_NAME in the folder.
            ValueError: if it is something else.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"There is no {FILE_NAME} in {folder}; fit one with `LogitBias.fit` and save it.")
        try:
            with safe_open(path, "pt") as file:
                metadata, values = file.metadata() or {}, file.get_tensor("logit_bias")
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
            bias = cls(
                labels=tuple(json.loads(metadata["labels"])),
                template=metadata["template"],
                values=values.float(),
                gate=json.loads(metadata["gate"]),
                fingerprint=metadata["fingerprint"],
                frames=int(metadata["frames"]),
            )
            if values.shape != (len(bias.labels),):
                raise ValueError(f"it has values {tuple(values.shape)} for {len(bias.labels)} labels")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no logit bias: {error}. Fit and save it anew.") from error
        return bias

    def applied_to(self, labels: Labels, gate: NeuroFlowGateConfig, fingerprint: str) -> Labels:
        """
        The labels with this bias in their logits, for embeddings of streams with these gate options.

        Raises:
            ValueError: if labels, template, gate options or checkpoint are not those that it was fitted for; if the
                labels have a bias already.
        """
        if labels.label_bias is not None:
            raise ValueError("These labels have a calibration already; start from the labels without it.")
        if labels.names != self.labels:
            raise ValueError(
                f"The bias is for {len(self.labels)} labels and these are {len(labels.names)}: "
                f"{first_difference(self.labels, labels.names)}. Use the same labels in the same order, or fit anew."
            )
        if labels.template != self.template:
            raise ValueError(
                f"The bias is for the template {self.template!r} and the labels have {labels.template!r}; use the "
                "same, or fit anew."
            )
        options = gate.to_dict()
        if options != self.gate:
            names = [name for name in {**self.gate, **options} if self.gate.get(name) != options.get(name)]
            different = ", ".join(f"{name} {self.gate.get(name)!r}, now {options.get(name)!r}" for name in names)
            raise ValueError(f"The bias was fitted with other gate options: {different}. Use those, or fit anew.")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"The bias was fitted on the checkpoint {self.fingerprint} and this one is {fingerprint}; fit anew."
            )
        return replace(labels, label_bias=self.values)


def first_difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """Where two lists of labels differ first, in words."""
    for place, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return f"label {place + 1} is {our!r} there, {their!r} here"
    return "one has labels that the other has not"
