"""A script for `kind: script` jobs: every rank tells rank 0 over the network where it is."""

import os
import socket
import time
from pathlib import Path

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PLACE = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def connect() -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(PLACE, 5.0)
        except OSError:
            time.sleep(0.05)  # rank 0 does not listen yet
    raise TimeoutError(f"nobody listens at {PLACE}")


if RANK == 0:
    found = [f"{socket.gethostname()} {PLACE[0]}"]
    with socket.create_server(PLACE) as listener:
        for _ in range(WORLD_SIZE - 1):
            peer, (ip, _) = listener.accept()
            with peer:
                found.append(f"{peer.recv(64).decode()} {ip}")
    path = Path(os.environ["GANGLINE_RUN_DIR"]) / "artifacts" / "places"
    path.write_text("\n".join(sorted(found)))
else:
    with connect() as to_first:
        to_first.sendall(socket.gethostname().encode())
