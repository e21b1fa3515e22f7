"""What inspect_ai says, from a process of its own: imported in the tests', its warnings would be errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspect(code: str, *arguments: Any, folder: Path) -> Any:
    """Run code in a folder, and return what it prints last, as JSON; arguments that aren't text are given as JSON."""
    command = [sys.executable, "-c", code, *(its if isinstance(its, str) else json.dumps(its) for its in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
