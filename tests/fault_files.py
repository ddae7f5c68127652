"""Campaigns of files: mutated images, and what a stranger might send."""

import functools
import hashlib
import http.server
import io
import pickle
import random
import tarfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from fault_harness import Campaign, Child
from PIL import Image

from data_utils import DataError, download_flower_photos, read_class_indices, read_label_file, read_pickle
from model import WeightsError, load_model, load_pretrained, resnet18
from my_dataset import ImageError, read_image
from run_utils import read_checkpoint
from sample_flowers import draw_flower


def files(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """`rounds` mutated image files of seven formats: bytes changed, cut off, moved; and the sound ones."""
    originals = draw_originals()
    for name, content in originals.items():
        Path(name).write_bytes(content)
        campaign.expect("a sound file is used", outcome(Path(name)) == "used")
    batch = 100
    for start in range(0, rounds, batch):
        mutants = []
        for _ in range(min(batch, rounds - start)):
            name = generator.choice(list(originals))
            mutants.append((name, mutate(originals[name], generator)))
        child = Child(read_all(mutants), Path("output"))
        status = child.wait(10 * batch)
        lines = Path("results").read_text().splitlines()
        campaign.expect("no crash and no hang, in a batch of 100", status == 0 or [f"{status}, after {lines[-1:]}"])
        for line in lines:
            name, said, pillow, seconds = line.split("|")
            campaign.tried[f"a mutant was {said.split()[0]}"] += 1
            campaign.expect("it is used if Pillow decodes it", pillow != "decodes" or said == "used" or [line])
            campaign.expect("it takes less than 10 s", float(seconds) < 10 or [line])
            campaign.expect("it is used or reported", said in ("used", "reported") or [line])
        mib = int(Path("memory").read_text()) // 1024
        campaign.expect("memory stays below 1 GiB, in a batch of 100", mib < 1024 or [f"{mib} MiB"])


def draw_originals() -> dict[str, bytes]:
    """The content of small image files of each format, in several modes."""
    picture = draw_flower("roses", 1, size=96)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": (picture, {"exif": exif}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "a.png": (picture, {}),
        "alpha.png": (picture.convert("RGBA"), {}),
        "palette.png": (picture.convert("P"), {}),
        "a.gif": (picture.convert("P"), {"save_all": True, "append_images": [picture.rotate(90).convert("P")]}),
        "a.bmp": (picture, {}),
        "a.webp": (picture, {}),
        "lossless.webp": (picture.convert("RGBA"), {"lossless": True}),
        "a.tif": (picture, {"compression": "tiff_lzw"}),
        "plain.tif": (picture.convert("L"), {}),
        "several.mpo": (picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
    }
    originals = {}
    for name, (image, options) in kinds.items():
        image.save(name, **options)
        originals[name] = Path(name).read_bytes()
    return originals


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Bytes changed, the end cut off, or a piece moved to another place."""
    mutant = bytearray(content)
    kind = generator.randrange(3)
    if kind == 0:
        for _ in range(generator.choice((1, 2, 5, 20))):
            mutant[int(len(mutant) * generator.random() ** 2)] = generator.randrange(256)  # headers more often
    elif kind == 1:
        del mutant[generator.randrange(len(mutant)) :]
    else:
        start, length, to = (generator.randrange(len(mutant)) for _ in range(3))
        piece = mutant[start : start + length // 8]
        if generator.random() < 0.5:
            del mutant[start : start + length // 8]
        mutant[to:to] = piece
    return bytes(mutant)


def outcome(path: Path) -> str:
    """What reading it comes to: "used", "reported" in one line, or what it should not have been."""
    try:
        image = read_image(path, least_side=48)
    except ImageError as error:
        return (
            "reported" if len(str(error).splitlines()) == 1 and repr(str(path)) in str(error) else f"unclear: {error}"
        )
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        return f"raised {error!r}"
    return "used" if image.mode == "RGB" else f"of mode {image.mode}"


def read_all(mutants: list[tuple[str, bytes]]) -> Callable[[], int]:
    """Read each, and print what came of it, whether Pillow itself decodes it, and how long it took."""

    def action() -> int:
        import resource  # of Unix alone

        warnings.simplefilter("ignore")
        results = open("results", "w", buffering=1)  # noqa: SIM115 - libraries write to the output
        for name, content in mutants:
            path = Path(f"mutant{Path(name).suffix.replace('mpo', 'jpg')}")
            path.write_bytes(content)
            start = time.monotonic()
            said = outcome(path)
            seconds = time.monotonic() - start
            try:
                with Image.open(path) as image:
                    image.load()
                pillow = "decodes"
            except Exception:  # noqa: BLE001 - it raises many kinds
                pillow = "fails"
            print("|".join((name, said.replace("|", "/").replace("\n", " "), pillow, f"{seconds:.2f}")), file=results)
        Path("memory").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        return 0

    return action


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


class _Payload:
    """Unpickled without restrictions, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


def hostile(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Files from a stranger, each with a payload that would make a file `marker`, inside or outside the folder."""
    box = Path("box").resolve()
    marker = box / "marker"
    (box / "run" / "weights").mkdir(parents=True)
    payload = _Payload(marker)
    checkpoint = box / "run" / "weights" / "last.pth"
    pickled = box / "list.pkl"
    pickled.write_bytes(pickle.dumps([payload]))

    pickle.loads(pickled.read_bytes())[0].close()
    campaign.expect("control: an unrestricted pickle reader makes the marker", marker.exists())
    marker.unlink()
    torch.save({"state_dict": payload}, checkpoint)
    torch.load(checkpoint, weights_only=False)
    campaign.expect("control: an unrestricted torch.load makes the marker", marker.exists())
    marker.unlink()

    def refuses(what: str, kinds: tuple, action: Callable[[], object]) -> None:
        try:
            action()
            problems = ["accepted"]
        except kinds as error:
            problems = [] if len(str(error).splitlines()) == 1 else [f"more than a line: {error}"]
        except Exception as error:  # noqa: BLE001 - any other is what is looked for
            problems = [f"raised {error!r}"]
        campaign.expect(f"refused: {what}", problems)
        campaign.expect("no marker", not marker.exists() and not list(box.parent.glob("marker*")))

    refuses("a pickle", (DataError,), lambda: read_pickle(pickled))
    for content in (payload, {"state_dict": payload}, {"model": payload, "state_dict": {}}, {"resume": payload}):
        torch.save(content, checkpoint)
        refuses("a checkpoint to predict with", (WeightsError,), lambda: load_model(checkpoint))
        refuses("weights to start from", (WeightsError,), lambda: load_pretrained(resnet18(5), checkpoint, "resnet18"))
        refuses("a checkpoint to resume from", (WeightsError,), lambda: read_checkpoint(checkpoint))
    for text in ("[]", "{", '{"0": 5}', '{"0": "a", "7": "b"}', "[" * 100_000, "\xff", '{"0": {"a": "b"}}'):
        (box / "class_indices.json").write_text(text, encoding="latin-1")
        refuses("class_indices.json", (DataError,), lambda: read_class_indices(box / "class_indices.json"))

    outside = box.parent / "outside.png"
    outside.write_bytes(draw_originals()["a.png"])
    lines = [f"../{outside.name} roses", f"{outside} roses", f"run/../../{outside.name} roses"]
    (box / "label.txt").write_text("\n".join(lines), encoding="utf-8")
    labelled, problems = read_label_file(box, ["roses"])
    campaign.expect("label.txt that climbs out of its folder is not followed", not labelled and len(problems) == 3)

    handler = functools.partial(SilentHandler, directory=str(box))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.tgz"
    archive = box / "a.tgz"
    for name, link in (("../marker", ""), (str(marker), ""), ("flower_photos/a", "../../marker"), ("marker", "device")):
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type = tarfile.CHRTYPE if link == "device" else tarfile.SYMTYPE if link else tarfile.REGTYPE
            member.linkname = "" if link == "device" else link
            tar.addfile(member, io.BytesIO())
        checksum = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        kinds = (DataError, OSError)
        refuses("an archive", kinds, functools.partial(download_flower_photos, box / "new", url, checksum))
        refuses("a download of another checksum", kinds, lambda: download_flower_photos(box / "new", url))
    server.shutdown()
