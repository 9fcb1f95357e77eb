"""A grown checkpoint written to disk is the view, to the bit; whatever happens, a directory that
calls itself a checkpoint is one, and the base stays as it was."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.checkpoint.verify import verify
from megatron_growth.checkpoint.write import (
    Crew,
    Draft,
    Written,
    data_files,
    grow,
    placing,
    site,
)
from megatron_growth.errors import CheckpointError
from tests.checkpoint import bases
from tests.checkpoint.bases import COMMON_STATE, Model
from tests.checkpoint.loading import load_all
from tests.checkpoint.test_view import CASES, GRIDS

STATES = ("param", "exp_avg", "exp_avg_sq")
BOTH: dict[str, Any] = {"depth": {"factor": 2}, "width": {"factor": 2}}
SMALL = Model(layers=2, experts=2, mtp=False, states=STATES)
NAME = "iter_0000007"
MODES = ("copy", "link", "symlink")
REPOSITORY = Path(__file__).resolve().parents[2]


def base_of(folder: Path, model: Model, grid: Any = None, **options: Any) -> Path:
    """A Megatron checkpoint directory."""
    state = {**bases.tensors(model), **bases.objects(model)}
    directory = bases.save(folder / NAME, state, grid or bases.megatron(), **options)
    (folder / TRACKER).write_text("7")
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def write(
    base: Path, save: Path, growth: dict[str, Any], mode: Any = "copy", **how: Any
) -> Written:
    draft = Draft(base / NAME, GrowthConfig.model_validate(growth), mode)
    with Crew(how.pop("workers", 1)) as crew:
        written = grow(draft, save, crew=crew, **how)
    assert written is not None
    return written


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def data(save: Path) -> dict[str, str]:
    """The same without the manifest, which has a date."""
    return {name: h for name, h in contents(save).items() if name != manifest.MANIFEST}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("small base"), SMALL)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files of a few records each."""
    monkeypatch.setattr(data_files, "FILE_BYTES", 20_000)


# -- three roads, one checkpoint

ROADS = [(case, "as Megatron", mode) for case in CASES for mode in ("copy", "link")] + [
    (case, grid, mode)
    for case in ("both, with the plain bf16 optimizer", "per-layer keys, dense first")
    for grid in ("whole tensors", "uneven")
    for mode in MODES
]


@pytest.mark.parametrize(("case", "grid", "mode"), ROADS)
def test_what_is_written_is_what_the_view_shows(
    case: str, grid: str, mode: str, tmp_path: Path
) -> None:
    model, growth, _ = CASES[case]
    base = base_of(tmp_path / "base", model, GRIDS[grid])
    before = contents(base)
    want, want_objects = load_all(
        GrowthStorageReader(base / NAME, GrowthConfig.model_validate(growth))
    )
    written = write(base, tmp_path / "grown", growth, mode)
    got, got_objects = load_all(FileSystemReader(written.directory))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert all(got[key].dtype == want[key].dtype for key in want)
    assert got_objects.keys() == want_objects.keys()
    assert all(got_objects[k] == want_objects[k] for k in want_objects if k != COMMON_STATE)
    one, other = (o[COMMON_STATE][0] for o in (got_objects, want_objects))
    assert vars(one.pop("args")) == vars(other.pop("args"))
    assert one == other
    assert sum(tensor.numel() for tensor in got.values()) > 500
    assert contents(base) == before
    result = verify(base / NAME, written.directory)
    assert result.problems == ()
    assert result.elements == sum(tensor.numel() for tensor in want.values())


def test_a_copy_stands_alone_and_every_place_has_bytes_of_its_own(small, tmp_path):
    written = write(small, tmp_path / "grown", BOTH)
    assert written.num_placed == written.placed == 0
    metadata = FileSystemReader(written.directory).read_metadata()
    ranges = sorted((i.relative_path, i.offset, i.length) for i in metadata.storage_data.values())
    for one, other in pairwise(ranges):
        assert one[0] != other[0] or one[1] + one[2] <= other[1]
    assert len(ranges) > 200


@pytest.mark.parametrize("growth", [{"depth": {}}, {"depth": {"new_layer_init": "zero_output"}}])
def test_a_link_of_depth_growth_writes_next_to_nothing(small, growth, tmp_path):
    written = write(small, tmp_path / "grown", growth, "link")
    base_bytes = sum(p.stat().st_size for p in (small / NAME).glob("*.distcp"))
    assert written.placed == base_bytes
    assert written.written < base_bytes / 3  # the common state, and one zero of each shape
    assert written.read < base_bytes / 10


