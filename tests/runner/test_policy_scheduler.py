"""The policy in vLLM's scheduler, closed-form and random pairs (about 40 s)."""

import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from closed_form import greedy_text, write_draft
from draining import assert_every_number_of_requests_drains
from engines import asynchronous, draft_model, speculative, token_ids
from random_llama import write_draft as write_random_draft
from random_llama import write_target as write_random_target
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.policy.cost import SeenCost, StepCostModel
from vllm_eagle3.policy.cost_file import CostFile, CostKey
from vllm_eagle3.policy.policy import Policy
from vllm_eagle3.policy.shape import Shape, chains
from vllm_eagle3.runner import chain, policy_install, policy_scheduler

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
AUTO = {"eagle3": {"policy": "auto"}}


@pytest.fixture(autouse=True)
def own_cost_cache(monkeypatch, tmp_path):
    """A cost cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def count_verified(sched, seen):
    """Note how many drafts the requests of each step verify."""
    update = sched.update_from_output

    def wrapped(step, output):
        seen.append([len(step.scheduled_spec_decode_tokens.get(r, ())) for r in step.num_scheduled_tokens])
        return update(step, output)

    sched.update_from_output = wrapped


@pytest.mark.parametrize("overlap", [False, True])
def test_outputs_are_exact_while_the_number_of_drafts_changes_every_step(
    engine, tmp_path, monkeypatch, overlap
):
    monkeypatch.setattr(chain, "MIN_CHAIN_PROBABILITY", 0.0)  # the random draft trusts none of its drafts
    target = write_random_target(tmp_path / "target")
    draft = write_random_draft(tmp_path / "draft")
    prompts = [[3, 9, 27 + 5 * i, 81] for i in range(4)]
    expected = token_ids(engine(target), prompts, GREEDY)
    llm = engine(
        target, speculative_config=speculative(draft, 4), additional_config=AUTO, async_scheduling=overlap
    )
    sched, verified = scheduler(llm), []
    count_verified(sched, verified)
    turn = itertools.cycle([0, 4, 1, 0, 0, 3, 2, 4])
    sched.draft_policy.choose = lambda batch, context: sched.draft_policy.by_nodes[next(turn)]
    lengths = itertools.cycle(itertools.permutations([0, 1, 2, 4]))
    sched.draft_policy.lengths = lambda requests, shape, context, drafted: [
        min(k, shape.nodes) for k in itertools.islice(itertools.cycle(next(lengths)), len(requests))
    ]
    assert token_ids(llm, prompts, GREEDY) == expected
    assert {k for step in verified for k in step} == {0, 1, 2, 3, 4}


def test_draining_under_asynchronous_scheduling(engine, closed_form_target, closed_form_draft, monkeypatch):
    asynchronous(monkeypatch)
    llm = engine(
        closed_form_target, speculative_config=speculative(closed_form_draft, 3), additional_config=AUTO
    )
    assert_every_number_of_requests_drains(llm)


def test_outputs_are_exact_while_chains_stop_early(engine, tmp_path, monkeypatch):
    target = write_random_target(tmp_path / "target")
    draft = write_random_draft(tmp_path / "draft")
    prompts = [[3, 9, 27 + 5 * i, 81] for i in range(2)]
    expected = token_ids(engine(target), prompts, GREEDY)
    llm = engine(target, speculative_config=speculative(draft, 6), additional_config=AUTO)
    sched, verified, trusts = scheduler(llm), [], itertools.cycle([[0.9, 0.9], [0.9, 0.1], [0.1, 0.9]])
    count_verified(sched, verified)
    monkeypatch.setattr(sched.draft_policy, "choose", lambda batch, context: sched.draft_policy.by_nodes[6])
    monkeypatch.setattr(sched.draft_policy, "lengths", lambda requests, shape, context, drafted: drafted)
    model = type(draft_model(llm))
    sure = model.get_confident_tokens

    def with_trust(self, hidden_states):
        ids, confidence = sure(self, hidden_states)
        return ids, torch.tensor(next(trusts)[: len(confidence)])

    monkeypatch.setattr(model, "get_confident_tokens", with_trust)
    assert token_ids(llm, prompts, GREEDY) == expected
    assert [3, 2] in verified, "the first request's third draft is the last, the second's its second"
    drafts, steps = sched.draft_policy.expected_drafts(Shape(6, 6), 2)
    assert 2 < drafts < steps < 4, "the policy knows how far chains get"


@pytest.mark.parametrize("drafts", [0, 3])
def test_up_to_the_longest_sequence(engine, tmp_path, drafts):
    """There vLLM hands out as many zeros as there could be drafts, however many were asked for."""
    target = write_random_target(tmp_path / "target")
    draft = write_random_draft(tmp_path / "draft")
    prompts = [[3 + i % 90 for i in range(n)] for n in (236, 200)]
    expected = token_ids(engine(target), prompts, GREEDY)
    assert len(expected[0]) == 20, "the longest sequence is 256 tokens"
    llm = engine(target, speculative_config=speculative(draft, 6), additional_config=AUTO)
    sched = scheduler(llm)
    sched.draft_policy.choose = lambda batch, context: sched.draft_policy.by_nodes[drafts]
    assert token_ids(llm, prompts, GREEDY) == expected


def test_asynchronous_scheduling_learns_at_once(monkeypatch):
    sched = object.__new__(policy_scheduler.AsyncPolicyScheduler)
    sched.draft_policy = Policy(SeenCost(StepCostModel.guess()), chains([1, 2]))
    sched._cost_file = CostFile(CostKey("target", "draft", "cpu", "test"))
    sched.scheduler_config = SimpleNamespace(async_scheduling=True)
    sched.running = [SimpleNamespace(num_computed_tokens=9)]
    sched._start_counting()
    sched._drafted, sched._cut_trees, sched._unlearned, sched._last_step = {}, set(), None, 0.0
    sched._decoded_only = False
    monkeypatch.setattr(policy_scheduler.AsyncScheduler, "update_from_output", lambda *_: {})
    step = SimpleNamespace(
        num_invalid_spec_tokens=None,
        scheduled_spec_decode_tokens={"a": [-1, -1]},
        num_spec_tokens_to_schedule=2,
        num_scheduled_tokens={"a": 3},
        scheduled_new_reqs=[],
        finished_req_ids=set(),
    )
    output = SimpleNamespace(req_id_to_index={"a": 0}, sampled_token_ids=[[5, 6, 7]])
    sched.update_from_output(step, output)
    assert not sched.draft_policy.cost.observations, "the step before it may have read a prompt"
    for _ in range(3):
        sched.update_from_output(step, output)
    assert sched.draft_policy.cost.known(1, 2)
    assert sched.draft_policy.acceptance[0].rates()[1] == pytest.approx(1.0, abs=0.3)


def test_a_cut_tree_teaches_nothing_when_the_next_one_is_cut_already():
    """Asynchronous: the next step's cuts are made before this step's results are read."""
    sched = object.__new__(policy_scheduler.AsyncPolicyScheduler)
    sched.draft_policy = Policy(SeenCost(StepCostModel.guess()), chains([1, 2]))
    sched._start_counting()
    sched._drafted = {}
    step = SimpleNamespace(
        num_invalid_spec_tokens=None,
        scheduled_spec_decode_tokens={"cut": [-1, -1], "whole": [-1, -1]},
        cut_trees=frozenset({"cut"}),
    )
    sched._cut_trees = {"whole"}  # in the next step
    output = SimpleNamespace(req_id_to_index={"cut": 0, "whole": 1}, sampled_token_ids=[[5], [5, 6, 7]])
    sched._observe_acceptance(step, output)
    assert set(sched.draft_policy.requests) == {"whole"}


def test_it_learns_acceptance_and_cost_and_keeps_them(
    engine, closed_form_target, closed_form_draft, tmp_path
):
    llm = engine(
        closed_form_target, speculative_config=speculative(closed_form_draft, 4), additional_config=AUTO
    )
    sched = scheduler(llm)
    assert type(sched) is policy_scheduler.PolicyScheduler
    assert [s.nodes for s in sched.draft_policy.shapes] == [0, 1, 2, 3, 4]
    for _ in range(2):
        prompts = [[3, 9, 27 + i] for i in range(4)]
        assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 48) for p in prompts]
    assert sched.draft_policy.acceptance[0].rates()[0] == pytest.approx(0.8, abs=0.1), (
        "wrong on every fifth token"
    )
    assert sched.draft_policy.cost.to_json()
    assert len(sched.draft_policy.requests) <= 4, "finished requests are forgotten"
    seen = sched.draft_policy.cost.to_json()
    sched.shutdown()
    (file,) = (tmp_path / "vllm-eagle3" / "cost").glob("*.json")
    assert json.loads(file.read_text())["seen"] == seen
    again, _ = policy_scheduler.build_policy(sched.vllm_config)
    assert again.cost.to_json() == seen


def test_a_first_token_does_not_wait_for_drafts(engine, closed_form_target, closed_form_draft):
    llm = engine(
        closed_form_target,
        speculative_config=speculative(closed_form_draft, 4),
        additional_config=AUTO,
        max_num_batched_tokens=16,
    )
    sched, steps = scheduler(llm), []
    sched.draft_policy.choose = lambda batch, *_: sched.draft_policy.by_nodes[4]
    update = sched.update_from_output

    def noted(step, output):
        steps.append(step.num_spec_tokens_to_schedule)
        return update(step, output)

    sched.update_from_output = noted
    prompt = [3, 9, 27] + [5] * 20  # takes two steps: the first one ends within it
    assert token_ids(llm, [prompt], GREEDY) == [greedy_text(5, 48)]
    assert steps[:2] == [4, 0] and set(steps[2:]) == {4}


def test_what_it_learned_is_kept_without_a_clean_stop(
    engine, closed_form_target, closed_form_draft, tmp_path
):
    llm = engine(
        closed_form_target, speculative_config=speculative(closed_form_draft, 4), additional_config=AUTO
    )
    token_ids(llm, [[3, 9, 27]], GREEDY)
    (file,) = (tmp_path / "vllm-eagle3" / "cost").glob("*.json")
    assert json.loads(file.read_text())["seen"]


@pytest.mark.parametrize("damage", ["garbage", "another format", "the folder is a file"])
def test_a_damaged_cost_file_does_not_stop_an_engine(
    engine, closed_form_target, closed_form_draft, tmp_path, damage, caplog, monkeypatch
):
    folder = tmp_path / "vllm-eagle3" / "cost"
    if damage == "the folder is a file":
        folder.parent.mkdir()
        folder.write_text("")
    else:
        folder.mkdir(parents=True)
        content = b"\xff\x00" if damage == "garbage" else b'{"format": 99}'
        monkeypatch.setattr(CostKey, "path", lambda *_: folder / "cost.json")
        (folder / "cost.json").write_bytes(content)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        llm = engine(
            closed_form_target, speculative_config=speculative(closed_form_draft, 4), additional_config=AUTO
        )
        assert token_ids(llm, [[3, 9, 27]], GREEDY) == [greedy_text(27, 48)]
        scheduler(llm).shutdown()
    warnings = {record.getMessage() for record in caplog.records if record.name == "vllm.eagle3"}
    assert len(warnings) == 1 and str(folder) in next(iter(warnings)), "\n".join(warnings)
    if folder.is_dir():
        assert json.loads((folder / "cost.json").read_text())["seen"]


def test_a_failed_save_still_shuts_the_scheduler_down(monkeypatch, tmp_path):
    sched, calls = object.__new__(policy_scheduler.PolicyScheduler), []
    monkeypatch.setattr(policy_scheduler.Scheduler, "shutdown", lambda self: calls.append(self))
    (tmp_path / "file").write_text("")
    sched._cost_file = CostFile(CostKey("target", "draft", "cpu", "test"), tmp_path / "file" / "cost")
    sched.draft_policy = Policy(SeenCost(StepCostModel.guess()), chains([1]))
    sched.shutdown()
    assert calls == [sched]


def test_a_useless_draft_is_switched_off(engine, closed_form_target, tmp_path):
    draft = write_draft(tmp_path / "wrong", wrong_every=1)
    llm = engine(closed_form_target, speculative_config=speculative(draft, 4), additional_config=AUTO)
    policy = scheduler(llm).draft_policy
    prompts = [[3, 9, 27 + i] for i in range(8)]
    for _ in range(6):  # few steps probe
        assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 48) for p in prompts]
    # Few steps probe, and a draft costs this model hardly anything: one is worth as much as none while it is believed.
    assert policy.acceptance[0].rates()[0] < 0.2
    assert policy.best(8).nodes <= 1


def test_it_leaves_a_table_of_the_users_in_charge(engine, closed_form_target, closed_form_draft):
    config = speculative(closed_form_draft, 4, num_speculative_tokens_per_batch_size=[[1, 8, 2]])
    llm = engine(closed_form_target, speculative_config=config, additional_config=AUTO)
    assert not hasattr(scheduler(llm), "draft_policy")


@pytest.mark.parametrize(
    ("most", "tree", "every", "sizes"),
    [
        (4, None, True, [0, 1, 2, 3, 4]),
        (3, None, False, [0, 1, 3]),
        (5, None, False, [0, 1, 2, 5]),
        (8, None, False, [0, 1, 2, 5, 8]),
        (60, {"depth": 6, "topk": 10, "nodes": 60}, True, [*range(9), 12, 16, 24, 32, 60]),
        (16, {"depth": 5, "topk": 4, "nodes": 16}, True, [*range(6), 7, 8, 12, 16]),
        (9, {"depth": 6, "topk": 10, "nodes": 60}, True, [*range(10)]),
        (60, {"depth": 6, "topk": 10, "nodes": 60}, False, [0, 14, 29, 59]),
        (16, {"depth": 5, "topk": 4, "nodes": 16}, False, [0, 3, 7, 15]),
        (2, {"depth": 2, "topk": 4, "nodes": 2}, False, [0, 1, 2]),
        (1, None, False, [0, 1]),
        (24, {"depth": 5, "topk": 4, "nodes": 16}, True, [*range(6), 7, 8, 12, 16, 24]),  # 8 for grafts
        (60, {"depth": 5, "topk": 4, "nodes": 16}, True, [*range(6), 7, 8, 12, 16, 24]),
        (60, {"depth": 6, "topk": 10, "nodes": 20}, False, [0, 6, 13, 27]),
    ],
)
def test_sizes(most, tree, every, sizes):
    assert policy_install._sizes(most, Eagle3Options(tree=tree), every) == sizes


@pytest.mark.parametrize(
    ("given", "in_charge"),
    [
        ({"use_v2_model_runner": True}, True),
        ({"use_v2_model_runner": True, "max_num_seqs": 2}, True),
        ({"use_v2_model_runner": False}, False),  # it would cost full CUDA graphs
        ({"use_v2_model_runner": True, "data_parallel_size": 2}, False),
    ],
)
def test_on_a_gpu(given, in_charge, caplog):
    spec = SimpleNamespace(
        method="eagle3", num_speculative_tokens=4, num_speculative_tokens_per_batch_size=None
    )
    config = SimpleNamespace(
        speculative_config=spec,
        scheduler_config=SimpleNamespace(scheduler_cls=None, max_num_seqs=given.get("max_num_seqs", 8)),
        parallel_config=SimpleNamespace(data_parallel_size=given.get("data_parallel_size", 1)),
        device_config=SimpleNamespace(device_type="cuda"),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None, max_cudagraph_capture_size=None),
        use_v2_model_runner=given["use_v2_model_runner"],
    )
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        assert policy_install.install(config, Eagle3Options()) is in_charge
    drafts = [size for _, _, size in spec.num_speculative_tokens_per_batch_size or ()]
    assert drafts == ([0, 1, 4][-given.get("max_num_seqs", 8) :] if in_charge else [])
    assert ("policy 'auto' is off" in caplog.text) is not in_charge


CHAINS = [(most, None) for most in (1, 2, 3, 4, 5, 7, 8)]
TREES = [(most, {"depth": 4, "topk": 4, "nodes": most}) for most in (2, 5, 16, 30, 60, 62)]


@pytest.mark.parametrize(("most", "tree"), [*CHAINS, *TREES])
@pytest.mark.parametrize("requests", [1, 2, 3, 8, 100, 256, 1000, 1024])
def test_full_graphs_for_every_choice(most, tree, requests):
    """vLLM's own bookkeeping of CUDA graphs, with the sizes that the policy sets."""
    spec = SimpleNamespace(
        method="eagle3",
        num_speculative_tokens=most,
        num_speculative_tokens_per_batch_size=None,
        uses_dynamic_speculative_decoding=lambda: True,
    )
    graphs = SimpleNamespace(cudagraph_capture_sizes=None, max_cudagraph_capture_size=None)
    config = SimpleNamespace(
        speculative_config=spec,
        scheduler_config=SimpleNamespace(scheduler_cls=None, max_num_seqs=requests),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        device_config=SimpleNamespace(device_type="cuda"),
        compilation_config=graphs,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        num_speculative_tokens=most,
        use_v2_model_runner=True,
    )
    assert policy_install.install(config, Eagle3Options(tree=tree))
    graphs.max_cudagraph_capture_size = graphs.cudagraph_capture_sizes[-1]
    manager = object.__new__(CudaGraphManager)
    manager.vllm_config, manager.compilation_config = config, graphs
    manager.cudagraph_mode, manager.max_num_reqs = CUDAGraphMode.FULL_AND_PIECEWISE, requests
    manager.decode_query_len, manager.varlen_decode, manager.ubatch_runner = most + 1, False, None
    manager.lora_capture_cases, manager._lora_dispatch_map, manager._max_lora_case = [0], {}, 0
    manager._candidates, manager._capture_descs, manager._graphs_captured = {}, {}, True
    manager._init_candidates()
    lengths = [size + 1 for _, _, size in spec.num_speculative_tokens_per_batch_size]
    widest = graphs.max_cudagraph_capture_size
    assert widest <= max(1024, requests, lengths[-1])  # the partial outputs of FlashAttention 3 grow with it
    requests = min(requests, policy_install.MOST_REQUESTS)
    for length in lengths:
        for batch in range(1, min(requests, widest // length) + 1):
            found = manager.dispatch(batch, batch * length, length, 0, length)
            assert found.cg_mode is CUDAGraphMode.FULL, (length, batch)
            assert found.uniform_token_count == length
            assert found.num_tokens - batch * length <= max(16, lengths[-1], batch * length // 2)
    assert len(graphs.cudagraph_capture_sizes) <= 128
