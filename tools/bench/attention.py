"""torch's fused attention on a CPU against products and a softmax, timm's and ours.

    python tools/bench/attention.py [--dtypes bfloat16 float32] [--json FILE]

Forward alone (a frozen teacher) and forward with backward (the student), of timm's own `Attention`
layer without its linear parts, at the lengths of 96, 224 and 448 px in patches of 16. Printed
beside: the products' time at the rate of a 2048³ product in the same run. What is printed here
decides `multikd/backbones/kernels.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import arguments, finish, in_turns, product_rate, ratio, shown, summary
from torch import Tensor

from multikd.backbones.kernels import attention

HEADS, WIDTH = 6, 64
SHAPES = ((32, 37), (8, 197), (2, 785))  # images and tokens


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As timm computes it where ``fused_attn`` is False."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    found: Tensor = weights.softmax(-1) @ v
    return found


def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, backward: bool) -> None:
    """One call, from the joint projection to the heads side by side."""
    images, tokens, _ = x.shape
    with torch.set_grad_enabled(backward):
        q, k, v = x.reshape(images, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        y = attend(q, k, v).transpose(1, 2).reshape(images, tokens, HEADS * WIDTH)
        if backward:
            y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
            x.grad = None


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """All lengths of one dtype."""
    rate = product_rate(dtype)
    figures: dict[str, Any] = {"product_rate": rate}
    for images, tokens in SHAPES:
        for backward in (False, True):
            x = torch.randn(images, tokens, 3 * HEADS * WIDTH, dtype=dtype, requires_grad=backward)
            times = in_turns(
                {
                    "fused": partial(run, F.scaled_dot_product_attention, x, backward),
                    "plain": partial(run, plain, x, backward),
                    "ours": partial(run, attention, x, backward),
                },
                options.repeats,
            )
            flop = 4.0 * images * tokens**2 * HEADS * WIDTH * (3 if backward else 1)
            name = f"{tokens} tokens, {'forward + backward' if backward else 'forward'}"
            figures[name] = {
                **{way: summary(values) for way, values in times.items()},
                "floor": flop / rate,
                "ratio": ratio(times["fused"], times["ours"]),
            }
    return figures


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = arguments(parser)
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = [
        ("ms: median [range]", "floor", "fused", "plain", "ours", "ours is")
    ]
    for dtype in options.dtypes:
        found = figures[dtype] = measure(options, getattr(torch, dtype))
        for name, row in found.items():
            if name == "product_rate":
                continue
            ways = (shown(row[way], scale=1e3) for way in ("fused", "plain", "ours"))
            rows.append(
                (f"{dtype}, {name}", f"{1e3 * row['floor']:.2g}", *ways, shown(row["ratio"], "×"))
            )
    finish(figures, "attention on a CPU", rows, options.json)


if __name__ == "__main__":
    main()
