"""What a user sees of a running job, on a terminal, in a file, and as NDJSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.orchestrator import display
from gangline.orchestrator.display import JsonDisplay, LiveDisplay, PlainDisplay, make_display
from gangline.orchestrator.reconcile import JobInfo

PROGRESS: dict[str, Any] = {
    "type": "progress",
    "time": 1.0,
    "state": "RUNNING",
    "reason": "",
    "step": 30,
    "num_steps": 300,
    "loss": 2.34567,
    "tokens_per_s": 12345.6,
    "eta_s": 125.0,
    "committed_step": 25,
    "num_restarts": 1,
    "workers": [
        {"rank": 0, "role": "active", "pid": 11, "node": "n1", "state": "stepping", "step": 30},
        {"rank": 1, "role": "active", "pid": 12, "node": "n1", "state": "stepping", "step": 30},
        {"rank": None, "role": "spare", "pid": 13, "node": "n1", "state": "ready", "step": None},
    ],
}
EVENT = {
    "type": "event",
    "time": 2.0,
    "event": "failure",
    "generation": 0,
    "message": "rank 1 lost",
}
LOG = {"type": "log", "time": 3.0, "rank": 1, "text": "hello from the script"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def an_info(state: str = "SUCCEEDED", **fields: Any) -> JobInfo:
    given: dict[str, Any] = {
        "run_id": "moe-aaaaaa",
        "name": "moe",
        "kind": "train",
        "mode": "run",
        "state": state,
        "reason": "",
        "created_at": 0.0,
        "updated_at": 1.0,
        "run_dir": "/runs/moe-aaaaaa",
        "user": "u",
        "host": "h",
        "step": 300,
        "num_steps": 300,
        "loss": 2.25,
    }
    return JobInfo(**{**given, **fields})


def test_plain_lines_tell_events_changes_and_now_and_then_progress() -> None:
    errors, out = io.StringIO(), io.StringIO()
    plain = PlainDisplay(errors, out, with_logs=False, every_s=3600.0)
    for record in (PROGRESS, PROGRESS, EVENT, LOG, {**PROGRESS, "state": "RECOVERING"}):
        plain.show(record)
    plain.end(an_info())
    first, second, third = errors.getvalue().splitlines()
    assert "RUNNING  step 30/300  loss 2.3457  12.3k tokens/s  2m05s left  saved 25" in first
    assert "2 active, 1 spare" in first
    assert second.endswith("failure: rank 1 lost")
    assert "RECOVERING" in third
    assert out.getvalue() == "moe-aaaaaa  SUCCEEDED  step 300/300  loss 2.2500\n"


def test_the_lines_of_a_script_are_shown_with_their_rank() -> None:
    errors = io.StringIO()
    PlainDisplay(errors, io.StringIO(), with_logs=True).show(LOG)
    assert errors.getvalue() == "[rank 1] hello from the script\n"


def test_a_reason_is_told_with_the_end() -> None:
    out = io.StringIO()
    info = an_info("FAILED", reason="rank 1 on n1 was killed after step 30", step=30)
    PlainDisplay(io.StringIO(), out, with_logs=False).end(info)
    assert out.getvalue().endswith("(rank 1 on n1 was killed after step 30)\n")


def test_a_terminal_gets_a_panel_of_progress_workers_and_events() -> None:
    terminal, out = Terminal(), io.StringIO()
    live = LiveDisplay(terminal, out, color=False, with_logs=True)
    for record in (PROGRESS, EVENT, LOG):
        live.show(record)
    live.end(None)
    shown = terminal.getvalue()
    for words in ("step 30/300", "2m05s left", "rank 1 lost", "[rank 1] hello", "spare", "ready"):
        assert words in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is shown again
    assert out.getvalue() == ""


def test_the_last_panel_tells_the_end_and_stdout_the_result() -> None:
    terminal, out = Terminal(), io.StringIO()
    live = LiveDisplay(terminal, out, color=False, with_logs=False)
    live.show(PROGRESS)
    live.end(an_info())
    assert "step 300/300" in terminal.getvalue()
    assert out.getvalue().startswith("moe-aaaaaa  SUCCEEDED")


def test_json_is_one_object_a_line_with_the_result_last() -> None:
    out = io.StringIO()
    printer = JsonDisplay(out)
    for record in (PROGRESS, EVENT, LOG):
        printer.show(record)
    printer.end(an_info())
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["type"] for line in lines] == ["progress", "event", "log", "result"]
    assert lines[0] == PROGRESS
    assert lines[-1]["state"] == "SUCCEEDED"


def test_a_reader_that_has_gone_does_not_stop_the_job() -> None:
    class Closed(io.StringIO):
        num_tries = 0

        def write(self, text: str) -> int:
            self.num_tries += 1
            raise BrokenPipeError

    closed = Closed()
    shown = make_display(as_json=False, quiet=False, color=False, with_logs=True, stream=closed)
    for record in (LOG, PROGRESS, EVENT):
        shown.show(record)
    shown.end(an_info())
    assert closed.num_tries == 1


@pytest.mark.parametrize(
    ("terminal", "options", "kind"),
    [
        (True, {}, "LiveDisplay"),
        (False, {}, "PlainDisplay"),
        (True, {"as_json": True}, "JsonDisplay"),
        (True, {"quiet": True}, "QuietDisplay"),
    ],
)
def test_the_display_fits_where_the_output_goes(
    terminal: bool, options: dict[str, bool], kind: str
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    chosen = {"as_json": False, "quiet": False, **options}
    made = make_display(**chosen, color=True, with_logs=False, stream=stream)
    made.end(None)
    assert isinstance(made, display.Unbreakable)
    assert type(made._display).__name__ == kind


@given(st.text())
def test_no_text_steers_the_terminal(text: str) -> None:
    shown = display.log_line({"rank": 0, "text": text})
    assert shown.replace("\t", "").isprintable()
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r50%\r100%", "100%"),
        ("100%\r", "100%"),
        ("bell\x07", "bell�"),
        ("tab\tstays", "tab\tstays"),
        ("naïve 漢字", "naïve 漢字"),
    ],
)
def test_what_is_left_of_a_line(text: str, shown: str) -> None:
    assert display.printable(text) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (42.4, "42s"), (60, "1m00s"), (125, "2m05s"), (7200, "2h00m"), (90_000, "1d01h")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert display.duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(0.5, "0.5"), (999, "999"), (1234, "1.23k"), (5.6e6, "5.6M")]
)
def test_counts(number: float, shown: str) -> None:
    assert display.count(number) == shown


@given(
    st.dictionaries(
        st.sampled_from(["state", "reason", "step", "num_steps", "eta_s", "loss", "workers"]),
        st.none(),
    )
)
def test_a_status_that_tells_nothing_can_be_shown(status: dict[str, None]) -> None:
    assert isinstance(display.progress_line({"state": "STARTING", **status}), str)
