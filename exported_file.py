"""Write and read the files of export.py: a graph with its weights and metadata, as .pt2 or .onnx."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import Dim

from cli_utils import UsageError
from exported_network import ExportedNetwork

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PT2, ONNX = ".pt2", ".onnx"
METADATA, CHECKSUM = "extra/metadata.json", "extra/checksum"  # in the archive of a .pt2 file
WEIGHTS = "data/weights"
MEMBERS = re.compile(
    r"[^/]+/(data/weights/(weight_\d+|model_weights_config\.json)|data/constants/model_constants_config\.json"
    r"|data/sample_inputs/model\.pt|models/model\.json|extra/(metadata\.json|checksum)"
    r"|archive_format|archive_version|byteorder|\.data/\w+)"
)
EXTERNAL_DATA = b"\n\x08location"  # the key of an external data file, in an ONNX file
PLACEHOLDER = b"blake2b:" + b"0" * 32  # stands in for the checksum in an ONNX file while it is computed
OUTPUTS = ("probabilities", "unfamiliarity")


class ExportedFileError(UsageError):
    """An exported file that is corrupt, was modified, or was not written by export.py."""


def is_exported(path: str | os.PathLike) -> bool:
    """Return whether a path names an exported file."""
    return Path(path).suffix.lower() in (PT2, ONNX)


def is_onnx(path: str | os.PathLike) -> bool:
    """Return whether a path names an ONNX file."""
    return Path(path).suffix.lower() == ONNX


def require_packages(suffix: str, packages: tuple[str, ...]) -> None:
    """Raise UsageError if a package for this kind of file is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UsageError(f"a {suffix} file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


# --- write --------------------------------------------------------------------------------------------------------


def write_exported(
    network: ExportedNetwork,
    img_size: int,
    batch: int | None,
    metadata: Mapping[str, Any],
    path: Path,
    calibration_images: Sequence[Tensor] = (),
) -> None:
    """Export the network with `torch.export` or `torch.onnx.export`, and write the file.

    Args:
        batch: the fixed number of images of a batch; None: any number. Ignored if the network resizes.
        metadata: plain values for JSON.
        path: ends with .pt2 or .onnx.
        calibration_images: batches of images; with them, an .onnx file is quantised to int8.
    """
    if network.resize is not None:
        example, dynamic = torch.zeros(3, img_size, img_size + 100, dtype=torch.uint8), (1, 2)
    else:
        example, dynamic = torch.zeros(batch or 2, 3, img_size, img_size, dtype=torch.uint8), () if batch else (0,)
    dynamic_shapes = {"images": dict.fromkeys(dynamic, Dim.DYNAMIC)}
    with _quiet():
        if not is_onnx(path):
            _write_pt2(network.eval(), example, dynamic_shapes, metadata, path)
        else:
            _write_onnx(network.eval(), example, dynamic_shapes, path)
            if calibration_images:
                _quantise(path, calibration_images)
            _add_metadata(metadata, path)


def _write_pt2(
    network: ExportedNetwork, example: Tensor, dynamic_shapes: dict, metadata: Mapping[str, Any], path: Path
) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)
    program.example_inputs = None  # otherwise the file contains them
    torch.export.save(program, path, extra_files={Path(METADATA).name: json.dumps(metadata)})
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{CHECKSUM}", _archive_checksum(archive))


def _write_onnx(network: ExportedNetwork, example: Tensor, dynamic_shapes: dict, path: Path) -> None:
    outputs = OUTPUTS[: 2 if network.with_unfamiliarity else 1]
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        input_names=["images"],
        output_names=outputs,
        verbose=False,
    )
    program.save(path)


