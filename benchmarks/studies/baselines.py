"""What people do today: fine-tuning by AdamW, a new last layer by least squares, batch-norm statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies.curve import metrics, settle
from fxinvert.models.samples import OUTPUT, Samples, loss

#: one run of AdamW with each; held-out loss decides
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BATCH = 64
#: relative to the mean of the Gram matrix's diagonal; held-out accuracy decides
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)

#: which entries of parameters stay, by name: 1 or 0; the others stay zero
Masks = Mapping[str, Tensor]


def adamw(
    model: nn.Module,
    train: Samples,
    learning_rate: float,
    seed: int,
    *,
    weight_decay: float = 0.01,
    batch_size: int = BATCH,
    masks: Masks | None = None,
) -> Iterator[nn.Module]:
    """All parameters by back-propagation, endlessly: the model after 1, 2, 3, 5, 8, … epochs.

    Args:
        model: left as it is.
        train: the data.
        learning_rate: constant.
        seed: of the order.
        weight_decay: of all parameters.
        batch_size: samples per step.
        masks: what stays zero.
    """
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    epoch, due, following = 0, 1, 2
    while True:
        for rows in torch.split(torch.randperm(len(train), generator=generator), batch_size):
            if len(rows) == 1:  # a batch norm needs two
                continue
            batch = train.select(rows)
            optimizer.zero_grad()
            torch.autograd.backward(loss(trained(*batch.inputs), batch.labels))
            optimizer.step()
            apply_masks(trained, masks)
        epoch += 1
        if epoch == due:
            due, following = following, due + following
            yield trained


def warm_up(model: nn.Module, samples: Samples) -> None:
    """Lets torch load what the first step of an optimizer needs, which takes seconds."""
    next(adamw(model, samples.select(torch.arange(2)), 1e-3, 0))
    settle()


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks | None) -> None:
    """Sets masked parameters to zero."""
    for name, mask in (masks or {}).items():
        model.get_parameter(name).mul_(mask)


@torch.no_grad()
def last_layer(model: nn.Module, train: Samples, held_out: Samples) -> Iterator[nn.Module]:
    """The last linear layer anew, by ridge regression on one-hot labels: the best ridge on held-out accuracy."""
    changed = copy.deepcopy(model).eval()
    last = [module for module in changed.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for part in train.split(500):
        changed(*part.inputs)
    handle.remove()
    features = F.pad(torch.cat(seen), (0, 1), value=1.0).double()
    wanted = F.one_hot(train.labels[OUTPUT], last.out_features).double()
    gram, cross = features.T @ features, features.T @ wanted
    tried = []
    for ridge in RIDGES:
        solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), cross).T
        last.weight.copy_(solved[:, :-1])
        last.bias.copy_(solved[:, -1])
        tried.append((metrics(changed, held_out)["score"], ridge, copy.deepcopy(changed)))
    yield max(tried, key=lambda found: found[:2])[2]


@torch.no_grad()
def batch_norm(model: nn.Module, train: Samples) -> Iterator[nn.Module]:
    """Batch-norm statistics of the new data; nothing else changes."""
    changed = copy.deepcopy(model).train()
    norms = [module for module in changed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean over batches
    for part in train.split(250):
        if len(part) > 1:
            changed(*part.inputs)
    if norms:
        yield changed.eval()
