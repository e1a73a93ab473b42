"""Errors that are found in the process that the user started, before an engine starts (20 s)."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from closed_form import write_draft
from engines import speculative
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from vllm_eagle3.checkpoint import CheckpointError
from vllm_eagle3.runner import ledger

ledger.install()


def arguments(target, draft, options=None, **kwargs):
    return {
        "model": str(target),
        "speculative_config": speculative(draft, 3),
        "additional_config": {"eagle3": options or {}},
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        **kwargs,
    }


@pytest.fixture
def broken(tmp_path):
    draft = write_draft(tmp_path / "draft")
    weights = load_file(draft / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, draft / "model.safetensors")
    return draft


def test_a_broken_draft(closed_form_target, broken):
    with pytest.raises(CheckpointError, match=r"model.safetensors: norm.weight: expected finite weights"):
        EngineArgs(**arguments(closed_form_target, broken)).create_engine_config()


def test_weights_that_are_not_read_are_not_checked(closed_form_target, broken):
    EngineArgs(**arguments(closed_form_target, broken, load_format="dummy")).create_engine_config()


def test_the_target_as_the_draft(closed_form_target):
    with pytest.raises(CheckpointError, match="Is it the target"):
        EngineArgs(**arguments(closed_form_target, closed_form_target)).create_engine_config()


def test_no_such_draft(closed_form_target, tmp_path):
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        EngineArgs(**arguments(closed_form_target, tmp_path / "nowhere")).create_engine_config()


def test_nobody_sees_a_traceback(closed_form_target, broken):
    code = (
        "import json, sys; from vllm.engine.arg_utils import EngineArgs; "
        "from vllm.plugins import load_general_plugins; "
        "load_general_plugins(); EngineArgs(**json.loads(sys.argv[1])).create_engine_config()"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments(closed_form_target, broken))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "vllm-eagle3: error" in line]
    assert done.returncode == 1 and len(lines) == 1 and "expected finite weights" in lines[0]
    assert "Traceback" not in done.stderr


def test_a_tree_on_the_v1_runner(closed_form_target, closed_form_draft, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    given = arguments(closed_form_target, closed_form_draft, {"tree": {"depth": 2, "topk": 2, "nodes": 3}})
    with pytest.raises(ValueError, match="V1 runner because VLLM_USE_V2_MODEL_RUNNER is 0"):
        EngineArgs(**given).create_engine_config()


def test_a_misspelled_key(closed_form_target, closed_form_draft, caplog):
    logging.getLogger("vllm").propagate = True
    given = arguments(closed_form_target, closed_form_draft)
    EngineArgs(
        **given | {"additional_config": {"eagel3": {}, "other": 1, "eagle3": {}}}
    ).create_engine_config()
    found = {record.getMessage() for record in caplog.records if record.name == "vllm.eagle3"}
    assert found == {"vllm-eagle3: additional_config has a key 'eagel3'; did you mean 'eagle3'?"}