def test_a_link_writes_each_rescaled_moment_once_for_all_that_share_it(small, tmp_path):
    growth = {"width": {"factor": 3, "noise": {"experts": 0, "router": 0}}}
    linked = write(small, tmp_path / "linked", growth, "link")
    copied = write(small, tmp_path / "copied", growth)
    assert linked.written < copied.written / 3
    assert verify(small / NAME, linked.directory).passed


def test_each_byte_of_the_base_is_read_once(small, tmp_path):
    written = write(small, tmp_path / "grown", BOTH)
    source = SourceCheckpoint(small / NAME)
    storage = source.metadata.storage_data
    assert written.read == sum(i.length for k, i in storage.items() if k.fqn != COMMON_STATE)


# -- any number of workers


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_the_bytes_do_not_depend_on_the_workers(mode, small, tmp_path):
    one = write(small, tmp_path / "1", BOTH, mode)
    write(small, tmp_path / "3", BOTH, mode, workers=3)
    assert one.num_written > 5
    assert data(tmp_path / "1") == data(tmp_path / "3")


@pytest.mark.slow
def test_the_ranks_of_a_torchrun_write_the_same(small, tmp_path):
    settings = ["--set", "growth.depth.factor=2", "--set", "growth.width.factor=2"]
    argv = ["grow", "--load", str(small), *settings, "--json", "--save"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    ours = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*torchrun, "2", "-m", "megatron_growth", *argv, str(tmp_path / "ranks"), "--workers", "2"],
        env=ours, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert json.loads(done.stdout)["num_written"] == 1
    write(small, tmp_path / "alone", BOTH)
    assert data(tmp_path / "ranks") == data(tmp_path / "alone")
    again = subprocess.run(
        [*torchrun, "2", "-m", "megatron_growth", *argv, str(tmp_path / "ranks")],
        env=ours, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = [line for line in again.stderr.splitlines() if line.startswith("megatron-growth: error")]
    assert again.returncode != 0
    assert len(said) == 1
    assert "already holds a checkpoint" in said[0]


def test_jobs_are_dealt_by_weight():
    from megatron_growth.checkpoint.write.crew import dealt

    lanes = dealt([5, 1, 1, 1, 4, 3], lambda job: job, 3)
    assert sorted(map(sum, lanes)) == [5, 5, 5]
    assert sorted(job for lane in lanes for job in lane) == [1, 1, 1, 3, 4, 5]


def test_a_worker_that_fails_fails_the_growth_with_its_message(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "FILE_BYTES", 20_000)
    shutil.copytree(small, tmp_path / "base")
    file = sorted((tmp_path / "base" / NAME).glob("*.distcp"))[1]
    growth = GrowthConfig.model_validate(BOTH)
    draft = Draft(tmp_path / "base" / NAME, growth, "copy")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"was cut short|was changed"):
        grow(draft, tmp_path / "grown", crew=Crew(3))
    assert not (tmp_path / "grown" / TRACKER).exists()


# -- links


