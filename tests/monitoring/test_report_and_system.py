from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from gangline.monitoring.metrics import metric
from gangline.monitoring.recording import Tracker
from gangline.monitoring.report import CurvePoint, RunHistory, draw_run
from gangline.monitoring.system_metrics import GpuSample, NoGpus, SystemSampler, gpu_reader


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def spool(tmp_path):
    tracker = Tracker(tmp_path / "spool")
    tracker.start_run("moe-1", "moe", None, {}, {})
    tracker.start_attempt(1)
    for step in range(60):
        tracker.log_metrics(step, {"train/loss": 6 - step / 20, "train/lr": 1.0}, generation=1)
    tracker.start_attempt(2)
    tracker.log_metrics(50, {"job/lost_steps": 10.0})
    for step in range(50, 80):
        values = {"train/loss": 6 - step / 20, "train/tokens_per_s": 1000.0 + step}
        tracker.log_metrics(step, values, generation=2)
    tracker.log_metrics(70, {"train/loss": float("nan"), "eval/loss": 3.0})
    tracker.log_metrics(80, {"train/loss": float("nan")}, generation=2)
    tracker.close()
    return tmp_path / "spool"


def test_history_of_a_run_with_a_restart(spool):
    history = RunHistory.from_spool(spool)
    assert history.title == "moe-1"
    assert [p.step for p in history.loss] == list(range(81))
    assert [p.step for p in history.recomputed] == list(range(50, 60))
    assert history.restarts == [(2, 50)]
    assert history.num_lost_steps == 10
    assert history.eval_loss == [CurvePoint(70, 3.0)]
    assert history.tokens_per_s[0] == CurvePoint(50, 1050.0)


def test_picture_is_drawn_by_a_process_of_its_own_without_mlflow(spool, tmp_path):
    out = tmp_path / "plots" / "loss.png"
    command = [sys.executable, "-X", "importtime", "-m", "gangline.monitoring.report"]
    command += ["--spool", str(spool), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mlflow" not in done.stderr
    assert "matplotlib.pyplot" not in done.stderr
    assert png_size(out) == (1296, 864)
    assert out.stat().st_size > 20_000


@pytest.mark.parametrize("num_restarts", [0, 2, 40])
def test_picture_from_a_plain_list(tmp_path, num_restarts):
    points = [CurvePoint(step, 1.0) for step in range(50)]
    history = RunHistory(loss=points, restarts=[(g + 2, g) for g in range(num_restarts)])
    draw_run(history, tmp_path / "a.png")
    assert png_size(tmp_path / "a.png")[0] == 1296


def test_run_without_a_step_has_no_picture(tmp_path):
    with pytest.raises(ValueError, match="no train/loss yet"):
        draw_run(RunHistory(title="x"), tmp_path / "a.png")


class TwoGpus:
    def read(self):
        return [GpuSample(50.0, 2**30, 2**34, 300.5, 60.0), GpuSample(None, 5, 6, None, None)]


def test_sample_has_only_names_of_the_table(tmp_path):
    sampler = SystemSampler("node/a b", tmp_path, TwoGpus())
    pids = {"rank-0": os.getpid(), "gone": 2**22 + 1}
    sampler.sample(pids)
    values = sampler.sample(pids)
    assert all(metric(name) for name in values)
    prefix = next(iter(values)).rsplit("/", 1)[0]
    assert prefix.startswith("system/node_a_b-")
    assert values[f"{prefix}/process/rank-0/rss_bytes"] > 10**6
    assert f"{prefix}/process/gone/rss_bytes" not in values
    assert values[f"{prefix}/gpu/0/power_w"] == 300.5
    assert f"{prefix}/gpu/1/power_w" not in values
    assert values[f"{prefix}/memory_used_bytes"] > 0
    assert 0 <= values[f"{prefix}/cpu_percent"] <= 100


def test_nvml_is_read_field_by_field(monkeypatch, tmp_path):
    class NVMLError(Exception):
        pass

    def unsupported(handle):
        raise NVMLError("Not Supported")

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97, memory=3),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=10, total=100, free=90),
        nvmlDeviceGetPowerUsage=lambda handle: 350_000 if handle == 0 else unsupported(handle),
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    values = SystemSampler("n", tmp_path, gpu_reader()).sample()
    assert values["system/n/gpu/0/power_w"] == 350.0
    assert "system/n/gpu/1/power_w" not in values
    assert values["system/n/gpu/1/utilization_percent"] == 97.0
    assert values["system/n/gpu/1/memory_used_bytes"] == 10.0
    assert all(metric(name) for name in values)
    nvml.nvmlInit = lambda: unsupported(0)
    assert list(gpu_reader().read()) == []


def test_every_field_of_a_gpu_is_in_the_table():
    for field in fields(GpuSample):
        assert metric(f"system/n/gpu/0/{field.name}")


def test_node_without_a_driver_has_no_gpus():
    reader = gpu_reader()
    if isinstance(reader, NoGpus):
        assert list(reader.read()) == []
    else:
        assert all(sample.memory_total_bytes for sample in reader.read())
