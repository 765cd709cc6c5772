"""One entry to every benchmark: its name, then its own options.

python -m train.benchmarks training
python -m train.benchmarks gpu --help
"""

import runpy
import sys
from pathlib import Path

from fluxsae.errors import FluxSaeError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*") if path.suffix in ("", ".py"))


def main() -> None:
    """Runs the benchmark that the first word names.

    Raises:
        FluxSaeError: there is no such benchmark.
    """
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nBenchmarks: {', '.join(NAMES)}")
        return
    if name not in NAMES:
        raise FluxSaeError(f"There is no benchmark {name!r}; there are {', '.join(NAMES)}.")
    module = f"train.benchmarks.{name}"
    sys.argv = [f"python -m train.benchmarks {name}", *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
