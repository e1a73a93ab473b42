"""Statistics for operators: what the scheduler counts arrives in the front end. Two tests start engines (60 s)."""

import json
import logging
from pathlib import Path

import msgspec
import prometheus_client
import pytest
from engines import speculative, token_ids
from vllm import SamplingParams

from vllm_eagle3.runner import ledger

ledger.install()

from vllm.v1.metrics.stats import SchedulerStats  # noqa: E402

from vllm_eagle3.runner import draft_scheduler  # noqa: E402
from vllm_eagle3.runner.hooks.spec_metrics import (  # noqa: E402
    LABELS,
    SERIES,
    Eagle3Logging,
    Eagle3Prom,
    Eagle3Stats,
)

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def stats() -> Eagle3Stats:
    """A step that verified two requests of three drafts; one and two were accepted."""
    made = Eagle3Stats.new(3)
    made.observe_draft(3, 1)
    made.observe_draft(3, 2)
    made.steps, made.seconds = {"chain of 3": 1, "none": 2}, {"chain of 3": 0.5}
    made.fallbacks = {"a reason": 4}
    return made


def test_it_travels_between_processes():
    sent = msgspec.msgpack.encode(SchedulerStats(spec_decoding_stats=stats()))
    assert msgspec.msgpack.decode(sent, type=SchedulerStats).spec_decoding_stats == stats()


def test_series():
    class Config:
        method, num_speculative_tokens = "eagle3", 3

    registry = prometheus_client.CollectorRegistry()
    counter = Eagle3Prom._counter_cls

    class Prom(Eagle3Prom):
        _counter_cls = staticmethod(lambda **kwargs: counter(registry=registry, **kwargs))

    prom = Prom(Config, ["model_name", "engine"], {0: ["m", "0"]})
    prom.observe(stats())
    prom.observe(stats())
    found = {
        (sample.name, sample.labels.get(LABELS.get(family.name, ""))): sample.value
        for family in registry.collect()
        for sample in family.samples
    }
    assert (
        found["vllm:eagle3_steps_total", "none"] == 4 and found["vllm:eagle3_steps_total", "chain of 3"] == 2
    )
    assert found["vllm:eagle3_step_seconds_total", "chain of 3"] == 1.0
    assert found["vllm:eagle3_drafted_tokens_total", "3"] == 4
    assert (
        found["vllm:eagle3_accepted_paths_total", "1"] == found["vllm:eagle3_accepted_paths_total", "2"] == 2
    )
    assert found["vllm:eagle3_fallbacks_total", "a reason"] == 8
    assert found["vllm:spec_decode_num_accepted_tokens_total", None] == 6, "vLLM's own are still there"


def test_lines_in_the_log():
    lines = []
    shown = Eagle3Logging()
    shown.observe(stats())
    without_drafts = Eagle3Stats.new(3)
    without_drafts.steps = {"none": 5}
    shown.observe(without_drafts)
    shown.log(lambda text, *values: lines.append(text % values))
    assert lines[0].startswith("SpecDecoding metrics: Mean acceptance length: 2.50")
    assert lines[1:] == ["EAGLE-3 metrics: 8 steps: none in 7, chain of 3 in 1; a reason: 4"]
    shown.log(lambda text, *values: lines.append(text % values))
    assert len(lines) == 2, "nothing happened since"
    shown.observe(without_drafts)
    shown.log(lambda text, *values: lines.append(text % values))
    assert lines[2:] == ["EAGLE-3 metrics: 5 steps: none in 5"]


def test_the_dashboard_asks_for_series_that_exist():
    text = DASHBOARD.read_text(encoding="utf-8")
    targets = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", [])]
    assert len(targets) >= 6
    known = {f"{name}_total" for name in SERIES} | {
        f"vllm:spec_decode_num_{name}_total"
        for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    }
    known |= {"vllm:time_to_first_token_seconds_bucket", "vllm:generation_tokens_total"}
    for expression in targets:
        asked = {
            word
            for word in expression.replace("(", " ").replace("{", " ").replace("[", " ").split()
            if ":" in word
        }
        assert asked and asked <= known, (expression, asked - known)
    for name in SERIES:
        assert f"{name}_total" in text, f"{name} is on no panel"


@pytest.mark.parametrize("policy", ["auto", "fixed"])
def test_an_engine_fills_them(engine, closed_form_target, closed_form_draft, tmp_path, monkeypatch, policy):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    llm = engine(
        closed_form_target,
        speculative_config=speculative(closed_form_draft, 3),
        additional_config={"eagle3": {"policy": policy}},
    )
    token_ids(llm, [[3, 9, 27 + i] for i in range(4)], GREEDY)
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(("vllm:eagle3", "vllm:spec_decode_num_d")):
            found.setdefault(metric.name, {})[metric.labels.get(LABELS.get(metric.name, ""))] = metric.value
    assert sum(found["vllm:eagle3_steps"].values()) >= 6
    chains = {f"chain of {k}" for k in range(1, 4)}
    assert set(found["vllm:eagle3_steps"]) <= ({"chain of 3"} if policy == "fixed" else {"none", *chains})
    seconds = [
        sample.value
        for family in prometheus_client.REGISTRY.collect()
        if family.name == "vllm:eagle3_step_seconds"  # get_metrics() cuts every counter to an integer
        for sample in family.samples
        if sample.name.endswith("_total")
    ]
    assert seconds and all(0 < value < 60 for value in seconds)
    assert (
        sum(found["vllm:eagle3_drafted_tokens"].values()) == found["vllm:spec_decode_num_draft_tokens"][None]
    )
    assert sum(found["vllm:eagle3_accepted_paths"].values()) == found["vllm:spec_decode_num_drafts"][None]


def test_a_useless_draft_is_said_once_and_hardly_drafts(
    engine, closed_form_target, tmp_path, monkeypatch, caplog
):
    from closed_form import write_draft

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("WATCHED_DRAFTS", "WATCHED_VERIFICATIONS"):  # the policy may soon stop drafting by itself
        monkeypatch.setattr(draft_scheduler, name, 20)
    draft = write_draft(tmp_path / "wrong", wrong_every=1)
    llm = engine(
        closed_form_target,
        speculative_config=speculative(draft, 4),
        additional_config={"eagle3": {"policy": "auto"}},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    logging.getLogger("vllm").propagate = True
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True, detokenize=False)
    prompts = [[3, 9, 27 + i] for i in range(4)]
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        for _ in range(20):
            token_ids(llm, prompts, params)
            if scheduler.draft_is_useless:
                break
        assert scheduler.draft_is_useless
        for i in range(3):  # the policy tries every shape for a single request too
            token_ids(llm, [[5, 9, 30 + i]], params)
        scheduler._steps.clear()
        verified, update = [], scheduler.update_from_output

        def counted(step, output):
            verified.append(bool(step.scheduled_spec_decode_tokens))
            return update(step, output)

        scheduler.update_from_output = counted
        for i in range(3):
            token_ids(llm, [[5, 9, 40 + i]], params)
    assert len(verified) > 300 and sum(verified) < 0.05 * len(verified), sum(verified)
    found = {record.getMessage() for record in caplog.records if record.name == "vllm.eagle3"}
    assert len(found) == 1 and "drafts 0 were accepted" in found.pop()
