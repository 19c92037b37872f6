"""MNIST's and CIFAR's files, tables of images and numbers: read as they are, or refused by name, line and reason."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_folder import invoke
from PIL import Image

from fxinvert import models
from fxinvert.errors import DataError
from fxinvert.sources import DataOptions, load_data

AS_STORED = DataOptions(seed=None)
CHANCE = np.random.default_rng(0)


# IDX


def idx(path: Path, array: np.ndarray[Any, Any], kind: int = 8) -> Path:
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path: Path, suffix: str) -> None:
    images = CHANCE.integers(0, 256, (7, 5, 4), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for part, rows in (("train", slice(0, 4)), ("t10k", slice(4, 7))):
        idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images[rows])
        idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", labels[rows])
    data = load_data(str(tmp_path), AS_STORED)
    ((x, y),) = data.train
    assert torch.equal(x[:, 0], torch.tensor(images[:4]) / 255)
    assert y.tolist() == [0, 1, 2, 3]
    assert data.test is not None
    assert [labels.tolist() for _, labels in data.test] == [[4, 5, 6]]


def test_idx_of_wide_numbers_are_big_endian(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx2-ubyte", np.array([[1.5], [-2.0]], ">f4"), 0x0D)
    idx(tmp_path / "train-labels-idx1-ubyte", np.array([258, 1], ">i4"), 0x0C)
    ((x, y),) = load_data(str(tmp_path), AS_STORED).train
    assert x.tolist() == [[1.5], [-2.0]]
    assert y.tolist() == [258, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no IDX file"),
        (b"\x89PNG....", "no IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "5 bytes of numbers of shape (5,), and holds 3"),
        (b"\0\0\x08\x01\0\0\0\x02abc", "and holds more"),
        (b"\0\0\x08\x03\0\0", "damaged"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "labels"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, said: str) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 3, 3), np.uint8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path))
    assert said in str(caught.value)


def test_idx_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match="no train labels"):
        load_data(str(tmp_path))
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="the same number of samples"):
        load_data(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01")[:-5])
    with pytest.raises(DataError, match="cannot be read as an IDX file"):
        load_data(str(tmp_path))


# CIFAR

RECORDS = CHANCE.integers(0, 256, (4, 3072), dtype=np.uint8)
LABELS = [3, 1, 0, 2]


def as_python_2(content: dict[bytes, Any]) -> bytes:
    """The bytes of CIFAR's own pickles: protocol 2, and strings that are bytes."""
    stream = io.BytesIO()
    array = content[b"data"]
    put = stream.write
    put(b"\x80\x02}(")

    def text(value: bytes) -> None:
        put(b"T" + struct.pack("<i", len(value)) + value)

    for key, value in content.items():
        text(key)
        if key == b"data":
            put(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85")
            text(b"b")
            put(b"\x87R(K\x01")
            put(b"M" + struct.pack("<H", len(array)) + b"M" + struct.pack("<H", array.shape[1]) + b"\x86")
            put(b"cnumpy\ndtype\n")
            text(b"u1")
            put(b"K\x00K\x01\x87R(K\x03")
            text(b"|")
            put(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
            text(array.tobytes())
            put(b"tb")
        else:
            put(b"](" + b"".join(b"K" + bytes([number]) for number in value) + b"e")
    put(b"u.")
    return stream.getvalue()


def assert_pictures(data: Any, labels: list[int] = LABELS) -> None:
    ((x, y),) = data.train
    assert torch.equal(x, torch.tensor(RECORDS.reshape(-1, 3, 32, 32)) / 255)
    assert y.tolist() == labels
    assert data.test is not None
    assert [len(labels) for _, labels in data.test] == [2]


def test_cifar_10_binary(tmp_path: Path) -> None:
    records = np.concatenate([np.array(LABELS, np.uint8)[:, None], RECORDS], 1)
    (tmp_path / "data_batch_1.bin").write_bytes(records[:3].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[3:].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[:2].tobytes())
    assert_pictures(load_data(str(tmp_path), AS_STORED))
    (tmp_path / "data_batch_2.bin").write_bytes(records[3:].tobytes()[:-7])
    with pytest.raises(DataError, match=r"data_batch_2.bin has 3066 bytes; .* damaged or cut off"):
        load_data(str(tmp_path))


def test_cifar_100_binary_has_fine_classes(tmp_path: Path) -> None:
    both = np.stack([np.full(4, 9), LABELS], 1).astype(np.uint8)
    records = np.concatenate([both, RECORDS], 1)
    (tmp_path / "train.bin").write_bytes(records.tobytes())
    (tmp_path / "test.bin").write_bytes(records[:2].tobytes())
    assert_pictures(load_data(str(tmp_path), AS_STORED))


@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_cifar_python(tmp_path: Path, protocol: int | None) -> None:
    content: dict[Any, Any] = {b"labels": LABELS, b"data": RECORDS}
    few = {b"labels": LABELS[:2], b"data": RECORDS[:2]}
    for name, values in (("data_batch_1", content), ("test_batch", few)):
        written = as_python_2(values) if protocol is None else pickle.dumps(values, protocol)
        if protocol is None:
            assert pickle.loads(written, encoding="bytes")[b"labels"] == values[b"labels"]
        (tmp_path / name).write_bytes(written)
    assert_pictures(load_data(str(tmp_path), AS_STORED))


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "harm")


def test_a_cifar_pickle_runs_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"labels": [1], b"data": Harm(victim)}))
    with pytest.raises(
        DataError, match=r"it names pathlib\S*, which no CIFAR batch holds and which could run code"
    ):
        load_data(str(tmp_path))
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        {b"data": RECORDS},
        {b"labels": LABELS},
        {b"labels": LABELS, b"data": RECORDS[:, :10]},
        {b"labels": LABELS, b"data": RECORDS.astype(np.int64)},
        {b"labels": LABELS, b"data": RECORDS.astype(object)},
        {b"labels": LABELS, b"data": "text"},
        [1, 2, 3],
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match="cannot be read as a CIFAR batch"):
        load_data(str(tmp_path))


