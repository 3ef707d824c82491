"""The real lm-eval, in an environment of its own: `make lm-eval-test`."""

import json

import numpy as np
import pytest
import yaml
from conftest import GOLDEN, example_of
from servers import save_prompt, serving

from softprompt import load_prompt
from softprompt.evaluation.scoring import score

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROWS = [
    {"text": "hello", "choices": [" you", " me", "!"], "answer": 0},
    {"text": "a b c", "choices": [" d", " zz"], "answer": 1},
    {"text": "letters are", "choices": [" many", " few", " a lot", " q"], "answer": 2},
]


def test_a_task_of_lm_eval_has_our_scores(tiny, tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(task))
    folder = save_prompt(tmp_path / "texts", tiny, 1)
    with serving(tiny, {"texts": folder}) as server:
        model = LocalCompletionsAPI(
            model="texts",
            base_url=f"{server.url}/v1/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(GOLDEN / "llama-grouped"),
            batch_size=4,
            max_length=100,
        )
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model,
            tasks=["letters"],
            task_manager=manager,
            bootstrap_iters=0,
            torch_random_seed=None,
        )
    prompt, right = load_prompt(folder, tiny), []
    encode = lambda text: tiny.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    for row, sample in zip(ROWS, results["samples"]["letters"], strict=True):
        examples = [example_of(encode(row["text"]), [encode(c)], 0) for c in row["choices"]]
        expected = np.empty(len(examples))
        for numbers, part in score(prompt.backbone, prompt.prefix, examples, 4):
            expected[numbers] = part[:, 0]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        np.testing.assert_allclose(found, expected, atol=1e-3)
        right.append(expected.argmax() == row["answer"])
    assert results["results"]["letters"]["acc,none"] == np.mean(right)
