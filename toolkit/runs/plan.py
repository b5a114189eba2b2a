"""The stages of a run, their keys, and which of them are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import RecipeError, StoreError, nearest
from toolkit.files import code_fingerprint, file_fingerprint, fingerprint, folder_fingerprint, module_fingerprint
from toolkit.judging.templates import SHIPPED
from toolkit.models.resolve import resolve
from toolkit.preferences.loading import local_path, shipped_path
from toolkit.preferences.steps import step_source_path
from toolkit.recipe.checks import on_the_hub
from toolkit.recipe.files import LoadedRecipe, resolved_yaml
from toolkit.recipe.judge_specs import SHIPPED_PRINCIPLES
from toolkit.recipe.rounds import kind_of, n_rounds, stage_of
from toolkit.recipe.schema import JudgeSettings, Recipe, RoundsSection
from toolkit.runs.store import MANIFEST_FILE, RECIPE_FILE, RESULTS_FILE, RunFolder, StageState
from toolkit.stages.contexts import Context, context_of, settings_of


@dataclass(frozen=True)
class StageSpec:
    """A stage: what it reads, and which arm's cost it is.

    ``inputs`` are stages before it, by what they are to it; ``documents`` are files of the run. ``trains``: several
    processes can share it, and each takes batches of the recipe's size, so that their number changes the result.
    ``shares``: they can share it, and their number changes nothing, since each batch is that of a single process.
    """

    name: str
    arm: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    documents: tuple[str, ...] = ()
    trains: bool = False
    shares: bool = False


def _by_name(*stages: str) -> dict[str, str]:
    return {stage: stage for stage in stages}


TRAINING = (
    StageSpec("data", "shared"),
    StageSpec("sft", "shared", _by_name("data"), trains=True),
    StageSpec("reward_model", "rm_ppo", _by_name("data", "sft"), trains=True),
    StageSpec("ppo", "rm_ppo", _by_name("data", "sft", "reward_model"), trains=True),
    StageSpec("dpo", "dpo", _by_name("data", "sft"), trains=True),
)
# Of the kinds of stages that a round has, those that an evaluation reads, too.
EVALUATED = ("reward_model", "ppo", "dpo")
MISSING = "missing"  # instead of a hash


def stages_of(rounds: int = 1, *, rft: bool = False) -> tuple[StageSpec, ...]:
    """The stages of a run in their order.

    A further round labels samples of the policies before it (``labels@2``), and goes on with both arms
    (``reward_model@2, ppo@2, dpo@2``). The evaluation reads the last round's arms as ``ppo`` and ``dpo``, and what
    earlier rounds left as ``ppo@1``. With ``rft`` a baseline is trained against the last reward model.

    >>> [stage.name for stage in stages_of(2)][4:]
    ['dpo', 'labels@2', 'reward_model@2', 'ppo@2', 'dpo@2', 'evaluate', 'report']
    """
    training = [*TRAINING, *(stage for round_ in range(2, rounds + 1) for stage in _further_round(round_))]
    last_rm = stage_of("reward_model", rounds)
    if rft:
        training.append(StageSpec("rft", "rft", {**_by_name("data", "sft"), "reward_model": last_rm}, trains=True))
    evaluated = {**_by_name("data", "sft"), **{kind: stage_of(kind, rounds) for kind in EVALUATED}}
    evaluated |= {f"{kind}@{r}": stage_of(kind, r) for r in range(1, rounds) for kind in EVALUATED}
    evaluated |= _by_name(*(stage_of("labels", r) for r in range(2, rounds + 1)), *(["rft"] if rft else []))
    reported = _by_name(*(stage.name for stage in training), "evaluate")
    return (
        *training,
        StageSpec("evaluate", "shared", evaluated, shares=True),
        StageSpec("report", "shared", reported, (RESULTS_FILE, MANIFEST_FILE, RECIPE_FILE)),
    )


def _further_round(round_: int) -> Iterator[StageSpec]:
    """The stages of a round behind the first. ``previous`` is what a stage goes on from."""
    base, (rm, ppo, dpo) = _by_name("data", "sft"), (stage_of(kind, round_ - 1) for kind in EVALUATED)
    labels = [stage_of("labels", earlier) for earlier in range(2, round_ + 1)]
    new_rm = stage_of("reward_model", round_)
    yield StageSpec(labels[-1], "shared", {**base, "ppo": ppo, "dpo": dpo}, shares=True)
    yield StageSpec(new_rm, "rm_ppo", {**base, **_by_name(*labels), "previous": rm}, trains=True)
    yield StageSpec(stage_of("ppo", round_), "rm_ppo", {**base, "reward_model": new_rm, "previous": ppo}, trains=True)
    yield StageSpec(stage_of("dpo", round_), "dpo", {**base, "labels": labels[-1], "previous": dpo}, trains=True)


STAGE_NAMES = tuple(stage.name for stage in stages_of())


@dataclass(frozen=True)
class PlannedStage:
    """A stage with what it reads, its context, its key, the key's fields, and what is on disk.

    ``reads``: what another stage is to this one -> that stage.
    """

    spec: StageSpec
    reads: Mapping[str, str]
    context: Context
    key: str
    fields: dict[str, Any]
    state: StageState

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stages that it reads."""
        return tuple(self.reads.values())


