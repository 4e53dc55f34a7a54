"""llmkern generate."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkern.cli._shared import (
    Dense,
    Device,
    DType,
    Model,
    check_head,
    console,
    open_model,
    open_tokenizer,
)


def generate(
    model_dir: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DType = None,
    device: Device = None,
    dense: Dense = False,
) -> None:
    """Continue a prompt."""
    import torch

    check_head(model_dir)
    tokenizer = open_tokenizer(model_dir)
    if tokenizer is None:
        raise ValueError(
            f"{model_dir}: got no tokenizer files, expected a model with its tokenizer"
        )
    model = open_model(model_dir, dtype, device, sparse=not dense)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    console.print(
        tokenizer.decode(output[0], skip_special_tokens=True), markup=False, highlight=False
    )
