"""
The method, patch by patch: one stream, no batching, no packing. Slow, and what the fast path is tested against.

Reading this file is the shortest way to learn what each mode does.
"""

import math
from functools import partial
from typing import Any

import torch

from .extrapolate import COMMON_SHARE, LIKENESS_WIDTH, NOISE
from .gate_config import NeuroFlowGateConfig
from .selection import ROUNDING, turns
from .tower import LayerParts, VisionTower


def naive_surprise(signal: torch.Tensor, reference: torch.Tensor) -> float:
    """`1 - cos` of two vectors [D]; 0 for equal ones, where the quotient would be rounded."""
    if torch.equal(signal, reference):
        return 0.0
    dot = sum(a * b for a, b in zip(signal.tolist(), reference.tolist(), strict=True))
    norms = math.sqrt(sum(a * a for a in signal.tolist())) * math.sqrt(sum(b * b for b in reference.tolist()))
    return 1 - dot / norms


def naive_neighbours(patch: int, grid: tuple[int, int], radius: int) -> list[int]:
    """The patches within `radius` rows and columns of `patch`, itself among them."""
    row, column = divmod(patch, grid[1])
    return [
        r * grid[1] + c
        for r in range(max(0, row - radius), min(grid[0], row + radius + 1))
        for c in range(max(0, column - radius), min(grid[1], column + radius + 1))
    ]


def naive_mean(vectors: list[torch.Tensor]) -> torch.Tensor:
    """The mean of vectors [D]."""
    return sum(vectors[1:], vectors[0]) / len(vectors)


def naive_cells(grid: tuple[int, int], tokens: int) -> list[list[int]]:
    """The patches in each cell of the summary tokens' grid; cells share patches where sizes do not divide."""
    side = math.isqrt(tokens)

    def part(size: int, cell: int) -> range:
        return range(math.floor(cell * size / side), math.ceil((cell + 1) * size / side))

    return [
        [row * grid[1] + column for row in part(grid[0], i) for column in part(grid[1], j)]
        for i in range(side)
        for j in range(side)
    ]


