"""obs_quantize and obs_prune of one layer, factorization included, against other implementations.

python bench/bench_obs.py --shape 4096x4096 --rounds 5 --json out.json
python bench/bench_obs.py --job 50% --job 2:4
pytest bench/bench_obs.py                 (one small case, through pytest-benchmark)

GPTQ: asymmetric 4-bit codes in groups of 128. SparseGPT: 50 % of each block of 128 columns, or 2:4.
Damping 0.01, no act-order. Every result's loss tr((W - Ŵ) H (W - Ŵ)ᵀ) is printed over llmkern's, and
must lie within 3 % of it: llm-compressor's GPTQ fits its grids to the original weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import harness
import torch
import typer
from harness import Case, Contender
from torch import Tensor

from llmkern.formats.int4 import QuantFormat
from llmkern.ops import obs_prune, obs_quantize
from llmkern.ops._hessian_factor import factorize_hessian

GROUP_SIZE, BLOCK_SIZE, DAMP = 128, 128, 0.01
FMT = QuantFormat(4, GROUP_SIZE, symmetric=False)
SHAPES = ("4096x4096", "4096x14336")
# Of a job that prunes: columns kept of how many, or None for SPARSITY of each block.
PATTERNS = {"50%": None, "2:4": (2, 4)}
JOBS = ("gptq", *PATTERNS)
SPARSITY = 0.5
LOSS_TOLERANCE = 0.03


def layer(N: int, K: int) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and the Hessian [K, K] of correlated inputs with spread channel scales."""
    torch.manual_seed(0)
    mix = torch.randn(256, K) * torch.exp(0.5 * torch.randn(K)) / 16
    H = torch.zeros(K, K)
    rows = min(K + 512, 6144)
    for _ in range(0, rows, 1024):
        x = torch.randn(1024, 256) @ mix + 0.3 * torch.randn(1024, K)
        H.addmm_(x.t(), x, alpha=2 / rows)
    return torch.randn(N, K) * 0.02, H


def inverse_factor(H: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of H, damped; overwrites H."""
    H.diagonal().add_(DAMP * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True)


def torch_gptq(w: Tensor, H: Tensor) -> Tensor:
    """GPTQ as published (arXiv 2210.17323, Alg. 1) in plain torch; overwrites w and H. Returns Ŵ."""
    K = w.shape[1]
    T = inverse_factor(H)
    for first in range(0, K, BLOCK_SIZE):
        last = min(first + BLOCK_SIZE, K)
        block, T_block = w[:, first:last], T[first:last, first:last]
        errors = torch.empty_like(block)
        for k in range(last - first):
            if (first + k) % GROUP_SIZE == 0:
                low, high = block[:, k:].aminmax(dim=1)
                scale = ((high.clamp(min=0) - low.clamp(max=0)) / 15).clamp(min=1e-8)
                zero = (-low.clamp(max=0) / scale).round()
            code = (block[:, k] / scale).round().add(zero).clamp(0, 15)
            value = (code - zero) * scale
            errors[:, k] = (block[:, k] - value) / T_block[k, k]
            block[:, k + 1 :] -= errors[:, k, None] * T_block[k, k + 1 :]
            block[:, k] = value
        w[:, last:] -= errors @ T[first:last, last:]
    return w


def torch_sparsegpt(w: Tensor, H: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """SparseGPT as published (arXiv 2301.00774, Alg. 1) in plain torch; overwrites w and H. Returns Ŵ."""
    K = w.shape[1]
    T = inverse_factor(H)
    for first in range(0, K, BLOCK_SIZE):
        last = min(first + BLOCK_SIZE, K)
        block, T_block = w[:, first:last], T[first:last, first:last]
        errors = torch.empty_like(block)
        goes = torch.zeros_like(block, dtype=torch.bool)
        if pattern is None:
            scores = (block / T_block.diagonal()).square()
            goes = scores <= scores.flatten().sort().values[int(SPARSITY * scores.numel()) - 1]
        for k in range(last - first):
            if pattern is not None and k % pattern[1] == 0:
                group = slice(k, k + pattern[1])
                scores = (block[:, group] / T_block.diagonal()[group]).square()
                lowest = scores.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
                goes[:, group].scatter_(1, lowest, True)
            value = block[:, k].masked_fill(goes[:, k], 0)
            errors[:, k] = (block[:, k] - value) / T_block[k, k]
            block[:, k + 1 :] -= errors[:, k, None] * T_block[k, k + 1 :]
            block[:, k] = value
        w[:, last:] -= errors @ T[first:last, last:]
    return w


def llmcompressor_sparsegpt(
    pattern: tuple[int, int] | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """llm-compressor's sparsify_weight; raises ImportError where it is not installed."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    def run(w: Tensor, H: Tensor) -> Tensor:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(w, requires_grad=False)
        shape = (SPARSITY, *(pattern or (0, 0)), BLOCK_SIZE, DAMP, False)
        w_hat: Tensor = sparsify_weight(linear, {linear: H}, *shape)[1]
        return w_hat

    return run


def llmcompressor_gptq() -> Callable[[Tensor, Tensor], Tensor]:
    """llm-compressor's quantize_weight; raises ImportError where it is not installed."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP_SIZE
    )

    def run(w: Tensor, H: Tensor) -> Tensor:
        groups = w.view(len(w), -1, GROUP_SIZE)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-8)
        zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
        batch = (w[None], H[None], scale[None], zero[None], None, args)
        w_hat: Tensor = quantize_weight(*batch, blocksize=BLOCK_SIZE, percdamp=DAMP)[0][0]
        return w_hat

    return run


def gptqmodel_gptq() -> Callable[[Tensor, Tensor], Tensor]:
    """GPTQModel's GPTQ on a given Hessian; raises ImportError where it is not installed."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=4, group_size=GROUP_SIZE, sym=False, desc_act=False, damp_percent=DAMP
    )

    def run(w: Tensor, H: Tensor) -> Tensor:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight.data = w
        task = GPTQ(linear, config)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples, task.expected_nsamples = H, len(H), len(H)
        task.finalize_hessian = lambda target_device=None: H
        w_hat: Tensor = task.quantize(blocksize=BLOCK_SIZE)[0]
        return w_hat

    return run


