"""What a stage bought: size, quality, speed and continuations of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Bar
from llmkern.evaluate import evaluate
from llmkern.models import evaluation_mode
from llmkern.nn import is_packed
from llmkern.wire.checkpoint_files import weight_files

NEW_TOKENS = 64
_PROMPT_TOKENS = 24


def measure(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | None = None,
    *,
    tokenizer: Any = None,
    reference_tokenizer: Any = None,
    prompts: Sequence[str] = (),
    speed: bool = True,
    batch_size: int = 4,
    kept: dict[bytes, Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The measured fields of a `StageRecord`.

    Args:
        model: a causal language model, compressed or not.
        windows: int64 [n, seq_len], tokens to evaluate on.
        reference: the original, for the KL divergence and top-1 agreement.
        tokenizer: needed where there are prompts.
        reference_tokenizer: of the reference, by default the same.
        prompts: texts to continue greedily, by at most `NEW_TOKENS` tokens each.
        speed: measure prefill and decoding too.
        batch_size: windows per forward.
        kept: the reference's logits, see `llmkern.evaluate`.
        progress: say on standard error how far it is.

    Returns:
        {"parameters": int, "evaluation": dict, "generations": list of str}.

    Raises:
        ValueError: prompts without a tokenizer, or what `llmkern.evaluate` refuses.
    """
    if prompts and tokenizer is None:
        raise ValueError("tokenizer: got None, expected a tokenizer, because there are prompts")
    settings: dict[str, Any] = {"batch_size": batch_size, "speed": speed, "progress": progress}
    settings |= {"reference": reference, "reference_tokenizer": reference_tokenizer, "kept": kept}
    result = evaluate(model, windows, tokenizer, **settings)
    generations = []
    with Bar("continue prompts", len(prompts), "prompt", shown=progress and bool(prompts)) as bar:
        for prompt in prompts:
            generations.append(continuation(model, tokenizer, prompt))
            bar.update()
    return {
        "parameters": count_parameters(model),
        "evaluation": result.to_dict(),
        "generations": generations,
    }


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, tied ones once; a packed layer counts as the N * K weights it stands for."""
    parameters = {id(p): p.numel() for p in model.parameters()}
    packed = [module for module in model.modules() if is_packed(module)]
    return sum(parameters.values()) + sum(p.out_features * p.in_features for p in packed)


def file_bytes(directory: Path) -> int:
    """Bytes of the weight files that loading a directory reads."""
    return sum(path.stat().st_size for path in weight_files(directory))


def beginnings(windows: Tensor, tokenizer: Any) -> list[str]:
    """The first tokens of each window as text, for prompts."""
    length = min(_PROMPT_TOKENS, windows.shape[1] // 2)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in windows[:, :length]]


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """What the model likes best after `prompt`, token by token; the prompt is not repeated."""
    inputs = tokenizer(prompt, return_tensors="pt")
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    with torch.no_grad(), evaluation_mode(model):
        output = model.generate(
            input_ids=inputs.input_ids.to(device),
            attention_mask=inputs.attention_mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
    added = output[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(added, skip_special_tokens=True))
