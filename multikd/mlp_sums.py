"""Sums of two-layer MLPs over several inputs, for several outputs at once: the ladder's arithmetic.

``y_t = Σ_r W2_{t,r} · gelu(W1_{t,r} x_r + b1_{t,r}) + b2_{t,r}``. The sum over inputs of second
layers is one matrix product over the concatenated hidden units (UNIC, arXiv 2408.05088: METHODS,
section 1). Shapes: T outputs, R inputs, M = B·N rows, D_r, H_{t,r} hidden, D_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multikd.functional import autocast_dtype, without_autocast
from multikd.onednn import laid_out, pays, product


class MLP(NamedTuple):
    """Weights of one MLP: ``w1 (H, D)``, ``b1 (H,)``, ``w2 (D_t, H)``, ``b2 (D_t,)``."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def mlp_sums(
    inputs: Sequence[Tensor], outputs: Sequence[Sequence[MLP]], skip_unused: bool | None = None
) -> list[Tensor]:
    """Each output's sum over inputs of MLPs, with an exact GELU.

    Lean in memory: kept for the backward pass are the inputs (once for all outputs) and the hidden
    units before the GELU, which is computed again; an output's are freed as soon as its gradients
    are there. Of an output's rows
    whose gradient is zero throughout an image, nothing is computed in the backward pass:
    dropped (image, teacher) pairs cost a forward pass only, and a NaN in them reaches no gradient.
    Differentiable once. Under ``torch.compile`` the same sums are plain operations.

    Args:
        inputs: R tensors ``(B, D_r)`` or ``(B, N, D_r)``, of one B and N.
        outputs: T lists of R MLPs.
        skip_unused: leave unused images out of the backward pass; finding them makes an
            accelerator wait for its queue. None: on CPUs.

    Returns:
        T tensors ``(B, D_t)`` or ``(B, N, D_t)`` in the dtype of autocast, or of the weights. The
        sum over inputs is taken within one product, so half precisions are rounded once.

    Raises:
        ValueError: no output, or one without an MLP for every input.
    """
    if not outputs or any(len(mlps) != len(inputs) for mlps in outputs):
        raise ValueError(
            f"each output needs an MLP for each of {len(inputs)} inputs, received "
            f"{[len(mlps) for mlps in outputs]}"
        )
    device = inputs[0].device
    dtype = autocast_dtype(device) or outputs[0][0].w1.dtype
    if torch.compiler.is_compiling():
        return _plain(inputs, outputs, dtype)
    skip = device.type == "cpu" if skip_unused is None else skip_unused
    flat = [tensor for mlps in outputs for mlp in mlps for tensor in mlp]
    return list(_MLPSums.apply(len(inputs), dtype, skip, *inputs, *flat))


def _plain(
    inputs: Sequence[Tensor], outputs: Sequence[Sequence[MLP]], dtype: torch.dtype
) -> list[Tensor]:
    """The same with autograd's own operations: the first layers of an input in one product."""
    hidden: list[list[Tensor]] = [[] for _ in outputs]
    for r, x in enumerate(inputs):
        mlps = [output[r] for output in outputs]
        first = F.linear(
            x.to(dtype),
            torch.cat([mlp.w1 for mlp in mlps]).to(dtype),
            torch.cat([mlp.b1 for mlp in mlps]).to(dtype),
        )
        for t, part in enumerate(torch.split(first, [mlp.w1.shape[0] for mlp in mlps], dim=-1)):
            hidden[t].append(F.gelu(part))
    return [
        F.linear(
            torch.cat(units, dim=-1),
            torch.cat([mlp.w2 for mlp in mlps], dim=1).to(dtype),
            torch.stack([mlp.b2 for mlp in mlps]).sum(0).to(dtype),
        )
        for units, mlps in zip(hidden, outputs, strict=True)
    ]


