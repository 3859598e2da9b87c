"""A run's configuration: what each field means, its unit, its default, and what is accepted.

`identity` cannot change once a run has begun, `target` may grow, `operations` may change at any time
(it may move work, never change a result). A recipe returns the whole; `--set section.field=value` and a
file change it; the run's `config.json` is what every stage reads.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rsi_jobs.errors import ConfigError
from rsi_jobs.marker import digest

FORMAT: Literal[1] = 1
T = TypeVar("T", bound=BaseModel)
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A group of fields; unknown ones are refused with the nearest known name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """The base model: what round 0 is."""

    family: Literal["unet"] = Field("unet", description="how it denoises: unet = SD 1.x/2.x, epsilon or v")
    path: str = Field("shapes:base", description="a diffusers folder, or shapes:base for the built-in one")
    digest: str = Field("", description="of the base's files; filled in when the run begins")
    domain: Literal["shapes", "natural"] = Field(
        "shapes", description="what its prompts speak of; shapes has a grammar and an exact judge"
    )


class Prompts(Section):
    """Construction and filtering of a round's prompts (the paper's first strategy)."""

    source: str = Field("shapes", description="shapes, file, or package.module:function")
    file: str = Field("", description="the file to read with source=file: .txt, .jsonl, .tsv or .csv")
    raw: Count = Field(600, description="prompts constructed for a round, before filtering")
    keep: Count = Field(200, description="prompts a round keeps")
    window: Count = Field(24, description="most tokens of a prompt: what the shortest reader takes in")
    clarity: bool = Field(True, description="drop what cannot be depicted or is malformed")
    specificity: bool = Field(True, description="drop vague and overloaded prompts")
    diversity: bool = Field(True, description="drop near duplicates, then spread over what is left")

    @model_validator(mode="after")
    def _check(self) -> Prompts:
        if self.raw < self.keep:
            raise ValueError(f"prompts.raw={self.raw} is less than prompts.keep={self.keep}: construct more")
        if self.source == "file" and not self.file:
            raise ValueError(
                "prompts.source=file needs prompts.file, the path of a .txt, .jsonl, .tsv or .csv"
            )
        return self


class Sampling(Section):
    """How candidates are drawn."""

    candidates: Count = Field(8, description="images for each prompt")
    steps: Count = Field(12, description="denoising steps an image")
    guidance: float = Field(1.0, ge=1, le=30, description="classifier-free guidance scale; 1 is none")
    guidance_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor on (guidance - 1) from one round to the next (arXiv 2407.17493)"
    )
    scheduler: Literal["ddim", "dpm++", "euler"] = Field("dpm++", description="the sampler")
    batch: Count = Field(64, description="images denoised together; a shard is a whole number of batches")


class Rewards(Section):
    """Who scores a candidate."""

    use: tuple[str, ...] = Field(("dual", "fused"), description="rewards that select; each one ranks alone")
    heldout: str = Field("heldout", description="the gate's judge, which must not select")
    features: str = Field("dual", description="the scorer whose image embedding measures distance")

    @model_validator(mode="after")
    def _check(self) -> Rewards:
        if not self.use:
            raise ValueError("rewards.use is empty: name at least one reward")
        if len(set(self.use)) != len(self.use):
            raise ValueError(f"rewards.use={','.join(self.use)} names a reward twice")
        if self.heldout in self.use:
            raise ValueError(
                f"rewards.heldout={self.heldout} also stands in rewards.use: a judge that selects is not held out"
            )
        return self


class Selection(Section):
    """Preference sampling (the paper's second strategy)."""

    method: Literal["rank", "mean_z", "random", "first"] = Field(
        "rank", description="rank: average of the rewards' ranks within a prompt; first: the first candidate"
    )
    keep: Count = Field(160, description="picked candidates kept for training")
    margin: float = Field(0.25, ge=0, description="least lead of the best over the median, in robust spreads")
    floor: Fraction = Field(0.3, description="quantile of the round's scores a pick must reach")
    quota: bool = Field(True, description="keep each category's share of prompts")


class Weighting(Section):
    """Distribution-based weights (the paper's third strategy)."""

    scheme: str = Field(
        "knn", description="knn, mahalanobis, trajectory, uniform, or package.module:function"
    )
    neighbours: Count = Field(15, description="k of the k nearest neighbours")
    residual: bool = Field(False, description="measure features less their prompt's mean")
    by_category: bool = Field(True, description="measure within prompts of one category")
    reference: Fraction = Field(0.5, description="share of the candidates, best first, that is the reference")
    temperature: Positive = Field(2.0, description="w = exp(-z / temperature)")
    low: Positive = Field(0.05, description="least weight before normalising")
    high: Positive = Field(3.0, description="largest weight before normalising")
    cut: Fraction = Field(0.99, description="quantile of the distance above which the weight is 0")
    min_ess: Fraction = Field(0.5, description="least effective sample size, as a share of the samples")


class Training(Section):
    """Fine-tuning on the weighted samples."""

    mode: Literal["full", "lora"] = Field("full", description="all weights of the denoiser, or an adapter")
    rank: Count = Field(16, description="LoRA rank")
    alpha: Positive = Field(32, description="LoRA alpha; the adapter is scaled by alpha / rank")
    lr: Positive = Field(2e-4, description="AdamW learning rate")
    steps: Count = Field(100, description="optimiser steps a round")
    batch: Count = Field(64, description="samples a step, over all processes")
    max_passes: Positive = Field(
        40, description="most passes over a round's data; fewer steps are made above it"
    )
    warmup: Fraction = Field(0.1, description="share of the steps with a rising learning rate")
    clip: Positive = Field(1.0, description="largest gradient norm")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="decay of the averaged weights; 0 is none"
    )
    dropout: Fraction = Field(0.1, description="share of samples trained without their prompt")
    snr_gamma: Positive = Field(5.0, description="gamma of min-SNR (arXiv 2303.09556)")
    base_penalty: float = Field(0.0, ge=0, description="beta of the penalty towards the base's prediction")
    replay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="share of a batch from earlier accepted rounds (arXiv 2404.01413)"
    )
    anchor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a batch from the base's own selected samples"
    )
    checkpoint_every: Count = Field(50, description="steps between two saved states")

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.replay + self.anchor >= 1:
            raise ValueError(
                f"training.replay={self.replay} and training.anchor={self.anchor} leave nothing "
                "of a batch to the round: their sum must be below 1"
            )
        return self


