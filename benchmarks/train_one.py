"""Train one of the models of benchmarks/train_models.py. benchmarks/train.py starts this in a process of its own."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from train_corpus import BOS_TEXT, EOS_TEXT, Corpus, add_bos
from train_measure import measure_model
from train_models import (
    BOS,
    RECIPES,
    Recipe,
    build_model,
    cast_parameters,
    compile_layers,
    has_experts,
    make_config,
)

WARM_UP = 0.03
"""Part of the schedule during which the learning rate rises."""
LAST_RATE = 0.05
"""Part of the largest learning rate that is left at the end of the cosine decay."""
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
SYNC = 10
"""Number of steps between two readings of the clock and the loss."""


@dataclass(frozen=True)
class Settings:
    """How long and on what to train.

    The schedule ends at `deadline`, in seconds since 1970, or after `steps` steps if that is given. `windows` is the
    number of windows of `context` tokens in a step.
    """

    corpus: Path
    output: Path
    deadline: float
    steps: int | None
    context: int
    windows: int
    vocabulary: int
    tiny: bool
    plain: bool

    @property
    def device(self) -> str:
        """Return where to train."""
        return "cuda" if torch.cuda.is_available() else "cpu"


class Batches:
    """Random windows of a tokenized text that is on the device as one tensor."""

    def __init__(self, tokens: torch.Tensor, settings: Settings, recipe: Recipe) -> None:
        self.tokens, self.settings, self.bos = tokens, settings, recipe.bos
        self.generator = torch.Generator(tokens.device).manual_seed(recipe.seed)
        self.offsets = torch.arange(settings.context + 1, device=tokens.device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and the ids that follow them, both of the shape (windows, context).

        In a model with BOS each window begins with BOS, wherever in a document it was cut out.
        """
        highest, shape = len(self.tokens) - len(self.offsets), (self.settings.windows, 1)
        starts = torch.randint(highest, shape, generator=self.generator, device=self.tokens.device)
        window = self.tokens[starts + self.offsets].long()
        if self.bos:
            window[:, 0] = BOS
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def train_model(name: str, settings: Settings) -> None:
    """Train the model `name`, and write its checkpoint and train.json to the folder `settings.output / name`."""
    recipe = RECIPES[name]
    config = make_config(recipe, vocabulary=settings.vocabulary, context=settings.context, tiny=settings.tiny)
    model = build_model(recipe, config, settings.device, grouped=not settings.plain)
    compute_loss = prepare_loss(model, settings)
    warm_up(compute_loss, model, settings)
    corpus = wait_for_corpus(settings)
    tokens = load_tokens(settings, "training.npy", recipe)
    history = run_schedule(compute_loss, model, Batches(tokens, settings, recipe), settings, recipe)
    folder = settings.output / name
    save_model(model, folder, settings, recipe)
    del model, tokens
    report = {
        "name": name,
        **{key: value for key, value in asdict(recipe).items() if key != "options"},
        "plain": settings.plain,
        "corpus": asdict(corpus),
        "window_tokens": settings.context,
        "windows_per_step": settings.windows,
        **history,
        **measure_saved(folder, settings),
    }
    (folder / "train.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(make_card(report), encoding="utf-8")


def prepare_loss(
    model: transformers.PreTrainedModel, settings: Settings
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that computes the loss to minimise and the mean loss of the tokens, both scalars."""
    average: Callable[..., torch.Tensor] = average_loss
    if not settings.plain and settings.device != "cpu":
        compile_layers(model)
        average = torch.compile(average_loss, dynamic=False)
    options: dict[str, Any] = {"output_router_logits": True} if has_experts(model.config) else {}

    def compute_loss(ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = model(ids, use_cache=False, **options)
        loss = average(result.logits, targets)
        if not options:
            return loss, loss
        return loss + model.config.router_aux_loss_coef * result.aux_loss, loss

    return compute_loss


def average_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats, of `targets` (windows, context) under `logits`."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def warm_up(compute_loss: Callable[..., Any], model: torch.nn.Module, settings: Settings) -> None:
    """Compute two gradients of random tokens and drop them, so that everything is compiled before the text is ready."""
    shape = (settings.windows, settings.context)
    for _ in range(2):
        ids = torch.randint(settings.vocabulary, shape, device=settings.device)
        compute_loss(ids, ids)[0].backward()
        model.zero_grad(set_to_none=True)


def wait_for_corpus(settings: Settings) -> Corpus:
    """Return the facts about the text as soon as it is complete."""
    path = settings.corpus / "corpus.json"
    while not path.exists():
        if time.time() > settings.deadline:
            raise SystemExit(f"the text was not ready before the deadline: {path}")
        time.sleep(0.2)
    return Corpus(**json.loads(path.read_text(encoding="utf-8")))


def load_tokens(settings: Settings, name: str, recipe: Recipe) -> torch.Tensor:
    """Return the token ids of the file `name` as one int16 tensor on the device, without BOS if the recipe has none."""
    tokens = torch.from_numpy(np.array(np.load(settings.corpus / name, mmap_mode="r"))).to(settings.device)
    return tokens if recipe.bos else tokens[tokens != BOS]


def run_schedule(
    compute_loss: Callable[..., Any],
    model: torch.nn.Module,
    batches: Batches,
    settings: Settings,
    recipe: Recipe,
) -> dict[str, Any]:
    """Train until the end of the schedule, and return the number of steps, the time and the loss curve.

    The optimizer works on float32 copies of the parameters; each step rounds them to the model's dtype. The learning
    rate follows the part of the schedule that is over: of the time, or of the steps if their number is given.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = make_optimizer(masters, settings)
    start, step, progress = time.time(), 0, 0.0
    curve: list[list[float]] = []
    recent: list[torch.Tensor] = []
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * scale_rate(progress)
        loss, mean = compute_loss(*batches.draw())
        loss.backward()
        update(optimizer, masters, parameters)
        recent.append(mean.detach())
        step += 1
        if step % SYNC == 0 or settings.steps:
            curve.append(summarise(step, recent))
        progress = find_progress(start, step, settings)
    if recent:
        curve.append(summarise(step, recent))
    seconds = time.time() - start
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "steps": step,
        "tokens": step * settings.windows * settings.context,
        "seconds": round(seconds, 1),
        "milliseconds_per_step": round(1000 * seconds / step, 1),
        "largest_gpu_memory": torch.cuda.max_memory_allocated() if settings.device == "cuda" else None,
        "loss": thin_curve(curve),
    }


def summarise(step: int, recent: list[torch.Tensor]) -> list[float]:
    """Return the number of the step and the mean of the losses in `recent`, in nats, and empty `recent`."""
    mean = round(float(torch.stack(recent).mean()), 4)
    recent.clear()
    return [step, mean]


def make_optimizer(masters: list[torch.Tensor], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW for `masters`, with weight decay for everything but vectors such as norms and biases."""
    groups = [
        {"params": [master for master in masters if master.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [master for master in masters if master.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=settings.device == "cuda")


@torch.no_grad()
def update(optimizer: torch.optim.AdamW, masters: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """Move the gradients of `parameters` to `masters`, make one step, and copy the result back."""
    for master, parameter in zip(masters, parameters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(masters, CLIP)
    optimizer.step()
    torch._foreach_copy_(parameters, masters)


def scale_rate(progress: float) -> float:
    """Return the learning rate after the part `progress` (0 to 1) of the schedule, relative to the largest."""
    if progress < WARM_UP:
        return (progress + WARM_UP / 50) / (WARM_UP + WARM_UP / 50)
    cosine = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return LAST_RATE + (1 - LAST_RATE) * cosine


def find_progress(start: float, step: int, settings: Settings) -> float:
    """Return the part of the schedule that is over, from 0 to 1."""
    if settings.steps:
        return step / settings.steps
    return min(1.0, (time.time() - start) / max(settings.deadline - start, 0.001))


def thin_curve(curve: list[list[float]]) -> list[list[float]]:
    """Return about 60 points of a loss curve, each the number of the step and the loss in nats."""
    return curve[: -1 : max(1, len(curve) // 60)] + curve[-1:]


def save_model(model: transformers.PreTrainedModel, folder: Path, settings: Settings, recipe: Recipe) -> None:
    """Write the weights in bfloat16 as safetensors, the configuration and the tokenizer to `folder`."""
    cast_parameters(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(settings.corpus / "tokenizer.json"))
    if recipe.bos:
        add_bos(tokenizer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TEXT,
        eos_token=EOS_TEXT,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def measure_saved(folder: Path, settings: Settings) -> dict[str, Any]:
    """Load the checkpoint in `folder` in float32 and measure it on the text that was held out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out = torch.from_numpy(np.load(settings.corpus / "held_out.npy")).to(settings.device)
    windows = 4 if settings.tiny else 256
    return measure_model(model.to(settings.device).eval(), held_out, context=settings.context, windows=windows)


def make_card(report: dict[str, Any]) -> str:
    """Return the model card: what the model is, how it was trained, and its perplexity."""
    corpus = report["corpus"]
    return (
        f"# {report['name']}\n\nA {report['family']} model of {report['parameters']:,} parameters for calibrating "
        f"detectors of massive activations, made by `benchmarks/train.py` (seed {report['seed']}, "
        f"{'with' if report['bos'] else 'without'} BOS, {report['steps']:,} steps of "
        f"{report['windows_per_step']} windows of {report['window_tokens']} tokens, AdamW, "
        f"learning rate {report['rate']}).\n\nText: {corpus['documents']:,} Python source files, "
        f"{corpus['bytes']:,} bytes, sha256 {corpus['sha256']}. Perplexity of held-out files: "
        f"{report['with_bos']['perplexity']} with BOS, {report['without_bos']['perplexity']} without.\n"
    )
