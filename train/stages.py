"""Stages of a run: skipped when complete, recorded when done, refused when they would overwrite something else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fluxsae.errors import FluxSaeError

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder, StageRecord
    from fluxsae.sae.training.processes import Processes


StageName = Literal["collect", "fit", "score", "analyze", "embed", "select", "directions", "render", "demos"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""Every stage, in order: a stage that is done again makes the later ones stale. A new stage is a name here, a script
beside this file, and a line in `SCRIPTS` of `train/recipes/`."""

_NEEDS = {
    "analyze": ("score",),
    "embed": ("score",),
    "select": ("analyze", "embed"),
    "render": ("analyze",),
    "demos": ("analyze",),
}
"""Stages whose files a stage reads, all with a script of the same name."""

_RENAMED = {"n_images": "images", "hookpoint": "hookpoints", "step": "steps"}
_RENAMED_IN = ("collect", "fit", "score", "render")


def renamed(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a stage as older recipes and runs spell them, under the names of today."""
    if stage not in _RENAMED_IN:
        return dict(values)
    return {_RENAMED.get(name, name): _listed(name, value) for name, value in values.items()}


def _listed(name: str, value: Any) -> Any:
    if name in ("hookpoint", "step") and not isinstance(value, list):
        return [] if value is None else [value]
    return value


@dataclass(frozen=True)
class StageResult:
    """A line of the closing table."""

    name: str
    word: str
    """done, or skipped."""
    seconds: float
    megabytes: float


def run_stage(
    run: RunFolder,
    name: str,
    config: dict[str, Any],
    work: Callable[[], None],
    *,
    outputs: Callable[[], Sequence[Path]],
    force: bool = False,
    by_hookpoint: bool = False,
    processes: Processes | None = None,
) -> StageResult:
    """Runs a stage unless it is complete: recorded with this config, its outputs there.

    `outputs` names files and folders that exist once the stage is done (asked again after it ran). With `by_hookpoint`
    the config has an entry a hook point, and the entries of other hook points stay recorded. The first process keeps
    the record.

    Raises:
        FluxSaeError: the stage is complete with another config and `force` is off, or one it needs is out of date.
    """
    from fluxsae.runs.folder import StageRecord
    from fluxsae.sae.training.processes import Processes

    peers = processes or Processes()
    config = json.loads(json.dumps(config, default=str))
    if peers.rank == 0:
        run.remove_leftovers()
    record = _recorded(run, name, by_hookpoint=by_hookpoint)
    if record is not None and not force and all(path.exists() for path in outputs()):
        names = record.config.keys() & config.keys() if by_hookpoint else {**record.config, **config}
        differences = _differences(record.config, config, names=names)
        if differences:
            raise FluxSaeError(f"{name} is complete with other settings: {differences}. {_REMEDY}")
        if config.keys() <= record.config.keys():
            if peers.rank == 0:
                print(f"{name}: complete, skipped ({record.seconds:.0f} s, {record.megabytes:.1f} MB when it ran)")
            return StageResult(name, "skipped", record.seconds, record.megabytes)
    _check_needs(run, name)
    peers.wait()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peers.wait()
    megabytes = sum(map(size_of, outputs())) / 1e6
    if peers.rank == 0:
        info = run.load_info().without_stages(_later(name))
        before = info.stages.get(name) if by_hookpoint else None
        others = {key: values for key, values in (before.config if before else {}).items() if key not in config}
        spent, held = (before.seconds, before.megabytes) if before and others else (0.0, 0.0)
        record = StageRecord({**others, **config}, round(spent + seconds, 2), round(held + megabytes, 3))
        run.save_info(info.with_stage(name, record))
        print(f"{name}: done in {seconds:.0f} s, {megabytes:.1f} MB")
    peers.wait()
    return StageResult(name, "done", seconds, megabytes)


def _check_needs(run: RunFolder, name: str) -> None:
    """Refuses files of a stage that is out of date; a run without records of earlier stages was made by other means."""
    recorded = run.load_info().stages if run.exists() else {}
    for needed in _NEEDS.get(name, ()):
        is_begun = any(stage in recorded for stage in STAGES[: list[str](STAGES).index(needed)])
        if is_begun and needed not in recorded:
            raise FluxSaeError(
                f"{name} needs {needed}, which is not complete in {run.path}: it was stopped, or an earlier stage was "
                f"run again after it. Run `python -m train.{needed} --run {run.path}` first."
            )


def _recorded(run: RunFolder, name: str, *, by_hookpoint: bool) -> StageRecord | None:
    record = run.load_info().stages.get(name) if run.exists() else None
    if record is None:
        return None
    if not by_hookpoint:
        return replace(record, config=renamed(name, record.config))
    config = {place: renamed(name, own) if isinstance(own, Mapping) else own for place, own in record.config.items()}
    return replace(record, config=config)


_REMEDY = "Pass --force to do it again, or name another --run."


def start_over(run: RunFolder, name: str, entries: Iterable[str] | None = None) -> None:
    """Says in run.json that a stage (or some entries of its config) is complete no longer, nor is any later one.

    Called when `--force` begins to delete: a run that is stopped then continues without it.
    """
    if not run.exists():
        return
    info = run.load_info()
    record = info.stages.get(name)
    kept = info.without_stages((name, *_later(name)))
    if record is not None and entries is not None:
        gone = set(entries)
        config = {key: value for key, value in record.config.items() if key not in gone}
        kept = kept.with_stage(name, replace(record, config=config))
    run.save_info(kept)


def _later(name: str) -> tuple[str, ...]:
    return STAGES[list[str](STAGES).index(name) + 1 :] if name in STAGES else ()


def _differences(old: dict[str, Any], new: dict[str, Any], *, names: Iterable[str]) -> str:
    differing = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in differing)


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def format_table(results: Sequence[StageResult]) -> str:
    """The closing table: stage, word, seconds, megabytes, and their sums."""
    lines = [f"{'stage':<12}{'':<10}{'seconds':>10}{'MB':>10}"]
    lines += [f"{r.name:<12}{r.word:<10}{r.seconds:>10.1f}{r.megabytes:>10.1f}" for r in results]
    spent = sum(r.seconds for r in results if r.word == "done")
    lines.append(f"{'total':<12}{'':<10}{spent:>10.1f}{sum(r.megabytes for r in results):>10.1f}")
    return "\n".join(lines)


def check_push(repo_id: str | None) -> None:
    """Refuses a Hub repository that cannot be meant, before hours of work.

    Raises:
        FluxSaeError: not of the form user/name.
    """
    if repo_id is not None:
        from fluxsae.hub.transfer import check_repo_id

        check_repo_id(repo_id)


def push_complete(run: RunFolder, repo_id: str | None) -> None:
    """Publishes the run, where `--push-to` asks for it.

    Raises:
        FluxSaeError: the Hub refuses it; the stage itself is complete and kept.
    """
    if repo_id is not None:
        from fluxsae.publishing.publish import push_run

        made = push_run(run, repo_id)
        print(f"{made.n_files} files at {made.url}")
