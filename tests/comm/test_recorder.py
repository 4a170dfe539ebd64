"""Every way to communicate is recorded, with the right operation, bytes, peer and end; and nothing
else changes."""

import re
from pathlib import Path

import pytest

from gangline.comm import recorder_build
from gangline.comm.events import Op

PATHS = Path(__file__).with_name("recorder_paths.py")
SCENARIOS = Path(__file__).with_name("recorder_scenarios.py")
COMM = Path(recorder_build.__file__).parent
VIRTUAL = r"^  virtual [^;{=]*?(\w+)\("
RECORDERS = ["c++", "python"]
BOTH = pytest.mark.parametrize("recorder", RECORDERS)

# What each path of recorder_paths.py puts in the rings of rank 0 and of rank 1: operation,
# bytes, peer (root, or the other end). The paths' tensor has 32 bytes; there are two ranks.
SAME_ON_BOTH = {
    "all_reduce": [(Op.ALL_REDUCE, 32, -1)],
    "all_reduce_async": [(Op.ALL_REDUCE, 32, -1)],
    "all_reduce_in_inference_mode": [(Op.ALL_REDUCE, 64, -1)],
    "all_reduce_sparse": [(Op.ALL_REDUCE, 4 * (8 + 8 + 4), -1)],
    "all_reduce_coalesced": [(Op.ALL_REDUCE_COALESCED, 40, -1)],
    "broadcast": [(Op.BROADCAST, 32, 1)],
    "reduce": [(Op.REDUCE, 32, 1)],
    "all_gather": [(Op.ALL_GATHER, 32, -1)],
    "all_gather_into_tensor": [(Op.ALL_GATHER_SINGLE, 32, -1)],
    "all_gather_coalesced": [(Op.ALL_GATHER_COALESCED, 32, -1)],
    "reduce_scatter": [(Op.REDUCE_SCATTER, 64, -1)],
    "reduce_scatter_tensor": [(Op.REDUCE_SCATTER_SINGLE, 64, -1)],
    "reduce_scatter_tensor_async": [(Op.REDUCE_SCATTER_SINGLE, 64, -1)],
    "all_to_all_single": [(Op.ALL_TO_ALL_SINGLE, 64, -1)],
    "all_to_all": [(Op.ALL_TO_ALL, 64, -1)],
    "gather": [(Op.GATHER, 32, 1)],
    "scatter": [(Op.SCATTER, 32, 1)],
    "barrier": [(Op.BARRIER, 0, -1)],
    "monitored_barrier": [(Op.MONITORED_BARRIER, 0, -1)],
    "all_gather_object": [(Op.ALL_GATHER, 8, -1), (Op.ALL_GATHER, 24, -1)],
    "broadcast_object_list": [(Op.BROADCAST, 8, 1), (Op.BROADCAST, 5, 1)],
    "gather_object": [(Op.ALL_GATHER, 8, -1), (Op.GATHER, 5, 1)],
    "scatter_object_list": [(Op.BROADCAST, 8, 0), (Op.SCATTER, 5, 0), (Op.SCATTER, 8, 0)],
    "functional_all_reduce": [(Op.ALL_REDUCE, 32, -1)],
    "functional_all_gather": [(Op.ALL_GATHER_COALESCED, 32, -1)],
    "functional_reduce_scatter": [(Op.REDUCE_SCATTER_COALESCED, 64, -1)],
    "functional_all_to_all": [(Op.ALL_TO_ALL_SINGLE, 64, -1)],
    "functional_all_gather_coalesced": [(Op.ALL_GATHER_COALESCED, 40, -1)],
    "functional_reduce_scatter_coalesced": [(Op.REDUCE_SCATTER_COALESCED, 72, -1)],
    "differentiable_all_reduce": [(Op.ALL_REDUCE, 32, -1)] * 2,
    "new_group": [(Op.ALL_REDUCE, 32, -1)],
    "split_group": [(Op.ALL_REDUCE, 32, -1)],
    "device_mesh": [(Op.ALL_REDUCE, 32, -1)],
    "dtensor": [(Op.SCATTER, 128, 0), (Op.ALL_GATHER_COALESCED, 128, -1)],
    "dtensor_partial": [(Op.ALL_REDUCE, 32, -1)],
    # DDP checks that the ranks' models agree, shares the weights of rank 0, and then the gradients.
    "ddp": [
        (Op.ALL_GATHER, 8, -1),
        (Op.BROADCAST, 48, 0),
        (Op.BROADCAST, 16640, 0),
        (Op.ALL_REDUCE, 16640, -1),
    ],
    "ddp_with_a_hook_of_its_own": [
        (Op.ALL_GATHER, 8, -1),
        (Op.BROADCAST, 48, 0),
        (Op.BROADCAST, 16640, 0),
        (Op.ALL_REDUCE, 8320, -1),
    ],
    "fsdp2": [(Op.ALL_GATHER_SINGLE, 16640, -1), (Op.REDUCE_SCATTER_SINGLE, 33280, -1)],
    "zero_redundancy_optimizer": [
        (Op.ALL_GATHER, 8, -1),
        (Op.BROADCAST, 48, 0),
        (Op.BROADCAST, 288, 0),
        (Op.ALL_REDUCE, 288, -1),
        (Op.BROADCAST, 256, 0),
        (Op.BROADCAST, 32, 1),
    ],
}
DIFFERENT = {
    "send_and_recv": ([(Op.SEND, 32, 1)], [(Op.RECV, 32, 0)]),
    "recv_any_source": ([(Op.SEND, 32, 1)], [(Op.RECV_ANY_SOURCE, 32, 0)]),
    "isend_and_irecv": (
        [(Op.SEND, 32, 1), (Op.RECV, 32, 1)],
        [(Op.SEND, 32, 0), (Op.RECV, 32, 0)],
    ),
    "batch_isend_irecv": (
        [(Op.SEND, 32, 1), (Op.RECV, 32, 1)],
        [(Op.SEND, 32, 0), (Op.RECV, 32, 0)],
    ),
    "send_object_list": (
        [(Op.SEND, 8, 1), (Op.SEND, 5, 1)],
        [(Op.RECV, 8, 0), (Op.RECV, 5, 0)],
    ),
    "new_group_of_others": ([], [(Op.ALL_REDUCE, 32, -1)]),
}
EXPECTED = DIFFERENT | {name: (rows, rows) for name, rows in SAME_ON_BOTH.items()}


