"""Where a FLUX comes from: the miniature, a folder or the Hub; and what lies there."""

import json
from pathlib import Path

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature import miniature_path

SETTINGS_FILE = "generation_settings.json"
_COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
# Not the whole repository: FLUX.1-dev's also holds the transformer a second time, in another layout.
_HUB_FILES = ("model_index.json", SETTINGS_FILE, *(f"{name}/*" for name in _COMPONENTS))


def find_model(name: str | Path, revision: str | None) -> Path:
    """The model's folder, fetched if need be.

    Raises:
        FluxSaeError: no such model, or no access to it.
    """
    if str(name) == "miniature":
        return miniature_path("flux")
    folder = Path(name)
    if _is_folder(folder):
        if not (folder / "model_index.json").is_file():
            raise FluxSaeError(
                f"{folder} is no FLUX folder: model_index.json is missing. Give a folder that diffusers saved."
            )
        return folder
    # Only here: what lies on this machine must load without the Hub's client.
    from fluxsae.hub import transfer

    if not transfer.is_repo_id(str(name)):
        raise FluxSaeError(
            f"{str(name)[:120]!r} is neither 'miniature', nor a folder here, nor a Hub repository. "
            "Write for example black-forest-labs/FLUX.1-dev."
        )
    return transfer.download(str(name), revision=revision, patterns=_HUB_FILES).folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for the file system, say
        return False


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
