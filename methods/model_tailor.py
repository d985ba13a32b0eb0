"""Model Tailor: keep a tenth of what tuning changed, and let it make up for what is undone.

Per linear W [m, n] of a tuned model, with W0 the base's and X the inputs of calibration examples:

    H = 2/N X X^T + damping mean(diag) I;   U upper triangular with U^T U = H^-1
    score = w z(|W - W0|) + (1 - w) z(W^2 / diag(U)^2)        z per row, within a block of columns
    in each block of 128 columns the `sparsity` share of lowest score goes back to W0, column by
    column j, and what that costs is spread over the columns that follow:
        e = (W_j - Q_j) / U_jj,   W_: -= e U_j:

W is what the columns before have made of the tuned weight; z(|W - W0|) is of the tuned weight
itself. This is SparseGPT's sweep towards W0 instead of 0: with the minus sign each step is the
optimal-brain-surgeon update that minimises ||(W_tuned - Q) X||. The released code adds instead
(the minus stands beside it, commented out), which moves the outputs further away than no
compensation at all; `compensation` has both, and the standard one is the default.

As in the code that its main script runs: w = 0.8 (another file has 0.5); the global mask by
|W - W0| alone, computed first, is unused; only linears are edited, norms and biases stay tuned; a
tuned connector goes back to the base. It reverts one entry per block more than the share (its
threshold includes itself). H is measured on the tuned model, on the parent's own training data;
`inputs: edited` (the code) lets a layer see what the edited layers before it give, `tuned` what the
tuned ones gave. The code edits layers 20 to 31 of 32, which are those that its parent had tuned;
here all that the parent changed, or a share counted from the last. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.context import PostHoc
from ballast.declare import Declaration, hyper

declaration = Declaration(
    title="Model Tailor",
    citation="Zhu et al., Model Tailor: Mitigating Catastrophic Forgetting in Multi-modal Large "
    "Language Models, ICML 2024, arXiv:2402.12048",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
)


@dataclass(frozen=True)
class Hyper:
    sparsity: float = hyper(0.9, "sparsity_level of the released code", low=0.0, high=1.0)
    compensation: str = hyper(
        "minus", "SparseGPT's; the released code has plus", choices=("minus", "plus")
    )
    change_weight: float = hyper(0.8, "w in the file that the main script runs", low=0.0, high=1.0)
    block: int = hyper(128, "blocksize of the released code", low=1)
    damping: float = hyper(0.01, "percdamp of the released code", low=1e-6)
    examples: int = hyper(128, "nsamples of the released code", low=1)
    inputs: str = hyper("edited", "the released code", choices=("edited", "tuned"))
    layers: float = hyper(1.0, "share of the layers, from the last; here all", low=0.0, high=1.0)


@torch.no_grad()
def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    assert ctx.anatomy is not None
    assert ctx.examples is not None
    tuned, hyper = ctx.only(), ctx.hyper
    model = ctx.load(0).eval()
    connector = ctx.anatomy.connector
    edited = {n: w for n, w in tuned.items() if not (connector and n.startswith(f"{connector}."))}
    batches = list(ctx.examples(0, hyper.examples))
    names = ctx.anatomy.layer_names(model)
    for layer_name in names[len(names) - round(hyper.layers * len(names)) :]:
        linears = {
            f"{layer_name}.{name}.weight": module
            for name, module in model.get_submodule(layer_name).named_modules()
            if isinstance(module, nn.Linear) and f"{layer_name}.{name}.weight" in tuned
        }
        hessians = _hessians(model, list(linears.values()), batches)
        for (name, module), hessian in zip(linears.items(), hessians, strict=True):
            start = ctx.base[name].to(hessian.device, torch.float64)
            weight = tuned[name].to(hessian.device, torch.float64)
            patched = tailor(weight, start, hessian, hyper).to(ctx.base[name].dtype)
            edited[name] = patched.cpu()
            if hyper.inputs == "edited":
                module.weight.copy_(patched)
    return edited


def _hessians(
    model: nn.Module, linears: Sequence[nn.Linear], batches: Sequence[dict[str, Tensor]]
) -> list[Tensor]:
    """2/N X X^T of the inputs of each linear, float64 [n, n], N the number of examples."""
    found = []
    for module in linears:
        kind = {"dtype": torch.float64, "device": module.weight.device}
        found.append(torch.zeros(module.in_features, module.in_features, **kind))

    def add(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).double()
            total.addmm_(rows.T, rows, alpha=2 / len(batches))

        return hook

    hooks = [m.register_forward_pre_hook(add(h)) for m, h in zip(linears, found, strict=True)]
    for batch in batches:
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    return found


def tailor(weight: Tensor, start: Tensor, hessian: Tensor, hyper: Hyper) -> Tensor:
    """Q [m, n]: the tuned weight with the share of lowest score at `start`, the rest compensated.

    weight, start: [m, n]; hessian: 2/N X X^T [n, n], all float64.
    """
    root = _inverse_root(hessian, hyper.damping)
    weight, change = weight.clone(), (weight - start).abs()
    sign = -1.0 if hyper.compensation == "minus" else 1.0
    for first in range(0, weight.shape[1], hyper.block):
        block = slice(first, min(first + hyper.block, weight.shape[1]))
        scale = root.diagonal()[block]
        score = hyper.change_weight * _standardised(change[:, block])
        score += (1 - hyper.change_weight) * _standardised((weight[:, block] / scale).square())
        reverted = _lowest(score, hyper.sparsity)
        errors = torch.zeros_like(score)
        for i, j in enumerate(range(block.start, block.stop)):
            kept = torch.where(reverted[:, i], start[:, j], weight[:, j])
            errors[:, i] = (weight[:, j] - kept) / root[j, j]
            following = slice(j + 1, block.stop)
            weight[:, following] += sign * torch.outer(errors[:, i], root[j, following])
            weight[:, j] = kept
        weight[:, block.stop :] += sign * errors @ root[block, block.stop :]
    return weight


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """U upper triangular with U^T U the inverse of the damped H; inputs that are always 0 get 1."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _standardised(values: Tensor) -> Tensor:
    """z-scores per row; 0 for a row without variance."""
    if values.shape[1] == 1:
        return torch.zeros_like(values)
    deviation = values.std(1, keepdim=True)
    z = (values - values.mean(1, keepdim=True)) / deviation
    return torch.where(deviation > 0, z, 0.0)


def _lowest(score: Tensor, share: float) -> Tensor:
    """Mask of the share of entries with the lowest score."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    order = score.flatten().argsort(stable=True)
    mask[order[: round(share * score.numel())]] = True
    return mask.view(score.shape)