def test_a_linked_checkpoint_survives_its_base(tmp_path):
    base = base_of(tmp_path / "base", SMALL)
    written = write(base, tmp_path / "grown", BOTH, "link")
    before = load_all(FileSystemReader(written.directory))[0]
    shutil.rmtree(base)
    after = load_all(FileSystemReader(written.directory))[0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_save_into_a_linked_checkpoint_does_not_reach_the_base(tmp_path):
    """Megatron may save an iteration again; it writes to names of its own."""
    base = base_of(tmp_path / "base", SMALL)
    before = contents(base)
    written = write(base, tmp_path / "grown", BOTH, "link")
    names = {path.name for path in (base / NAME).glob("*.distcp")}
    assert names
    assert not names & {path.name for path in written.directory.glob("base*")}
    writer = dcp.FileSystemWriter(written.directory, thread_count=3)
    dcp.save({"x": torch.zeros(1000), "y": torch.ones(1000)}, storage_writer=writer, no_dist=True)
    assert contents(base) == before


def test_a_link_across_file_systems_is_refused_with_what_is_left(small, tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    save = elsewhere / f"growth-{os.getpid()}"
    try:
        message = refused(small, save, mode="link")
        assert "one file system" in message
        assert "use --mode copy, or --mode symlink" in message
        assert verify(small / NAME, write(small, save, BOTH, "symlink").directory).passed
    finally:
        shutil.rmtree(save, ignore_errors=True)


def test_a_refused_link_leaves_the_way_free_for_a_copy(small, tmp_path, monkeypatch):
    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patched:
        patched.setitem(placing._WAYS, "link", other_file_system)
        assert "use --mode copy" in refused(small, tmp_path / "grown", mode="link")
    assert verify(small / NAME, write(small, tmp_path / "grown", BOTH).directory).passed


def test_a_file_system_without_shared_extents_says_so(small, tmp_path):
    if _shares_extents(tmp_path):
        written = write(small, tmp_path / "grown", BOTH, "reflink")
        assert verify(small / NAME, written.directory).passed
    else:
        message = refused(small, tmp_path / "grown", mode="reflink")
        assert "XFS or Btrfs" in message
        assert "use --mode copy, or --mode link" in message


def _shares_extents(folder: Path) -> bool:
    (folder / "one").write_bytes(b"x")
    command = ["cp", "--reflink=always", folder / "one", folder / "other"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


# -- damage, change, lack of space


def refused(base: Path, save: Path, **how: Any) -> str:
    """The message of a growth that must not succeed; nothing there may call itself a checkpoint,
    and the base must be as it was."""
    before = contents(base)
    with pytest.raises(CheckpointError) as refusal:
        write(base, save, BOTH, **how)
    message = str(refusal.value)
    assert "\n" not in message
    assert not (save / TRACKER).exists()
    assert not list(save.glob("iter_*"))
    assert contents(base) == before
    return message


def test_a_base_that_changes_while_it_is_read_is_refused(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "base")
    file = sorted((tmp_path / "base" / NAME).glob("*.distcp"))[0]
    right = data_files.write_data_file

    def touched(*args: Any, **kwargs: Any) -> Any:
        os.utime(file, ns=(1, 1))
        return right(*args, **kwargs)

    monkeypatch.setattr("megatron_growth.checkpoint.write.draft.write_data_file", touched)
    assert "was changed while it was read" in refused(tmp_path / "base", tmp_path / "grown")


def flipped(base: Path, offset: float = 0.5) -> Path:
    """A bit of a tensor's values flipped in one file of a copy of a base."""
    source = SourceCheckpoint(base / NAME)
    key = "optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc1.weight"
    index = next(i for i in source.metadata.storage_data if i.fqn == key)
    info = source.metadata.storage_data[index]
    path = base / NAME / info.relative_path
    content = bytearray(path.read_bytes())
    record = bytes(content[info.offset : info.offset + info.length])
    values = source.metadata.state_dict_metadata[key].chunks[0].sizes.numel() * 4
    start = record.rindex(b"PK\x01\x02") - values  # within the record, not in its padding
    place = info.offset + max(record.index(b"data/0") + 70, min(start, info.length // 2))
    content[place] ^= 0x10
    path.write_bytes(content)
    return path


def test_a_flipped_bit_is_found_by_the_records_checksums(small, tmp_path):
    shutil.copytree(small, tmp_path / "base")
    flipped(tmp_path / "base")
    assert "fails its checksum" in refused(tmp_path / "base", tmp_path / "grown", checksum=True)


def test_a_shifted_master_is_found_by_a_copy_and_by_a_link_with_checksum(tmp_path):
    tensors = bases.tensors(SMALL)
    key = "optimizer.state.param.decoder.layers.self_attention.linear_qkv.weight"
    tensors[key] = tensors[key].roll(1, -1)
    bases.save(tmp_path / "base" / NAME, tensors | bases.objects(SMALL), bases.megatron())
    assert "does not round to" in refused(tmp_path / "base", tmp_path / "copied")
    said = refused(tmp_path / "base", tmp_path / "linked", mode="link", checksum=True)
    assert "does not round to" in said


def test_few_files_are_open_at_a_time(tmp_path):
    """A base has a file or two for each rank; a process may open 1024."""
    base = base_of(tmp_path / "base", SMALL, num_files=200)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, before[1]))
    try:
        written = write(base, tmp_path / "grown", BOTH)
        open_now = len(os.listdir("/proc/self/fd"))
        write(base, tmp_path / "again", BOTH)
        assert len(os.listdir("/proc/self/fd")) == open_now
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert verify(base / NAME, written.directory).passed


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_checksums_of_a_sound_base_pass(small, mode, tmp_path):
    assert write(small, tmp_path / "grown", BOTH, mode, checksum=True).written


def test_megatrons_integrity_manifest_is_checked_and_written_again(small, tmp_path):
    from megatron.core.dist_checkpointing.validation import (
        save_integrity_manifest,
        verify_integrity_manifest,
    )

    base = tmp_path / "base"
    shutil.copytree(small, base)
    save_integrity_manifest(str(base / NAME))
    for mode in ("copy", "link"):
        written = write(base, tmp_path / mode, BOTH, mode)
        verify_integrity_manifest(str(written.directory))
        listed = json.loads((written.directory / "integrity.json").read_text())["files"]
        assert set(listed) == {p.name for p in written.directory.iterdir()} - {"integrity.json"}
    flipped(base)
    assert "as integrity.json says" in refused(base, tmp_path / "grown")


def test_a_full_file_system_leaves_no_checkpoint(small, tmp_path, monkeypatch):
    """A real one: a tmpfs smaller than what is to be written."""
    save = tmp_path / "full"
    save.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", save], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        assert "bytes free, but" in refused(small, save / "asked")
        monkeypatch.setattr(site.Site, "check_space", lambda self, nbytes: None)
        message = refused(small, save / "grown")
        assert "No space left on device" in message
        assert "--resume" in message
    finally:
        subprocess.run(["umount", save], check=True)


# -- interruptions


class Stopped(Exception):
    pass


def interrupted(base: Path, save: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> Path:
    """A growth that stopped after some data files; its working directory."""
    right, done = data_files.write_data_file, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        if len(done) == after:
            raise Stopped
        done.append(args)
        return right(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("megatron_growth.checkpoint.write.draft.write_data_file", stop)
        with pytest.raises(Stopped):
            write(base, save, BOTH)
    return save / f".growing-{NAME}"


@pytest.mark.usefixtures("many_files")
def test_an_interrupted_growth_goes_on_where_it_was(small, tmp_path, monkeypatch):
    work = interrupted(small, tmp_path / "grown", monkeypatch)
    finished = {path.name: path.stat().st_ino for path in work.glob("*.distcp")}
    assert "go on with --resume, or remove it" in refused(small, tmp_path / "grown")
    written = write(small, tmp_path / "grown", BOTH, resume=True)
    write(small, tmp_path / "whole", BOTH)
    assert data(tmp_path / "grown") == data(tmp_path / "whole")
    assert len(finished) == 3
    for name, inode in finished.items():
        assert (written.directory / name).stat().st_ino == inode


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("damage", ["cut", "gone", "index empty"])
def test_a_finished_file_that_was_damaged_is_written_again(damage, small, tmp_path, monkeypatch):
    work = interrupted(small, tmp_path / "grown", monkeypatch)
    file = sorted(work.glob("*.distcp"))[1]
    if damage == "cut":
        os.truncate(file, 100)
    elif damage == "gone":
        file.unlink()
    else:
        data_files.index_path(work, file.name).write_text("")
    write(small, tmp_path / "grown", BOTH, resume=True)
    write(small, tmp_path / "whole", BOTH)
    assert data(tmp_path / "grown") == data(tmp_path / "whole")


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("step", ["manifest", "rename"])
def test_a_growth_that_stops_at_its_last_step_is_not_written_again(
    step, small, tmp_path, monkeypatch
):
    right = Path.rename

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    def rename(path: Path, target: Path) -> Path:
        return stop() if target.name == NAME else right(path, target)  # type: ignore[func-returns-value]

    with monkeypatch.context() as patched:
        if step == "manifest":
            patched.setattr(manifest, "write", stop)
        else:
            patched.setattr(Path, "rename", rename)
        with pytest.raises(Stopped):
            write(small, tmp_path / "grown", BOTH)
    again = write(small, tmp_path / "grown", BOTH, resume=True)
    assert (again.read, again.written, again.num_written) == (0, 0, 0)
    write(small, tmp_path / "whole", BOTH)
    assert data(tmp_path / "grown") == data(tmp_path / "whole")


def test_a_checkpoint_that_comes_meanwhile_is_not_written_over(small, tmp_path, monkeypatch):
    right = data_files.write_data_file

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "grown" / NAME).mkdir()
        return right(*args, **kwargs)

    monkeypatch.setattr("megatron_growth.checkpoint.write.draft.write_data_file", meanwhile)
    with pytest.raises(CheckpointError, match=f"already holds {NAME}"):
        write(small, tmp_path / "grown", BOTH)
    assert not (tmp_path / "grown" / TRACKER).exists()


@pytest.mark.usefixtures("many_files")
def test_an_interrupted_growth_of_another_job_is_not_gone_on_with(small, tmp_path, monkeypatch):
    interrupted(small, tmp_path / "grown", monkeypatch)
    with pytest.raises(CheckpointError, match=r"of another job \(plan is not the same"):
        write(small, tmp_path / "grown", {**BOTH, "seed": 5}, resume=True)


def test_a_second_writer_is_refused_while_the_first_writes(small, tmp_path, monkeypatch):
    right, said = data_files.write_data_file, []

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        for resume in (False, True):
            with pytest.raises(CheckpointError) as refusal:
                write(small, tmp_path / "grown", BOTH, resume=resume)
            said.append(str(refusal.value))
        return right(*args, **kwargs)

    monkeypatch.setattr("megatron_growth.checkpoint.write.draft.write_data_file", meanwhile)
    written = write(small, tmp_path / "grown", BOTH)
    assert said
    assert all("another growth is being written" in message for message in said)
    assert verify(small / NAME, written.directory).passed
    assert not list((tmp_path / "grown").glob(".*"))


def test_a_whole_checkpoint_that_lacks_its_tracker_gets_it(small, tmp_path):
    """Between the rename and the tracker is the only moment at which both exist."""
    save = tmp_path / "grown"
    write(small, save, BOTH)
    before = data(save)
    (save / TRACKER).unlink()
    write(small, save, BOTH)
    assert data(save) == before


@pytest.mark.parametrize("there", [TRACKER, "iter_0000003", NAME])
def test_a_directory_that_holds_a_checkpoint_is_refused(there, small, tmp_path):
    (tmp_path / "grown").mkdir()
    if there == TRACKER:
        (tmp_path / "grown" / there).write_text("3")
    else:
        (tmp_path / "grown" / there).mkdir()
    with pytest.raises(
        CheckpointError, match=f"already holds.*{there}.*give --save a new directory"
    ):
        write(small, tmp_path / "grown", BOTH)


def test_a_file_in_the_way_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("")
    for save in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="is a file; give another directory"):
            write(small, save, BOTH)


def test_the_bases_own_directory_is_refused(small):
    for save in (small, small / NAME):
        with pytest.raises(CheckpointError, match="base's own directory"):
            write(small, save, BOTH)


KILLS = 50


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_kill_at_any_moment_leaves_a_checkpoint_or_none(mode, small, tmp_path, monkeypatch):
    """`kill -9` at file operations spread over the whole of a growth, with --resume in between."""
    monkeypatch.setattr(data_files, "FILE_BYTES", 20_000)
    before = contents(small)
    write(small, tmp_path / "whole", BOTH, mode)
    want, operations = data(tmp_path / "whole"), _operations(small, tmp_path / "counted", mode)
    assert operations > KILLS
    killed = complete = 0
    for number in range(KILLS):
        save = tmp_path / str(number)
        first, then = number / KILLS, (KILLS - number) / KILLS / 2
        for last in (int(first * operations), int(then * operations)):
            killed += _grown(small, save, mode, last)[1] == signal.SIGKILL
            if (save / TRACKER).exists():
                complete += 1
                assert data(save) == want
            for found in save.glob("iter_*"):  # whole, even if the tracker is still to come
                names = {f"{NAME}/{name}" for name in contents(found)}
                assert names >= set(want) - {TRACKER}
                extra = names - set(want)  # by which a resume knows it
                assert all(name.endswith((".index", "/job.json")) for name in extra)
        if not (save / TRACKER).exists():
            write(small, save, BOTH, mode, resume=True)
        assert data(save) == want
        shutil.rmtree(save)
    assert killed > KILLS, "the first time always, and mostly when it was resumed"
    assert complete < 2 * KILLS
    assert contents(small) == before


def _operations(base: Path, save: Path, mode: str) -> int:
    return _grown(base, save, mode, None)[0]


def _grown(base: Path, save: Path, mode: str, last: int | None) -> tuple[int, int]:
    """Grow in a child, which is killed before its file operation number `last`.

    Returns:
        How many file operations there were, and the signal that ended it, 0 for none.
    """
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event not in _FILE_EVENTS or not any(str(save) in str(one) for one in args):
                return
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        try:
            sys.addaudithook(hook)
            torch.set_num_threads(1)
            write(base, save, BOTH, mode, resume=True)
            os.write(write_end, str(count).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as pipe:
        return int(pipe.read() or 0), os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


# As Python's audit events name them.
_FILE_EVENTS = (
    "open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.scandir",
    "os.listdir", "os.truncate", "os.chmod",
)  # fmt: skip


# -- what a directory may look like


def test_spaces_a_read_only_base_and_many_files(tmp_path):
    base = base_of(tmp_path / "a base, with spaces", SMALL, num_files=300)
    assert len(list((base / NAME).glob("*.distcp"))) > 100
    for path in (*(base / NAME).iterdir(), base / NAME, base):
        path.chmod(path.stat().st_mode & ~0o222)
    for mode in ("copy", "link"):
        written = write(base, tmp_path / f"{mode} here", BOTH, mode)
        assert verify(base / NAME, written.directory).passed
    base.chmod(base.stat().st_mode | stat.S_IWUSR)
    (base / NAME).chmod((base / NAME).stat().st_mode | stat.S_IWUSR)


def test_other_files_are_named_and_left(small, tmp_path):
    shutil.copytree(small, tmp_path / "base")
    (tmp_path / "base" / NAME / "run_config.yaml").write_text("model: {}")
    written = write(tmp_path / "base", tmp_path / "grown", BOTH)
    assert written.left_out == ("run_config.yaml",)
    assert (written.directory / "metadata.json").read_text() == (
        small / NAME / "metadata.json"
    ).read_text()


def test_the_common_file_of_an_older_base_is_grown(tmp_path):
    state = {**bases.tensors(SMALL), **bases.objects(SMALL)}
    (common,) = state.pop(COMMON_STATE)
    bases.save(tmp_path / "base" / NAME, state, bases.megatron())
    torch.save(common, tmp_path / "base" / NAME / "common.pt")
    written = write(tmp_path / "base", tmp_path / "grown", BOTH)
    found = torch.load(written.directory / "common.pt", weights_only=False)
    assert (found["args"].num_layers, found["args"].num_experts) == (4, 4)
    assert verify(tmp_path / "base" / NAME, written.directory).passed


def test_a_manifest_names_its_base_wherever_it_is_read_from(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    write(Path(small.name), tmp_path / "grown", BOTH)
    assert (manifest.read(tmp_path / "grown") or {})["base"] == str(small)


def test_a_written_checkpoint_can_be_grown_again_and_remembers(small, tmp_path):
    first = write(small, tmp_path / "one", {"depth": {}}, "link")
    second = write(first.directory.parent, tmp_path / "two", {"width": {}}, "link")
    assert verify(first.directory, second.directory).passed
    written = manifest.read(tmp_path / "two") or {}
    assert written["ancestor"]["base"] == str(small)


@pytest.mark.slow
def test_chunks_over_two_and_files_over_four_gib(tmp_path):
    """Where 32 bits would overflow: read and written like any other."""
    size = (1 << 29) + 11
    row = torch.arange(size, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    big = {
        "embedding.word_embeddings.weight": row.repeat(3, 1),
        "output_layer.weight": row.flip(0)[None].contiguous(),
    }
    router = {f"decoder.layers.{bases.ROUTER}": torch.randn(2, 2, 4)}
    whole = bases.every([3, 1 << 40])
    bases.save(tmp_path / "base" / NAME, {**big, **router}, whole, num_files=1)
    written = write(tmp_path / "base", tmp_path / "grown", {"depth": {}})
    (file,) = (tmp_path / "base" / NAME).glob("*.distcp")
    assert file.stat().st_size > 1 << 32
    assert max(p.stat().st_size for p in written.directory.glob("*.distcp")) > 1 << 31
    loaded, _ = load_all(FileSystemReader(written.directory))
    for key, tensor in big.items():
        assert torch.equal(loaded[key].view(torch.int16), tensor.view(torch.int16))