def plan_stages(
    loaded: LoadedRecipe, folder: RunFolder, processes: int = 1, *, sharded: bool = False
) -> list[PlannedStage]:
    """Every stage with its key and state. Raises ModelError or RecipeError for a model or prompts that are not there.

    A key changes with the stage's context, its code, its inputs, what it reads from outside the run, and, where it
    trains, with the number of processes that share it and whether they hold shards: a stage that was stopped does not
    go on from checkpoints of the other form.
    """
    keys, digests = dict[str, str](), dict[str, str]()
    stages = []
    for spec in stages_of(n_rounds(loaded.recipe), rft=loaded.recipe.rft is not None):
        context = context_of(spec.name, loaded.recipe)
        fields: dict[str, Any] = settings_of(context)
        fields["code"] = code_fingerprint(f"toolkit.stages.{kind_of(spec.name)}")
        reads = inputs_of(spec, loaded.recipe)
        inputs = tuple(reads.values())
        fields |= {f"input {name}": keys[name] for name in inputs}
        if RECIPE_FILE in spec.documents:  # the other documents say what the recipe and the stages make of them
            fields[f"input {RECIPE_FILE}"] = fingerprint(resolved_yaml(loaded))
        fields |= outside_fingerprints(kind_of(spec.name), loaded.recipe)
        if spec.trains and processes > 1:  # the keys of a single process do not have it
            fields["processes"] = processes
            if sharded:
                fields["sharded"] = True
        key = keys[spec.name] = fingerprint(fields)
        read = {name: digests[name] for name in inputs if name in digests}
        state = folder.state(spec.name, key, fields, read)
        if state.digest is not None:  # of the result that the run will have, which may be on the shelf now
            digests[spec.name] = state.digest
        stages.append(PlannedStage(spec, reads, context, key, fields, state))
    return stages


def inputs_of(spec: StageSpec, recipe: Recipe) -> Mapping[str, str]:
    """The stages that a stage reads: DPO reads the reward model where that labels the policy's samples."""
    if spec.name == "dpo" and recipe.dpo.online is not None and recipe.dpo.online.labels == "rm":
        return {**spec.inputs, **_by_name("reward_model")}
    return spec.inputs


def outside_fingerprints(stage: str, recipe: Recipe) -> dict[str, str]:
    """Fingerprints of what a kind of stage reads from outside the run: data, models, files of judgements."""
    if stage == "data":
        sources = {"data.source": recipe.data.source, "data.eval_source": recipe.data.eval_source}
        revision = {recipe.data.source: recipe.data.revision}
        contents = {
            f"{name} (content)": source_fingerprint(source, revision.get(source))
            for name, source in sources.items()
            if source
        }
        if recipe.reward_model.kind == "process" and recipe.reward_model.steps is not None:
            steps = recipe.reward_model.steps
            path = step_source_path(steps)
            contents["reward_model.steps (content)"] = source_fingerprint(str(path) if path.exists() else steps, None)
        return contents | text_fingerprints(recipe)
    if stage == "sft":
        weights = resolve(recipe.model.name, recipe.model.revision).fingerprint
        return {"model (weights)": weights} | text_fingerprints(recipe)
    if stage == "reward_model" and recipe.reward_model.base is not None:
        return {"reward_model.base (model)": resolve(recipe.reward_model.base).identity}
    if stage == "ppo":
        sources = {"ppo.prompts": recipe.ppo.prompts, "ppo.ptx_texts": recipe.ppo.ptx_texts}
        return {
            f"{name} (content)": _content_of(name, source) for name, source in sources.items() if source is not None
        }
    if stage == "dpo" and recipe.dpo.online is not None:
        return judge_fingerprints(recipe.dpo.online.labels)
    if stage == "labels" and recipe.rounds is not None:
        return labelling_fingerprints(recipe.rounds)
    if stage == "evaluate":
        section = recipe.evaluate
        by_judge = [judge_fingerprints(judge, section.judge) for judge in section.judges]
        return {name: value for fingerprints in by_judge for name, value in fingerprints.items()}
    return {}


