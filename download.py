"""Download the flower photographs of TensorFlow's tutorials."""

import contextlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import download_url

from cli_utils import DataError
from image_folders import list_images_by_class

FLOWER_PHOTOS_URL = "http://download.tensorflow.org/example_images/flower_photos.tgz"
FLOWER_PHOTOS_MD5 = "6f87fb78e9cc9ab41eff2015b380011d"
DOWNLOADED = ".downloaded"  # in the downloaded folder: the MD5 of its archive


def download_flower_photos(root: str | os.PathLike, url: str = FLOWER_PHOTOS_URL, md5: str = FLOWER_PHOTOS_MD5) -> None:
    """Download and unpack TensorFlow's flower_photos, 3,670 photographs (218 MB), as five class folders in `root`.

    The checksum is verified before unpacking, and `root` appears only when it is complete. Does nothing if it already
    holds this archive.

    Raises:
        DataError: `root` is a file, a mount point, the current folder or not empty; the archive is corrupt; or this
            version of Python cannot unpack it safely.
        OSError: there is no network, or the disk is full.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError("unpacking the archive safely requires Python 3.10.12, 3.11.4, 3.12 or newer")
    root = Path(root).resolve()  # keeps a link, and replaces its target
    if root.exists() and root.samefile(Path.cwd()):
        raise DataError(f"cannot download to {root}: it is the current folder; choose another one")
    mark = root / DOWNLOADED
    if mark.is_file() and mark.read_bytes() == md5.encode():
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"cannot download to {root}: not an empty folder; if it already holds the images, omit --download"
        )
    if os.path.ismount(root):
        raise DataError(f"cannot download to {root}: it is a mount point; choose a folder inside it")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        archive = Path(unfinished, "archive.tgz")
        unpacked = Path(unfinished, "unpacked")
        progress = sys.stderr if sys.stderr and sys.stderr.isatty() else io.StringIO()
        try:
            with contextlib.redirect_stderr(progress):
                download_url(url, unfinished, archive.name, md5)
        except (OSError, HTTPException) as error:
            raise OSError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
        except RuntimeError as error:
            raise DataError(
                f"{url}: the downloaded archive is corrupt or incomplete (its checksum is wrong)"
            ) from error
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise DataError(f"{url}: cannot unpack the archive: {error}") from error
        content = unpacked / "flower_photos"
        list_images_by_class(content, [])
        (content / DOWNLOADED).write_bytes(md5.encode())
        if root.exists():
            root.rmdir()
        shutil.move(content, root)
