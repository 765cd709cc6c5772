"""One entry to every benchmark: its name, then its own options.

python -m train.benchmarks training
python -m train.benchmarks gpu --help
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import tyro

from fluxsae.errors import FluxSaeError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*"))


def find_benchmark(name: str) -> ModuleType:
    """The module of a benchmark, with a `main(config)`.

    Raises:
        FluxSaeError: there is no such benchmark.
    """
    if name not in NAMES:
        raise FluxSaeError(f"There is no benchmark {name!r}; there are {', '.join(NAMES)}.")
    module = importlib.import_module(f"train.benchmarks.{name}")
    return module if hasattr(module, "main") else importlib.import_module(f"{module.__name__}.__main__")


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the first word names; without one, lists them."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}")
        return
    module = find_benchmark(name)
    config = get_type_hints(module.main)["config"]
    prog = f"python -m train.benchmarks {name}"
    module.main(tyro.cli(config, prog=prog, description=module.__doc__, args=options))


if __name__ == "__main__":
    main(sys.argv[1:])
