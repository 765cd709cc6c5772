"""One entry to every benchmark: its name, then its own options.

python -m train.benchmarks training
python -m train.benchmarks gpu --help
"""

import ast
import importlib
from pathlib import Path

import tyro

from fluxsae.errors import FluxSaeError
from train.benchmarks.options import CONFIGS
from train.command import plainly, start

NAMES = sorted(CONFIGS)


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the first word names; without one, lists them."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}")
        return
    if name not in CONFIGS:
        raise FluxSaeError(f"There is no benchmark {name!r}; there are {', '.join(NAMES)}.")
    package = Path(__file__).parent / name
    module = f"train.benchmarks.{name}" + ".__main__" * package.is_dir()
    source = package / "__main__.py" if package.is_dir() else package.with_suffix(".py")
    description = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))  # read without loading torch
    config = tyro.cli(
        plainly(CONFIGS[name]), prog=f"python -m train.benchmarks {name}", description=description, args=options
    )
    importlib.import_module(module).main(config)


if __name__ == "__main__":
    start(main, lambda words: words)
