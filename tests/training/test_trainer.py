"""Training end to end on a tiny target: learning, kill and resume, bad input, ranks (60 s)."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_eagle3.training import cli
from vllm_eagle3.training.data import load_documents, make_batch, split
from vllm_eagle3.training.features import Target, TargetHead
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.job import build
from vllm_eagle3.training.settings import LossOptions, TrainSettings
from vllm_eagle3.training.state import states
from vllm_eagle3.training.trainer import TrainData, Trainer
from vllm_eagle3.training.validation import ValidationSet, choose


def arguments(target: Path, rows: Path, out: Path, *more: str) -> list[str]:
    given = ["--target", str(target), "--data", str(rows), "--out", str(out), "--device", "cpu"]
    given += ["--draft-vocab-size", "64", "--ttt-steps", "3", "--batch-tokens", "256", "--dtype", "float32"]
    given += ["--chain", "3", "--decode-prompts", "1"]
    return given + ["--lr", "3e-3", "--validation-share", "0.2", *more]


def run(*given: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", *given])
    return args.func(args)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


COMMAND = """
import argparse, sys
from vllm_eagle3.training import cli
parser = argparse.ArgumentParser()
cli.add_parser(parser.add_subparsers())
args = parser.parse_args(["train", *sys.argv[1:]])
sys.exit(args.func(args))
"""


def make_trainer(target: Target, rows: Path, out: Path, **settings: Any) -> Trainer:
    train, held = split(load_documents([rows], 96), 0.2)
    model = new_draft(target, torch.arange(64), {}, "target", 0, make_batch(train[:5]))
    options = {"max_steps": 4, "loss": LossOptions(2), "batch_tokens": 128, "chain": 2, **settings}
    data = TrainData(train, ValidationSet(target, choose(held, {}, 20), 128))
    return Trainer(TrainSettings(out, **options), model, target, data)


def weights(out: Path) -> dict[str, Any]:
    return torch.load(states(out)[-1])


def test_a_draft_is_trained_end_to_end(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    """One command: acceptance rises, and everything a run should leave is there."""
    out = tmp_path / "run"
    steps = ["--max-steps", "60", "--eval-every", "20", "--fc-norm", "--speculators"]
    assert run(*arguments(tiny_target, tiny_rows, out, *steps)) == 0
    with (out / "validation.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(r["step"]) for r in rows] == [20, 40, 60]
    with (out / "train.csv").open() as lines:
        losses = [float(r["loss_1"]) for r in csv.DictReader(lines)]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert float(rows[-1]["alpha_1"]) > 4 / 64, "four times what guessing gives"
    for name in ("curves.png", "head/config.json", "best/model.safetensors", "head-speculators/config.json"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").iterdir())
    card = (out / "head" / "README.md").read_text()
    facts = json.loads((out / "head" / "training.json").read_text())
    assert "60 optimiser steps" in card and "Tokens per verification" in card and "counting" in card
    assert facts["validation"]["tau"] == pytest.approx(float(rows[-1]["tau"]))
    assert set(facts["provenance"]) == {"commit", "versions", "device", "data", "settings", "date"}


@pytest.mark.parametrize("how", [[], ["--optimizer", "muon", "--ema", "0.9", "--prompt-loss"]])
def test_kill_and_resume_gives_the_same_weights(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path, how: list[str]
) -> None:
    """kill -9 in mid-training, then the same command: bit for bit what it is without the kill."""
    more = ["--max-steps", "30", "--save-every", "4", "--eval-every", "8", "--fp32", *how]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", COMMAND, *arguments(tiny_target, tiny_rows, out, *more)]
        return subprocess.Popen(command, env=environment(), stdout=-3, stderr=-3)

    whole = start(tmp_path / "whole")
    cut = start(tmp_path / "cut")
    deadline = time.monotonic() + 300
    while not states(tmp_path / "cut") and cut.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    reached = int(states(tmp_path / "cut")[-1].stem.split("-")[1])
    assert 4 <= reached < 30, "the run was to be killed in its middle"
    assert start(tmp_path / "cut").wait(300) == 0
    assert whole.wait(300) == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a["position"] == b["position"] and a["position"]["step"] == 30
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    assert len(a["optimizers"]) == len(b["optimizers"]) == (2 if how else 1)
    for mine, other in zip(a["optimizers"], b["optimizers"], strict=True):
        for i, moments in mine["state"].items():
            assert all(
                torch.equal(torch.as_tensor(moments[k]), torch.as_tensor(other["state"][i][k]))
                for k in moments
            )
    assert bool(a["average"]) == bool(how)
    assert all(map(torch.equal, a["average"], b["average"]))
    if how:  # what is exported is the average
        exported = load_file(tmp_path / "whole" / "head" / "model.safetensors")["fc.weight"]
        (average,) = (t for t in a["average"] if t.shape == exported.shape)
        torch.testing.assert_close(exported, average.to(exported.dtype), rtol=0, atol=0)
        assert not torch.equal(exported, a["model"]["fc.weight"].to(exported.dtype))
    text = [(tmp_path / name / "train.csv").read_text() for name in ("whole", "cut")]
    kept = [[line.split(",")[5:] for line in t.split("\n")] for t in text]
    assert kept[0] == kept[1], "the record has every step once"


def test_state_of_another_optimizer(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    make_trainer(target, tiny_rows, tmp_path).train()
    for changed in ({"optimizer": "muon"}, {"ema": 0.9}):
        with pytest.raises(ValueError, match="step-4.pt: .*were --optimizer or --ema changed"):
            make_trainer(target, tiny_rows, tmp_path, **changed).train()


def test_prompt_loss_reaches_the_prompts_and_not_the_validation(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    given = arguments(tiny_target, tiny_rows, tmp_path / "run", "--prompt-loss")
    trainer, _ = build(cli.job_from(parser.parse_args(["train", *given])))
    assert all(document.mask.all() for document in trainer.data.documents)
    assert not any(batch.mask.all() for batch, _, _ in trainer.data.validation.batches)


def test_accumulation_is_one_larger_batch(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    trainer = make_trainer(target, tiny_rows, tmp_path, accumulate=3, fp32=True)
    trainer.train_step()
    assert trainer.at.place == 3 and trainer.at.step == 1
    groups = trainer.plan[:3]
    assert trainer.at.tokens == sum(int(trainer.data.documents[i].mask.sum()) for g in groups for i in g)


def test_early_stop(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    """With a learning rate of nothing, validation can't improve after the first time."""
    target = Target(tiny_target, dtype=torch.float32)
    trainer = make_trainer(target, tiny_rows, tmp_path, lr=1e-30, eval_every=2, max_steps=50, patience=2)
    trainer.train()
    assert trainer.at.step == 6


