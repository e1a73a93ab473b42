"""Recipes: what a file asks for is what runs, mistakes are named, a stopped run goes on (90 s)."""

import argparse
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_eagle3.training import cli, recipe
from vllm_eagle3.training.settings import TrainJob
from vllm_eagle3.training.state import states

RECIPES = sorted(recipe.FOLDER.glob("*.toml"))
COMMAND = "import sys; from vllm_eagle3.cli import main; sys.exit(main(['train', *sys.argv[1:]]))"


def job(*given: str) -> TrainJob:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.job_from(parser.parse_args(["train", *given]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_of_the_repository_can_be_read(path: Path, tmp_path: Path) -> None:
    made = job("--recipe", path.stem, "--target", "t", "--out", str(tmp_path), "--data-dir", "data")
    assert made.stages and made.recipe["name"] == path.stem
    assert all(str(p).startswith("data/") for p in made.data)
    if made.source_licences:
        named = [s for stage in made.stages for mix in stage.mix for s in mix.sources]
        named += [s for sources in made.validation_groups.values() for s in sources]
        assert set(named) <= made.source_licences.keys()


def test_what_is_given_comes_before_the_recipe_and_the_stage_before_the_settings(tmp_path: Path) -> None:
    made = job(
        "--recipe", "minute", "--target", "t", "--out", str(tmp_path), "--lr", "5e-4", "--tokens", "70"
    )
    first, second = (stage.settings for stage in made.stages)
    assert (first.lr, second.lr, first.tokens, second.tokens) == (5e-4, 5e-4, 70, 70)
    assert (first.loss.steps, second.loss.steps, first.loss.chain_share, second.loss.chain_share) == (
        2,
        3,
        0.5,
        1,
    )
    assert first.muon_lr == 1e-2 and second.blend == 0.5 and first.out != second.out
    assert made.features_dir == tmp_path / "features"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[settings]\nlearning_rate = 1", r"r.toml: \[settings\]: unknown key 'learning_rate'"),
        ("[[stage]]\nlr = 'high'", "r.toml: stage 1: lr: expected float, found 'high'"),
        ("[[stage]]\nmix = [{ sources = ['a'] }]", "stage 1: mix: expected a weight"),
        ("[[stage]]\nloss = 'l1'", "loss: expected one of soft_ce, kl, tv, lk, found 'l1'"),
        ("[[stage]]\nchain_share = 2.0", "chain_share: expected 0 < share <= 1, found 2.0"),
        ("stage = 3 3", "r.toml: not valid TOML"),
        ("[[answers]]\nname = 'x'", "expected the key prompts, found name"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        job("--recipe", str(tmp_path / "r.toml"), "--target", "t", "--out", "o", "--data", "d")


def test_no_such_recipe() -> None:
    with pytest.raises(
        FileNotFoundError, match="nowhere: no such recipe; expected a TOML file or one of: .*minute"
    ):
        job("--recipe", "nowhere", "--target", "t", "--out", "o")


def test_answers_of_a_recipe_become_arguments_of_the_generator(tmp_path: Path) -> None:
    (answers,) = job("--recipe", "smollm2-135m-cpu", "--target", "t", "--out", "o", "--data-dir", "d").answers
    assert answers.prompts == (Path("d/prompts.jsonl.gz"),) and answers.out == Path("o/answers")
    from vllm_eagle3.training.generate import add_arguments, settings_from

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--target", "t", "--out", "o", "--data", "p", *answers.arguments]
    settings = settings_from(parser.parse_args(given))
    assert settings.temperatures == (0.0,) and settings.max_num_seqs == 128
    assert settings.exclude == ("d/smollm2_responses.jsonl.gz",) and "mbpp" in (settings.sources or ())


def test_a_recipe_stopped_in_its_second_stage_goes_on_to_the_same_weights(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """Weights, card and curves of a run that was killed are those of one that was not."""
    arguments = ["--recipe", "minute", "--target", str(tiny_target), "--data-dir", str(tiny_rows.parent)]

    def start(out: Path) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--out", str(out), "--fp32"], stderr=-3
        )

    whole, cut = start(tmp_path / "whole"), start(tmp_path / "cut")
    deadline = time.monotonic() + 400
    while not states(tmp_path / "cut/stage-2") and cut.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert start(tmp_path / "cut").wait(400) == 0 and whole.wait(400) == 0
    for stage in ("stage-1", "stage-2"):
        a, b = (torch.load(states(tmp_path / name / stage)[-1]) for name in ("whole", "cut"))
        assert a["position"]["step"] == b["position"]["step"] > 4
        for name, tensor in a["model"].items():
            assert torch.equal(tensor, b["model"][name]), (stage, name)
    facts = [json.loads((tmp_path / n / "head/training.json").read_text()) for n in ("whole", "cut")]
    assert facts[0]["validation"] == facts[1]["validation"] and facts[0]["decoding"] == facts[1]["decoding"]
    assert {d["temperature"] for d in facts[0]["decoding"]} == {0.0, 1.0} and len(facts[0]["decoding"]) == 4
    assert set(facts[0]["validation"]["groups"]) <= {"counting", "other"}
    card = (tmp_path / "whole/head/README.md").read_text()
    for part in (
        "Recipe name minute",
        "all answers: 4,000 tokens",
        "held-out greedy",
        "| chain, 3 drafts | 0 |",
        "CC0",
    ):
        assert part in card, part
    with (tmp_path / "whole/stage-1/train.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) > 4
    assert (tmp_path / "whole/curves.png").stat().st_size > 0
