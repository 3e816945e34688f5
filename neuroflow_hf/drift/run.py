"""
Measure the token drift of bypasses: continue prompts densely and with bypasses, and write one report.

    model, tokenizer = load_language_model("path/to/phi3")
    prompts = read_prompts("prompts.jsonl")
    report = DriftEvaluation(model, tokenizer, prompts, Path("drift.json")).run()
    report["configurations"][0]["tasks"]["prose"]["drift"]

The report is written after each configuration, and an interrupted run continues.
"""

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..evaluation.statistics import quantile
from ..language.calibration import end_tokens
from ..utils.files import report_text, write_whole
from ..utils.provenance import checkout_commit, dtype_name, fingerprint, machine_and_versions
from .decode import DriftBench, make_batches
from .grid import (
    FIRST,
    Configuration,
    full_grid,
    own_configuration,
    scaled_pairs,
    thresholds_for_rates,
    weights_left_out,
)
from .metrics import figures
from .prompts import Prompt, encode_prompt, first_of_each, order_tasks

LEAST = {"new_tokens": 2, "forced_tokens": 1, "batch_size": 1, "few": 1, "max_prompt_tokens": 1, "samples": 1}
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class DriftSettings:
    """Settings of a drift evaluation. ValueError for a value out of range."""

    new_tokens: int = 64  # generated after each prompt; drift grows with it, so compare figures of equal length only
    forced_tokens: int = 16  # tokens at the end of each prompt that are scored; fewer if a prompt is shorter
    batch_size: int = 64  # prompts in a batch; it changes results by rounding
    few: int = 10  # prompts of each task that thresholds and the noise floor are measured on
    max_prompt_tokens: int = 192  # longer prompts are cut to their last tokens
    samples: int = 2000  # bootstrap samples
    seed: int = 0  # of the bootstrap; generation is greedy

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a whole number of at least {least}.")


