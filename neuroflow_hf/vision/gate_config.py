"""The options of the gate: which patches of a frame are encoded again, and what the others reuse."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from huggingface_hub.dataclasses import strict

from .budget import CostBudget
from .options import make_options

ModeName = Literal["dense", "hold", "mlp", "eliminate", "reconstruct", "context", "extrapolate"]
MODE_NAMES: tuple[str, ...] = get_args(ModeName)
GateOption = bool | int | float | str | None

DEFAULT_PRESET = "balanced"
PRESETS: dict[str, dict] = {
    # for labels and search results that must not change
    "faithful": {"mode": "extrapolate", "dilate": 1, "sentinels": 0.1, "keyframe_interval": 100, "cost_budget": 0.75},
    # the default: close to dense where little moves, at most a quarter of its cost in the long run
    "balanced": {"mode": "extrapolate", "sentinels": 0.06, "keyframe_interval": 30, "cost_budget": 0.25},
    # for many cameras on one machine: at most a tenth of dense in the long run
    "thrifty": {"mode": "extrapolate", "sentinels": 0.04, "keyframe_interval": 60, "cost_budget": 0.1},
}


@strict
@dataclass(kw_only=True)
class NeuroFlowGateConfig:
    """
    Options of the similarity gate. They live under `gate` in the vision model's configuration and can be overridden,
    one by one, where a stream is made: `model.new_stream(threshold=0.02)`.

    On each frame, every patch has a signal and a reference; its surprise is `1 - cos(signal, reference)`, in [0, 2].
    From the surprise, the options choose the active patches; only they are encoded. Source: Y. Schmitt, "EMA-Gated
    Temporal Sequence Compression in Vision Transformers" (2026), sections on the gate and on Architectures A (`mlp`),
    B (`eliminate`) and C (`reconstruct`); `context` follows prior work that gives active tokens the stored keys and
    values of the others (STC-Cacher, WAM-Cache, Eventful Transformers).

    Args:
        mode (`str`, defaults to `"extrapolate"`):
            How active patches are encoded, and what the others reuse.

            - `"context"`: active patches attend to all patches, with stored keys and values for those that are not
              active; the head pools all patches. With more than 95% active, the frame is a keyframe: that is as fast,
              and exact.
            - `"extrapolate"`: as `context`, but a few patches that did not change, the sentinels, are encoded as well.
              How much they differ from what is stored of them corrects the stored keys, values and outputs of similar
              patches. The best mode without training.
            - `"reconstruct"`: active patches attend only to each other; the head pools fresh and stored outputs (the
              paper's dual memory). Cheaper than `context` if there are many patches, much less faithful.
            - `"eliminate"`: active patches attend only to each other and only they are pooled. Cheapest; the output
              is far from the dense one unless the model was distilled for it.
            - `"mlp"`: attention over all patches, MLP only for active ones. Faithful, saves little.
            - `"hold"`: nothing is encoded between keyframes; the last output is returned. Without keyframe options,
              it repeats the first frame's embedding. A baseline for the other modes.
            - `"dense"`: everything is encoded on every frame, without a gate. The baseline.
        signal (`str`, defaults to `"patch"`):
            `"patch"`: the patch projection, before position embeddings. `"token"`: with position embeddings, as in
            the paper; they are the same on every frame and lower the surprise, so thresholds must be lower too.
        reference (`str`, defaults to `"last_update"`):
            `"last_update"`: the signal when the patch was last encoded; a surprising patch is out of date. `"ema"`: a
            running mean of the signal (the paper); a surprising patch is new. It leaves ghosts where an object has
            left, and misses slow changes. `"both"`: the larger surprise of the two.
        threshold (`float`, defaults to 0.01):
            A patch is active if its surprise is above it. 0: every patch that changed at all. 0.01 suits footage
            with ordinary compression and sensor noise; go up to 0.05 for noisy footage, down to 0.003 if small or
            faint objects matter. -1 or less: everything is active on every frame, whatever the other options say.
        token_budget (`int`, *optional*):
            For a fixed latency: exactly this many patches are active on every frame that is not a keyframe, the most
            surprising ones, whatever the threshold. If there are fewer patches, all are; if `min_active_tokens` is
            larger, it counts. In `context` and `extrapolate`, more than 95% means all.
        min_active_tokens (`int`, *optional*):
            At least this many are active. Defaults to 4 in `eliminate`, whose head needs something to pool, and to
            0 elsewhere (a frame with nothing active returns the stored output).
        global_motion_norm (`bool`, defaults to `False`):
            Subtract the frame's mean surprise before the threshold, for cameras that move or flicker as a whole. Only
            about half of the patches are above the threshold after a scene cut then; choose `keyframe_fraction` 0.3.
        dilate (`int`, defaults to 0):
            Also take the patches within this many rows and columns of an active one. 1 helps at object borders.
        summary_tokens (`int`, defaults to 0):
            Modes `eliminate` and `reconstruct`: active patches also attend to this many tokens, averages over the
            cells of a square grid from the last keyframe, so that they know what they stand in; in `eliminate` the
            head pools them, too. A square number. 64 is a good value, 16 is cheaper, and 0 is the paper.
        sentinels (`float`, defaults to 0.05):
            Mode `extrapolate`: the number of sentinels is the number of changed patches, but at most this share of
            all patches. Patches take turns. 0.03 is cheap, 0.1 faithful; with 0 there are none. With a `token_budget`
            they take at most half of it.
        max_age (`int`, *optional*):
            No stored patch gets older than this many frames: `ceil(N / max_age)` of the oldest are encoded on every
            frame, which spreads the cost evenly. 300 costs a third of a percent.
        keyframe_interval (`int`, *optional*):
            Every frame whose number is a multiple of this is a keyframe: all patches are encoded. It adds its inverse
            to the cost, and brings patches that did not change up to date with those that did. With a `cost_budget`,
            this many frames after the last keyframe, as soon as the credit pays for it.
        keyframe_fraction (`float`, *optional*):
            A frame is a keyframe if more than this fraction of the patches is above the threshold, before `dilate` (a
            scene cut). 0.5 is a good guard in the sparse modes. In `hold`, choose a little more than the share of the
            picture that usually moves, or almost every frame becomes a keyframe.
        keyframe_surprise (`float`, *optional*):
            A frame is a keyframe if its mean surprise over all patches is above this. Of all simple measures, mean
            surprise follows the error of a held embedding best. In `hold`, 0.05 is faithful, 0.1 saves more.
        cost_budget (`float`, *optional*):
            What a stream may spend per frame in the long run, as a share of the cost of a dense frame. What quiet
            frames leave over is saved, up to `cost_reserve`, and spent when something happens. Frames that cost more
            than the stream may spend are spaced evenly, and its last output is returned in between: a steadily moving
            camera gets a dense frame about every `1 / cost_budget` frames. With more than half of the patches active,
            these are keyframes, since encoding many changed patches beside outdated ones is no closer to dense than a
            keyframe and a hold; so is the first frame after a scene cut. The first frame of a stream is free.
            `keyframe_fraction` and `keyframe_surprise` apply while there is credit; `token_budget`,
            `min_active_tokens` and `max_age` do not apply to frames that are held. With a `threshold` of -1, the
            budget is ignored. Do not combine it with `reference` `"ema"`: what happens while nothing is encoded may
            fade into the mean.
            Looking at every frame may cost a very small model more than its budget: a preset's budget is then raised,
            with a warning; a budget that you set is an error on the first frame.
        cost_reserve (`float`, defaults to 4.0):
            The most that a stream saves under a `cost_budget`, in dense frames; it starts with as much, and again
            after a reset. More follows longer events without a gap, and lets the cost of T frames in a row exceed the
            budget by up to `(cost_reserve + 2) / T`.
        min_fidelity (`float`, *optional*):
            The cosine of the pooled output to dense's that a stream keeps, by an estimate that it learns as it runs
            (`vision/error_estimate.py`): a frame is held, encoded sparsely or made a keyframe, whichever is the
            cheapest that keeps it. 0.99 suits labels, 0.999 what must not change. It replaces the preset's
            `cost_budget`; with a `cost_budget` of your own, frames are held where the fidelity allows it, and the
            budget decides on the others. Needs a pooling head.
        ema_rate (`float`, defaults to 0.01):
            The share of the new signal in the running mean, per frame, in (0, 1]. 0.01 forgets in about 100 frames.
            A keyframe restarts all running means, so with `keyframe_interval` none reaches further back than that.
        slow_ema_rate (`float`, *optional*):
            Rate of a second, slower running mean; a patch that is surprising against either is active. For objects
            that stop moving and would otherwise fade into the first mean. Choose a tenth of `ema_rate`. Needs
            `reference` `"ema"` or `"both"`.
        memory_blend (`float`, defaults to 1.0):
            Share b of the fresh output in the stored one, `C <- (1 - b) C + b z`, in (0, 1]; 1 replaces it. Lower
            values smooth the output over time and delay it. Only for `context`, `extrapolate` and `reconstruct`,
            whose head sees stored outputs beside fresh ones.
        on_change (`str`, defaults to `"error"`):
            What a change of resolution, dtype, device or batch size in the middle of a stream does: `"error"`, or
            `"keyframe"` to forget the stream's memory and start again with a keyframe.

    Raises:
        ValueError: for an unknown option (with the nearest known one), or a value outside its range.
    """

    mode: ModeName = "extrapolate"
    signal: Literal["patch", "token"] = "patch"
    reference: Literal["last_update", "ema", "both"] = "last_update"
    threshold: float | int = 0.01
    token_budget: int | None = None
    min_active_tokens: int | None = None
    global_motion_norm: bool = False
    dilate: int = 0
    summary_tokens: int = 0
    sentinels: float | int = 0.05
    max_age: int | None = None
    keyframe_interval: int | None = None
    keyframe_fraction: float | int | None = None
    keyframe_surprise: float | int | None = None
    cost_budget: float | int | None = None
    cost_reserve: float | int = 4.0
    min_fidelity: float | int | None = None
    ema_rate: float | int = 0.01
    slow_ema_rate: float | int | None = None
    memory_blend: float | int = 1.0
    on_change: Literal["error", "keyframe"] = "error"

    def __post_init__(self) -> None:
        # Not an option: the `cost_budget` if it comes from a preset. It may be lifted for a model that cannot keep
        # it; a `cost_budget` that differs from it was set by the user.
        self.preset_budget: float | int | None = None
        self.check()

    def check(self) -> None:
        """Raise a ValueError for a value outside its range. Called on every frame, since options may be assigned."""

        def require(name: str, holds: Callable[[float], bool], expected: str) -> None:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"Gate option `{name}` is {value!r}; expected {expected}.")

        def is_rate(value: float) -> bool:
            return 0 < value <= 1

        require(
            "threshold",
            lambda value: math.isfinite(value) and value <= 2,
            "a finite number, 0 to 2 (or -1 for everything active)",
        )
        for name in ("token_budget", "max_age", "keyframe_interval"):
            require(name, lambda value: value >= 1, "a whole number of at least 1, or None for never")
        for name in ("min_active_tokens", "dilate", "summary_tokens"):
            require(name, lambda value: value >= 0, "a whole number of at least 0")
        require("keyframe_fraction", lambda value: 0 <= value <= 1, "a fraction from 0 to 1, or None for never")
        require("keyframe_surprise", lambda value: 0 <= value <= 2, "a mean surprise from 0 to 2, or None for never")
        require("sentinels", lambda value: 0 <= value <= 1, "a fraction of the patches from 0 to 1")
        require("min_fidelity", lambda value: 0 < value < 1, "a cosine above 0 and below 1, such as 0.99")
        for name in ("ema_rate", "slow_ema_rate", "memory_blend", "cost_budget"):
            require(name, is_rate, "a share above 0 and at most 1")
        require("cost_reserve", lambda value: math.isfinite(value) and value >= 1, "at least 1 dense frame")
        if math.isqrt(max(self.summary_tokens, 0)) ** 2 != self.summary_tokens:
            raise ValueError(
                f"Gate option `summary_tokens` is {self.summary_tokens}; expected a square number, such as 16 or 64."
            )
        if self.summary_tokens and self.mode not in ("eliminate", "reconstruct"):
            raise ValueError(
                f"Gate option `summary_tokens` is for modes `eliminate` and `reconstruct`; in `{self.mode}`, leave it "
                "at 0."
            )
        if self.slow_ema_rate is not None and self.reference == "last_update":
            raise ValueError(
                'Gate option `slow_ema_rate` is a second running mean; it needs `reference="ema"` or `"both"`, and '
                '`reference` is "last_update".'
            )

    @classmethod
    def from_options(cls, base: dict | None = None, **options: GateOption) -> "NeuroFlowGateConfig":
        """
        The options of `base`, overridden by `options`.

        They start from a preset, `"balanced"` unless `preset` names another; with a `mode` and no `preset`, from the
        defaults of this class. A `preset` in `options` replaces all of `base`.

        Raises:
            ValueError: for a preset or an option that does not exist, a value of the wrong type or outside its range.
        """
        preset: GateOption = DEFAULT_PRESET
        merged: dict = {}
        for layer in (base or {}, options):
            if "preset" in layer:
                preset, merged = layer["preset"], {}
            elif "mode" in layer:
                preset = None
            merged |= {name: value for name, value in layer.items() if name != "preset"}
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"Unknown preset {preset!r}; expected one of {', '.join(PRESETS)}.")
            own_budget = "cost_budget" in merged
            merged = PRESETS[preset] | merged
            if merged.get("min_fidelity") is not None and not own_budget:
                merged["cost_budget"] = None
        gate = make_options(cls, "gate", merged, also_known=("preset",))
        if preset is not None and not own_budget:
            gate.preset_budget = gate.cost_budget
        return gate

    def to_dict(self) -> dict:
        """All options as plain values."""
        return asdict(self)

    @property
    def budget(self) -> CostBudget:
        """`cost_budget` and `cost_reserve` as a token bucket."""
        return CostBudget(self.cost_budget, self.cost_reserve)

    @property
    def everything_active(self) -> bool:
        """Whether every patch is encoded on every frame."""
        return self.mode == "dense" or self.threshold <= -1

    @property
    def needs_surprise(self) -> bool:
        """Whether surprise is computed: not in `dense`, nor in `hold` without an option that depends on it."""
        return not (self.mode == "dense" or (self.mode == "hold" and not self.has_keyframe_trigger))

    @property
    def has_keyframe_trigger(self) -> bool:
        """Whether a frame's surprise can make it a keyframe."""
        triggers = (self.keyframe_fraction, self.keyframe_surprise, self.min_fidelity)
        return any(trigger is not None for trigger in triggers)

    @property
    def is_paced(self) -> bool:
        """Whether the controller decides when to encode, for a `cost_budget` or a `min_fidelity`."""
        controlled = self.cost_budget is not None or self.min_fidelity is not None
        return controlled and self.needs_surprise and not self.everything_active

    @property
    def sentinel_share(self) -> float:
        """`sentinels` in mode `extrapolate`, else 0."""
        return self.sentinels if self.mode == "extrapolate" else 0

    def most_sentinels(self, num_patches: int) -> int:
        """How many sentinels a frame has at most; with a `token_budget`, no more than half of it."""
        sentinels = math.ceil(self.sentinel_share * num_patches)
        return sentinels if self.token_budget is None else min(sentinels, self.token_budget // 2)

    @property
    def keeps_age(self) -> bool:
        """Whether the stream stores how long ago each patch was encoded."""
        return self.needs_surprise and (self.max_age is not None or self.mode == "extrapolate")

    @property
    def full_above(self) -> float:
        """
        The share of active patches above which a frame becomes a keyframe. Measured, `context` with 95% of 196
        patches active takes as long as dense.
        """
        return 0.95 if self.mode in ("context", "extrapolate") else 1

    @property
    def mean_rates(self) -> dict[str, float]:
        """The running means that are kept, each with its rate."""
        rates = {"ema": self.ema_rate, "slow_ema": self.slow_ema_rate}
        return {name: rate for name, rate in rates.items() if self.reference != "last_update" and rate is not None}

    @property
    def references(self) -> list[str]:
        """The names of the references; none if surprise is not computed."""
        if not self.needs_surprise:
            return []
        return [*(["last_update"] if self.reference in ("last_update", "both") else []), *self.mean_rates]

    @property
    def least_active(self) -> int:
        """`min_active_tokens` with the mode's default filled in."""
        if self.min_active_tokens is not None:
            return self.min_active_tokens
        return 4 if self.mode == "eliminate" else 0