def test_loss_that_is_not_finite(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    trainer = make_trainer(target, tiny_rows, tmp_path, max_steps=6, save_every=2)
    trainer.train()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.head = TargetHead(torch.full_like(trainer.head.weight, torch.nan))
    with pytest.raises(FloatingPointError, match="step 7: loss .*nan.*no weights were changed"):
        trainer.train_step()
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert weights(tmp_path)["position"]["step"] == 6


def test_full_disk_leaves_the_last_state(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    trainer = make_trainer(target, tiny_rows, tmp_path)
    trainer.train()

    def full(state: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    trainer.at.step = 5
    with pytest.raises(
        OSError, match=r"step-5.pt: could not be written .*No space.*last good state is .*step-4"
    ):
        trainer.save()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-4.pt"]
    assert weights(tmp_path)["position"]["step"] == 4


def test_state_of_other_data(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    make_trainer(target, tiny_rows, tmp_path).train()
    trainer = make_trainer(target, tiny_rows, tmp_path)
    trainer.data_sha1 = "0"
    with pytest.raises(ValueError, match="step-4.pt: this state was trained on other data"):
        trainer.train()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--draft-vocab-size", "97"], "expected a size in 1..96, found 97"),
        (["--aux-layers", "2,3,9"], "expected ids in 0..7"),
        (["--max-steps", "0"], "max_steps: expected at least 1, found 0"),
        (["--validation-share", "1.5"], "validation_share: expected 0 <= share < 1"),
    ],
)
def test_bad_options(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments(tiny_target, tiny_rows, tmp_path, *more))


def test_nothing_to_train_on(tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give token rows with --data, or prompts"):
        run("--target", str(tiny_target), "--out", str(tmp_path))


def test_learning_rate_schedule() -> None:
    settings = TrainSettings(Path("x"), warmup_share=0.1, decay_share=0.5)
    rates = [settings.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.05 + 0.95 * 0.5) and rates[99] == pytest.approx(0.05 + 0.95 * 0.02)