class _MLPSums(torch.autograd.Function):
    """See ``mlp_sums``. Hidden units lie side by side, ``(M, Σ_r H_{t,r})`` for each output t."""

    @staticmethod
    def forward(
        ctx: Any, count: int, dtype: torch.dtype, skip: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, mlps = tensors[:count], _grouped(tensors[count:], count)
        shape = inputs[0].shape[:-1]
        with without_autocast(inputs[0].device):
            rows = [x.reshape(-1, x.shape[-1]).to(dtype) for x in inputs]
            hidden, results = [], []
            for own in mlps:
                units = _hidden(rows, own, dtype)
                hidden.append(units)
                w2 = _side_by_side([mlp.w2 for mlp in own], dtype)
                b2 = torch.stack([mlp.b2 for mlp in own]).sum(0).to(dtype)
                results.append(_affine(F.gelu(units), w2, b2).view(*shape, -1))
        ctx.save_for_backward(*rows, *hidden, *tensors[count:])
        ctx.facts = (count, dtype, skip, shape, [x.dtype for x in inputs])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count, dtype, skip, shape, dtypes = ctx.facts
        saved = ctx.saved_tensors
        if hasattr(ctx, "maybe_clear_saved_tensors"):  # not where the graph is kept
            ctx.maybe_clear_saved_tensors()
        rows, hidden = saved[:count], list(saved[count : count + len(gradients)])
        mlps = _grouped(saved[count + len(gradients) :], count)
        del saved
        wanted = ctx.needs_input_grad[3 : 3 + count]
        to_inputs: list[Tensor | None] = [None] * count
        to_weights: list[Tensor | None] = []
        with without_autocast(rows[0].device):
            for t, (gradient, own) in enumerate(zip(gradients, mlps, strict=True)):
                if gradient is None:
                    to_weights += [None] * (4 * count)
                    continue
                held, hidden[t] = [hidden[t]], None
                chosen = _used(gradient) if skip else None
                found = _backward_of(gradient, held, rows, own, chosen, dtype, wanted)
                for r, (of_mlp, change) in enumerate(found):
                    to_weights += of_mlp
                    if change is not None:
                        to_inputs[r] = _added(to_inputs[r], change, chosen, rows[r].shape, shape[0])
            shaped = [
                None if g is None else g.view(*shape, -1).to(kind)
                for g, kind in zip(to_inputs, dtypes, strict=True)
            ]
        return (None, None, None, *shaped, *to_weights)


def _added(
    total: Tensor | None, change: Tensor, chosen: Tensor | None, shape: torch.Size, images: int
) -> Tensor:
    """An input's gradient with that of one more output, of its chosen images.

    In float32 from the second output on, since half precisions would lose digits.
    """
    if chosen is None and total is None:
        return change
    wide = torch.float32 if change.dtype.itemsize < 4 else change.dtype
    if total is None:
        total = torch.zeros(shape, dtype=wide, device=change.device)
    total = total.to(wide)
    if chosen is None:
        return total.add_(change)
    by_image = total.view(images, -1)
    by_image.index_add_(0, chosen, change.view(len(chosen), by_image.shape[1]).to(wide))
    return total


def _backward_of(
    gradient: Tensor,
    held: list[Tensor],
    rows: Sequence[Tensor],
    mlps: Sequence[MLP],
    chosen: Tensor | None,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """One output's gradients, input by input: of its MLP's four weights, and of its chosen rows.

    Args:
        held: the hidden units, alone in a list that is emptied, so that they can be freed.
    """
    images = gradient.shape[0]
    width = gradient.shape[-1]

    def of(tensor: Tensor) -> Tensor:
        if chosen is None:
            return tensor
        return tensor.view(images, -1).index_select(0, chosen).view(-1, tensor.shape[-1])

    g, units = of(gradient.reshape(-1, width)).to(dtype), held.pop()
    # Their rows are read where they lie: a copy of the chosen ones would be the largest of all.
    pieces = _pieces(chosen, len(units) // max(images, 1))
    active = units.new_empty((len(g), units.shape[1]))
    for there, here in pieces:
        torch.ops.aten.gelu.out(units[there], out=active[here])
    # On a CPU the quicker of the two ways in either dtype.
    to_w2 = (active.t() @ g).t() if g.dtype == torch.float32 else g.t() @ active
    to_b2 = g.sum(0)  # accumulated in float32, whatever the dtype
    joined = _side_by_side([mlp.w2 for mlp in mlps], dtype)
    if g.dtype == torch.float32 and pays(g, joined, g.dtype):
        del active
        toward_hidden = product(g, joined.t())
    else:
        toward_hidden = torch.mm(g, joined, out=active)  # the activations' memory once more
    for there, here in pieces:
        piece = toward_hidden[here]
        torch.ops.aten.gelu_backward.grad_input(piece, units[there], grad_input=piece)
    del units
    to_b1 = toward_hidden.sum(0)
    for (start, end), x, mlp, wants in zip(pairwise(_ends(mlps)), rows, mlps, wanted, strict=True):
        part = toward_hidden[:, start:end]
        to_mlp = [
            (part.t() @ of(x)).to(mlp.w1.dtype),
            to_b1[start:end].to(mlp.b1.dtype, copy=True),
            to_w2[:, start:end].to(mlp.w2.dtype, copy=True, memory_format=torch.contiguous_format),
            to_b2.to(mlp.b2.dtype, copy=True),
        ]
        yield to_mlp, part @ mlp.w1.to(dtype) if wants else None


def _hidden(rows: Sequence[Tensor], mlps: Sequence[MLP], dtype: torch.dtype) -> Tensor:
    """First layers of one output, side by side: ``(M, Σ H)``."""
    ends = _ends(mlps)
    units = rows[0].new_empty((rows[0].shape[0], ends[-1]))
    for (start, end), x, mlp in zip(pairwise(ends), rows, mlps, strict=True):
        torch.addmm(mlp.b1.to(dtype), x, mlp.w1.to(dtype).t(), out=units[:, start:end])
    return units


def _affine(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``rows · weightᵀ + bias``."""
    if pays(rows, weight, rows.dtype):
        return product(rows, laid_out(weight, len(rows)), bias)
    return torch.addmm(bias, rows, weight.t())


def _side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Second layers of one output: ``(D_t, Σ H)``, written in their final dtype at once."""
    widths = [w.shape[1] for w in weights]
    joined = weights[0].new_empty((weights[0].shape[0], sum(widths)), dtype=dtype)
    for part, weight in zip(torch.split(joined, widths, dim=1), weights, strict=True):
        part.copy_(weight)
    return joined


def _used(gradient: Tensor) -> Tensor | None:
    """Indices of the images whose gradient is not zero throughout; None for all."""
    images = gradient.flatten(1)
    used = images[:, : gradient.shape[-1]].any(1)  # nearly always the first token tells
    for image in (~used).nonzero().squeeze(1).tolist():
        used[image] = bool(torch.count_nonzero(images[image]))
    chosen = used.nonzero().squeeze(1)
    return None if len(chosen) == len(used) else chosen


def _pieces(chosen: Tensor | None, rows: int) -> list[tuple[slice, slice]]:
    """Rows of chosen images that follow one another: where they lie, and among the chosen.

    Args:
        chosen: indices of images, ascending; None for all.
        rows: of one image.
    """
    if chosen is None:
        return [(slice(None), slice(None))]
    runs: list[list[int]] = []
    for image in chosen.tolist():
        if runs and runs[-1][-1] == image - 1:
            runs[-1].append(image)
        else:
            runs.append([image])
    found, place = [], 0
    for run in runs:
        end = place + len(run)
        there = slice(run[0] * rows, (run[-1] + 1) * rows)
        found.append((there, slice(place * rows, end * rows)))
        place = end
    return found


def _grouped(flat: Sequence[Tensor], count: int) -> list[list[MLP]]:
    mlps = [MLP(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
    return [mlps[i : i + count] for i in range(0, len(mlps), count)]


def _ends(mlps: Sequence[MLP]) -> list[int]:
    ends = [0]
    for mlp in mlps:
        ends.append(ends[-1] + mlp.w1.shape[0])
    return ends
