"""A visitor of the served page, without a browser: the configuration, and the page's own gallery event."""

import json
import re
import subprocess
import time
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from fluxsae.errors import FluxSaeError

OPENS_WITHIN = 600.0
CONFIG = re.compile(r"window\.gradio_config = (\{.*?\});\s*(?:window|</script)", re.DOTALL)


class Visitor:
    """One browser tab."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]") -> None:
        self.url = url
        self.config_text = config_text(url, process)
        config = json.loads(self.config_text)
        ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
        event = next(e for e in config["dependencies"] if [ids["gallery-query"], "change"] in e["targets"])
        self._event, values = event["id"], {each["id"]: each["props"].get("value") for each in config["components"]}
        self._inputs = [values[number] for number in event["inputs"]]

    def gallery(self, query: str) -> None:
        """Types a query; the cards come back.

        Raises:
            FluxSaeError: they do not.
        """
        body = {"data": [query, *self._inputs[1:]], "fn_index": self._event, "session_hash": "load"}
        answer = _post(f"{self.url}/gradio_api/run/predict", body)
        if not answer["data"][0]["cards"]:
            raise FluxSaeError(f"{query!r} found no cards: {answer['data'][0]['summary']}")


def post(url: str, endpoint: str, arguments: dict[str, Any]) -> None:
    """Calls an endpoint and waits for its answer.

    Raises:
        FluxSaeError: it was refused, or failed.
    """
    event = _post(f"{url}/gradio_api/call/v2/{endpoint}", arguments)["event_id"]
    with urlopen(f"{url}/gradio_api/call/{endpoint}/{event}") as answer:
        lines = answer.read().decode().splitlines()
    if "event: complete" not in lines:
        raise FluxSaeError(f"/{endpoint} of the page failed: {' '.join(lines[-3:])[:300]}")


def _post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)


def config_text(url: str, process: "subprocess.Popen[bytes]") -> str:
    """What a browser gets of the page's configuration, once the app answers.

    Raises:
        FluxSaeError: the app ends before, or takes too long.
    """
    deadline = time.monotonic() + OPENS_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=60) as answer:
                found = re.search(
                    r"window\.gradio_config = (\{.*?\});\s*(?:window|</script)", answer.read().decode(), re.S
                )
            if found:
                return found[1]
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise FluxSaeError(f"app.py did not answer within {OPENS_WITHIN:.0f} s. What it printed above says why.")
