"""A process that talks to the local Hub on a test's behalf: calls come in and results go out as JSON lines.

The client reads its environment when it is imported, so a test cannot play several machines in its own process.
`HubProcess` starts one; sleeps are recorded instead of slept.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from local_hub import LocalHub

ROOT = Path(__file__).resolve().parent.parent


class CallError(Exception):
    """The call raised: its type and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


@dataclass
class HubProcess:
    """One machine: its process, its Hub cache and all that it printed."""

    process: "subprocess.Popen[str]"
    home: Path
    printed: Path
    sleeps: list[float]

    def call(
        self,
        target: str,
        *args: Any,
        cache: str = "default",
        offline: bool = False,
        token: str | None = "own",
        limit: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The result of `module:function` as JSON values.

        `cache` names a Hub cache of its own, `token` another login (None for none), `limit` the largest file in bytes
        that the disk takes.
        """
        request = {"target": target, "args": args, "kwargs": kwargs, "cache": str(self.home / cache)}
        request |= {"offline": offline, "token": token, "limit": limit}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.sleeps[:] = answer["sleeps"]
        if answer["error"]:
            raise CallError(*answer["error"])
        return answer["result"]

    def output(self) -> str:
        """Everything printed and logged so far, tracebacks included."""
        return self.printed.read_text()


@contextmanager
def hub_process(hub: LocalHub, home: Path) -> Iterator[HubProcess]:
    """A process whose client talks to `hub` only, at its most talkative."""
    home.mkdir(parents=True, exist_ok=True)
    printed = home / "printed.txt"
    with printed.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=hub.environment(home)
            | {"PYTHONPATH": str(ROOT / "tests"), "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"},
        )
    try:
        yield HubProcess(process, home, printed, [])
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=200)


def main() -> None:
    """Serves calls until its input ends."""
    import time

    from huggingface_hub import constants

    own_token = os.environ["HF_TOKEN"]
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        sleeps: list[float] = []
        time.sleep = sleeps.append
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = request["cache"], request["offline"]
        os.environ["HF_TOKEN"] = own_token if request["token"] == "own" else request["token"] or ""
        result, error = None, None
        try:
            with _file_size_limit(request["limit"]):
                module, _, name = request["target"].partition(":")
                function: Any = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                result = _plain(function(*request["args"], **request["kwargs"]))
        except Exception as raised:
            traceback.print_exc()
            error = (type(raised).__name__, str(raised))
        out.write(json.dumps({"result": result, "error": error, "sleeps": sleeps}) + "\n")
        out.flush()


@contextmanager
def _file_size_limit(limit: int | None) -> Iterator[None]:
    """A disk on which no file gets larger than this."""
    if limit is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(item) for name, item in asdict(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "path"):
        return str(value.path)
    with contextlib.suppress(TypeError):
        json.dumps(value)
        return value
    return str(value)


if __name__ == "__main__":
    main()
