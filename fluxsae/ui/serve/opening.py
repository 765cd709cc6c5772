"""From the name of a run to what the page serves: fetched, opened, and refused where its FLUX cannot be had."""

import logging
import os
from pathlib import Path
from typing import Final

from fluxsae.errors import FluxSaeError
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.serve.guard import without_folders
from fluxsae.ui.serve.session import EMBEDDED, HUB_ID, Workbench

log = logging.getLogger("fluxsae.app")

INSTEAD: Final = " This page shows the miniature instead."


def open_workbench(source: str | None = None) -> Workbench:
    """The run that `source` or the environment variable FLUXSAE_RUN names; the embedded miniature where neither does.

    `source` is a folder or a Hub repository, with `@revision` if wanted. Where the run cannot be had, the miniature is
    opened in its place; where only its FLUX cannot, the run can be browsed. `notice` says why and what lifts the limit.
    """
    wanted = source if source is not None else os.environ.get("FLUXSAE_RUN", "").strip()
    if not wanted:
        return embedded_workbench()
    try:
        bench = Workbench(_fetch_run(wanted), source=wanted)
    except FluxSaeError as error:
        log.warning("%s cannot be served: %s", wanted, error)
        return embedded_workbench(
            notice=f"{without_folders(wanted)} cannot be shown here: {without_folders(str(error))}{INSTEAD}"
        )
    try:
        require_flux(bench)
    except FluxSaeError as error:
        log.warning("FLUX of %s cannot be run: %s", wanted, error)
        bench.lacks_flux = without_folders(str(error))
        bench.notice = (
            f"No images can be made of this run here: {bench.lacks_flux} Gallery, Directions and all that was recorded "
            "work; painting, comparing and steering do not."
        )
    return bench


def embedded_workbench(*, notice: str = "") -> Workbench:
    """The miniature's own run."""
    return Workbench(RunFolder(miniature_path("run")), source=EMBEDDED, notice=notice)


def _fetch_run(wanted: str) -> RunFolder:
    if Path(wanted).expanduser().is_dir():
        return RunFolder(Path(wanted).expanduser())
    if not HUB_ID.fullmatch(wanted):
        raise FluxSaeError(
            "there is no such folder on this machine, and it is no name of a Hub repository (user/name, or "
            "user/name@revision)."
        )
    from fluxsae.publishing.publish import pull_run

    return pull_run(wanted)


def require_flux(bench: Workbench) -> None:
    """Refuses a run whose FLUX cannot be loaded here, before a visitor waits for it.

    Raises:
        FluxSaeError: no SAE, no GPU, no access, or no network; the message says what to do.
    """
    missing = [name for name in bench.hookpoints if not bench.run.has_sae(name)]
    if missing:
        raise FluxSaeError(f"it holds no SAE of {', '.join(missing)}; copy the folder sae/ of the run as well.")
    flux_id = bench.flux_source
    if bench.has_local_flux:
        return
    if Path(flux_id).is_absolute():
        raise FluxSaeError(f"its FLUX, {Path(flux_id).name}, is a folder of another machine; set FLUXSAE_FLUX to one.")
    if bench.device == "cpu" and not os.environ.get("SPACES_ZERO_GPU"):
        raise FluxSaeError(f"its FLUX, {flux_id}, needs a GPU with 48 GB, and this machine has none.")
    _require_access(flux_id, bench.info.flux_revision)


def _require_access(flux_id: str, revision: str | None) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        hf_hub_download(flux_id, "model_index.json", revision=revision)
    except GatedRepoError as error:
        raise FluxSaeError(
            f"its FLUX, {flux_id}, is gated: accept the licence at https://huggingface.co/{flux_id} and give this app "
            "a token that may read it (HF_TOKEN, on a Space: Settings, Secrets)."
        ) from error
    except RepositoryNotFoundError as error:
        raise FluxSaeError(
            f"its FLUX, {flux_id}, was not found; a private or gated model needs a token (HF_TOKEN)."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FluxSaeError(f"its FLUX, {flux_id}, could not be reached; check the network and HF_TOKEN.") from error
