"""The one equation for a function that is known by its values and derivatives only.

    x* = argmin ‖f(x) − t‖² + λ‖x − x0‖²,  λ → 0

by damped Gauss–Newton (Levenberg 1944, Marquardt 1963), matrix-free. A solution is stationary where x = x0 + Jᵀ z for
some multipliers z: no part of the correction lies in the null space of J. So every step goes from x to

    x0 + Jᵀ z + e,    e = argmin ‖J e − (t − f(x) − J p)‖² + μ‖e‖²,    p = x0 + Jᵀ z − x,

where p removes what the curvature of f has left in the null space, and e = Jᵀ y, by conjugate gradients, renews the
multipliers, z ← z + y. For an affine f the first step is x0 + A⁺(t − f(x0)). Every sample has its own damping μ, which
grows when a step is refused and shrinks when one is taken; a step is taken by the samples whose error falls, if need be
after it was halved. The inner systems are solved as exactly as the outer iteration deserves (Eisenstat & Walker, SIAM J.
Sci. Comput. 17, 1996), and with the directions of the steps before as long as J has changed little (`recycled.py`).
A correction that is amplified beyond κ is damped with μ ≥ (σ_max/κ)², as in `fxinvert.linalg.anchored`.

A small Jacobian is written out, and corrected by what steps have shown (Broyden, Math. Comp. 19, 1965) and by products with
its transpose: on the way that costs no product, and its multipliers are those of least squares. Only at the end, or where it
is wide, a product with the Jacobian itself tells what is left in the null space. It is made anew where a step fails.

Where f acts on every value by itself (J is diagonal), the values are solved as samples of their own, by secants. The answer is a
local one: another branch of f may hold a nearer one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxinvert.linalg.jacobian import Jacobian, acts_on_values
from fxinvert.linalg.minimum import Minimum, Settings
from fxinvert.linalg.search import Search
from fxinvert.linalg.vectors import flat, norm, per_sample


def gauss_newton(
    function: Callable[[Tensor], Tensor],
    anchor: Tensor,
    output: Tensor,
    target: Tensor,
    *,
    tolerance: float,
    condition_limit: float,
    limit: int,
    worthwhile: float = 0.0,
) -> Minimum:
    """The nearest of the inputs that come closest to the target, near the anchor, for every sample by itself.

    Args:
        function: f, `(B, …)` → `(B, …)`, samples independent.
        anchor: x0.
        output: f(x0).
        target: t.
        tolerance: ‖f(x) − t‖ / ‖t‖ at which a sample has reached its target.
        condition_limit: κ.
        limit: on the pairs of products per sample.
        worthwhile: part of its error that an undamped step must take off, or it is a sample's last.

    Raises:
        SolveError: the function cannot be differentiated.
    """
    size = norm(target)
    goal = tolerance * torch.where(size > 0, size, 1)
    failed = ~torch.isfinite(norm(target - output) + norm(anchor))
    idle = failed | (norm(target - output) <= goal)
    settings = Settings(tolerance, condition_limit, limit, worthwhile)
    if bool(idle.all()):
        return Search(function, anchor, output, target, goal, idle, settings).found(failed)
    jacobian = Jacobian(function, anchor)
    alone = acts_on_values(jacobian) & ~idle
    search = Search(function, anchor, output, target, goal, idle | alone, settings)
    search.products += torch.where(idle, 0, 1 if anchor.shape == output.shape else 0)
    found = search.run().found(failed)
    if not bool(alone.any()):
        return found
    shape, per_value = anchor.shape, anchor[0].numel()
    values = Search(
        lambda x: function(x.reshape(shape)).reshape(-1, 1),
        anchor.reshape(-1, 1),
        output.reshape(-1, 1),
        target.reshape(-1, 1),
        (goal / per_value**0.5).repeat_interleave(per_value),
        (~alone).repeat_interleave(per_value),
        Settings(tolerance, condition_limit**2, limit),
        sigma=flat(jacobian.apply(torch.ones_like(anchor)).abs()).amax(1).repeat_interleave(per_value),
    )
    return _merged(alone, values.run().found(failed.repeat_interleave(per_value)), found)


def _merged(alone: Tensor, values: Minimum, samples: Minimum) -> Minimum:
    """The answers found value by value for the rows in `alone`, the others' as they are."""
    shape = (len(alone), -1)
    every = {name: getattr(values, name).reshape(shape).all(1) for name in ("reached", "nearest")}
    settled = (values.stationary | values.reached).reshape(shape).all(1)
    of_rows = Minimum(
        value=values.value.reshape(samples.value.shape),
        reached=every["reached"],
        nearest=every["nearest"],
        stationary=settled,
        failed=samples.failed,
        products=values.products.reshape(shape).amax(1) + samples.products,
        damping=values.damping.reshape(shape).amax(1),
    )
    return Minimum(
        **{
            name: torch.where(per_sample(alone, value), value, getattr(samples, name))
            for name, value in vars(of_rows).items()
        }
    )
