"""The bypasses of a drift evaluation: the published ones, scaled to the model's depth, and variants."""

from dataclasses import dataclass, field

from ..language.bypass_config import NeuroFlowBypassConfig
from .metrics import rate_of

PUBLISHED_LAYERS = 32  # the depth of Phi-3-mini
PUBLISHED_PAIRS = ((1, 24), (1, 31))  # gate layer and cache layer
FIRST, LAST = (f"{gate}->{cache}" for gate, cache in PUBLISHED_PAIRS)
PUBLISHED_THRESHOLDS = (0.6, 0.65, 0.7)
PUBLISHED_RATE, PUBLISHED_THRESHOLD = 0.21, 0.65  # the share of steps bypassed at this threshold
GUARD_ENTROPY = 1.0  # nats
# bypass rates to derive thresholds for; a guard stops most bypasses, so its rates are higher
RATES = {
    "unguarded": (0.01, 0.05, 0.1, 0.2, 0.4, 0.8),
    "guarded": (0.05, 0.1, 0.2, 0.4, 0.8, 1.0),
    "control": (0.1, 0.2, 0.4),
}


@dataclass(frozen=True)
class Configuration:
    """A bypass to measure."""

    pair: str  # the published layers that its layers stand for, such as "1->24"; "own" for others
    options: dict = field(hash=False)  # of `NeuroFlowBypassConfig`
    asked_rate: float | None = None  # the rate that the threshold was derived from; None for a given threshold

    @property
    def bypass(self) -> NeuroFlowBypassConfig:
        """The options as a configuration."""
        return NeuroFlowBypassConfig.from_options(self.options)

    @property
    def family(self) -> str:
        """All options but the threshold, in words."""
        words = [f"{self.pair} inverted" if self.bypass.is_inverted else self.pair, self.options["target"]]
        for name, unit in (("guard_entropy", "entropy"), ("guard_margin", "margin"), ("max_consecutive", "at most")):
            if self.options.get(name) is not None:
                words.append(f"{unit} {self.options[name]:g}")
        return ", ".join(words)

    @property
    def name(self) -> str:
        """All options, in words."""
        return f"{self.family}, threshold {self.options['threshold']:g}"

    def to_dict(self) -> dict:
        """The fields of a report's entry that describe the configuration."""
        return {
            "name": self.name,
            "family": self.family,
            "pair": self.pair,
            "guarded": self.bypass.is_guarded,
            "inverted": self.bypass.is_inverted,
            "asked_rate": self.asked_rate,
            "options": self.options,
        }


def scaled_pairs(num_layers: int) -> dict[str, tuple[int, int]]:
    """
    Gate layer and cache layer for each published pair, by its name, such as `"1->24"`: the layers at the same relative
    depth, never the first layer. A pair with the same layers as an earlier one is left out.

    Raises:
        ValueError: for a model of fewer than 3 layers.
    """
    if num_layers < 3:
        raise ValueError(
            f"The model has {num_layers} layers; the grid needs at least 3. Name layers instead: --gate-layer 0 "
            "--cache-layers 1."
        )
    pairs: dict[str, tuple[int, int]] = {}
    for pair in PUBLISHED_PAIRS:
        gate, cache = (max(1, min(num_layers - 1, round(layer * num_layers / PUBLISHED_LAYERS))) for layer in pair)
        if (gate, cache) not in pairs.values():
            pairs["{}->{}".format(*pair)] = gate, cache
    return pairs


def gate_layers(num_layers: int) -> list[int]:
    """The layers of which `full_grid` needs thresholds."""
    pairs = scaled_pairs(num_layers).values()
    return sorted({layer for gate, cache in pairs for layer in (gate, cache)})


def full_grid(num_layers: int, thresholds: dict[int, dict[str, float]], quick: bool = False) -> list[Configuration]:
    """
    The published pairs at the published thresholds, and at thresholds for given bypass rates, because a threshold may
    bypass all steps of one checkpoint and none of another; with all three targets, with and without an entropy guard,
    and inverted, with gate and cache layer swapped.

    Args:
        num_layers: the model's depth.
        thresholds: by gate layer, for all of `gate_layers`, and by rate, such as `"0.2"`, for all of `RATES`.
        quick: use the first pair only.
    """
    found: dict[str, Configuration] = {}

    def add(pair, gate, cache, threshold, target="attention", rate=None, **more):
        options = {"gate_layer": gate, "cache_layers": [cache], "threshold": threshold, "target": target, **more}
        configuration = Configuration(pair, options, rate)
        found.setdefault(configuration.name, configuration)  # two rates may have the same threshold

    pairs = list(scaled_pairs(num_layers).items())
    for pair, (gate, cache) in pairs[:1] if quick else pairs:
        for threshold in PUBLISHED_THRESHOLDS:
            add(pair, gate, cache, threshold)
        for rate in RATES["unguarded"]:
            add(pair, gate, cache, thresholds[gate][f"{rate:g}"], rate=rate)
        for rate in RATES["guarded"]:
            add(pair, gate, cache, thresholds[gate][f"{rate:g}"], rate=rate, guard_entropy=GUARD_ENTROPY)
        for target in ("mlp", "block"):
            for rate in RATES["control"]:
                add(pair, gate, cache, thresholds[gate][f"{rate:g}"], target, rate)
        for rate in RATES["control"]:
            add(pair, cache, gate, thresholds[cache][f"{rate:g}"], rate=rate)
    return list(found.values())


def own_configuration(num_layers: int, options: dict) -> Configuration:
    """
    A user's own options with defaults filled in, named after the published pair if the layers are the same.

    Raises:
        ValueError: for unknown options, values out of range, and layers that the model does not have.
    """
    resolved = NeuroFlowBypassConfig.from_options(options).resolve(num_layers)
    layers = (resolved.gate_layer, *resolved.cache_layers)
    pairs = scaled_pairs(num_layers) if num_layers >= 3 else {}
    named = [name for name, pair in pairs.items() if layers in (pair, pair[::-1])]
    kept = {name: value for name, value in resolved.to_dict().items() if value is not None}
    return Configuration(named[0] if named else "own", kept)


def entries_of_family(report: dict, pair: str, target="attention", guarded=False, inverted=False) -> list[dict]:
    """A report's entries of one kind, which differ in their threshold only."""
    kind = (pair, target, guarded, inverted)
    return [
        entry
        for entry in report["configurations"]
        if (entry["pair"], entry["options"]["target"], entry["guarded"], entry["inverted"]) == kind
    ]


def is_near_published(rate: float) -> bool:
    """Whether a rate is within half to twice the published one."""
    return PUBLISHED_RATE / 2 <= rate <= 2 * PUBLISHED_RATE


def published_configuration(report: dict, pair: str = FIRST) -> dict | None:
    """
    The entry that stands for the published setting of a pair: the one at threshold 0.65, if its rate is near the
    published 21 %, else the one with the nearest rate. None if no entry bypasses anything.
    """
    entries = [entry for entry in entries_of_family(report, pair) if rate_of(entry) > 0]
    for entry in entries:
        if entry["options"]["threshold"] == PUBLISHED_THRESHOLD and is_near_published(rate_of(entry)):
            return entry
    return min(entries, key=lambda entry: abs(rate_of(entry) - PUBLISHED_RATE), default=None)