class DriftEvaluation:
    """
    Measures how bypasses change the text that a model generates.

    Args:
        model, tokenizer: a [`NeuroFlowPhi3ForCausalLM`] in evaluation mode, and its tokenizer.
        prompts: texts to continue. Use 50 or more of each task: no divergence in n prompts bounds its probability by
            3/n only.
        path: the JSON file to write; continued if it is of the same model, prompts, settings and machine.
        settings: [`DriftSettings`]; None for the defaults.
        own: options of [`NeuroFlowBypassConfig`] for each bypass to measure; None for the grid of `full_grid`.
        fresh: ignore an existing file.
        on_step: called after each batch with the name of the step, the number of prompts finished, and of all.
        names: `model`, `prompts` and `command`, for the report.

    Attributes:
        report: the results so far.

    Raises:
        ValueError: for options out of range, layers that the model does not have, no room for the new tokens, no
            prompts, and prompts without tokens.
    """

    def __init__(
        self,
        model,
        tokenizer,
        prompts: Sequence[Prompt],
        path: Path,
        settings: DriftSettings | None = None,
        own: Sequence[dict] | None = None,
        fresh: bool = False,
        on_step: Callable[[str, int, int], None] = lambda *_: None,
        names: dict | None = None,
    ):
        if not prompts:
            raise ValueError("There are no prompts; expected at least one.")
        self.model, self.path, self.on_step = model, path, on_step
        self.settings, names = settings or DriftSettings(), names or {}
        room = model.config.max_position_embeddings
        if model.config.rope_parameters["rope_type"] == "longrope":
            room = min(room, model.config.original_max_position_embeddings)  # beyond, texts are fed again
        if self.settings.new_tokens >= room:
            raise ValueError(
                f"`new_tokens` is {self.settings.new_tokens}; the model has room for {room} with the prompt."
            )
        limit = min(self.settings.max_prompt_tokens, room - self.settings.new_tokens)
        whole, tasks = [encode_prompt(tokenizer, prompt) for prompt in prompts], [prompt.task for prompt in prompts]
        rows = [row[-limit:] for row in whole]
        self.rows, self.tasks, self.few = rows, tasks, first_of_each(tasks, self.settings.few)
        self.forced_tokens = max(0, min(self.settings.forced_tokens, min(map(len, rows)) - 2))
        self.layers = model.config.num_hidden_layers
        # refuse bad options before anything runs
        self.own = None if own is None else [own_configuration(self.layers, options) for options in own]
        conditions = {  # a report is continued only if all of these are equal
            "settings": asdict(self.settings),
            "model": {
                "name": names.get("model") or model.config.name_or_path,
                "weights": fingerprint(model),
                "layers": self.layers,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": dtype_name(model.dtype),
            },
            "prompts": {
                "name": names.get("prompts"),
                "digest": hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest(),
                "of_task": {task: tasks.count(task) for task in order_tasks(tasks)},
                "tokens": sum(map(len, rows)),
                "cut": sum(len(row) > limit for row in whole),
            },
            **machine_and_versions(str(model.device)),
        }
        self.report = {**conditions, "commits": [], "gates": {}, "noise": [], "configurations": []}
        if not fresh and path.exists():
            with contextlib.suppress(ValueError, AttributeError):  # a damaged file is begun anew
                before = json.loads(path.read_text(encoding="utf-8"))
                if conditions.items() <= before.items():
                    self.report = before
        self.report["command"] = names.get("command")

    @functools.cached_property
    def bench(self) -> DriftBench:
        """The prompts with the dense model's answers, generated at first use."""
        sizes = (self.settings.new_tokens, self.forced_tokens, self.settings.batch_size)
        show = self.start_step("dense")
        return DriftBench(self.model, self.rows, self.tasks, *sizes, end_tokens(self.model), show)

    def start_step(self, what: str, done: int = 0, total: int | None = None) -> Callable[[int], None]:
        """Report `done` of `total` (default: all) prompts; returns what to call with the number of this step's."""
        total = len(self.rows) if total is None else total
        self.on_step(what, done, total)
        return lambda count: self.on_step(what, done + count, total)

    def save(self):
        """Write the report, and add the current commit to it."""
        commit = checkout_commit()
        if commit is not None and commit not in self.report["commits"]:
            self.report["commits"].append(commit)
        write_whole(self.path, report_text(self.report))

    def compare(self, name: str, bypass: dict | bool, done: int = 0, total: int | None = None, **how) -> dict:
        """The figures of one configuration, over all prompts."""
        bench = self.bench
        records = bench.measure(bypass, on_prompts=self.start_step(name, done, total), **how)
        return figures(records, samples=self.settings.samples, seed=self.settings.seed)

    def configurations(self) -> list[Configuration]:
        """The configurations to measure; for the grid, similarities on some prompts give the thresholds by rate."""
        if self.own is not None:
            return self.own
        gates = self.report["gates"]
        for layer in scaled_pairs(self.layers)[FIRST]:  # the published gate, and that of the inverted control
            if str(layer) not in gates:
                bench = self.bench
                self.start_step(f"similarity at layer {layer}")
                steps = bench.similarity(layer, self.few)
                gates[str(layer)] = {
                    **{f"p{p}": quantile([value for value, _ in steps], p / 100) for p in (10, 50, 90)},
                    "steps": len(steps),
                    "thresholds": thresholds_for_rates(steps),
                }
                self.save()
        return full_grid(self.layers, {int(layer): found["thresholds"] for layer, found in gates.items()})

    def measure_noise(self):
        """Measure the noise floor on few prompts: dense against dense, in another batch shape and another dtype."""
        other = OTHER_DTYPE[self.model.dtype]
        size = max(1, min(self.settings.batch_size, len(self.few)) // 3)
        kinds = {
            "batch": ("dense, another batch shape", self.model.dtype, size, 3),
            "dtype": (f"dense, {dtype_name(other)}", other, 3 * size, 0),
        }
        done = {entry["kind"] for entry in self.report["noise"]}
        for kind, (name, dtype, *shape) in kinds.items():
            if kind not in done:
                batches = make_batches(self.rows, *shape, self.few, self.forced_tokens)
                model = copy.deepcopy(self.model).to(dtype)
                found = self.compare(name, False, total=len(self.few), model=model, batches=batches)
                self.report["noise"].append({"name": name, "kind": kind, **found})
                self.save()

    def measure(self, configurations: Sequence[Configuration]):
        """Measure the configurations that the report lacks."""
        done, prompts = {entry["name"] for entry in self.report["configurations"]}, len(self.rows)
        for number, configuration in enumerate(configurations):
            if configuration.name in done:
                continue
            progress = number * prompts, len(configurations) * prompts
            found = self.compare(configuration.name, configuration.options, *progress)
            bypass = configuration.bypass
            kind = {"guarded": bypass.is_guarded, "inverted": bypass.is_inverted}
            kind["weights_left_out"] = weights_left_out(self.model, bypass)
            entry = {"name": configuration.name, **vars(configuration), **kind, **found}
            self.report["configurations"].append(entry)
            self.save()
        order = {configuration.name: number for number, configuration in enumerate(configurations)}
        self.report["configurations"].sort(key=lambda entry: order.get(entry["name"], len(order)))

    def run(self) -> dict:
        """Measure what is missing, and return the report."""
        self.measure(self.configurations())
        self.measure_noise()
        self.save()
        self.start_step("done", 1, 1)
        return self.report
