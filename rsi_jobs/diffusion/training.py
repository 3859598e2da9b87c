"""Weighted fine-tuning: one loop for all families, resumable at any checkpointed step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rsi_jobs.diffusion import adapters, family
from rsi_jobs.diffusion.batches import ROUND, Composer, TrainingData, make_batch, times_of
from rsi_jobs.diffusion.noise import hash63
from rsi_jobs.errors import ConfigError, DataError

FORMAT = 1  # of a saved training state
STATE_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
REFERENCE_STEPS = 5  # whose median loss is what an explosion is measured against
EXPLOSION = 10.0


@dataclass(frozen=True)
class TrainSettings:
    """How one round is trained. Raises ConfigError for a value that cannot be used."""

    seed: int
    round: int
    steps: int  # at most: see max_passes
    batch_size: int  # samples a step, over all processes
    micro_batch: int | None = None  # samples at once in one process; None: all of its part
    mode: str = "lora"  # "lora" or "full"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = adapters.ATTENTION  # module names, or ends of them
    learning_rate: float = 1e-4
    warmup: int = 5  # steps of linear rise
    schedule: str = "constant"  # after warm-up: "constant", or "cosine" down to 0
    weight_decay: float = 1e-2
    clip: float = 1.0  # largest gradient norm
    ema: float | None = None  # decay; None: by the number of steps; 0: none
    max_passes: float = 4.0  # over this round's picks; more over-fits
    snr_gamma: float = 5.0  # min-SNR weighting by time; 0: none
    beta: float = 0.0  # weight of staying close to the round-0 base's prediction
    prompt_dropout: float = 0.1
    stratified: bool = False  # times spread evenly over a batch
    replay_share: float = 0.0  # of a batch, from earlier accepted rounds
    anchor_share: float = 0.0  # of a batch, from the base's own selected samples
    bf16: bool = False  # autocast; trained weights stay float32
    checkpoint_every: int = 0  # steps; 0: never

    def __post_init__(self) -> None:
        shares = (self.replay_share, self.anchor_share)
        for name, ok, accepted in (
            ("mode", self.mode in {"lora", "full"}, "'lora' or 'full'"),
            ("schedule", self.schedule in {"constant", "cosine"}, "'constant' or 'cosine'"),
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("rank", self.rank >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("ema", self.ema is None or 0 <= self.ema < 1, "in [0, 1), or None"),
            ("max_passes", self.max_passes > 0, "above 0"),
            ("prompt_dropout", 0 <= self.prompt_dropout <= 1, "in [0, 1]"),
            ("replay_share", min(shares) >= 0 and sum(shares) < 1, "below 1 with anchor_share"),
        ):
            if not ok:
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}: it must be {accepted}")


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Losses are means over the global batch."""

    step: int  # counted from 0
    loss: float  # weighted, as optimised
    mse: float  # unweighted
    quartiles: tuple[float | None, ...]  # mse by quarter of time, early to late; None: no sample
    grad_norm: float  # before clipping
    learning_rate: float