def naive_attention(
    parts: LayerParts, query: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor, float]]
) -> torch.Tensor:
    """
    One query [D] over keys and values [D] each, and what is added to their scores, head by head: [D], before the
    output projection.
    """
    keys, values = torch.stack([key for key, _, _ in seen]), torch.stack([value for _, value, _ in seen])
    bias = torch.tensor([added for _, _, added in seen], dtype=query.dtype)
    heads, head_dim = [], len(query) // parts.num_heads
    for head in range(parts.num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = keys[:, part] @ query[part] * parts.scaling + bias
        heads.append(scores.softmax(dim=0) @ values[:, part])
    return torch.cat(heads)


def naive_correction_weights(
    outputs: list[torch.Tensor], changed: set[int], encoded: list[int]
) -> dict[int, dict[int, float]]:
    """
    For every patch that was not encoded, how much of each encoded patch's innovation it takes over: simple kriging
    among the patches that changed, and among those that did not.
    """

    def likeness(a: int, b: int) -> float:
        cosine = torch.nn.functional.cosine_similarity(outputs[a], outputs[b], dim=0).item()
        return COMMON_SHARE + (1 - COMMON_SHARE) * math.exp((cosine - 1) / LIKENESS_WIDTH)

    as_tensor = partial(torch.tensor, dtype=torch.float64)
    weights: dict[int, dict[int, float]] = {}
    for group in (changed, set(range(len(outputs))) - changed):
        sources = [patch for patch in encoded if patch in group]
        learners = sorted(group - set(encoded))
        if sources and learners:
            among = as_tensor([[likeness(a, b) + NOISE * (a == b) for b in sources] for a in sources])
            for patch in learners:
                solution = torch.linalg.solve(among, as_tensor([likeness(patch, source) for source in sources]))
                weights[patch] = dict(zip(sources, solution.tolist(), strict=True))
    return weights


def naive_correct(stored: dict, fresh: dict[int, torch.Tensor], weights: dict[int, dict[int, float]]) -> None:
    """Move what is stored of patches that were not encoded by the innovations of those that were."""
    innovations = {source: fresh[source] - stored[source] for source in fresh}
    for patch, shares in weights.items():
        stored[patch] = stored[patch] + sum(share * innovations[source] for source, share in shares.items())


class NaiveStream:
    """
    One stream through a vision model, in plain loops. Patches are numbered from 0, prefix tokens from -R to -1.

    Args:
        model: with a pooling head, at its own resolution. Of a tower, only the names of its modules are asked for.
        gate: the options.
        looking: what a frame costs on which nothing is encoded, of a dense one. For a `cost_budget`.
    """

    def __init__(self, model: VisionTower, gate: NeuroFlowGateConfig, looking: float = 0.0):
        self.model, self.gate, self.looking = model, gate, looking
        self.held: list[float] = []  # mean surprise of the frames since patches were last encoded
        self.since_keyframe, self.usual_surprise, self.paid = 0, 0.0, 0.0
        self.unchanged, self.after_cut = 0, False
        self.frame, self.credit = 0, float(gate.cost_reserve)
        self.references: dict[str, list[torch.Tensor]] = {}
        self.age: list[int] = []
        self.outputs: dict[int, torch.Tensor] = {}
        self.summaries: list[list] = [[] for _ in model.encoder_layers()]
        self.layers: list[dict[str, dict[int, torch.Tensor]]] = [
            {name: {} for name in ("key", "value", "mlp")} for _ in model.encoder_layers()
        ]
        self.pooled = torch.zeros(0)  # until the first frame, which is a keyframe
        # for `min_fidelity`: error per surprise, surprise encoded since the last keyframe, and on the last frame
        self.error_rate, self.encoded, self.latest = 1.0, 0.0, 0.0
        self.before = self.pooled
        self.changed: set[int] = set()

    def step(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """One frame [1, C, H, W]: the embedding [D], the outputs the head saw [A or N, D], the active patches."""
        model: Any = self.model
        features = model.patch_projection()(pixel_values)
        grid = (features.shape[2], features.shape[3])
        patches = list(features[0].flatten(1).T)
        embedded, prefix = model.embeddings(pixel_values)[0], model.num_prefix_tokens
        tokens = {place - prefix: token for place, token in enumerate(model.before_layers(embedded))}
        signal = patches if self.gate.signal == "patch" else list(embedded[prefix:])

        if self.latest >= 1e-4:
            rate = naive_surprise(self.pooled, self.before) / self.latest
            self.error_rate = max(rate, 0.85 * self.error_rate + 0.15 * rate)
        self.before = self.pooled
        self.cells = naive_cells(grid, self.gate.summary_tokens)
        active, keyframe = self.choose(signal, grid)
        weights = {}
        if self.gate.mode == "extrapolate" and not keyframe:
            outputs = [self.outputs[patch] for patch in range(len(patches))]
            weights = naive_correction_weights(outputs, self.changed, active)
        fresh = self.encode(tokens, [*range(-prefix, 0), *active], weights) if active else {}
        if weights:
            naive_correct(self.outputs, fresh, weights)
        share = 1 if keyframe or self.gate.mode == "mlp" else self.gate.memory_blend
        for token, output in fresh.items():
            self.outputs[token] = output if share == 1 else (1 - share) * self.outputs[token] + share * output
        stored = fresh if self.gate.mode == "eliminate" else self.outputs
        seen = [stored[token] for token in sorted(stored)]
        if self.gate.mode == "eliminate" and self.gate.summary_tokens and active:
            self.pooled = self.pool_with_summary(fresh, len(active) == len(patches))
        elif active:
            self.pooled = self.pool(seen)
        self.update(signal, active, keyframe)
        self.frame += 1
        return self.pooled, torch.stack(seen) if seen else torch.zeros(0, len(patches[0])), active

    def pool(self, seen: list[torch.Tensor]) -> torch.Tensor:
        """The embedding [D] of tokens [D], as the stock model pools them."""
        pooling = self.model.pooling(exact=True)
        assert pooling is not None
        return pooling.pool(torch.stack(seen).unsqueeze(0))[0]

    def pool_with_summary(self, fresh: dict[int, torch.Tensor], whole: bool) -> torch.Tensor:
        """
        The head's embedding [D] of active patches and summary tokens. A token of n patches counts as much as n equal
        tokens, so the head pools n copies.
        """
        seen = [fresh[token] for token in sorted(fresh)]
        if whole:
            self.summary = [(naive_mean([fresh[patch] for patch in cell]), len(cell)) for cell in self.cells]
        else:
            seen += [mean for mean, count in self.summary for _ in range(count)]
        return self.pool(seen)

    def pay(self, cost: float) -> None:
        """What the frame cost, of a dense one; multiply-adds are not counted here. For a `cost_budget`."""
        if self.gate.cost_budget is not None and self.frame > 1:
            self.credit = max(min(self.credit - cost + self.gate.cost_budget, self.gate.cost_reserve), -2.0)

    def choose(self, signal: list[torch.Tensor], grid: tuple[int, int]) -> tuple[list[int], bool]:
        """The active patches of a frame, ascending, and whether it is a keyframe."""
        gate, everything = self.gate, list(range(len(signal)))
        paced = (gate.cost_budget or gate.min_fidelity) and gate.needs_surprise
        if gate.mode == "dense" or gate.threshold <= -1 or self.frame == 0:
            return everything, True
        if gate.keyframe_interval is not None and not paced and self.frame % gate.keyframe_interval == 0:
            return everything, True
        if not gate.needs_surprise:
            return [], False
        scores = [
            max(naive_surprise(signal[patch], reference[patch]) for reference in self.references.values())
            for patch in everything
        ]
        surprises, mean_surprise = scores, sum(scores) / len(scores)
        if gate.global_motion_norm:
            scores = [score - mean_surprise for score in scores]
        self.changed = {patch for patch in everything if scores[patch] > gate.threshold}
        active = [] if gate.mode == "hold" else self.choose_patches(scores, grid)
        if len(active) > gate.full_above * len(signal):
            active = everything
        keyframe = gate.keyframe_fraction is not None and len(self.changed) > gate.keyframe_fraction * len(signal)
        keyframe |= gate.keyframe_surprise is not None and mean_surprise > gate.keyframe_surprise
        if not paced:
            keyframe |= gate.full_above < 1 and len(active) == len(signal)
            return (everything, True) if keyframe else (active, False)
        keyframe &= self.credit > 0
        cost, allowance = len(active) / len(signal), 1.0
        if gate.cost_budget:
            allowance = gate.cost_budget - self.looking + (self.credit / gate.cost_reserve - 0.5) / 8
        self.paid += allowance
        seen = sum(surprises[patch] for patch in active) / len(signal)
        if not keyframe:
            active, keyframe = self.pace(active, cost, allowance, mean_surprise, seen)
        self.since_keyframe = 0 if keyframe else self.since_keyframe + 1
        is_cut, self.unchanged = self.is_cut(mean_surprise), 0 if cost else self.unchanged + 1
        self.latest = 0.0
        if not (keyframe or active):
            self.held.append(mean_surprise)
            return [], False
        self.latest = mean_surprise if keyframe else seen
        self.encoded = 0.0 if keyframe else self.encoded + seen
        left = self.paid - (1 if keyframe else cost)
        self.paid = 0 if left < 0 or allowance < 0 else min(left, allowance)
        if is_cut:
            self.usual_surprise, self.after_cut = 0.0, True
        elif cost and self.held and self.held[-1] > 0:
            usual = self.usual_surprise
            self.usual_surprise = 0.7 * usual + 0.3 * mean_surprise if usual else mean_surprise
            self.after_cut = False
        self.held = []
        return (everything, True) if keyframe else (active, False)

    def is_cut(self, mean_surprise: float) -> bool:
        """
        Whether so much changed in one frame as usually between keyframes, and half of that more. Where that is
        unknown since a cut, or nothing changed on the frame before, a mean surprise of 0.3.
        """
        jump = mean_surprise - (self.held[-1] if self.held else 0)
        if self.usual_surprise > 0:
            return jump > 1.5 * self.usual_surprise
        return (self.after_cut or self.unchanged > 0) and jump > 0.3

    def pace(
        self, active: list[int], cost: float, allowance: float, mean_surprise: float, seen: float
    ) -> tuple[list[int], bool]:
        """
        The active patches, whose part of the mean surprise is `seen`, as far as budget and fidelity allow or ask for
        them on this frame, and whether it is a keyframe.
        """
        gate, many = self.gate, cost > 0.5
        if gate.keyframe_interval and self.since_keyframe + 1 >= gate.keyframe_interval and self.credit >= 1:
            return [], True
        if gate.min_fidelity:
            allowed = (1 - gate.min_fidelity) / self.error_rate  # in surprise
            if mean_surprise + 0.3 * self.encoded <= allowed:
                return [], False
            if allowance >= 1:  # without a budget, or with one that pays for anything
                enough = mean_surprise - seen + 0.3 * (self.encoded + seen) <= allowed
                return (active, False) if enough and not many else ([], True)
        if self.credit <= -1:
            return [], False
        if not cost and self.unchanged >= 2 and self.encoded > 0 and self.credit >= gate.cost_reserve / 2 + 1:
            return [], True
        if (1 if many else cost) <= allowance:
            return ([], True) if many else (active, False)
        if many and self.is_cut(mean_surprise):
            return [], True
        urgency = math.sqrt(mean_surprise / self.usual_surprise) if self.usual_surprise else 1
        if self.credit <= 0 or self.paid * urgency < (1 if many else cost):
            return [], False
        return ([], True) if many else (active, False)

    def choose_patches(self, scores: list[float], grid: tuple[int, int]) -> list[int]:
        """The patches that the options choose by their surprise, ascending."""
        gate, everything = self.gate, list(range(len(scores)))
        scores = [max(scores[near] for near in naive_neighbours(patch, grid, gate.dilate)) for patch in everything]
        changed = {patch for patch in everything if scores[patch] > gate.threshold}

        refreshed: set[int] = set()
        longest_ago = sorted(everything, key=lambda patch: -self.age[patch] - turns(grid)[patch])
        if gate.max_age is not None:
            refreshed = set(longest_ago[: math.ceil(len(scores) / gate.max_age)])
        if gate.mode == "extrapolate":
            still = [patch for patch in longest_ago if patch not in changed | refreshed]
            refreshed |= set(still[: min(len(changed), gate.most_sentinels(len(scores)))])
        ranked = [score if abs(score) >= ROUNDING else 0 for score in scores]
        by_surprise = sorted(everything, key=lambda patch: (0, 0) if patch in refreshed else (1, -ranked[patch]))
        active = changed | refreshed if gate.token_budget is None else set(by_surprise[: gate.token_budget])
        return sorted(active | set(by_surprise[: gate.least_active]))

    def encode(self, tokens: dict[int, torch.Tensor], active: list[int], weights: dict) -> dict[int, torch.Tensor]:
        """
        The last layer's outputs after the final layer norm, of the tokens that the mode passes through; `weights`
        as of `naive_correction_weights`.
        """
        mode = self.gate.mode
        hidden = {token: tokens[token] for token in (tokens if mode == "mlp" else active)}
        for index, (layer, memory) in enumerate(zip(self.model.encoder_layers(), self.layers, strict=True)):
            parts = layer.parts()
            normed = {token: parts.norm1(vector) for token, vector in hidden.items()}
            keys = {token: parts.key(vector) for token, vector in normed.items()}
            values = {token: parts.value(vector) for token, vector in normed.items()}
            if weights:
                naive_correct(memory["key"], keys, weights)
                naive_correct(memory["value"], values, weights)
            if mode in ("context", "extrapolate"):
                memory["key"].update(keys)
                memory["value"].update(values)
                keys, values = memory["key"], memory["value"]
            seen = [(keys[token], values[token], 0.0) for token in sorted(keys)]
            if self.gate.summary_tokens and len(active) == len(tokens):
                self.summaries[index] = [
                    (naive_mean([keys[p] for p in cell]), naive_mean([values[p] for p in cell]), math.log(len(cell)))
                    for cell in self.cells
                ]
            elif self.gate.summary_tokens:
                seen += self.summaries[index]
            after: dict[int, torch.Tensor] = {}
            for token, vector in hidden.items():
                attended = naive_attention(parts, parts.query(normed[token]), seen)
                vector = vector + parts.scale1(parts.output(attended))
                if mode != "mlp" or token in active:
                    memory["mlp"][token] = parts.scale2(parts.mlp(parts.norm2(vector)))
                after[token] = vector + memory["mlp"][token]
            hidden = after
        return {token: self.model.final_norm(vector) for token, vector in hidden.items()}

    def update(self, signal: list[torch.Tensor], active: list[int], keyframe: bool) -> None:
        """Bring references and ages up to date after a frame."""
        gate = self.gate
        if gate.reference in ("last_update", "both"):
            stored = self.references.setdefault("last_update", list(signal))
            for patch in active:
                stored[patch] = signal[patch]
        if gate.reference in ("ema", "both"):
            for name, rate in (("ema", gate.ema_rate), ("slow_ema", gate.slow_ema_rate)):
                if rate is not None:
                    means = self.references.setdefault(name, list(signal))
                    for patch, value in enumerate(signal):
                        means[patch] = value if keyframe else torch.lerp(means[patch], value, rate)
        self.age = self.age or [0] * len(signal)
        self.age = [0 if patch in active else age + 1 for patch, age in enumerate(self.age)]
