"""The commands about labs of virtual hosts: lab up, down, ls, exec, plan."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator.commands_options import Common, Overrides
from gangline.orchestrator.display import duration, printable
from gangline.orchestrator.errors import ExitCode, LabError, UsageError

LabFilePath = Annotated[Path, Parameter(help="The lab file (docs/lab.md, examples/labs).")]
LabName = Annotated[
    str | None, Parameter(name="--lab", help="Name of the lab; not needed if there is one only.")
]


def up(
    file: LabFilePath,
    /,
    *,
    name: Annotated[
        str | None, Parameter(help="What to call it; otherwise as the file says.")
    ] = None,
    overrides: Overrides = (),
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Bring up a lab in the background; return when its hosts, and Ray on them, are ready.

    It stays up until `gangline lab down`, and needs root.
    """
    from gangline.orchestrator import lab_keeper

    start_s = time.monotonic()
    record = lab_keeper.start(file, overrides, name, common.note)
    if common.json:
        common.data_json({"version": 1, **record.to_json()})
        return ExitCode.OK
    common.data(record.name)
    common.note(
        f"up in {duration(time.monotonic() - start_s)}; "
        f"try: gangline lab exec {record.hosts[0].name} -- ip addr"
    )
    return ExitCode.OK


def down(
    name: Annotated[
        str | None, Parameter(help="Name of the lab; not needed if there is one only.")
    ] = None,
    /,
    *,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """End a lab with everything in it, or forget one whose keeper was killed."""
    from gangline.orchestrator import lab_keeper

    record = lab_keeper.find(name)
    was_up = lab_keeper.stop(record)
    if common.json:
        common.data_json({"version": 1, "name": record.name, "was_up": was_up})
    else:
        common.data(f"{record.name}  {'ended' if was_up else 'was dead already; forgotten'}")
    return ExitCode.OK


def ls(
    *,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """List the labs that are up, with their hosts."""
    from gangline.orchestrator import lab_keeper

    records = lab_keeper.records()
    if common.json:
        common.data_json({"version": 1, "labs": [record.to_json() for record in records]})
        return ExitCode.OK
    for record in records:
        since = duration(time.time() - record.created_at)
        common.data(f"{record.name}  {record.state}  for {since}  {printable(record.file)}")
        for host in record.hosts if record.state != "dead" else ():
            state = "" if host.is_alive else "  dead"
            common.data(f"  {host.name}  {', '.join(host.ips)}{state}")
        if record.state == "dead":
            common.note(f"its keeper was killed; forget it: gangline lab down {record.name}")
    if not records:
        common.note("no lab; `gangline lab up FILE` makes one")
    return ExitCode.OK


def exec_(
    host: Annotated[str, Parameter(help="Name of the host, such as host0.")],
    /,
    *command: Annotated[
        str, Parameter(help="What to run there, behind `--`.", allow_leading_hyphen=True)
    ],
    lab: LabName = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Run a program in a host of a lab, in this terminal; end as it does.

    Files are this machine's, but for /proc and /dev/shm. The lab's Ray is in the environment.
    """
    from gangline.orchestrator import lab_keeper

    if not command:
        raise UsageError(f"what shall {host} run? gangline lab exec {host} -- COMMAND ...")
    record = lab_keeper.find(lab)
    if record.state != "up":
        raise LabError(f"the lab {record.name} is {record.state}; see gangline lab ls")
    lab_keeper.exec_in_host(record.host(host), command)
    return ExitCode.ERROR  # never: this process has become the program


def plan(
    file: LabFilePath,
    /,
    *,
    overrides: Overrides = (),
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Print what `lab up` would do to make the network, as commands; changes nothing."""
    from gangline.orchestrator.lab_fabric import plan_fabric
    from gangline.orchestrator.lab_file import load_lab

    fabric = plan_fabric(load_lab(file, overrides))
    commands = list(fabric.commands())
    if common.json:
        as_json = [{"network": network, "command": command} for network, command in commands]
        common.data_json({"version": 1, "commands": as_json})
        return ExitCode.OK
    width = max(map(len, fabric.networks))
    for network, command in commands:
        common.data(f"{network:<{width}}  {command}")
    return ExitCode.OK
