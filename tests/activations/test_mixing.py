"""Shards and the mixing buffer: every row recoverable, every order repeatable, every fault told in words."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae import files
from fluxsae.activations.mixing import MixingBuffer, mixing_buffer
from fluxsae.activations.shards import ActivationManifest, ShardFolder, ShardWriter
from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings

MANIFEST = ActivationManifest(
    hookpoint="transformer_blocks.1.ff",
    d_model=4,
    flux_id="tiny",
    flux_revision=None,
    settings=GenerationSettings(height=32, width=32),
    steps=(1, 3),
    sigmas=(0.9, 0.4),
    n_tokens=16,
    tokens_per_image=5,
    n_images=23,
    images_per_shard=4,
    prompts_hash="abc",
    seed=0,
    held_out_every=5,
)


def rows_of(manifest: ActivationManifest, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that say who they are: (image, step position, token, 1)."""
    ids = torch.tensor(manifest.image_ids(shard))
    n_steps, n_tokens = len(manifest.steps), manifest.tokens_per_image
    index = torch.stack([torch.randperm(manifest.n_tokens)[:n_tokens] for _ in range(len(ids) * n_steps)])
    index = index.view(len(ids), n_steps, n_tokens).to(torch.int32)
    tokens = torch.ones(len(ids), n_steps, n_tokens, manifest.d_model)
    tokens[..., 0] = ids[:, None, None]
    tokens[..., 1] = torch.arange(n_steps)[None, :, None]
    tokens[..., 2] = index
    return tokens.to(torch.bfloat16), index


def write_all(path: Path, manifest: ActivationManifest = MANIFEST) -> ShardFolder:
    writer = ShardWriter(path, manifest)
    for shard in writer.missing():
        writer.write(shard, *rows_of(manifest, shard))
    return ShardFolder(path)


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    return write_all(tmp_path / "acts")


def test_every_row_tells_its_image_step_and_token(folder: ShardFolder) -> None:
    seen = []
    for image_id, tokens, index in folder.iter_images("all"):
        assert (tokens[..., 0] == image_id).all()
        assert torch.equal(tokens[..., 2].to(torch.int32), index)
        seen.append(image_id)
    assert seen == list(range(23))


def test_splits_share_no_image_and_cover_all(folder: ShardFolder) -> None:
    train, held_out = ({i for i, _, _ in folder.iter_images(split)} for split in ("train", "held_out"))
    assert held_out == {4, 9, 14, 19}
    assert train | held_out == set(range(23))
    assert not train & held_out


@pytest.mark.parametrize("buffer_rows", [1, 10_000_000])
def test_an_epoch_brings_every_training_row_once_but_for_the_last_partial_batch(
    folder: ShardFolder, buffer_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxsae.activations.mixing._FEWEST_SHUFFLE_BYTES", 1)
    buffer = mixing_buffer(folder, batch_size=7, buffer_bytes=buffer_rows * 8)
    rows = torch.cat(list(buffer.batches(0)))
    assert len(rows) == 7 * buffer.n_batches == 19 * 2 * 5 // 7 * 7
    assert len(set(map(tuple, rows.float().tolist()))) == len(rows)
    assert not set(rows[:, 0].tolist()) & {4.0, 9.0, 14.0, 19.0}


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 26), st.sampled_from([40, 90, 10_000]))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_a_pure_function_of_seed_epoch_and_cursor(
    tmp_path_factory: pytest.TempPathFactory, seed: int, epoch: int, cursor: int, buffer_rows: int
) -> None:
    folder = shared_folder(tmp_path_factory)

    def make() -> MixingBuffer:
        buffer = mixing_buffer(folder, batch_size=7, seed=seed)
        buffer._buffer_rows = buffer_rows
        return buffer

    whole = list(make().batches(epoch))
    tail = list(make().batches(epoch, cursor=cursor))
    assert len(tail) == len(whole) - cursor
    assert all(torch.equal(a, b) for a, b in zip(whole[cursor:], tail, strict=True))


