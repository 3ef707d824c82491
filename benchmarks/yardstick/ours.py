"""The worker of softprompt: trains, classifies and generates for one case. See `processes.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flops import Shapes, measure_rate
from prepare import EXPERIMENT, initial_method
from processes import CLOCKS, peak_memory, serve
from workload import Workload

from softprompt import (
    Record,
    TrainedPrompt,
    TrainingBatches,
    cross_entropy,
    load_base,
    load_experiment,
    make_task,
    split,
    train_step,
)
from softprompt.data.examples import Example, Examples
from softprompt.experiment.schema import GenerationSettings, OptimizerSettings
from softprompt.generation import decoding
from softprompt.generation.sampling import Sampling
from softprompt.plan.flops import count_flops
from softprompt.training.optimizers import UpdateRule, hyperparameters


class Ours:
    """One process. Its commands are the public methods."""

    def __init__(self, folder, case):
        self.work, self.case = Workload(folder, case), case
        self.clock = CLOCKS[case["clock"]]
        self.base = load_base(str(folder / "base"), dtype=case["dtype"])
        kind, length = case["method"], case["virtual"]
        virtual = [~i for i in range(length)] if kind == "prompt" else []
        self.start = initial_method(
            self.base, kind, length, case["rank"], [*virtual, *self.work.opening]
        )

    def prepare_training(self):
        """Lay out the examples, and split the state."""
        record = Record({}, "benchmark")
        examples = [Example(row, [target], 0, record, False) for row, target in self.work.rows]
        self.batches = TrainingBatches(Examples(examples), self.case["batch"], seed=0)
        rate = self.work.rates[self.case["method"]]
        settings = OptimizerSettings(**self.work.optimizer | {"learning_rate": rate})
        rule = UpdateRule.of(settings)
        graphdef, self.trainable, self.frozen = split(self.start, self.base.backbone)
        self.opt_state = rule.init(self.trainable, hyperparameters(settings, self.work.steps))
        self.program = {"graphdef": graphdef, "optimizer": rule, "objective": cross_entropy}

    def steps(self, order, numbers):
        """Train on batches, and return the seconds and the loss of each step."""
        assert order == "ours"
        seconds, losses = [], []
        for number in numbers:
            began = self.clock()
            self.trainable, self.opt_state, measured = train_step(
                *self._arrays(number), **self.program
            )
            losses.append(float(measured["loss"]))
            seconds.append(self.clock() - began)
        return {"seconds": seconds, "losses": losses}

    def program_flops(self, numbers):
        """Count the operations of the compiled step, including padding and recomputation."""
        return sum(
            count_flops(train_step.trace(*self._arrays(number), **self.program))
            for number in numbers
        )

    def _arrays(self, number):
        key = jax.random.key(0)
        return self.trainable, self.opt_state, self.frozen, self.batches[number], key

    def used(self):
        """Return the CPU seconds of this process."""
        return CLOCKS["cpu"]()

    def memory(self):
        """Return the peak memory in bytes, of the accelerator or of this process."""
        statistics = jax.devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use") or peak_memory()

    def rate(self, rows):
        """Return the rate of matrix products of so many rows."""
        random, dtype = np.random.default_rng(0), self.case["dtype"]
        return measure_rate(
            lambda *size: jnp.asarray(random.standard_normal(size), dtype),
            jax.jit(jnp.matmul),
            jax.jit(lambda x, w: x @ w.T),
            jax.block_until_ready,
            self.clock,
            Shapes.of(self.base.config),
            rows,
        )

    def prepare_labels(self):
        """Make a prompt that labels texts, from the current state of training."""
        experiment = load_experiment(EXPERIMENT)
        virtual = self.case["virtual"] if self.case["method"] == "prompt" else 0
        template, verbalizer = experiment.template, experiment.verbalizer
        task = make_task(self.base, template, verbalizer, virtual_tokens=virtual)
        self.labels = list(verbalizer)
        method = self.start
        if self.case["batch"]:  # a step deletes the arrays that it started from
            method, _ = nnx.merge(self.program["graphdef"], self.trainable, *self.frozen)
        self.prompt = TrainedPrompt.from_method(method, self.base, task)

    def classify(self, split, numbers, batch_size):
        """Label texts, and return the seconds and the log-odds of the first label."""
        texts = [self.work.splits[split]["texts"][i] for i in numbers]
        began = self.clock()
        predictions = self.prompt.classify(texts, batch_size)
        seconds = self.clock() - began
        first, second = self.labels
        odds = [np.log(p.probabilities[first] / p.probabilities[second]) for p in predictions]
        return {"seconds": seconds, "odds": list(map(float, odds))}

    def generate(self, tokens, new):
        """Continue rows of equal length greedily, without stopping at an end-of-text token."""
        trained = TrainedPrompt.from_method(self.start, self.base)
        tokens = np.array(tokens)
        rows = len(tokens)
        ends, seeds = np.full((rows, 1), -1), np.zeros(rows, np.uint32)
        sampling = Sampling.from_settings(GenerationSettings(), rows)
        jax.block_until_ready(trained.prefix.keys)
        began = self.clock()
        prefix = trained.prefix.packed([trained.prefix], [0] * rows)
        lengths = np.full(rows, tokens.shape[1])
        state = decoding.start(
            trained.backbone, prefix, tokens, lengths, seeds, None, sampling, ends, capacity=new
        )
        state = decoding.continue_decoding(trained.backbone, prefix, state, np.full(rows, new))
        generated = np.asarray(state.tokens)[:, :new].tolist()
        return {"seconds": self.clock() - began, "tokens": generated}


if __name__ == "__main__":
    serve(Ours)
