"""Every view as code: Python, curl and MCP calls with the very values on screen."""

import json
import os
from collections.abc import Mapping
from typing import Any

from fluxsae.ui.serve.schemas import Request

ORIGIN = "__ORIGIN__"
"""Stands for this page's address; the page puts its own in when it shows the code."""
PICTURE = "__PICTURE__"
"""Stands for the reader's picture, which each language sends in its own way."""
FILE = "picture.png"


def snippets(schema: type[Request], values: Mapping[str, Any], *, run: str | None = None) -> dict[str, str]:
    """The call of an endpoint with these values in each language; `run` is None for the first on the shelf."""
    arguments = {name: values[name] for name in schema.model_fields if name in values}
    if run is not None:
        arguments["run"] = run
    return {
        "Python": python_call(schema.endpoint, arguments, schema.result_names()),
        "curl": curl_call(schema.endpoint, arguments),
        "MCP": mcp_call(schema.endpoint, arguments),
    }


def python_call(endpoint: str, arguments: Mapping[str, Any], returns: str) -> str:
    """With `gradio_client`."""
    sends = PICTURE in arguments.values()
    lines = [
        f"    {name}={f'handle_file({FILE!r})' if value == PICTURE else repr(value)},"
        for name, value in arguments.items()
    ]
    return "\n".join(
        [
            f"from gradio_client import Client{', handle_file' if sends else ''}",
            "",
            f'client = Client("{ORIGIN}")',
            f"{returns} = client.predict(",
            *lines,
            f'    api_name="/{endpoint}",',
            ")",
        ]
    )


def curl_call(endpoint: str, arguments: Mapping[str, Any]) -> str:
    """Over plain HTTP: the call gives an id, the id gives the result; a call that is refused says why."""
    data = json.dumps(dict(arguments), ensure_ascii=False).replace("'", "'\\''")
    body = f"-d '{data}'"
    if PICTURE in arguments.values():  # through a pipe: a picture is too long for an argument
        sent = data.replace(PICTURE, f"data:image/png;base64,'; base64 < {FILE} | tr -d '\\n'; printf %s '")
        body = f"-d @<(printf %s '{sent}')"
    return "\n".join(
        [
            f"ANSWER=$(curl -s -X POST {ORIGIN}/gradio_api/call/v2/{endpoint} \\",
            "  -H 'Content-Type: application/json' \\",
            f"  {body})",
            'EVENT=$(echo "$ANSWER" | grep -o \'"event_id":"[0-9a-f]*\' | cut -d\'"\' -f4)',
            f'if [ -n "$EVENT" ]; then curl -sN {ORIGIN}/gradio_api/call/{endpoint}/$EVENT; else echo "$ANSWER"; fi',
        ]
    )


def tool_name(endpoint: str) -> str:
    """What an endpoint's MCP tool is called: on a Space, Gradio puts the Space's name before it."""
    space = os.environ.get("SPACE_ID", "").rpartition("/")[2] if os.environ.get("SYSTEM") == "spaces" else ""
    return f"{space}_{endpoint}" if space else endpoint


def mcp_call(endpoint: str, arguments: Mapping[str, Any]) -> str:
    """The server's address for an MCP client, and the tool call it makes."""
    server = {"mcpServers": {"fluxsae": {"url": f"{ORIGIN}/gradio_api/mcp/"}}}
    given = {name: "data:image/png;base64,..." if value == PICTURE else value for name, value in arguments.items()}
    call = {"method": "tools/call", "params": {"name": tool_name(endpoint), "arguments": given}}
    return (
        "// in the client's settings\n"
        + json.dumps(server, indent=2)
        + "\n\n// the call\n"
        + json.dumps(call, indent=2, ensure_ascii=False)
    )