_SHARED: list[ShardFolder] = []


def shared_folder(factory: pytest.TempPathFactory) -> ShardFolder:
    if not _SHARED:
        _SHARED.append(write_all(factory.mktemp("shared")))
    return _SHARED[0]


def test_epochs_and_seeds_differ_in_order(folder: ShardFolder) -> None:
    a = mixing_buffer(folder, batch_size=50, seed=0)
    b = mixing_buffer(folder, batch_size=50, seed=1)
    first = next(a.batches(0))
    assert not torch.equal(first, next(a.batches(1)))
    assert not torch.equal(first, next(b.batches(0)))


def test_ranks_together_see_the_batch_of_one_process(folder: ShardFolder) -> None:
    whole = next(mixing_buffer(folder, batch_size=8).batches(2))
    parts = [next(mixing_buffer(folder, batch_size=8, rank=r, world_size=2).batches(2)) for r in range(2)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("buffer_rows", [40, 10_000])
@pytest.mark.parametrize("cursor", [0, 3])
def test_each_process_reads_its_own_rows_alone(folder: ShardFolder, buffer_rows: int, cursor: int) -> None:
    read: list[list[tuple[float, ...]]] = []
    for rank in range(4):
        buffer = mixing_buffer(folder, batch_size=8, rank=rank, world_size=4)
        buffer._buffer_rows = buffer_rows
        asked: list[torch.Tensor] = []
        plain = buffer._reader.rows

        def noted(*args: Any, asked: list[torch.Tensor] = asked, plain: Any = plain, **options: Any) -> torch.Tensor:
            asked.append(plain(*args, **options))
            return asked[-1]

        buffer._reader.rows = noted  # type: ignore[method-assign]
        used = torch.cat(list(buffer.batches(1, cursor=cursor)))
        read.append(sorted(map(tuple, torch.cat(asked).float().tolist())))
        assert read[-1] == sorted(map(tuple, used.float().tolist()))
    assert len({row for rows in read for row in rows}) == sum(map(len, read)) == 8 * (buffer.n_batches - cursor)


def test_the_order_is_named_by_what_decides_it(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsae.activations.mixing._FEWEST_SHUFFLE_BYTES", 1)
    sizes = (320, 1040, 10**6, 10**9)  # bytes; rows of 8 bytes, 190 of them
    buffers = {size: mixing_buffer(folder, batch_size=10, buffer_bytes=size) for size in sizes}
    first = {size: torch.cat(list(buffer.batches(0))) for size, buffer in buffers.items()}
    for a in sizes:
        for b in sizes:
            assert torch.equal(first[a], first[b]) == (buffers[a].order == buffers[b].order)
    assert mixing_buffer(folder, batch_size=10, seed=1).order != mixing_buffer(folder, batch_size=10).order


def test_only_the_asked_steps_are_read(folder: ShardFolder) -> None:
    buffer = mixing_buffer(folder, batch_size=5, steps=[3])
    assert set(torch.cat(list(buffer.batches(0)))[:, 1].tolist()) == {1.0}
    with pytest.raises(FluxSaeError, match=r"Steps \[2\] were not collected"):
        mixing_buffer(folder, batch_size=5, steps=[2])


def test_data_that_fits_is_read_once_for_all_epochs(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = mixing_buffer(folder, batch_size=10)
    list(buffer.batches(0))
    monkeypatch.setattr("fluxsae.activations.shards.load_tensors", lambda path: pytest.fail(f"{path} was read again"))
    list(buffer.batches(1))


# Writing


def test_a_writer_made_again_has_only_the_gaps_to_fill(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, MANIFEST)
    writer.write(2, *rows_of(MANIFEST, 2))
    assert ShardWriter(tmp_path, MANIFEST).missing() == [0, 1, 3, 4, 5]
    assert ShardWriter(tmp_path, MANIFEST, rank=1, world_size=2).missing() == [1, 3, 5]


def test_other_activations_are_never_mixed_in(folder: ShardFolder) -> None:
    with pytest.raises(FluxSaeError, match="prompts_hash abc instead of def"):
        ShardWriter(folder.path, replace(MANIFEST, prompts_hash="def"))


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    huge = replace(MANIFEST, n_images=10**9)
    with pytest.raises(FluxSaeError, match="GB are free"):
        ShardWriter(tmp_path / "acts", huge)
    assert not (tmp_path / "acts").exists()


def test_a_disk_that_fills_up_keeps_the_shards_that_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, MANIFEST)
    writer.write(0, *rows_of(MANIFEST, 0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(FluxSaeError, match="disk is full"):
            writer.write(1, *rows_of(MANIFEST, 1))
    assert ShardWriter(tmp_path, MANIFEST).missing() == [1, 2, 3, 4, 5]


def test_the_estimate_is_what_the_shards_weigh(folder: ShardFolder) -> None:
    weight = sum(shard.path.stat().st_size for shard in folder.shards)
    headers = sum(8 + int.from_bytes(shard.path.read_bytes()[:8], "little") for shard in folder.shards)
    assert weight - headers == MANIFEST.bytes_on_disk


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_mixing import MANIFEST, rows_of
from fluxsae.activations.shards import ShardWriter
writer = ShardWriter(Path(sys.argv[1]), MANIFEST)
for shard in writer.missing():
    torch.manual_seed(shard)
    writer.write(shard, *rows_of(MANIFEST, shard))
    print(shard, flush=True)
"""


def test_a_writer_killed_at_any_moment_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = _KILLED.format(tests=str(Path(__file__).parent))

    def write(path: Path, *, kill_after: float | None = None) -> None:
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if kill_after is not None:
            process.stdout.readline()
            time.sleep(kill_after)
            os.kill(process.pid, signal.SIGKILL)
        process.wait()

    write(tmp_path / "whole")
    write(tmp_path / "killed", kill_after=0.0)
    write(tmp_path / "killed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# Faults


def test_a_missing_shard_is_named(folder: ShardFolder) -> None:
    folder.shards[3].path.unlink()
    with pytest.raises(FluxSaeError, match=r"shard-00003\.safetensors is missing"):
        mixing_buffer(folder, batch_size=4)


@pytest.mark.parametrize("n_bytes", [0, 100, 400])
def test_a_cut_off_shard_is_named(folder: ShardFolder, n_bytes: int) -> None:
    path = folder.shards[1].path
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(FluxSaeError, match=r"shard-00001\.safetensors is not a whole"):
        mixing_buffer(folder, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hookpoint": "transformer_blocks.2.ff"}, r"has hookpoint transformer_blocks\.2\.ff"),
        ({"d_model": 8}, "has d_model 8"),
        ({"prompts_hash": "other"}, "has dataset"),
    ],
)
def test_a_shard_from_elsewhere_is_refused(
    folder: ShardFolder, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    other = write_all(tmp_path / "other", replace(MANIFEST, **changes))  # type: ignore[arg-type]
    shutil.copy(other.shards[2].path, folder.shards[2].path)
    with pytest.raises(FluxSaeError, match=message):
        folder.check_complete()


def test_a_folder_of_another_hook_point_or_width_is_refused(folder: ShardFolder) -> None:
    with pytest.raises(FluxSaeError, match=r"not of transformer_blocks\.15\.ff"):
        folder.check_complete(hookpoint="layer15")
    with pytest.raises(FluxSaeError, match="Use an SAE with d_model 4"):
        folder.check_complete(d_model=3072)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=r"holds no activations\. .*`python -m train\.collect`"):
        mixing_buffer(tmp_path, batch_size=4)


def test_too_few_rows_for_a_batch_are_refused(folder: ShardFolder) -> None:
    with pytest.raises(FluxSaeError, match="190 token rows, fewer than one batch of 191"):
        mixing_buffer(folder, batch_size=191)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(folder: ShardFolder) -> None:
    with pytest.raises(FluxSaeError, match="multiple of the 3 processes"):
        mixing_buffer(folder, batch_size=8, world_size=3)
