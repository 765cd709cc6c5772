"""The run folder, on disk and on the Hub: the only place that spells its file names. Its tables and prompt files."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder, RunInfo
    from fluxsae.runs.names import SaeName
    from fluxsae.runs.prompts import load_prompts

__all__ = ["RunFolder", "RunInfo", "SaeName", "load_prompts"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "RunFolder": "folder",
        "RunInfo": "folder",
        "SaeName": "names",
        "load_prompts": "prompts",
    },
)
