"""The bypasses of a drift evaluation: the published ones, scaled to the model's depth, and variants."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..language.bypass_config import ALWAYS, NeuroFlowBypassConfig, threshold_for_rate

PUBLISHED_LAYERS = 32  # the depth of Phi-3-mini
PUBLISHED_PAIRS = ((1, 24), (1, 31))  # gate layer and cache layer
FIRST, LAST = (f"{gate}->{cache}" for gate, cache in PUBLISHED_PAIRS)
PUBLISHED_RATE, PUBLISHED_THRESHOLD = 0.21, 0.65  # the share of steps bypassed at this threshold
GUARD_ENTROPY = 1.0  # nats
RATES = (0.05, 0.2, 0.5)  # bypass rates to derive thresholds for
MATCHED_RATE = 0.2  # at which targets, guard and control are compared; near the published one


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
    def name(self) -> str:
        """All options, in words, with the rate that was asked for in place of its threshold."""
        bypass = self.bypass
        layers = f"{bypass.gate_layer}->{'+'.join(map(str, bypass.layers))}{' inverted' if bypass.is_inverted else ''}"
        words = [layers, bypass.target]
        for name, unit in (("guard_entropy", "entropy"), ("max_consecutive", "at most")):
            if self.options.get(name) is not None:
                words.append(f"{unit} {self.options[name]:g}")
        words.append(f"threshold {bypass.threshold:g}" if self.asked_rate is None else f"for {self.asked_rate:.0%}")
        return ", ".join(words)


def scaled_pairs(num_layers: int) -> dict[str, tuple[int, int]]:
    """
    Gate layer and cache layer for each published pair, by its name, such as `"1->24"`: the layers at the same relative
    depth, never the first layer. A pair with the same layers as an earlier one is left out. ValueError for a model of
    fewer than 3 layers.
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


def thresholds_for_rates(steps: Sequence[tuple[float, float]]) -> dict[str, float]:
    """
    Thresholds for `RATES` by rate, such as `"0.2"`, and one for `MATCHED_RATE` under the guard, `"guarded"`: with it,
    only steps whose entropy the guard allows can be bypassed. `steps`: a gate's similarity and the model's entropy.
    """
    similarity = [value for value, _ in steps]
    allowed = [value if entropy <= GUARD_ENTROPY else ALWAYS for value, entropy in steps]
    found = {f"{rate:g}": threshold_for_rate(similarity, rate) for rate in RATES}
    return found | {"guarded": threshold_for_rate(allowed, MATCHED_RATE)}


def full_grid(num_layers: int, thresholds: dict[int, dict[str, float]]) -> list[Configuration]:
    """
    At most ten bypasses: the published pairs of layers at the published threshold, and, because a threshold may bypass
    all steps of one checkpoint and none of another, at thresholds for equal bypass rates (of `thresholds_for_rates`,
    by gate layer); at one of these rates, an entropy guard, gate and cache layer swapped (inverted control), the MLP
    and the whole block. The most important ones come first, since a run takes hours on a small machine.
    """
    pairs, matched = scaled_pairs(num_layers), f"{MATCHED_RATE:g}"
    gate, cache = pairs[FIRST]

    def bypass(pair, gate, cache, rate, **more):
        threshold = PUBLISHED_THRESHOLD if rate is None else thresholds[gate][rate]
        options = {"gate_layer": gate, "cache_layers": [cache], "threshold": threshold, "target": "attention"} | more
        asked = {None: None, "guarded": MATCHED_RATE}
        return Configuration(pair, options, asked[rate] if rate in asked else float(rate))

    return [
        *(bypass(pair, *layers, matched) for pair, layers in pairs.items()),
        bypass(FIRST, gate, cache, None),
        bypass(FIRST, gate, cache, "guarded", guard_entropy=GUARD_ENTROPY),
        bypass(FIRST, cache, gate, matched),
        *(bypass(FIRST, gate, cache, matched, target=target) for target in ("mlp", "block")),
        *(bypass(pair, *layers, None) for pair, layers in pairs.items() if pair != FIRST),
        *(bypass(FIRST, gate, cache, f"{rate:g}") for rate in RATES if rate != MATCHED_RATE),
    ]


def own_configuration(num_layers: int, options: dict) -> Configuration:
    """
    A user's own options with defaults filled in, named after the published pair if the layers are the same. ValueError
    for unknown options, values out of range, and layers that the model does not have.
    """
    resolved = NeuroFlowBypassConfig.from_options(options).resolve(num_layers)
    layers = (resolved.gate_layer, *resolved.cache_layers)
    pairs = scaled_pairs(num_layers) if num_layers >= 3 else {}
    named = [name for name, pair in pairs.items() if layers in (pair, pair[::-1])]
    kept = {name: value for name, value in vars(resolved).items() if value is not None}
    return Configuration(named[0] if named else "own", kept)


def weights_left_out(model, bypass: NeuroFlowBypassConfig) -> float:
    """Of the weights that a dense step of one token is multiplied by, the share that a bypassed step leaves out."""
    used = sum(parameter.numel() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        used -= model.get_input_embeddings().weight.numel()  # looked up
    left_out = 0
    for layer in (model.base_model.layers[index] for index in bypass.layers):
        if bypass.skips_attention:
            left_out += 2 * layer.self_attn.o_proj.weight.numel()  # and the query's projection, of the same size
        if bypass.skips_mlp:
            left_out += sum(parameter.numel() for parameter in layer.mlp.parameters())
    return left_out / used
