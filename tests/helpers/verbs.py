"""What each verb of llmkern does to one architecture: it works, is refused with a reason, or fails."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from architectures import TOKENS, Architecture
from torch import Tensor, nn

import llmkern
from llmkern.calibrate import skipped
from llmkern.models import find_blocks
from llmkern.models.heads import find_routers
from llmkern.models.linears import bias_of, find_linears
from llmkern.nn import is_packed
from llmkern.pipeline import Pipeline, Prune, Quantize, default_recipe
from llmkern.pipeline.preflight import check

WORKS = "works"
# One line that names the argument, what it was, and what would do.
REFUSAL = re.compile(r"([^\s:]+: )+got [^\n]+[,;] expected [^\n]+")
# For the means that biases take up.
TEXT = {"tokenizer": tiny_models.words(), "samples": 4, "seq_len": 16}


class Fault(Exception):
    """Neither done nor refused at the start."""


class Refused(Exception):
    """With a reason that is no error of the call itself."""


class Skip(Exception):
    """Another cell says it."""


class Subject:
    """One architecture, and the directories that were made of it, for all cells of its row."""

    def __init__(self, architecture: Architecture, root: Path) -> None:
        self.architecture, self.root = architecture, root
        self.model_class = getattr(transformers, architecture.model_class)
        self.inputs = architecture.inputs(torch.bfloat16)
        self.outcomes: dict[str, str] = {}
        self.warned: dict[str, list[str]] = {}

    @cached_property
    def directory(self) -> Path:
        """As others have written it."""
        made = self.architecture.model(torch.bfloat16)
        made.save_pretrained(self.root / "original")
        tiny_models.words().save_pretrained(self.root / "original")
        return self.root / "original"

    @cached_property
    def original(self) -> Any:
        """As transformers has loaded it; to be copied."""
        return self.read(self.directory)

    @cached_property
    def wanted(self) -> Tensor:
        """Logits of the original."""
        return self.logits(self.original)

    def logits(self, model: nn.Module, **changes: Any) -> Tensor:
        """Float32, finite."""
        with torch.no_grad():
            logits: Tensor = model(**self.inputs | changes).logits
        if not bool(logits.isfinite().all()):
            raise Fault("logits with NaN or Inf")
        return logits

    def read(self, directory: Path, **options: Any) -> Any:
        """By plain transformers, which must find all that it looks for."""
        model, info = self.model_class.from_pretrained(
            directory, output_loading_info=True, **options
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(what):
                raise Fault(f"from_pretrained: {what}: {sorted(map(str, info[what]))[:3]}")
        return model.eval()

    def reread(self, model: Any, name: str, *, plain: bool) -> None:
        """Save it, and compare what both readers make of it."""
        wanted, directory = self.logits(model), self.root / name
        with after("save"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            llmkern.save(model, directory, tiny_models.words())
        self.warned[name] = [str(w.message) for w in said if str(w.message).startswith("save:")]
        readers = {"load": llmkern.load} | ({"from_pretrained": self.read} if plain else {})
        for reader, read in readers.items():
            with after(reader):
                again = read(directory)
                same_tensors(reader, again, model)
                same(reader, self.logits(again), wanted)


@contextmanager
def after(what: str) -> Iterator[None]:
    """What is raised when the work is done is no refusal."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{what}: {type(error).__name__}: {error}") from error


def same(what: str, got: Tensor, wanted: Tensor, tolerance: float = 0.0) -> None:
    """Refuse other logits."""
    if got.shape != wanted.shape:
        raise Fault(f"{what}: logits of shape {list(got.shape)}, not {list(wanted.shape)}")
    error = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    if not (torch.equal(got, wanted) or error <= tolerance):
        raise Fault(f"{what}: other logits, by {error:.2g} of the largest")