def test_cut_off_pickles_are_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({b"labels": LABELS, b"data": RECORDS}, 2)
    for size in (0, 1, 20, 100, len(whole) - 1):
        (tmp_path / "data_batch_1").write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read as a CIFAR batch"):
            load_data(str(tmp_path))


# CSV


def log(folder: Path, lines: list[str], count: int = 5) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(count):
        Image.new("L", (6, 4), 40 * i).save(folder / "images" / f"{i}.png")
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "log.csv")


LINES = [f"images/{i}.png, note, {i / 10}, {10 - i}" for i in range(5)]


def test_a_driving_log(tmp_path: Path) -> None:
    spec = log(tmp_path, ["camera,remark,steering,speed", *LINES])
    ((x, y),) = load_data(spec, AS_STORED).train
    assert x.shape == (5, 1, 4, 6)
    assert torch.allclose(x[:, 0, 0, 0], torch.arange(5) * 40 / 255)
    assert torch.allclose(y, torch.tensor([[i / 10, 10.0 - i] for i in range(5)]))
    options = DataOptions(
        seed=None, input_columns=("camera", "speed"), label_columns=("steering",), resize=(2, 3)
    )
    (((camera, speed), y),) = load_data(spec, options).train
    assert camera.shape == (5, 1, 2, 3)
    assert speed.tolist() == [[10], [9], [8], [7], [6]]
    assert torch.allclose(y, torch.arange(5)[:, None] / 10)


def test_a_log_without_names_and_with_absolute_paths(tmp_path: Path) -> None:
    spec = log(tmp_path, [f"{tmp_path}/{line}" for line in LINES])
    ((_, y),) = load_data(spec, DataOptions(seed=None, label_columns=("3",))).train
    assert y.flatten().tolist() == [10, 9, 8, 7, 6]


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ([], {}, "is empty"),
        (["camera,steering"], {}, "has no rows"),
        (["camera,camera", "images/0.png,1"], {}, "columns of the same name"),
        (["camera,steering", *LINES[:1]], {}, "line 2 of .* has 4 cells; there are 2 columns"),
        (
            ["camera,steering", "images/0.png,1", "images/1.png,fast"],
            {},
            "line 3 of .*: 'fast' in column 'steering'",
        ),
        (["camera,steering", "images/0.png,1", "images/1.png,nan"], {}, "line 3 of .*: 'nan'"),
        (["camera,steering", "images/9.png,1"], {}, "9.png cannot be read"),
        (
            ["steering,speed", "1,2"],
            {},
            "no column of images; name the inputs with --input-columns: steering, speed",
        ),
        (["camera,remark", "images/0.png,x"], {}, "holds no numbers; name others with --label-columns"),
        (["c,s", "images/0.png,1"], {"input_columns": ("d",)}, "column 'd' of .* is not there; it has c, s"),
        (["c,r,s", "images/0.png,x,1"], {"input_columns": ("r",)}, "holds neither images nor numbers"),
        (["c,s", "images/0.png,1"], {"label_columns": ("c",)}, "the label column 'c' of .* holds no numbers"),
        (["s,t", "1,2"], {"input_columns": ("s",), "resize": (2, 2)}, "--resize is for images"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, lines: list[str], options: dict[str, Any], said: str) -> None:
    spec = log(tmp_path, lines)
    if not lines:
        Path(spec).write_text("")
    with pytest.raises(DataError, match=said):
        list(load_data(spec, DataOptions(**options)).train)


def test_tables_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xff\xfe\x00camera")
    with pytest.raises(DataError, match="cannot be read as a CSV file"):
        load_data(str(tmp_path / "log.csv"))


@pytest.mark.slow
def test_driving_from_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driving network on its own data, written as a log of images and numbers."""
    monkeypatch.chdir(tmp_path)
    train = models.data_of("driving").train.select(torch.arange(200))
    camera, ego = train.inputs
    scale = float(camera.abs().max())
    lines = ["camera,a,b,c,d,steering"]
    for i in range(len(camera)):
        Image.fromarray((camera[i, 0] / scale * 255).byte().numpy()).save(f"{i}.png")
        numbers = [*ego[i].tolist(), *train.labels["steering"][i].tolist()]
        lines.append(",".join([f"{i}.png", *(f"{number:.5f}" for number in numbers)]))
    Path("log.csv").write_text("\n".join(lines))
    Path("drive_nets.py").write_text(
        "from fxinvert import models\ndef net(): return models.load('driving', 'early')\n"
    )
    columns = ("--input-columns", "camera,a,b,c,d", "--label-columns", "steering", "--std", str(1 / scale))
    done = invoke(
        *("post-train", "drive_nets:net", "log.csv", *columns, "--supervised-output", "steering"),
        *("--sweeps", "1", "--run-directory", "run"),
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").exists()
    assert "Warning" not in done.output
