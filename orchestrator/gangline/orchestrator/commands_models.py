"""The commands about what a job has made: generate, checkpoint ls and verify, track sync."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common, JobName
from gangline.orchestrator.display import printable
from gangline.orchestrator.errors import ExitCode, GanglineError, NotFoundError, UsageError
from gangline.trainers.commit_files import CheckpointError

if TYPE_CHECKING:
    from gangline.trainers.commit_verify import CheckpointInfo, Verification


def generate(
    job: JobName,
    /,
    *,
    prompt: Annotated[str, Parameter(help="The text to go on from.")] = "",
    max_tokens: Annotated[int, Parameter(help="At most so many tokens.")] = 300,
    temperature: Annotated[
        float, Parameter(help="0 takes the likeliest token; higher is wilder.")
    ] = 0.8,
    top_k: Annotated[
        int | None, Parameter(help="Choose among the likeliest so many; 0 among all.")
    ] = 40,
    seed: Annotated[int, Parameter(help="The same seed gives the same text.")] = 0,
    step: Annotated[
        int | None, Parameter(help="Of this checkpoint, not the newest that is intact.")
    ] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Print text that the model of a train job makes up, going on from a prompt."""
    if temperature < 0 or max_tokens < 0 or (top_k or 0) < 0:
        raise UsageError(
            f"--temperature {temperature:g}, --max-tokens {max_tokens}, --top-k {top_k}: none of "
            "them may be below 0"
        )
    from gangline.orchestrator.job import TrainJob, load_job

    folder = _folder(job, common)
    settings = load_job(folder / "job.yaml", check_paths=False)
    if not isinstance(settings, TrainJob):
        raise UsageError(f"{folder.name} is a {settings.kind} job; text comes from a train job")
    checkpoint = _intact_checkpoint(folder / "checkpoints", step, common)
    common.note(f"reading step {checkpoint.step} from {checkpoint.path}")
    from gangline.trainers.data_errors import DataError
    from gangline.trainers.generate import generate as continue_text
    from gangline.trainers.generate import load_model
    from gangline.trainers.tokenizer import load_tokenizer

    config = settings.train_config()
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
        model = load_model(config, checkpoint, vocab_size=tokenizer.vocab_size)
    except (CheckpointError, DataError) as error:
        raise GanglineError(str(error)) from error
    if not common.json:
        _write_piece(prompt)
    text = continue_text(
        model,
        tokenizer,
        prompt,
        num_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k or None,
        seed=seed,
        on_text=(lambda piece: None) if common.json else _write_piece,
    )
    if common.json:
        said = {"step": checkpoint.step, "seed": seed, "prompt": prompt, "text": text}
        common.data_json({"version": 1, **said})
    else:
        common.data("")
    return ExitCode.OK


def checkpoint_ls(
    job: JobName,
    /,
    *,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """List a job's committed checkpoints, the newest first, from their manifests."""
    from gangline.trainers.commit_verify import list_checkpoints

    infos = list_checkpoints(_checkpoints(job, common))
    if common.json:
        listed = [{**dataclasses.asdict(info), "path": str(info.path)} for info in infos]
        common.data_json({"version": 1, "checkpoints": listed})
        return ExitCode.OK
    for info in infos:
        what = info.problem or (
            f"{info.num_bytes / 2**20:.1f} MiB  generation {info.generation}  "
            f"{info.world_size} ranks"
        )
        common.data(f"step {info.step:<9} {what}  {info.path}")
    return ExitCode.OK


def checkpoint_verify(
    job: JobName,
    /,
    *,
    step: Annotated[int | None, Parameter(help="Only this step.")] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Read every byte of a job's checkpoints and compare it with what was committed.

    Ends with 1 when one is damaged.
    """
    from gangline.trainers.commit_verify import step_folders, verify

    root = _checkpoints(job, common)
    paths = [path for number, path in step_folders(root) if step in (None, number)]
    if not paths:
        raise NotFoundError(f"no checkpoint of step {step} in {root}; `gangline checkpoint ls`")
    reports = []
    for path in paths:
        report = verify(path)
        reports.append(report)
        if not common.json:
            common.data(f"{path.name}  {report.problem or 'intact'}")
    if common.json:
        common.data_json({"version": 1, "checkpoints": [_report_json(r) for r in reports]})
    return ExitCode.OK if all(report.ok for report in reports) else ExitCode.ERROR


def track_sync(
    job: JobName,
    /,
    *,
    timeout: Annotated[float, Parameter(help="Seconds to try for.")] = 60.0,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Deliver to MLflow what a job that has ended still has in its spool."""
    from gangline.monitoring.uploader_process import UploaderBusyError, drain, num_pending
    from gangline.orchestrator.job import load_job

    folder = _folder(job, common)
    tracking = load_job(folder / "job.yaml", check_paths=False).tracking
    if not tracking.enabled:
        raise GanglineError(f"{folder.name} has tracking.enabled false: it recorded nothing")
    uri = tracking.uri or f"sqlite:///{folder.parent.resolve() / 'mlflow.db'}"
    spool = folder / "spool"
    num_before = num_pending(spool, uri)
    try:
        num_left = drain(spool, uri, timeout, folder.parent.resolve() / "mlartifacts")
    except UploaderBusyError as error:
        raise GanglineError(str(error)) from error
    num_sent = num_before - num_left
    if common.json:
        common.data_json({"version": 1, "num_delivered": num_sent, "num_left": num_left})
    else:
        common.data(f"{num_sent} records delivered, {num_left} left")
    if num_left:
        raise GanglineError(
            f"{num_left} records are left after {timeout:g} s; see {spool / 'uploader.log'}, and "
            "try again when the tracking server answers"
        )
    return ExitCode.OK


def _intact_checkpoint(root: Path, step: int | None, common: Common) -> CheckpointInfo:
    from gangline.trainers.commit_verify import newest, step_name, verify

    if step is None:
        found = newest(root, report=common.note)
        if found is None:
            raise NotFoundError(f"no intact checkpoint in {root}; `gangline checkpoint ls`")
        return found
    path = root / step_name(step)
    if not path.is_dir():
        raise NotFoundError(f"no checkpoint of step {step} in {root}; `gangline checkpoint ls`")
    report = verify(path)
    if report.info is None or not report.ok:
        raise GanglineError(f"{path} is damaged: {report.problem}; choose another --step")
    return report.info


def _write_piece(piece: str) -> None:
    # A model may write anything: line ends and tabs are text, other controls steer terminals.
    for part in piece.splitlines(keepends=True):
        line = part.rstrip("\r\n")
        sys.stdout.write(printable(line) + ("\n" if line != part else ""))
    sys.stdout.flush()


def _folder(job: str, common: Common) -> Path:
    info = api.show(job, runs=common.runs)
    folder = Path(info.run_dir)
    if not folder.is_dir():
        raise NotFoundError(
            f"the folder {folder} of {info.run_id} is not here; run this where it can be seen"
        )
    return folder


def _checkpoints(job: str, common: Common) -> Path:
    return _folder(job, common) / "checkpoints"


def _report_json(report: Verification) -> dict[str, object]:
    return {
        "path": str(report.path),
        "ok": report.ok,
        "problem": report.problem,
        "files": [dataclasses.asdict(finding) for finding in report.findings],
        "unlisted": list(report.unlisted),
    }