@dataclass
class TrainResult:
    """`rejected` says why the round's training is not to be used; then `model` is not either."""

    records: list[StepRecord]
    steps: int
    passes: float  # over this round's picks
    ema_decay: float
    rejected: str | None = None

    def quartiles(self) -> list[float | None]:
        """Mean mse by quarter of time over the whole run."""
        columns = zip(*(record.quartiles for record in self.records), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        return [statistics.fmean(column) if column else None for column in known]


@dataclass(frozen=True)
class _Run:
    """What stays the same over all steps."""

    model: Any
    data: TrainingData
    settings: TrainSettings
    composer: Composer
    base: Any  # the base's predictor, None without beta
    steps: int


@dataclass
class _State:
    """All that changes as training goes on, and all that a resumed run needs."""

    weights: dict[str, torch.nn.Parameter]
    ema: dict[str, torch.Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    records: list[StepRecord] = field(default_factory=list)


def planned_steps(data: TrainingData, settings: TrainSettings) -> int:
    """The steps to run: `settings.steps`, or as few as `max_passes` allows (1 at least)."""
    picks = int((data.group == ROUND).sum())
    composer = _composer(data, settings)
    allowed = math.floor(settings.max_passes * picks)
    steps = settings.steps
    while steps > 1 and composer.taken(steps)[ROUND] > allowed:
        steps -= 1
    return steps


def ema_decay(settings: TrainSettings, steps: int) -> float:
    """0.95 to 100 steps, 0.999 from 5,000: the average spans the last fifth of the run."""
    if settings.ema is not None:
        return settings.ema
    return min(0.999, max(0.95, 1 - 5 / steps))


def train(
    model: Any,
    data: TrainingData,
    settings: TrainSettings,
    *,
    state_dir: Path | None = None,
    save_state: Callable[[int, dict[str, Path]], None] | None = None,
    resume_from: Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainResult:
    """Train `model.network` for one round; it ends with the EMA weights, ready to be saved.

    An adapter already there is continued, so that it stays relative to the round-0 base. Every
    `checkpoint_every` steps the state is written into `state_dir` and `save_state(steps done,
    files)` called, which must be done with the files when it returns. `resume_from` is a folder
    with those files: on the same hardware, threads and micro-batch the result is the same to the
    last bit. Under torch.distributed each process takes its part of every batch and only the first
    saves. A loss that is not finite or explodes ends the training with a reason in `rejected`.
    Raises ConfigError for settings that do not fit the model, DataError for another run's state.
    """
    steps = planned_steps(data, settings)
    state = _start(model, settings)
    if resume_from is not None:
        _restore(state, resume_from, settings, data)
    base = None
    if settings.beta > 0:
        base = family(model.family).base_predictor(model, copy=settings.mode == "full")
    decay = ema_decay(settings, steps)
    run = _Run(model, data, settings, _composer(data, settings), base, steps)
    rejected = None
    while state.step < steps and rejected is None:
        record = _step(run, state)
        rejected = _fault(record, state.records)
        if rejected is not None:
            break
        state.optimizer.step()
        _update_ema(state, decay)
        state.records.append(record)
        state.step += 1
        if on_step is not None:
            on_step(record)
        due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
        rejected = _unsound(state) if due or state.step == steps else None
        if due and rejected is None and save_state is not None and _rank_and_world()[0] == 0:
            assert state_dir is not None, "save_state needs a state_dir"
            save_state(state.step, _save(state, state_dir, settings, data))
    for name, weight in state.weights.items():
        weight.data.copy_(state.ema[name])
        weight.grad = None
        weight.requires_grad_(False)
    picks = int((data.group == ROUND).sum())
    passes = run.composer.taken(state.step)[ROUND] / picks
    return TrainResult(state.records, state.step, passes, decay, rejected)


def _composer(data: TrainingData, settings: TrainSettings) -> Composer:
    return Composer(
        data,
        seed=settings.seed,
        round=settings.round,
        size=settings.batch_size,
        replay_share=settings.replay_share,
        anchor_share=settings.anchor_share,
    )


def _start(model: Any, settings: TrainSettings) -> _State:
    """The trained weights, float32, with a fresh optimizer and average."""
    network = model.network
    network.eval()  # no dropout inside: it would draw from a generator that no key names
    shape = adapters.shape_of(network)
    if settings.mode == "full":
        if shape is not None:
            raise ConfigError("train.mode is 'full' but the model carries an adapter: export it")
        if network.dtype != torch.float32:
            raise ConfigError(f"train.mode 'full' needs a float32 model, not {network.dtype}")
        weights = dict(sorted(network.named_parameters()))
    else:
        wanted = adapters.Shape(settings.rank, settings.alpha, settings.targets)
        if shape is None:
            seed = hash63("adapter", settings.seed, settings.round)
            adapters.attach(network, wanted, seed=seed)
        elif shape != wanted:
            raise ConfigError(f"the adapter to continue is {shape}, train.* asks for {wanted}")
        weights = adapters.parameters(network)
    network.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    ema = {name: weight.detach().clone() for name, weight in weights.items()}
    return _State(weights, ema, optimizer)


def _step(run: _Run, state: _State) -> StepRecord:
    """Gradients of one global batch, reduced and clipped; the weights are not yet changed."""
    model, data, settings = run.model, run.data, run.settings
    rank, world = _rank_and_world()
    keys = {"seed": settings.seed, "round": settings.round, "step": state.step}
    rows = run.composer.rows_of(state.step)
    times = times_of(data, rows, stratified=settings.stratified, **keys)
    rows, times = rows[rank::world], times[rank::world]
    sums = torch.zeros(10, dtype=torch.float64, device=model.device)  # loss, mse, 4 mse, 4 counts
    state.optimizer.zero_grad(set_to_none=False)
    size = settings.micro_batch or max(1, len(rows))
    for part, when in zip(rows.split(size), times.split(size), strict=True):
        batch = make_batch(data, part, when, dropout=settings.prompt_dropout, device=model.device, **keys)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
            each, mse = family(model.family).loss(
                model, batch, snr_gamma=settings.snr_gamma, beta=settings.beta, base=run.base
            )
        # Over the global batch's size: never the part's, nor the sum of its weights.
        (each.sum() / settings.batch_size).backward()
        quarter = (batch.times * 4).long()
        sums[0] += each.detach().double().sum()
        sums[1] += mse.double().sum()
        sums[2:6].index_add_(0, quarter, mse.double())
        sums[6:10].index_add_(0, quarter, torch.ones_like(mse, dtype=torch.float64))
    _reduce(state, sums)
    norm = torch.nn.utils.clip_grad_norm_(list(state.weights.values()), settings.clip)
    rate = learning_rate(settings, state.step, run.steps)
    state.optimizer.param_groups[0]["lr"] = rate
    values = sums.tolist()
    return StepRecord(
        step=state.step,
        loss=values[0] / settings.batch_size,
        mse=values[1] / settings.batch_size,
        quartiles=tuple(s / n if n else None for s, n in zip(values[2:6], values[6:10], strict=True)),
        grad_norm=float(norm),
        learning_rate=rate,
    )


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Linear rise over `warmup` steps, then constant, or half a cosine down to 0 at `steps`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _reduce(state: _State, sums: torch.Tensor) -> None:
    """Add up gradients and sums over the processes; each already divided by the global batch."""
    if _rank_and_world()[1] == 1:
        return
    for weight in state.weights.values():
        dist.all_reduce(weight.grad)
    dist.all_reduce(sums)


def _update_ema(state: _State, decay: float) -> None:
    # The first steps count more, or a short run would end where it began.
    now = min(decay, (1 + state.step) / (10 + state.step))
    for name, weight in state.weights.items():
        state.ema[name].lerp_(weight.detach(), 1 - now)


def _fault(record: StepRecord, before: list[StepRecord]) -> str | None:
    """Why training must stop at this step, if it must.

    An explosion is three losses whose median is over ten times that of the run's first steps (a
    single batch can be ten times as hard as another; and those first steps are taken at the low
    rates of the warm-up, so they show the model as it came).
    """
    if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
        return f"step {record.step}: loss {record.loss} with gradient norm {record.grad_norm} is not finite"
    if len(before) < REFERENCE_STEPS:
        return None
    start = statistics.median(r.loss for r in before[:REFERENCE_STEPS])
    recent = statistics.median([before[-2].loss, before[-1].loss, record.loss])
    if recent > EXPLOSION * start:
        return (
            f"step {record.step}: loss {recent:.4g} is more than {EXPLOSION:g} times "
            f"the {start:.4g} of the first {REFERENCE_STEPS} steps"
        )
    return None


def _unsound(state: _State) -> str | None:
    """The first weight that is not finite, in words: such weights are never written."""
    for name, weight in state.weights.items():
        if not (torch.isfinite(weight).all() and torch.isfinite(state.ema[name]).all()):
            return f"step {state.step - 1}: weight {name} is not finite"
    return None


def _same_run(settings: TrainSettings, data: TrainingData) -> dict[str, Any]:
    """What two attempts at one round's training must share; how they are batched may differ."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    for free in ("micro_batch", "checkpoint_every"):
        del facts[free]
    return {**facts, "data": data.digest()}


def _save(state: _State, folder: Path, settings: TrainSettings, data: TrainingData) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    moments = {}
    for name, weight in state.weights.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{key}"] = state.optimizer.state[weight][key]
    files = {name: folder / name for name in STATE_FILES}
    save_file({k: w.detach().contiguous() for k, w in state.weights.items()}, files[STATE_FILES[0]])
    save_file(state.ema, files[STATE_FILES[1]])
    save_file(moments, files[STATE_FILES[2]])
    facts = {
        "format": FORMAT,
        "step": state.step,
        "run": _same_run(settings, data),
        "records": [asdict(record) for record in state.records],
    }
    files[STATE_FILES[3]].write_text(json.dumps(facts, sort_keys=True))
    return files


def _restore(state: _State, folder: Path, settings: TrainSettings, data: TrainingData) -> None:
    facts = json.loads((folder / STATE_FILES[3]).read_text())
    if facts["format"] != FORMAT:
        raise DataError(f"training state {folder} has format {facts['format']}: this reads {FORMAT}")
    wanted = _same_run(settings, data)
    differing = sorted(k for k, v in wanted.items() if facts["run"].get(k) != v)
    if differing:
        raise DataError(f"training state {folder} is of another run: {differing[0]} differs")
    weights, ema, moments = (load_file(folder / name) for name in STATE_FILES[:3])
    for name, weight in state.weights.items():
        weight.data.copy_(weights[name])
        state.ema[name].copy_(ema[name])
        state.optimizer.state[weight] = {
            "step": torch.tensor(float(facts["step"])),
            **{k: moments[f"{name}.{k}"].to(weight.device) for k in ("exp_avg", "exp_avg_sq")},
        }
    state.step = facts["step"]
    state.records = [
        StepRecord(**{**record, "quartiles": tuple(record["quartiles"])}) for record in facts["records"]
    ]


def sample_uses(data: TrainingData, settings: TrainSettings, steps: int) -> torch.Tensor:
    """How often each sample was trained on in the first `steps` steps, (n,) int64."""
    composer = _composer(data, settings)
    uses = torch.zeros(len(data.ids), dtype=torch.int64)
    for step in range(steps):
        rows = composer.rows_of(step)
        uses.index_add_(0, rows, torch.ones_like(rows))
    return uses