def has_compiler() -> bool:
    try:
        recorder_build.build()
    except recorder_build.BuildError:
        return False
    return True


@pytest.fixture(scope="module")
def library() -> None:
    """Build before ranks start, so that they need not wait for it."""
    if not has_compiler():
        pytest.skip("there is no C++ compiler, so no C++ recorder")


@pytest.fixture(scope="module")
def taken(rank_pool, library, tmp_path_factory):
    """What each rank's rings have of each path, by recorder."""
    return {
        recorder: rank_pool.run(
            2,
            (PATHS, "run_paths"),
            folder=str(tmp_path_factory.mktemp("root") / "rings" / "run"),
            port=rank_pool.store_port(2),
            is_fallback=recorder == "python",
            timeout_s=150,
        )
        for recorder in RECORDERS
    }


@pytest.mark.ranks
@BOTH
def test_the_table_of_paths_is_complete(taken, recorder):
    assert set(taken[recorder][0]) == set(EXPECTED)
    assert len(EXPECTED) >= 22


@pytest.mark.ranks
@BOTH
@pytest.mark.parametrize("path", EXPECTED)
def test_a_path_is_recorded(taken, recorder, path):
    for rank, rows in enumerate(EXPECTED[path]):
        found = taken[recorder][rank][path]
        assert found["error"] == ""
        events = found["events"]
        assert [(Op[e["op"]], e["num_bytes"], e["peer"]) for e in events] == rows
        assert [e["state"] for e in events] == ["DONE"] * len(rows)
        assert all(0 < e["duration_s"] < 60 for e in events)


@pytest.mark.ranks
def test_the_ranks_of_a_collective_find_each_other_by_its_number(taken):
    for path, rows in EXPECTED.items():
        here, there = (taken["c++"][rank][path]["events"] for rank in (0, 1))
        if path in SAME_ON_BOTH:
            assert [e["match"] for e in here] == [e["match"] for e in there]
            assert all(e["match"] > 0 for e in here)
        assert len(rows[0]) == len(here)


@pytest.mark.ranks
def test_the_fallback_records_the_same_as_the_recorder(taken):
    def same(event):
        return {k: v for k, v in event.items() if k not in ("duration_s", "is_end_at_wait")}

    for path in EXPECTED:
        for rank in (0, 1):
            here, there = (taken[recorder][rank][path]["events"] for recorder in RECORDERS)
            assert [same(e) for e in here] == [same(e) for e in there], path


@pytest.mark.ranks
def test_ends_are_stamped_at_completion_where_gloo_tells_it(taken):
    at_wait = {Op.SEND, Op.RECV, Op.RECV_ANY_SOURCE, Op.REDUCE_SCATTER}
    at_wait |= {Op.REDUCE_SCATTER_SINGLE, Op.REDUCE_SCATTER_COALESCED}
    for path in EXPECTED:
        for event in taken["c++"][1][path]["events"]:
            assert event["is_end_at_wait"] == (Op[event["op"]] in at_wait), (path, event)


@pytest.mark.ranks
@BOTH
def test_programs_see_the_torch_that_they_know(rank_pool, library, tmp_path, recorder):
    found = rank_pool.run(
        2,
        (SCENARIOS, "behaves_as_before"),
        folder=str(tmp_path / "rings" / "run"),
        port=rank_pool.store_port(2),
        is_fallback=recorder == "python",
    )
    for rank, answers in enumerate(found):
        assert answers["get_backend"] == "gloo"
        assert answers["class"] == "ProcessGroupGloo"
        assert answers["same object"] is True
        assert answers["timeout_s"] == 7
        assert answers["ranks"] == [0, 1]
        assert answers["name and desc"] == ["0", "default_pg"]
        assert answers["sequence later"] == answers["sequence"] + 1
        assert answers["has hooks"] is False
        assert "hook" not in answers, "gloo takes no completion hook"
        assert "future" not in answers, "gloo's send has no future"
        assert "BAND" in answers["refused"]
        failed = 1 + (rank == 0)  # what gloo refused, and the barrier that rank 1 did not reach
        assert answers["states"] == {"DONE": 3, "FAILED": failed}
    assert "Rank 1 failed to pass" in found[0]["missing"]


