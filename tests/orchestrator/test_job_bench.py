"""`kind: bench` in a job file: what is accepted, refused, planned and told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gangline.orchestrator.job import (
    BenchJob,
    JobFileError,
    dump_job,
    explain_mismatch,
    parse_job,
    training_digest,
)
from gangline.orchestrator.plan import plan
from gangline.orchestrator.run_spec import spec_of

JOB = """
kind: bench
name: links
workers: {count: 4}
bench: {operations: [alltoall, broadcast], min_bytes: 64K, max_bytes: 1M, step_factor: 2, root: 3}
"""


def bench_job(text: str = JOB, overrides: tuple[str, ...] = ()) -> BenchJob:
    job = parse_job(text, overrides)
    assert isinstance(job, BenchJob)
    return job


def problems(text: str) -> list[tuple[str, str]]:
    with pytest.raises(JobFileError) as caught:
        parse_job(text)
    return [(problem.path, problem.mend) for problem in caught.value.problems]


def test_sizes_are_numbers_in_the_job_and_it_round_trips() -> None:
    job = bench_job()
    assert (job.bench.min_bytes, job.bench.max_bytes) == (65536, 1 << 20)
    assert job.bench.sizes() == [65536 << i for i in range(5)]
    assert parse_job(dump_job(job)) == job
    assert bench_job(overrides=("bench.max_bytes=2M",)).bench.max_bytes == 2 << 20


def test_defaults_are_nccl_tests_own() -> None:
    job = bench_job("kind: bench\nname: x\n")
    assert job.bench.flags() == ["-b", "33554432", "-e", "33554432", "-n", "20", "-w", "1"]
    assert job.bench.operations == ["all_reduce"]


@pytest.mark.parametrize(
    ("line", "path", "mend"),
    [
        ("min_bytes: 2M, max_bytes: 1M", "bench.min_bytes", "set bench.max_bytes to at least"),
        ("max_bytes: 1T", "bench.max_bytes", "64K"),
        ("operations: [allreduce]", "bench.operations[0]", "all_reduce"),
        ("operations: []", "bench.operations", ""),
        ("redop: mulsum", "bench.redop", ""),
        ("root: 4, operations: [reduce]", "bench.root", "at most 3"),
        ("cudagraph: 2", "bench.cudagraph", "nccl-tests"),
        ("implementation: nccl-tests", "bench.implementation", "workers.gpus"),
        ("iter: 3", "bench.iter", "iters"),
        ("timeout_s: -1", "bench.timeout_s", ""),
    ],
)
def test_faults_are_placed_and_mended(line: str, path: str, mend: str) -> None:
    text = f"kind: bench\nworkers: {{count: 4}}\nbench: {{{line}}}\n"
    (found,) = problems(text)
    assert found[0] == path
    assert mend in found[1]


def test_a_size_with_a_letter_does_not_confuse_the_checks_beside_another_fault() -> None:
    text = "kind: bench\nbench: {min_bytes: 2M, max_bytes: 16M, iters: 0, step_bytes: 64K}\n"
    (found,) = problems(text)
    assert found[0] == "bench.iters"


def test_a_missing_kind_is_guessed_from_its_section() -> None:
    with pytest.raises(JobFileError) as caught:
        parse_job("bench: {iters: 3}\n")
    (problem,) = caught.value.problems
    assert problem.path == "kind"
    assert "write `kind: bench`" in problem.mend


def test_the_folder_of_the_binaries_is_looked_for(tmp_path: Path) -> None:
    text = "kind: bench\nworkers: {gpus: 8, count: 1}\nbench: {implementation: nccl-tests, binaries: build}\n"  # noqa: E501
    with pytest.raises(JobFileError, match="binaries"):
        parse_job(text, base_dir=tmp_path)
    (tmp_path / "build").mkdir()
    job = parse_job(text, base_dir=tmp_path)
    assert isinstance(job, BenchJob)
    assert job.bench.binaries == str(tmp_path / "build")


def test_the_plan_says_what_will_be_measured() -> None:
    text = plan(bench_job()).render()
    assert "alltoall, broadcast (gangline), 5 sizes from 64.0 KiB to 1.0 MiB, 20 iter" in text
    assert plan(bench_job()).to_json()["kind"] == "bench"
    json.dumps(plan(bench_job()).to_json())


def test_a_bench_is_never_restarted_and_is_placed_as_asked(tmp_path: Path) -> None:
    spec = spec_of(bench_job(), tmp_path)
    assert (spec.max_failures, spec.legal_sizes, spec.num_steps) == (0, (4,), None)
    assert spec.strategy == "PACK"
    assert spec_of(bench_job(overrides=("workers.place=spread",)), tmp_path).strategy == "SPREAD"


def test_what_is_measured_tells_two_benches_apart() -> None:
    old, new = bench_job(), bench_job(overrides=("bench.iters=3",))
    assert training_digest(old) != training_digest(new)
    assert [str(one) for one in explain_mismatch(old, new)] == ["bench.iters was 20 and is 3"]