def same_tensors(what: str, got: nn.Module, wanted: nn.Module) -> None:
    """Refuse a tensor of another name, dtype, shape or value: those that text does not reach, too."""
    ours, theirs = got.state_dict(), wanted.state_dict()
    if ours.keys() != theirs.keys():
        raise Fault(f"{what}: other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    for name, tensor in theirs.items():
        if ours[name].dtype != tensor.dtype:
            raise Fault(f"{what}: {name}: {tensor.dtype} has become {ours[name].dtype}")
        if not torch.equal(ours[name], tensor):
            raise Fault(f"{what}: {name}: other values")


def other(what: str, got: Tensor, before: Tensor) -> None:
    """Refuse the same logits."""
    if got.shape == before.shape and torch.equal(got, before):
        raise Fault(f"{what}: the logits are as before")


def load_and_save(subject: Subject) -> None:
    """Read by both, written, read by both."""
    model = llmkern.load(subject.directory)
    same("load", subject.logits(model), subject.wanted)
    subject.reread(model, "again", plain=True)


def quantized(method: str, subject: Subject) -> None:
    """Layers packed."""
    model = copy.deepcopy(subject.original)
    data = {} if method != "gptq" else {"calibration": TOKENS}
    with unchanged_if_refused(model):
        report = llmkern.quantize(model, method, **data)
    done(len(report.layers), sum(map(is_packed, model.modules())))
    whole(model, report.layers, report.dense)
    other(method, subject.logits(model), subject.wanted)
    subject.reread(model, method, plain=False)


def done(*counts: int) -> None:
    """Refuse success with nothing done."""
    if not all(counts):
        raise Fault("success with nothing done")


def whole(model: nn.Module, layers: list[Any], left: dict[str, str]) -> None:
    """Refuse routers that were taken for layers, and large weights of which nothing is said."""
    small = [line.name for line in layers if line.shape[0] < 16]
    if small:
        raise Fault(f"{small[0]} and {len(small) - 1} more: what routes or scales was compressed")
    names = {line.name for line in layers} | left.keys()
    blocks = find_blocks(model)
    for name, parameter in blocks.modules.named_parameters(blocks.name):
        if parameter.numel() >= 4096 and not any(name.startswith(f"{n}.") for n in names):
            raise Fault(f"{name}: neither compressed nor listed as left dense")


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """A refusal leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        now = model.state_dict()
        if now.keys() != before.keys() or not all(torch.equal(now[n], before[n]) for n in before):
            raise Fault(f"the model is changed, and then: {error}") from error
        raise


def zeroed(method: str, amounts: list[dict[str, Any]], subject: Subject) -> None:
    """Single weights gone."""
    for amount in amounts:
        model = copy.deepcopy(subject.original)
        data = data_for(method, model)
        with unchanged_if_refused(model):
            report = llmkern.prune(model, method, **amount, **data)
        done(len(report.layers), report.sparsity >= 0.45)
        whole(model, report.layers, report.kept)
        other(method, subject.logits(model), subject.wanted)
        subject.reread(model, f"{method}-{next(iter(amount))}", plain=True)


def data_for(method: str, model: nn.Module) -> dict[str, Any]:
    """Magnitudes need data only for the means that biases take up, and are given none otherwise."""
    if method != "magnitude":
        return {"calibration": TOKENS}
    prefix, narrow = f"{find_blocks(model).name}.", find_routers(model)
    linears = [
        m for n, m in find_linears(model).items() if n.startswith(prefix) and n not in narrow
    ]
    return TEXT if any(bias_of(linear) is not None for linear in linears) else {}


def narrowed(method: str, subject: Subject) -> None:
    """Neurons or heads gone."""
    model = copy.deepcopy(subject.original)
    with unchanged_if_refused(model):
        report = llmkern.prune(model, method, ratio=0.5, calibration=TOKENS)
    done(len(report.widths), report.parameters_after < report.parameters_before)
    other(method, subject.logits(model), subject.wanted)
    subject.reread(model, method, plain=True)


def shortened(subject: Subject) -> None:
    """Blocks gone: what is left computes what the whole model does without them."""
    model = copy.deepcopy(subject.original)
    with unchanged_if_refused(model):
        report = llmkern.prune(model, "depth", ratio=0.5, calibration=TOKENS)
    done(len(report.removed_blocks))
    subject.reread(model, "depth", plain=True)
    with ExitStack() as stack, after("skipping the blocks"):
        whole = copy.deepcopy(subject.original)
        for index in report.removed_blocks:
            stack.enter_context(skipped(find_blocks(whole).modules[index]))
        same("blocks skipped", subject.logits(model), subject.logits(whole))


def distilled(subject: Subject) -> None:
    """A copy of the model, one step after its teacher."""
    student = copy.deepcopy(subject.original)
    with unchanged_if_refused(student):
        llmkern.distill(student, subject.original, "soft", data=TOKENS, steps=1, lr=0.01)
    if subject.architecture.takes != "text" or not subject.original.can_generate():
        raise Fault("success with text, which the model does not write from left to right")
    before = subject.original.state_dict()
    for name, tensor in student.state_dict().items():
        if tensor.dtype != before[name].dtype:
            raise Fault(f"{name}: {before[name].dtype} has become {tensor.dtype}")
    other("distill", subject.logits(student), subject.wanted)
    subject.reread(student, "distill", plain=True)


def read_packed(method: str, subject: Subject) -> None:
    """By transformers with the format's own package: its logits are ours, in float32."""
    directory = made_by(subject, method)
    warned = subject.warned[method]
    if method == "nf4":  # bitsandbytes computes in the dtype that was packed
        model = copy.deepcopy(subject.original).float()
        llmkern.quantize(model, method)
        directory = subject.root / "nf4-float32"
        llmkern.save(model, directory)
    ours = llmkern.load(directory, dtype=torch.float32)
    changes = {k: v.float() for k, v in subject.inputs.items() if v.is_floating_point()}
    wanted = subject.logits(ours, **changes)
    try:
        theirs = subject.read(directory, dtype=torch.float32)
        for module in theirs.modules():
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' kernel in bfloat16
        again = llmkern.accelerate(copy.deepcopy(theirs))
        same("accelerate", subject.logits(again, **changes), wanted, 1e-5)
        same("from_pretrained", subject.logits(theirs, **changes), wanted, 1e-3)
    except Exception as error:
        if warned:
            raise Refused(warned[0]) from error
        raise Fault(f"from_pretrained: {type(error).__name__}: {error}") from error
    if warned:
        raise Fault(f"it is read well, although: {warned[0]}")


def accelerated(subject: Subject) -> None:
    """The 2:4 sparse model on the sparse kernels."""
    directory = made_by(subject, "sparsegpt", "sparsegpt-pattern")
    model = subject.read(directory)
    wanted = subject.logits(model)
    try:
        llmkern.accelerate(model)
    except ValueError as error:
        if "got no packed layer" in str(error):
            raise Fault(f"2:4 sparse weights are there, and: {error}") from error
        raise
    done(sum(map(is_packed, model.modules())))
    same("accelerate", subject.logits(model), wanted, 0.03)


def made_by(subject: Subject, verb: str, name: str | None = None) -> Path:
    """What another cell has saved."""
    outcome = subject.outcomes[verb]
    if outcome != WORKS:
        raise Skip(f"see {verb}")
    return subject.root / (name or verb)


def generated(subject: Subject) -> None:
    """Greedy tokens with a cache are those without, of the packed model or else the plain one."""
    packed = subject.outcomes["rtn"] == WORKS
    if not subject.original.can_generate():
        raise Skip("the class does not generate")
    directory = subject.root / "rtn" if packed else subject.directory
    model = llmkern.load(directory, dtype=torch.float32)  # in which no two tokens tie
    given = {k: v[:, :8] if k == "input_ids" else v for k, v in subject.inputs.items()}
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    given.pop("decoder_input_ids", None)
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    with after("generate"):
        cached, plain = (model.generate(**given, **new, use_cache=c) for c in (True, False))
    if not torch.equal(cached, plain):
        raise Fault("generate: other tokens with a cache than without")


STAGES = {
    "rtn": partial(Quantize, "rtn"),
    "gptq": partial(Quantize, "gptq"),
    "nf4": partial(Quantize, "nf4"),
    "magnitude": partial(Prune, "magnitude", sparsity=0.5),
    "wanda": partial(Prune, "wanda", pattern="2:4"),
    "sparsegpt": partial(Prune, "sparsegpt", pattern="2:4"),
    "glu": partial(Prune, "glu", ratio=0.5),
    "mlp": partial(Prune, "mlp", ratio=0.5),
    "heads": partial(Prune, "heads", ratio=0.5),
    "taylor": partial(Prune, "taylor", ratio=0.5),
    "depth": partial(Prune, "depth", ratio=0.5),
}


def planned(subject: Subject) -> None:
    """The default recipe, and that a dry run says of every verb what the verb says of itself."""
    check(subject.directory, [], calibration=TOKENS).refuse()
    wrong = []
    for verb, stage in STAGES.items():
        if subject.outcomes[verb].startswith("FAILS"):
            continue
        found = check(subject.original, [stage()], calibration=TOKENS)
        if any("cannot be planned before" in finding.text for finding in found.warnings):
            continue
        if verb == "taylor" and found.errors:
            continue  # planned as if the same share went of every kind; gradients may say otherwise
        if bool(found.errors) == (subject.outcomes[verb] == WORKS):
            said = found.errors[0] if found.errors else "nothing against it"
            wrong.append(f"{verb}: the dry run says: {said}; the verb: {subject.outcomes[verb]}")
    if wrong:
        raise Fault("; ".join(wrong))
    Pipeline(default_recipe()).preflight(
        subject.directory, subject.root / "out", calibration=TOKENS
    ).refuse()


VERBS: dict[str, Callable[[Subject], None]] = {
    "load": load_and_save,
    "rtn": partial(quantized, "rtn"),
    "gptq": partial(quantized, "gptq"),
    "nf4": partial(quantized, "nf4"),
    "magnitude": partial(zeroed, "magnitude", [{"sparsity": 0.5}]),
    "wanda": partial(zeroed, "wanda", [{"sparsity": 0.5}, {"pattern": "2:4"}]),
    "sparsegpt": partial(zeroed, "sparsegpt", [{"sparsity": 0.5}, {"pattern": "2:4"}]),
    "glu": partial(narrowed, "glu"),
    "mlp": partial(narrowed, "mlp"),
    "heads": partial(narrowed, "heads"),
    "taylor": partial(narrowed, "taylor"),
    "depth": shortened,
    "distill": distilled,
    "int4 in transformers": partial(read_packed, "rtn"),
    "nf4 in transformers": partial(read_packed, "nf4"),
    "accelerate": accelerated,
    "generate": generated,
    "dry run": planned,
}


# Packages that a verb needs.
NEEDS = {"int4 in transformers": "compressed_tensors", "nf4 in transformers": "bitsandbytes"}


def run_verb(subject: Subject, verb: str) -> str:
    """The outcome of one cell: WORKS, "refused: REASON", "none: REASON" (no case), "FAILS: ERROR"."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            VERBS[verb](subject)
        except Skip as reason:
            return f"none: {reason}"
        except Refused as reason:
            return f"refused: {reason}"
        except Fault as fault:
            return f"FAILS: {fault}"
        except (ValueError, NotImplementedError) as error:
            text = str(error).replace(str(subject.root), "DIRECTORY")
            if all(map(REFUSAL.fullmatch, re.split(r"; (?=\d+-)", text))):
                return f"refused: {text}"
            return f"FAILS: not 'argument: got ..., expected ...': {type(error).__name__}: {text}"
        except Exception as error:
            return f"FAILS: {type(error).__name__}: {error}"
    return WORKS
