"""The Hub of `hub_server` as tests use it: started in a process of its own, asked and troubled over HTTP."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hub_server import Fault


@dataclass(frozen=True)
class LocalHub:
    """A served Hub, as a test sees it."""

    url: str
    token: str

    def faults(self, *faults: Fault) -> None:
        """Replaces the faults in force."""
        self._call("/_test/faults", [asdict(fault) for fault in faults])

    def log(self) -> list[dict[str, Any]]:
        """The requests since the last call."""
        return self._call("/_test/log")  # type: ignore[no-any-return]

    def repo(self, id: str, kind: str = "models", **changes: Any) -> dict[str, Any]:
        """What the repository holds, after `changes` (private, gated)."""
        return self._call(f"/_test/{kind}/{id}", changes or None)  # type: ignore[no-any-return]

    def environment(self, home: Path, *, offline: bool = False, token: bool = True) -> dict[str, str]:
        """A process's environment in which the client talks to this server only, with its cache under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return (
            kept
            | {
                "HF_ENDPOINT": self.url,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_OFFLINE": "1" if offline else "0",
                "OMP_NUM_THREADS": "1",
            }
            | ({"HF_TOKEN": self.token} if token else {})
        )

    def _call(self, path: str, value: Any = None) -> Any:
        data = None if value is None else json.dumps(value).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=data), timeout=30) as response:
            return json.loads(response.read())


@contextmanager
def served_hub(token: str = "hf_LocalTestTokenLocalTestToken0000") -> Iterator[LocalHub]:
    """A Hub in a process of its own, ended when the context ends."""
    command = [sys.executable, "-m", "tests.hub_server", "--token", token]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None
        yield LocalHub(process.stdout.readline().strip(), token)
    finally:
        process.terminate()
        process.wait(timeout=100)
