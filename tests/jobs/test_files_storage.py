"""Files on disk and in S3: what is stored comes back, what failed leaves nothing, and every failure has its name."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import structlog

from gateway import GatewayError, Unavailable
from gateway_plugins.jobs.settings import Files
from gateway_plugins.jobs.storage import PART, MissingError, Storage
from tests.jobs.s3 import s3_server
from tests.tools import free_port

IN_S3 = (pytest.mark.full, pytest.mark.timeout(400))  # the server is installed first
LOG = structlog.get_logger("test")


def on_disk(folder):
    return Storage(Files(), SimpleNamespace(data_dir=folder, log=LOG))


def in_s3(endpoint, prefix="some/where"):
    settings = Files(storage=f"s3://files/{prefix}", endpoint=endpoint, access_key_id="id", secret_access_key="secret")
    return Storage(settings, SimpleNamespace(data_dir=None, log=LOG))


@pytest.fixture(params=["disk", pytest.param("s3", marks=IN_S3)])
def storage(request, tmp_path):
    if request.param == "disk":
        return on_disk(tmp_path)
    return in_s3(request.getfixturevalue("s3"), prefix=tmp_path.name)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as endpoint:
        yield endpoint


async def repeated(piece, times, failure=None):
    for _ in range(times):
        yield piece
    if failure is not None:
        raise failure


async def whole(storage, key, size, start=0):
    return b"".join([piece async for piece in storage.read(key, size, start)])


@pytest.mark.parametrize("size", [0, 1, 65536, PART * 2 + 12345])
async def test_what_is_stored_comes_back(storage, size):
    """Of any size, whole and in parts."""
    content = os.urandom(size)

    async def pieces():
        for at in range(0, size, 100_000):
            yield content[at : at + 100_000]

    await storage.put("file-1", pieces())
    assert await whole(storage, "file-1", size) == content
    if size > 10:
        assert await storage.range("file-1", 5, 10) == content[5:15]


async def test_an_upload_that_fails_leaves_nothing(storage, tmp_path):
    """What its sender raises is raised, and there are no bytes of it."""
    with pytest.raises(ZeroDivisionError):
        await storage.put("file-1", repeated(b"x" * 100_000, 120, ZeroDivisionError()))
    with pytest.raises(MissingError):
        await storage.range("file-1", 0, 1)
    assert [*tmp_path.rglob("file-1*")] == []


async def test_one_file_replaces_another_of_its_name(storage):
    await storage.put("file-1", repeated(b"a", 1))
    await storage.put("file-1", repeated(b"b", 1))
    assert await whole(storage, "file-1", 1) == b"b"


async def test_what_is_deleted_is_gone_and_may_be_deleted_again(storage):
    await storage.put("file-1", repeated(b"a", 1))
    await storage.delete("file-1")
    await storage.delete("file-1")
    with pytest.raises(MissingError):
        await storage.range("file-1", 0, 1)


async def test_a_file_that_lost_its_end_is_told_as_lost(storage):
    """Not as a shorter one."""
    await storage.put("file-1", repeated(b"abc", 1))
    for start, length in ((0, 4), (2, 5), (3, 1), (100, 1)):
        with pytest.raises(MissingError):
            await storage.range("file-1", start, length)


async def test_what_a_killed_upload_left_goes_with_its_file(tmp_path):
    """The store's half-written parts, which nobody ever lists: of each try one, and of some there is none any more."""
    storage = on_disk(tmp_path)
    await storage.put("file-1", repeated(b"a", 1))
    for number in (1, 3, 17, 33):
        (tmp_path / "files" / f"file-1#{number}").write_bytes(b"half")
    await storage.delete("file-1")
    assert [*(tmp_path / "files").iterdir()] == []


async def test_nobody_else_on_the_machine_reads_files(tmp_path):
    storage = on_disk(tmp_path)
    await storage.put("file-1", repeated(b"a", 1))
    assert (tmp_path / "files").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.getuid() != 0, reason="a disk is filled by mounting a small one, which only root may")
async def test_a_full_disk_is_told_as_one(tmp_path):
    """507 `storage_full`, which SDKs don't try again; what was there stays, and nothing is left of the upload."""
    folder = tmp_path / "files"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a disk is filled by mounting a small one, which this machine refuses")
    try:
        storage = on_disk(tmp_path)
        await storage.put("file-1", repeated(b"a", 1))
        with pytest.raises(GatewayError) as told:
            await storage.put("file-2", repeated(b"x" * 100_000, 120))
        assert (told.value.status_code, told.value.error_code, told.value.should_retry) == (507, "storage_full", False)
        assert [p.name for p in folder.iterdir()] == ["file-1"]
        assert await whole(storage, "file-1", 1) == b"a"
    finally:
        subprocess.run(["umount", folder], check=True)


async def test_a_folder_that_cannot_be_written_is_told_as_unavailable(tmp_path):
    (tmp_path / "files").write_text("a file where the folder should be")
    storage = on_disk(tmp_path)
    with pytest.raises(Unavailable) as told:
        await storage.put("file-1", repeated(b"a", 1))
    assert told.value.error_code == "storage_unavailable"
    assert str(tmp_path) not in told.value.message


@pytest.mark.full
async def test_an_s3_that_is_away_is_told_as_unavailable():
    with pytest.raises(Unavailable) as told:
        await in_s3(f"http://127.0.0.1:{free_port()}").put("file-1", repeated(b"a", 1))
    assert told.value.error_code == "storage_unavailable"
    assert "127.0.0.1" not in told.value.message


@pytest.mark.full
@pytest.mark.timeout(400)
async def test_a_bucket_that_is_not_there_is_told_as_unavailable(s3):
    settings = Files(storage="s3://nowhere", endpoint=s3, access_key_id="id", secret_access_key="secret")
    storage = Storage(settings, SimpleNamespace(data_dir=None, log=LOG))
    with pytest.raises(Unavailable):
        await storage.put("file-1", repeated(b"a", 1))
