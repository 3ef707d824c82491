"""The worker of peft, in an environment with torch. It has the commands of `ours.py`."""

import math

import peft
import torch
import transformers
from flops import Shapes, measure_rate
from processes import CLOCKS, peak_memory, serve
from safetensors.torch import load_file
from workload import Workload


class Theirs:
    """One process. Its commands are the public methods."""

    def __init__(self, folder, case):
        transformers.utils.logging.set_verbosity_error()
        self.work, self.case = Workload(folder, case), case
        self.clock = CLOCKS[case["clock"]]
        self.device = torch.device("cuda" if case["platform"] != "cpu" else "cpu")
        self.dtype = getattr(torch, case["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=self.dtype)
        adapter = folder / "{method}-{virtual}-{rank}".format(**case)
        # `PeftModel.from_pretrained` does not train soft prompts.
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode = False
        model = peft.get_peft_model(model, config)
        arrays = load_file(adapter / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(model, arrays)
        self.model = model.to(self.device)

    def prepare_training(self):
        """Make the optimizer, with the schedule and the clipping of the experiment."""
        settings, warmup = self.work.optimizer, self.work.optimizer["warmup_steps"]
        assert settings["name"] == "adamw"
        rate = self.work.rates[self.case["method"]]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay = settings["weight_decay"]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)

        def share(step):
            if step < warmup:
                return (step + 1) / warmup
            done = min(1, (step - warmup) / (self.work.steps - warmup))
            cosine = (1 + math.cos(math.pi * done)) / 2
            return {"constant": 1, "linear": 1 - done, "cosine": cosine}[settings["schedule"]]

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.model.train()

    def steps(self, order, numbers):
        """Train on batches, and return the seconds and the loss of each step."""
        seconds, losses = [], []
        for number in numbers:
            began = self.clock()
            loss = self.model(**self._training_batch(self.work.batch(order, number))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.work.optimizer["clip_norm"])
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self._wait()
            seconds.append(self.clock() - began)
        return {"seconds": seconds, "losses": losses}

    def _training_batch(self, rows):
        inputs = [[*self.work.opening, *row] for row, _ in rows]
        whole = [row + target for row, (_, target) in zip(inputs, rows, strict=True)]
        labels = [[-100] * len(row) + target for row, (_, target) in zip(inputs, rows, strict=True)]
        return self._padded(whole) | {"labels": self._tensor(labels, -100)}

    def _padded(self, rows):
        mask = [[1] * len(row) for row in rows]
        return {"input_ids": self._tensor(rows, 0), "attention_mask": self._tensor(mask, 0)}

    def _tensor(self, rows, padding):
        length = max(map(len, rows))
        padded = [row + [padding] * (length - len(row)) for row in rows]
        return torch.tensor(padded, device=self.device)

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def used(self):
        """Return the CPU seconds of this process."""
        return CLOCKS["cpu"]()

    def memory(self):
        """Return the peak memory in bytes, of the accelerator or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_memory()

    def rate(self, rows):
        """Return the rate of matrix products of so many rows."""
        return measure_rate(
            lambda *size: torch.randn(size, dtype=self.dtype, device=self.device),
            torch.mm,
            lambda x, w: torch.mm(x, w.T),
            lambda results: self._wait(),
            self.clock,
            Shapes.of(self.model.config.to_dict()),
            rows,
        )

    def prepare_labels(self):
        """Nothing: the model labels rows as it is."""

    def classify(self, split, numbers, batch_size):
        """Compare the logits of the labels' tokens after each row of ids."""
        inputs = self.work.splits[split]["inputs"]
        order = sorted(range(len(numbers)), key=lambda i: len(inputs[numbers[i]]))
        odds = [0.0] * len(numbers)
        self.model.eval()
        began = self.clock()
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [[*self.work.opening, *inputs[numbers[i]]] for i in part]
            with torch.inference_mode():
                logits = self.model(**self._padded(rows)).logits  # [B, T, V]
            before = logits.shape[1] - max(map(len, rows))  # virtual tokens
            last = torch.tensor([before + len(row) - 1 for row in rows], device=self.device)
            pairs = logits[torch.arange(len(rows), device=self.device), last][:, self.work.labels]
            for i, odd in zip(part, (pairs[:, 0] - pairs[:, 1]).tolist(), strict=True):
                odds[i] = odd
        seconds = self.clock() - began
        self.model.train()
        return {"seconds": seconds, "odds": odds}

    def generate(self, tokens, new):
        """Continue rows of equal length greedily, without stopping at an end-of-text token."""
        tokens = torch.tensor(tokens, device=self.device)
        settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        self.model.generation_config.eos_token_id = None  # `min_new_tokens` would forbid the token
        mask = torch.ones_like(tokens)
        self.model.eval()
        began = self.clock()
        with torch.inference_mode():
            generated = self.model.generate(input_ids=tokens, attention_mask=mask, **settings)
        self._wait()
        seconds = self.clock() - began
        self.model.train()
        return {"seconds": seconds, "tokens": generated[:, -new:].tolist()}


if __name__ == "__main__":
    serve(Theirs)
