"""Train the small language model that ships inside llmkern.

The corpus is the running interpreter's standard library (sources and language reference), so the
whole thing needs no download. Three steps, each of which can be repeated on its own::

    python scripts/train_bundled_model.py prepare --work-dir /tmp/bundled
    python scripts/train_bundled_model.py train   --work-dir /tmp/bundled --steps 6000
    python scripts/train_bundled_model.py export  --work-dir /tmp/bundled

The learning rate warms up, stays constant and falls to zero over the last `--decay-steps` steps.
Since the constant part has no built-in end, a run that turned out too slow (or too short) can be
stopped and resumed with another `--steps` and still finish with a proper decay.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llmkern._json import to_json
from llmkern.assets.corpus import documents, is_held_out, stable_hash

ASSETS = Path(__file__).resolve().parents[1] / "llmkern" / "assets" / "stdlib-llama"
VOCAB_SIZE = 2048
CONTEXT = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CALIBRATION_BYTES = 300_000
EVALUATION_BYTES = 200_000
EXCERPT_BYTES = 12_000  # Keeps one long module from filling a shipped text on its own.

app = typer.Typer(add_completion=False, no_args_is_help=True)
WorkDir = Annotated[Path, typer.Option(help="Where the tokens and checkpoints are kept.")]


def excerpt(texts: dict[str, str], size: int) -> str:
    """Joins the beginnings of documents, cut between lines, into about `size` bytes of text."""
    parts: list[str] = []
    for name in sorted(texts, key=stable_hash):
        remaining = size - sum(len(part.encode()) for part in parts)
        if remaining < 200:
            break
        text = texts[name]
        limit = min(EXCERPT_BYTES, remaining)
        if len(text) > limit:
            # A blank line is where code and prose both pause.
            text = text[: text.rfind("\n\n", 0, limit) + 1]
        parts.append(text)
    return "\n\n".join(parts)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@app.command()
def prepare(work_dir: WorkDir) -> None:
    """Builds the corpus, the tokenizer and the shipped texts."""
    train_documents: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for name, text in documents():
        (held_out if is_held_out(name) else train_documents)[name] = text

    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / "calibration.txt").write_text(excerpt(train_documents, CALIBRATION_BYTES))
    (work_dir / "evaluation.txt").write_text(excerpt(held_out, EVALUATION_BYTES))

    tokenizer = train_tokenizer(list(train_documents.values()))
    tokenizer.save_pretrained(work_dir / "tokenizer")
    encode = tokenizer.backend_tokenizer.encode
    ids: list[int] = []
    for text in tqdm(train_documents.values(), desc="tokenizing"):
        ids += [tokenizer.bos_token_id, *encode(text).ids, tokenizer.eos_token_id]
    np.save(work_dir / "train.npy", np.array(ids, dtype=np.uint16))

    summary = {
        "python": platform.python_version(),
        "train_documents": len(train_documents),
        "train_bytes": sum(len(text.encode()) for text in train_documents.values()),
        "train_tokens": len(ids),
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
    }
    (work_dir / "corpus.json").write_text(json.dumps(summary, indent=2))
    typer.echo(json.dumps(summary, indent=2))


class Batches:
    """Gives every step its batch as a function of the seed alone, so that resuming is exact.

    Each epoch cuts the token stream at a fresh offset and visits the windows in a fresh order.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int):
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.per_epoch = (len(tokens) // CONTEXT - 1) // batch_size
        self.epoch = -1

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(CONTEXT)
            self.starts = offset + CONTEXT * rng.permutation(len(self.tokens) // CONTEXT - 1)
            self.epoch = epoch
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size]
        windows = [self.tokens[start : start + CONTEXT] for start in starts]
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def learning_rate(step: int, peak: float, warmup: int, steps: int, decay: int) -> float:
    """Warm-up, constant, then linear decay to zero."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Creates the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Short sequences and torch.compile: on a CPU the plain formula beats flash attention.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def build_optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = [model.model.embed_tokens.weight]
    # "match_rms_adamw" scales Muon's updates so that both can share one learning rate.
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    return [muon, adamw]


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each window's tokens after its first."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


Loss = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: list[int], loss: Loss = next_token_loss) -> float:
    """Loss over the evaluation text in separate full windows."""
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    # Equal batches, so that the mean of means is the mean (and a compiled loss never recompiles).
    batches = windows[: len(windows) // 8 * 8].split(8)
    return sum(loss(model, batch).item() for batch in batches) / len(batches)


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict
) -> None:
    """Writes aside first: an interrupted save must not cost the previous checkpoint."""
    content = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "state": state,
    }
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@app.command()
def train(
    work_dir: WorkDir,
    steps: Annotated[int, typer.Option(help="Where the run ends; may change on resuming.")] = 6000,
    decay_steps: Annotated[int, typer.Option(help="Length of the final decay to zero.")] = 1500,
    warmup_steps: int = 100,
    peak_lr: float = 3e-3,
    weight_decay: float = 0.1,
    batch_size: int = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 2,
    threads: int = 2,
    seed: int = 0,
    checkpoint_every: int = 200,
) -> None:
    """Trains the model, resuming from the working directory's checkpoint where there is one."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "tokenizer")
    evaluation = tokenizer((work_dir / "evaluation.txt").read_text(), verbose=False).input_ids
    batches = Batches(np.load(work_dir / "train.npy", mmap_mode="r"), batch_size, seed)
    model = build_model(tokenizer)
    optimizers = build_optimizers(model, weight_decay)
    state = {"step": 0, "seconds": 0.0, "commands": [], "history": []}

    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        state = saved["state"]
    state["commands"].append(f"python {' '.join(sys.argv)}  # from step {state['step']}")
    loss_of = torch.compile(next_token_loss)

    started, recent = time.perf_counter(), []
    progress = tqdm(range(state["step"], steps), initial=state["step"], total=steps, mininterval=10)
    for step in progress:
        lr = learning_rate(step, peak_lr, warmup_steps, steps, decay_steps)
        for micro in range(accumulate):
            loss = loss_of(model, batches[step * accumulate + micro]) / accumulate
            loss.backward()
            recent.append(loss.item() * accumulate)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

        done = step + 1
        if done % checkpoint_every == 0 or done == steps:
            now = time.perf_counter()
            entry = {
                "step": done,
                "lr": round(lr, 6),
                "train_loss": round(sum(recent) / len(recent), 4),
                "held_out_loss": round(held_out_loss(model, evaluation, loss_of), 4),
            }
            state["history"].append(entry)
            state["step"], state["seconds"] = done, state["seconds"] + now - started
            state["tokens"] = done * accumulate * batch_size * CONTEXT
            state["settings"] = {
                "seed": seed,
                "peak_lr": peak_lr,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "decay_steps": decay_steps,
                "tokens_per_step": accumulate * batch_size * CONTEXT,
                "threads": threads,
            }
            started, recent = time.perf_counter(), []
            tqdm.write(to_json(entry))
            save_checkpoint(checkpoint, model, optimizers, state)


@app.command()
def export(work_dir: WorkDir, output: Path = ASSETS) -> None:
    """Writes the latest checkpoint, the tokenizer, the texts and the record of the training."""
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "tokenizer")
    saved = torch.load(work_dir / "checkpoint.pt")
    model = build_model(tokenizer)
    model.load_state_dict(saved["model"])
    # The record must describe what is shipped, hence the loss of the rounded weights.
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copyfile(work_dir / name, output / name)
    stdlib = Path(sysconfig.get_path("stdlib"))
    shutil.copyfile(stdlib / "LICENSE.txt", output / "LICENSE.python.txt")

    evaluation = tokenizer((work_dir / "evaluation.txt").read_text(), verbose=False).input_ids
    loss = held_out_loss(model.float(), evaluation)
    state = saved["state"]
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commands": [command.replace(str(work_dir), "DIR") for command in state["commands"]],
        "settings": state["settings"],
        "corpus": json.loads((work_dir / "corpus.json").read_text()),
        "parameters": model.num_parameters(),
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": round(state["seconds"]),
        "tokens_per_second": round(state["tokens"] / state["seconds"]),
        "train_loss": state["history"][-1]["train_loss"],
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}",
        "history": state["history"],
    }
    (output / "training.json").write_text(to_json(record, indent=2) + "\n")
    typer.echo(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}; written to {output}")


if __name__ == "__main__":
    app()