@pytest.mark.ranks
@BOTH
def test_a_mesh_is_recorded_and_still_aborted_by_its_sockets(
    rank_pool, library, tmp_path, recorder
):
    found = rank_pool.run(
        2,
        (SCENARIOS, "mesh_fails_as_before"),
        folder=str(tmp_path / "rings" / "run"),
        port=rank_pool.store_port(2),
        is_fallback=recorder == "python",
    )
    for rank, answers in enumerate(found):
        assert answers["error"] == ("CommAbortedError", "PeerLostError")[rank]
        assert 0.15 < answers["elapsed_s"] < 5
        assert answers["groups"] == [["default_pg", [0, 1]], ["checkpoint", [0, 1]]]
        assert answers["last"]["op"] == "RECV"
        assert answers["last"]["state"] == "FAILED"
        assert answers["last"]["peer"] == 1 - rank
        assert answers["rings left"] == 0


@pytest.mark.ranks
def test_element_types_have_torchs_names(rank_pool, library, tmp_path):
    (pairs,) = rank_pool.run(
        1,
        (SCENARIOS, "records_every_dtype"),
        folder=str(tmp_path / "rings" / "run"),
        port=rank_pool.store_port(1),
    )
    known = {"float32", "bfloat16", "float16", "int64", "uint8", "bool", "float8_e4m3fn", "uint16"}
    assert known <= {dtype for dtype, _ in pairs}
    for dtype, found in pairs:
        is_rare = dtype not in known and found.startswith("type ")
        assert found == dtype or is_rare, (dtype, found)


@pytest.mark.ranks
def test_a_group_with_two_backends_has_two_rings(rank_pool, library, tmp_path):
    found = rank_pool.run(
        2,
        (SCENARIOS, "two_backends"),
        folder=str(tmp_path / "rings" / "run"),
        port=rank_pool.store_port(2),
    )
    for classes, rings in found:
        assert classes == ["ProcessGroupGloo", "FakeProcessGroup"]
        assert rings == [["fake", ["cuda"], 0], ["gloo", ["cpu"], 1]]


@pytest.mark.ranks
@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_engine_is_recorded(rank_pool, library, tmp_path, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    found = rank_pool.run(
        2,
        (SCENARIOS, "deepspeed_step"),
        folder=str(tmp_path / "rings" / "run"),
        port=rank_pool.store_port(2),
        stage=stage,
        timeout_s=200,
    )
    for events in found:
        assert [e["state"] for e in events] == ["DONE"] * len(events)
        gradients = [e for e in events if e["op"] in ("ALL_REDUCE", "REDUCE_SCATTER_SINGLE")]
        assert sum(e["num_bytes"] for e in gradients) >= 4 * (64 + 8)


def headers() -> Path:
    torch = recorder_build._find_torch()
    return torch.folder / "include" / "torch" / "csrc" / "distributed" / "c10d"


def not_overridden(names: set[str], source: str) -> list[str]:
    ours = (COMM / source).read_text()
    override = r"\([^{;]*\) (const )?override"
    return [name for name in sorted(names) if not re.search(rf"\b{name}{override}", ours)]


def test_no_call_of_a_backend_is_forgotten():
    """A virtual function that we do not hand on would get the base class's answer."""
    interface = (headers() / "Backend.hpp").read_text().partition("class TORCH_API Backend ")[2]
    names = set(re.findall(VIRTUAL, interface, re.MULTILINE))
    assert len(names) > 40
    assert not_overridden(names, "recorder.cpp") == []


def test_no_call_of_a_work_is_forgotten():
    interface = (headers() / "Work.hpp").read_text().partition("class TORCH_API Work ")[2]
    names = set(re.findall(VIRTUAL, interface, re.MULTILINE))
    assert len(names) > 10
    assert not_overridden(names, "recorder_work.hpp") == []


def test_operations_have_torchs_numbers():
    enum = (headers() / "Work.hpp").read_text().partition("enum class OpType")[2].partition("}")[0]
    theirs = {name: int(code) for name, code in re.findall(r"(\w+) = (\d+)", enum)}
    assert len(theirs) == 21

    def plain(name: str) -> str:
        name = name.lower().strip("_").replace("_base", "_single").replace("_tensor", "")
        return name.replace("_", "")

    ours = {plain(op.name): op.value for op in Op if op is not Op.MONITORED_BARRIER}
    assert {plain(name): code for name, code in theirs.items()} == ours
    assert Op(250) is Op.UNKNOWN
