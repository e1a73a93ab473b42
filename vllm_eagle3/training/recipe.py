"""Recipes: a training run as a TOML file, with stages.

    licence = "mit"                       # and further options of a job
    data = ["answers.jsonl.gz"]           # files, looked for in --data-dir; features_dir is within --out
    [settings]                            # options of all stages
    [validation]                          # tasks: lists of sources; tau is the mean over tasks
    [licences]                            # source = "licence"; a source without one is an error
    [[answers]]                           # name, prompts, and options of `vllm_eagle3.training.generate`
    [[stage]]                             # name, mix, and options of this stage
    mix = [{ sources = ["gsm8k_train"], temperature = 0.0, weight = 0.5 }]

The options are those of `vllm-eagle3 train --help`, with underscores.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle3.provenance import file_hash
from vllm_eagle3.training.options import from_table, options_of
from vllm_eagle3.training.settings import Answers, LossOptions, Mix, Stage, TrainJob, TrainSettings

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
TABLES = ("settings", "validation", "licences", "answers", "stage", "description")
Table = Mapping[str, Any]


def find(name: str) -> Path:
    """The file of a recipe: a path, or a name in `recipes/`. Raises FileNotFoundError, which lists those names."""
    for path in (Path(name), FOLDER / f"{name}.toml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml"))) or "none"
    raise FileNotFoundError(f"{name}: no such recipe; expected a TOML file or one of: {known}")


def read(path: Path) -> dict[str, Any]:
    """The tables of a recipe. Raises ValueError, which names the file, for bad TOML or an unknown key."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error
    of_stage = options_of(TrainSettings, LossOptions)
    check(found, {*TABLES, *options_of(TrainJob)}, str(path))
    check(found.get("settings", {}), of_stage, f"{path}: [settings]")
    for i, stage in enumerate(found.get("stage", []), 1):
        check(stage, {"name", "mix", *of_stage}, f"{path}: stage {i}")
        for mix in stage.get("mix", []):
            check(mix, {"sources", "temperature", "weight"}, f"{path}: stage {i}: mix")
    return found


def check(table: Table, known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")


def settings_of(table: Table, out: Path, where: str) -> TrainSettings:
    settings: TrainSettings = from_table(
        TrainSettings, table, where, out=out, loss=from_table(LossOptions, table, where)
    )
    return settings


def job_of(
    recipe: Path | None, given: Table, out: Path, folder: Path, answers: tuple[Answers, ...] = ()
) -> TrainJob:
    """The job of a recipe, or of the command line's options alone if there is no recipe.

    given: options of the command line, which replace the recipe's in every stage; out: directory of the run;
    folder: directory of the recipe's files; answers: prompts named on the command line.
    """
    found = read(recipe) if recipe else {}
    where = str(recipe or "options")
    shared = {**found.get("settings", {}), **given}
    stages = tuple(
        Stage(
            stage.get("name", f"stage {i}"),
            settings_of({**shared, **stage, **given}, out / f"stage-{i}", f"{where}: stage {i}"),
            tuple(mix_of(mix, f"{where}: stage {i}: mix") for mix in stage.get("mix", [])),
        )
        for i, stage in enumerate(found.get("stage", []), 1)
    )
    made = tuple(answers_of(table, out, folder, where) for table in found.get("answers", []))
    job: TrainJob = from_table(
        TrainJob,
        {**found, **given},
        where,
        settings=settings_of(shared, out, where),
        stages=stages,
        answers=answers or made,
        validation_groups={name: tuple(sources) for name, sources in found.get("validation", {}).items()},
        source_licences=dict(found.get("licences", {})),
        recipe={"name": recipe.stem, "SHA-256": file_hash(recipe)} if recipe else {},
    )
    if "data" in found and "data" not in given:
        job = replace(job, data=tuple(folder / path for path in job.data))
    if "features_dir" in found and "features_dir" not in given:
        job = replace(job, features_dir=out / found["features_dir"])
    return job


def mix_of(table: Table, where: str) -> Mix:
    try:
        temperature = table.get("temperature")
        sources = tuple(map(str, table.get("sources", [])))
        return Mix(float(table["weight"]), sources, None if temperature is None else float(temperature))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected a weight, and sources and a temperature or neither: {error}"
        ) from error


def answers_of(table: Table, out: Path, folder: Path, where: str) -> Answers:
    """The table [[answers]]. Keys other than `name` and `prompts` become arguments of the generator.

    Lists are joined by commas."""
    if "prompts" not in table:
        raise ValueError(f"{where}: [[answers]]: expected the key prompts, found {', '.join(table)}")
    arguments: list[str] = []
    for key, value in table.items():
        if key not in ("name", "prompts", "exclude"):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            arguments += [f"--{key.replace('_', '-')}", text]
    if "exclude" in table:
        arguments += ["--exclude", *(str(folder / path) for path in table["exclude"])]
    prompts = tuple(folder / path for path in table["prompts"])
    return Answers(prompts, out / table.get("name", "answers"), tuple(arguments))
