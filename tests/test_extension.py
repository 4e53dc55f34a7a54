"""One entry each: methods of every kind, and a format with its module and its checkpoints.

Nothing of the package is edited or patched: an entry is added to a list, and commands, recipes,
preflight, the comparison, resuming, saving, loading and taking over know of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama
from torch import Tensor, nn
from typer.testing import CliRunner

import llmkern
from llmkern.calibrate import HessianStatistic
from llmkern.cli import build_app
from llmkern.drive import (
    ByGradient,
    EachBlock,
    EachGroup,
    EachLinear,
    Elsewhere,
    Group,
    Layer,
)
from llmkern.formats import FORMATS, Misfit, QuantFormat
from llmkern.models import fold, scale_columns
from llmkern.models.linears import dense_weight
from llmkern.nn import PACKED, PackedLinear
from llmkern.ops import round_to_nearest
from llmkern.pipeline import Pipeline, Quantize, parse_recipe
from llmkern.pipeline.compare import compare
from llmkern.pipeline.preflight import check
from llmkern.prune import METHODS as PRUNE
from llmkern.prune import PrunedWeight
from llmkern.prune._layers import LayerOptions, SingleWeights
from llmkern.prune._method import PruneMethod
from llmkern.quantize import METHODS, QuantizedModule, QuantizedWeight, QuantizeMethod
from llmkern.quantize._formats import Formats, IntFormats
from llmkern.wire import WIRES, TakenOver, Wire, fill_pending, leave_pending, like
from llmkern.wire.checkpoint_files import CheckpointFiles

VOCAB, SEQ_LEN = 16, 24
TOKENS = torch.arange(8 * SEQ_LEN).view(8, SEQ_LEN).mul(7) % VOCAB
PROBE = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
GROUPS = {"group_size": 32}


@dataclass(frozen=True)
class KnobOptions:
    """Options of the throwaway methods.

    Attributes:
        knob: how far the throwaway is turned.
        true_sequential: inside a block, let each linear see the outputs of those before it.
    """

    knob: float = 1.0
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not self.knob > 0:
            raise ValueError(f"knob: got {self.knob}, expected a positive number")


class Killed(BaseException):
    """What ends a run from outside."""


calls_to_live: list[int] = []


def rounded(weight: Tensor, fmt: QuantFormat, loss: float = 0.0) -> QuantizedWeight:
    if calls_to_live:
        calls_to_live[0] -= 1
        if calls_to_live[0] < 0:
            raise Killed
    got = round_to_nearest(weight, fmt)
    return QuantizedWeight(got.codes, got.scales, got.zeros, loss, loss, None, True)


# A weight alone.


def by_weight(layer: Layer, options: KnobOptions) -> QuantizedWeight:
    assert layer.statistic is None
    return rounded(layer.weight * options.knob, layer.wanted)


# A weight and the statistic of its input.


class LargestInput:
    """The largest of each feature; it says that it takes a GiB."""

    def __init__(self, K: int, *, tokens: int, device: Any = "cpu") -> None:
        self.rows, self.largest = 0, torch.zeros(K, device=device)

    @classmethod
    def nbytes(cls, K: int) -> int:
        return 1 << 30

    @classmethod
    def nbytes_held(cls, K: int) -> int:
        return 4 * K

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.rows += len(rows)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0).float())


def by_input(layer: Layer, options: KnobOptions) -> QuantizedWeight:
    assert layer.statistic.rows == TOKENS.numel()
    return rounded(layer.weight, layer.wanted, float(layer.statistic.largest.max()))


# Linears that share an input, with the norm or linear before them.


def smooth(group: Group, options: KnobOptions) -> None:
    """Double every other column, and halve what makes it."""
    if group.source is None:
        return
    K = group.layers[0].weight.shape[1]
    s = torch.ones(K) if group.source.tie is not None else 1.0 + torch.arange(K) % 2
    fold(group.block.module, group.source, s)
    for layer in group.layers:
        scale_columns(layer.module, s)


def by_group(group: Group, options: KnobOptions) -> dict[str, QuantizedWeight]:
    assert group.statistic.rows == TOKENS.numel()
    names = {layer.name.rsplit(".", 1)[1] for layer in group.layers}
    if "q_proj" in names:
        assert names == {"q_proj", "k_proj", "v_proj"}
        assert group.source is not None
        assert (group.source.kind, group.source.name) == ("norm", "input_layernorm")
    if "down_proj" in names:
        assert group.source is not None
        assert (group.source.kind, group.source.name) == ("linear", "mlp.up_proj")
    return {layer.name: rounded(layer.weight, layer.wanted) for layer in group.layers}


# A whole block against its own output.


def by_block(group: Group, options: KnobOptions) -> dict[str, QuantizedWeight]:
    block = group.block
    wanted = block.run(0).clone()
    made = {layer.name: rounded(layer.weight, layer.wanted) for layer in group.layers}
    twin = copy.deepcopy(block.module)
    for layer in group.layers:
        local = layer.name.removeprefix(f"{block.name}.")
        twin.set_submodule(local, made[layer.name].module(layer))
    error = float((block.states.run(block.index, twin, 0) - wanted).square().sum())
    assert error > 0
    return {
        name: QuantizedWeight(**{**vars(result), "loss": error}) for name, result in made.items()
    }


# What is no linear: the embedding, and what attention keeps.


def coarse_embedding(layer: Layer, options: KnobOptions) -> QuantizedModule:
    table = layer.module.get_parameter("weight")
    table.copy_((table * 8).round() / 8)
    return QuantizedModule(layer.module)


def coarse_cache(layer: Layer, options: KnobOptions) -> QuantizedModule:
    attention = layer.module
    attention.config.coarse_cache = True
    return QuantizedModule(attention)


def embeddings(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def attentions(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("self_attn")]


# Gradients over the model.


def by_gradient(layer: Layer, options: KnobOptions) -> QuantizedWeight:
    gradient = layer.statistic
    assert gradient.mean.shape == gradient.mean_square.shape == layer.weight.shape
    assert bool((gradient.mean_square > 0).any())
    return rounded(layer.weight, layer.wanted, float(gradient.mean_square.sum()))


WORKS = {
    "weight": EachLinear(by_weight),
    "input": EachLinear(by_input, LargestInput),
    "group": EachGroup(by_group, HessianStatistic, smooth),
    "block": EachBlock(by_block),
    "embedding": Elsewhere(embeddings, coarse_embedding, "embedding"),
    "cache": Elsewhere(attentions, coarse_cache, "attention"),
    "gradient": ByGradient(by_gradient),
}


@pytest.fixture(params=WORKS)
def added(request: pytest.FixtureRequest) -> Iterator[QuantizeMethod]:
    """A throwaway quantizer: one entry."""
    kind = request.param
    method = QuantizeMethod(
        name=f"throwaway-{kind}",
        about=f"a throwaway by {kind}",
        options=KnobOptions,
        formats=IntFormats(),
        work=WORKS[kind],
        compared={f"throwaway by {kind}": {"group_size": 32, "knob": 1.0}},
    )
    METHODS.append(method)
    yield method
    METHODS.remove(method)


@pytest.fixture
def model() -> nn.Module:
    return llama(vocab_size=VOCAB, hidden_size=32, intermediate_size=64)


@pytest.fixture
def directory(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROBE).logits


def command(*arguments: object) -> str:
    environment = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    result = CliRunner(env=environment).invoke(build_app(), list(map(str, arguments)))
    if result.exception is not None:
        raise result.exception
    return result.output


def reads_tokens(method: QuantizeMethod) -> bool:
    return method.work.needs(KnobOptions()).tokens


def data(method: QuantizeMethod) -> dict[str, Any]:
    return {"calibration": TOKENS} if reads_tokens(method) else {}


def test_its_options_are_in_the_commands_help(added: QuantizeMethod) -> None:
    text = command("quantize", "--help")
    assert added.about in text
    assert "How far the throwaway is turned." in text
    assert f"Method {added.name} ─" in text


def test_a_command_runs_it_and_what_it_writes_is_read_again(
    added: QuantizeMethod, model: nn.Module, directory: Path, tokens: Path, tmp_path: Path
) -> None:
    options = {"knob": 1.25, **GROUPS}
    more = ["--calibration", tokens] if reads_tokens(added) else []
    out = tmp_path / "out"
    flags = ["--method", added.name, "--knob", 1.25, "--group-size", 32]
    command("quantize", directory, "-o", out, *flags, *more)
    report = json.loads((out / "llmkern_report.json").read_text())
    assert report["method"] == added.name
    assert report["options"]["knob"] == 1.25
    llmkern.quantize(model, added.name, **options, **data(added))
    assert report["layers"]
    assert torch.equal(logits(llmkern.load(out)), logits(model))
    if not reads_tokens(added):
        with pytest.raises(ValueError, match="does not calibrate"):
            command("quantize", directory, "-o", tmp_path / "x", *flags, "--calibration", tokens)


def test_a_recipe_has_it(
    added: QuantizeMethod, directory: Path, tokens: Path, tmp_path: Path
) -> None:
    stages = parse_recipe(f"- quantize: {{method: {added.name}, knob: 2, group_size: 32}}")
    assert stages[0].options == {"knob": 2.0, "group_size": 32}
    assert stages[0].label == f"quantize {added.name} 4 bits"
    assert stages[0].needs_calibration == reads_tokens(added)
    with pytest.raises(ValueError, match="nob: unknown, did you mean knob"):
        parse_recipe(f"- quantize: {{method: {added.name}, nob: 2}}")
    with pytest.raises(ValueError, match="knob: got 0"):
        parse_recipe(f"- quantize: {{method: {added.name}, knob: 0}}")
    report = Pipeline(stages).run(
        directory, tmp_path / "run", calibration=TOKENS, evaluation=TOKENS, speed=False
    )
    assert report.stages[1].options["method"] == added.name
    assert report.stages[1].driver["layers"]


def test_preflight_knows_its_memory_and_what_it_refuses(
    added: QuantizeMethod, directory: Path
) -> None:
    stage = Quantize(added.name, **GROUPS)
    found = check(directory, [stage], calibration=TOKENS)
    assert not found.errors
    (figures,) = found.figures
    plain = check(directory, [Quantize("rtn", **GROUPS)]).figures[0]
    assert figures.disk_bytes > 0
    if added.name.endswith("-input"):  # its statistic's own word for it
        assert figures.memory_bytes > (1 << 30) > plain.memory_bytes
    if added.name.endswith("-gradient"):
        assert figures.memory_bytes > plain.memory_bytes
    missing = check(directory, [stage])
    assert bool(missing.errors) == reads_tokens(added)
    if added.name.rpartition("-")[2] not in ("embedding", "cache"):
        odd = check(directory, [Quantize(added.name, group_size=48)], calibration=TOKENS)
        assert "does not divide K = 32" in str(odd.errors[0])


def test_compare_has_a_row_of_it(added: QuantizeMethod, model: nn.Module) -> None:
    report = compare(
        model, methods=[added.name], calibration=TOKENS, evaluation=TOKENS, samples=8, speed=False
    )
    assert not report.left_out
    assert [row.label for row in report.stages][1:] == list(added.compared)


def test_a_run_that_was_killed_goes_on(
    added: QuantizeMethod, model: nn.Module, tmp_path: Path
) -> None:
    whole, killed, again = (copy.deepcopy(model) for _ in range(3))
    llmkern.quantize(whole, added.name, **GROUPS, **data(added))
    place = tmp_path / "state"
    calls_to_live.append(10)  # of the seven linears in each of two blocks
    try:
        llmkern.quantize(killed, added.name, checkpoint=place, **GROUPS, **data(added))
        assert added.name.endswith(("embedding", "cache"))  # which round nothing
    except Killed:
        assert [path.name for path in place.glob("block-*")] == ["block-00000"]
    finally:
        calls_to_live.clear()
    report = llmkern.quantize(
        again, added.name, checkpoint=place, resume=True, **GROUPS, **data(added)
    )
    assert torch.equal(logits(again), logits(whole))
    assert report.layers


# A method of another driver.


@dataclass(frozen=True)
class ComingOptions(LayerOptions):
    """Options of `coming`; those of `LayerOptions`, and

    Attributes:
        wind: where it comes from.
    """

    wind: str = "west"


def coming(layer: Layer, options: ComingOptions) -> PrunedWeight:
    weight = layer.weight.clone()
    weight[:, : round(float(layer.wanted) * weight.shape[1])] = 0
    return PrunedWeight(weight, weight != 0, 0.0, 0.0)


@pytest.fixture
def pruning() -> Iterator[PruneMethod]:
    method = PruneMethod(
        name="coming",
        about="the first columns go",
        options=ComingOptions,
        amounts=("sparsity",),
        work=SingleWeights(coming),
        compared={"coming 25 %": {"sparsity": 0.25}},
    )
    PRUNE.append(method)
    yield method
    PRUNE.remove(method)


def test_a_pruning_method_is_added(
    pruning: PruneMethod, model: nn.Module, directory: Path, tmp_path: Path
) -> None:
    text = command("prune", "--help")
    assert "the first columns go" in text
    assert "Where it comes from." in text
    flags = ["--method", "coming", "--sparsity", 0.25, "--wind", "east"]
    command("prune", directory, "-o", tmp_path / "out", *flags)
    weight = llmkern.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert bool((weight[:, :8] == 0).all())
    assert bool((weight[:, 8:] != 0).all())
    (stage,) = parse_recipe("- prune: {method: coming, sparsity: 0.25}")
    assert not stage.needs_calibration
    found = check(directory, [stage])
    assert not found.errors
    assert found.figures[0].memory_bytes > 0
    report = compare(model, methods=["coming"], calibration=TOKENS, evaluation=TOKENS, speed=False)
    assert [row.label for row in report.stages] == ["original", "coming 25 %"]


# A format, the module that holds it, a method that makes it, and a checkpoint format for it.


@dataclass(frozen=True)
class ByteFormat:
    """Whole bytes with one scale per row.

    Attributes:
        top: largest code.
    """

    top: int = 127

    bits: ClassVar[int] = 8
    symmetric: ClassVar[bool] = True

    def groups(self, K: int) -> int:
        return K

    def misfit(self, N: int, K: int) -> Misfit | None:
        return Misfit("top", self.top, f"is odd with K = {K}", "even K") if K % 2 else None

    def nbytes(self, N: int, K: int, itemsize: int, *, in_memory: bool) -> int:
        return N * K + N * itemsize

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ByteLinear(PackedLinear):
    """y = x @ (steps * octets)ᵀ."""

    FORMAT = ByteFormat
    _FILE_BUFFERS = ("octets", "steps")
    _REPACKED_BUFFERS = ()
    _KERNEL_BUFFERS = ()

    def __init__(self, octets: Tensor, steps: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = octets.shape
        self._dtype, self._layout = steps.dtype, None
        self.register_buffer("octets", octets)
        self.register_buffer("steps", steps)
        self.register_parameter("bias", bias)

    @classmethod
    def from_format(cls, linear: nn.Module, fmt: ByteFormat) -> ByteLinear:
        w = dense_weight(linear)
        steps = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / fmt.top
        octets = (w / steps).round().to(torch.int8)
        return cls(octets, steps, linear._parameters.get("bias")).train(linear.training)

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"octets": self.octets, "steps": self.steps}

    @classmethod
    def from_stored(
        cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> ByteLinear:
        return cls(tensors["octets"], tensors["steps"], bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.octets * self.steps).to(dtype or self._dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def _wanted_layout(self) -> str | None:
        return None

    def _file_tensors(self) -> dict[str, Tensor | None]:
        return {"octets": self.octets, "steps": self.steps}


class Foreign(nn.Linear):
    """A layer of another package, as transformers would have loaded it."""

    parts: dict[str, Tensor]


class Bytes(Wire):
    """`name.rounded` and `name.unit` in place of a weight."""

    name = "bytes"
    kinds = (ByteLinear,)
    takes = "a model of bytes"

    def reader(self, files: CheckpointFiles) -> BytesReader:
        return BytesReader(files)

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "layers": list(layers)}

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        return {"rounded": layer.octets, "unit": layer.steps}

    def take_over(self, model: nn.Module) -> TakenOver | None:
        found = {n: m for n, m in model.named_modules() if isinstance(m, Foreign)}
        for name, module in found.items():
            model.set_submodule(name, like(module, made(module.parts, module.bias)))
        return TakenOver({}, True) if found else None


class BytesReader:
    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files

    def prepare(self, model: Any) -> None:
        names = self.files.config["quantization_config"]["layers"]
        leave_pending(model, names, ["rounded", "unit"], "rounded")

    def explain(self, unexpected: Sequence[str]) -> str | None:
        return None

    def fill(self, model: Any) -> None:
        fill_pending(model, self.files, ["rounded", "unit"], made)


def made(tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> ByteLinear:
    return ByteLinear(tensors["rounded"], tensors["unit"], bias)


@dataclass(frozen=True)
class ByteFormats(Formats):
    """The formats of `bytes`."""

    rule: ClassVar[tuple[str, ...]] = ("top",)
    written: ClassVar[str] = "TOP"

    def choose(self, bits: int = 8, group_size: Any = None, symmetric: bool = True, top: int = 127):
        return ByteFormat(top)

    def parse(self, text: str, common: Mapping[str, Any]) -> ByteFormat | None:
        return ByteFormat(int(text)) if text.isdigit() else None

    def label(self, options: Mapping[str, Any]) -> str:
        return ""


@pytest.fixture
def all_of_bytes() -> Iterator[QuantizeMethod]:
    method = QuantizeMethod(
        name="bytes",
        about="a byte a weight",
        options=KnobOptions,
        formats=ByteFormats(),
        work=EachLinear(
            lambda layer, options: QuantizedModule(
                ByteLinear.from_format(layer.module, layer.wanted)
            )
        ),
        compared={"bytes": {}},
    )
    wire = Bytes()
    lists: list[tuple[list[Any], Any]] = [
        (METHODS, method),
        (FORMATS, ByteFormat),
        (PACKED, ByteLinear),
        (WIRES, wire),
    ]
    for place, entry in lists:
        place.append(entry)
    yield method
    for place, entry in lists:
        place.remove(entry)


def test_a_format_with_its_module_and_its_files_is_added(
    all_of_bytes: QuantizeMethod, directory: Path, tmp_path: Path
) -> None:
    rule = "*.down_proj=63"
    command("quantize", directory, "-o", tmp_path / "out", "--method", "bytes", "--rule", rule)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bytes"
    read = llmkern.load(tmp_path / "out")
    layer = read.model.layers[1].mlp.down_proj
    assert isinstance(layer, ByteLinear)
    assert int(layer.octets.max()) == 63
    assert int(read.model.layers[1].mlp.up_proj.octets.max()) == 127

    state, model = tmp_path / "state", llmkern.load(directory)
    rules = {"*.down_proj": ByteFormat(63)}
    llmkern.quantize(model, "bytes", rules=rules, checkpoint=state)
    assert torch.equal(logits(model), logits(read))
    resumed = llmkern.load(directory)
    llmkern.quantize(resumed, "bytes", rules=rules, checkpoint=state, resume=True)
    assert torch.equal(logits(resumed), logits(read))

    for name, module in llmkern.wire.packed_layers(model).items():
        foreign = Foreign(module.in_features, module.out_features, bias=False, device="meta")
        foreign.parts = WIRES[-1].tensors(module)
        model.set_submodule(name, foreign)
    assert torch.equal(logits(llmkern.accelerate(model)), logits(read))

    patched = llmkern.load(directory)
    llmkern.patch(patched, {"*": ByteFormat(), "*.down_proj": ByteFormat(63)})
    assert torch.equal(logits(patched), logits(read))

    (stage,) = parse_recipe("- quantize: {method: bytes, rules: {'*.down_proj': {top: 63}}}")
    found = check(directory, [stage])
    assert not found.errors
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert found.figures[0].weight_bytes == len(written) - header
    run = Pipeline([stage]).run(directory, tmp_path / "run", evaluation=TOKENS, speed=False)
    assert torch.equal(logits(llmkern.load(tmp_path / "run")), logits(read))
    assert run.stages[1].disk_bytes < run.stages[0].disk_bytes