class Evaluation(Section):
    """Fixed prompts and fixed noise, the same in every round and run."""

    gate: str = Field("shapes:gate", description="the gate's prompts: shapes:gate, or a file")
    gate_prompts: Count = Field(256, description="how many of them")
    candidates: Count = Field(2, description="images for each evaluation prompt; diversity needs 2")
    guidance: float = Field(3.0, ge=1, le=30, description="guidance in every round: the base's own best")
    test: str = Field("shapes:test", description="prompts looked at once, at the end")
    test_prompts: int = Field(0, ge=0, description="how many of them; 0 is no test")
    bootstrap: Count = Field(1000, description="bootstrap draws of an interval")


class Gate(Section):
    """Whether a round's checkpoint is accepted."""

    enabled: bool = Field(True, description="off: every round is accepted")
    margin: float = Field(0.0, ge=0, description="how far the held-out score may surely fall, in its spread")
    hallucination: float = Field(
        0.3, ge=0, description="how far the distance to the base's good images may rise"
    )
    diversity: Fraction = Field(0.95, description="least spread of passing candidates, against the base")
    patience: Count = Field(2, description="roll-backs in a row that end the run")


class Identity(Section):
    """What makes a run this run: the same identity gives the same result."""

    recipe: str = Field("shapes", description="the recipe it was made from")
    seed: int = Field(0, ge=0, lt=2**31, description="every random choice derives from it")
    model: Model = Model()
    prompts: Prompts = Prompts()
    sampling: Sampling = Sampling()
    rewards: Rewards = Rewards()
    selection: Selection = Selection()
    weighting: Weighting = Weighting()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _check(self) -> Identity:
        n, method = self.sampling.candidates, self.selection.method
        if n == 1 and method in ("rank", "mean_z"):
            raise ValueError(
                f"sampling.candidates=1 leaves selection.method={method} nothing to prefer: "
                "draw at least 2, or set selection.method=first"
            )
        if self.selection.keep > self.prompts.keep:
            raise ValueError(
                f"selection.keep={self.selection.keep} exceeds prompts.keep={self.prompts.keep}: "
                "one candidate of each prompt is picked at most"
            )
        return self


