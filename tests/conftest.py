"""Models and experiments that the tests share."""

import dataclasses
import functools
import json
import os
import shutil
import string
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from compilation import compile_quickly
from processes import ForkedProcess
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import softprompt
from softprompt import Base
from softprompt.backbones.batch import Batch
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.loading import Backbone, load_backbone
from softprompt.cli.main import main
from softprompt.cli.progress import printed_log
from softprompt.data.examples import Example, Examples
from softprompt.data.layout import Layout, PackedShape
from softprompt.data.records import Record
from softprompt.experiment.reading import ExperimentFile, load_experiment
from softprompt.experiment.schema import Experiment, GenerationSettings
from softprompt.generation import decoding
from softprompt.generation.sampling import Sampling
from softprompt.sweep.space import Space

GOLDEN = Path(__file__).parent / "golden"
FAMILIES_GOLDEN = GOLDEN / "families"
REPOSITORY = Path(__file__).parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
compile_quickly()


# Files that take longest, the longest first. They start first, so that both workers end
# together, and `make test-fast` leaves them out.
SLOW = [
    "test_families",
    "test_training",
    "test_hosts",
    "test_methods",
    "test_sweep",
    "test_sweep_devices",
    "test_generation",
    "test_mesh",
    "test_compare",
    "test_generator",
    "test_kill_loop",
    "test_study",
    "test_experiments",
    "test_export",
    "test_soft_prompt",
    "test_merged",
    "test_peft",
    "test_compute",
    "test_docs",
    "test_step",
    "test_report",
    "test_encoder_decoder",
    "test_free_text",
    "test_evaluation",
    "test_figures",
    "test_lora",
    "test_positions",
    "test_plan",
    "test_compression",
    "test_sharded_loading",
    "test_decoder",
    "test_card",
    "test_ensemble",
    "test_cli",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, and run slow files first."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Free the memory maps of compiled programs after each file: Linux allows 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def log():
    """Log messages go to standard error, as on the command line."""
    with printed_log():
        yield


@pytest.fixture
def strict_types():
    """Forbid implicit type promotion. Not for all tests, because Optax relies on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny() -> Base:
    """A Llama model with three layers, random weights and a byte tokenizer."""
    return softprompt.load_base(str(GOLDEN / "llama-grouped"))


@pytest.fixture(scope="session")
def smollm2() -> Base:
    """The real default base model."""
    return softprompt.load_base("smollm2-135m-instruct")


@pytest.fixture
def optimized():
    """Compile with optimizations, for tests that run the real model for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def golden_llama() -> dict[str, np.ndarray]:
    """The reference's results for `tiny`."""
    return dict(np.load(GOLDEN / "llama-grouped" / "golden.npz"))


@functools.cache
def golden_backbone(variant: str, dtype: str = "float32", quantize: str | None = None) -> Backbone:
    """Load a small model from `golden/families`. These models have no tokenizers."""
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    return load_backbone(file, dtype=dtype, quantize=quantize)[0]


def greedy(backbone, prefix, tokens, lengths, end: int, *, count: int) -> np.ndarray:
    """Return `count` greedily decoded tokens for each row, `[B, count]`, padded with `end`."""
    rows = len(tokens)
    seeds, ends = np.zeros(rows, np.uint32), np.full((rows, 1), end)
    sampling = Sampling.from_settings(GenerationSettings(), rows)
    state = decoding.start(
        backbone, prefix, tokens, lengths, seeds, None, sampling, ends, capacity=count
    )
    state = decoding.continue_decoding(backbone, prefix, state, np.full(rows, count))
    unwritten = np.arange(count)[None] >= np.asarray(state.lengths)[:, None]
    return np.where(unwritten, end, np.asarray(state.tokens))


def example_of(tokens: list[int], candidates: list[list[int]], answer: int) -> Example:
    """Make an example from token ids."""
    return Example(tokens, candidates, answer, Record({}, "a test"), truncated=False)


def batch_of(
    examples: Sequence[Example], separate_targets: bool = False, packs: int = 1, padding: int = 3
) -> Batch:
    """Lay out examples as a batch with some padding and one row more than needed in each pack."""
    dataset = Examples(examples)
    layout, size = Layout.of(dataset.lengths, separate_targets), -(-len(examples) // packs)
    parts = [examples[i * size : (i + 1) * size] for i in range(packs)]
    lengths, targets = layout.row_lengths(dataset.lengths), dataset.lengths.targets
    return layout.lay_out(
        parts,
        PackedShape(
            packs,
            size + 1,
            max(lengths[i * size : (i + 1) * size].sum() for i in range(packs)) + padding,
            max(targets[i * size : (i + 1) * size].sum() for i in range(packs)) + padding,
            lengths.max() + padding,
            targets.max(),
        ),
    )


def batch_with_all_targets(tokens: np.ndarray, lengths: np.ndarray) -> Batch:
    """Return a batch of rows `[B, T]` that predicts a target from every token."""
    rows = zip(tokens, lengths, strict=True)
    batch = batch_of([example_of(row[:length].tolist(), [[0]], 0) for row, length in rows])
    return dataclasses.replace(
        batch,
        targets=batch.tokens,
        target_lengths=batch.lengths,
        target_candidates=batch.tokens * 0,
        target_indices=np.arange(batch.tokens.size)[None],
        row_targets=tokens.shape[1],
    )


def rows_of(batch: Batch, values) -> np.ndarray:
    """Return what belongs to the targets `[G, M, ...]` of a batch as rows."""
    return np.asarray(batch.target_rows.to_rows(jnp.asarray(values)))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Make a character tokenizer that ends every text with `</s>`, as T5's does."""
    characters = f" {string.ascii_lowercase}{string.ascii_uppercase}{string.digits}"
    tokens = ["<pad>", "</s>", "<unk>", *characters][:61]  # as many as the golden model has
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small T5 model with random weights."""
    folder = tmp_path_factory.mktemp("t5")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FAMILIES_GOLDEN / "t5-gated" / file, folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


_EXPERIMENT = """\
base: {base}
data: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}
template: {{input: "{{text}} is"}}
verbalizer: {{low: " ab", high: " cd"}}
prompt: {{length: 3}}
optimizer: {{learning_rate: 0.1, warmup_steps: 2}}
training: {{steps: 12, batch_size: 4, log_every: 5}}
evaluation: {{every: 4, metric: accuracy}}
"""


def write_experiment(folder: Path, shortest: int = 1, longest: int = 11) -> Path:
    """Write an experiment that trains in seconds: is a letter early or late in the alphabet?

    If all texts have one length, all batches have one shape and fewer programs are compiled.
    """
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("validation", 9), ("test", 7)):
        letters = random.integers(0, 26, count)
        records = [
            {
                "text": chr(97 + n) * int(random.integers(shortest, longest + 1)),
                "label": "low" if n < 13 else "high",
            }
            for n in letters
        ]
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    path = folder / "letters.yaml"
    path.write_text(_EXPERIMENT.format(base=GOLDEN / "llama-grouped"))
    return path


def write_experiment_with_data(folder: Path, data: dict[str, Any]) -> Path:
    """Write the experiment of `write_experiment` with another section `data`."""
    path = write_experiment(folder, 5, 5)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"data": data}))
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command and returns its status, its output and its errors."""

    def call(*arguments):
        capsys.readouterr()
        return main([str(a) for a in arguments]), *capsys.readouterr()

    return call


@pytest.fixture
def experiment_file(tmp_path: Path) -> Path:
    return write_experiment(tmp_path)


@pytest.fixture
def experiment(experiment_file: Path) -> Experiment:
    return load_experiment(experiment_file)


@pytest.fixture
def space(tmp_path: Path) -> Callable[..., Space]:
    """Make the search space of a sweep over the letters experiment."""

    def space(section: str, *overrides: str, folder: str = "sweep") -> Space:
        path = write_experiment(tmp_path, 5, 5)
        path.write_text(f"{path.read_text()}sweep:\n{section}")
        return Space(ExperimentFile(path, overrides), tmp_path / folder)

    return space


_SWEEP = """\
import os, sys, time
from pathlib import Path
from softprompt.cli.main import main
from softprompt.sweep import scheduler
real = scheduler.Scheduler._step
def step(self, slots):
{before}
    real(self, slots)
scheduler.Scheduler._step = step
sys.exit(main())
"""


def sweep_process(space: Space, before: str, *overrides: str) -> ForkedProcess:
    """Start `softprompt sweep` in a process. Each step first runs `before`, which sees `slots`."""
    code = _SWEEP.format(before=textwrap.indent(before, "    "))
    command = ["sweep", str(space.file.path), *overrides, "--folder", str(space.folder)]
    return ForkedProcess(code, command)