def _content_of(setting: str, source: str) -> str:
    """Raises RecipeError for a file that is not there, before the stages ahead of the one that reads it train."""
    content = source_fingerprint(source, None)
    if content == MISSING:
        path = Path(source).expanduser()
        fix = nearest(path.name, (item.name for item in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise RecipeError(f"there is no file {source}", where=setting, fix=fix)
    return content


def text_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of what turns text into ids: files beside the model's weights, and ``model.chat_template``."""
    model = recipe.model
    text = {"model (tokenizer, templates, generation)": resolve(model.name, model.revision).text_fingerprint}
    if model.chat_template is not None:
        text["model.chat_template (content)"] = _file_or_missing(model.chat_template)
    return text


def labelling_fingerprints(rounds: RoundsSection) -> dict[str, str]:
    """Fingerprints of what labels samples in further rounds: the judge, and a file of principles."""
    fingerprints = judge_fingerprints(rounds.labels, rounds.judge, "rounds.judge")
    if rounds.principles is not None and rounds.principles not in SHIPPED_PRINCIPLES:
        fingerprints["rounds.principles (content)"] = _file_or_missing(rounds.principles)
    return fingerprints


def judge_fingerprints(
    judge: str, settings: JudgeSettings | None = None, section: str = "evaluate.judge"
) -> dict[str, str]:
    """Fingerprints of what a judge reads from outside: a file of judgements, its models, the source of its function,
    and of a language model the file of its template, where ``settings``, those of a ``section``, name one.
    """
    kind, _, rest = judge.partition(":")
    fingerprints = {}
    if kind == "file":
        fingerprints[f"{judge} (content)"] = source_fingerprint(rest, None)
    elif kind in ("rm", "implicit", "llm") and rest:
        models = [rest] if kind == "llm" else rest.split(",")
        fingerprints[f"{judge} (model)"] = fingerprint([resolve(name.strip()).identity for name in models])
    elif kind == "python":
        fingerprints[f"{judge} (source)"] = module_fingerprint(rest.partition(":")[0]) or MISSING
    template = settings.template if settings is not None else None
    if kind in ("llm", "openai") and template is not None and template not in SHIPPED:
        fingerprints[f"{section}.template (content)"] = _file_or_missing(template)
    return fingerprints


def _file_or_missing(name: str) -> str:
    path = Path(name).expanduser()
    return file_fingerprint(path) if path.is_file() else MISSING


def source_fingerprint(source: str, revision: str | None) -> str:
    """A hash of a file's or folder's content. Of a hub data set the commit, or the revision if the hub does not answer.

    ``missing`` where there is no such source: the stage that reads it says so, with the nearest name.
    """
    path = shipped_path(source) or local_path(source)
    if path.is_file():
        return file_fingerprint(path)
    if path.is_dir():
        return folder_fingerprint(path, ["**/*"])
    if not on_the_hub(source):
        return MISSING
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source, revision=revision).sha)
    except Exception:  # the hub's client raises what its HTTP library does
        return revision or "unpinned"


def with_inputs(stages: Sequence[PlannedStage], target: str) -> list[str]:
    """Names of a stage and of all that it reads, in the order of a run."""
    inputs = {stage.spec.name: stage.inputs for stage in stages}
    needed, waiting = set[str](), [target]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += inputs[name]
    return [name for name in inputs if name in needed]


def stages_to_run(
    stages: Sequence[PlannedStage], only: str | None, until: str | None, target: str | None = None
) -> list[str]:
    """Names of the stages that ``--only`` and ``--until`` ask for; all without them.

    With ``only``, its inputs that lie on the shelf come with it. ``target`` asks for a stage and what it reads. Raises
    RecipeError for a name that is no stage's, StoreError where an input of ``only`` has not run.
    """
    if target is not None:
        return with_inputs(stages, target)
    names = [stage.spec.name for stage in stages]
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in names:
            raise RecipeError(f"there is no stage {name!r}", where=option, fix=nearest(name, names))
    if only is None:
        return names if until is None else names[: names.index(until) + 1]
    states = {stage.spec.name: stage.state.status for stage in stages}
    inputs = next(stage.inputs for stage in stages if stage.spec.name == only)
    for stage in stages:
        if stage.spec.name in inputs and stage.state.damage:
            raise StoreError(
                f"stage {only!r} needs {stage.spec.name}, which is damaged: {stage.state.damage}",
                where="--only",
                fix=f"run with --until {stage.spec.name} first: it is computed again",
            )
    missing = [name for name in inputs if states[name] not in ("cached", "shelved")]
    if missing:
        raise StoreError(
            f"stage {only!r} needs {', '.join(missing)}, which this recipe has not run yet",
            where="--only",
            fix=f"run with --until {missing[-1]} first",
        )
    return [only, *(name for name in inputs if states[name] == "shelved")]
