"""Serves the page: `python app.py`. FLUXSAE_RUN picks the runs; Gradio's own environment variables apply."""

import logging

from fluxsae.ui.serve.zero import is_zero_gpu, serve

if is_zero_gpu():
    import spaces  # noqa: F401 - this must come before torch

from fluxsae.ui.build import build_app, launch_options
from fluxsae.ui.serve.shelf import open_shelf


def main() -> None:
    """Builds and launches; FLUX, CLIP and what searches need are loaded in the background once the page is there."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    shelf = open_shelf()
    if is_zero_gpu():
        for bench in shelf.runs.values():
            serve(bench)
    app = build_app(shelf)
    app.launch(**launch_options(), prevent_thread_lock=True)
    shelf.warm_up()
    app.block_thread()


if __name__ == "__main__":
    main()
