"""What studies are made of: starting models, what is wrong with them, and the paper's protocol."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.studies import starts
from benchmarks.studies.corruptions import corrupted
from benchmarks.studies.data import digits
from benchmarks.studies.frame import Outcome
from benchmarks.studies.ours import sweeping
from benchmarks.studies.paper import Counted, joint, reconstructed
from benchmarks.studies.paper_page import gains_at_equal_passes
from benchmarks.studies.tasks import MISSING, REPAIRS, Task, task
from fxinvert.errors import DataError
from fxinvert.models.samples import OUTPUT
from fxinvert.training import ClosedForm

NETWORK = "digits_cnn"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Starting models are made here, and quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "CACHE", tmp_path_factory.mktemp("starts"))
        patch.setitem(starts.CONVERGED, NETWORK, starts.EARLY[NETWORK])
        yield


@pytest.mark.parametrize("repair", REPAIRS)
def test_every_repair_has_its_data_apart(repair: str) -> None:
    work = task(NETWORK, repair, 100, seed=1)
    assert (len(work.train), len(work.held_out)) == (80, 20)
    drawn = {
        tuple(image.flatten().tolist()) for part in (work.train, work.held_out) for image in part.inputs[0]
    }
    tested = {tuple(image.flatten().tolist()) for image in work.tests["test"].inputs[0]}
    assert len(drawn) >= 99
    assert not drawn & tested
    again, other = (task(NETWORK, repair, 100, seed=seed) for seed in (1, 2))
    assert torch.equal(again.train.inputs[0], work.train.inputs[0])
    assert not torch.equal(other.train.inputs[0], work.train.inputs[0])


def test_samples_are_drawn_equally_of_each_class() -> None:
    work = task(NETWORK, "under_trained", 100, seed=0)
    labels = torch.cat([work.train.labels[OUTPUT], work.held_out.labels[OUTPUT]])
    assert labels.bincount().tolist() == [10] * 10


def test_what_is_wrong_is_wrong() -> None:
    pruned, rounded, missing, noisy = (
        task(NETWORK, repair, 200, seed=0)
        for repair in ("pruned", "four_bit", "missing_class", "label_noise")
    )
    assert pruned.masks is not None
    weights = torch.cat([pruned.model.get_parameter(name).flatten() for name in pruned.masks])
    assert float((weights == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert all(len(row.unique()) <= 15 for row in rounded.model.get_parameter("fc1.weight"))
    (images,) = missing.tests["missing"].inputs
    with torch.no_grad():
        assert float((missing.model(images).argmax(1) == MISSING).float().mean()) < 0.05
    right = task(NETWORK, "under_trained", 200, seed=0).train.labels[OUTPUT]
    assert float((noisy.train.labels[OUTPUT] != right).float().mean()) == pytest.approx(0.2, abs=0.1)
    with pytest.raises(DataError, match="missing_class"):
        task(NETWORK, "bent", 200, seed=0)


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast", "jpeg"])
def test_shifts_change_images_and_not_their_meaning(kind: str) -> None:
    samples = digits().test.select(torch.arange(8))
    changed = corrupted(samples, kind, NETWORK, seed=0)
    (before,), (after,) = samples.inputs, changed.inputs
    assert before.shape == after.shape
    assert 0 <= float(after.min()) <= float(after.max()) <= 1
    assert 0.01 < float((after - before).abs().mean()) < 0.5
    assert changed.labels is samples.labels


def test_masked_updates_leave_what_is_masked() -> None:
    work = task(NETWORK, "pruned", 200, seed=0)
    assert work.masks is not None
    (model,) = sweeping(work, ClosedForm(), 1, output_target="cross_entropy", schedule="parallel")
    for name, mask in work.masks.items():
        assert not model.get_parameter(name)[mask == 0].any()
    assert not torch.equal(model.get_parameter("fc2.weight"), work.model.get_parameter("fc2.weight"))


def trained(work: Task, alpha: float) -> torch.nn.Module:
    return next(islice(joint(work.model, "relu3", alpha, work.train, 0), 1, None))


def test_the_protocol_trains_up_to_the_cut_towards_the_targets(tmp_path: Path) -> None:
    work = task(NETWORK, "under_trained", 300, seed=0)
    (images,), labels = work.train.inputs, work.train.labels[OUTPUT]
    targets = reconstructed(work.model, "relu3", images, labels)
    plain, drawn = trained(work, 0.0), trained(work, 0.3)
    for model in (plain, drawn):
        assert torch.equal(model.get_parameter("fc2.weight"), work.model.get_parameter("fc2.weight"))
        assert not torch.equal(model.get_parameter("conv1.weight"), work.model.get_parameter("conv1.weight"))

    def distance(model: torch.nn.Module) -> float:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule("relu3").register_forward_hook(lambda m, i, output: seen.append(output))
        with torch.no_grad():
            model(images)
        handle.remove()
        return float((seen[0] - targets).square().mean())

    assert distance(drawn) < distance(plain)


def test_a_cut_may_be_a_module_of_several_ops() -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU())
    model = torch.nn.Sequential(block, torch.nn.Linear(6, 3)).eval()
    samples, labels = torch.randn(7, 5), torch.arange(7) % 3
    whole, last = (reconstructed(model, cut, samples, labels) for cut in ("0", "0.1"))
    assert torch.equal(whole, last)
    assert not torch.equal(whole, reconstructed(model, "0.0", samples, labels))


def test_passes_are_counted_and_as_many_are_needed_to_compare() -> None:
    counted = Counted([None] * 4)
    assert len([*counted, *counted, *islice(counted, 2)]) == 10
    assert counted.passes == 1.5  # the first only looks at what there is

    def outcome(method: str, scores: list[float], **more: float) -> Outcome:
        points = [{"held_out": {"loss": 1 - s}, "test": {"score": s}, "seconds": 1.0} for s in scores]
        result = {"start": points[0], "curve": points, **more}
        return Outcome(method, {"method": method}, 0, "", 0.0, {}, result)

    ours, plain = outcome("auto", [0.9], passes=counted.passes), outcome("joint", [0.5, 0.6, 0.7])
    assert gains_at_equal_passes([ours], {("cut", 0.0): [plain]}) == [pytest.approx(0.9 - 0.6)]
    ours.result["passes"] = 3.5
    assert gains_at_equal_passes([ours], {("cut", 0.0): [plain]}) == []
