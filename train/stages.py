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
    listed = ("hookpoint", "step")
    return {_RENAMED.get(name, name): _listed(value) if name in listed else value for name, value in values.items()}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


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
    work: Callable[[list[str]], None],
    *,
    outputs: Callable[[Sequence[str]], Sequence[Path]],
    force: bool = False,
    by_name: bool = False,
    grows: Sequence[str] = (),
    processes: Processes | None = None,
) -> StageResult:
    """Runs a stage unless it is complete: recorded with this config, its outputs there.

    With `by_name` the config has an entry for each hook point or SAE: only what is not complete is worked on, and the
    entries of others stay recorded. `work` and `outputs` get those names (otherwise none); `outputs` names files and
    folders that exist once the stage is done (asked again after it ran). Values that `grows` lists may be larger than
    what is recorded: the stage then adds to what is there. The first process keeps the record.

    Raises:
        FluxSaeError: the stage is complete with another config and `force` is off, or one it needs is out of date.
    """
    from fluxsae.runs.folder import StageRecord
    from fluxsae.sae.training.processes import Processes

    peers = processes or Processes()
    config = json.loads(json.dumps(config, default=str))
    entries = config if by_name else {"": config}
    if peers.rank == 0:
        run.remove_leftovers()
    record = _recorded(run, name, by_name=by_name)
    before = (record.config if by_name else {"": record.config}) if record is not None else {}
    todo = [
        entry
        for entry, own in entries.items()
        if force or not _is_complete(name, entry, before, own, grows=grows, outputs=outputs)
    ]
    if record is not None and not todo:
        if peers.rank == 0:
            print(f"{name}: complete, skipped ({record.seconds:.0f} s, {record.megabytes:.1f} MB when it ran)")
        return StageResult(name, "skipped", record.seconds, record.megabytes)
    _check_needs(run, name, todo if by_name else [])
    peers.wait()
    start = time.perf_counter()
    work(todo if by_name else [])
    seconds = time.perf_counter() - start
    peers.wait()
    megabytes = sum(map(size_of, outputs(todo if by_name else []))) / 1e6
    if peers.rank == 0:
        kept = _recorded(run, name, by_name=by_name) if by_name else None
        others = {entry: own for entry, own in (kept.config if kept else {}).items() if entry not in todo}
        spent, held = (kept.seconds, kept.megabytes) if kept and others else (0.0, 0.0)
        done = {**others, **{entry: entries[entry] for entry in todo}} if by_name else config
        record = StageRecord(done, round(spent + seconds, 2), round(held + megabytes, 3))
        if name != "collect":  # more activations make no SAE untrue; other ones take --force, which starts over
            forget_later(run, name, todo if by_name else None)
        run.save_info(run.load_info().with_stage(name, record))
        print(f"{name}: done in {seconds:.0f} s, {megabytes:.1f} MB")
    peers.wait()
    return StageResult(name, "done", seconds, megabytes)


def _is_complete(
    name: str,
    entry: str,
    before: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    grows: Sequence[str],
    outputs: Callable[[Sequence[str]], Sequence[Path]],
) -> bool:
    """Whether this was done with this config; refuses another one, unless it asks for more of what grows."""
    if entry not in before or not all(path.exists() for path in outputs([entry] if entry else [])):
        return False
    known = before[entry]
    larger = [key for key in grows if _is_larger(config.get(key), known.get(key))]
    differences = _differences(known, config, names=({**known, **config}.keys() - {*larger}))
    if differences:
        where = f" at {entry}" if entry else ""
        raise FluxSaeError(f"{name} is complete{where} with other settings: {differences}. {_REMEDY}")
    return not larger


def _is_larger(new: Any, old: Any) -> bool:
    return isinstance(new, int) and isinstance(old, int) and new > old


def _check_needs(run: RunFolder, name: str, entries: Sequence[str]) -> None:
    """Refuses files of a stage that is out of date; a run without records of earlier stages was made by other means."""
    recorded = run.load_info().stages if run.exists() else {}
    for needed in _NEEDS.get(name, ()):
        is_begun = any(stage in recorded for stage in STAGES[: list[str](STAGES).index(needed)])
        record = _recorded(run, needed, by_name=needed in _BY_NAME)
        missing = record is None or (needed in _BY_NAME and not {*entries} <= record.config.keys())
        if is_begun and missing:
            raise FluxSaeError(
                f"{name} needs {needed}, which is not complete in {run.path}: it was stopped, or an earlier stage was "
                f"run again after it. Run `python -m train.{needed} --run {run.path}` first."
            )


def _recorded(run: RunFolder, name: str, *, by_name: bool) -> StageRecord | None:
    record = run.load_info().stages.get(name) if run.exists() else None
    if record is None:
        return None
    if not by_name:
        return replace(record, config=renamed(name, record.config))
    return replace(record, config=_entries(run, name, record.config))


def _entries(run: RunFolder, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's config by hook point or SAE; runs of before variants had one config for all of their hook points."""
    if all(isinstance(own, Mapping) for own in config.values()):
        # A number of features was one value before sweeps took several.
        one_value = {"n_features"} if name == "fit" else set()
        return {
            entry: {key: _listed(value) if key in one_value else value for key, value in renamed(name, own).items()}
            for entry, own in config.items()
        }
    own_keys = _PER_ENTRY.get(name, {})
    shared = renamed(name, {key: value for key, value in config.items() if key not in own_keys})
    names = next((list(config[key]) for key in own_keys), run.load_info().hookpoints)
    return {entry: shared | {new: config[old][entry] for old, new in own_keys.items()} for entry in names}


_PER_ENTRY = {"score": {"saes": "sae"}, "demos": {"features": "features"}}
"""Values that older configs held by hook point, and what they are called in an entry."""
_BY_NAME = ("collect", "fit", "score", "analyze", "select", "directions", "render", "demos")
_REMEDY = "Pass --force to do it again, or name another --run."


def start_over(run: RunFolder, name: str, entries: Iterable[str] | None = None) -> None:
    """Says in run.json that a stage (or some entries of its config) is complete no longer, nor is any later one.

    Called when `--force` begins to delete: a run that is stopped then continues without it.
    """
    if not run.exists():
        return
    gone = None if entries is None else set(entries)
    record = _recorded(run, name, by_name=gone is not None)
    info = run.load_info().without_stages([name])
    if gone is not None and record is not None:
        kept = {entry: own for entry, own in record.config.items() if entry not in gone}
        info = info.with_stage(name, replace(record, config=kept))
    run.save_info(info)
    forget_later(run, name, gone)


def forget_later(run: RunFolder, name: str, entries: Iterable[str] | None = None) -> None:
    """Says in run.json that the stages after this one are complete no longer, for some hook points or SAEs or for all.

    What a stage makes for all of them together (the images' embeddings) stays where entries are given.
    """
    info, gone = run.load_info(), None if entries is None else set(entries)
    later = [stage for stage in STAGES[list[str](STAGES).index(name) + 1 :] if stage in info.stages]
    if gone is None:
        run.save_info(info.without_stages(later))
        return
    for stage in (stage for stage in later if stage in _BY_NAME):
        record = info.stages[stage]
        # What is collected is named by hook point alone; every SAE there comes later.
        kept = {
            entry: own
            for entry, own in _entries(run, stage, record.config).items()
            if not gone & {entry, entry.partition("@")[0] if name == "collect" else entry}
        }
        info = info.with_stage(stage, replace(record, config=kept))
    run.save_info(info)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], *, names: Iterable[str]) -> str:
    differing = [name for name in {**old, **new} if name in names and old.get(name) != new.get(name)]
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
