"""What the reference networks are shown: samples in three disjoint parts, with labels made as described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import NAMES, parts_of
from torch import Tensor, nn

import fxinvert.models as zoo
from fxinvert.errors import DataError
from fxinvert.models.samples import loss
from fxinvert.models.tasks import BRIGHT, FAINT, characters, digit_pixels, digit_queries
from fxinvert.models.text import ALPHABET, TEXT, decode, encode, windows


def samples(count: int = 5) -> zoo.Samples:
    values = torch.arange(float(count))
    return zoo.Samples(
        (values[:, None], -values[:, None]), {"kind": values.long() % 2, "size": values[:, None]}
    )


class Fixed(nn.Module):
    """Returns what it was given, whatever the inputs, as many rows as they have."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> Any:
        assert not self.training
        return self.outputs


# --- samples ------------------------------------------------------------------------------------------------


def test_selected_samples_keep_their_labels() -> None:
    chosen = samples().select(torch.tensor([3, 1]))
    assert [values.flatten().tolist() for values in chosen.inputs] == [[3, 1], [-3, -1]]
    assert {name: labels.flatten().tolist() for name, labels in chosen.labels.items()} == {
        "kind": [1, 1],
        "size": [3, 1],
    }


def test_batches_are_what_post_training_takes() -> None:
    sizes = []
    for inputs, labels in samples().batches(batch_size=2):
        assert isinstance(inputs, tuple)
        assert isinstance(labels, dict)
        sizes.append(labels["size"].flatten().tolist())
    assert sizes == [[0, 1], [2, 3], [4]]
    for inputs, labels in samples().batches("kind"):
        assert isinstance(inputs, tuple)
        assert isinstance(labels, Tensor)
        assert labels.tolist() == [0, 1, 0, 1, 0]
    for inputs, labels in zoo.Samples((torch.zeros(3, 2),), {"output": torch.arange(3)}).batches():
        assert isinstance(inputs, Tensor)
        assert isinstance(labels, Tensor)
        assert (inputs.shape, labels.tolist()) == ((3, 2), [0, 1, 2])


def test_bad_samples_are_refused() -> None:
    with pytest.raises(DataError, match=r"samples; every input needs its label"):
        zoo.Samples((torch.zeros(3, 1),), {"output": torch.zeros(2)})
    with pytest.raises(DataError, match=r"'shape'; there are: kind, size"):
        samples().batches("shape")
    with pytest.raises(DataError, match="batch_size is 0"):
        samples().batches("kind", 0)
    with pytest.raises(DataError, match="no samples"):
        zoo.scores(Fixed({}), samples(0))


def test_scores_of_classes_and_values() -> None:
    given = samples(4)
    right = {"kind": torch.eye(2)[given.labels["kind"]], "size": given.labels["size"]}
    assert zoo.scores(Fixed(right).train(), given) == {"kind": 1.0, "size": 1.0}
    mean = {"kind": torch.tensor([[1.0, 0.0]]).expand(4, -1), "size": torch.full((4, 1), 1.5)}
    assert zoo.scores(Fixed(mean), given) == {"kind": 0.5, "size": 0.0}


def test_scores_leave_the_mode_as_it_was() -> None:
    for training in (True, False):
        model = Fixed(torch.eye(4)).train(training)
        zoo.scores(model, zoo.Samples((torch.zeros(4, 1),), {"output": torch.arange(4)}))
        assert model.training is training


def test_loss_adds_the_outputs_up() -> None:
    given = samples(4)
    outputs = {"kind": torch.zeros(4, 2), "size": given.labels["size"] + 3}
    assert loss(outputs, given.labels).item() == pytest.approx(torch.tensor(2.0).log().item() + 9)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((5, 3, 2, 4), 1), ((5, 7, 3), 2)])
def test_classes_lie_on_the_axis_that_the_labels_lack(shape: tuple[int, ...], axis: int) -> None:
    labels = torch.randint(3, shape[:axis] + shape[axis + 1 :])
    outputs = 100 * nn.functional.one_hot(labels, 3).movedim(-1, axis).float()
    assert loss(outputs, {"output": labels}).item() == pytest.approx(0, abs=1e-6)
    given = zoo.Samples((torch.zeros(len(labels), 1),), {"output": labels})
    assert zoo.scores(Fixed(outputs), given) == {"output": 1.0}


