"""The heatmaps of a run: acts of features on their top images, with the one reader of their file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from fluxsae.errors import FluxSaeError
from fluxsae.files import map_array, read_header

HEATMAPS_SCHEMA = 2
"""Version 1 held every token of every map; it is still read."""


@dataclass(frozen=True)
class Heatmaps:
    """`heatmaps.safetensors`: acts of the alive features on the tokens of their top images, 8 bits an act.

    Map m = position * top + rank holds the entries `starts[m]` to `starts[m + 1]` - 1. An entry is the distance to the
    token of the entry before (to token -1 for the first) and a level; a distance above 255 passes entries of level 0.
    """

    features: Int[np.ndarray, " alive"]
    image_ids: Int[np.ndarray, "alive top"]
    """-1 where a feature fires on fewer images."""
    starts: Int[np.ndarray, " maps_and_end"]
    steps: UInt8[np.ndarray, " entries"]
    levels: UInt8[np.ndarray, " entries"]
    scale: Float[np.ndarray, " alive"]
    """Activation that 255 stands for: the feature's run-wide maximum."""
    rows: int
    cols: int

    @classmethod
    def load(cls, path: str | Path) -> "Heatmaps":
        """The heatmaps of a file; entries are paged in as they are used.

        Raises:
            FluxSaeError: missing, cut off, or written by a newer version of this program.
        """
        header = read_header(path)
        version = int(header.metadata.get("schema_version", "1"))
        if version > HEATMAPS_SCHEMA:
            raise FluxSaeError(
                f"{path} was written with schema version {version}; this program reads up to {HEATMAPS_SCHEMA}. "
                "Update fluxsae."
            )
        arrays = {name: map_array(path, name, header=header) for name in ("features", "image_ids", "scale")}
        if version == 1:
            arrays |= _dense_entries(map_array(path, "values", header=header))
        else:
            arrays |= {name: map_array(path, name, header=header) for name in ("starts", "steps", "levels")}
        return cls(**arrays, rows=int(header.metadata["rows"]), cols=int(header.metadata["cols"]))

    def acts(self, feature: int) -> dict[int, Float[np.ndarray, " tokens"]]:
        """Image id -> acts of the feature on that image's tokens, best image first; empty for a dead feature."""
        position = int(np.searchsorted(self.features, feature))
        if position == len(self.features) or self.features[position] != feature:
            return {}
        unit = np.float32(self.scale[position]) / np.float32(255)
        ids, first = self.image_ids[position], position * self.image_ids.shape[1]
        return {int(i): self._levels(first + rank).astype(np.float32) * unit for rank, i in enumerate(ids) if i >= 0}

    def fits(self) -> bool:
        """Whether there is a map for each image id, and every map ends within the grid."""
        if len(self.starts) != self.image_ids.size + 1 or len(self.steps) != len(self.levels):
            return False
        if self.starts[0] != 0 or self.starts[-1] != len(self.steps) or (np.diff(self.starts) < 0).any():
            return False
        begins = self.starts[:-1][np.diff(self.starts) > 0]
        walked = np.add.reduceat(self.steps, begins, dtype=np.int64) if len(begins) else begins
        return bool((walked <= self.rows * self.cols).all() and np.all(self.steps))

    def _levels(self, place: int) -> UInt8[np.ndarray, " tokens"]:
        own = slice(int(self.starts[place]), int(self.starts[place + 1]))
        levels = np.zeros(self.rows * self.cols, dtype=np.uint8)
        levels[np.cumsum(self.steps[own], dtype=np.int64) - 1] = self.levels[own]
        return levels


def _dense_entries(values: UInt8[np.ndarray, "alive top tokens"]) -> dict[str, np.ndarray]:
    """Maps of every token, as entries of distance 1."""
    n_tokens = values.shape[2]
    starts = np.arange(values.shape[0] * values.shape[1] + 1) * n_tokens
    steps = np.broadcast_to(np.ones(1, dtype=np.uint8), values.size)
    return {"starts": starts, "steps": steps, "levels": values.reshape(-1)}
