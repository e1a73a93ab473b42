#!/usr/bin/env bash
# Serves a target with its draft: examples/serve.sh [TARGET DRAFT [more options of `vllm serve`]]
# Without arguments it serves the default models. examples/client.py asks it a question.
set -euo pipefail
target=${1:-$(vllm-eagle3 fetch-demo --target)}
draft=${2:-$(vllm-eagle3 fetch-demo --draft)}
exec vllm serve "$target" --served-model-name target --max-model-len 2048 \
  --speculative-config "{\"method\": \"eagle3\", \"model\": \"$draft\", \"num_speculative_tokens\": 3}" "${@:3}"
