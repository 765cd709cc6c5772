"""Where a FLUX comes from: the miniature, a folder or the Hub; what lies there, and what it is called in runs."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from fluxsae.errors import FluxSaeError
from fluxsae.flux.presets import SMALL_MODEL_BYTES
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature import miniature_path

SETTINGS_FILE = "generation_settings.json"
_COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
# Not the whole repository: FLUX.1-dev's also holds the transformer a second time, in another layout.
_HUB_FILES = ("model_index.json", SETTINGS_FILE, *(f"{name}/*" for name in _COMPONENTS))


class FluxIdentity(NamedTuple):
    """Which FLUX this is: a name or Hub id, and the commit or a digest of the transformer's weights."""

    flux_id: str
    revision: str | None


def find_model(name: str | Path, revision: str | None) -> tuple[Path, FluxIdentity]:
    """The model's folder, fetched if need be, and its identity.

    Raises:
        FluxSaeError: no such model, or no access to it.
    """
    if str(name) == "miniature":
        folder = miniature_path("flux")
        return folder, FluxIdentity("miniature", weights_digest(folder))
    folder = Path(name)
    if _is_folder(folder):
        if not (folder / "model_index.json").is_file():
            raise FluxSaeError(
                f"{folder} is no FLUX folder: model_index.json is missing. Give a folder that diffusers saved."
            )
        return folder, FluxIdentity(folder.resolve().name, weights_digest(folder))
    # Only here: what lies on this machine must load without the Hub's client.
    from fluxsae.hub import transfer

    if not transfer.is_repo_id(str(name)):
        raise FluxSaeError(
            f"{str(name)[:120]!r} is neither 'miniature', nor a folder here, nor a Hub repository. "
            "Write for example black-forest-labs/FLUX.1-dev."
        )
    snapshot = transfer.download(str(name), revision=revision, patterns=_HUB_FILES)
    return snapshot.folder, FluxIdentity(snapshot.repo_id, snapshot.commit)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for the file system, say
        return False


def weights_digest(folder: Path) -> str | None:
    """The first 12 hex digits of the SHA-256 over the transformer's weights; None where they are large."""
    files = sorted((folder / "transformer").glob("*.safetensors"))
    if not files or sum(file.stat().st_size for file in files) > SMALL_MODEL_BYTES:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of weights on disk, by component."""
    names = ("transformer", "text_encoder", "text_encoder_2", "vae")
    return {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in names}


def read_settings(folder: Path) -> GenerationSettings | None:
    """The generation settings that a model folder carries, or None.

    Raises:
        FluxSaeError: the file does not hold them.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return GenerationSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FluxSaeError(f"{path} does not hold generation settings: {error} Mend or remove it.") from error
