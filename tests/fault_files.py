"""File campaigns: image files of every kind, mutated image files, and hostile files."""

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fault_harness import Campaign, Child, program
from PIL import Image
from torchvision import models

import predict
from checkpoint import read_checkpoint
from class_files import read_class_indices, read_label_file, read_pickle
from cli_utils import DataError
from dataset_split import split_folder
from download import download_flower_photos
from image_io import ImageError, read_image
from model import resnet18
from prepare_data import check_images
from sample_flowers import draw_flower
from weights_io import WeightsError, load_model, load_pretrained

# --- image files --------------------------------------------------------------------------------------------------


def files(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Read image files of every kind, and `rounds` mutants of seven formats: bytes changed, cut off, moved."""
    folder = Path("zoo")
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        draw_flower("roses", 1, size=64).save(folder / name / "1.png")
    expected = draw_zoo(folder / "cat") | {"170 million pixels.png": True}
    (folder / "cat" / "170 million pixels.png").write_bytes(blank_png(13_000, 13_000))
    Path.cwd().parent.chmod(0o755)  # root ignores permissions, so another user looks
    child = Child(look_at(folder), Path("output"))
    campaign.expect("the zoo: no crash and no hang", child.end(60) == 0 or [Path("output").read_text()[-500:]])
    found = json.loads(Path("looked_at").read_text())
    for name, usable in expected.items():
        problem = found["problems"].pop(f"{folder.resolve()}/cat/{name}", "not seen")
        print(f"  {name[:40]!a:44} {problem.rpartition(': ')[2] if problem else 'used'}")
        campaign.expect("the zoo: each file is used, or reported with its name", (problem is None) == usable or [name])
    others = {Path(path).name: problem for path, problem in found["problems"].items()}
    campaign.expect("the zoo: nothing else is taken for an image", others == {"1.png": None, "deeper.png": None})
    campaign.expect("the zoo: memory grows by less than 1 GiB", found["MiB"] < 1024 or [f"{found['MiB']} MiB"])

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
        status = child.end(10 * batch)
        lines = Path("results").read_text().splitlines()
        campaign.expect("no crash and no hang, in a batch of 100", status == 0 or [f"{status}, after {lines[-1:]}"])
        for line in lines:
            name, said, pillow, seconds = line.split("|")
            campaign.tried[f"a mutant was {said.split()[0]}"] += 1
            campaign.expect("it is used if Pillow decodes it", pillow != "decodes" or said == "used" or [line])
            campaign.expect("it takes less than 10 s", float(seconds) < 10 or [line])
            campaign.expect("it is used or reported", said in ("used", "reported") or [line])
        mib = int(Path("memory").read_text())
        campaign.expect("memory stays below 1 GiB, in a batch of 100", mib < 1024 or [f"{mib} MiB"])


def draw_zoo(folder: Path) -> dict[str, bool]:
    """Create image files of every kind, and files that do not belong in an image folder.

    Returns:
        The name of each image file, and whether it can be used.
    """
    before = {path.name for path in folder.iterdir()}
    grey = np.arange(48 * 48).reshape(48, 48)
    colour = draw_flower("tulips", 1, size=48)
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=turned)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("L").save(folder / "grey.webp")
    colour.convert("P").save(folder / "palette and animated.gif", save_all=True, append_images=[colour])
    colour.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16)).save(folder / "sixteen bits.png")
    Image.fromarray(grey.astype(np.float32)).save(folder / "float.tif")
    colour.crop((0, 0, 1, 1)).save(folder / "one pixel.bmp")
    colour.resize((20_000, 2_000)).save(folder / "20,000 pixels.jpg")
    for name in (
        "png.jpg",
        "emoji \N{SUNFLOWER}.png",
        "\u540d\u5b57.png",
        "a\nline.png",
        "x" * 251 + ".png",
        "UP.PNG",
        "-rf.png",
    ):
        colour.save(folder / name, format="png")
    (folder / "link.png").symlink_to("alpha.png")
    usable = {path.name: True for path in folder.iterdir() if path.name not in before}

    good = (folder / "alpha.png").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "bomb.png").write_bytes(blank_png(60_000, 60_000, rows=100))
    (folder / "nowhere.jpg").symlink_to("missing.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "endless.bmp").symlink_to("/dev/zero")
    (folder / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    os.mkfifo(folder / "pipe.gif")
    (folder / "locked").mkdir()
    (folder / "forbidden.jpg").symlink_to("locked/a.jpg")
    (folder / "secret.png").write_bytes(good)
    (folder / "secret.png").chmod(0)
    unusable = [path.name for path in folder.iterdir() if path.name not in {"locked", *before, *usable}]
    (folder / "locked").chmod(0)

    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.jpg"):
        (folder / name).write_text("hello")
    (folder / "nested.jpg").mkdir()
    colour.save(folder / "nested.jpg" / "deeper.png")
    (folder / "around").symlink_to(folder.resolve())
    return usable | dict.fromkeys(unusable, False)


def blank_png(width: int, height: int, rows: int | None = None) -> bytes:
    """Return a black RGBA PNG, a thousandth of its size in memory; `rows` truncates the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    deflate, row = zlib.compressobj(), bytes(1 + 4 * width)
    pixels = b"".join(deflate.compress(row) for _ in range(rows or height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def look_at(folder: Path) -> Callable[[], int]:
    """Return a function that checks a folder's images as train.py does, but not as root."""

    def action() -> int:
        with open("looked_at", "w") as result:
            before = peak_memory()
            Image.init()  # later imports may fail for the other user
            if os.geteuid() == 0:
                os.seteuid(65534)
            split = split_folder(folder, val_rate=0)
            checked = check_images(split.train_paths, {})
            problems = {path: image.skipped and image.skipped.reason for path, image in checked.items()}
            json.dump({"problems": problems, "MiB": peak_memory() - before}, result)
        return 0

    return action


def peak_memory() -> int:
    """Return the peak memory of this process so far, in MiB."""
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def draw_originals() -> dict[str, bytes]:
    """Create small image files of each format in several modes, and return their content."""
    picture = draw_flower("roses", 1, size=96)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": (picture, {"exif": exif}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "a.png": (picture, {"exif": exif}),
        "alpha.png": (picture.convert("RGBA"), {}),
        "palette.png": (picture.convert("P"), {}),
        "a.gif": (picture.convert("P"), {"save_all": True, "append_images": [picture.rotate(90).convert("P")]}),
        "a.bmp": (picture, {}),
        "a.webp": (picture, {"exif": exif}),
        "lossless.webp": (picture.convert("RGBA"), {"lossless": True}),
        "a.tif": (picture, {"compression": "tiff_lzw", "exif": exif}),
        "plain.tif": (picture.convert("L"), {}),
        "several.mpo": (picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
    }
    originals = {}
    for name, (image, options) in kinds.items():
        image.save(name, **options)
        originals[name] = Path(name).read_bytes()
    return originals


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Change bytes, cut off the end, or move a piece."""
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
    """Read an image; return "used", "reported" (an error of one line), or a description of the fault."""
    try:
        image = read_image(path, min_side=48)
    except ImageError as error:
        return (
            "reported" if len(str(error).splitlines()) == 1 and repr(str(path)) in str(error) else f"unclear: {error}"
        )
    except Exception as error:  # noqa: BLE001 - any other exception is a fault
        return f"raised {error!r}"
    return "used" if image.mode == "RGB" else f"of mode {image.mode}"


def read_all(mutants: list[tuple[str, bytes]]) -> Callable[[], int]:
    """Return a function that reads each mutant, and records the outcome, Pillow's outcome and the time taken."""

    def action() -> int:
        warnings.simplefilter("ignore")
        results = open("results", "w", buffering=1)  # noqa: SIM115 - libraries write to standard output
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
            except Exception:  # noqa: BLE001 - Pillow raises many kinds
                pillow = "fails"
            print("|".join((name, said.replace("|", "/").replace("\n", " "), pillow, f"{seconds:.2f}")), file=results)
        Path("memory").write_text(str(peak_memory()))
        return 0

    return action


# --- hostile files ----------------------------------------------------------------------------------------------


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


class _Payload:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


def hostile(campaign: Campaign, rounds: int, generator: random.Random) -> None:
    """Load hostile files, each with a payload that would create a file `marker` inside or outside the folder."""
    box = Path("box").resolve()
    marker = box / "marker"
    (box / "run" / "weights").mkdir(parents=True)
    torch.hub.set_dir(str(box / "hub"))
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
        except Exception as error:  # noqa: BLE001 - any other exception is a fault
            problems = [f"raised {error!r}"]
        campaign.expect(f"refused: {what}", problems)
        campaign.expect("no marker", not marker.exists() and not list(box.parent.glob("marker*")))

    refuses("a pickle", (DataError,), lambda: read_pickle(pickled))
    for content in (payload, {"state_dict": payload}, {"model": payload, "state_dict": {}}, {"resume": payload}):
        torch.save(content, checkpoint)
        refuses("a checkpoint to predict with", (WeightsError,), lambda: load_model(checkpoint))
        refuses("weights to start from", (WeightsError,), lambda: load_pretrained(resnet18(5), checkpoint, "resnet18"))
        refuses("a checkpoint to resume from", (WeightsError,), lambda: read_checkpoint(checkpoint))
    torch.save({"fc.weight": torch.zeros(5, 512).to_sparse()}, checkpoint)
    refuses("weights of another kind", (WeightsError,), lambda: load_pretrained(resnet18(5), checkpoint, "resnet18"))
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(models.ResNet18_Weights.DEFAULT.url).name)
    cached.parent.mkdir(parents=True)
    for content in (pickle.dumps(payload), b"<html>"):
        cached.write_bytes(content)
        refuses("weights of ImageNet", (WeightsError,), lambda: load_pretrained(resnet18(5), "imagenet", "resnet18"))
    for text in ("[]", "{", '{"0": 5}', '{"0": "a", "7": "b"}', "[" * 100_000, "\xff", '{"0": {"a": "b"}}'):
        (box / "class_indices.json").write_text(text, encoding="latin-1")
        refuses("class_indices.json", (DataError,), lambda: read_class_indices(box / "class_indices.json"))

    outside = box.parent / "outside.png"
    outside.write_bytes(draw_originals()["a.png"])
    lines = [f"../{outside.name} roses", f"{outside} roses", f"run/../../{outside.name} roses"]
    (box / "label.txt").write_text("\n".join(lines), encoding="utf-8")
    labelled, problems = read_label_file(box, ["roses"])
    campaign.expect("label.txt that climbs out of its folder is not followed", not labelled and len(problems) == 3)

    strange_run(campaign, box)
    campaign.expect("no marker", not marker.exists() and not list(box.parent.glob("marker*")))

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


def strange_run(campaign: Campaign, box: Path) -> None:
    """Resume a hostile run whose checkpoint loads, and check the effect of its other files and strings."""
    shutil.copytree(campaign.undisturbed()[0], box / "runs" / "strange")
    run, escape = box / "runs" / "strange", "\x1b]0;marker\x07\n"
    evil = {"flags": {"data_path": "/etc", "name": "../../marker", "epochs": "__import__('os').mkdir('marker')"}}
    (run / "args.json").write_text(json.dumps(evil))
    (run / "class_indices.json").write_text("[" * 100_000)
    checkpoint = torch.load(run / "weights" / "last.pth", weights_only=True)
    events = {"../../../marker": 0, str(box / "marker"): 0}
    checkpoint["resume"]["flags"] |= {"name": "marker", "weights": escape}
    checkpoint["resume"]["events"] |= events
    torch.save(checkpoint, run / "weights" / "last.pth")
    epochs = str(campaign.epochs + 1)
    child = Child(program(["--resume", str(run), "--epochs", epochs], lambda: os.chdir(box)), Path("output"))
    campaign.expect(
        "a strange run is resumed, and nothing of it takes effect", child.end() == 0 and not printed_controls()
    )
    (run / "files.json").write_text("[" * 100_000)
    child = Child(program(["--resume", str(run), "--epochs", epochs + "0"], lambda: os.chdir(box)), Path("output"))
    campaign.expect("refused: a run whose list of files is damaged", child.end() == 1)

    names = [f"{escape}{number}" for number in range(5)]
    torch.save(checkpoint | {"class_names": names}, run / "weights" / "best.pth")
    image = next(campaign.data.rglob("*.jpg"))
    arguments = ["--weights", str(run / "weights" / "best.pth"), str(image), "--save-plot", str(box / "plot.png")]

    def look() -> int:
        torch.set_num_threads(1)  # a fork has no other threads
        return predict.main([*arguments, "--device", "cpu"])

    child = Child(look, Path("output"))
    campaign.expect("strange class names are printed and drawn as text", child.end() == 0 and not printed_controls())


def printed_controls() -> list[str]:
    """Return the control characters in the output."""
    return [c for c in Path("output").read_text() if not c.isprintable() and c != "\n"]
