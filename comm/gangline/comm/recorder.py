"""Record the communication of this process: every group that it makes from `install` on.

torch hands each new group to one function of its own. From `install` on that function also makes a
ring for every backend of the group (events.py reads it) and puts a recording backend in its place
(recorder.cpp); where there is no compiler to build that with, recorder_fallback.py records by
Python kernels instead.

Nothing else changes for the program: `get_backend`, `isinstance(group._get_backend(device), ...)`,
time-outs, aborts and errors are as before. A problem of the recorder costs one line of warning and
the records, never the training.
"""

import contextlib
import ctypes
import itertools
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from gangline.comm import recorder_build
from gangline.comm import ring_format as fmt
from gangline.comm.recorder_fallback import Fallback
from gangline.comm.ring_folders import FolderHold, drop_oldest_dead

Report = Callable[[str], None]

_ERROR_BYTES = 1024


@dataclass(frozen=True)
class RecorderSettings:
    """How this process records."""

    folder: Path  # of the run: ring_folders.ring_folder(run_dir)
    label: str = ""  # what readers shall call this process
    capacity: int = fmt.DEFAULT_CAPACITY  # operations that a ring holds, a power of two
    is_fallback: bool = False  # never build, never load the C++ recorder
    cache: Path | None = None  # of built libraries; None: recorder_build.default_cache()


def install(
    folder: str | Path,
    *,
    label: str = "",
    capacity: int = fmt.DEFAULT_CAPACITY,
    is_fallback: bool = False,
    cache: Path | None = None,
    report: Report | None = None,
) -> None:
    """Record all groups that this process makes from now on, in rings below `folder`.

    Cheap: the library is built or loaded with the first group. Called again, it changes the
    settings for later groups; with another folder, the rings in the old one go. A fork that makes
    groups records them as its own. `report` gets the warnings, None prints them on stderr.
    """
    global _installed
    settings = RecorderSettings(Path(folder), label, capacity, is_fallback, cache)
    report = report or _to_stderr
    if _installed is not None:
        _installed.change(settings, report)
    elif hasattr(c10d, "_register_pg_in_world"):
        _installed = _Installation(settings, report)
    else:
        report(f"communication is not recorded: torch {torch.__version__} makes groups otherwise")


def uninstall() -> None:
    """Record nothing more: give live groups their own backends back, remove this process's rings.

    Not while another thread communicates.
    """
    global _installed
    if _installed is not None:
        _installed.close()
        _installed = None


def is_installed() -> bool:
    """Return whether new groups of this process are recorded."""
    return _installed is not None


def _to_stderr(line: str) -> None:
    print(f"gangline: {line}", file=sys.stderr, flush=True)


