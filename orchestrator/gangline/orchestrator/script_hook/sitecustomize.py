"""Record the communication of the Python processes of a `kind: script` job.

Python imports the first module of this name on its path when it starts. This one waits for
torch.distributed to be imported, if ever it is, and then for the first process group, at which it
installs the recorder. A process that does neither pays a millisecond. The user's own
`sitecustomize`, if there is one, runs as if this file were not there.

Not recorded: an interpreter started with -I, -E or -S, or without PYTHONPATH or GANGLINE_RINGS in
its environment. Any Python 3 may come by, so there is nothing newer than 3.6 in here.
"""

import importlib.machinery
import os
import sys
from typing import Any

_WAITED_FOR = "torch.distributed.distributed_c10d"
_HERE = os.path.dirname(os.path.abspath(__file__))


class _Finder:
    """Stand before the other finders until torch's process groups are imported."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find as the others would, and have the module changed once it has run."""
        if name != _WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            _after_exec(spec.loader, self._folder)
        return spec


def _after_exec(loader: Any, folder: str) -> None:
    exec_module = loader.exec_module

    def exec_and_wait_for_a_group(module: Any) -> None:
        del loader.exec_module  # the class's own is back
        exec_module(module)
        if hasattr(module, "_register_pg_in_world"):
            _install_with_the_first_group(module, folder)
        else:
            _say("this torch makes process groups in a way that is not known here")

    loader.exec_module = exec_and_wait_for_a_group


def _install_with_the_first_group(c10d: Any, folder: str) -> None:
    # torch is half imported now, and may never make a group.
    register = c10d._register_pg_in_world

    def first(*args: Any, **kwargs: Any) -> Any:
        if c10d._register_pg_in_world is first:
            c10d._register_pg_in_world = register
            _install(folder)
        return c10d._register_pg_in_world(*args, **kwargs)

    c10d._register_pg_in_world = first


def _install(folder: str) -> None:
    try:
        from gangline.comm import recorder

        rank = os.environ.get("RANK", "")
        recorder.install(folder, label="rank-" + rank if rank else "", report=_say)
    except Exception as error:  # noqa: BLE001 - the script must run, whatever it is
        _say("communication is not recorded: {}".format(error))  # noqa: UP032 - see above


def _say(line: str) -> None:
    sys.stderr.write("gangline: " + line + "\n")
    sys.stderr.flush()


def _run_the_users_own() -> None:
    """Import the next `sitecustomize` on the path, under its name; without one, keep this."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]
    this = sys.modules.pop(__name__)
    try:
        __import__(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, this)


if os.environ.get("GANGLINE_RINGS"):
    sys.meta_path.insert(0, _Finder(os.environ["GANGLINE_RINGS"]))
_run_the_users_own()