# --- all tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_data_are_always_the_same(name: str) -> None:
    again, first = zoo.data_of(name), parts_of(name)
    for one, two in zip(
        (again.train, again.held_out, again.test), (first.train, first.held_out, first.test), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, two.inputs, strict=True))
        assert all(torch.equal(one.labels[key], two.labels[key]) for key in two.labels)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_unet", "digits_two_head", "driving"])
def test_parts_are_disjoint(name: str) -> None:
    parts = parts_of(name)
    train, held_out, test = (
        {tuple(image.tolist()) for image in part.inputs[0].flatten(1)}
        for part in (parts.train, parts.held_out, parts.test)
    )
    assert not train & held_out
    assert not train & test
    assert not held_out & test


# --- the digits ---------------------------------------------------------------------------------------------


def test_pixels_are_labelled_by_the_clean_image() -> None:
    clean, noisy = parts_of("digits_cnn"), digit_pixels()
    for pure, part in (
        (clean.train, noisy.train),
        (clean.held_out, noisy.held_out),
        (clean.test, noisy.test),
    ):
        levels, image = part.labels["output"], pure.inputs[0].squeeze(1)
        assert (levels.shape, levels.dtype) == (image.shape, torch.int64)
        assert image[levels == 0].max() < FAINT <= image[levels == 1].min()
        assert image[levels == 1].max() < BRIGHT <= image[levels == 2].min()
        noise = part.inputs[0] - pure.inputs[0]
        assert 0.095 < noise.std().item() < 0.105
        assert noise.mean().abs() < 0.003


def test_queries_ask_for_the_centre_of_the_ink() -> None:
    test = digit_queries().test
    for image, query, offset in zip(*test.inputs, test.labels["offset"], strict=True):
        right, down = (
            sum(
                image[0, row, column].item() * (column - 3.5 if across else row - 3.5)
                for row in range(8)
                for column in range(8)
            )
            / image.sum().item()
            for across in (True, False)
        )
        cosine, sine, scale, shift = query.tolist()
        assert offset.item() == pytest.approx(scale * (right * cosine + down * sine) + shift, abs=1e-4)
    assert torch.equal(test.labels["digit"], parts_of("digits_cnn").test.labels["output"])


# --- the text -----------------------------------------------------------------------------------------------


def test_text_is_simple() -> None:
    assert 3_000 < len(TEXT) < 10_000
    assert ALPHABET == "\n ,.abcdefghiklmnoprstuvwy"
    assert "  " not in TEXT
    assert not TEXT.startswith("\n")
    assert all(line.endswith(".") for line in TEXT.split("\n"))


def test_numbers_stand_for_characters() -> None:
    numbers = encode(TEXT)
    assert decode(numbers) == TEXT
    assert set(numbers.tolist()) == set(range(len(ALPHABET)))
    assert len(ALPHABET) != 32  # else the axes of (N, 32, vocabulary) could be mistaken for one another


def test_windows_are_moved_on_by_one() -> None:
    pieces, following = windows("the road goes", 4, 3)
    assert [decode(piece) for piece in pieces] == ["the ", " roa", "ad g"]
    assert [decode(piece) for piece in following] == ["he r", "road", "d go"]


def test_parts_of_the_text_follow_each_other() -> None:
    parts, begin = characters(), 0
    for part, share, every in ((parts.train, 0.8, 3), (parts.held_out, 0.9, 8), (parts.test, 1.0, 8)):
        (tokens,), following = part.inputs, part.labels["output"]
        assert (tokens.dtype, tokens.shape, following.shape) == (
            torch.int64,
            (len(part), 32),
            (len(part), 32),
        )
        assert torch.equal(tokens[:, 1:], following[:, :-1])
        end = int(share * len(TEXT))
        last = begin + (len(part) - 1) * every
        assert decode(tokens[0]) == TEXT[begin : begin + 32]
        assert decode(following[-1]) == TEXT[last + 1 : last + 33]
        assert end - every < last + 33 <= end
        begin = end