def make_case(N: int, K: int, job: str) -> Case:
    """One layer by every contender; the peers get fresh copies, which they overwrite."""
    w, H = layer(N, K)
    damped = H.clone()
    damped.diagonal().add_(DAMP * H.diagonal().mean())
    ours, peers = OURS[job], PEERS[job]
    ratios: dict[str, float] = {}

    def loss(w_hat: Tensor) -> float:
        E = w - w_hat
        return float((E @ damped).mul_(E).sum(dtype=torch.float64))

    ours_loss = loss(ours(w, H))

    def mismatch(name: str, w_hat: Tensor) -> str | None:
        ratio = ratios[name] = loss(w_hat) / ours_loss
        return None if abs(ratio - 1) < LOSS_TOLERANCE else f"loss is {ratio:.4f} of llmkern's"

    def finding(name: str) -> str:
        return f"loss {ratios[name]:.4f} of llmkern's at {label}"

    def peer(name: str, load: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Contender:
        try:
            run = load()
        except ImportError as error:
            return harness.missing(name, str(error))
        return Contender(
            name,
            lambda i: run(w.clone(), H.clone()),
            partial(mismatch, name),
            finding=partial(finding, name),
        )

    label = f"N={N} K={K}" + ("" if job == "gptq" else f" {job}")
    return Case(
        label,
        [
            Contender("llmkern", lambda i: ours(w, H), partial(mismatch, "llmkern"), ours=True),
            # A part of the line above, for the split of the time.
            Contender(
                "llmkern factor alone", lambda i: factorize_hessian(H), lambda out: None, ours=True
            ),
            *(peer(name, load) for name, load in peers.items()),
        ],
        bytes=w.nbytes + H.nbytes // 2,
        flops=K**3 / 3 + N * K * K,
        flops_dtype=torch.float32,
    )


def prune(pattern: tuple[int, int] | None, w: Tensor, H: Tensor) -> Tensor:
    if pattern is None:
        return obs_prune(w, H, sparsity=SPARSITY, damp=DAMP).w_hat
    return obs_prune(w, H, pattern=pattern, damp=DAMP).w_hat


OURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gptq": lambda w, H: obs_quantize(w, H, FMT, damp=DAMP).w_hat,
    **{job: partial(prune, pattern) for job, pattern in PATTERNS.items()},
}
PEERS: dict[str, dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]]] = {
    "gptq": {
        "torch loop": lambda: torch_gptq,
        "llm-compressor": llmcompressor_gptq,
        "GPTQModel": gptqmodel_gptq,
    },
    **{
        job: {
            "torch loop": lambda pattern=pattern: partial(torch_sparsegpt, pattern=pattern),
            "llm-compressor": partial(llmcompressor_sparsegpt, pattern),
        }
        for job, pattern in PATTERNS.items()
    },
}


def pytest_generate_tests(metafunc: Any) -> None:
    harness.parametrize(metafunc, lambda: make_case(64, 256, "gptq"))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="NxK, repeatable")] = None,
    job: Annotated[list[str] | None, typer.Option(help=f"one of {JOBS}, repeatable")] = None,
    rounds: harness.Rounds = 3,
    skip: harness.Skip = None,
    json: harness.Json = None,
    merge: harness.Merge = False,
    device: harness.Device = "cpu",
) -> None:
    """Time obs_quantize and obs_prune beside their peers."""
    if unknown := set(job or ()) - set(JOBS):
        raise typer.BadParameter(f"job: got {', '.join(unknown)}, expected some of {JOBS}")

    def cases() -> Iterator[Case]:
        for text in shape or SHAPES:
            for name in job or JOBS:
                yield make_case(*(int(part) for part in text.split("x")), name)

    harness.use_device(device)
    options = harness.Options(rounds, 0, json, merge, tuple(skip or ()))
    harness.run("obs_quantize", cases(), "torch loop", options)


if __name__ == "__main__":
    typer.run(main)