class _Installation:
    """torch with our hands in it, from `install` to `uninstall`."""

    def __init__(self, settings: RecorderSettings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._pid = 0
        self._hold: FolderHold | None = None
        self._paths: list[Path] = []
        self._has_warned = False
        self._library: ctypes.CDLL | None = None
        self._fallback: Fallback | None = None
        self._fallback_reason = "asked for" if settings.is_fallback else ""
        # What a group's backends were, by type of device; Python still gets to see these.
        self._own: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._patches: list[tuple[Any, str, Any]] = []
        self._patch(c10d, "_register_pg_in_world", self._and_attach)
        self._patch(dist.ProcessGroup, "split_group", self._attach_result)
        self._patch(dist.ProcessGroup, "merge_remote_group", self._attach_result)
        self._patch(dist.ProcessGroup, "_get_backend", self._own_backend)

    def change(self, settings: RecorderSettings, report: Report) -> None:
        with self._lock:
            self._report = report
            if settings.folder != self._settings.folder:
                self._leave_folder()
            if settings.is_fallback and not self._settings.is_fallback:
                self._fallback_reason = "asked for"
            self._settings = settings

    def close(self) -> None:
        with self._lock:
            for owner, name, original in reversed(self._patches):
                setattr(owner, name, original)
            for group in list(self._own):
                if self._library is not None:
                    self._library.gangline_recorder_detach(group._id())
            self._own.clear()
            if self._fallback is not None:
                self._fallback.close()
            self._leave_folder()

    # --- what torch calls -----------------------------------------------------------------------

    def _patch(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._patches.append((owner, name, original))
        setattr(owner, name, make(original))

    def _and_attach(self, original: Callable[..., None]) -> Callable[..., None]:
        def register(pg: Any, *args: Any, **kwargs: Any) -> None:
            original(pg, *args, **kwargs)
            self._attach(pg, kwargs.get("rank_mapping"))

        return register

    def _attach_result(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def make_group(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if made is not None:
                self._attach(made, None)
            return made

        return make_group

    def _own_backend(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # torch and others ask a backend for its class and for what only that class can do.
        def get_backend(group: Any, device: torch.device) -> Any:
            own = self._own.get(group)
            found = own.get(torch.device(device).type) if own else None
            return original(group, device) if found is None else found

        return get_backend

    # --- attaching ------------------------------------------------------------------------------

    def _attach(self, group: Any, rank_mapping: dict[int, int] | None) -> None:
        try:
            with self._lock:
                if group not in self._own:
                    self._enter_process()
                    self._attach_backends(group, rank_mapping)
        except Exception as error:  # noqa: BLE001 - whatever it is, training must go on
            if not self._has_warned:
                self._has_warned = True
                self._report(f"communication is not recorded: {error}")

    def _attach_backends(self, group: Any, rank_mapping: dict[int, int] | None) -> None:
        own = {device.type: group._get_backend(device) for device in group._device_types}
        ranks = _ranks_of(group, list(own.values()), rank_mapping)
        library = self._load()
        for backend in {id(each): each for each in own.values()}.values():
            devices = tuple(name for name, each in own.items() if each is backend)
            info = self._info(group, backend, devices, ranks)
            path = self._make_ring(replace(info, recorder="c++" if library else "python"))
            try:
                if library is not None:
                    _attach(library, group, devices[0], path, ranks)
                else:
                    self._running_fallback().attach(group, devices, path, ranks)
            except BaseException:
                path.unlink()
                raise
            self._paths = [*filter(Path.exists, self._paths), path]
        self._own[group] = own if library is not None else {}

    def _info(
        self, group: Any, backend: Any, devices: tuple[str, ...], ranks: Sequence[int]
    ) -> fmt.RingInfo:
        place = group.rank()
        default = c10d._world.default_pg
        rank = ranks[place] if ranks else (default.rank() if default is not None else -1)
        return fmt.RingInfo(
            pid=os.getpid(),
            start_ticks=fmt.start_ticks(os.getpid()),
            pid_namespace=fmt.pid_namespace(),
            host=platform.node(),
            label=self._settings.label,
            rank=rank,
            group=str(group.group_name),
            group_desc=str(group.group_desc),
            ranks=tuple(ranks),
            group_rank=place,
            group_size=group.size(),
            backend=str(backend.name()),
            devices=devices,
            recorder="",
            recorder_reason=self._fallback_reason,
            torch=str(torch.__version__),
            realtime_offset_ns=time.time_ns() - time.monotonic_ns(),
        )

    def _make_ring(self, info: fmt.RingInfo) -> Path:
        # Processes of several PID namespaces, of which two may have the same pid, may share the
        # folder; so a name that is taken is no error.
        while True:
            name = f"{info.pid}-{next(self._numbers)}{fmt.RING_SUFFIX}"
            path = self._settings.folder / name
            with contextlib.suppress(FileExistsError):
                fmt.create_ring(path, info, self._settings.capacity)
                return path

    def _load(self) -> ctypes.CDLL | None:
        if self._library is None and not self._fallback_reason:
            try:
                built = recorder_build.build(cache=self._settings.cache, report=self._report)
                self._library = _open_library(built.library)
            except (recorder_build.BuildError, OSError) as error:
                self._fallback_reason = str(error)
                self._report(
                    "communication is recorded by the Python fallback, which costs more per "
                    f"operation: {error}"
                )
        return None if self._fallback_reason else self._library

    def _running_fallback(self) -> Fallback:
        if self._fallback is None:
            self._fallback = Fallback()
        return self._fallback

    # --- the life of the rings ------------------------------------------------------------------

    def _enter_process(self) -> None:
        """Hold the folder for this process, which may be a fork of the one that installed us."""
        if self._pid != os.getpid():
            if self._hold is not None:
                self._hold.forget()
            self._pid, self._hold, self._paths = os.getpid(), None, []
            # Unlike atexit's, these also run at the end of multiprocessing's children.
            multiprocessing_util.Finalize(None, self._leave_folder, exitpriority=0)
        if self._hold is None:
            self._hold = FolderHold(self._settings.folder)
            drop_oldest_dead(self._settings.folder)

    def _leave_folder(self) -> None:
        if self._pid != os.getpid():
            return
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()
        self._paths = []
        if self._hold is not None:
            self._hold.release()
            self._hold = None


_installed: _Installation | None = None


def _ranks_of(
    group: Any, backends: Sequence[Any], rank_mapping: dict[int, int] | None
) -> list[int]:
    """Return the global ranks of a group, in order; empty when they cannot be known."""
    if rank_mapping:
        return sorted(rank_mapping, key=lambda rank: rank_mapping[rank])
    default = c10d._world.default_pg
    if default is None or default is group:
        return list(range(group.size()))
    for backend in backends:
        options = getattr(backend, "options", None)
        ranks = [int(rank) for rank in getattr(options, "global_ranks_in_group", [])]
        if len(ranks) == group.size():
            return ranks
    return []


def _open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.gangline_recorder_version.restype = ctypes.c_uint32
    if library.gangline_recorder_version() != fmt.VERSION:
        raise OSError(f"{path} writes another format of rings")
    library.gangline_recorder_attach.argtypes = [
        ctypes.c_int64,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.gangline_recorder_detach.argtypes = [ctypes.c_int64]
    return library


def _attach(
    library: ctypes.CDLL, group: Any, device: str, path: Path, ranks: Sequence[int]
) -> None:
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    array = (ctypes.c_int32 * len(ranks))(*ranks)
    result = library.gangline_recorder_attach(
        group._id(), device.encode(), os.fsencode(path), array, len(ranks), error, _ERROR_BYTES
    )
    if result < 0:
        raise RuntimeError(error.value.decode(errors="replace"))
