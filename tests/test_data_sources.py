"""Data by name: arrays and images are read as they are, in batches; what does not fit is refused by name and place."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxinvert.errors import DataError
from fxinvert.sources import Data, DataOptions, load_data


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def picture(path: Path, *, size: tuple[int, int] = (5, 4), mode: str = "RGB", color: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


# arrays


def test_grey_and_color_images(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    unshuffled = DataOptions(seed=None)
    ((x, y),) = load_data(npz(tmp_path / "c.npz", x=pixels, y=[1, 0]), unshuffled).train
    assert x.shape == (2, 3, 4, 5)
    assert torch.equal(x[1, 2], torch.tensor(pixels[1, :, :, 2] / np.float32(255)))
    assert y.tolist() == [1, 0]
    assert y.dtype == torch.int64
    ((x, y),) = load_data(npz(tmp_path / "g.npz", x=pixels[..., 0], y=[[1], [0]]), unshuffled).train
    assert x.shape == (2, 1, 4, 5)
    assert y.shape == (2,)


def test_numbers_keep_their_shape(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 2))
    ((found, y),) = load_data(npz(tmp_path / "n.npz", x=x, y=x[:, 0]), DataOptions(seed=None)).train
    assert found.dtype == y.dtype == torch.float32
    assert torch.equal(found, torch.tensor(x, dtype=torch.float32))
    ((found, _),) = load_data(npz(tmp_path / "i.npz", x=np.array([[7, 8]], dtype=np.uint16), y=[0])).train
    assert found.dtype == torch.int64


def test_batches_are_the_same_in_every_pass_and_cover_all(tmp_path: Path) -> None:
    spec = npz(tmp_path / "n.npz", x=np.arange(10.0)[:, None], y=np.arange(10))
    data = load_data(spec, DataOptions(batch_size=4))
    first, second = list(data.train), list(data.train)
    assert [len(y) for _, y in first] == [4, 4, 2]
    order = torch.cat([y for _, y in first]).tolist()
    assert order != list(range(10))
    assert sorted(order) == list(range(10))
    assert order == torch.cat([y for _, y in second]).tolist()
    assert order == torch.cat([x for x, _ in first])[:, 0].tolist()
    other = load_data(spec, DataOptions(batch_size=4, seed=1))
    assert order != torch.cat([y for _, y in other.train]).tolist()


def test_train_and_test_arrays(tmp_path: Path) -> None:
    x, y = np.zeros((3, 2)), np.zeros(3, dtype=int)
    data = load_data(npz(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:1], y_test=y[:1]))
    assert data.test is not None
    assert [len(labels) for _, labels in data.test] == [1]


def test_normalization(tmp_path: Path) -> None:
    pixels = np.full((1, 2, 2, 3), 51, dtype=np.uint8)
    options = DataOptions(mean=(0.0, 0.1, 0.2), std=(2.0,))
    ((x, _),) = load_data(npz(tmp_path / "d.npz", x=pixels, y=[0]), options).train
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([0.1, 0.05, 0.0]), atol=1e-7)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": [1], "labels": [1]}, "holds images, labels; arrays x and y are needed"),
        ({"x": [[1.0]]}, "holds x; arrays x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, r"x in .* has shape \(3, 2\), y \(2,\)"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "it is empty"),
        ({"x": np.zeros((2, 3, 8, 7), np.uint8), "y": [0, 1]}, "1, 3 or 4 channels"),
        ({"x": np.array(["a", "b"]), "y": [0, 1]}, "dtype <U1; numbers are needed"),
        ({"x": np.array([{}, {}]), "y": [0, 1]}, "Python objects"),
        (
            {"x": [[1.0], [np.nan], [np.inf]], "y": [0, 1, 0]},
            "x in .* in 2 of 3 samples, first in sample 1; leave",
        ),
        ({"x": np.zeros((2, 2)), "y": [0.5, np.nan]}, "y in .* in 1 of 2 samples, first in sample 1; leave"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(npz(tmp_path / "d.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 damaged"])
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz cannot be read as an .npz file"):
        load_data(str(tmp_path / "d.npz"))


def test_cut_off_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 50)), y=np.zeros(50))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"d.npz cannot be read"):
        load_data(str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": (1.0, 2.0)}, "--mean has 2 numbers; .* 3 channels"),
        ({"std": (0.0,)}, "std positive"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"batch_size": 0}, "at least 1"),
        ({"resize": (0, 3)}, "at least 1"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(npz(tmp_path / "d.npz", x=np.zeros((1, 2, 2, 3), np.uint8), y=[0]), DataOptions(**options))


def test_arrays_of_images_are_resized_and_others_refuse_to_be(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 6, 3), np.uint8)
    pixels[..., :3, :] = 255
    options = DataOptions(resize=(2, 2), seed=None)
    ((x, _),) = load_data(npz(tmp_path / "d.npz", x=pixels, y=[0, 1]), options).train
    assert x.shape == (2, 3, 2, 2)
    assert float(x[..., 0].mean()) > 0.8
    assert float(x[..., 1].mean()) < 0.2
    spec = npz(tmp_path / "n.npz", x=np.zeros((2, 4)), y=[0, 1])
    with pytest.raises(DataError, match=r"--resize is for images; x in .*n.npz is float64 numbers"):
        load_data(spec, options)


# images


def test_image_folder(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "1.png", color=(255, 0, 51))
    picture(tmp_path / "b" / "2.JPG", color=(0, 0, 0))
    picture(tmp_path / "a" / "1.png", color=(0, 255, 0))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_text("no image")
    data = load_data(str(tmp_path), DataOptions(batch_size=2, seed=None))
    assert data.classes == ("a", "b")
    first, second = data.train
    assert first[0].shape == (2, 3, 4, 5)
    assert first[1].tolist() == [0, 1]
    assert torch.allclose(first[0][1, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert second[1].tolist() == [1]
    assert len(list(data.train)) == 2  # again


@pytest.mark.parametrize(
    ("mode", "color", "expected"), [("L", 51, 0.2), ("1", 1, 1.0), ("I;16", 13107, 0.2), ("F", 0.2, 0.2)]
)
def test_grey_images(tmp_path: Path, mode: str, color: Any, expected: float) -> None:
    suffix = "tiff" if mode == "F" else "png"
    picture(tmp_path / "a" / f"1.{suffix}", mode=mode, color=color)
    ((x, _),) = load_data(str(tmp_path), DataOptions()).train
    assert x.shape == (1, 1, 4, 5)
    assert x.flatten().tolist() == pytest.approx([expected] * 20)


def test_grey_among_color(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", color=(1, 2, 3))
    picture(tmp_path / "a" / "2.png", mode="L", color=51)
    picture(tmp_path / "a" / "3.png", mode="I;16", color=13107)
    ((x, _),) = load_data(str(tmp_path), DataOptions(seed=None)).train
    assert torch.allclose(x[1:], torch.tensor(0.2))


def test_resize_makes_one_size(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "2.png", size=(9, 3))
    ((x, _),) = load_data(str(tmp_path), DataOptions(resize=(6, 7))).train
    assert x.shape == (2, 3, 6, 7)
    with pytest.raises(DataError, match=r"2.png is 3x9, .*1.png is 4x5; pass --resize"):
        list(load_data(str(tmp_path), DataOptions(seed=None)).train)


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    broken = picture(tmp_path / "a" / "2.png", size=(50, 40))
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"the image .*2.png cannot be read"):
        list(load_data(str(tmp_path), DataOptions(resize=(4, 4))).train)
    broken.write_text("no image at all")
    with pytest.raises(DataError, match=r"the image .*2.png cannot be read"):
        list(load_data(str(tmp_path)).train)


def test_images_are_read_when_they_are_needed(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "a" / f"{i}.png")
    batches = iter(load_data(str(tmp_path), DataOptions(batch_size=2, seed=None)).train)
    next(batches)
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png cannot be read"):
        next(batches)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no class folders"):
        load_data(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="a holds no images"):
        load_data(str(tmp_path))
    picture(tmp_path / "a" / "inner" / "1.png")
    with pytest.raises(DataError, match=r"it holds folders \(inner\): is .*a the one to name"):
        load_data(str(tmp_path))


def test_classes_of_another_folder(tmp_path: Path) -> None:
    picture(tmp_path / "test" / "b" / "1.png")
    ((_, y),) = load_data(str(tmp_path / "test"), classes=("a", "b")).train
    assert y.tolist() == [1]
    with pytest.raises(DataError, match="has the class 'b'; known are a, c"):
        load_data(str(tmp_path / "test"), classes=("a", "c"))


# the rest


@pytest.mark.parametrize(
    ("batches", "said"),
    [([], "no batches"), ([3], "is int; a pair"), ([("a", torch.zeros(1))], "input 0 is str; a tensor")],
)
def test_examples_that_cannot_be_had(batches: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Data(batches).example_inputs(1)


def test_unreadable_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "1.png")

    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied"):
        load_data(str(tmp_path))


def test_shuffling_leaves_the_random_state(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    spec = npz(tmp_path / "n.npz", x=np.zeros((3, 1)), y=np.zeros(3))
    list(load_data(spec).train)
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match="is not there"):
        load_data(spec)
