"""Serves the page: `python app.py`. FLUXSAE_RUN picks the run; Gradio's own environment variables apply."""

import logging

from fluxsae.ui.serve.zero import is_zero_gpu, serve

if is_zero_gpu():
    import spaces  # noqa: F401 - this must come before torch

from fluxsae.ui.build import build_app, launch_options
from fluxsae.ui.serve.session import open_workbench


def main() -> None:
    """Builds and launches; FLUX is imported before the page is there and loaded in the background afterwards."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    bench = open_workbench()
    if is_zero_gpu():
        serve(bench)
    app = build_app(bench)
    bench.prepare()
    app.launch(**launch_options(), prevent_thread_lock=True)
    bench.warm_up()
    app.block_thread()


if __name__ == "__main__":
    main()
