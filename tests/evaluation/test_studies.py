"""The arms of the studies and their statistics (1 s; training and decoding have other tests)."""

from pathlib import Path

import pytest

from vllm_eagle3.evaluation.studies import Measured, arms, interval, summary, table
from vllm_eagle3.training.settings import TrainJob, TrainSettings


def test_each_arm_changes_one_thing() -> None:
    job = TrainJob("t", settings=TrainSettings(Path("out")), data=(Path("d"),))
    one, two, three = arms(job, 30).values()
    assert (one.aux_layers, one.settings.loss.steps, one.settings.loss.feature_loss) == ((30,), 1, 10.0)
    assert (two.aux_layers, two.settings.loss.steps, two.settings.loss.feature_loss) == ((30,), 7, 0.0)
    assert three == job


def test_interval() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert interval([1.5]) == (1.5, 0.0)


def test_summary_and_table() -> None:
    runs = [
        Measured("EAGLE-2", seed, "gsm8k", tau, [0.5, 0.25], 10) for seed, tau in enumerate((2.0, 2.2, 2.4))
    ]
    (row,) = summary(runs)
    assert row["tau"] == pytest.approx(2.2) and row["seeds"] == 3 and row["n_alpha"] == [0.5, 0.25]
    assert "| EAGLE-2 | gsm8k | 2.200 ± 0.497 | 0.50 0.25 | 4.24 |" in table([row])