def _quantise(path: Path, calibration_images: Sequence[Tensor]) -> None:
    """Static post-training quantisation (QDQ): per-channel int8 weights, uint8 activations with ranges from images.

    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        batches = iter(calibration_images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Add", "MaxPool", "Gemm"],
        )


def _add_metadata(metadata: Mapping[str, Any], path: Path) -> None:
    import onnx

    model = onnx.load(path)
    properties = {name: json.dumps(value) for name, value in metadata.items()}
    onnx.helper.set_model_props(model, properties | {"checksum": json.dumps(PLACEHOLDER.decode())})
    onnx.save(model, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(PLACEHOLDER, b"blake2b:" + _checksum(content).encode()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the exporters, which concern their own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- read ---------------------------------------------------------------------------------------------------------


def read_pt2(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the metadata of a .pt2 file, but not its graph, as `torch.export.load` uses pickle.

    Raises:
        ExportedFileError: the file is corrupt, was modified after the export, or is from another program.
    """
    with _as_exported_error(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split("/")[0]
        if f"{root}/{METADATA}" not in names or f"{root}/{CHECKSUM}" not in names:
            raise ExportedFileError(f"{path}: not written by export.py, or its metadata is missing")
        if archive.read(f"{root}/{CHECKSUM}").decode() != _archive_checksum(archive):
            raise ExportedFileError(f"{path}: was modified after the export; export the network again")
        if others := [name for name in names if not MEMBERS.fullmatch(name)]:
            raise ExportedFileError(f"{path}: contains {others[0]}, which export.py does not write")
        metadata = json.loads(archive.read(f"{root}/{METADATA}"))
        config = json.loads(archive.read(f"{root}/{WEIGHTS}/model_weights_config.json"))["config"]
        state = {
            name: _to_tensor(archive.read(f"{root}/{WEIGHTS}/{entry['path_name']}"), entry)
            for name, entry in config.items()
        }
    return state, metadata


def _to_tensor(content: bytes, entry: Mapping[str, Any]) -> Tensor:
    """Return the float32 tensor that an entry of the weights' configuration describes."""
    shape, strides = ([value["as_int"] for value in entry["tensor_meta"][key]] for key in ("sizes", "strides"))
    return torch.frombuffer(bytearray(content), dtype=torch.float32).as_strided(shape, strides)


def _archive_checksum(archive: zipfile.ZipFile) -> str:
    """Return a checksum of the names and contents of all members but the checksum itself."""
    content = hashlib.blake2b(digest_size=16)
    members = [member for member in archive.infolist() if not member.filename.endswith(f"/{CHECKSUM}")]
    if len(archive.namelist()) != len({*archive.namelist()}) or any(member.compress_type for member in members):
        raise zipfile.BadZipFile("repeated or compressed members")
    for member in members:
        content.update(f"{member.filename}\0{member.file_size}\0".encode())
        content.update(archive.read(member))
    return content.hexdigest()


def read_onnx(path: str | os.PathLike) -> tuple["InferenceSession", dict[str, Any]]:
    """Load an .onnx file, and read its metadata.

    Raises:
        UsageError: onnxruntime is not installed.
        ExportedFileError: see `read_pt2`.
    """
    require_packages(ONNX, ("onnxruntime",))
    import onnxruntime

    content = Path(path).read_bytes()
    found = re.findall(rb"blake2b:([0-9a-f]{32})", content)
    if len(found) != 1:
        raise ExportedFileError(f"{path}: not written by export.py, or its metadata is missing")
    if _checksum(content.replace(b"blake2b:" + found[0], PLACEHOLDER)) != found[0].decode():
        raise ExportedFileError(f"{path}: was modified after the export; export the network again")
    if EXTERNAL_DATA in content:  # onnxruntime would read any file that it names
        raise ExportedFileError(f"{path}: refers to external data files, which export.py does not write")
    with _as_exported_error(path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        properties = session.get_modelmeta().custom_metadata_map
        metadata = {name: json.loads(value) for name, value in properties.items()}
    return session, metadata


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextlib.contextmanager
def _as_exported_error(path: str | os.PathLike) -> Iterator[None]:
    """Convert whatever is raised for a corrupt file to an ExportedFileError."""
    try:
        yield
    except (ExportedFileError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise ExportedFileError(f"{path}: corrupt, or not written by export.py") from error
