"""Weight files are read as by PyTorch, and their content is not executed."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from perturbjax.core.errors import InputError
from perturbjax.models.pytorch_files import read_tensors, write_tensors
from perturbjax.models.torch_pickle import MAX_PICKLE_BYTES

pytestmark = pytest.mark.full

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        expected = to_numpy(tensor)
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype, name
        assert ours[name].tobytes() == expected.tobytes(), name


def varied_state_dict() -> OrderedDict:
    """Every dtype, views (transposed, sliced, shared), a scalar, empty tensor and parameter."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    tensors = OrderedDict((str(dtype), (base * 3).to(dtype)) for dtype in DTYPES)
    tensors["transposed"], tensors["sliced"], tensors["row"] = base.t(), base[1::2, 2:4], base[3]
    tensors["scalar"], tensors["empty"] = torch.tensor(7), torch.zeros(0, 3)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    return tensors


@pytest.fixture
def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))


@pytest.mark.parametrize("layout", ["zip", "legacy", "protocol 4"])
def test_read_tensors_is_exact(tmp_path, layout):
    path, tensors = tmp_path / "weights.pth", varied_state_dict()
    options = {
        "zip": {},
        "legacy": {"_use_new_zipfile_serialization": False},
        "protocol 4": {"pickle_protocol": 4},
    }
    torch.save(tensors, path, **options[layout])
    assert_same(read_tensors(path), tensors)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_write_and_read_are_exact(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    tensors = {name: np.array(to_numpy(tensor)) for name, tensor in varied_state_dict().items()}
    write_tensors(path, tensors)
    back = read_tensors(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].tobytes() == np.ascontiguousarray(tensor).tobytes()


def test_torch_loads_written_file(tmp_path):
    path = tmp_path / "weights.pth"
    tensors = {name: np.array(to_numpy(tensor)) for name, tensor in varied_state_dict().items()}
    write_tensors(path, tensors)
    assert_same(tensors, torch.load(path, weights_only=True))
    first = path.read_bytes()
    write_tensors(path, tensors)
    assert path.read_bytes() == first, "the same tensors gave other bytes"


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict"])
def test_training_checkpoint_gives_state_dict(tmp_path, network, wrapper):
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pth"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(
        {"epoch": 3, "loss": 0.25, wrapper: state, "optimizer": optimizer.state_dict()}, path
    )
    assert_same(read_tensors(path), network.state_dict())


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain pickle"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, layout):
    path, target = tmp_path / "bad.pth", tmp_path / "executed"
    bomb = {"weight": torch.ones(2), "extra": Bomb(target)}
    if layout == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(InputError, match=r"posix\.mkdir"):
        read_tensors(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"builtins\.eval"),
        (b"\x80\x02ctorch\nload\n.", r"torch\.load"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", r"posix\.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"(S'echo'\nios\nsystem\n.", "STRING|INST"),
    ],
)
def test_other_calls_are_refused(tmp_path, program, message):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(InputError, match=message):
        read_tensors(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_file_is_reported_as_damaged(tmp_path, network, legacy):
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    whole, path = buffer.getvalue(), tmp_path / "cut.pth"
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.pth: "):
            read_tensors(path)


def test_flipped_bytes_raise_only_input_errors(tmp_path, network):
    path, buffer = tmp_path / "flipped.pth", io.BytesIO()
    torch.save(network.state_dict(), buffer)
    rng, whole = np.random.default_rng(0), buffer.getvalue()
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 8):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except InputError:
            refused += 1
    assert refused > 100


def test_tensor_outside_its_storage_is_named(tmp_path):
    path = tmp_path / "outside.pth"
    write_tensors(path, {"head.weight": np.arange(8, dtype=np.float32)})
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    shape, wider = b"(J\x08\x00\x00\x00t", b"(J\x08\x01\x00\x00t"
    assert members["archive/data.pkl"].count(shape) == 1
    members["archive/data.pkl"] = members["archive/data.pkl"].replace(shape, wider)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"head\.weight"):
        read_tensors(path)


@pytest.mark.parametrize("value", [{"epoch": 3}, [torch.ones(1)], {"state_dict": {"a": 1}}, {}])
def test_file_without_state_dict_is_refused(tmp_path, value):
    path = tmp_path / "other.pth"
    torch.save(value, path)
    with pytest.raises(InputError, match="no state dict"):
        read_tensors(path)


def test_missing_files_and_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="must end in"):
        write_tensors(tmp_path / "weights.npz", {})
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="safetensors"):
        read_tensors(tmp_path / "bad.safetensors")


NESTED = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."
EXPONENTIAL = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(120)) + b"K\x01s."
QUADRATIC = (
    b"\x80\x02]("
    + b"K\x01K\x02\x86" * 100_000
    + b"eq\x00"
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 100_000
    + b"."
)


@pytest.mark.parametrize(
    "program", [NESTED, EXPONENTIAL, QUADRATIC], ids=["deep key", "wide key", "copies"]
)
@pytest.mark.parametrize("inflated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_unbounded_pickle_is_refused_quickly(tmp_path, program, inflated):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if inflated else zipfile.ZIP_STORED
    ) as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(InputError, match=r"bad\.pth"):
        read_tensors(path)


def test_pickle_is_not_inflated_beyond_limit(tmp_path):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * (MAX_PICKLE_BYTES + 1) + b".")
    with pytest.raises(InputError, match=r"describes its tensors in \d+ bytes"):
        read_tensors(path)


def test_tensors_of_one_storage_have_limited_total_size(tmp_path):
    path, base = tmp_path / "bad.pth", torch.zeros(10_000)
    torch.save({"tied": base, "again": base}, path)
    assert len(read_tensors(path)) == 2
    torch.save({str(i): base for i in range(100)}, path)
    with pytest.raises(InputError, match="take over 4 times the file"):
        read_tensors(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "nonsense"])
def test_safetensors_dtype_unknown_to_numpy_is_refused(tmp_path, dtype):
    path = tmp_path / "weights.safetensors"
    header = json.dumps(
        {"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1 if dtype == "F4" else 2]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1 if dtype == "F4" else 2))
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        read_tensors(path)
