"""Several processes of one command, as a launcher starts them."""

import os
import socket
import subprocess

from environments import SCRIPTS
from loaded import Loaded
from warm import Outcome, Warm


def launch(python: Loaded, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """By torchrun, which starts processes of their own."""
    command = [str(SCRIPTS / "torchrun"), "--nproc_per_node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return python.run(*command, *arguments, check=False)


def together(
    warm: Warm, processes: int, *arguments: str, command: str = "mergekit-fim", code: str | None = None
) -> list[Outcome]:
    """The processes as `launch` starts them, without the seconds in which each imports torch, and with no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    size |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MERGEKIT_FIM_CACHE": os.environ["MERGEKIT_FIM_CACHE"],
    }
    jobs = []
    for rank in map(str, range(processes)):
        environment = size | {"RANK": rank, "LOCAL_RANK": rank}
        jobs.append({"arguments": [command, *arguments], "environment": environment, "code": code})
    return warm.together(*jobs)


FAILING = """
import os
import mergekit_fim.fisher.batched as batched
original = batched._Run.measure
def measure(self, *args):
    if os.environ["RANK"] == "1":
        {action}
    return original(self, *args)
batched._Run.measure = measure
"""
MAIN = """
import sys
from mergekit_fim.cli import main
main(sys.argv[1:])
"""