class Operations(Section):
    """Where and how the work runs."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(2, ge=1, le=256, description="CPU threads of a stage; bits depend on it")
    shards: Count = Field(1, description="pieces of sample and score that run apart")
    workers: Count = Field(1, description="stages the local runner runs at once")
    micro_batch: int = Field(0, ge=0, description="images at once in memory; 0 is the whole batch")
    retries: int = Field(3, ge=0, description="times a failed stage is started again")
    stage_timeout: Positive = Field(6 * 3600, description="seconds a stage may run")

    @model_validator(mode="after")
    def _check(self) -> Operations:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"operations.device={self.device!r} is unknown: give auto, cpu, cuda or cuda:N")
        return self


class RunConfig(Section):
    """config.json."""

    format: Literal[1] = FORMAT
    run: str
    rounds: Annotated[int, Field(ge=1, le=999)] = 8
    identity: Identity = Identity()
    operations: Operations = Operations()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        images = self.identity.prompts.keep * self.identity.sampling.candidates
        batches = -(-images // self.identity.sampling.batch)
        if self.operations.shards > batches:
            raise ValueError(
                f"operations.shards={self.operations.shards} exceeds the {batches} batches of a round "
                f"({images} images, sampling.batch={self.identity.sampling.batch})"
            )
        return self

    def identity_digest(self) -> str:
        """16 hexadecimal digits that two runs share when their results must agree."""
        return digest(self.identity.model_dump(mode="json"))

    def dumps(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode()


def loads(data: bytes, origin: str) -> RunConfig:
    """Parse config.json; `origin` is named in the error."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ConfigError(
            f"{origin} is not JSON ({error}): restore it, or start under another run name"
        ) from None
    return build(RunConfig, body, origin)


def build(kind: type[T], body: object, origin: str) -> T:
    """Validate `body`, or raise ConfigError with one sentence that names the first wrong value."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(kind, error)}") from None


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path[1:] if path[:1] == ["identity"] else path)
    if first["type"] == "extra_forbidden":
        section = _section(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], section.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "it has " + ", ".join(section.model_fields)
        return f"there is no field {name}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "missing"):
        return message if first["type"] == "value_error" else f"{name} is missing"
    return f"{name}={first['input']!r} is not accepted: {message[0].lower()}{message[1:]}"


def _section(kind: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        annotation = kind.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = annotation
    return kind


SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Identity.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
} | {"operations": Operations}


def apply(config: RunConfig, changes: dict[str, Any], origin: str) -> RunConfig:
    """A new configuration with dotted fields changed, e.g. {"training.lr": 5e-5}.

    Text values are read as JSON where they parse as JSON, so `--set training.lr=5e-5` is a number and
    `--set rewards.use=dual,fused` a list of names.
    """
    body = config.model_dump(mode="json")
    for dotted, value in changes.items():
        section, _, field = dotted.partition(".")
        if section == "seed" and not field:
            body["identity"]["seed"] = _read(value, int)
            continue
        if section not in SECTIONS:
            near = difflib.get_close_matches(section, SECTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else "sections are " + ", ".join(SECTIONS)
            raise ConfigError(f"{origin} {dotted}: there is no section {section!r}; {hint}")
        fields = SECTIONS[section].model_fields
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f"did you mean {section}.{near[0]}?" if near else "it has " + ", ".join(fields)
            raise ConfigError(f"{origin} {dotted}: section {section!r} has no field {field!r}; {hint}")
        place = body["operations"] if section == "operations" else body["identity"][section]
        place[field] = _read(value, fields[field].annotation)
    return build(RunConfig, body, origin)


def _read(value: Any, annotation: Any) -> Any:
    if not isinstance(value, str) or annotation is str:
        return value
    if "tuple" in str(annotation):
        return [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value
