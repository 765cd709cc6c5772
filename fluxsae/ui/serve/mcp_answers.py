"""What MCP clients get: JSON as JSON and images as images, whether or not they ask for progress.

Gradio 6.31 gives Python's own notation of values and of galleries, and packs several results into one for clients that
ask for no progress. Its server has no setting for that; this is the one place that replaces its method.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gradio import processing_utils
from gradio.mcp import GradioMCPServer
from mcp.types import ImageContent, TextContent

MIME: Final = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
Content = TextContent | ImageContent


def answer_in_json() -> None:
    """From now on tools answer so."""
    GradioMCPServer.postprocess_output_data = _contents


def _contents(server: Any, data: Any, root_url: str) -> list[Content]:
    outputs = data[0] if len(data) == 1 and isinstance(data[0], tuple) else data
    told = processing_utils.add_root_url(list(outputs), root_url, None)
    return [content for output in told for content in _content(output)]


def _content(output: Any) -> Iterator[Content]:
    match output:
        case {"path": str(path), "meta": _}:
            yield from _picture(path, output.get("url"))
        case [{"image": {"path": str()}}, *_]:
            for entry in output:
                yield from _picture(entry["image"]["path"], entry["image"].get("url"), entry.get("caption"))
        case _:
            yield TextContent(type="text", text=json.dumps(output, ensure_ascii=False))


def _picture(path: str, url: str | None, caption: str | None = None) -> Iterator[Content]:
    """A picture, and where a browser finds it; never the path on this machine."""
    file = Path(path)
    if file.suffix in MIME and file.is_file():
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        yield ImageContent(type="image", data=data, mimeType=MIME[file.suffix])
    told = {"caption": caption, "url": url}
    text = json.dumps({name: value for name, value in told.items() if value}, ensure_ascii=False)
    yield TextContent(type="text", text=text)
