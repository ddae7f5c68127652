"""The download of the flower photographs."""

import hashlib
import tarfile
from pathlib import Path

import pytest
from conftest import write_image

from cli_utils import DataError
from download import download_flower_photos


def make_archive(path: Path, extra: tarfile.TarInfo | None = None) -> str:
    """Create an archive laid out like flower_photos.tgz and return its MD5 checksum."""
    with tarfile.open(path, "w:gz") as tar:
        for name in ("daisy/a.png", "roses/b.png"):
            tar.add(write_image(path.parent / "source" / name), f"flower_photos/{name}")
        tar.add(write_image(path.parent / "source" / "c.png"), "flower_photos/LICENSE.txt")
        if extra:
            tar.addfile(extra)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("exists", [False, True])
def test_download(server, tmp_path, exists):
    folder, address = server
    md5 = make_archive(folder / "a.tgz")
    root = tmp_path / "new" / "flowers"
    if exists:
        root.mkdir(parents=True)
    download_flower_photos(root, f"{address}/a.tgz", md5)
    assert sorted(path.name for path in root.glob("[!.]*")) == ["LICENSE.txt", "daisy", "roses"]
    assert list(root.parent.iterdir()) == [root]
    (folder / "a.tgz").unlink()
    download_flower_photos(root, f"{address}/a.tgz", md5)  # a repeat downloads nothing
    with pytest.raises(DataError, match="not an empty folder"):
        download_flower_photos(root, f"{address}/a.tgz", "0" * 32)


def test_download_follows_a_symbolic_link(server, tmp_path):
    folder, address = server
    md5 = make_archive(folder / "a.tgz")
    for target in ("empty", "not there yet"):
        link = tmp_path / f"link to {target}"
        link.symlink_to(tmp_path / target)
        (tmp_path / "empty").mkdir(exist_ok=True)
        download_flower_photos(link, f"{address}/a.tgz", md5)
        assert link.is_symlink()
        assert (tmp_path / target / "daisy" / "a.png").is_file()


def test_download_into_the_current_folder_is_rejected(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the current folder"):
        download_flower_photos(".", f"{server[1]}/a.tgz", "0" * 32)


def test_failed_download_leaves_no_files(server, tmp_path):
    folder, address = server
    root = tmp_path / "new" / "flowers"
    make_archive(folder / "a.tgz")
    with pytest.raises(DataError, match="corrupt or incomplete"):
        download_flower_photos(root, f"{address}/a.tgz", "0" * 32)
    (folder / "b.tgz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot unpack"):
        download_flower_photos(root, f"{address}/b.tgz", hashlib.md5(b"not an archive").hexdigest())
    with pytest.raises(OSError, match=r"cannot download .*missing\.tgz"):
        download_flower_photos(root, f"{address}/missing.tgz", "0" * 32)
    with pytest.raises(OSError, match="cannot download"):
        download_flower_photos(root, "http://127.0.0.1:9/nothing.tgz", "0" * 32)
    assert list(root.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "link"),
    [("../../escaped", None), ("flower_photos/a", "/etc/passwd"), ("flower_photos/a", "../../../escaped")],
)
def test_hostile_archive_is_rejected(server, tmp_path, name, link):
    folder, address = server
    member = tarfile.TarInfo(name)
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    md5 = make_archive(folder / "a.tgz", extra=member)
    with pytest.raises(DataError, match="cannot unpack"):
        download_flower_photos(tmp_path / "new" / "flowers", f"{address}/a.tgz", md5)
    assert list((tmp_path / "new").iterdir()) == []
