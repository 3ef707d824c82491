#!/usr/bin/env bash
# Install the built wheel in a fresh environment outside the repository, train and predict.
# tests/try_wheel.sh [PYTHON]
set -euo pipefail
python=${1:-python3}
repository=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(echo "$repository"/dist/softprompt-*.whl)
base=$repository/tests/golden/llama-grouped
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH

if command -v uv > /dev/null; then
    uv venv --quiet --python "$python" fresh
    uv pip install --quiet --python fresh/bin/python "$wheel"
else
    "$python" -m venv fresh
    fresh/bin/pip install --quiet --disable-pip-version-check "$wheel"
fi

for i in 0 1 2 3; do
    echo '{"text": "aa", "label": "low"}'
    echo '{"text": "zz", "label": "high"}'
done > letters.jsonl
cat > letters.yaml << END
base: $base
data: {train: letters.jsonl, validation: letters.jsonl}
template: {input: "{text} is"}
verbalizer: {low: " ab", high: " cd"}
prompt: {length: 3}
training: {steps: 4, batch_size: 4}
evaluation: {every: 2, metric: accuracy, forgetting: true}
END
fresh/bin/softprompt --version
fresh/bin/softprompt --help > /dev/null
fresh/bin/softprompt train letters.yaml --run-dir run
grep --quiet '"forgetting"' run/summary.json  # of the texts in the package
fresh/bin/softprompt predict run "aa" | tee prediction.json
grep --quiet '"label"' prediction.json
fresh/bin/python -c "
import softprompt
assert softprompt.__file__.startswith('$folder'), softprompt.__file__
print(softprompt.load_prompt('run'))
"
