"""Tests of vLLM's V1 model runner, which is not the default where the V2 runner works."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def v1_runner() -> Iterator[None]:
    """The engines of these tests, and the processes that they start, run on V1."""
    from vllm import envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        envs.disable_envs_cache()
        yield
    envs.disable_envs_cache()
